"""Which instance gives load to which, and which request goes: rules as claims."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.core.events import LoadReported, MoveLimit, MoveOrder, Tick
from llumnix.core.migration.victim import Candidate, choose_victim
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.pairing import DRAIN_MOVES_MAX
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.scheduling.tuning import FRUITLESS_S, ORDER_LIFETIME_S
from llumnix.core.settings import MigrationSettings, PrioritySettings, SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId

TOTAL = 10_000
BEGAN_S = 1000.0
"""When tests begin. With a clock that began at 0 a span's end would pass for the span."""
FIXED = MigrationSettings(source_below=48.0, destination_above=100.0, gain_min=8.0)


def scheduler(policy: str = "llumnix", migration: MigrationSettings = FIXED) -> Scheduler:
    fixed = PrioritySettings(headroom_need=None)
    return Scheduler(SchedulerSettings(policy=policy, migration=migration, priorities=fixed))


def load(
    number: int,
    used: int,
    running: int = 10,
    head: int = 0,
    high: int = 0,
    sequence: int = 1,
    **more: object,
) -> LoadReport:
    """Each next report has made steps; an engine that makes none stands still."""
    more.setdefault("steps", sequence)
    return LoadReport(
        instance=InstanceId(f"i{number}"),
        engine_index=EngineIndex(number),
        sequence=sequence,
        kv_tokens_used=used,
        kv_tokens_total=TOTAL,
        block_tokens=16,
        classes=(
            ClassLoad(running=high),
            ClassLoad(running=running, waiting=int(head > 0), waiting_tokens=head),
        ),
        head_tokens=head,
        **more,  # type: ignore[arg-type]
    )


def tell(s: Scheduler, *reports: LoadReport, now: float = 0.0) -> None:
    for r in reports:
        s.handle(LoadReported(report=r), BEGAN_S + now)


def moves(s: Scheduler, now: float = 0.0) -> list[MoveOrder]:
    decided = s.handle(Tick(), BEGAN_S + now)
    assert all(isinstance(d, MoveOrder) and d.why for d in decided)
    return decided  # type: ignore[return-value]


def pairs(decided: list[MoveOrder]) -> list[tuple[str, str]]:
    return [(d.source, d.destination) for d in decided]


def test_the_lowest_is_paired_with_the_highest_and_so_on() -> None:
    s = scheduler()
    tell(s, load(0, 9900), load(1, 9800), load(2, 1000), load(3, 2000), load(4, 9000))
    assert pairs(moves(s)) == [("i0", "i2"), ("i1", "i3")]


def test_an_order_names_the_report_that_it_was_computed_from() -> None:
    s = scheduler()
    tell(s, load(0, 9900, sequence=3), load(1, 1000, sequence=8))
    assert [d.source_sequence for d in moves(s)] == [3]


def test_between_the_thresholds_an_instance_is_left_alone() -> None:
    s = scheduler()
    tell(s, load(0, 9300), load(1, 9100))  # Freeness 70 and 90.
    assert moves(s) == []


def test_an_instance_with_a_move_under_way_gets_no_further_order() -> None:
    s = scheduler()
    tell(s, load(0, 9900), load(1, 1000))
    assert len(moves(s)) == 1
    assert moves(s, now=0.05) == [], "the order is not answered yet"
    tell(s, load(0, 9900, sequence=2, moving_out=1, orders=(OrderId(0),)), now=0.1)
    assert moves(s, now=0.1) == [], "its move is under way"
    tell(s, load(0, 9900, sequence=3), now=1.0)
    assert len(moves(s, now=1.0)) == 1


def test_an_order_that_no_report_names_lapses() -> None:
    s = scheduler()
    tell(s, load(0, 9900), load(1, 1000))
    assert len(moves(s)) == 1
    late = ORDER_LIFETIME_S + 0.1
    tell(s, load(0, 9900, sequence=2), load(1, 1000, sequence=2), now=late)
    assert len(moves(s, now=late)) == 1


def test_a_destination_whose_source_fell_silent_is_free_again() -> None:
    s = scheduler()
    tell(s, load(0, 9900), load(1, 1000))
    assert len(moves(s)) == 1
    late = ORDER_LIFETIME_S + 0.1
    tell(s, load(1, 1000, sequence=2), load(2, 9900), now=late)
    assert pairs(moves(s, now=late)) == [("i2", "i1")]


def test_silent_instances_take_no_part_in_moves() -> None:
    s = scheduler()
    tell(s, load(0, 9900), now=0.0)
    tell(s, load(1, 1000), now=5.0)
    assert moves(s, now=5.0) == []


