"""What the scheduler believes of the instances: bookings, orders and heaps agree with each other,
and an instance that does not answer is left alone."""

from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from llumnix.core.events import (
    Dispatch,
    Fact,
    InstanceLost,
    LoadReported,
    MoveOrder,
    RequestArrived,
    Tick,
)
from llumnix.core.limits import STALLED_AFTER_S
from llumnix.core.reports import ClassLoad, Heard, LoadReport
from llumnix.core.scheduling.dispatch import earliest_start_key, highest_freeness_key
from llumnix.core.scheduling.presets import POLICIES
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.scheduling.tuning import (
    BOOKING_LIFETIME_S,
    BOOKINGS_MAX,
    DRAIN_LIFETIME_S,
    FRUITLESS_S,
    HEAP_ENTRIES_MORE,
    HEAP_ENTRIES_PER_INSTANCE,
    ORDER_LIFETIME_S,
    STALE_AFTER_S,
)
from llumnix.core.scheduling.view import ClusterView
from llumnix.core.settings import MigrationSettings, SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId

TOTAL = 10_000
BEAT_S = 0.1
FIXED = MigrationSettings(source_below=48.0, destination_above=100.0)


def scheduler(policy: str = "llumnix") -> Scheduler:
    return Scheduler(SchedulerSettings(policy=policy, migration=FIXED))


def report(number: int, sequence: int, running: int = 0, used: int = 0, **more: object):
    return LoadReport(
        instance=InstanceId(f"i{number}"),
        engine_index=EngineIndex(number),
        sequence=sequence,
        kv_tokens_used=used,
        kv_tokens_total=TOTAL,
        block_tokens=16,
        classes=(ClassLoad(), ClassLoad(running=running)),
        **more,  # type: ignore[arg-type]
    )


def tell(s: Scheduler, now: float, *reports: LoadReport) -> None:
    for one in reports:
        s.handle(LoadReported(report=one), now)


def place(s: Scheduler, now: float, name: str = "r", tokens: int = 10, priority: int = 0) -> str:
    asked = RequestArrived(request=RequestId(name), prompt_tokens=tokens, priority=priority)
    (decision,) = s.handle(asked, now)
    return decision.instance if isinstance(decision, Dispatch) else ""


class Beats:
    """Two instances that report every tenth of a second. `stalled`: from then on the first one
    repeats its numbers, as one whose engine hangs. `says`: the engine says so itself."""

    def __init__(self, policy: str = "llumnix", *, says: bool = False) -> None:
        self.s = scheduler(policy)
        self.says = says
        self.beat = 0
        self.stalled_since_s: float | None = None
        self.first = {"running": 2, "used": 2000}
        self.second = {"running": 40, "used": 4000}

    @property
    def now(self) -> float:
        return self.beat * BEAT_S

    def next(self, **more: object) -> None:
        """The next report of each; `more`: of the second's."""
        self.beat += 1
        stalled_s = 0.0
        if self.stalled_since_s is not None:
            stalled_s = self.now - self.stalled_since_s
        steps = self.beat if not stalled_s or self.says else 1
        said_s = stalled_s if self.says else 0.0
        first = report(0, self.beat, steps=steps, stalled_s=said_s, **self.first)
        tell(self.s, self.now, first)
        tell(self.s, self.now, report(1, self.beat, steps=self.beat, **self.second, **more))

    def until(self, seconds: float) -> None:
        while self.now < seconds:
            self.next()


# -- instances that do not answer


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("says", [True, False], ids=["it says so", "its steps show it"])
def test_an_engine_that_stands_still_with_work_gets_no_request(policy: str, says: bool) -> None:
    b = Beats(policy, says=says)
    b.next()
    b.stalled_since_s = b.now
    b.until(b.now + STALLED_AFTER_S + 2 * BEAT_S)
    placed = {}
    for k in range(60):
        b.next(admitted=tuple(placed))
        placed = {RequestId(f"r{k}"): place(b.s, b.now, f"r{k}", tokens=500)}
        assert set(placed.values()) == {"i1"}


def test_an_engine_that_goes_on_gets_requests_again() -> None:
    b = Beats()
    b.next()
    assert place(b.s, b.now) == "i0"
    b.stalled_since_s = b.now
    b.until(3.0)
    assert place(b.s, b.now) == "i1"
    b.stalled_since_s = None
    b.next()
    assert place(b.s, b.now, "s") == "i0"


