"""In which order, and how many at a time, engines take up the requests of a dead one."""

from typing import Any

from llumnix.core.codes import AbortCode
from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.survival import (
    DECLINED_MAX,
    DECLINED_PAUSE_S,
    LATER_S,
    SHOWN_EVERY_S,
    Orphan,
    Orphans,
)
from llumnix.core.types import EngineIndex, RequestId

A, B = EngineIndex(0), EngineIndex(1)
R = RequestId("r")


def orphan(name: str = R, **fields: Any) -> Orphan:
    known = {"priority": 0, "tokens": 100, "arrived_s": 0.0, "since_s": 5.0, "why": "it died"}
    return Orphan(request=RequestId(name), **{**known, **fields})


def orphans(*all_: Orphan, **settings: Any) -> Orphans:
    made = Orphans(SurvivalSettings(**settings))
    for one in all_:
        assert made.add(one, declined=None, now=one.since_s) is None
    return made


def order(waiting: Orphans, now: float = 5.0) -> list[str]:
    """All of them in the order in which they go, each done before the next."""
    found = []
    while (one := waiting.next([A], now)) is not None:
        found.append(one.request)
        waiting.ended(one.request)
    return [str(name) for name in found]


def test_the_urgent_go_first_then_the_short_then_those_that_wait_for_longest() -> None:
    waiting = orphans(
        orphan("long", tokens=900),
        orphan("late", since_s=6.0),
        orphan("early", since_s=4.0),
        orphan("urgent", priority=-1, tokens=5000),
        orphan("short", tokens=9),
    )
    assert order(waiting) == ["urgent", "short", "early", "late", "long"]


def test_an_engine_takes_up_so_many_at_a_time_and_the_others_wait_for_a_token() -> None:
    waiting = orphans(*(orphan(f"r{n}", tokens=n + 1) for n in range(4)), at_once=2)
    for name in ("r0", "r1"):
        one = waiting.next([A], 5.0)
        assert one is not None
        assert waiting.may_take(A, one)
        waiting.begin(one.request, A, 0)
        assert (one.request, waiting.engine_of(one.request)) == (name, A)
    assert waiting.next([A], 5.0) is None
    last = waiting.next([A, B], 5.0)
    assert last is not None
    assert not waiting.may_take(A, last)
    assert waiting.fewest([A, B], last) == B
    assert waiting.fewest([A], last) is None
    assert waiting.drop(RequestId("r0")) is not None
    assert waiting.next([A], 5.0) is last
    assert waiting.fewest([A, B], last) == B  # It takes up fewer.
    assert (len(waiting), waiting.taken_up) == (2, True)
    waiting.drop(RequestId("r1"))
    assert not waiting.taken_up


def test_without_an_engine_none_goes() -> None:
    assert orphans(orphan()).next([], 5.0) is None


def test_one_that_is_declined_waits_twice_as_long_each_time_and_then_ends() -> None:
    waiting, now = orphans(orphan(warm=B)), 5.0
    for times in range(DECLINED_MAX):
        one = waiting.next([A], now)
        assert one is not None
        assert one.warm == (B if times == 0 else None)
        waiting.begin(R, A, 0)
        assert waiting.add(orphan(warm=B, since_s=now), declined=AbortCode.OTHER, now=now) is None
        pause_s = DECLINED_PAUSE_S * 2**times
        assert waiting.next([A], now + 0.99 * pause_s) is None
        now += pause_s
    assert waiting.next([A], now) is not None
    waiting.begin(R, A, 0)
    why = waiting.add(orphan(why="no grammar", since_s=now), declined=AbortCode.OTHER, now=now)
    assert why == "no instance can go on with it (no grammar)"
    assert not waiting
    assert not waiting.taken_up


def test_an_engine_that_takes_none_just_now_is_asked_for_as_long_as_it_says_so() -> None:
    waiting, now = orphans(orphan(), orphan("b", tokens=10**6)), 5.0
    for _ in range(400):
        assert waiting.late(now) == []
        assert waiting.next([A], now) is not None
        waiting.begin(R, A, 0)
        again = orphan(why="it is paused", since_s=now)
        assert waiting.add(again, declined=AbortCode.BUSY, now=now) is None
        now += LATER_S
    waiting.begin(R, A, 0)
    assert waiting.drop(R) is not None  # A token, at last.
    assert waiting.late(now + 59) == []
    assert waiting.late(now + 60) == [RequestId("b")]


def test_a_death_after_a_decline_does_not_count_as_one() -> None:
    waiting = orphans(orphan())
    for _ in range(2 * DECLINED_MAX):
        waiting.begin(R, A, 0)
        assert waiting.add(orphan(), declined=None, now=5.0) is None
        assert waiting.next([A], 5.0) is not None


def test_its_patience_is_over_all_engines_that_take_it_up_and_die_before_its_next_token() -> None:
    waiting = orphans(orphan(since_s=1005.0), wait_s=10.0)
    assert waiting.late(1015.0) == []
    waiting.begin(R, A, 0)
    assert waiting.late(1100.0) == []  # It does not wait any more.
    waiting.add(orphan(since_s=1014.0), declined=None, now=1014.0)
    assert waiting.late(1015.1) == [R]
    waiting.begin(R, A, 0)
    waiting.drop(R)  # A token.
    waiting.add(orphan(since_s=20.0), declined=None, now=20.0)
    assert waiting.late(30.0) == []
    assert waiting.late(30.1) == [R]


def test_that_it_waits_is_shown_now_and_then() -> None:
    waiting = orphans(orphan(since_s=1000.0))
    assert waiting.to_show(1000 + SHOWN_EVERY_S) == []
    assert waiting.to_show(1001 + SHOWN_EVERY_S) == [R]
    assert waiting.to_show(1000 + 2 * SHOWN_EVERY_S) == []
    assert waiting.to_show(1002 + 2 * SHOWN_EVERY_S) == [R]


def test_nothing_is_known_of_one_that_has_ended() -> None:
    waiting = orphans(orphan("waits"), orphan("goes"))
    waiting.begin(RequestId("goes"), A, 0)
    for name in ("waits", "goes", "never there"):
        waiting.ended(RequestId(name))
        assert waiting.engine_of(RequestId(name)) is None
    assert (len(waiting), waiting.taken_up, waiting.watched) == (0, False, False)
