"""Facts cross sockets: whatever numbers they have, the scheduler refuses them or handles them."""

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.core.events import (
    Fact,
    FleetReported,
    InstanceLost,
    LoadReported,
    PrefixesChanged,
    RequestArrived,
    Tick,
)
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.presets import POLICIES
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.settings import ScalingSettings, SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.errors import ProtocolError

GOOD = LoadReport(
    instance=InstanceId("i0"),
    engine_index=EngineIndex(0),
    sequence=1,
    kv_tokens_used=100,
    kv_tokens_total=1000,
    classes=(ClassLoad(), ClassLoad(running=1)),
)
COUNTS = [f.name for f in fields(LoadReport) if f.type is int or f.name == "engine_index"]
SECONDS = [f.name for f in fields(LoadReport) if f.type is float]


@pytest.mark.parametrize(
    "odd",
    [
        *({name: -1} for name in COUNTS),
        *({name: value} for name in SECONDS for value in (-0.1, math.nan, math.inf)),
        {"classes": (ClassLoad(),)},
        {"classes": (ClassLoad(),) * 3},
        {"classes": (ClassLoad(), ClassLoad(waiting_shared=-1))},
        {"block_tokens": 0},
        {"engine_index": 2**16},
    ],
    ids=str,
)
def test_a_report_that_makes_no_sense_is_refused_and_changes_nothing(odd: dict) -> None:
    s = Scheduler(SchedulerSettings())
    s.handle(LoadReported(report=GOOD), 0.0)
    with pytest.raises(ProtocolError, match="refused"):
        s.handle(LoadReported(report=replace(GOOD, **{"sequence": 2, **odd})), 0.1)
    assert s.view[InstanceId("i0")].report == GOOD
    assert len(s.view) == 1


@pytest.mark.parametrize(
    "odd",
    [
        RequestArrived(request=RequestId("r"), prompt_tokens=-1),
        RequestArrived(request=RequestId("r"), prompt_tokens=2**40 + 1),
        FleetReported(starting=-1, serving=(), draining=()),
        FleetReported(starting=0, serving=(), draining=(), given_up=-1),
        InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(2**16)),
        InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(-1)),
    ],
    ids=str,
)
def test_another_fact_that_makes_no_sense_is_refused_too(odd: Fact) -> None:
    s = Scheduler(SchedulerSettings())
    s.handle(LoadReported(report=GOOD), 0.0)
    with pytest.raises(ProtocolError, match="refused"):
        s.handle(odd, 0.1)
    assert s.view[InstanceId("i0")].report == GOOD


@pytest.mark.parametrize(
    "at_the_edge",
    [
        RequestArrived(request=RequestId("r"), prompt_tokens=0),
        RequestArrived(request=RequestId("r"), prompt_tokens=2**40),
        FleetReported(starting=0, serving=(), draining=(), given_up=0),
        InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(2**16 - 1)),
        LoadReported(report=replace(GOOD, sequence=2, kv_tokens_used=0, block_tokens=1)),
    ],
    ids=str,
)
def test_the_largest_and_the_smallest_that_make_sense_are_handled(at_the_edge: Fact) -> None:
    s = Scheduler(SchedulerSettings())
    s.handle(LoadReported(report=GOOD), 0.0)
    s.handle(at_the_edge, 0.1)


def test_every_number_of_a_report_is_looked_at() -> None:
    assert len(COUNTS) + len(SECONDS) == sum(f.type in (int, float) for f in fields(LoadReport)) + 1


# Odd, but of those that are not refused one by one.
numbers = st.one_of(st.sampled_from([0, 1, 2, 7, 1000, 2**40, 2**62]), st.integers(0, 2000))
seconds = st.sampled_from([0.0, 0.1, 5.0, 1e300])
names = st.sampled_from(["i0", "i1", "i2"])
classes = st.lists(
    st.builds(
        ClassLoad,
        running=numbers,
        waiting=numbers,
        waiting_tokens=numbers,
        waiting_shared=numbers,
        waiting_prefill=numbers,
    ),
    min_size=2,
    max_size=2,
).map(tuple)
hashes = st.lists(numbers, max_size=3).map(tuple)
indices = st.integers(0, 3)
facts = st.one_of(
    st.builds(
        LoadReported,
        report=st.builds(
            LoadReport,
            instance=names,
            engine_index=indices,
            sequence=numbers,
            classes=st.one_of(classes, st.just(())),
            admitted=st.just((RequestId("r1"),)),
            orders=hashes,
            accepting=st.booleans(),
            block_tokens=st.sampled_from([1, 16, 2**40]),
            **{n: numbers for n in COUNTS if n not in ("engine_index", "sequence", "block_tokens")},
            **dict.fromkeys(SECONDS, seconds),
        ),
    ),
    st.builds(
        RequestArrived,
        request=st.sampled_from(["r1", "r2"]),
        prompt_tokens=st.sampled_from([0, 1, 700, 2**40]),
        priority=st.integers(-(2**63), 2**63 - 1),
        prefix=hashes,
    ),
    st.builds(
        PrefixesChanged,
        instance=names,
        engine_index=indices,
        stored=hashes,
        removed=hashes,
        cleared=st.booleans(),
    ),
    st.builds(InstanceLost, instance=names, engine_index=indices),
    st.builds(
        FleetReported,
        starting=numbers,
        serving=st.lists(names, max_size=3).map(tuple),
        draining=st.lists(names, max_size=3).map(tuple),
        given_up=numbers,
    ),
    st.just(Tick()),
)


@settings(max_examples=100)
@given(st.lists(facts, max_size=25), st.sampled_from(sorted(POLICIES)))
def test_whatever_else_comes_is_handled(drawn: list[Fact], policy: str) -> None:
    scaling = ScalingSettings(instances_min=1, instances_max=4, up_after_s=0.0, down_after_s=0.0)
    s = Scheduler(SchedulerSettings(policy=policy, scaling=scaling))
    for sequence, fact in enumerate(drawn):
        s.handle(fact, sequence * 0.3)
        s.view.check(sequence * 0.3)
