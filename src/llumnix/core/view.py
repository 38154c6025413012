"""What the scheduler believes of every instance: the last report, and decisions in flight.

Rules
- Only reports make an instance known: a scheduler that starts anew learns all from the next ones.
- A dispatch books itself on its instance until a report names the request as admitted, so that a
  burst spreads instead of landing on the one that last looked empty. A booking that no report
  ever covers (the client hung up first) lapses after `BOOKING_LIFETIME_S`.
- An order to move load is in flight until its source's report names it, and lapses after
  `ORDER_LIFETIME_S`. Meanwhile its source and its destination are not looked at again.
- A report of an older run of an engine, or one that was overtaken, changes nothing.
- Who has not reported for `STALE_AFTER_S` gets no request while another has, and takes no part in
  moves.
"""

import heapq
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from llumnix.core.load import Load, LoadReport, derive
from llumnix.core.observed import Observed
from llumnix.core.priorities import Priorities
from llumnix.core.settings import MigrationSettings
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId

Order = Callable[["InstanceView", int, "ClusterView"], tuple[float, ...]]
"""How good an instance is for a newcomer of a class; the lowest is the best."""

BOOKING_LIFETIME_S = 5.0
ORDER_LIFETIME_S = 2.0
STALE_AFTER_S = 2.0


class Booking(NamedTuple):
    """A dispatch that no report covers yet. `tokens`: of its prompt; `cached`: of these in the
    instance's prefix cache; `rank`: its class; `made_s`: when, in seconds."""

    tokens: int
    cached: int
    rank: int
    made_s: float


@dataclass(slots=True, kw_only=True)
class InstanceView:
    """One instance as the scheduler sees it. `load` and `freeness` follow from the rest;
    `version` counts their changes. `orders`: to move load away from here that no report covers, and
    when they were made; `incoming`: those that bring load here. `turn`: the last dispatch to it."""

    report: LoadReport
    load: Load
    seen_s: float
    freeness: float = 0.0
    version: int = 0
    turn: int = 0
    bookings: dict[RequestId, Booking] = field(default_factory=dict)
    booked: list[int] = field(default_factory=list)
    booked_tokens: int = 0
    booked_cached: int = 0
    orders: dict[OrderId, float] = field(default_factory=dict)
    incoming: dict[OrderId, float] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """Requests on the instance, those on their way included."""
        return self.report.running + self.report.waiting + len(self.bookings)

    @property
    def tokens(self) -> int:
        """KV tokens in use, those of prompts on their way included."""
        return self.report.kv_tokens_used + self.booked_tokens

    def fresh(self, now: float) -> bool:
        """Whether it has reported lately."""
        return now - self.seen_s <= STALE_AFTER_S


