"""How many instances there are: rules as claims."""

import itertools
from collections.abc import Callable

import pytest

from llumnix.core.events import (
    AddInstances,
    Decision,
    Dispatch,
    DrainedBy,
    DrainInstance,
    FleetReported,
    LoadReported,
    RequestArrived,
    SettingsChanged,
    UndrainInstance,
)
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.scheduling.tuning import RETRY_FIRST_S, RETRY_MAX_S, ROW_ENDS_AFTER_S
from llumnix.core.settings import ScalingSettings, SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, RequestId

TOTAL = 10_000
BEGAN_S = 1000.0
"""When tests begin. With a clock that began at 0 a span's end would pass for the span."""


class Fleet:
    """A scheduler and the fleet that it is told of, second by second."""

    def __init__(self, least: int = 1, most: int = 4, **more: float) -> None:
        given = {
            "freeness_low": 100.0,
            "freeness_high": 1000.0,
            "up_after_s": 2.0,
            "down_after_s": 10.0,
        }
        self.scheduler = Scheduler(
            SchedulerSettings(
                scaling=ScalingSettings(
                    instances_min=least, instances_max=most, **{**given, **more}
                )
            )
        )
        self.now = BEGAN_S
        self.sequence = 0
        self.starting = 0
        self.given_up = 0
        self.drained_by: DrainedBy = "scheduler"
        self.serving: list[str] = []
        self.draining: list[str] = []

    def second(self, **loads: tuple[int, int]) -> list[Decision]:
        """One second with these loads: used tokens and running requests."""
        self.now += 1.0
        self.sequence += 1
        for name, (used, running) in loads.items():
            report = LoadReport(
                instance=InstanceId(name),
                engine_index=EngineIndex(int(name[1:])),
                sequence=self.sequence,
                kv_tokens_used=used,
                kv_tokens_total=TOTAL,
                classes=(ClassLoad(), ClassLoad(running=running)),
                accepting=name not in self.draining,
                steps=self.sequence,
            )
            self.scheduler.handle(LoadReported(report=report), self.now)
        fact = FleetReported(
            starting=self.starting,
            serving=tuple(InstanceId(i) for i in self.serving),
            draining=tuple(InstanceId(i) for i in self.draining),
            drained_by={InstanceId(i): self.drained_by for i in self.draining},
            given_up=self.given_up,
        )
        decided = self.scheduler.handle(fact, self.now)
        assert all(d.why for d in decided)
        return decided

    def until(self, seconds: int, **loads: tuple[int, int]) -> list[Decision]:
        """The first decisions within so many seconds."""
        for _ in range(seconds):
            if decided := self.second(**loads):
                return decided
        return []


FULL, IDLE = (9900, 20), (100, 1)


def test_without_bounds_nothing_scales() -> None:
    s = Scheduler(SchedulerSettings())
    assert s.handle(FleetReported(starting=0, serving=(), draining=()), 0.0) == []


def test_a_shortage_that_lasts_starts_one_more() -> None:
    f = Fleet()
    f.serving = ["i0"]
    assert f.second(i0=FULL) == []
    assert f.second(i0=FULL) == []
    (decided,) = f.second(i0=FULL)
    assert isinstance(decided, AddInstances)
    assert decided.count == 1


def test_a_shortage_that_passes_starts_none() -> None:
    f = Fleet()
    f.serving = ["i0"]
    for _ in range(5):
        assert f.second(i0=FULL) == []
        assert f.second(i0=FULL) == []
        assert f.second(i0=(5000, 10)) == []


@pytest.mark.parametrize("running", [160, 125], ids=["four", "three and an eighth"])
def test_a_large_shortage_starts_as_many_as_it_takes(running: int) -> None:
    f = Fleet(most=8)
    f.serving = ["i0", "i1"]
    (decided,) = f.until(5, i0=(10_000, running), i1=(10_000, running))
    assert isinstance(decided, AddInstances)
    assert decided.count == 4, "1.25 x 100 tokens for each of 320 requests are four instances"


def test_starting_instances_count_so_that_one_shortage_is_answered_once() -> None:
    f = Fleet(most=8)
    f.serving = ["i0"]
    assert f.until(5, i0=FULL)
    f.starting = 1
    assert f.until(20, i0=FULL) == []


def test_never_more_than_the_maximum() -> None:
    f = Fleet(most=2)
    f.serving = ["i0", "i1"]
    assert f.until(20, i0=FULL, i1=FULL) == []


def test_more_than_the_maximum_are_drained_one_after_the_other_whatever_the_load() -> None:
    f = Fleet(most=2)
    f.serving = ["i0", "i1", "i2", "i3"]
    loads = {"i0": FULL, "i1": (9900, 18), "i2": FULL, "i3": (9900, 19)}
    (first,) = f.second(**loads)
    assert isinstance(first, DrainInstance)
    assert first.instance == "i1"
    assert "4 are there, and at most 2" in first.why
    f.serving, f.draining = ["i0", "i2", "i3"], ["i1"]
    assert f.until(20, **loads) == [], "one at a time, and none is taken back"
    f.draining = []
    del loads["i1"]
    (second,) = f.second(**loads)
    assert isinstance(second, DrainInstance)
    assert second.instance == "i3"
    f.serving = ["i0", "i2"]
    assert f.until(20, i0=FULL, i2=FULL) == []


