"""Requests that wait at or behind a head that does not fit go where they fit now."""

from dataclasses import replace

from core.test_pairing import FIXED, load, moves, pairs, queue, scheduler, tell
from llumnix.core.codes import MoveCode
from llumnix.core.events import MoveOrder
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.settings import MigrationSettings

RESCUES = replace(FIXED, rescues=2)


def told(*reports: LoadReport, migration: MigrationSettings = RESCUES) -> Scheduler:
    s = scheduler(migration=migration)
    tell(s, *reports)
    return s


def blocked(number: int, head: int, least: int, waiting: int = 3, **more: int) -> LoadReport:
    """An instance with 100 tokens free, and requests that wait behind a head."""
    report = queue(number, 9900, waiting, least, head)
    return replace(report, waiting_least=least, **more)  # type: ignore[arg-type]


def waiting_max(order: MoveOrder) -> int:
    (limit,) = order.limits
    assert (limit.tokens_min, limit.tokens_max) == (0, 0), "only what waits may go"
    return limit.waiting_max


def test_the_head_goes_to_the_smallest_room_that_takes_it() -> None:
    """All three have a freeness between the thresholds; the smallest has 832 tokens of room."""
    s = told(blocked(0, 1000, 200, waiting=1))
    tell(s, load(1, 4000, running=60), load(2, 6000, running=45), load(3, 7200, running=40))
    (order,) = moves(s)
    assert (order.destination, order.code) == ("i2", MoveCode.QUEUE)
    assert waiting_max(order) == 10_000 - 6000 - 48 * 46, "it stays above the threshold of sources"
    assert "wait behind a head of 1000 tokens on i0" in order.why


def test_a_head_that_fits_nowhere_lets_the_next_go_to_the_largest_room() -> None:
    s = told(blocked(0, 5000, 200), load(1, 7000, running=40), load(2, 6000, running=45))
    (order,) = moves(s)[:1]
    assert order.destination == "i2"
    assert 200 <= waiting_max(order) < 5000


def test_two_leave_in_a_round_for_different_rooms() -> None:
    s = told(blocked(0, 1000, 200), load(1, 6000, running=45), load(2, 6500, running=45))
    assert pairs(moves(s)) == [("i0", "i2"), ("i0", "i1")]
    alone = told(blocked(0, 1000, 200, waiting=1), load(1, 6000, running=45), load(2, 6500))
    assert len(moves(alone)) == 1


def test_a_room_is_given_to_one_alone_in_a_round() -> None:
    s = told(blocked(0, 1000, 200), blocked(1, 1000, 200), load(2, 6000, running=45))
    assert pairs([o for o in moves(s) if o.destination == "i2"]) == [("i0", "i2")]


def test_four_at_most_are_on_their_way_from_an_instance() -> None:
    s = told(blocked(0, 1000, 200, moving_out=3), load(1, 6000, running=45), load(2, 6500))
    assert len(moves(s)) == 1
    s = told(blocked(0, 1000, 200, moving_out=4), load(1, 6000, running=45))
    assert moves(s) == []


def test_the_knob_switches_rescues_off() -> None:
    there = (blocked(0, 5000, 200), load(1, 6000, running=45))
    assert len(moves(told(*there))) == 1
    assert moves(told(*there, migration=replace(FIXED, rescues=0))) == []


def test_a_head_that_is_short_of_room_to_grow_alone_is_rescued_too() -> None:
    fits = replace(queue(0, 9000, 2, 200, 900), waiting_least=200)
    for keep, count in ((100, 0), (200, 1)):
        s = told(replace(fits, keep_tokens=keep), load(1, 6000, running=45))
        assert len([o for o in moves(s) if o.code is MoveCode.QUEUE]) == count


def test_an_instance_with_a_queue_or_without_a_slot_or_that_gives_away_takes_none() -> None:
    there = blocked(0, 1000, 200)
    for other in (
        load(1, 6000, running=45, head=10),
        load(1, 6000, running=45, slots=45),
        replace(load(1, 6000, running=45), moving_out=1),
        replace(load(1, 6000, running=45), moving_in=4),
        replace(load(1, 6000, running=45), accepting=False),
    ):
        assert [o for o in moves(told(there, other)) if o.code is MoveCode.QUEUE] == []


def test_headroom_of_urgent_requests_is_no_room() -> None:
    urgent = load(1, 4000, running=20, high=1)
    s = told(blocked(0, 5000, 200), urgent)
    assert [o for o in moves(s) if o.code is MoveCode.QUEUE and o.destination == "i1"] == []


def test_a_room_for_which_nothing_was_found_is_not_tried_again_at_once() -> None:
    s = told(blocked(0, 5000, 200), load(1, 6000, running=45))
    (order,) = moves(s)
    tell(s, replace(blocked(0, 5000, 200), sequence=2, steps=2, orders=(order.order,)), now=0.05)
    assert moves(s, now=0.05) == []


def test_what_no_head_blocks_stays() -> None:
    fits = replace(
        load(0, 5000, head=100),
        classes=(ClassLoad(), ClassLoad(running=10, waiting=1, waiting_tokens=100)),
    )
    assert moves(told(fits, load(1, 6000, running=45))) == []