def test_if_no_instance_answers_requests_are_placed_all_the_same() -> None:
    s = scheduler()
    for sequence in (1, 2):
        now = (sequence - 1) * 2 * STALLED_AFTER_S
        tell(s, now, report(0, sequence, running=1, steps=5))
    assert place(s, now) == "i0"


def test_an_engine_without_work_makes_no_steps_and_does_not_stand_still() -> None:
    s = scheduler()
    for sequence in range(1, 50):
        tell(s, sequence * BEAT_S, report(0, sequence, steps=7))
    assert s.view[InstanceId("i0")].stalled_s == 0


def test_dispatches_to_an_engine_that_hangs_do_not_lapse() -> None:
    b = Beats()
    b.next()
    assert place(b.s, b.now) == "i0"
    b.stalled_since_s = b.now
    b.until(3 * BOOKING_LIFETIME_S)
    assert b.s.view[InstanceId("i0")].bookings
    b.stalled_since_s = None
    ended_s = b.now
    b.until(ended_s + BOOKING_LIFETIME_S - 2 * BEAT_S)
    assert b.s.view[InstanceId("i0")].bookings, "it has had no time to admit it"
    b.until(ended_s + BOOKING_LIFETIME_S + 2 * BEAT_S)
    assert not b.s.view[InstanceId("i0")].bookings


@pytest.mark.parametrize(("first", "second"), [(9900, 1000), (1000, 9900)])
def test_an_engine_that_hangs_takes_no_part_in_moves(first: int, second: int) -> None:
    b = Beats()
    b.first, b.second = {"running": 10, "used": first}, {"running": 10, "used": second}
    b.next()
    b.stalled_since_s = b.now
    b.until(2 * STALLED_AFTER_S + b.now)
    assert b.s.handle(Tick(), b.now) == []
    b.stalled_since_s = None
    b.next()
    assert len(b.s.handle(Tick(), b.now)) == 1


def test_a_long_step_gets_one_order_however_long_it_is() -> None:
    b = Beats()
    b.first, b.second = {"running": 10, "used": 9900}, {"running": 10, "used": 1000}
    b.next()
    b.stalled_since_s = b.now
    orders = []
    while b.now < 10 * ORDER_LIFETIME_S:
        b.next()
        orders += b.s.handle(Tick(), b.now)
    assert len(orders) == 1
    b.stalled_since_s = None  # The step is over; what came meanwhile is looked at next.
    b.next()
    assert b.s.handle(Tick(), b.now) == []


def test_a_silent_instance_leaves_the_heap_and_comes_back_with_its_next_report() -> None:
    s = scheduler()
    tell(s, 0.0, report(0, 1), report(1, 1, running=40, used=4000))
    assert place(s, 0.0, "a") == "i0", "it is on top of the heap"
    late = STALE_AFTER_S + 0.1
    tell(s, late, report(1, 2, running=40, used=4000, steps=1))
    assert place(s, late, "b") == "i1"
    tell(s, late, report(0, 2, admitted=(RequestId("a"),)))
    assert place(s, late, "c") == "i0"


# -- what a report changes


def test_a_report_that_names_requests_or_orders_repeats_nothing() -> None:
    s, b = scheduler(), OrderId(1)
    heard = []
    for more in ({}, {}, {"admitted": (RequestId("r"),)}, {"admitted": (RequestId("r"),)}, {}, {}):
        tell(s, 0.0, report(0, len(heard) + 1, **more))
        heard.append(s.heard)
    assert heard == [Heard.NEWS, Heard.AGAIN, Heard.NEWS, Heard.NEWS, Heard.NEWS, Heard.AGAIN]
    for sequence in (7, 8):
        tell(s, 0.0, report(0, sequence, orders=(b,)))
        assert s.heard is Heard.NEWS


def test_a_report_that_changes_nothing_is_told_from_one_that_lets_something_lapse() -> None:
    s = scheduler()
    tell(s, 0.0, report(0, 1), report(0, 2))
    assert s.heard is Heard.AGAIN
    tell(s, STALE_AFTER_S + 0.1, report(0, 3))
    assert s.heard is Heard.LAPSED, "it was silent, and answers"
    tell(s, STALE_AFTER_S + 0.2, report(0, 4, stalled_s=STALLED_AFTER_S + 0.1))
    assert s.heard is Heard.LAPSED, "it answers no more"
    tell(s, STALE_AFTER_S + 0.3, report(0, 3, running=2))
    assert s.heard is Heard.TOO_LATE
    s.handle(InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(0)), 2.0)
    tell(s, 2.0, report(0, 5))
    assert s.heard is Heard.TOO_LATE