def test_no_policy_but_llumnix_balances() -> None:
    for policy in ("infaas++", "least-loaded", "round-robin", "cache-aware"):
        s = scheduler(policy)
        tell(s, load(0, 9900), load(1, 1000))
        assert moves(s) == []


def test_any_policy_balances_if_it_is_told_to() -> None:
    s = scheduler("cache-aware", replace(FIXED, balance=True))
    tell(s, load(0, 9900), load(1, 1000))
    assert len(moves(s)) == 1


def test_every_policy_empties_an_instance() -> None:
    for policy in ("llumnix", "infaas++", "round-robin"):
        s = scheduler(policy)
        tell(s, load(0, 3000, accepting=False), load(1, 1000), load(2, 2000))
        decided = moves(s)
        assert {d.source for d in decided} == {"i0"}
        assert len(decided) == 4, "several at a time"


@pytest.mark.parametrize("comes", [0, 1, DRAIN_MOVES_MAX])
def test_drains_at_the_same_time_crowd_no_destination(comes: int) -> None:
    s = scheduler()
    tell(s, *(load(n, 3000, running=20, accepting=False) for n in (0, 1)))
    tell(s, load(2, 0, running=0, moving_in=comes), load(3, 4000))
    there = Counter(d.destination for d in moves(s))
    assert there == +Counter({"i2": DRAIN_MOVES_MAX - comes, "i3": DRAIN_MOVES_MAX})


def test_a_drain_goes_on_to_the_next_where_nothing_fits_at_the_freest() -> None:
    s = scheduler()
    tell(s, load(0, 6000, running=4, accepting=False), load(1, 1000, running=1), load(2, 3000))
    first = moves(s)
    assert {d.destination for d in first} == {"i1"}
    # None of its requests fits there.
    answered = tuple(d.order for d in first)
    emptied = load(0, 6000, running=4, accepting=False, sequence=2, orders=answered)
    tell(s, emptied, load(1, 1000, running=1, sequence=2), load(2, 3000, sequence=2), now=0.1)
    assert {d.destination for d in moves(s, now=0.1)} == {"i2"}


def test_an_instance_that_is_being_emptied_takes_nothing() -> None:
    s = scheduler()
    tell(s, load(0, 9900), load(1, 1000, accepting=False))
    assert all(d.source == "i1" for d in moves(s))


def test_a_blocked_head_sends_others_away_until_it_fits() -> None:
    """De-fragmentation: 1,200 tokens are free in all, 700 are wanted in one place."""
    s = scheduler()
    tell(s, load(0, 9700, head=700), load(1, 9100, running=5))
    (order,) = moves(s)
    assert (order.source, order.destination) == ("i0", "i1")
    (limit,) = order.limits
    assert limit.tokens_wanted == 400
    assert "its queue waits for 700 tokens" in order.why


def test_a_request_that_waits_goes_where_there_is_room_for_it() -> None:
    s = scheduler()
    tell(s, load(0, 9900, head=700), load(1, 1000))
    (order,) = moves(s)
    assert order.limits[0].waiting_max >= 700


def test_a_request_that_waits_goes_where_there_is_room_and_not_to_the_highest_freeness() -> None:
    """i1 has one request and a freeness of 2,000, i2 forty and one of 150: that one has room."""
    s = scheduler()
    tell(s, load(0, 9600, running=1, head=3000))
    tell(s, load(1, 8000, running=1), load(2, 4000, running=40))
    (order,) = moves(s)
    assert order.destination == "i2"
    assert order.limits[0].waiting_max >= 3000


def test_a_request_that_waits_goes_where_there_is_room_between_the_thresholds_too() -> None:
    s = scheduler()
    tell(s, load(0, 9600, running=1, head=1000), load(1, 6000, running=50))
    assert 48 < s.view[InstanceId("i1")].freeness < 100
    (order,) = moves(s)
    assert order.destination == "i1"
    assert order.limits[0].waiting_max >= 1000


def test_a_request_that_waits_for_a_slot_goes_where_one_is_free() -> None:
    s = scheduler()
    tell(s, load(0, 1000, running=8, head=500, slots=8))
    tell(s, load(1, 9700, running=1, slots=8), load(2, 5000, running=40, slots=64))
    (order,) = moves(s)
    assert (order.source, order.destination) == ("i0", "i2")
    assert order.limits[0].waiting_max >= 500


