"""Messages between processes."""

import pickle
from typing import get_args

import pytest

from llumnix.core.events import (
    AddInstances,
    Dispatch,
    DrainInstance,
    FleetReported,
    InstanceLost,
    LoadReported,
    MoveLimit,
    MoveOrder,
    NoInstance,
    PrefixesChanged,
    RequestArrived,
    SettingsChanged,
    UndrainInstance,
)
from llumnix.core.messages import (
    CancelMigration,
    DrainRequested,
    Handover,
    HandoverAnnounced,
    Migrate,
    MigrationEnded,
    MigrationRequested,
    Reserve,
    Reserved,
    Revive,
    Stage,
    Staged,
    StageDone,
    StageProgress,
    TookOver,
    Verdict,
)
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.settings import AdmissionSettings, ScalingSettings, SchedulerSettings
from llumnix.core.types import EngineIndex, Epoch, InstanceId, MigrationId, OrderId, RequestId
from llumnix.errors import ProtocolError
from llumnix.wire import Loads, LoadsAsked, Message, Ping, Pong, decode, encode

REPORT = LoadReport(
    instance=InstanceId("i0"),
    engine_index=EngineIndex(65535),
    sequence=7,
    kv_tokens_used=32,
    kv_tokens_total=4096,
    classes=(
        ClassLoad(),
        ClassLoad(running=2, waiting=1, waiting_tokens=48, waiting_shared=16, waiting_prefill=33),
    ),
    head_tokens=48,
    orders=(OrderId(4),),
    admitted=(RequestId("a"), RequestId("ü")),
    accepting=False,
)


MIGRATION = MigrationId("m7")
SAMPLES: list[Message] = [
    RequestArrived(request=RequestId("r"), prompt_tokens=5, priority=-3),
    LoadReported(report=REPORT),
    InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(1)),
    Dispatch(
        request=RequestId("r"),
        instance=InstanceId("i0"),
        engine_index=EngineIndex(0),
        why="because",
    ),
    NoInstance(request=RequestId("r"), why="none"),
    PrefixesChanged(
        instance=InstanceId("i0"), engine_index=EngineIndex(1), stored=(2**62,), removed=(5,)
    ),
    FleetReported(
        starting=1,
        serving=(InstanceId("i0"),),
        draining=(InstanceId("i1"),),
        drained_by={InstanceId("i1"): "signal"},
        given_up=2,
    ),
    SettingsChanged(
        settings=SchedulerSettings(
            scaling=ScalingSettings(instances_max=3), admission=AdmissionSettings(queue_max=9)
        )
    ),
    MoveOrder(
        order=OrderId(3),
        source=InstanceId("i0"),
        source_engine=EngineIndex(0),
        destination=InstanceId("i1"),
        destination_engine=EngineIndex(1),
        limits=(MoveLimit(rank=1, tokens_min=1, tokens_wanted=2, tokens_max=3, waiting_max=4),),
        why="because",
        source_sequence=7,
    ),
    AddInstances(count=2, total=9, why="because"),
    DrainInstance(instance=InstanceId("i0"), why="because"),
    UndrainInstance(instance=InstanceId("i0"), why="because"),
    MigrationRequested(request=RequestId("r"), destination=EngineIndex(1), why="because"),
    DrainRequested(request=RequestId(""), why="because"),
    Ping(number=1),
    Pong(number=1),
    LoadsAsked(number=2),
    Loads(number=2, reports=[REPORT]),
    Migrate(
        migration=MIGRATION,
        request=RequestId("r"),
        destination=EngineIndex(65535),
        address="ipc:///there",
        epoch=Epoch(3),
        copy="blocking",
        client=17,
    ),
    Revive(
        migration=MIGRATION,
        request=RequestId("r"),
        destination=EngineIndex(65535),
        epoch=Epoch(3),
        outputs=[5, 65535],
        client=17,
    ),
    Reserve(
        migration=MIGRATION,
        request=RequestId("r"),
        source=EngineIndex(0),
        address="tcp://10.0.0.1:5",
        epoch=Epoch(3),
        body=b"\x00\xff",
        outputs=[0, 151_935],
        tokens=80,
        agents=["unix:/a-0", "unix:/a-1"],
        client=17,
    ),
    Stage(
        migration=MIGRATION,
        stage=2,
        start=16,
        end=48,
        blocks=[[4, 5], [-1, 9]],
        first_output=2,
        outputs=[7],
        tokens=96,
    ),
    Handover(
        migration=MIGRATION,
        request=RequestId("r1"),
        source=EngineIndex(1),
        address="ipc:///tmp/x",
        start=48,
        end=50,
        blocks=[[6], []],
        first_output=3,
        outputs=[],
        state=b"\x80",
    ),
    CancelMigration(migration=MIGRATION, why="it ended meanwhile"),
    Reserved(migration=MIGRATION, hit=16),
    Revive(
        migration=MIGRATION,
        request=RequestId("r"),
        destination=EngineIndex(2),
        epoch=Epoch(3),
        outputs=[5, 6],
    ),
    HandoverAnnounced(migration=MigrationId("m1"), in_s=0.02),
    Staged(migration=MIGRATION, stage=2, bytes=2**33, seconds=0.25),
    StageProgress(migration=MIGRATION, stage=2),
    Verdict(migration=MIGRATION, taken=True, why="", bytes=4096, seconds=0.001),
    TookOver(migration=MIGRATION, request=RequestId("r"), epoch=Epoch(3), outputs=513, tail=[1, 2]),
    MigrationEnded(
        migration=MIGRATION,
        request=RequestId("r"),
        taken=True,
        why="",
        stages=[StageDone(tokens=32, bytes=4096, ms=1.5)],
        downtime_ms=None,
        total_ms=9.5,
    ),
]


def test_settings_out_of_bounds_are_no_message() -> None:
    good = encode(SettingsChanged(settings=SchedulerSettings()))
    assert good.count(b"interval_s\xcb?") == 1
    with pytest.raises(ProtocolError, match="not a message of ours"):
        decode(good.replace(b"interval_s\xcb?", b"interval_s\xcb\x7f"))


def test_there_is_a_sample_of_every_message() -> None:
    assert {type(m) for m in SAMPLES} == set(get_args(Message))


@pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)
def test_what_is_sent_arrives(message: Message) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "payload",
    [b"", b"\x00", b"hello", encode(Ping(number=1))[:-1], b"\x92\xa4Evil\x80", pickle.dumps([1])],
)
def test_anything_else_is_refused_and_never_unpickled(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a message of ours"):
        decode(payload)


def test_wrong_types_are_refused() -> None:
    bad = encode(Ping(number=1)).replace(b"\x01", b"\xc0")
    with pytest.raises(ProtocolError):
        decode(bad)
