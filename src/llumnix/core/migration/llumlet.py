"""The llumlet: migrations from and to one engine, and the scheduler's orders to move load.

It is hosted on the engine's own thread: messages and facts go in between steps, `poll` is called
after every step, and what comes out is to be sent. It does no I/O and reads no clock.
"""

from collections.abc import Sequence

from llumnix.core.events import MoveLoad
from llumnix.core.limits import MigrationLimits
from llumnix.core.messages import (
    CallOff,
    Handover,
    Migrate,
    Out,
    PeerMessage,
    Reserve,
    Reserved,
    Stage,
    Staged,
    StageProgress,
    Stopping,
    Verdict,
)
from llumnix.core.migration.destination import IncomingMigrations
from llumnix.core.migration.orders import Orders
from llumnix.core.migration.port import EnginePort
from llumnix.core.migration.setbacks import Setbacks
from llumnix.core.migration.source import OutgoingMigrations
from llumnix.core.migration.tables import OnStep
from llumnix.core.priorities import Priorities
from llumnix.core.reports import MoveCounts
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import EngineIndex, MigrationId, OrderId


class Llumlet:
    """One engine's. `address`: where other llumlets send to it. `on_step` is told of every
    transition of every machine. `settings`: the deployment's."""

    def __init__(
        self,
        engine: EngineIndex,
        address: str,
        port: EnginePort,
        limits: MigrationLimits | None = None,
        on_step: OnStep = lambda *_: None,
        settings: SchedulerSettings | None = None,
    ) -> None:
        limits = limits or MigrationLimits()
        self._out: list[Out] = []
        setbacks = Setbacks()
        self._outgoing = OutgoingMigrations(
            engine, address, port, limits, self._out, on_step, setbacks
        )
        self._incoming = IncomingMigrations(port, limits, self._out, on_step)
        settings = settings or SchedulerSettings()
        self._orders = Orders(
            port,
            Priorities(settings.priorities),
            settings.migration.min_stay,
            self._outgoing,
            self._incoming,
            self._out,
            setbacks,
        )

    @property
    def busy(self) -> bool:
        """Whether a migration is under way, or a pull whose end is still to come."""
        return bool(len(self._outgoing) or len(self._incoming))

    def still(self, *, leaving: bool) -> bool:
        """Whether nothing is on its way here, and, if `leaving`, nothing on its way from here."""
        return not len(self._incoming) and not (leaving and len(self._outgoing))

    def call_off(self, why: str, now: float, *, leaving: bool) -> list[Out]:
        """Declines all requests that are on their way here, and takes none until `welcome`. If
        `leaving`, lets all that are on their way from here go on here, but for those that were
        handed over."""
        self._incoming.closed = why
        self._incoming.call_off(why)
        if leaving:
            self._outgoing.closed = why
            self._outgoing.call_off(why, now)
        return self._take_out()

    def may_leave(self) -> None:
        """Requests may be moved away again."""
        self._outgoing.closed = None

    def welcome(self) -> None:
        """Requests may come again."""
        self._incoming.closed = None

    def deadline_s(self) -> float | None:
        """When `poll` must be called at the latest, even if the engine stands still."""
        return min(self._outgoing.deadlines() + self._incoming.deadlines(), default=None)

    def moving(self, now: float) -> MoveCounts:
        """What the next load report says of moves."""
        out, waiting, tokens = self._orders.moving(now)
        return MoveCounts(
            out=out,
            out_waiting=waiting,
            out_tokens=tokens,
            incoming=len(self._incoming),
            moved_bytes=self._outgoing.moved_bytes,
            moved_s=self._outgoing.moved_s,
        )

    def answered(self) -> tuple[OrderId, ...]:
        """The scheduler's orders that the next load report names."""
        return self._orders.take_answered()

    def reported(self, sequence: int) -> None:
        """A load report of that number has said all that `moving` and `answered` told last."""
        self._orders.reported(sequence)

    def order(self, order: MoveLoad, now: float) -> list[Out]:
        """The scheduler wants load moved away from here."""
        return self.orders([order], now)

    def orders(self, orders: Sequence[MoveLoad], now: float) -> list[Out]:
        """The same, of all orders that have come since the last look: an engine may have been in
        one step all the while. Older ones among them are not carried out."""
        self._orders.take(orders, now)
        return self._take_out()

    def migrate(self, order: Migrate, now: float) -> list[Out]:
        """Begins to move a request away; `MigrationEnded` tells the end, whatever it is."""
        refusal = self._orders.start(order)
        if refusal is None:
            self._outgoing.begin(order, now)
        else:
            self._outgoing.refuse(order, refusal)
        return self._take_out()

    def receive(self, message: PeerMessage, now: float, heard_s: float | None = None) -> list[Out]:
        """Takes in what another llumlet sent. `heard_s`: when it arrived, if that was earlier."""
        match message:
            case Reserve():
                self._incoming.reserve(message, now)
            case Stage() | Stopping() | Handover() | CallOff():
                self._incoming.receive(message, now, now if heard_s is None else heard_s)
            case Reserved() | Staged() | StageProgress() | Verdict():
                self._outgoing.receive(message, now)
        return self._take_out()

    def quiet(self, now: float) -> bool:
        """Whether the engine's next step should compute no prompts: a handover is near, or has just
        been."""
        return self._outgoing.quiet() or self._incoming.quiet(now)

    def hold_s(self, free_s: float, now: float) -> float:
        """How long the engine, whose steps in flight end at `free_s`, should begin none: a request
        is about to come that would have to wait for it. 0: not at all."""
        return self._incoming.hold_s(free_s, now)

    def pulled(
        self, ticket: int, error: str | None, size: int, seconds: float, now: float
    ) -> list[Out]:
        """A pull that the port began is over (`error` None: all is here). `size` in bytes."""
        self._incoming.pulled(ticket, error, size, seconds, now)
        return self._take_out()

    def client_gone(self, requests: list[str]) -> list[Out]:
        """The frontend aborted these requests here."""
        self._incoming.client_gone(requests)
        return self._take_out()

    def engine_lost(self, engine: EngineIndex, granted: set[MigrationId], now: float) -> list[Out]:
        """Another engine died. `granted`: the migrations to it that never took over, for which the
        frontend gave this engine a fresh epoch."""
        self._outgoing.engine_lost(engine, granted, now)
        self._incoming.engine_lost(engine)
        return self._take_out()

    def fate(self, migration: MigrationId) -> str:
        """What this destination has decided: `taken`, `declined` or `undecided`. One that it never
        heard of is declined from now on."""
        return self._incoming.fate(migration)

    def poll(self, now: float) -> list[Out]:
        """Looks at requests and deadlines; called between any two steps."""
        self._outgoing.poll(now)
        self._incoming.poll(now)
        return self._take_out()

    def failed(self, why: str, now: float) -> list[Out]:
        """Any of the calls above ended with an exception, which `why` tells: ends the migration
        that was being dealt with as well as can be, and no other. What is to be sent, also of what
        came before the exception."""
        self._outgoing.failed(why, now)
        self._incoming.failed(why)
        return self._take_out()

    def _take_out(self) -> list[Out]:
        self._outgoing.settled()
        self._incoming.settled()
        out = self._out[:]
        self._out.clear()
        return out
