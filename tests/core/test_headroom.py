"""Headroom follows how full the instances are."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from llumnix.core.events import InstanceLost, LoadReported, Tick
from llumnix.core.priorities import Priorities
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.headroom import freeness_now
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.scheduling.tuning import HEADROOM_STEP, USE_EVERY_S, USE_S
from llumnix.core.settings import PriorityClass, PrioritySettings, SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.errors import UsageError

TOTAL = 1000
CLASSES = (
    PriorityClass(name="high", priority=-100, headroom=0.6),
    PriorityClass(name="soon", priority=-50, headroom=0.2),
    PriorityClass(name="normal", priority=0),
)
URGENT, NORMAL = (1, 0, 4), (0, 0, 5)
EVERY_S = 1.25 * USE_EVERY_S


class World:
    """A scheduler with two instances, of which one runs an urgent request."""

    def __init__(self, need: float | None = 1.1, policy: str = "llumnix") -> None:
        classes = PrioritySettings(classes=CLASSES, headroom_need=need)
        settings = SchedulerSettings(policy=policy, priorities=classes)
        self.scheduler, self.now, self.sequence = Scheduler(settings), 0.0, 0

    def report(self, number: int, share: float, **more: Any) -> float:
        """One instance reports that it uses that share of its memory; what is kept then, as a share
        of an instance's."""
        self.sequence += 1
        given = {"steps": self.sequence, "kv_tokens_used": round(share * TOTAL)}
        given |= {"engine_index": EngineIndex(number), **more}
        report = LoadReport(
            instance=InstanceId(f"i{number}"),
            sequence=self.sequence,
            kv_tokens_total=TOTAL,
            classes=tuple(ClassLoad(running=n) for n in (NORMAL if number else URGENT)),
            **given,
        )
        self.scheduler.handle(LoadReported(report=report), self.now)
        return self.scheduler.view.priorities.headroom_max

    def lose(self, number: int) -> None:
        """One instance is gone."""
        self.now += EVERY_S
        fact = InstanceLost(instance=InstanceId(f"i{number}"), engine_index=EngineIndex(number))
        self.scheduler.handle(fact, self.now)

    def tick(self, share: float, *, rounds: bool = True) -> float:
        """All instances report that they use that share of their memory, and a round follows; the
        headroom that is kept then, as a share of an instance's."""
        self.now += EVERY_S
        for number in range(2):
            self.report(number, share)
        if rounds:
            self.scheduler.handle(Tick(), self.now)
        self.scheduler.view.check(self.now)
        known = self.scheduler.view[InstanceId("i0")]
        kept = (TOTAL - known.load.used - known.freeness * known.load.batch) / TOTAL
        assert known.freeness == known.load.freeness(self.scheduler.view.priorities)
        return kept if known.freeness > 0 else (TOTAL - known.load.used - known.freeness) / TOTAL


@pytest.mark.parametrize(
    ("need", "used", "kept"),
    [
        *((1.1, 0.0, 0.6), (1.1, 0.3, 0.6), (1.1, 0.5, 0.45), (1.1, 0.8, 0.12), (1.1, 0.95, 0.0)),
        *((2.0, 0.3, 0.4), (0.0, 0.95, 0.6), (None, 0.95, 0.6)),
    ],
)
def test_an_instance_may_use_so_many_times_the_mean_use(
    need: float | None, used: float, kept: float
) -> None:
    assert World(need).tick(used) == pytest.approx(kept, abs=1e-9)


def test_it_is_smoothed_and_follows_in_steps() -> None:
    it = World()
    assert it.tick(0.5) == pytest.approx(0.45)
    seen = [it.tick(0.9) for _ in range(round(6 * USE_S / EVERY_S))]
    # The first look is as soon as 0.9 is reported, and the second comes EVERY_S later.
    old = math.exp(-EVERY_S / USE_S)
    used = old * 0.5 + (1 - old) * 0.9
    assert seen[:2] == pytest.approx([0.45, 1 - 1.1 * used])
    assert seen == sorted(seen, reverse=True)
    steps = [a - b for a, b in pairwise(seen) if a != b]
    assert min(steps) >= HEADROOM_STEP
    assert 0 < seen[-1] < 1 - 1.1 * 0.9 + HEADROOM_STEP


