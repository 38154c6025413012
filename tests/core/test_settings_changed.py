"""Settings that change while the scheduler runs: what counts at once, and what waits."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from core.test_pairing import TOTAL, load, moves, pairs, tell
from llumnix.core.events import (
    AddInstances,
    Decision,
    FleetReported,
    NoInstance,
    RequestArrived,
    SettingsChanged,
    Tick,
)
from llumnix.core.scheduling.intake.changes import When, changes, taken
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.scheduling.view import ClusterView, InstanceView
from llumnix.core.settings import (
    HIGH,
    NORMAL,
    AdmissionSettings,
    MigrationSettings,
    PriorityClass,
    PrioritySettings,
    QueueSettings,
    ScalingSettings,
    SchedulerSettings,
    SurvivalSettings,
)
from llumnix.core.types import InstanceId, RequestId
from llumnix.errors import ProtocolError

LIMITED = (replace(HIGH, queue_max=3), NORMAL)
OTHERS: dict[str, Any] = {
    "policy": "scls",
    "priorities.classes": (PriorityClass(name="only", priority=0),),
    "priorities.aging_s": 5.0,
    "priorities.preempt": False,
    "priorities.headroom_need": 2.0,
    "priorities.default_cap": "normal",
    "priorities.key_caps": {"sha256:" + "0" * 64: "high"},
    "queue.growth_blocks": 2,
    "queue.passers": 3,
    "queue.pass_s": 4.0,
    "queue.pass_share": 0.25,
    "queue.slices": True,
    "queue.slice_tokens": 64,
    "queue.slice_quantile": 0.5,
    "queue.short_first": 2.0,
    "migration.balance": False,
    "migration.interval_s": 0.5,
    "migration.gain_min": 5000.0,
    "migration.min_stay": 3.0,
    "migration.rescues": 0,
    "migration.moves_max": 2,
    "scaling.up_after_s": 1.0,
    "scaling.down_after_s": 1.0,
    "scaling.cooldown_s": 1.0,
    "scaling.instances_max": 4,
    "survival.lives": 1,
    "survival.wait_s": 1.0,
    "survival.at_once": 2,
    "survival.kept_mb": 1.0,
    "survival.stall_s": 9.0,
    "admission.queue_max": 2,
}
"""Another value than the default of each knob that can change alone."""
TOGETHER: dict[str, dict[str, Any]] = {
    "migration": {"source_below": 1.0, "destination_above": 2.0},
    "scaling": {"freeness_low": 1.0, "freeness_high": 2.0, "instances_max": 4},
}
WAITS = {
    When.AT_START: {
        "policy", "priorities.classes", "priorities.headroom_need", "priorities.default_cap",
        "priorities.key_caps", "survival.lives", "survival.wait_s", "survival.at_once",
        "survival.kept_mb", "survival.stall_s",
    },
    When.BY_ENGINES: {
        "priorities.aging_s", "priorities.preempt", "migration.min_stay", "queue.growth_blocks",
        "queue.passers", "queue.pass_s", "queue.pass_share", "queue.slices", "queue.slice_tokens",
        "queue.slice_quantile", "queue.short_first",
    },
}  # fmt: skip


def knobs() -> set[str]:
    """All of them."""
    found = set()
    for section in fields(SchedulerSettings()):
        value = getattr(SchedulerSettings(), section.name)
        inner = fields(value) if is_dataclass(value) else None
        found |= {section.name} if inner is None else {f"{section.name}.{f.name}" for f in inner}
    return found


def other(knob: str, settings: SchedulerSettings | None = None) -> SchedulerSettings:
    """The settings, the default ones if none are given, with another value of one knob."""
    settings = settings or SchedulerSettings()
    section, _, name = knob.rpartition(".")
    if not section:
        return replace(settings, policy=OTHERS[knob])
    old = getattr(settings, section)
    return replace(settings, **{section: replace(old, **{name: OTHERS[knob]})})


def when(knob: str) -> When:
    return next((w for w, waits in WAITS.items() if knob in waits), When.AT_ONCE)


def test_every_knob_is_tried() -> None:
    pairs_of = {f"{s}.{name}" for s, knobs in TOGETHER.items() for name in knobs}
    assert {*OTHERS, *pairs_of, "scaling.instances_min"} == knobs()


@pytest.mark.parametrize("knob", OTHERS)
def test_a_change_names_the_knob_and_when_it_counts(knob: str) -> None:
    before, after = SchedulerSettings(), other(knob)
    assert changes(before, before) == []
    assert changes(before, after) == [(knob, when(knob))]
    kept = taken(before, after)
    assert kept == (before if when(knob) is When.AT_START else after)


@pytest.mark.parametrize("section", TOGETHER)
def test_knobs_that_go_together_count_together(section: str) -> None:
    before = SchedulerSettings()
    after = replace(before, **{section: replace(getattr(before, section), **TOGETHER[section])})
    assert set(changes(before, after)) == {
        (f"{section}.{name}", When.AT_ONCE) for name in TOGETHER[section]
    }
    assert taken(before, after) == after


def test_knobs_that_wait_together_are_kept_together() -> None:
    classes = (PriorityClass(name="a", priority=-1), PriorityClass(name="b", priority=0))
    asked = PrioritySettings(classes=classes, default_cap="a", key_caps={"k": "b"}, aging_s=9.0)
    after = other("policy", replace(SchedulerSettings(), priorities=asked))
    assert taken(SchedulerSettings(), after) == replace(
        SchedulerSettings(), priorities=PrioritySettings(aging_s=9.0)
    )


def test_the_rest_is_taken_where_one_knob_waits_for_a_start() -> None:
    after = other("migration.gain_min", other("survival.lives", other("policy")))
    assert taken(SchedulerSettings(), after) == other("migration.gain_min")


def test_a_classs_limit_counts_at_once_and_nothing_else_of_it() -> None:
    before = SchedulerSettings()
    after = replace(before, priorities=PrioritySettings(classes=LIMITED))
    assert changes(before, after) == [("priorities.classes", When.AT_ONCE)]
    for changed in ({"headroom": 0.5}, {"priority": -5}, {"name": "urgent"}):
        classes = (replace(LIMITED[0], **changed), NORMAL)  # type: ignore[arg-type]
        after = replace(before, priorities=PrioritySettings(classes=classes))
        assert changes(before, after) == [("priorities.classes", When.AT_START)]


@pytest.mark.parametrize("knob", sorted(WAITS[When.AT_START]))
def test_the_scheduler_refuses_what_counts_from_a_start(knob: str) -> None:
    s = Scheduler(SchedulerSettings())
    with pytest.raises(ProtocolError, match=f"{knob} cannot change while llumnix runs"):
        s.handle(SettingsChanged(settings=other(knob)), 0.0)
    assert s.settings == SchedulerSettings()


# -- what counts at once


def arrived(name: str, priority: int = 0) -> RequestArrived:
    return RequestArrived(request=RequestId(name), prompt_tokens=100, priority=priority)


def story(s: Scheduler, change: SchedulerSettings | None = None) -> list[list[Decision]]:
    """What the scheduler decides on loads that give each knob something to decide. `change`: told
    once the loads are known."""
    decided = []
    for second in range(1, 12):
        tell(
            s,
            load(0, 9_900, running=20, head=3_000, sequence=second),
            load(1, 9_500, running=20, sequence=second),
            load(2, 1_000, running=1, sequence=second),
            load(3, 6_000, running=3, high=1, sequence=second),
            now=second,
        )
        if second == 3 and change is not None:
            assert s.handle(SettingsChanged(settings=change), second) == []
        fleet = FleetReported(
            starting=0, serving=tuple(map(InstanceId, ("i0", "i1", "i2", "i3"))), draining=()
        )
        if second >= 3:
            for fact in (Tick(), arrived(f"a{second}"), arrived(f"b{second}", -100), fleet, Tick()):
                decided.append(s.handle(fact, second))
    return decided


FIXED = MigrationSettings(source_below=48.0, destination_above=100.0)
SCALED = ScalingSettings(
    instances_max=8, freeness_low=2_000.0, freeness_high=9_000.0, up_after_s=4.0
)
CASES = {
    "balance": {"migration": replace(FIXED, balance=False)},
    "gain_min": {"migration": replace(FIXED, gain_min=5_000.0)},
    "rescues": {"migration": replace(FIXED, rescues=0)},
    "moves_max": {"migration": replace(FIXED, moves_max=3)},
    "thresholds": {"migration": replace(FIXED, source_below=1.0, destination_above=2.0)},
    "scaling is on": {"scaling": replace(SCALED, instances_max=16)},
    "scaling is off": {"scaling": ScalingSettings()},
    "up_after_s": {"scaling": replace(SCALED, up_after_s=1.0)},
    "instances_min": {"scaling": replace(SCALED, instances_min=6)},
    "a class's limit": {"priorities": PrioritySettings(classes=LIMITED)},
}


@pytest.mark.parametrize("case", CASES)
def test_from_then_on_it_decides_like_one_that_was_started_so(case: str) -> None:
    before = SchedulerSettings(migration=FIXED, scaling=SCALED)
    after = replace(before, **CASES[case])  # type: ignore[arg-type]
    changed, started = story(Scheduler(before), after), story(Scheduler(after))
    assert changed == started
    if case != "a class's limit":
        assert changed != story(Scheduler(before)), "the story does not show this knob"


def test_new_limits_count_for_the_next_request() -> None:
    s = Scheduler(SchedulerSettings())
    tell(s, load(0, TOTAL, running=20, head=5_000))
    assert not isinstance(s.handle(arrived("a"), 0.0)[0], NoInstance)
    limited = replace(SchedulerSettings(), admission=AdmissionSettings(queue_max=1))
    s.handle(SettingsChanged(settings=limited), 0.0)
    (refused,) = s.handle(arrived("b"), 0.0)
    assert isinstance(refused, NoInstance)
    assert refused.code == "overloaded"
    s.handle(SettingsChanged(settings=SchedulerSettings()), 0.0)
    assert not isinstance(s.handle(arrived("c"), 0.0)[0], NoInstance)
    of_a_class = PrioritySettings(classes=(HIGH, replace(NORMAL, queue_max=1)))
    s.handle(SettingsChanged(settings=replace(SchedulerSettings(), priorities=of_a_class)), 0.0)
    (refused,) = s.handle(arrived("d"), 0.0)
    assert isinstance(refused, NoInstance)
    assert refused.code == "queue_full"


def test_a_limit_that_comes_under_load_knows_the_pace_at_which_requests_end() -> None:
    s = Scheduler(SchedulerSettings())
    for second in range(10):
        full = load(0, TOTAL, running=20, head=5_000, sequence=second + 1, finished=10 * second)
        tell(s, full, now=second)
    limited = replace(SchedulerSettings(), admission=AdmissionSettings(queue_max=1))
    s.handle(SettingsChanged(settings=limited), 9.5)
    (refused,) = s.handle(arrived("a"), 9.5)
    assert isinstance(refused, NoInstance)
    assert refused.retry_s is not None
    assert refused.retry_s < 2


def test_what_is_known_stays_known() -> None:
    s = Scheduler(SchedulerSettings(migration=FIXED))
    tell(s, load(0, 9_900), load(1, 1_000))
    s.handle(SettingsChanged(settings=SchedulerSettings(migration=FIXED, scaling=SCALED)), 0.0)
    assert pairs(moves(s)) == [("i0", "i1")]
    assert moves(s) == [], "its order is under way"
    decided = s.handle(FleetReported(starting=0, serving=(), draining=()), 1.0)
    assert [type(d) for d in decided] == [AddInstances]


def test_an_order_keeps_its_number_over_a_change() -> None:
    s = Scheduler(SchedulerSettings(migration=FIXED))
    tell(s, load(0, 9_900), load(1, 1_000))
    (first,) = moves(s)
    s.handle(SettingsChanged(settings=SchedulerSettings(migration=replace(FIXED, gain_min=4))), 0.0)
    tell(s, load(2, 9_900), load(3, 1_000))
    (second,) = moves(s)
    assert second.order == first.order + 1


def test_settings_that_engines_go_by_change_no_decision() -> None:
    before = SchedulerSettings(migration=FIXED, scaling=SCALED)
    after = replace(
        before,
        queue=QueueSettings(growth_blocks=3, passers=2),
        migration=replace(FIXED, min_stay=1.0),
        survival=SurvivalSettings(),
    )
    assert story(Scheduler(before), after) == story(Scheduler(before))


def test_thresholds_that_were_given_anew_hold_when_answers_end() -> None:
    s = Scheduler(SchedulerSettings(migration=FIXED))
    tell(s, load(0, 5_000), load(1, 5_000))
    other = replace(FIXED, source_below=7.0, destination_above=8.0)
    s.handle(SettingsChanged(settings=SchedulerSettings(migration=other)), 0.0)
    tell(s, load(0, 5_000, sequence=2, finished=1_000, finished_tokens=100_000))
    assert s.view.thresholds == (7.0, 8.0)


def test_instances_are_ranked_anew_by_new_thresholds() -> None:
    def nearest(known: InstanceView, _: int, view: ClusterView) -> tuple[float, ...]:
        return (abs(known.freeness - view.thresholds[0]),)

    s = Scheduler(SchedulerSettings(migration=FIXED))
    tell(s, load(0, 9_500), load(1, 1_000))
    best = [s.view.best(nearest, 1, 0.0)]
    other = replace(FIXED, source_below=900.0, destination_above=901.0)
    s.handle(SettingsChanged(settings=SchedulerSettings(migration=other)), 0.0)
    best.append(s.view.best(nearest, 1, 0.0))
    assert [known and known.report.instance for known in best] == ["i0", "i1"]
