"""Whose turn it is: who has waited for long, and who was preempted."""

import random
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

from vllm import SamplingParams  # noqa: E402
from vllm.v1.core.sched.request_queue import (  # noqa: E402
    SchedulingPolicy,
    create_request_queue,
)
from vllm.v1.request import Request, RequestStatus  # noqa: E402

from llumnix.core.priorities import AGING_LOOK_EVERY_S, Priorities  # noqa: E402
from llumnix.core.reports import ClassLoad  # noqa: E402
from llumnix.core.settings import PriorityClass, PrioritySettings  # noqa: E402
from llumnix.core.types import RequestId  # noqa: E402
from llumnix.engine import queueing  # noqa: E402
from llumnix.engine.migration.vllm_core import queue_by_arrival  # noqa: E402
from llumnix.engine.queueing import AGED_MAX, Queueing  # noqa: E402
from llumnix.engine.readings import client_priority  # noqa: E402
from llumnix.engine.reporting.load_reader import LoadReader  # noqa: E402

AGING_S = 0.1
CLASSES = Priorities(PrioritySettings(aging_s=AGING_S))
HIGH, NORMAL = -100, 0


class Clock:
    """The queue's."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def later(self) -> None:
        """Long enough for whoever was there to age, and for the next look."""
        self.now_s += AGING_LOOK_EVERY_S + AGING_S


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Line:
    """A scheduler's queue, with nothing else behind it, put in order by ours."""

    def __init__(
        self,
        clock: Clock,
        priorities: Priorities = CLASSES,
        policy: SchedulingPolicy = SchedulingPolicy.PRIORITY,
    ) -> None:
        self.policy, self.waiting = policy, create_request_queue(policy)
        self.came = 0
        self.queueing = Queueing(self, priorities, clock)

    def make(self, name: str, priority: int = NORMAL) -> Request:
        self.came += 1
        options = SamplingParams(max_tokens=1)
        return Request(name, [1], options, None, priority=priority, arrival_time=self.came)

    def add(self, name: str, priority: int) -> Request:
        known = self.make(name, priority)
        self.waiting.add_request(known)
        return known

    def order(self) -> list[str]:
        self.queueing.look()
        return [r.request_id for r in self.waiting]


def test_one_that_has_waited_overtakes_later_urgent_ones_but_not_earlier_ones(
    clock: Clock,
) -> None:
    line = Line(clock)
    line.add("urgent-1", HIGH)
    low = line.add("low", NORMAL)
    line.add("urgent-2", HIGH)
    assert line.order() == ["urgent-1", "urgent-2", "low"]
    clock.later()
    assert line.order() == ["urgent-1", "low", "urgent-2"]
    assert (low.priority, client_priority(low)) == (HIGH, NORMAL)
    clock.later()
    assert line.order() == ["urgent-1", "low", "urgent-2"]


def test_one_that_ran_and_was_preempted_waits_anew(clock: Clock) -> None:
    line = Line(clock)
    low = line.add("low", NORMAL)
    assert line.waiting.pop_request() is low  # It runs,
    clock.later()
    low.num_preemptions = 1
    line.waiting.prepend_request(low)  # and was preempted.
    line.queueing.look()
    assert low.priority == NORMAL
    clock.later()
    line.queueing.look()
    assert low.priority == HIGH


def test_one_that_a_step_passes_over_goes_on_waiting(clock: Clock) -> None:
    """As vLLM does with one whose adapter does not fit in, at every step."""
    line = Line(clock)
    low = line.add("low", NORMAL)
    for _ in range(1000):
        assert line.waiting.pop_request() is low
        line.waiting.prepend_requests([low])
        clock.now_s += AGING_S / 900
    clock.now_s += AGING_LOOK_EVERY_S
    assert line.order() == ["low"]
    assert low.priority == HIGH
    assert len(line.waiting._due) + len(line.waiting._heap) < 200


def test_it_looks_only_so_often(clock: Clock) -> None:
    line = Line(clock)
    line.queueing.look()
    low = line.add("low", NORMAL)
    clock.now_s += AGING_LOOK_EVERY_S * 0.9
    line.queueing.look()
    assert low.priority == NORMAL
    clock.now_s += AGING_LOOK_EVERY_S * 0.2
    line.queueing.look()
    assert low.priority == HIGH


def test_a_request_more_urgent_than_every_class_stays_so(clock: Clock) -> None:
    line = Line(clock)
    first = line.add("first", HIGH - 1)
    clock.later()
    line.queueing.look()
    assert (first.priority, client_priority(first)) == (HIGH - 1, HIGH - 1)


def test_all_classes_age_into_the_first(clock: Clock) -> None:
    names = {"a": -5, "b": 3, "c": 8}
    classes = tuple(PriorityClass(name=n, priority=p) for n, p in names.items())
    line = Line(clock, Priorities(PrioritySettings(classes=classes, aging_s=AGING_S)))
    made = [line.add(n, p) for n, p in reversed(names.items())]
    assert line.order() == ["a", "b", "c"]
    clock.later()
    assert line.order() == ["c", "b", "a"]
    assert [(r.priority, client_priority(r)) for r in made] == [(-5, 8), (-5, 3), (-5, -5)]


def test_one_that_was_preempted_goes_before_its_class_at_once_and_not_before_urgent_ones(
    clock: Clock,
) -> None:
    line = Line(clock)
    for name in "ab":
        line.add(name, NORMAL)
    line.add("urgent", HIGH)
    for name in ("young", "younger"):
        back = line.make(name)
        back.num_preemptions = 1
        line.waiting.prepend_request(back)
        assert client_priority(back) == NORMAL
    assert [r.request_id for r in line.waiting] == ["urgent", "young", "younger", "a", "b"]
    young = line.waiting
    first = next(iter(young))
    young.pop_request()
    young.prepend_request(first)
    assert line.order() == ["urgent", "young", "younger", "a", "b"], "once is enough"


