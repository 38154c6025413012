"""Whose turn it is: who has waited for long, and who was preempted."""

from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

from vllm import SamplingParams  # noqa: E402
from vllm.v1.core.sched.request_queue import (  # noqa: E402
    SchedulingPolicy,
    create_request_queue,
)
from vllm.v1.request import Request  # noqa: E402

from llumnix.core.load import ClassLoad  # noqa: E402
from llumnix.core.priorities import Priorities  # noqa: E402
from llumnix.core.settings import PriorityClass, PrioritySettings  # noqa: E402
from llumnix.core.types import RequestId  # noqa: E402
from llumnix.engine import queueing  # noqa: E402
from llumnix.engine.load_reader import LoadReader, client_priority  # noqa: E402
from llumnix.engine.queueing import LOOK_EVERY_S, Queueing  # noqa: E402

AGING_S = 0.1
CLASSES = Priorities(PrioritySettings(aging_s=AGING_S))
HIGH, NORMAL = -100, 0


class Clock:
    """Stands in for the module `time` in engine/queueing.py."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def later(self) -> None:
        """Long enough for whoever was there to age, and for the next look."""
        self.now_s += LOOK_EVERY_S + AGING_S


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(queueing, "time", one)
    return one


class Line:
    """A real scheduler's queue, with nothing else behind it."""

    def __init__(self, policy: SchedulingPolicy = SchedulingPolicy.PRIORITY) -> None:
        self.policy, self.waiting = policy, create_request_queue(policy)
        self.came = 0

    def add(self, name: str, priority: int) -> Request:
        self.came += 1
        options = SamplingParams(max_tokens=1)
        known = Request(name, [1], options, None, priority=priority, arrival_time=self.came)
        self.waiting.add_request(known)
        return known

    def order(self) -> list[str]:
        return [r.request_id for r in self.waiting]


def test_one_that_has_waited_overtakes_later_urgent_ones_but_not_earlier_ones(
    clock: Clock,
) -> None:
    line = Line()
    queueing = Queueing(line, CLASSES)
    line.add("urgent-1", HIGH)
    low = line.add("low", NORMAL)
    assert not queueing.look(0)
    line.add("urgent-2", HIGH)
    assert line.order() == ["urgent-1", "urgent-2", "low"]
    clock.later()
    assert queueing.look(0)
    assert line.order() == ["urgent-1", "low", "urgent-2"]
    assert (low.priority, client_priority(low)) == (HIGH, NORMAL)
    clock.later()
    assert not queueing.look(0), "once is enough"


def test_time_counts_from_when_it_was_first_seen_to_wait(clock: Clock) -> None:
    line = Line()
    queueing = Queueing(line, CLASSES)
    low = line.add("low", NORMAL)
    assert not queueing.look(0)
    line.waiting.remove_request(low)  # It runs,
    clock.later()
    assert not queueing.look(0)
    line.waiting.prepend_request(low)  # and was preempted.
    clock.later()
    assert not queueing.look(0)
    clock.later()
    assert queueing.look(0)


def test_it_looks_only_so_often(clock: Clock) -> None:
    line = Line()
    queueing = Queueing(line, CLASSES)
    queueing.look(0)
    line.add("low", NORMAL)
    for _ in range(4):
        clock.now_s += LOOK_EVERY_S / 5
        assert not queueing.look(0)
    assert queueing._since_s == {}


def test_a_request_more_urgent_than_every_class_stays_so(clock: Clock) -> None:
    line = Line()
    queueing = Queueing(line, CLASSES)
    first = line.add("first", HIGH - 1)
    assert not queueing.look(0)
    clock.later()
    assert not queueing.look(0)
    assert (first.priority, client_priority(first)) == (HIGH - 1, HIGH - 1)


def test_all_classes_age_into_the_first(clock: Clock) -> None:
    names = {"a": -5, "b": 3, "c": 8}
    classes = tuple(PriorityClass(name=n, priority=p) for n, p in names.items())
    line = Line()
    queueing = Queueing(line, Priorities(PrioritySettings(classes=classes, aging_s=AGING_S)))
    made = [line.add(n, p) for n, p in reversed(names.items())]
    assert line.order() == ["a", "b", "c"]
    assert not queueing.look(0)
    clock.later()
    assert queueing.look(0)
    assert line.order() == ["c", "b", "a"]
    assert [(r.priority, client_priority(r)) for r in made] == [(-5, 8), (-5, 3), (-5, -5)]


def test_one_that_was_preempted_goes_before_its_class_and_not_before_urgent_ones(
    clock: Clock,
) -> None:
    line = Line()
    queueing = Queueing(line, CLASSES)
    for name in "ab":
        line.add(name, NORMAL)
    line.add("urgent", HIGH)
    back = [line.add(name, NORMAL) for name in ("young", "younger")]
    for known in back:
        known.num_preemptions = 1
    assert line.order() == ["urgent", "a", "b", "young", "younger"]
    assert queueing.look(2), "at once, for somebody was preempted"
    assert line.order() == ["urgent", "young", "younger", "a", "b"]
    assert [client_priority(known) for known in back] == [NORMAL, NORMAL]
    assert not queueing.look(3), "once is enough"
    assert line.order() == ["urgent", "young", "younger", "a", "b"]


def test_first_come_first_served_is_left_alone(clock: Clock) -> None:
    line = Line(SchedulingPolicy.FCFS)
    queueing = Queueing(line, CLASSES)
    low = line.add("low", NORMAL)
    line.add("urgent", HIGH)
    for _ in range(3):
        assert not queueing.look(0)
        clock.later()
    assert line.order() == ["low", "urgent"]
    assert low.priority == NORMAL
    assert not hasattr(low, "llumnix_priority")


@pytest.mark.parametrize("ages", [False, True])
def test_in_an_engine_it_runs_before_the_urgent_ones(engine: Any, clock: Clock, ages: bool) -> None:
    """And goes on as a request of the class that its client gave it."""
    scheduler = engine.core.scheduler
    reader, ager = LoadReader(scheduler, 4, CLASSES), Queueing(scheduler, CLASSES)
    finished: list[str] = []

    def add(name: str, priority: int, tokens: int) -> None:
        options = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        made = engine.make(RequestId(name), list(range(3, 103)), options)
        made.priority = priority
        engine.add_core_request(made)
        reader.came()

    def step() -> None:
        if ages and ager.look(reader.read().preemptions):
            reader.came()
        reader.read()
        finished.extend(name for name, _, done, _ in engine.step() if done)
        clock.later()

    for n in range(4):  # All there is room for in the batch.
        add(f"first-{n}", HIGH, 10)
    add("low", NORMAL, 30)
    step()
    for n in range(8):
        add(f"later-{n}", HIGH, 5)
    for _ in range(12):
        step()
    load = reader.read().classes
    runs = {r.request_id for r in scheduler.running}
    if ages:
        assert "low" in runs
        assert load[1] == ClassLoad(running=1)
        assert load[0].running == 3
        assert {m.request: m.priority for m in engine.port.movable()}["low"] == NORMAL
    else:
        assert "low" not in runs
        assert (load[0].running, load[1].waiting) == (4, 1)
    while not engine.idle():
        step()
    assert len(finished) == 13
    assert ages or finished[-1] == "low"