def test_scaling_that_is_switched_on_again_has_seen_no_plenty_before() -> None:
    f = Fleet()
    f.serving, given = ["i0", "i1"], f.scheduler.settings
    loads = {"i0": IDLE, "i1": IDLE}
    assert f.until(8, **loads) == []
    off = SchedulerSettings(scaling=ScalingSettings())
    f.scheduler.handle(SettingsChanged(settings=off), f.now)
    assert f.until(20, **loads) == []
    f.scheduler.handle(SettingsChanged(settings=given), f.now)
    assert f.until(9, **loads) == [], "down_after_s is 10"
    assert f.until(3, **loads)


def test_a_shortage_first_takes_a_drain_back() -> None:
    f = Fleet()
    f.serving, f.draining = ["i0"], ["i1"]
    (decided,) = f.until(5, i0=FULL, i1=IDLE)
    assert isinstance(decided, UndrainInstance)
    assert decided.instance == "i1"


def test_plenty_that_lasts_empties_the_one_with_the_fewest_requests() -> None:
    f = Fleet()
    f.serving = ["i0", "i1", "i2"]
    (decided,) = f.until(30, i0=(500, 2), i1=IDLE, i2=(900, 3))
    assert isinstance(decided, DrainInstance)
    assert decided.instance == "i1"
    assert f.now - BEGAN_S >= 10


def test_plenty_that_passes_drains_none() -> None:
    f = Fleet(most=2)
    f.serving = ["i0", "i1"]
    for _ in range(5):
        assert f.until(9, i0=IDLE, i1=IDLE) == []
        assert f.second(i0=(5000, 10), i1=(5000, 10)) == []


@pytest.mark.parametrize("change", [AddInstances, UndrainInstance, DrainInstance])
def test_for_a_while_after_their_number_has_changed_none_is_drained(change: type) -> None:
    """Whichever way it was changed."""
    f = Fleet(cooldown_s=60.0, down_after_s=1.0)
    f.serving = ["i0", "i1"]
    if change is UndrainInstance:
        f.draining = [f.serving.pop()]
    loads = (IDLE, IDLE) if change is DrainInstance else (FULL, FULL)
    (decided,) = f.until(70, i0=loads[0], i1=loads[1])
    assert isinstance(decided, change)
    changed_s, f.serving, f.draining = f.now, ["i0", "i1", "i2"], []
    (decided,) = f.until(70, i0=IDLE, i1=IDLE, i2=IDLE)
    assert isinstance(decided, DrainInstance)
    assert f.now - changed_s >= 60


def test_on_a_tie_the_newest_instance_is_drained() -> None:
    f = Fleet()
    f.serving = ["i0", "i1"]
    (decided,) = f.until(30, i0=IDLE, i1=IDLE)
    assert isinstance(decided, DrainInstance)
    assert decided.instance == "i1"


def test_never_fewer_than_the_minimum() -> None:
    f = Fleet(least=2)
    f.serving = ["i0", "i1"]
    assert f.until(60, i0=IDLE, i1=IDLE) == []


def test_one_drain_at_a_time_and_none_while_one_starts() -> None:
    f = Fleet()
    f.serving, f.draining = ["i0", "i1"], ["i2"]
    assert f.until(60, i0=IDLE, i1=IDLE, i2=IDLE) == []
    f.draining, f.starting = [], 1
    assert f.until(60, i0=IDLE, i1=IDLE) == []


def test_no_instance_is_drained_that_would_be_missed() -> None:
    """Above `freeness_high` now, but below `freeness_low` without it."""
    f = Fleet(freeness_low=100.0, freeness_high=110.0)
    f.serving = ["i0", "i1"]
    assert f.until(60, i0=(4000, 50), i1=(4000, 50)) == []


def test_an_instance_that_was_given_up_is_made_up_for() -> None:
    f = Fleet(least=2)
    f.serving = ["i0"]
    (decided,) = f.second(i0=IDLE)
    assert isinstance(decided, AddInstances)
    assert decided.count == 1


@pytest.mark.parametrize("by", ["user", "signal"])
def test_a_drain_of_a_user_or_a_signal_is_not_taken_back(by: DrainedBy) -> None:
    """At the minimum another is started in its place; under load too."""
    f = Fleet(least=2)
    f.serving, f.draining, f.drained_by = ["i0"], ["i1"], by
    (decided,) = f.second(i0=IDLE)
    assert decided == AddInstances(count=1, total=2, why=decided.why)
    f = Fleet(least=1)
    f.serving, f.draining, f.drained_by = ["i0"], ["i1"], by
    (decided,) = f.until(5, i0=FULL, i1=IDLE)
    assert isinstance(decided, AddInstances)