# -- drains


@pytest.mark.parametrize("told", [False, True])
def test_a_heap_entry_of_an_earlier_run_does_not_count_for_the_present_one(told: bool) -> None:
    """Its heap's entry looks as current as the first of the new run does."""
    s = scheduler()
    tell(s, 0.0, report(0, 1), report(1, 1, used=9_000))
    assert place(s, 0.0, "first", tokens=0) == "i0"
    if told:
        s.handle(InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(0)), 0.1)
    again = replace(report(0, 1, accepting=False), engine_index=EngineIndex(2))
    tell(s, 0.3, again)
    s.view.check(0.3)
    assert place(s, 0.3, "second") == "i1"


def test_an_instance_that_was_just_decided_to_drain_gets_nothing_more() -> None:
    s = scheduler()
    tell(s, 0.0, report(0, 1), report(1, 1, running=40, used=4000))
    assert place(s, 0.0, "a") == "i0"
    s.view.drain(InstanceId("i0"), 0.0)
    assert place(s, 0.0, "b") == "i1"
    tell(s, 0.1, report(0, 2))
    assert place(s, 0.1, "c") == "i1", "this report was on its way already"
    tell(s, 0.2, report(0, 3, accepting=False))
    tell(s, 0.3, report(0, 4))
    tell(
        s,
        0.3,
        report(1, 2, running=42, used=4000, steps=1, admitted=(RequestId("b"), RequestId("c"))),
    )
    assert place(s, 0.3, "d") == "i0", "somebody took the drain back"


def test_a_drain_that_the_fleet_did_not_do_is_forgotten() -> None:
    s = scheduler()
    tell(s, 0.0, report(0, 1))
    s.view.drain(InstanceId("i0"), 0.0)
    assert place(s, 0.0) == ""
    tell(s, DRAIN_LIFETIME_S + 1, report(0, 2))
    assert place(s, DRAIN_LIFETIME_S + 1) == "i0"


@pytest.mark.parametrize("indexes", [(3, 5), (5, 3)])
def test_a_run_that_is_over_stays_so_whichever_end_is_told_last(indexes: tuple[int, int]) -> None:
    s = scheduler()
    for index in indexes:
        s.handle(InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(index)), 0.0)
    tell(s, 0.1, replace(report(0, 1), engine_index=EngineIndex(5)))
    assert place(s, 0.1) == ""
    tell(s, 0.2, replace(report(0, 1), engine_index=EngineIndex(6)))
    assert place(s, 0.2, "s") == "i0"


# -- lifetimes

BEGAN_S = 100.0
"""Late, so that a span that is counted from nowhere is too long."""


@pytest.mark.parametrize(
    ("what", "lifetime_s"),
    [
        ("booking", BOOKING_LIFETIME_S),
        ("order", ORDER_LIFETIME_S),
        ("drain", DRAIN_LIFETIME_S),
        ("fruitless", FRUITLESS_S),
    ],
)
def test_what_is_noted_stays_for_its_lifetime_and_no_longer(what: str, lifetime_s: float) -> None:
    s, order = scheduler(), OrderId(7)
    one, other = InstanceId("i0"), InstanceId("i1")
    tell(s, 0.0, report(0, 1), report(1, 1))
    tell(s, BEGAN_S, report(0, 2), report(1, 2))
    if what == "booking":
        s.view.book(one, RequestId("r"), 100, BEGAN_S)
    elif what == "drain":
        s.view.drain(one, BEGAN_S)
    else:
        s.view.ordered(order, one, other, BEGAN_S)
    if what == "fruitless":
        tell(s, BEGAN_S, report(0, 3, orders=(order,)))

    def noted() -> bool:
        known = s.view[one]
        incoming = s.view[other].incoming.keys()
        assert incoming == known.orders.keys()
        drained = known.drain_decided_s is not None
        return bool(known.bookings or known.orders or drained or known.fruitless)

    for past_s, there in ((lifetime_s - 0.05, True), (lifetime_s + 0.05, False)):
        sequence = 5 if there else 6
        tell(s, BEGAN_S + past_s, report(0, sequence), report(1, sequence))
        assert noted() is there


