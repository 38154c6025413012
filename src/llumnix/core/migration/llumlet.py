"""The llumlet of one engine: migrations from and to it, requests of dead engines that it goes on
with, and the scheduler's orders to move load.

It lives on the engine's own thread. Messages and facts go in between steps, `poll` is called after
every step, and what comes out is to be sent. It does no I/O and reads no clock.
"""

from collections.abc import Sequence

from llumnix.core.events import MoveOrder
from llumnix.core.limits import MigrationLimits
from llumnix.core.messages import (
    CancelMigration,
    Handover,
    HandoverAnnounced,
    Migrate,
    Out,
    PeerMessage,
    Reserve,
    Reserved,
    Revive,
    Stage,
    Staged,
    StageProgress,
    ToPeer,
    Verdict,
)
from llumnix.core.migration.destination import IncomingMigrations
from llumnix.core.migration.orders import Orders
from llumnix.core.migration.port import EnginePort
from llumnix.core.migration.revivals import Revivals
from llumnix.core.migration.setbacks import FRONTEND_DIED, Losses, Setbacks
from llumnix.core.migration.source import OutgoingMigrations
from llumnix.core.migration.tables import OnStep
from llumnix.core.priorities import Priorities
from llumnix.core.reports import MoveCounts
from llumnix.core.settings import MigrationSettings, PrioritySettings
from llumnix.core.types import EngineIndex, MigrationId, OrderId