def test_two_waiting_requests_do_not_go_to_the_same_instance() -> None:
    s = scheduler()
    tell(s, load(0, 9600, running=1, head=3000), load(1, 9700, running=1, head=3000))
    tell(s, load(2, 4000, running=40), load(3, 3000, running=50))
    decided = moves(s)
    assert {d.source for d in decided} == {"i0", "i1"}
    assert {d.destination for d in decided} == {"i2", "i3"}


def test_if_a_pair_gains_nothing_the_next_destination_is_tried() -> None:
    """With a request more i1 would have no higher freeness than i0 with one less."""
    s = scheduler()
    tell(s, load(0, 9950, running=2), load(1, 9899, running=1), load(2, 8995, running=10))
    assert s.view[InstanceId("i1")].freeness > s.view[InstanceId("i2")].freeness > 100
    assert pairs(moves(s)) == [("i0", "i2")]


def test_a_pair_that_had_nothing_to_move_is_not_tried_again_at_once() -> None:
    s = scheduler()
    tell(s, load(0, 9900), load(1, 1000), load(2, 2000))
    (first,) = moves(s)
    assert first.destination == "i1"
    tell(s, load(0, 9900, sequence=2, orders=(first.order,)), now=0.05)
    (second,) = moves(s, now=0.05)
    assert second.destination == "i2", "i0 had nothing for i1"
    tell(s, load(0, 9900, sequence=3, orders=(second.order,)), now=0.1)
    assert moves(s, now=0.1) == []
    later = 0.1 + FRUITLESS_S
    tell(s, load(0, 9900, sequence=4), load(1, 1000, sequence=2), now=later)
    assert pairs(moves(s, now=later)) == [("i0", "i1")]


def test_a_pair_that_is_moving_something_may_be_paired_again_once_that_is_done() -> None:
    s = scheduler()
    tell(s, load(0, 9900), load(1, 1000))
    (first,) = moves(s)
    tell(s, load(0, 9900, sequence=2, moving_out=1, orders=(first.order,)), now=0.05)
    tell(s, load(0, 9900, sequence=3), now=0.1)
    assert pairs(moves(s, now=0.1)) == [("i0", "i1")], "the last move went well"


def test_what_comes_to_a_source_is_no_answer_to_its_order() -> None:
    s = scheduler()
    tell(s, load(0, 9900), load(1, 1000))
    (first,) = moves(s)
    tell(s, load(0, 9900, sequence=2, moving_in=1, orders=(first.order,)), now=0.05)
    tell(s, load(0, 9900, sequence=3), now=0.1)
    assert moves(s, now=0.1) == [], "i0 had nothing for i1"


def test_a_request_that_waits_goes_into_the_headroom_of_urgent_ones() -> None:
    s = scheduler()
    tell(s, load(0, 9900, head=500), load(1, 2000, high=1))
    (order,) = moves(s)
    assert pairs([order]) == [("i0", "i1")]
    (waits,) = order.limits
    assert waits.tokens_max == 0
    assert 500 <= waits.waiting_max < 8000


def test_a_waiting_request_stays_if_it_would_crowd_urgent_ones_out() -> None:
    s = scheduler()
    tell(s, load(0, 9900, head=500), load(1, 9200, high=1))
    assert moves(s) == []


def test_a_waiting_request_stays_if_it_fits_where_it_is() -> None:
    s = scheduler()
    tell(s, load(0, 3000, high=1, head=500), load(1, 2000, high=1))
    assert moves(s) == []


def test_a_waiting_request_stays_out_of_headroom_if_it_fits_elsewhere() -> None:
    s = scheduler()
    tell(s, load(0, 9900, head=300), load(1, 9300), load(2, 2000, high=1))
    assert moves(s) == []


def test_a_head_that_fits_nowhere_does_not_keep_others_waiting() -> None:
    s = scheduler()
    tell(s, load(0, 9990, head=9000), load(1, 9950, head=500), load(2, 2000, high=1))
    assert pairs(moves(s)) == [("i1", "i2")]


def queue(number: int, used: int, waiting: int, each: int, head: int) -> LoadReport:
    """An instance with a queue of requests of `each` tokens behind a large one."""
    classes = (
        ClassLoad(),
        ClassLoad(running=5, waiting=waiting, waiting_tokens=head + each * (waiting - 1)),
    )
    return replace(load(number, used, head=head), classes=classes)