def test_a_scheduler_that_meets_an_engine_that_stands_still_sends_it_nothing() -> None:
    s = scheduler()
    long_s = STALLED_AFTER_S + 1
    tell(s, BEGAN_S, report(0, 1, running=1, used=100, steps=5, stalled_s=long_s))
    tell(s, BEGAN_S, report(1, 1, running=40, used=4000, steps=5))
    assert place(s, BEGAN_S) == "i1"


# -- bookings


def test_all_that_an_instance_has_to_do_counts_as_its_load() -> None:
    s = scheduler("least-loaded")
    waits = ClassLoad(running=1, waiting=3)
    tell(s, 0.0, replace(report(0, 1), classes=(ClassLoad(), waits)), report(1, 1, running=2))
    assert place(s, 0.0) == "i1", "what waits is to be computed too"
    s = scheduler("least-loaded")
    tell(s, 0.0, report(0, 1), report(1, 1))
    first = place(s, 0.0, "large", tokens=500)
    second = place(s, 0.0, "small", tokens=10)
    assert {first, second} == {"i0", "i1"}
    assert place(s, 0.0, "next") == second, "as many requests, and fewer tokens on their way"


def test_a_request_that_is_booked_twice_counts_once() -> None:
    s = scheduler()
    tell(s, 0.0, report(0, 1), report(1, 1))
    for _ in range(3):
        s.view.book(InstanceId("i0"), RequestId("r"), 100, 0.0, cached=10)
    s.view.check(0.0)
    assert s.view[InstanceId("i0")].booked_tokens == 100


def test_bookings_of_an_instance_are_bounded() -> None:
    view = scheduler().view
    view.apply(report(0, 1), 0.0)
    for n in range(BOOKINGS_MAX + 5):
        view.book(InstanceId("i0"), RequestId(f"r{n}"), 1, 0.0)
    assert len(view[InstanceId("i0")].bookings) == BOOKINGS_MAX
    view.check(0.0)


def test_what_is_forgotten_gets_nothing_until_its_next_report() -> None:
    s = scheduler()
    tell(s, 0.0, report(0, 1), report(1, 1, running=5, used=5000))
    s.view.forget(InstanceId("i0"))
    s.view.forget(InstanceId("i0"))
    assert place(s, 0.0) == "i1"
    tell(s, 0.1, report(0, 2))
    assert place(s, 0.1) == "i0"


def test_a_report_that_came_twice_changes_nothing() -> None:
    """Nor does one with the same number and other content."""
    s = scheduler()
    tell(s, 0.0, report(0, 5, running=5, finished=100, finished_tokens=1000))
    before = s.view[InstanceId("i0")].version
    tell(s, 0.1, report(0, 5, running=9, finished=900, finished_tokens=90_000))
    known = s.view[InstanceId("i0")]
    assert (known.report.running, known.version, known.seen_s) == (5, before, 0.0)
    assert s.view.observed.answer_tokens is None


# -- heaps


def entries(view: ClusterView) -> int:
    return sum(len(heap) for heap in view._heaps.values())


@pytest.mark.parametrize("asked", [(), (0,), (-100,), (0, -100)])
def test_heaps_are_bounded_whatever_is_asked_for_afterwards(asked: tuple[int, ...]) -> None:
    """One urgent request and a normal one, then only reports, and requests of some classes."""
    s = scheduler()
    tell(s, 0.0, *(report(n, 1) for n in range(4)))
    for priority in (0, -100):
        place(s, 0.0, f"first {priority}", priority=priority)
    for beat in range(2, 500):
        now = beat * BEAT_S
        tell(s, now, *(report(n, beat) for n in range(4)))
        if beat % 20 == 0:
            for priority in asked:
                place(s, now, f"{beat} {priority}", priority=priority)
        assert entries(s.view) <= 2 * (HEAP_ENTRIES_PER_INSTANCE * 4 + HEAP_ENTRIES_MORE)


def test_heaps_follow_the_thresholds() -> None:
    """i0 has enough memory for short answers, and nobody waits there; long ones need i1."""
    s = Scheduler(SchedulerSettings())
    tell(s, 0.0, report(0, 1, running=10, used=TOTAL - 600))
    tell(s, 0.0, report(1, 1, running=10, used=TOTAL - 5000, prefill_tokens=2000))
    tell(s, 0.0, report(2, 1, accepting=False))
    assert place(s, 0.0, "a") == "i0"
    long = {"finished": 100, "finished_tokens": 200_000}
    tell(s, 0.1, report(2, 2, accepting=False, **long))
    s.view.check(0.1)
    assert place(s, 0.1, "b") == "i1"
    short = {"finished": 50_100, "finished_tokens": 700_000}
    tell(s, 0.2, report(2, 3, accepting=False, **short))
    s.view.check(0.2)
    assert place(s, 0.2, "c") == "i0"


