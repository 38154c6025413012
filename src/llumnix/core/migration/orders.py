"""Carries out the scheduler's orders to move load: picks the request, asks its frontend for it.

Rules
- The scheduler knows instances, this engine's llumlet its requests; the frontend alone grants the
  epoch under which a request may move. So an order becomes a wish (`MigrationWanted`), and the wish
  an order to migrate that one request.
- What was chosen is checked again when its migration starts: it must still be in the same phase,
  and small enough.
- Every order is answered by naming it in the next load report, whatever came of it.
- An order is carried out only if the scheduler knew of all that was carried out before: it names
  the load report that it was computed from, and that must have told of the last wish. Orders of one
  round, which are computed from the same report, know of each other. Of several that came during
  one step those of the newest report count.
- A wish that a frontend does not grant lapses after `WISH_LIFETIME_S`.
- A request whose move failed is left alone for a while (core/migration/setbacks.py): others get
  their turn.
- A user's order is not held to the limits of a wish.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llumnix.core.events import MoveLimit, MoveLoad
from llumnix.core.messages import Migrate, MigrationWanted, Out, ToFrontend
from llumnix.core.migration.destination import IncomingMigrations
from llumnix.core.migration.port import EnginePort, Phase, Refusal
from llumnix.core.migration.setbacks import Setbacks
from llumnix.core.migration.source import OutgoingMigrations
from llumnix.core.migration.victim import Candidate, choose_victim
from llumnix.core.priorities import Priorities
from llumnix.core.types import EngineIndex, OrderId, RequestId

WISH_LIFETIME_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A request that was chosen for a destination. `tokens_max`: as large as it may be by the time
    it starts."""

    destination: EngineIndex
    waiting: bool
    tokens: int
    tokens_max: int
    until_s: float


class Orders:
    """One engine's. `payback`: a request that came here stays for that many times what its move
    took."""

    def __init__(
        self,
        port: EnginePort,
        priorities: Priorities,
        payback: float,
        outgoing: OutgoingMigrations,
        incoming: IncomingMigrations,
        out: list[Out],
        setbacks: Setbacks,
    ) -> None:
        self._port = port
        self._priorities = priorities
        self._payback = payback
        self._outgoing = outgoing
        self._incoming = incoming
        self._out = out
        self._wishes: dict[RequestId, Wish] = {}
        self._setbacks = setbacks
        self._answered: list[OrderId] = []
        # Of the last order that was carried out: the report that it was computed from, and the one
        # that told of it, None before that.
        self._carried_from = -1
        self._told_in: int | None = 0

    def take(self, orders: Sequence[MoveLoad], now: float) -> None:
        """For each order picks a request within its limits and asks for it; nothing if there is
        none, or the order is not fresh."""
        self._answered += [order.order for order in orders]
        newest = max(order.source_sequence for order in orders)
        for order in orders:
            if order.source_sequence == newest and self._is_fresh(order):
                self._carry_out(order, now)

    def reported(self, sequence: int) -> None:
        """A load report of that number has told of all that was carried out."""
        if self._told_in is None:
            self._told_in = sequence

    def _is_fresh(self, order: MoveLoad) -> bool:
        if order.source_sequence == self._carried_from:
            return True
        return self._told_in is not None and order.source_sequence >= self._told_in

    def _carry_out(self, order: MoveLoad, now: float) -> None:
        if self._setbacks.pauses(None, order.destination_engine, now):
            return
        victim = choose_victim(self._candidates(order.destination_engine, now), order.limits)
        if victim is None:
            return
        self._carried_from, self._told_in = order.source_sequence, None
        limit = next(li for li in order.limits if li.rank == victim.rank)
        self._wishes[victim.request] = Wish(
            destination=order.destination_engine,
            waiting=victim.waiting,
            tokens=victim.tokens,
            tokens_max=_largest(limit, waiting=victim.waiting),
            until_s=now + WISH_LIFETIME_S,
        )
        wanted = MigrationWanted(
            request=victim.request, destination=order.destination_engine, why=order.why
        )
        self._out.append(ToFrontend(message=wanted))

    def start(self, order: Migrate) -> Refusal | None:
        """A request is about to be moved: if it was chosen here, is it still as it was chosen?"""
        wish = self._wishes.pop(order.request, None)
        if wish is None or not order.wanted:
            return None
        progress = self._port.progress(order.request)
        if (progress.phase is Phase.WAITING) != wish.waiting:
            return Refusal(why=f"it is {progress.phase.value} by now")
        if progress.tokens > wish.tokens_max:
            return Refusal(why=f"it has grown to {progress.tokens} tokens by now")
        return None

    def moving(self, now: float) -> tuple[int, int, int]:
        """How many requests are on their way out, wishes included; how many of them wait and hold
        no KV; the KV tokens that the others hold."""
        if not self._wishes and not len(self._outgoing):
            return 0, 0, 0  # Asked at every step, and nearly always so.
        self._wishes = {r: w for r, w in self._wishes.items() if w.until_s > now}
        tokens = sum(w.tokens for w in self._wishes.values() if not w.waiting)
        waiting = sum(w.waiting for w in self._wishes.values())
        for request in self._outgoing.requests():
            progress = self._port.progress(request)
            # No more than is computed: in the middle of its prompt it holds little of it.
            tokens += progress.settled
            waiting += progress.phase is not Phase.RUNNING and not progress.settled
        return len(self._wishes) + len(self._outgoing), waiting, tokens

    def take_answered(self) -> tuple[OrderId, ...]:
        """The orders to name in the next report."""
        answered = tuple(self._answered)
        self._answered.clear()
        return answered

    def _candidates(self, destination: EngineIndex, now: float) -> list[Candidate]:
        came = self._incoming.came
        paid = [r for r, c in came.items() if now - c.at_s >= self._payback * c.took_s]
        for request in paid:
            del came[request]
        going = self._outgoing.requests()
        return [
            Candidate(
                request=m.request,
                rank=self._priorities.rank(m.priority),
                tokens=m.tokens,
                waiting=m.waiting,
                resting=m.busy
                or m.request in came
                or m.request in going
                or m.request in self._wishes
                or self._setbacks.pauses(m.request, destination, now),
            )
            for m in self._port.movable()
        ]


def _largest(limit: MoveLimit, *, waiting: bool) -> int:
    return limit.waiting_max if waiting else limit.tokens_max