class ClusterView:
    """All instances, by id. Mutated by the scheduler alone. `thresholds`: freeness below which an
    instance gives load away, and above which it takes some."""

    def __init__(self, priorities: Priorities, migration: MigrationSettings) -> None:
        self.priorities = priorities
        self._migration = migration
        self.observed = Observed()
        self.thresholds = self.observed.migration_thresholds(migration)
        self._instances: dict[InstanceId, InstanceView] = {}
        self._ended: dict[InstanceId, EngineIndex] = {}
        self._ids: list[InstanceId] = []
        self._destinations: dict[OrderId, InstanceId] = {}
        self._heaps: dict[tuple[Order, int], list[_Ranked]] = {}
        self._turn = 0

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
        """Whether that run of the instance has ended: what it says counts no more."""
        known = self._instances.get(instance)
        newest = self._ended.get(instance, -1)
        return engine_index <= newest or (
            known is not None and engine_index < known.report.engine_index
        )

    # -- what changes it

    def apply(self, report: LoadReport, now: float) -> None:
        """Takes in a report, unless it is from an ended run or was overtaken by a newer one."""
        if self.is_over(report.instance, report.engine_index):
            return
        known = self._instances.get(report.instance)
        if known is None or known.report.engine_index < report.engine_index:
            if known is not None:
                self._forget(report.instance)
            known = InstanceView(report=report, load=derive(report, (), 0), seen_s=now)
            known.booked = [0] * len(self.priorities)
            self._instances[report.instance] = known
            insort(self._ids, report.instance)
        elif known.report.sequence >= report.sequence:
            return
        else:
            self.observed.take(report, known.report)
            if report.finished != known.report.finished:
                self.thresholds = self.observed.migration_thresholds(self._migration)
        known.report, known.seen_s = report, now
        for request in report.admitted:
            self._unbook(known, request)
        # Both are in the order they were made, so the lapsed ones come first.
        while known.bookings:
            oldest = next(iter(known.bookings))
            if now - known.bookings[oldest].made_s < BOOKING_LIFETIME_S:
                break
            self._unbook(known, oldest)
        for order in report.orders:
            self._settle(known, order)
        if known.orders or known.incoming:
            for order in _lapsed(known.orders, now):
                self._settle(known, order)
            for order in _lapsed(known.incoming, now):
                del known.incoming[order]  # Its source is silent.
        self._changed(known)

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
        """Counts a dispatch that was just decided."""
        known = self._instances[instance]
        rank = self.priorities.rank(priority)
        known.bookings[request] = Booking(tokens=tokens, cached=cached, rank=rank, made_s=now)
        known.booked[rank] += 1
        known.booked_tokens += tokens
        known.booked_cached += cached
        self._turn += 1
        known.turn = self._turn
        self._changed(known)

    def ordered(
        self, order: OrderId, source: InstanceId, destination: InstanceId, now: float
    ) -> None:
        """Notes an order to move load that was just decided."""
        self._instances[source].orders[order] = now
        self._instances[destination].incoming[order] = now
        self._destinations[order] = destination

    def lose(self, instance: InstanceId, engine_index: EngineIndex) -> None:
        """Forgets this run of the instance, and whatever it may still say."""
        self._ended[instance] = max(engine_index, self._ended.get(instance, engine_index))
        known = self._instances.get(instance)
        if known is not None and known.report.engine_index <= engine_index:
            self._forget(instance)

    def _forget(self, instance: InstanceId) -> None:
        known = self._instances.pop(instance)
        del self._ids[bisect_right(self._ids, instance) - 1]
        for order in list(known.orders):
            self._settle(known, order)

    def _unbook(self, known: InstanceView, request: RequestId) -> None:
        booking = known.bookings.pop(request, None)
        if booking is not None:
            known.booked[booking.rank] -= 1
            known.booked_tokens -= booking.tokens
            known.booked_cached -= booking.cached

    def _settle(self, source: InstanceView, order: OrderId) -> None:
        if source.orders.pop(order, None) is None:
            return
        destination = self._instances.get(self._destinations.pop(order))
        if destination is not None:
            destination.incoming.pop(order, None)

    def _changed(self, known: InstanceView) -> None:
        known.load = derive(known.report, known.booked, known.booked_tokens, known.booked_cached)
        known.freeness = (
            known.load.freeness(self.priorities) if known.report.accepting else float("-inf")
        )
        known.version += 1
        if known.report.accepting:
            for (order, rank), heap in self._heaps.items():
                self._push(heap, order, rank, known)

    # -- what is asked of it

    def candidates(self, now: float) -> list[InstanceView]:
        """Those that take requests, in order of id; the silent ones only if all are silent."""
        accepting = [v for i in self._ids if (v := self._instances[i]).report.accepting]
        return [v for v in accepting if v.fresh(now)] or accepting

    def next_after(self, instance: InstanceId, now: float) -> InstanceView | None:
        """The one that takes requests and follows in order of id, the first after the last."""
        start = bisect_right(self._ids, instance)
        silent = None
        for place in range(len(self._ids)):
            known = self._instances[self._ids[(start + place) % len(self._ids)]]
            if known.report.accepting and known.fresh(now):
                return known
            if known.report.accepting and silent is None:
                silent = known
        return silent

    def best(self, order: Order, rank: int, now: float) -> InstanceView | None:
        """The first in that order for a newcomer of that class."""
        heap = self._heaps.get((order, rank))
        if heap is None or len(heap) > 8 * len(self._instances) + 64:
            heap = self._heaps[order, rank] = []
            for known in self._instances.values():
                if known.report.accepting:
                    self._push(heap, order, rank, known)
        while heap:
            _, instance, version = heap[0]
            best = self._instances.get(instance)
            # One that is silent is put back by its next report.
            if best is not None and best.version == version and best.fresh(now):
                return best
            heapq.heappop(heap)
        return min(
            self.candidates(now),
            key=lambda v: order(v, rank, self),
            default=None,
        )

    def _push(self, heap: "list[_Ranked]", order: Order, rank: int, known: InstanceView) -> None:
        place = order(known, rank, self)
        heapq.heappush(heap, (place, known.report.instance, known.version))


_Ranked = tuple[tuple[float, ...], InstanceId, int]
"""An instance's place in an order, and the version of it that had that place."""


def _lapsed(orders: dict[OrderId, float], now: float) -> list[OrderId]:
    return [order for order, made_s in orders.items() if now - made_s > ORDER_LIFETIME_S]
