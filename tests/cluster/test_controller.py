"""The controller's process, without Ray: one bad message ends at most itself."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zmq

from llumnix.cluster import controller as module
from llumnix.cluster.controller import FAILURES_MAX, Controller
from llumnix.config import LogPlace
from llumnix.core.events import (
    AddInstances,
    Dispatch,
    Fact,
    FleetReported,
    InstanceLost,
    LoadReported,
    MoveOrder,
    NoInstance,
    RequestArrived,
    SettingsChanged,
    Tick,
)
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.settings import (
    AdmissionSettings,
    MigrationSettings,
    ScalingSettings,
    SchedulerSettings,
)
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId
from llumnix.observe.replay import Replayed, replay
from llumnix.wire import Loads, LoadsAsked, Message, Ping, Pong, decode, encode

ANSWER_TIMEOUT_MS = 20_000


class Served:
    """A controller on a thread of its own, and a frontend's socket to it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.controller = Controller([address], SchedulerSettings())
        self.ended: list[IndexError | None] = []
        self._thread = threading.Thread(target=self._run)
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._thread.start()
        self._socket.connect(address)

    def _run(self) -> None:
        try:
            self.controller.run()
            self.ended.append(None)
        except IndexError as error:
            self.ended.append(error)

    def say(self, *messages: Message | bytes) -> None:
        for message in messages:
            self._socket.send(message if isinstance(message, bytes) else encode(message))

    def answer(self) -> Message:
        assert self._socket.poll(ANSWER_TIMEOUT_MS), f"no answer; it ended: {self.ended}"
        return decode(self._socket.recv())

    def ask(self, message: Message) -> Message:
        self.say(message)
        return self.answer()

    def another(self) -> "zmq.Socket[bytes]":
        """The socket of another frontend."""
        socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self._address)
        return socket

    def pong(self) -> Pong:
        """After all that was sent before has been handled."""
        found = self.ask(Ping(number=1))
        assert isinstance(found, Pong)
        return found

    def close(self) -> None:
        self.controller.stop()
        self._thread.join()
        self._socket.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    one = Served(f"ipc://{tmp_path}/controller")
    yield one
    one.close()


def report(number: int, sequence: int = 1, **more: Any) -> LoadReported:
    given: dict[str, Any] = {
        "kv_tokens_used": 0,
        "kv_tokens_total": 1000,
        "classes": (ClassLoad(), ClassLoad()),
        **more,
    }
    return LoadReported(
        report=LoadReport(
            instance=InstanceId(f"i{number}"),
            engine_index=EngineIndex(number),
            sequence=sequence,
            **given,
        )
    )


def asked(name: str) -> RequestArrived:
    return RequestArrived(request=RequestId(name), prompt_tokens=1)


def lines_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def breaks(controller: Controller, when: type, *, only: str | None = None) -> None:
    """A bug in the scheduler that such facts bring to light."""
    works = controller._scheduler.handle

    def handle(fact: Fact, now: float) -> Any:
        if isinstance(fact, when) and (only is None or getattr(fact, "request", None) == only):
            raise IndexError("a bug")
        return works(fact, now)

    controller._scheduler.handle = handle  # type: ignore[method-assign]


def test_what_makes_no_sense_is_refused_and_counted_and_the_rest_goes_on(served: Served) -> None:
    served.say(report(0))
    nonsense: list[Message | bytes] = [
        b"",
        b"no message",
        report(0, 2, classes=(ClassLoad(),) * 3),
        report(1, kv_tokens_used=-1),
        report(1, stalled_s=float("nan")),
        InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(-1)),
        Pong(number=1),
        Dispatch(
            request=RequestId("r"), instance=InstanceId("i"), engine_index=EngineIndex(0), why=""
        ),
    ]
    served.say(*nonsense)
    pong = served.pong()
    assert (pong.refused, pong.failed) == (len(nonsense), 0)
    placed = served.ask(asked("r"))
    assert isinstance(placed, Dispatch)
    assert placed.instance == "i0"
    loads = served.ask(LoadsAsked(number=1))
    assert isinstance(loads, Loads)
    assert [r.instance for r in loads.reports] == ["i0"]