class Llumlet:
    """The llumlet of one engine. `address`: where other llumlets send to it. `on_step` is told of
    every transition of every machine. `min_stay`: a request that came here stays for that many
    times what its move took."""

    def __init__(
        self,
        engine: EngineIndex,
        address: str,
        port: EnginePort,
        limits: MigrationLimits | None = None,
        on_step: OnStep = lambda *_: None,
        *,
        priorities: Priorities | None = None,
        min_stay: float = MigrationSettings().min_stay,
    ) -> None:
        limits = limits or MigrationLimits()
        self._out: list[Out] = []
        setbacks, self._losses = Setbacks(), Losses()
        self._outgoing = OutgoingMigrations(
            engine, address, port, limits, self._out, on_step, setbacks, self._losses
        )
        self._incoming = IncomingMigrations(port, limits, self._out, on_step, self._losses)
        self._revivals = Revivals(port, self._out)
        self._orders = Orders(
            port,
            priorities or Priorities(PrioritySettings()),
            min_stay,
            self._outgoing,
            self._incoming,
            self._out,
            setbacks,
        )

    @property
    def busy(self) -> bool:
        """Whether a migration, a pull or a revival is under way."""
        return bool(len(self._outgoing) or len(self._incoming) or len(self._revivals))

    def still(self, *, leaving: bool) -> bool:
        """Whether no request is on its way here and, if `leaving`, none on its way from here."""
        coming = len(self._incoming) or len(self._revivals)
        return not coming and not (leaving and len(self._outgoing))

    def cancel_all(self, why: str, now: float, *, leaving: bool) -> list[Out]:
        """Declines all requests that are on their way here, and takes none until `welcome`. If
        `leaving`, requests on their way from here go on here, but for those that were handed over.
        """
        self._incoming.closed = self._revivals.closed = why
        self._incoming.cancel_all(why)
        self._revivals.cancel_all(why)
        if leaving:
            self._outgoing.closed = why
            self._outgoing.cancel_all(why, now)
        return self._take_out()

    def may_leave(self) -> None:
        """Requests may be moved away again."""
        self._outgoing.closed = None

    def welcome(self) -> None:
        """Requests may come again."""
        self._incoming.closed = self._revivals.closed = None

    def deadline_s(self) -> float | None:
        """When `poll` must be called at the latest, even if the engine stands still."""
        all_deadlines = (
            *self._outgoing.deadlines(),
            *self._incoming.deadlines(),
            *self._revivals.deadlines(),
        )
        return min(all_deadlines, default=None)

    def moving(self, now: float) -> MoveCounts:
        """What the next load report says of moves."""
        out, waiting, tokens = self._orders.moving(now)
        return MoveCounts(
            out=out,
            out_waiting=waiting,
            out_tokens=tokens,
            incoming=len(self._incoming),
            void_orders=self._orders.void,
            moved_bytes=self._outgoing.moved_bytes,
            moved_s=self._outgoing.moved_s,
        )

    def answered(self) -> tuple[OrderId, ...]:
        """The orders that the next load report names."""
        return self._orders.take_answered()

    def reported(self, sequence: int) -> None:
        """The load report of that number has told what `moving` and `answered` returned last."""
        self._orders.reported(sequence)

    def order(self, order: MoveOrder, now: float) -> list[Out]:
        """The scheduler wants load moved away from here."""
        return self.orders([order], now)

    def orders(self, orders: Sequence[MoveOrder], now: float) -> list[Out]:
        """The same for all orders that have come since the last call, perhaps during one long step.
        Only those of the newest round are carried out."""
        self._orders.take(orders, now)
        return self._take_out()

    def migrate(self, order: Migrate, now: float) -> list[Out]:
        """Begins to move a request away. `MigrationEnded` tells how it ended, in any case."""
        refusal = self._orders.start(order)
        if refusal is None:
            self._outgoing.begin(order, now)
        else:
            self._outgoing.refuse(order, refusal)
        return self._take_out()

    def revive(self, order: Revive, made: object, now: float) -> list[Out]:
        """Goes on with a request whose engine died. `TookOver` or `MigrationEnded` answers. `made`:
        see `EnginePort.admit`."""
        self._revivals.begin(order, made, now)
        return self._take_out()

    def receive(self, message: PeerMessage, now: float, heard_s: float | None = None) -> list[Out]:
        """Takes in another llumlet's message. `heard_s`: when it arrived, if that was earlier."""
        match message:
            case Reserve():
                self._incoming.reserve(message, now)
            case Stage() | HandoverAnnounced() | Handover() | CancelMigration():
                self._incoming.receive(message, now, now if heard_s is None else heard_s)
            case Reserved() | Staged() | StageProgress() | Verdict():
                self._outgoing.receive(message, now)
        return self._take_out()

    def defer_prefills(self, now: float) -> bool:
        """Whether the engine's next step should compute no prompts, since a handover is near or has
        just been."""
        return self._outgoing.defer_prefills() or self._incoming.defer_prefills(now)

    def hold_s(self, free_s: float, now: float) -> float:
        """How long the engine, whose steps in flight end at `free_s`, should begin none, since a
        request that is about to come would have to wait for it. 0 if it may begin one."""
        return self._incoming.hold_s(free_s, now)

    def pulled(
        self, ticket: int, error: str | None, size: int, seconds: float, now: float
    ) -> list[Out]:
        """A pull that the port began is over. Without an `error` all blocks are here. `size` in
        bytes."""
        self._incoming.pulled(ticket, error, size, seconds, now)
        return self._take_out()

    def client_gone(self, requests: list[str]) -> list[Out]:
        """The frontend aborted these requests here."""

        def gone(order: Reserve | Revive) -> bool:
            return order.request in requests

        self._incoming.client_gone(gone, "its client hung up")
        self._revivals.client_gone(gone)
        return self._take_out()

    def client_lost(self, client: int) -> list[Out]:
        """A frontend died. None of its requests comes here any more, and it is told nothing. The
        host aborts those that are here, at which their moves away from here end (`poll`)."""
        self._losses.clients.add(client)

        def gone(order: Reserve | Revive) -> bool:
            return order.client == client

        self._incoming.client_gone(gone, FRONTEND_DIED.why)
        self._revivals.client_gone(gone)
        return self._take_out()

    def has_lost(self, client: int) -> bool:
        """Whether the frontend with this index died, so that what it sent does not count."""
        return client in self._losses.clients

    def engine_lost(
        self, engine: EngineIndex, granted: set[MigrationId], now: float, client: int
    ) -> list[Out]:
        """Another engine died, as the frontend with the index `client` says. `granted`: migrations
        of that frontend which never took over there, and for which it gave this engine a fresh
        epoch."""
        self._outgoing.engine_lost(engine, granted, now, client)
        self._incoming.engine_lost(engine)
        return self._take_out()

    def fate(self, migration: MigrationId) -> str:
        """What this destination has decided: `taken`, `declined` or `undecided`. A migration that
        it never heard of is declined from now on."""
        return self._incoming.fate(migration)

    def poll(self, now: float) -> list[Out]:
        """Looks at requests and deadlines. Called between any two steps."""
        self._outgoing.poll(now)
        self._incoming.poll(now)
        self._revivals.poll(now)
        return self._take_out()

    def failed(self, why: str, now: float) -> list[Out]:
        """One of the calls above ended with an exception, which `why` tells. Ends the migration
        that was being dealt with, and no other. Returns what is to be sent, that from before the
        exception included."""
        self._outgoing.failed(why, now)
        self._incoming.failed(why)
        self._revivals.failed(why)
        return self._take_out()

    def _take_out(self) -> list[Out]:
        self._outgoing.settled()
        self._incoming.settled()
        self._revivals.settled()
        lost = self._losses.clients
        out = [o for o in self._out if isinstance(o, ToPeer) or o.client not in lost]
        self._out.clear()
        return out