def test_a_longer_queue_gives_to_a_shorter_one() -> None:
    """Nobody has room, but 19 of 100 tokens wait behind one of 3,000 here, and one there."""
    s = scheduler()
    tell(s, queue(0, 9500, 20, 100, 3000), queue(1, 9500, 2, 100, 600))
    (order,) = moves(s)
    assert (order.source, order.destination) == ("i0", "i1")
    assert [(m.rank, m.tokens_max, m.waiting_max) for m in order.limits] == [(1, 0, 2100)]
    assert order.why == "20 wait for 4900 tokens on i0, 2 for 700 on i1"


def test_a_queue_that_cannot_give_keeps_no_shorter_one_from_giving() -> None:
    """On average a request of the longest is more than half the difference."""
    s = scheduler()
    tell(s, queue(0, 9500, 2, 4000, 4000), queue(2, 9500, 1, 0, 600))
    tell(s, queue(1, 9500, 30, 100, 3000), queue(3, 9500, 1, 0, 700))
    assert pairs(moves(s)) == [("i1", "i3")]


def test_a_queue_that_had_nothing_to_give_keeps_no_shorter_one_from_giving() -> None:
    s, longest = scheduler(), queue(0, 9500, 60, 100, 3000)
    tell(s, longest, queue(2, 9500, 1, 0, 600))
    (order,) = moves(s)
    assert pairs([order]) == [("i0", "i2")]
    tell(s, replace(longest, sequence=2, orders=(order.order,)), now=0.1)
    tell(s, queue(1, 9500, 30, 100, 3000), queue(3, 9500, 1, 0, 700), now=0.1)
    assert pairs(moves(s, now=0.1)) == [("i1", "i3")]


def test_one_without_headroom_hides_none_that_has_some() -> None:
    s = scheduler()
    tell(s, load(0, 9900, head=500), load(1, 9900), load(2, 2000, high=1))
    assert pairs(moves(s)) == [("i0", "i2")]


def test_one_without_room_hides_none_that_has_some_from_an_instance_that_is_emptied() -> None:
    """Headroom makes the second the less free, and keeps nothing of a drain out."""
    s = scheduler()
    tell(s, load(0, 3000, running=1, accepting=False), load(1, TOTAL), load(2, 6000, high=1))
    assert s.view[InstanceId("i1")].freeness > s.view[InstanceId("i2")].freeness
    assert pairs(moves(s)) == [("i0", "i2")]


def test_a_head_that_went_into_no_headroom_keeps_no_other_from_it() -> None:
    s = scheduler()
    tell(s, load(0, 9990, head=600), load(2, 2000, high=1))
    (order,) = moves(s)
    assert pairs([order]) == [("i0", "i2")]
    tell(s, load(0, 9990, head=600, sequence=2, orders=(order.order,)), now=0.1)
    tell(s, load(1, 9950, head=500), now=0.1)
    assert pairs(moves(s, now=0.1)) == [("i1", "i2")]


def test_queues_that_are_about_even_stay() -> None:
    s = scheduler()
    tell(s, queue(0, 9500, 20, 100, 3000), queue(1, 9500, 18, 100, 3000))
    assert moves(s) == []


def test_a_head_alone_waits_for_its_own_instance() -> None:
    s = scheduler()
    tell(s, queue(0, 9500, 1, 0, 3000), queue(1, 9500, 1, 0, 600))
    assert moves(s) == []


def test_normal_requests_leave_where_an_urgent_one_runs() -> None:
    s = scheduler()
    tell(s, load(0, 5000, running=9, high=1), load(1, 1000, running=3))
    (order,) = moves(s)
    assert (order.source, order.destination) == ("i0", "i1")
    assert 1 in {limit.rank for limit in order.limits}


def test_a_move_that_costs_more_than_it_gains_is_not_made() -> None:
    """At a second a token the copy takes longer than the memory lasts."""
    fast, slow = scheduler(), scheduler()
    for s, seconds in ((fast, 0.001), (slow, 1000.0)):
        tell(s, load(0, 9500), load(1, 8000))
        tell(
            s,
            load(
                0, 9600, sequence=2, kv_token_bytes=1000, steps=10, steps_s=0.1,
                moved_bytes=10**6, moved_s=seconds,
            ),
            now=0.01,
        )  # fmt: skip
    assert len(moves(fast, now=0.02)) == 1
    assert moves(slow, now=0.02) == []


some = st.tuples(
    st.integers(0, TOTAL),
    st.integers(0, 40),
    st.one_of(st.just(0), st.just(0), st.integers(1, 3000)),
    st.one_of(st.just(0), st.just(0), st.integers(1, 2)),
)
full = st.tuples(st.integers(9500, TOTAL), st.integers(1, 40), st.just(0), st.just(0))
empty = st.tuples(st.integers(0, 5000), st.integers(0, 20), st.just(0), st.just(0))