def test_a_bug_that_one_message_brings_to_light_ends_that_one_alone(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    breaks(served.controller, RequestArrived, only="poison")
    served.say(report(0))
    with caplog.at_level(logging.ERROR):
        poisoned = served.ask(asked("poison"))
    assert isinstance(poisoned, NoInstance), "its frontend must not wait for it"
    assert isinstance(served.ask(asked("other")), Dispatch)
    pong = served.pong()
    assert (pong.failed, pong.story) == (1, "IndexError: a bug")
    (told,) = [r for r in caplog.records if "which is a bug" in r.message]
    assert told.exc_info is not None


def test_bugs_are_told_of_now_and_then_and_counted_all(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    breaks(served.controller, RequestArrived, only="poison")
    served.say(report(0))
    with caplog.at_level(logging.ERROR):
        for n in range(2 * FAILURES_MAX):
            served.ask(asked("poison"))
            served.ask(asked(f"r{n}"))
    assert served.pong().failed == 2 * FAILURES_MAX
    told = [r for r in caplog.records if "which is a bug" in r.message]
    assert len(told) < FAILURES_MAX, "at most every ten seconds"


def test_an_instance_whose_report_failed_is_learned_anew(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.say(report(0))
    served.pong()
    view, applied = served.controller._scheduler.view, []
    apply = view.apply

    def half(one: LoadReport, now: float) -> None:
        apply(one, now)
        applied.append(one)
        if len(applied) == 1:
            raise KeyError("in the middle of it")

    monkeypatch.setattr(view, "apply", half)
    served.say(report(0, 2))
    served.pong()
    assert InstanceId("i0") not in view
    served.say(report(0, 3))
    assert isinstance(served.ask(asked("r")), Dispatch)


def test_an_instance_that_is_forgotten_is_named_with_the_reason(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(one: LoadReport, now: float) -> None:
        raise KeyError(f"a bug about {one.instance}")

    monkeypatch.setattr(served.controller._scheduler.view, "apply", fails)
    with caplog.at_level(logging.ERROR):
        for sequence in range(1, 4):
            served.say(report(0, sequence), report(1, sequence))
        served.pong()
    told = [r.getMessage() for r in caplog.records if "it is unknown" in r.getMessage()]
    assert told == [
        f"1 reports of instance {name} could not be handled, so it is unknown until its next; "
        f"the last: KeyError: 'a bug about {name}'"
        for name in ("i0", "i1")
    ], "each once in ten seconds"


def test_a_replay_says_after_which_fact_the_decisions_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    controller = Controller([f"ipc://{tmp_path}/c"], SchedulerSettings(), LogPlace(path=str(log)))
    heard: list[LoadReported | RequestArrived] = [report(0), report(0, 2), asked("r"), report(0, 3)]
    heard += [asked("s")]
    for fact in heard:
        if fact == report(0, 2):
            breaks(controller, LoadReported)
        controller._guarded(fact, lambda fact=fact: controller._handle(b"", fact))  # type: ignore[misc]
        if fact == report(0, 2):
            monkeypatch.undo()
            del controller._scheduler.handle
    controller.stop()
    controller.run()  # It closes the log.
    (failed,) = [line for line in lines_of(log) if line["kind"] == "failed"]
    assert failed["body"]["report"]["sequence"] == 2
    assert failed["why"] == "IndexError: a bug"
    assert replay(log) == Replayed(facts=1, failed=1, skipped=3)


def test_a_fact_that_is_refused_is_no_bug_in_the_event_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    controller = Controller([f"ipc://{tmp_path}/c"], SchedulerSettings(), LogPlace(path=str(log)))
    for fact in (report(0), report(0, 2, kv_tokens_used=-1), report(0, 3)):
        controller._guarded(fact, partial(controller._handle, b"", fact))
    controller.stop()
    controller.run()  # It closes the log.
    assert [line["kind"] for line in lines_of(log) if line["kind"] == "failed"] == []
    assert replay(log).failed == 0
    assert controller._refused.count == 1


@pytest.mark.parametrize("kind", [RequestArrived, Tick])
def test_where_everything_of_a_kind_fails_another_process_must_try(
    served: Served, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOLD_EVERY_S", 0.0)
    breaks(served.controller, kind)
    if kind is RequestArrived:
        for n in range(FAILURES_MAX - 1):
            assert isinstance(served.ask(asked(f"r{n}")), NoInstance)
        served.say(asked("the last"))
    served._thread.join(timeout=20)
    (error,) = served.ended
    assert isinstance(error, IndexError)


def heard(socket: "zmq.Socket[bytes]") -> Message:
    assert socket.poll(ANSWER_TIMEOUT_MS)
    return decode(socket.recv())


def test_each_of_several_frontends_gets_its_own_answers(served: Served) -> None:
    """All count on the instances, whoever asked, and only the office is told to scale."""
    served.controller._scheduler = Scheduler(
        SchedulerSettings(scaling=ScalingSettings(instances_min=3, instances_max=4))
    )
    served.say(report(0), report(1))
    served.pong()
    one, other = served.another(), served.another()
    for n in range(3):
        for name, socket in (("one", one), ("other", other)):
            socket.send(encode(asked(f"{name} {n}")))
            placed = heard(socket)
            assert isinstance(placed, Dispatch)
            assert placed.request == f"{name} {n}"
    booked = {v.report.instance: sum(v.booked) for v in served.controller._scheduler.view}
    assert booked == {"i0": 3, "i1": 3}
    fleet = FleetReported(starting=0, serving=(), draining=())
    assert isinstance(served.ask(fleet), AddInstances)
    for socket in (one, other):
        assert not socket.poll(50)
        socket.close()


def test_a_frontend_that_is_gone_takes_no_answer_from_the_others(served: Served) -> None:
    served.say(report(0))
    served.pong()
    gone, other = served.another(), served.another()
    for n in range(100):
        gone.send(encode(asked(f"gone {n}")))
    heard(gone)
    gone.close()
    other.send(encode(asked("other")))
    placed = heard(other)
    assert isinstance(placed, Dispatch)
    assert placed.request == "other"
    assert served.pong().failed == 0
    other.close()


def test_a_controller_that_is_stopped_has_written_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    controller = Controller([f"ipc://{tmp_path}/c"], SchedulerSettings(), LogPlace(path=str(log)))
    controller.stop()
    controller.run()
    # Its process is killed from here on.
    assert controller._log._writer is None
    assert '"started"' in log.read_text()


def test_settings_that_change_count_at_once_and_are_logged_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    controller = Controller([f"ipc://{tmp_path}/c"], SchedulerSettings(), LogPlace(path=str(log)))
    settings = SchedulerSettings(
        migration=MigrationSettings(interval_s=2.5), admission=AdmissionSettings(queue_max=7)
    )
    controller._next_tick_s = time.monotonic() + 100  # By a long interval that was set before.
    for _ in range(3):  # The fleet says it again and again.
        controller._handle(b"", SettingsChanged(settings=settings))
    assert controller._scheduler.settings == settings
    assert controller._tick_s == 2.5
    assert controller._next_tick_s <= time.monotonic() + 2.5
    controller.stop()
    controller.run()
    assert log.read_text().count('"SettingsChanged"') == 1
    assert decode(encode(SettingsChanged(settings=settings))) == SettingsChanged(settings=settings)


def test_settings_that_take_a_new_start_are_refused_and_counted(served: Served) -> None:
    served.say(SettingsChanged(settings=SchedulerSettings(policy="infaas++")))
    assert (served.pong().refused, served.pong().failed) == (1, 0)


def test_logs_that_cannot_be_written_keep_no_controller_from_starting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    away = str(tmp_path / "file" / "away")
    place = LogPlace(path=away)
    controller = Controller(
        [f"ipc://{tmp_path}/c"], SchedulerSettings(), place, log=(away, "controller")
    )
    controller.stop()
    controller.run()
    kept, event_log = (record.getMessage() for record in caplog.records[:2])
    assert kept.startswith(f"The controller keeps no log: --log-dir {away} on ")
    assert event_log.startswith("The event log stands still (controller ")


def test_its_event_log_has_no_report_that_only_repeats_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "log"
    place = LogPlace(path=str(path))
    controller = Controller([f"ipc://{tmp_path}/c"], SchedulerSettings(), place)
    for sequence in range(1, 50):
        controller._decide(b"", report(0, sequence))
    controller._decide(b"", report(0, 50, kv_tokens_used=16))
    controller.stop()
    controller.run()  # It closes the log.
    kinds = [line["kind"] for line in lines_of(path)]
    assert kinds == ["log", "started", "fact", "again", "fact"]


def test_an_order_goes_to_the_engine_that_is_to_give_load_as_long_as_it_lives(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = MoveOrder(
        order=OrderId(1),
        source=InstanceId("i0"),
        source_engine=EngineIndex(0),
        destination=InstanceId("i1"),
        destination_engine=EngineIndex(1),
        limits=(),
        why="it is short of memory",
        source_sequence=1,
    )
    source, destination = served.another(), served.another()
    handle = served.controller._scheduler.handle

    def decide(fact: Fact, now: float) -> Any:
        decided = handle(fact, now)
        about = getattr(fact, "report", None)
        ordered = about is not None and (about.engine_index, about.sequence) in ((1, 2), (1, 3))
        return [order] if ordered else decided

    monkeypatch.setattr(served.controller._scheduler, "handle", decide)
    source.send(encode(report(0)))
    served.pong()
    destination.send(encode(report(1)))
    served.pong()
    while served.controller._scheduler.view.get(InstanceId("i1")) is None:
        served.pong()
    destination.send(encode(report(1, 2)))
    assert source.poll(ANSWER_TIMEOUT_MS)
    assert decode(source.recv()) == order
    served.say(InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(0)))
    served.pong()
    destination.send(encode(report(1, 3)))
    while served.controller._facts["LoadReported"] < 4:
        served.pong()
    assert not source.poll(50)
    assert not destination.poll(0)
    for socket in (source, destination):
        socket.close()
