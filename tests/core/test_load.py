"""Virtual usage and freeness: what a load report comes to."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.core.priorities import Priorities
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.load import Load, derive
from llumnix.core.scheduling.presets import POLICIES, priorities_of
from llumnix.core.settings import (
    HIGH,
    NORMAL,
    PriorityClass,
    PrioritySettings,
    SchedulerSettings,
    key_digest,
)
from llumnix.core.types import EngineIndex, InstanceId

PRIORITIES = Priorities(PrioritySettings())
TOTAL = 10_000


def report(
    used: int = 0,
    running: int = 0,
    waiting: int = 0,
    waiting_tokens: int = 0,
    waiting_prefill: int = 0,
    head: int = 0,
    high: int = 0,
    **more: int,
) -> LoadReport:
    return LoadReport(
        instance=InstanceId("i0"),
        engine_index=EngineIndex(0),
        sequence=1,
        kv_tokens_used=used,
        kv_tokens_total=TOTAL,
        classes=(
            ClassLoad(running=high),
            ClassLoad(
                running=running,
                waiting=waiting,
                waiting_tokens=waiting_tokens,
                waiting_prefill=waiting_prefill or waiting_tokens,
            ),
        ),
        head_tokens=head,
        **more,  # type: ignore[arg-type]
    )


def freeness(r: LoadReport, booked: tuple[int, ...] = (), tokens: int = 0) -> float:
    return derive(r, booked, tokens).freeness(PRIORITIES)


def test_freeness_is_the_steps_that_the_batch_can_still_take() -> None:
    assert freeness(report(used=4000, running=10)) == 600


def test_an_empty_instance_has_all_of_its_memory_to_give() -> None:
    assert freeness(report()) == TOTAL


def test_only_the_head_of_the_queue_counts() -> None:
    waiting = report(used=4000, running=10, waiting=3, waiting_tokens=6000, head=1000)
    assert freeness(waiting) == 500


def test_the_rest_of_a_prompt_that_is_being_computed_is_used_already() -> None:
    assert freeness(report(used=4000, running=10, prefill_tokens=1000)) == 500


def test_a_newcomer_is_computed_after_all_that_is_known_of_prompts() -> None:
    """Of those that run, were dispatched and not reported yet, or wait and are no less urgent."""
    known = report(running=2, prefill_tokens=700, waiting=2, waiting_tokens=3000, head=500)
    load = derive(known, (0, 1), 20)
    assert (load.queued_prefill_before(1), load.queued_prefill_before(0)) == (3720, 720)


def test_cached_tokens_of_waiting_requests_are_not_computed_before_a_newcomer() -> None:
    load = derive(report(waiting=2, waiting_tokens=3000, waiting_prefill=200), (), 0)
    assert (load.queued_prefill_before(1), load.queued) == (200, 3000)


def test_prompts_behind_a_blocked_head_are_no_work_before_a_newcomer_that_may_pass_it() -> None:
    known = report(9000, 9, waiting=2, waiting_tokens=3000, head=900, prefill_tokens=50)
    for more, before in (
        ({"passable": True, "keep_tokens": 160}, 50),
        ({"passable": True, "keep_tokens": 40}, 3050),  # It fits, and starts next.
        ({"passable": False, "keep_tokens": 160}, 3050),
    ):
        load = derive(replace(known, **more), (), 0)  # type: ignore[arg-type]
        assert load.queued_prefill_before(1) == before
        assert load.is_blocked == (load.keep == 160)


def test_a_newcomer_of_another_class_waits_for_a_blocked_head() -> None:
    known = replace(report(9000, 9, waiting=2, waiting_tokens=3000, head=2000), passable=True)
    urgent = replace(known.classes[0], waiting=1, waiting_tokens=2000, waiting_prefill=2000)
    load = derive(replace(known, classes=(urgent, known.classes[1])), (), 0)
    assert (load.queued_prefill_before(0), load.queued_prefill_before(1)) == (0, 5000)


def test_shared_tokens_of_waiting_requests_are_in_use_already() -> None:
    """For a newcomer. Where else they might go, they need all of it."""
    one = report(used=5000, running=3, waiting=1, waiting_tokens=3000, head=3000)
    shared = replace(one.classes[1], waiting_shared=2500)
    two = replace(one, classes=(one.classes[0], shared))
    assert derive(one, (), 0).spare_for(1, PRIORITIES) == 2000
    assert derive(two, (), 0).spare_for(1, PRIORITIES) == 4500
    assert freeness(one) == freeness(two)


def test_a_head_that_does_not_fit_makes_freeness_negative_and_is_not_shared_out() -> None:
    assert freeness(report(used=9000, running=10, waiting=1, waiting_tokens=3000, head=3000)) == (
        -2000
    )


def test_a_head_that_waits_for_a_slot_makes_the_instance_full() -> None:
    """However much memory is free."""
    r = report(used=1000, running=8, waiting=1, waiting_tokens=100, head=100, slots=8)
    assert freeness(r) == -100


def test_an_urgent_request_keeps_its_headroom_free_once_however_many_there_are() -> None:
    base = report(used=1000, running=9)
    one = replace(base, classes=(ClassLoad(running=1), ClassLoad(running=9)))
    two = replace(base, classes=(ClassLoad(running=2), ClassLoad(running=8)))
    assert derive(one, (), 0).spare(PRIORITIES) == 9000 - 0.88 * TOTAL
    assert derive(two, (), 0).spare(PRIORITIES) == derive(one, (), 0).spare(PRIORITIES)


def test_headroom_is_no_obstacle_to_a_newcomer_of_the_same_class() -> None:
    load = derive(report(used=2000, high=1), (), 0)
    high, normal = (PRIORITIES.rank_named(n) for n in ("high", "normal"))
    assert load.freeness_for(high, PRIORITIES) == 8000
    assert load.freeness_for(normal, PRIORITIES) == 8000 - 8800


def test_a_newcomer_is_served_after_all_waiting_requests() -> None:
    load = derive(report(used=4000, running=8, waiting=2, waiting_tokens=3000, head=500), (), 0)
    assert load.freeness_for(1, PRIORITIES) == 300


def test_a_newcomer_does_not_fit_where_no_slot_is_free() -> None:
    full = derive(report(used=1000, running=8, slots=8), (), 0)
    busy = derive(report(used=8000, running=7, slots=8), (), 0)
    assert full.freeness_for(1, PRIORITIES) < 0 < busy.freeness_for(1, PRIORITIES)


def test_a_dispatch_on_its_way_counts_as_if_it_ran() -> None:
    r = report(used=4000, running=9)
    assert freeness(r, booked=(0, 1), tokens=1000) == 500


def test_requests_on_their_way_out_are_as_good_as_gone() -> None:
    r = replace(report(used=4000, running=11), moving_out=1, moving_out_tokens=1000)
    assert freeness(r) == 700


@pytest.mark.parametrize(("running", "waiting"), [(1, 0), (0, 1), (2, 1)])
def test_what_leaves_is_missing_where_it_was(running: int, waiting: int) -> None:
    """Of those on their way out the ones that wait leave the queue, and the others the batch."""
    r = report(used=4000, running=11, waiting=3, waiting_tokens=300)
    r = replace(r, moving_out=running + waiting, moving_out_waiting=waiting)
    load = derive(r, (), 0)
    assert (load.batch, load.waiting) == (11 - running, 3 - waiting)


def test_requests_on_their_way_in_have_their_room_already() -> None:
    r = replace(report(used=4000, running=9), moving_in=1)
    assert freeness(r) == 600


loads = st.builds(
    Load,
    total=st.just(TOTAL),
    used=st.integers(0, TOTAL),
    head=st.integers(0, 4000),
    queued=st.integers(4000, 20_000),
    batch=st.integers(0, 60),
    waiting=st.integers(0, 20),
    slots=st.sampled_from([0, 32]),
    running=st.tuples(st.integers(0, 3), st.integers(0, 40)),
    queued_prefill=st.tuples(st.integers(0, 4000), st.integers(0, 20_000)),
)


@given(loads, st.integers(0, 3000), st.sampled_from([0, 1]))
def test_a_request_more_never_raises_freeness(load: Load, tokens: int, rank: int) -> None:
    more = load.changed(rank, 1, tokens)
    assert more.freeness(PRIORITIES) <= load.freeness(PRIORITIES)
    for newcomer in (0, 1):
        before = load.freeness_for(newcomer, PRIORITIES)
        assert more.freeness_for(newcomer, PRIORITIES) <= before


@given(loads, st.integers(1, 500), st.sampled_from([0, 1]))
def test_a_token_more_never_raises_freeness(load: Load, tokens: int, rank: int) -> None:
    more = load._replace(used=load.used + tokens)
    assert more.freeness(PRIORITIES) < load.freeness(PRIORITIES)
    assert more.freeness_for(rank, PRIORITIES) <= load.freeness_for(rank, PRIORITIES)


@given(loads, st.integers(0, 3000), st.sampled_from([0, 1]))
def test_what_came_and_left_changed_nothing(load: Load, tokens: int, rank: int) -> None:
    again = load.changed(rank, 1, tokens).changed(rank, -1, -tokens)
    assert again == load


@given(loads, st.sampled_from([0, 1]), st.sampled_from([-1, 1]))
def test_what_is_spare_after_a_change_is_known_without_making_it(
    load: Load, rank: int, requests: int
) -> None:
    if load.running[rank] + requests >= 0:
        after = load.changed(rank, requests, 0).spare(PRIORITIES)
        assert load.spare_after(rank, requests, PRIORITIES) == pytest.approx(after)


# -- classes


def test_a_requests_class_follows_from_its_number() -> None:
    names = {n: PRIORITIES.classes[PRIORITIES.rank(n)].name for n in (-500, -100, -99, 0, 7)}
    assert names == {-500: "high", -100: "high", -99: "normal", 0: "normal", 7: "normal"}


def test_vllms_number_wins_then_the_class_by_name_then_the_tier() -> None:
    assert PRIORITIES.resolve(-7, "high", "priority") == -7
    assert PRIORITIES.resolve(0, "normal", "priority") == 0
    assert PRIORITIES.resolve(0, "high") == -100
    assert PRIORITIES.resolve(0, None, "priority") == -100
    assert [PRIORITIES.resolve(0, None, t) for t in ("auto", "default", "flex", "scale")] == [0] * 4


def test_flex_is_the_least_urgent_class_where_there_is_one_below_the_usual() -> None:
    batch = PriorityClass(name="batch", priority=50)
    with_batch = Priorities(PrioritySettings(classes=(HIGH, NORMAL, batch)))
    assert with_batch.resolve(0, None, "flex") == 50


def test_a_key_gets_no_more_than_its_cap_whatever_it_asks_for() -> None:
    capped = Priorities(PrioritySettings(key_caps={"k": "normal"}))
    assert [capped.resolve(*a, key="k") for a in ((-500,), (0, "high"), (0, None, "priority"))] == (
        [0, 0, 0]
    )
    assert capped.resolve(9, key="k") == 9
    assert capped.resolve(-50, key="other") == -50


ASKS = ((-500,), (-7,), (0, "high"), (0, None, "priority"))


def test_on_a_server_with_keys_more_than_usual_is_for_the_keys_that_it_was_granted_to() -> None:
    keyed = Priorities(PrioritySettings(key_caps={"granted": "high"}), keyed=True)
    for key in ("other", None, key_digest("granted"), "sha256:", ""):
        assert [keyed.resolve(*a, key=key) for a in ASKS] == [0, 0, 0, 0]
    assert [keyed.resolve(*a, key="granted") for a in ASKS] == [-100, -7, -100, -100]
    assert keyed.resolve(9, key="other") == 9


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_to_the_caps_of_keys(policy: str) -> None:
    keyed = priorities_of(SchedulerSettings(policy=policy), keyed=True)
    assert [keyed.resolve(*a, key="other") for a in ASKS] == [0, 0, 0, 0]


def test_on_a_server_without_keys_everybody_may_ask_for_any_class() -> None:
    assert [PRIORITIES.resolve(*a, key="whatever") for a in ASKS] == [-100, -7, -100, -100]


@pytest.mark.parametrize("keyed", [True, False])
def test_the_default_cap_is_what_the_settings_say(keyed: bool) -> None:
    soon = PriorityClass(name="soon", priority=-20)
    some = PrioritySettings(
        classes=(HIGH, soon, NORMAL), default_cap="soon", key_caps={"little": "normal"}
    )
    priorities = Priorities(some, keyed=keyed)
    assert [priorities.resolve(*a) for a in ASKS] == [-20, -7, -20, -20]
    assert [priorities.resolve(*a, key="little") for a in ASKS] == [0, 0, 0, 0]
    assert [priorities.resolve(*a, granted="normal") for a in ASKS] == [0, 0, 0, 0]


def test_a_cap_leaves_a_request_that_asks_for_nothing_as_it_is() -> None:
    """Also where the class that it belongs to has another number."""
    odd = PrioritySettings(
        classes=(HIGH, PriorityClass(name="rest", priority=30)), key_caps={"granted": "high"}
    )
    assert Priorities(odd, keyed=True).resolve(0, key="other") == 0


def test_no_number_is_beyond_the_classes() -> None:
    assert PRIORITIES.resolve(-(2**70)) == -100
    assert PRIORITIES.resolve(2**70) == 2**31 - 1


def test_keys_are_kept_as_digests_and_not_shown() -> None:
    kept = PrioritySettings(key_caps={"s3cret": "high"})
    assert "s3cret" not in str(kept.key_caps)
    assert "s3cret" not in repr(SchedulerSettings(priorities=kept))
    assert key_digest("s3cret") not in repr(kept)
    assert replace(kept, aging_s=5.0).key_caps == kept.key_caps, "digests stay what they are"
    given = PrioritySettings(key_caps={key_digest("s3cret"): "high"})
    assert given == kept
    keyed = Priorities(given, keyed=True)
    assert keyed.resolve(-100, key="s3cret") == -100


def test_settings_without_keys_have_all_the_rest() -> None:
    all_of_it = SchedulerSettings(
        policy="infaas++", priorities=PrioritySettings(key_caps={"k": "high"}, aging_s=5.0)
    )
    without = all_of_it.without_keys()
    assert without.priorities.key_caps == {}
    assert (without.policy, without.priorities.aging_s) == ("infaas++", 5.0)


def test_a_request_that_has_waited_is_queued_as_the_most_urgent() -> None:
    assert PRIORITIES.aged(0, 29.9) == 0
    assert PRIORITIES.aged(0, 30.0) == -100
    assert PRIORITIES.aged(-500, 30.0) == -500


@given(st.integers(-1000, 1000), st.floats(0, 100))
def test_age_makes_no_request_less_urgent(number: int, waited_s: float) -> None:
    assert PRIORITIES.aged(number, waited_s) <= number
    assert not math.isinf(PRIORITIES.aged(number, waited_s))


# -- the order of a queue


@pytest.mark.parametrize("epoch_s", [0.0, 1.7e9])
def test_a_preempted_request_goes_first_in_its_class_and_is_put_back_only_once(
    epoch_s: float,
) -> None:
    """Times count from a run's start in the simulator, and from 1970 in an engine."""
    fresh = PRIORITIES.queue_key(0, max(0.0, epoch_s - 9), waited_s=0, preempted=False)
    once = PRIORITIES.queue_key(0, epoch_s, waited_s=0, preempted=True)
    assert once < fresh
    assert PRIORITIES.queue_key(*once, waited_s=0, preempted=True) == once
    later = PRIORITIES.queue_key(0, epoch_s + 10, waited_s=0, preempted=True)
    assert once < later < fresh, "among them, the earlier first"
    urgent = PRIORITIES.queue_key(-100, epoch_s + 99, waited_s=0, preempted=False)
    assert urgent < once, "no class goes before a more urgent one"


def test_a_request_that_has_waited_for_long_is_queued_as_the_most_urgent_class() -> None:
    young = PRIORITIES.queue_key(0, 5.0, waited_s=PRIORITIES.aging_s - 0.1, preempted=False)
    old = PRIORITIES.queue_key(0, 5.0, waited_s=PRIORITIES.aging_s, preempted=False)
    assert (young.priority, old.priority) == (0, -100)