def test_a_drain_without_a_known_origin_is_not_taken_back() -> None:
    f = Fleet(least=2)
    f.serving = ["i0"]
    f.second(i0=IDLE)
    unknown = FleetReported(starting=0, serving=(), draining=(InstanceId("i1"),))
    decided = f.scheduler.handle(unknown, f.now)
    assert [type(d) for d in decided] == [AddInstances]


def test_an_instance_that_scaling_drains_gets_no_request_from_then_on() -> None:
    f = Fleet()
    f.serving = ["i0", "i1"]
    (decided,) = f.until(30, i0=IDLE, i1=IDLE)
    assert isinstance(decided, DrainInstance)
    for n in range(8):
        asked = RequestArrived(request=RequestId(f"r{n}"), prompt_tokens=10)
        (placed,) = f.scheduler.handle(asked, f.now)
        assert isinstance(placed, Dispatch)
        assert placed.instance != decided.instance
    f.serving, f.draining = ["i0"], ["i1"]
    (back,) = f.until(10, i0=FULL, i1=IDLE)
    assert back == UndrainInstance(instance=decided.instance, why=back.why)


def test_a_drain_counts_before_the_fleet_has_heard_of_it() -> None:
    """Its next report may have been made before: it drains no second instance, and under load that
    drain is the first to be taken back."""
    f = Fleet(down_after_s=0.0, cooldown_s=0.0)
    f.serving = ["i0", "i1", "i2"]
    (drained,) = f.second(i0=IDLE, i1=IDLE, i2=IDLE)
    assert isinstance(drained, DrainInstance)
    assert f.second(i0=IDLE, i1=IDLE, i2=IDLE) == []
    (back,) = f.until(3, i0=FULL, i1=FULL, i2=FULL)
    assert back == UndrainInstance(instance=drained.instance, why=back.why)


def starts_of(f: Fleet, seconds: int, started: Callable[[], None]) -> list[float]:
    """When instances were started within so many seconds, each of which ends as `started` says."""
    found = []
    for _ in range(seconds):
        for decided in f.second(i0=FULL):
            assert isinstance(decided, AddInstances)
            found.append(f.now)
            started()
    return found


@pytest.mark.parametrize("least", [1, 2], ids=["for the load", "to make up"])
def test_instances_that_cannot_be_started_are_started_less_and_less_often(least: int) -> None:
    f = Fleet(least=least)
    f.serving = ["i0"]

    def fails() -> None:
        f.given_up += 1

    f.given_up += 1
    f.second(i0=FULL)
    hour = starts_of(f, 3600, fails)
    assert len(hour) < 15
    pauses = [later - sooner for sooner, later in itertools.pairwise(hour)]
    assert all(longer >= pause for pause, longer in itertools.pairwise(pauses)), pauses
    assert 500 < pauses[-1] <= RETRY_MAX_S + 5


def test_the_pause_begins_with_the_second_in_a_row_and_doubles_up_to_the_longest() -> None:
    f, times = Fleet(least=2), []
    f.serving = ["i0"]
    for _ in range(3600):
        if f.second(i0=IDLE):
            times.append(f.now)
            f.given_up += 1
    pauses = [later - sooner for sooner, later in itertools.pairwise(times)]
    # Each is heard of a second after the start.
    wanted = [0.0, *(min(RETRY_FIRST_S * 2**n, RETRY_MAX_S) for n in range(len(pauses) - 1))]
    assert pauses == [1.0 + pause_s for pause_s in wanted]
    assert wanted.count(RETRY_MAX_S) > 1


def test_the_first_that_is_given_up_is_made_up_for_at_once_and_so_is_one_long_after() -> None:
    f = Fleet(least=2)
    f.serving = ["i0", "i1"]
    f.second(i0=IDLE, i1=IDLE)
    for _ in range(2):
        f.given_up += 1
        f.serving = ["i0"]
        assert f.second(i0=IDLE)
        f.serving = ["i0", "i1"]
        assert f.until(int(ROW_ENDS_AFTER_S) + 1, i0=IDLE, i1=IDLE) == []


def test_scaling_waits_until_all_instances_have_reported() -> None:
    f = Fleet()
    f.serving = ["i0", "i1"]
    assert f.until(20, i0=FULL) == []


def test_the_thresholds_follow_the_answers_length() -> None:
    s = SchedulerSettings(scaling=ScalingSettings(instances_max=2))
    scheduler = Scheduler(s)
    for sequence, finished in enumerate((0, 1000), 1):
        report = LoadReport(
            instance=InstanceId("i0"),
            engine_index=EngineIndex(0),
            sequence=sequence,
            kv_tokens_used=0,
            kv_tokens_total=TOTAL,
            finished=finished,
            finished_tokens=finished * 400,
        )
        scheduler.handle(LoadReported(report=report), float(sequence))
    observed = scheduler.view.observed
    assert observed.answer_tokens == 400
    assert observed.scaling_thresholds(s.scaling) == (200, 800)
    assert observed.migration_thresholds(s.migration) == (50, 200)