def test_what_was_reported_before_a_quiet_time_counts_for_that_time() -> None:
    it = World()
    it.tick(0.8)
    it.now += 60 * USE_S
    assert it.report(0, 0.5) == pytest.approx(0.12)
    it.now += 60 * USE_S
    assert it.report(0, 0.5, steps=it.sequence + 9) == pytest.approx(1 - 1.1 * 0.65)
    it.now += 60 * USE_S
    it.lose(1)
    assert it.report(0, 0.8) == pytest.approx(1 - 1.1 * 0.65)


def test_it_changes_no_more_often_than_its_bound() -> None:
    it = World(need=50.0)
    it.tick(0.0)
    seen = []
    for _ in range(100):
        it.now += USE_EVERY_S / 10
        seen.append(it.report(0, 0.05))
    changes = [n for n, (a, b) in enumerate(pairwise(seen)) if a != b]
    assert len(changes) > 1
    assert min(b - a for a, b in pairwise(changes)) >= 10


def test_the_mean_is_of_what_instances_that_take_requests_report_of_themselves() -> None:
    it = World()
    it.tick(0.5)
    it.scheduler.view.book(InstanceId("i0"), RequestId("r"), 450, it.now)
    it.now += USE_S
    assert it.report(0, 0.5) == pytest.approx(0.45), "a request that is on its way is not counted"

    def later(number: int, share: float, **more: Any) -> float:
        """What is kept a long time after this report."""
        it.report(number, share, **more)
        it.now += 20 * USE_S
        return it.report(number, share, **more)

    assert later(1, 0.2, prefill_tokens=200, moving_out_tokens=100) == pytest.approx(0.56)
    assert later(1, 0.9) == pytest.approx(1 - 1.1 * 0.7)
    assert later(1, 0.9, accepting=False) == pytest.approx(0.45)
    assert later(1, 0.9, prefill_tokens=900) == pytest.approx(1 - 1.1 * 0.75)
    it.lose(1)
    assert later(0, 0.5) == pytest.approx(0.45)
    it.lose(0)
    assert later(2, 0.8) == pytest.approx(0.12)


def test_the_end_of_a_run_leaves_what_its_successor_uses() -> None:
    it = World()
    it.tick(0.5)
    it.now += 20 * USE_S
    it.report(1, 0.9, engine_index=EngineIndex(7))
    it.lose(1)
    it.now += 20 * USE_S
    assert it.report(0, 0.5) == pytest.approx(1 - 1.1 * 0.7)


def test_rounds_that_decide_nothing_and_repeated_reports_change_nothing() -> None:
    """The event log leaves them out, and must tell the same story."""
    one, other = World(), World()
    for n in range(60):
        share = (n * 37 % 100) / 100
        assert one.tick(share) == other.tick(share, rounds=n % 7 == 0)
        kept = one.scheduler.view.priorities.headroom_max
        one.now += 3 * EVERY_S
        assert one.report(0, share, steps=one.sequence - 1) == kept
        other.now, other.sequence = one.now, one.sequence


def test_what_is_shown_keeps_the_headroom_that_decides() -> None:
    it = World()
    it.tick(0.5)
    view = it.scheduler.view
    reports = [known.report for known in view]
    shown = freeness_now(Priorities(PrioritySettings(classes=CLASSES)), reports)
    assert shown == {(r.instance, r.engine_index): view[r.instance].freeness for r in reports}
    assert freeness_now(view.priorities, [replace(r, accepting=False) for r in reports]) == {}


def test_policies_without_headroom_keep_none() -> None:
    assert World(policy="llumnix-base").tick(0.5) == pytest.approx(0.0, abs=1e-9)


def test_headroom_of_several_classes_is_bounded_together() -> None:
    classes = Priorities(PrioritySettings(classes=CLASSES)).needed(0.5)
    assert classes.headroom(TOTAL, (1, 1, 1)) == pytest.approx(450)
    assert classes.headroom(TOTAL, (0, 1, 1)) == pytest.approx(200)
    assert classes.headroom(TOTAL, (1, 1, 1), above=1) == pytest.approx(450)
    assert classes.headroom(TOTAL, ()) == 0


def test_a_need_below_zero_is_refused() -> None:
    with pytest.raises(UsageError, match=r"priorities\.headroom_need: -1 must be"):
        PrioritySettings(headroom_need=-1)