@pytest.mark.parametrize("changed", ["source_below", "destination_above"])
def test_either_threshold_is_followed(changed: str) -> None:
    s = scheduler()
    tell(s, 0.0, report(0, 1))
    assert place(s, 0.0, "a") == "i0"
    assert s.view._heaps
    s.view.follow(replace(FIXED, **{changed: 60.0}))
    assert s.view.thresholds == ((60.0, 100.0) if changed == "source_below" else (48.0, 60.0))
    assert not s.view._heaps


times = st.sampled_from([0.0, 0.0, 0.01, 0.3, 2.5])
facts = st.one_of(
    st.builds(
        lambda n, running, waiting, used, more: LoadReported(
            report=replace(
                report(n, 0, running, used, **more),
                classes=(
                    ClassLoad(running=running % 3),
                    ClassLoad(running=running, waiting=waiting, waiting_tokens=300 * waiting),
                ),
            )
        ),
        st.integers(0, 3),
        st.integers(0, 12),
        st.integers(0, 3),
        st.integers(0, TOTAL),
        st.fixed_dictionaries(
            {},
            optional={
                "accepting": st.booleans(),
                "stalled_s": st.sampled_from([0.5, 3.0]),
                "head_tokens": st.integers(1, 3000),
                "slots": st.just(8),
                "finished": st.integers(0, 100),
                "orders": st.lists(st.integers(0, 6).map(OrderId), max_size=3).map(tuple),
                "admitted": st.lists(st.integers(0, 9), max_size=3).map(
                    lambda them: tuple(RequestId(f"r{n}") for n in them)
                ),
            },
        ),
    ),
    st.builds(
        lambda n, tokens, priority, prefix: RequestArrived(
            request=RequestId(f"r{n}"), prompt_tokens=tokens, priority=priority, prefix=prefix
        ),
        st.integers(0, 9),
        st.integers(1, 2000),
        st.sampled_from([0, -100]),
        st.sampled_from([(), (1, 2, 3)]),
    ),
    st.builds(
        lambda n: InstanceLost(instance=InstanceId(f"i{n}"), engine_index=EngineIndex(n)),
        st.integers(0, 3),
    ),
    st.just(Tick()),
)


@settings(max_examples=80)
@given(
    st.lists(st.tuples(times, facts), min_size=20, max_size=60),
    st.sampled_from(["llumnix", "infaas++"]),
)
def test_the_view_agrees_with_itself_after_every_fact(
    drawn: list[tuple[float, Fact]], policy: str
) -> None:
    """Bookings with their sums, both ends of every order, standings with loads, and each heap with
    brute force."""
    s, now, runs = Scheduler(SchedulerSettings(policy=policy)), 0.0, dict.fromkeys(range(4), 0)
    for sequence, (later_s, fact) in enumerate(drawn, 1):
        now += later_s
        match fact:
            case LoadReported(report=one):
                number = int(one.instance[1:])
                engine = EngineIndex(number + 4 * runs[number])
                steps = sequence if sequence % 3 else 0
                one = replace(one, sequence=sequence, engine_index=engine, steps=steps)
                fact = LoadReported(report=one)
            case InstanceLost(instance=instance):
                number = int(instance[1:])
                engine = EngineIndex(number + 4 * runs[number])
                fact = replace(fact, engine_index=engine)
                runs[number] += 1
        decided = s.handle(fact, now)
        event(f"an order: {any(isinstance(d, MoveOrder) for d in decided)}")
        s.view.check(now)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, TOTAL), st.integers(0, 30)), min_size=5),
    st.sampled_from([earliest_start_key, highest_freeness_key]),
    st.sampled_from([0, 1]),
)
def test_the_top_of_a_heap_is_the_best_by_brute_force(drawn, order, rank) -> None:
    view = scheduler().view
    for sequence, (number, used, running) in enumerate(drawn, 1):
        one = report(number, sequence, running, used, steps=sequence)
        view.apply(one, sequence * 0.4)
        now = sequence * 0.4
        best = view.best(order, rank, now)
        first = min(view.candidates(now), key=lambda v: order(v, rank, view))
        assert best is not None
        assert order(best, rank, view) == order(first, rank, view)
