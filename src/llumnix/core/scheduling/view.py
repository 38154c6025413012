"""What the scheduler believes of every instance: its last report, and the decisions in flight.

Rules
- Only reports make an instance known, so that a restarted scheduler learns all from the next ones.
  A report of an ended run of an engine, or one that was overtaken, changes nothing.
- A dispatch is booked on its instance until a report names the request as admitted, so that a burst
  spreads. A booking lapses after `BOOKING_LIFETIME_S`: the client may have left in between.
- A move order is in flight until its source's report names it, and lapses after `ORDER_LIFETIME_S`.
- If a source answered an order without moving anything, balancing does not pair the two instances
  again for `FRUITLESS_S`.
- A report that repeats the one before, and lets nothing lapse, only says that its instance lives.
- An instance answers if its last report is at most `STALE_AFTER_S` old and its engine has not stood
  still for longer than `STALLED_AFTER_S`: an engine that hangs goes on to report the same numbers.
  An instance that does not answer gets requests only if none answers, and takes no part in moves.
- What is in flight on an instance lapses only once its engine has gone on for a whole lifetime.
- An instance that the scheduler decided to drain takes nothing from then on. If it still accepts
  after `DRAIN_LIFETIME_S`, the fleet did not do it.

`best` keeps a heap of (key, instance, version) for each sort key and class that was asked for. An
entry counts while its version is the instance's. A change raises the version and pushes one entry;
older ones go stale where they lie, and `best` drops them from the top.
Invariant: each accepting instance has its current entry in each heap, unless `best` dropped it
because the instance did not answer. Its next report pushes it again. So what is left on top is the
minimum over all instances that answer.
Bound: a heap of `_heap_max` entries is dropped, and made anew when it is next asked for, so that a
heap for which nobody asks takes no memory.
"""

import heapq
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from llumnix.core.limits import STALLED_AFTER_S
from llumnix.core.priorities import Priorities
from llumnix.core.reports import Heard, LoadReport
from llumnix.core.scheduling.load import Booking, Load, Standings, derive
from llumnix.core.scheduling.observed import Observed
from llumnix.core.scheduling.tuning import (
    BOOKING_LIFETIME_S,
    BOOKINGS_MAX,
    DRAIN_LIFETIME_S,
    FRUITLESS_S,
    HEAP_ENTRIES_MORE,
    HEAP_ENTRIES_PER_INSTANCE,
    ORDER_LIFETIME_S,
    STALE_AFTER_S,
    THRESHOLD_STEP,
)
from llumnix.core.settings import MigrationSettings
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId

SortKey = Callable[["InstanceView", int, "ClusterView"], tuple[float, ...]]
"""The place of an instance for a new request of a class; the lowest is the best."""
_Ranked = tuple[tuple[float, ...], InstanceId, int]
"""An entry of a heap: sort key, instance, and the version that had this key."""


@dataclass(slots=True, kw_only=True)
class InstanceView:
    """One instance as the scheduler sees it."""

    report: LoadReport
    load: Load  # follows from the report and the bookings
    freeness: float = 0.0  # as of when it was ranked for a round of pairing and took requests
    version: int = 0  # of load and freeness; never the same twice, in no run of any instance
    seen_s: float  # when the last report came
    stepped_s: float  # when a report last showed that its engine made steps, or ran nothing
    goes_on_since_s: float  # when its engine last stood still, or when it became known
    drain_decided_s: float | None = None  # by the scheduler, until a report shows it
    last_dispatch: int = 0  # number of the last dispatch to it, among all
    bookings: dict[RequestId, Booking] = field(default_factory=dict)
    booked: list[int] = field(default_factory=list)  # bookings of each class
    booked_tokens: int = 0
    booked_cached: int = 0
    orders: dict[OrderId, float] = field(default_factory=dict)
    """Orders in flight to move load away from here, and when they were made."""
    incoming: dict[OrderId, float] = field(default_factory=dict)
    """Orders in flight to move load here, likewise."""
    fruitless: dict[InstanceId, float] = field(default_factory=dict)
    """Destinations for which it had nothing to move, and when it said so."""

    @property
    def requests(self) -> int:
        """Requests that run, wait, or are on their way here."""
        return self.report.running + self.report.waiting + len(self.bookings)

    @property
    def tokens(self) -> int:
        """KV tokens in use or wanted by prompts on their way here."""
        return self.report.kv_tokens_used + self.booked_tokens

    @property
    def accepting(self) -> bool:
        """Whether it takes requests, as reported and decided."""
        return self.report.accepting and self.drain_decided_s is None

    @property
    def stalled_s(self) -> float:
        """Seconds for which its engine has stood still with work, as it says or its steps show."""
        return max(self.report.stalled_s, self.seen_s - self.stepped_s)

    def lapses(self, now: float) -> tuple[object, ...]:
        """What may change with a report that says nothing new, because time has passed."""
        in_flight = len(self.bookings), len(self.orders), len(self.incoming), len(self.fruitless)
        return *in_flight, self.drain_decided_s, self.answers(now)

    def answers(self, now: float) -> bool:
        """Whether it has reported lately and its engine goes on."""
        return now - self.seen_s <= STALE_AFTER_S and self.stalled_s <= STALLED_AFTER_S

    def hear(self, report: LoadReport, now: float) -> None:
        """Takes the report that came now, and records whether its engine goes on."""
        if report.steps != self.report.steps or not report.running:
            self.stepped_s = now
        self.report, self.seen_s = report, now
        if self.stalled_s > STALLED_AFTER_S:
            self.goes_on_since_s = now

    def lapsed(self, made_s: float, lifetime_s: float, now: float) -> bool:
        """Whether its engine has gone on for so long since then, though no report told of it."""
        return now - max(made_s, self.goes_on_since_s) >= lifetime_s