def test_first_come_first_served_is_left_alone(clock: Clock) -> None:
    line = Line(clock, policy=SchedulingPolicy.FCFS)
    low = line.add("low", NORMAL)
    line.add("urgent", HIGH)
    for _ in range(3):
        clock.later()
        assert line.order() == ["low", "urgent"]
    assert low.priority == NORMAL
    assert not hasattr(low, "llumnix_priority")


def test_what_was_in_the_queue_before_stays_in_it(clock: Clock) -> None:
    line = Line(clock)
    line.waiting = create_request_queue(SchedulingPolicy.PRIORITY)
    line.add("low", NORMAL)
    line.add("urgent", HIGH)
    Queueing(line, CLASSES, clock)
    assert line.order() == ["urgent", "low"]


@pytest.mark.parametrize("seed", range(20))
def test_the_queue_does_what_vllms_does(clock: Clock, seed: int) -> None:
    """As long as nobody ages or is preempted."""
    dice = random.Random(seed)
    ours, theirs = Line(clock).waiting, create_request_queue(SchedulingPolicy.PRIORITY)
    inside: list[Request] = []
    line = Line(clock)
    for n in range(400):
        do = dice.choice(("add", "add", "pop", "one", "some", "look"))
        if do == "add":
            made = line.make(f"r{n}", dice.choice((HIGH, NORMAL, 7)))
            inside.append(made)
            for queue in (ours, theirs):
                queue.add_request(made)
        elif do == "pop" and inside:
            first = theirs.pop_request()
            inside.remove(first)
            assert ours.pop_request() is first
        elif do == "one" and inside:
            out = inside.pop(dice.randrange(len(inside)))
            for queue in (ours, theirs):
                queue.remove_request(out)
        elif do == "some":
            out = set(dice.sample(inside, min(len(inside), 3))) | {line.make("nobody")}
            inside = [r for r in inside if r not in out]
            for queue in (ours, theirs):
                queue.remove_requests(out)
        assert (len(ours), bool(ours)) == (len(theirs), bool(theirs))
        assert [r.request_id for r in ours] == [r.request_id for r in theirs]
        if inside:
            assert ours.peek_request() is theirs.peek_request()
    while theirs:
        assert ours.pop_request() is theirs.pop_request()
    for empty in (ours.pop_request, ours.peek_request):
        with pytest.raises(IndexError):
            empty()
    with pytest.raises(ValueError, match="not in the queue"):
        ours.remove_request(line.make("nobody"))


class Counted(list[Any]):
    """An entry of the queue's heap that counts how often any is compared."""

    compared = 0

    def __lt__(self, other: Any) -> bool:
        Counted.compared += 1
        return super().__lt__(other)


def test_a_step_costs_no_more_with_ten_thousand_waiting(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queueing, "Entry", Counted)
    line = Line(clock)
    for n in range(10_000):
        clock.now_s += AGING_S / 200  # So many age between two looks: those of 0.5 s.
        line.add(f"r{n}", NORMAL)
        line.queueing.look()
    line.add("old", NORMAL)
    while line.queueing._queue.age():  # type: ignore[union-attr]
        pass
    Counted.compared = 0
    clock.now_s += AGING_LOOK_EVERY_S
    line.queueing.look()
    back = line.make("preempted")
    back.num_preemptions = 1
    line.waiting.prepend_request(back)
    first = [r for r, _ in zip(line.waiting, range(8), strict=False)]
    line.waiting.pop_request()
    line.waiting.remove_requests(first[4:5])
    assert Counted.compared < 1000


def test_those_that_age_all_at_once_are_queued_anew_a_few_a_step(clock: Clock) -> None:
    line = Line(clock)
    made = [line.add(f"r{n}", NORMAL) for n in range(5 * AGED_MAX)]
    clock.later()
    for step in range(1, 6):
        line.queueing.look()
        assert sum(r.priority == HIGH for r in made) == step * AGED_MAX


def test_first_come_first_served_one_that_came_by_a_move_goes_by_its_arrival(clock: Clock) -> None:
    line = Line(clock, policy=SchedulingPolicy.FCFS)
    moved = line.make("preempted"), line.make("moved")
    moved[0].status = RequestStatus.PREEMPTED
    for name in "ab":
        line.add(name, NORMAL)
    late = line.make("late")
    line.add("c", NORMAL)
    line.waiting.prepend_request(moved[0])
    queue_by_arrival(line.waiting, moved[1])
    queue_by_arrival(line.waiting, late)
    assert line.order() == ["preempted", "moved", "a", "b", "late", "c"]


@pytest.mark.parametrize("ages", [False, True])
def test_in_an_engine_it_runs_before_the_urgent_ones(engine: Any, clock: Clock, ages: bool) -> None:
    """And goes on as a request of the class that its client gave it."""
    scheduler = engine.core.scheduler
    plain, reader = scheduler.waiting, LoadReader(scheduler, 4, CLASSES)
    ager = Queueing(scheduler, CLASSES, clock) if ages else None
    finished: list[str] = []

    def add(name: str, priority: int, tokens: int) -> None:
        options = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        made = engine.make(RequestId(name), list(range(3, 103)), options)
        made.priority = priority
        engine.add_core_request(made)
        reader.arrived()

    def step() -> None:
        if ager is not None:
            ager.look()
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
    if not ages:
        assert finished[-1] == "low"
    scheduler.waiting = plain
