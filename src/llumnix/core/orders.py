"""Carries out the scheduler's orders to move load: picks the request, asks its frontend for it.

Rules
- The scheduler knows instances, this engine's llumlet its requests; the frontend alone grants the
  epoch under which a request may move. So an order becomes a wish (`MigrationWanted`), and the wish
  an order to migrate that one request.
- What was chosen is checked again when its migration starts: it must still be in the same phase,
  and small enough.
- Every order is answered by naming it in the next load report, whatever came of it.
- A wish that a frontend does not grant lapses after `WISH_LIFETIME_S`.
"""

from dataclasses import dataclass

from llumnix.core.events import MoveLimit, MoveLoad
from llumnix.core.incoming import IncomingMigrations
from llumnix.core.messages import Migrate, MigrationWanted, Out, ToFrontend
from llumnix.core.outgoing import OutgoingMigrations
from llumnix.core.policies.victim import Candidate, choose_victim
from llumnix.core.port import EnginePort, Phase, Refusal
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
    ) -> None:
        self._port = port
        self._priorities = priorities
        self._payback = payback
        self._outgoing = outgoing
        self._incoming = incoming
        self._out = out
        self._wishes: dict[RequestId, Wish] = {}
        self._answered: list[OrderId] = []

    def take(self, order: MoveLoad, now: float) -> None:
        """Picks a request within the order's limits and asks for it; nothing if there is none."""
        self._answered.append(order.order)
        victim = choose_victim(self._candidates(now), order.limits)
        if victim is None:
            return
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
        if wish is None:
            return None
        progress = self._port.progress(order.request)
        if (progress.phase is Phase.WAITING) != wish.waiting:
            return Refusal(why=f"it is {progress.phase.value} by now")
        if progress.tokens > wish.tokens_max:
            return Refusal(why=f"it has grown to {progress.tokens} tokens by now")
        return None

    def moving(self, now: float) -> tuple[int, int]:
        """How many requests are on their way out, wishes included, and the KV tokens they hold."""
        if not self._wishes and not len(self._outgoing):
            return 0, 0  # Asked at every step, and nearly always so.
        self._wishes = {r: w for r, w in self._wishes.items() if w.until_s > now}
        tokens = sum(w.tokens for w in self._wishes.values() if not w.waiting)
        for request in self._outgoing.requests():
            progress = self._port.progress(request)
            if progress.phase is not Phase.WAITING:
                tokens += progress.tokens
        return len(self._wishes) + len(self._outgoing), tokens

    def take_answered(self) -> tuple[OrderId, ...]:
        """The orders to name in the next report."""
        answered = tuple(self._answered)
        self._answered.clear()
        return answered

    def _candidates(self, now: float) -> list[Candidate]:
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
                or m.request in self._wishes,
            )
            for m in self._port.movable()
        ]


def _largest(limit: MoveLimit, *, waiting: bool) -> int:
    return limit.waiting_max if waiting else limit.tokens_max