class ClusterView:
    """All instances by id, changed by the scheduler alone."""

    def __init__(self, priorities: Priorities, migration: MigrationSettings) -> None:
        self.priorities = priorities
        self._migration = migration
        self.observed = Observed()
        # Freeness below which an instance gives load away, and above which it takes some.
        self.thresholds = self.observed.migration_thresholds(migration)
        self._instances: dict[InstanceId, InstanceView] = {}
        self._ended: dict[InstanceId, EngineIndex] = {}  # the newest run that is over
        self._ids: list[InstanceId] = []  # sorted
        self._destinations: dict[OrderId, InstanceId] = {}  # of orders in flight
        self.standings = Standings(self._instances)
        self._heaps: dict[tuple[SortKey, int], list[_Ranked]] = {}
        self._dispatches = 0  # so far
        self._versions = 0  # given out so far

    def __iter__(self) -> Iterator[InstanceView]:
        return iter(self._instances.values())

    def __len__(self) -> int:
        return len(self._instances)

    def __contains__(self, instance: InstanceId) -> bool:
        return instance in self._instances

    def __getitem__(self, instance: InstanceId) -> InstanceView:
        return self._instances[instance]

    def get(self, instance: InstanceId) -> InstanceView | None:
        """The instance, if a report has made it known."""
        return self._instances.get(instance)

    def is_over(self, instance: InstanceId, engine_index: EngineIndex) -> bool:
        """Whether that run of the instance has ended, so that its reports count no more."""
        known = self._instances.get(instance)
        if known is not None and engine_index < known.report.engine_index:
            return True
        return engine_index <= self._ended.get(instance, -1)

    # -- what changes it

    def apply(self, report: LoadReport, now: float) -> Heard:
        """Takes in a report, unless it is from an ended run or was overtaken by a newer one."""
        if self.is_over(report.instance, report.engine_index):
            return Heard.TOO_LATE
        known, again = self._instances.get(report.instance), False
        if known is None or known.report.engine_index < report.engine_index:
            self.forget(report.instance)
            load = derive(report, (), 0)
            known = InstanceView(
                report=report, load=load, seen_s=now, stepped_s=now, goes_on_since_s=now
            )
            known.booked = [0] * len(self.priorities)
            self._instances[report.instance] = known
            insort(self._ids, report.instance)
        elif known.report.sequence >= report.sequence:
            return Heard.TOO_LATE
        else:
            again = report.repeats(known.report)
            if not again:  # What is kept of the last report must not hang on repeats.
                self.observed.take(report, known.report)
            if report.finished != known.report.finished:
                self.follow(self._migration, THRESHOLD_STEP)
        before = known.lapses(now) if again else None
        known.hear(report, now)
        for request in report.admitted:
            self._unbook(known, request)
        # Bookings are in the order in which they were made, so that the lapsed ones come first.
        while known.bookings:
            oldest = next(iter(known.bookings))
            if not known.lapsed(known.bookings[oldest].made_s, BOOKING_LIFETIME_S, now):
                break
            self._unbook(known, oldest)
        for order in report.orders:
            self._settle(known, order, now)
        if known.orders or known.incoming or known.fruitless:
            self._lapse(known, now)
        if known.drain_decided_s is not None and (
            not report.accepting or now - known.drain_decided_s > DRAIN_LIFETIME_S
        ):
            known.drain_decided_s = None
        if again and known.lapses(now) == before:
            return Heard.AGAIN
        self._changed(known)
        self.standings.rank(self.thresholds, self.priorities)
        return Heard.LAPSED if again else Heard.NEWS

    def book(
        self,
        instance: InstanceId,
        request: RequestId,
        tokens: int,
        now: float,
        *,
        priority: int = 0,
        cached: int = 0,
    ) -> None:
        """Records a dispatch that was just decided."""
        known = self._instances[instance]
        self._unbook(known, request)  # A frontend asks again if it could not send it.
        if len(known.bookings) >= BOOKINGS_MAX:
            self._unbook(known, next(iter(known.bookings)))
        rank = self.priorities.rank(priority)
        known.bookings[request] = Booking(tokens=tokens, cached=cached, rank=rank, made_s=now)
        known.booked[rank] += 1
        known.booked_tokens += tokens
        known.booked_cached += cached
        self._dispatches += 1
        known.last_dispatch = self._dispatches
        self._changed(known)

    def ordered(
        self, order: OrderId, source: InstanceId, destination: InstanceId, now: float
    ) -> None:
        """Records a move order that was just decided."""
        self._instances[source].orders[order] = now
        self._instances[destination].incoming[order] = now
        self._destinations[order] = destination

    def drain(self, instance: InstanceId, now: float) -> None:
        """Records that the scheduler just decided to drain an instance."""
        if (known := self._instances.get(instance)) is not None:
            known.drain_decided_s = now
            self._changed(known)

    def undrain(self, instance: InstanceId) -> None:
        """Records that the scheduler just decided to take a drain back."""
        known = self._instances.get(instance)
        if known is not None and known.drain_decided_s is not None:
            known.drain_decided_s = None
            self._changed(known)

    def lose(self, instance: InstanceId, engine_index: EngineIndex) -> None:
        """This run of the instance is over: forgets it, and whatever it may still report."""
        self._ended[instance] = max(engine_index, self._ended.get(instance, engine_index))
        known = self._instances.get(instance)
        if known is not None and known.report.engine_index <= engine_index:
            self.forget(instance)

    def forget(self, instance: InstanceId) -> None:
        """Drops what is known of an instance; its next report makes it known again."""
        known = self._instances.pop(instance, None)
        if known is None:
            return
        self.standings.changed.add(instance)
        del self._ids[bisect_right(self._ids, instance) - 1]
        for order in list(known.orders):
            self._settle(known, order)
        # With one instance less the bound is lower.
        self._heaps = {k: h for k, h in self._heaps.items() if len(h) <= self._heap_max}

    def keep(self, priorities: Priorities) -> None:
        """Takes the same classes with other headroom."""
        self.priorities = priorities
        for known in self._instances.values():
            self._changed(known)

    def follow(self, migration: MigrationSettings, step: float = 0.0) -> None:
        """Takes thresholds that changed by this share, and drops the heaps sorted by them."""
        self._migration = migration
        thresholds = self.observed.migration_thresholds(migration)
        for new, old in zip(thresholds, self.thresholds, strict=True):
            if abs(new - old) > step * old:
                self.thresholds = thresholds
                self._heaps.clear()

    def _unbook(self, known: InstanceView, request: RequestId) -> None:
        booking = known.bookings.pop(request, None)
        if booking is not None:
            known.booked[booking.rank] -= 1
            known.booked_tokens -= booking.tokens
            known.booked_cached -= booking.cached

    def _settle(self, source: InstanceView, order: OrderId, now: float | None = None) -> None:
        """An order is no longer in flight. `now`: set if its source answered it."""
        if source.orders.pop(order, None) is None:
            return
        name = self._destinations.pop(order)
        if now is not None and not source.report.moving_out:
            source.fruitless[name] = now
        if name in self._instances:
            self._instances[name].incoming.pop(order, None)

    def _lapse(self, known: InstanceView, now: float) -> None:
        for order, made_s in list(known.orders.items()):
            if known.lapsed(made_s, ORDER_LIFETIME_S, now):
                self._settle(known, order)
        known.incoming = {o: s for o, s in known.incoming.items() if now - s < ORDER_LIFETIME_S}
        known.fruitless = {i: s for i, s in known.fruitless.items() if now - s < FRUITLESS_S}

    def _changed(self, known: InstanceView) -> None:
        known.load = derive(known.report, known.booked, known.booked_tokens, known.booked_cached)
        self.standings.changed.add(known.report.instance)
        self._versions += 1
        known.version = self._versions
        if known.accepting:
            for key, heap in list(self._heaps.items()):
                if len(heap) >= self._heap_max:
                    del self._heaps[key]
                else:
                    self._push(heap, *key, known)

    # -- what is asked of it

    def candidates(self, now: float) -> list[InstanceView]:
        """The accepting instances that answer, by id; if none answers, all that accept."""
        accepting = [v for i in self._ids if (v := self._instances[i]).accepting]
        return [v for v in accepting if v.answers(now)] or accepting

    def next_after(self, instance: InstanceId, now: float) -> InstanceView | None:
        """The candidate whose id follows; after the last comes the first."""
        start = bisect_right(self._ids, instance)
        silent = None
        for place in range(len(self._ids)):
            known = self._instances[self._ids[(start + place) % len(self._ids)]]
            if known.accepting and known.answers(now):
                return known
            if known.accepting and silent is None:
                silent = known
        return silent

    def best(self, sort_key: SortKey, rank: int, now: float) -> InstanceView | None:
        """The candidate with the lowest key for a new request of that class."""
        heap = self._heaps.get((sort_key, rank))
        if heap is None:
            heap = self._heaps[sort_key, rank] = []
            for known in self._instances.values():
                if known.accepting:
                    self._push(heap, sort_key, rank, known)
        while heap:
            _, instance, version = heap[0]
            best = self._instances.get(instance)
            # An instance that does not answer is put back by its next report.
            if best is not None and best.version == version and best.answers(now):
                return best
            heapq.heappop(heap)
        return min(self.candidates(now), key=lambda v: sort_key(v, rank, self), default=None)

    @property
    def _heap_max(self) -> int:
        return HEAP_ENTRIES_PER_INSTANCE * len(self._instances) + HEAP_ENTRIES_MORE

    def check(self, now: float) -> None:
        """Raises `AssertionError` with the story if what is kept here does not agree with itself:
        ids, sums of bookings, both ends of each order, standings, and each heap beside brute force.
        For tests and the simulator."""
        assert self._ids == sorted(self._instances), f"ids {self._ids}"
        standings, ordered = Standings(self._instances), dict[OrderId, InstanceId | None]()
        for name, known in self._instances.items():
            booked = known.bookings.values()
            ranks = [sum(b.rank == r for b in booked) for r in range(len(self.priorities))]
            sums = sum(b.tokens for b in booked), sum(b.cached for b in booked)
            told = known.booked, (known.booked_tokens, known.booked_cached)
            assert told == (ranks, sums), f"{name}: {told} booked, and bookings {known.bookings}"
            load = derive(known.report, known.booked, *sums)
            assert known.load == load, f"{name}: {known.load} is kept, {load} follows"
            ordered |= {order: self._destinations.get(order) for order in known.orders}
        assert ordered == self._destinations, f"{ordered}, and destinations {self._destinations}"
        for name, known in self._instances.items():
            for order in known.incoming:
                assert ordered.get(order) == name, f"order {order} to {name} has no source"
        by = self.thresholds, self.priorities
        kept = self.standings.rank(*by), [known.freeness for known in self]
        ranked = standings.rank(*by), [known.freeness for known in self]
        assert kept == ranked, "standings do not follow loads"
        for (key, rank), heap in list(self._heaps.items()):
            assert len(heap) <= self._heap_max, f"a heap of {len(heap)} entries"
            best = self.best(key, rank, now)
            first = min((key(v, rank, self) for v in self.candidates(now)), default=None)
            top = None if best is None else key(best, rank, self)
            assert top == first, f"{top} is on top of a heap, {first} is the best"

    def _push(self, heap: "list[_Ranked]", key: SortKey, rank: int, known: InstanceView) -> None:
        heapq.heappush(heap, (key(known, rank, self), known.report.instance, known.version))
