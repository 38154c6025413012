"""Carries out the scheduler's orders to move load: picks the request, asks its frontend for it.

Rules
- The scheduler knows instances, and this engine's llumlet knows its requests. Only the frontend
  grants the epoch under which a request may move. So a `MoveOrder` becomes a pending move of one
  request, for which the llumlet asks (`MigrationRequested`), and the frontend answers with a grant
  (`Migrate`).
- The choice is checked again when the grant comes: the request must still be in the same phase and
  small enough. A grant that a user asked for is not held to those limits.
- Every order is named in the next load report, whether it was carried out or not.
- An order is carried out only if the scheduler knew of all earlier orders that were carried out. It
  names the load report that it was computed from, and that report must have told of the last
  pending move. Orders of one round are computed from the same report and know of each other. If
  several rounds arrive during one step, only the orders of the newest report count.
- A pending move lapses if no grant comes within `PENDING_MOVE_LIFETIME_S`.
- A request whose move failed is left alone for a while (core/migration/setbacks.py), so that others
  get their turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llumnix.core.events import MoveLimit, MoveOrder
from llumnix.core.messages import Migrate, MigrationRequested, Out, ToFrontend
from llumnix.core.migration.destination import IncomingMigrations
from llumnix.core.migration.port import EnginePort, Phase, Refusal
from llumnix.core.migration.setbacks import Setbacks
from llumnix.core.migration.source import OutgoingMigrations
from llumnix.core.migration.victim import Candidate, choose_victim
from llumnix.core.priorities import Priorities
from llumnix.core.types import EngineIndex, OrderId, RequestId

PENDING_MOVE_LIFETIME_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingMove:
    """A request that was chosen for a destination, and whose grant has not come."""

    destination: EngineIndex
    waiting: bool
    tokens: int
    tokens_max: int  # it may grow to this until the grant comes
    until_s: float  # then it lapses


class Orders:
    """The orders to one engine. `min_stay`: a request that came here stays for that many times what
    its move took."""

    def __init__(
        self,
        port: EnginePort,
        priorities: Priorities,
        min_stay: float,
        outgoing: OutgoingMigrations,
        incoming: IncomingMigrations,
        out: list[Out],
        setbacks: Setbacks,
    ) -> None:
        self._port = port
        self._priorities = priorities
        self._min_stay = min_stay
        self._outgoing = outgoing
        self._incoming = incoming
        self._out = out
        self._pending_moves: dict[RequestId, PendingMove] = {}
        self._setbacks = setbacks
        self._answered: list[OrderId] = []
        self.void = 0  # orders so far for which there was nothing to move
        # Numbers of two load reports: the one from which the last order that was carried out was
        # computed, and the first that told of that order, None until it goes out.
        self._carried_from = -1
        self._told_in: int | None = 0

    def take(self, orders: Sequence[MoveOrder], now: float) -> None:
        """For each order picks a request within its limits and asks for its move. Does nothing if
        there is no such request, or the order is not fresh."""
        self._answered += [order.order for order in orders]
        newest = max(order.source_sequence for order in orders)
        for order in orders:
            if order.source_sequence == newest and self._is_fresh(order):
                self._carry_out(order, now)

    def reported(self, sequence: int) -> None:
        """The load report of that number has told of all that was carried out."""
        if self._told_in is None:
            self._told_in = sequence

    def _is_fresh(self, order: MoveOrder) -> bool:
        if order.source_sequence == self._carried_from:
            return True
        return self._told_in is not None and order.source_sequence >= self._told_in

    def _carry_out(self, order: MoveOrder, now: float) -> None:
        victim = None
        if not self._setbacks.pauses(None, order.destination_engine, now):
            victim = choose_victim(self._candidates(order.destination_engine, now), order.limits)
        if victim is None:
            self.void += 1
            return
        self._carried_from, self._told_in = order.source_sequence, None
        limit = next(li for li in order.limits if li.rank == victim.rank)
        self._pending_moves[victim.request] = PendingMove(
            destination=order.destination_engine,
            waiting=victim.waiting,
            tokens=victim.tokens,
            tokens_max=_largest(limit, waiting=victim.waiting),
            until_s=now + PENDING_MOVE_LIFETIME_S,
        )
        wanted = MigrationRequested(
            request=victim.request,
            destination=order.destination_engine,
            why=order.why,
            code=order.code,
        )
        client = self._port.client(victim.request)
        self._out.append(ToFrontend(client=client, message=wanted))

    def start(self, order: Migrate) -> Refusal | None:
        """A grant has come. Refuses it if the request was chosen here and has changed too much
        since."""
        pending = self._pending_moves.pop(order.request, None)
        if pending is None or not order.wanted:
            return None
        progress = self._port.progress(order.request)
        if (progress.phase is Phase.WAITING) != pending.waiting:
            return Refusal(why=f"it is {progress.phase.value} by now")
        if progress.tokens > pending.tokens_max:
            return Refusal(why=f"it has grown to {progress.tokens} tokens by now")
        return None

    def moving(self, now: float) -> tuple[int, int, int]:
        """Counts of requests on their way out, pending moves included: all of them, those that wait
        and hold no KV, and the KV tokens that the others hold."""
        if not self._pending_moves and not len(self._outgoing):
            return 0, 0, 0  # Nearly always, and asked at every step.
        self._pending_moves = {r: w for r, w in self._pending_moves.items() if w.until_s > now}
        tokens = sum(w.tokens for w in self._pending_moves.values() if not w.waiting)
        waiting = sum(w.waiting for w in self._pending_moves.values())
        for request in self._outgoing.requests():
            progress = self._port.progress(request)
            # What is computed, not all its tokens: in the middle of its prompt it holds little KV.
            tokens += progress.settled
            waiting += progress.phase is not Phase.RUNNING and not progress.settled
        return len(self._pending_moves) + len(self._outgoing), waiting, tokens

    def take_answered(self) -> tuple[OrderId, ...]:
        """The orders to name in the next report."""
        answered = tuple(self._answered)
        self._answered.clear()
        return answered

    def _candidates(self, destination: EngineIndex, now: float) -> list[Candidate]:
        came = self._incoming.recent_arrivals
        paid = [r for r, c in came.items() if now - c.at_s >= self._min_stay * c.took_s]
        for request in paid:
            del came[request]
        outgoing = self._outgoing.requests()
        return [
            Candidate(
                request=m.request,
                rank=self._priorities.rank(m.priority),
                tokens=m.tokens,
                waiting=m.waiting,
                resting=m.busy
                or m.request in came
                or m.request in outgoing
                or m.request in self._pending_moves
                or self._setbacks.pauses(m.request, destination, now),
            )
            for m in self._port.movable()
        ]


def _largest(limit: MoveLimit, *, waiting: bool) -> int:
    return limit.waiting_max if waiting else limit.tokens_max
