"""What the scheduler believes of every instance: the last report, and decisions in flight.

Rules
- Only reports make an instance known: a scheduler that starts anew learns all from the next ones.
- A dispatch books itself on its instance until a report names the request as admitted, so that a
  burst spreads instead of landing on the one that last looked empty. A booking that no report
  ever covers (the client hung up first) lapses after `BOOKING_LIFETIME_S`.
- A report of an older run of an engine, or one that was overtaken, changes nothing.
- Who has not reported for `STALE_AFTER_S` gets no request while another has.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from llumnix.core.load import LoadReport
from llumnix.core.types import EngineIndex, InstanceId, RequestId

BOOKING_LIFETIME_S = 5.0
STALE_AFTER_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Booking:
    """A dispatch that no report covers yet. `tokens`: of its prompt. `made_s`: when, in seconds."""

    tokens: int
    made_s: float


@dataclass(slots=True, kw_only=True)
class InstanceView:
    """One instance as the scheduler sees it."""

    report: LoadReport
    seen_s: float
    bookings: dict[RequestId, Booking] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """Requests on the instance, those on their way included."""
        return self.report.running + self.report.waiting + len(self.bookings)

    @property
    def tokens(self) -> int:
        """KV tokens in use, those of prompts on their way included."""
        return self.report.kv_tokens_used + sum(b.tokens for b in self.bookings.values())


class ClusterView:
    """All instances, by id. Mutated by the scheduler alone."""

    def __init__(self) -> None:
        self._instances: dict[InstanceId, InstanceView] = {}
        self._ended: dict[InstanceId, EngineIndex] = {}

    def __iter__(self) -> Iterator[InstanceView]:
        return iter(self._instances.values())

    def __contains__(self, instance: InstanceId) -> bool:
        return instance in self._instances

    def __getitem__(self, instance: InstanceId) -> InstanceView:
        return self._instances[instance]

    def apply(self, report: LoadReport, now: float) -> None:
        """Takes in a report, unless it is from an ended run or was overtaken by a newer one."""
        if report.engine_index <= self._ended.get(report.instance, -1):
            return
        known = self._instances.get(report.instance)
        if known is None or known.report.engine_index < report.engine_index:
            self._instances[report.instance] = known = InstanceView(report=report, seen_s=now)
        elif (known.report.engine_index, known.report.sequence) >= (
            report.engine_index,
            report.sequence,
        ):
            return
        known.report, known.seen_s = report, now
        for request in report.admitted:
            known.bookings.pop(request, None)
        # Bookings are in the order they were made, so the lapsed ones come first.
        while known.bookings:
            oldest = next(iter(known.bookings))
            if now - known.bookings[oldest].made_s < BOOKING_LIFETIME_S:
                break
            del known.bookings[oldest]

    def book(self, instance: InstanceId, request: RequestId, tokens: int, now: float) -> None:
        """Counts a dispatch that was just decided."""
        self._instances[instance].bookings[request] = Booking(tokens=tokens, made_s=now)

    def lose(self, instance: InstanceId, engine_index: EngineIndex) -> None:
        """Forgets this run of the instance, and whatever it may still say."""
        self._ended[instance] = max(engine_index, self._ended.get(instance, engine_index))
        known = self._instances.get(instance)
        if known is not None and known.report.engine_index <= engine_index:
            del self._instances[instance]

    def candidates(self, now: float) -> list[InstanceView]:
        """Those that take requests, in order of id; the silent ones only if all are silent."""
        accepting = [v for v in self._instances.values() if v.report.accepting]
        fresh = [v for v in accepting if now - v.seen_s <= STALE_AFTER_S]
        return sorted(fresh or accepting, key=lambda v: v.report.instance)