@st.composite
def instances(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """Tokens in use, running, the head's tokens, and urgent ones that run. One is full and one has
    room, so that there is something to move."""
    drawn = [draw(full), draw(empty), *draw(st.lists(some, max_size=6))]
    return draw(st.permutations(drawn))


def told_of(drawn: list[tuple[int, int, int, int]]) -> Scheduler:
    s = scheduler()
    for number, (used, running, head, high) in enumerate(drawn):
        tell(s, load(number, used, running, head, high))
    return s


def test_no_move_raises_the_highest_load() -> None:
    """Whatever request within its limits is moved, the lower freeness of the pair rises, by the
    least gain that is asked for, and the destination stays the freer of the two, and no source."""
    seen: Counter[str] = Counter()

    @settings(database=None)
    @given(instances(), st.data())
    def holds(drawn: list[tuple[int, int, int, int]], data: st.DataObject) -> None:
        s = told_of(drawn)
        decided, priorities = moves(s), s.view.priorities
        seen["examples"] += 1
        seen["with orders"] += bool(decided)
        for order in decided:
            source, destination = s.view[order.source], s.view[order.destination]
            low = min(source.freeness, destination.freeness)
            for limit in order.limits:
                least, most = max(1, limit.tokens_min), limit.tokens_max
                if most < least:
                    continue
                seen["of running requests"] += 1
                for tokens in (least, most, data.draw(st.integers(least, most))):
                    giver = source.load.changed(limit.rank, -1, -tokens).freeness(priorities)
                    taker = destination.load.changed(limit.rank, 1, tokens).freeness(priorities)
                    assert min(giver, taker) >= low + FIXED.gain_min - 1e-6
                    assert taker >= giver - 1e-6
                    assert taker >= s.view.thresholds[0] - 1e-6
                    assert destination.load.used + tokens <= TOTAL

    holds()
    assert seen["with orders"] > seen["examples"] / 2, seen
    assert seen["of running requests"] > seen["examples"] / 2, seen


@given(instances())
def test_an_instance_is_on_one_side_of_one_move(drawn: list[tuple[int, int, int, int]]) -> None:
    decided = moves(told_of(drawn))
    sides = [d.source for d in decided] + [d.destination for d in decided]
    assert len(sides) == len(set(sides))


# -- the victim


def candidate(name: str, tokens: int, rank: int = 1, **more: bool) -> Candidate:
    return Candidate(request=RequestId(name), rank=rank, tokens=tokens, **more)


def limit(rank: int = 1, low: int = 1, wanted: int = 0, high: int = 1000, waiting: int = 0):
    return MoveLimit(
        rank=rank, tokens_min=low, tokens_wanted=wanted, tokens_max=high, waiting_max=waiting
    )


def victim(candidates: list[Candidate], *limits: MoveLimit) -> str | None:
    chosen = choose_victim(candidates, limits)
    return chosen.request if chosen else None


def test_the_least_urgent_goes_first_then_the_shorter() -> None:
    some = [candidate("a", 50, rank=0), candidate("b", 300), candidate("c", 200)]
    assert victim(some, limit(), limit(rank=0)) == "c"
    assert victim(some, limit(rank=0)) == "a"


def test_the_shortest_that_brings_the_relief_else_the_longest() -> None:
    some = [candidate("a", 100), candidate("b", 200), candidate("c", 300)]
    assert victim(some, limit(wanted=150)) == "b"
    assert victim(some, limit(wanted=500)) == "c"
    assert victim(some, limit(wanted=500, high=250)) == "b"


def test_what_is_out_of_bounds_stays() -> None:
    assert victim([candidate("a", 100)], limit(low=101)) is None
    assert victim([candidate("a", 100)], limit(high=99)) is None
    assert victim([candidate("a", 100)], limit(rank=0)) is None


def test_what_rests_stays() -> None:
    assert victim([candidate("a", 100, resting=True)], limit()) is None


def test_a_request_that_waits_and_fits_goes_before_any_that_runs() -> None:
    some = [
        candidate("w1", 900, waiting=True),
        candidate("w2", 300, waiting=True),
        candidate("r", 100),
    ]
    assert victim(some, limit(waiting=1000)) == "w1"
    assert victim(some, limit(waiting=500)) == "w2"
    assert victim(some, limit(waiting=100)) == "r"
