"""Migrations to one engine: walks the destination's machine of core/migration/tables.py.

Rules
- `incoming_max` of them for the engine; one request once.
- What was decided is remembered and never changed (core/migration/verdicts.py).
- Blocks that are being written are not given away: an aborted migration whose pull is under way has
  it cancelled, and keeps its room until that has ended.
- A pull may take as long as it takes. Meanwhile the source is told every `progress_every_s` that it
  goes on.
- An exception ends the migration that it came from, and no other: declined, unless it was decided.
- What a stage brought enters the prefix cache once the source has said another word: the source
  keeps all blocks that it named until the migration is over, so a word that came after the pull
  proves that nobody had overwritten them. What a handover brought enters with the request: these
  blocks the source keeps until the verdict.
- The engine's steps are timed for a handover that was announced; one that is overdue by `near_s` is
  not waited for any more. Once the first stage is here, and there is little left to come, steps
  should compute no prompts: one that did could be under way when the handover comes. Nor should the
  first step of the request here, whose end it waits for, nor one that is begun before that end:
  what comes of a step is looked at once the next is under way, and prompts take long to launch.
"""

from dataclasses import dataclass, field

from llumnix.core.limits import REMEMBERED_MAX, TAIL_MAX, MigrationLimits
from llumnix.core.messages import (
    CancelMigration,
    Handover,
    HandoverAnnounced,
    Out,
    PeerMessage,
    Reserve,
    Reserved,
    Stage,
    Staged,
    StageProgress,
    ToFrontend,
    TookOver,
    ToPeer,
    Verdict,
)
from llumnix.core.migration.port import EnginePort, Phase, Refusal
from llumnix.core.migration.tables import (
    DestinationAction,
    DestinationEvent,
    DestinationMachine,
    DestinationState,
    OnStep,
    destination_machine,
)
from llumnix.core.migration.timing import one_more_fits
from llumnix.core.migration.verdicts import Decided, Verdicts
from llumnix.core.types import EngineIndex, MigrationId, RequestId
from llumnix.errors import ProtocolError

DEFER_PREFILLS_MAX_S = 0.1
"""So long prompts wait for a source's next word, and for the first step of a request that came: the
one may hang, the other have to wait for a slot."""
_AWAITED = (DestinationState.READY, DestinationState.COMMITTING)


@dataclass(slots=True, kw_only=True)
class Incoming:
    """One migration to here. `ticket`: of the pull that is under way. `staged_s`: when the last
    stage was here. `due_s`: when the source said that its handover would be."""

    reservation: Reserve
    machine: DestinationMachine
    began_s: float
    deadline_s: float
    hit: int = 0
    stage: int = 0
    outputs: int = 0
    tail: list[int] = field(default_factory=list)
    ticket: int | None = None
    last: Stage | Handover | None = None
    staged_s: float | None = None
    due_s: float | None = None
    bytes: int = 0
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentArrival:
    """A request that was taken over: when, and how long its move took, in seconds."""

    at_s: float
    took_s: float


class IncomingMigrations:
    """All of one engine's."""

    def __init__(
        self, port: EnginePort, limits: MigrationLimits, out: list[Out], on_step: OnStep
    ) -> None:
        self._port = port
        self._limits = limits
        self._out = out
        self._on_step = on_step
        self._open: dict[MigrationId, Incoming] = {}
        self._verdicts = Verdicts(port, out)
        self._tickets: dict[int, MigrationId] = {}
        self._ticket = 0
        self._at: Incoming | None = None  # The migration that is being dealt with.
        self.closed: str | None = None  # why no request may come
        self.recent_arrivals: dict[RequestId, RecentArrival] = {}
        # Taken over with all of their KV, and no step is over: how much is settled, and since when.
        self._new: dict[RequestId, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def deadlines(self) -> list[float]:
        """When each of them wants to be looked at."""
        return [c.deadline_s for c in self._open.values() if not c.machine.over]

    def reserve(self, reservation: Reserve, now: float) -> None:
        """Has room for a request, or declines it."""
        if reservation.migration in self._open:
            return  # It came twice.
        if (verdict := self._verdicts.get(reservation.migration)) is not None:
            self._say(reservation.source, reservation.address, verdict)
            return
        incoming = Incoming(
            reservation=reservation,
            machine=destination_machine(reservation.migration),
            began_s=now,
            deadline_s=now + self._limits.silence_timeout_s,
            outputs=len(reservation.outputs),
            tail=reservation.outputs[-TAIL_MAX:],
        )
        hit = self._make_room(reservation)
        if isinstance(hit, Refusal):
            incoming.why = hit.why
            self._walk(incoming, DestinationEvent.FAILED)
            self._decide(incoming, taken=False)
            return
        incoming.hit = hit
        self._open[reservation.migration] = self._at = incoming
        self._advance(incoming, now)

    def defer_prefills(self, now: float) -> bool:
        """Whether the next step should compute no prompts: a request may come before its end, or
        has come and waits for its first token."""
        for request, (settled, since_s) in list(self._new.items()):
            progress = self._port.progress(request)
            ended = progress.settled != settled or progress.phase is Phase.GONE
            if ended or now > since_s + DEFER_PREFILLS_MAX_S:
                del self._new[request]
        return bool(self._new) or any(
            c.staged_s is not None and now <= c.staged_s + DEFER_PREFILLS_MAX_S
            for c in self._open.values()
            if not c.machine.over
        )

    def hold_s(self, free_s: float, now: float) -> float:
        """How long to begin no step for the sake of the next handover, which a step begun at
        `free_s` would keep waiting; 0 if none was announced, or one more step fits in."""
        due = [
            c.due_s
            for c in self._open.values()
            if c.due_s is not None
            and c.machine.state in _AWAITED
            and now < c.due_s + self._limits.near_s
        ]
        if not due or one_more_fits(free_s, self._port.step_s, min(due)):
            return 0.0
        return min(due) + self._limits.near_s - now

    def receive(
        self,
        message: Stage | HandoverAnnounced | Handover | CancelMigration,
        now: float,
        heard_s: float,
    ) -> None:
        """Takes in what a source said, which arrived at `heard_s`."""
        self._at = incoming = self._open.get(message.migration)
        if incoming is None or incoming.machine.over:
            self._verdicts.receive(message)
        elif isinstance(message, CancelMigration):
            self._may_end(incoming, DestinationEvent.CANCELLED, message.why)
        elif isinstance(message, HandoverAnnounced):
            if incoming.machine.state is DestinationState.READY:
                self._walk(incoming, DestinationEvent.ANNOUNCED)
                incoming.due_s = heard_s + message.in_s
                if incoming.last is not None:
                    # Now, while the request still runs there: of a long one it takes milliseconds.
                    self._port.cache(incoming.reservation.request, incoming.last.end)
        elif incoming.machine.state is DestinationState.COMMITTING:
            if isinstance(message, Handover):
                self._walk(incoming, DestinationEvent.HANDOVER)
        elif isinstance(message, Handover) or message.stage > incoming.stage:
            self._go_on(incoming, message, now)

    def pulled(self, ticket: int, error: str | None, size: int, seconds: float, now: float) -> None:
        """A pull that the port began is over. `size` in bytes."""
        incoming = self._open.get(self._tickets.pop(ticket, MigrationId("")))
        if incoming is None or incoming.ticket != ticket:
            raise ProtocolError(f"nobody waits for the end of pull {ticket}")
        self._at = incoming
        incoming.ticket, incoming.bytes, incoming.seconds = None, size, seconds
        if incoming.machine.over:
            self._free(incoming)
        elif error is not None:
            self._may_end(incoming, DestinationEvent.FAILED, error)
        else:
            self._have_it(incoming, now)

    def client_gone(self, requests: list[str]) -> None:
        """The frontend aborted these requests here."""
        for incoming in self._still_open():
            if incoming.reservation.request in requests:
                self._at = incoming
                self._may_end(incoming, DestinationEvent.CLIENT_GONE, "its client hung up")

    def engine_lost(self, engine: EngineIndex) -> None:
        """A source died."""
        for incoming in self._still_open():
            if incoming.reservation.source == engine:
                self._at = incoming
                self._may_end(incoming, DestinationEvent.SOURCE_LOST, "the source died")

    def fate(self, migration: MigrationId) -> str:
        """`taken`, `declined` or `undecided`. One never heard of is declined from now on."""
        incoming = self._open.get(migration)
        if incoming is not None and not incoming.machine.over:
            return "undecided"
        return self._verdicts.fate(migration)

    def poll(self, now: float) -> None:
        """Looks at every one of them."""
        for incoming in self._still_open():
            self._at = incoming
            self._advance(incoming, now)

    def cancel_all(self, why: str) -> None:
        """Declines all of them."""
        for incoming in self._still_open():
            self._at = incoming
            self._may_end(incoming, DestinationEvent.FAILED, f"the destination takes none: {why}")

    def settled(self) -> None:
        """What was dealt with came to an end without an exception."""
        self._at = None

    def failed(self, why: str) -> None:
        """An exception came out of what was being dealt with: ends that migration, if any."""
        incoming, self._at = self._at, None
        if incoming is not None and not incoming.machine.over:
            self._may_end(incoming, DestinationEvent.FAILED, f"an error at its destination: {why}")

    # -- one of them -------------------------------------------------------------------------------

    def _still_open(self) -> list[Incoming]:
        return [c for c in self._open.values() if not c.machine.over]

    def _make_room(self, reservation: Reserve) -> int | Refusal:
        if self.closed is not None:
            return Refusal(why=f"the destination takes none: {self.closed}")
        if len(self._open) >= self._limits.incoming_max:
            return Refusal(why=f"{len(self._open)} requests are on their way there already")
        if any(c.reservation.request == reservation.request for c in self._open.values()):
            return Refusal(why="it is on its way there already")
        return self._port.reserve(
            reservation.request,
            reservation.body,
            reservation.outputs,
            reservation.tokens,
            reservation.agents,
        )

    def _advance(self, incoming: Incoming, now: float) -> None:
        if incoming.machine.state is DestinationState.PREPARING:
            ready = self._port.ready(incoming.reservation.request)
            if isinstance(ready, Refusal):
                self._may_end(incoming, DestinationEvent.FAILED, ready.why)
                return
            if ready:
                self._walk(incoming, DestinationEvent.PREPARED)
                self._answer(
                    incoming, Reserved(migration=incoming.reservation.migration, hit=incoming.hit)
                )
                return
        if now >= incoming.deadline_s and incoming.ticket is not None:
            incoming.deadline_s = now + self._limits.progress_every_s
            if self._walk(incoming, DestinationEvent.TIMED_OUT) is DestinationAction.SAY_PROGRESS:
                self._answer(
                    incoming,
                    StageProgress(migration=incoming.reservation.migration, stage=incoming.stage),
                )
        elif now >= incoming.deadline_s:
            why = f"the source was silent while {incoming.machine.state.value}"
            self._may_end(incoming, DestinationEvent.TIMED_OUT, why)

    def _go_on(self, incoming: Incoming, message: Stage | Handover, now: float) -> None:
        new = message.outputs[max(0, incoming.outputs - message.first_output) :]
        incoming.outputs += len(new)
        incoming.tail = [*incoming.tail, *new][-TAIL_MAX:]
        incoming.last = message
        incoming.deadline_s = now + self._limits.silence_timeout_s
        if isinstance(message, Stage):
            incoming.stage = message.stage
            self._walk(incoming, DestinationEvent.STAGE)
            slots = message.tokens
        else:
            self._walk(incoming, DestinationEvent.HANDOVER)
            # And for the next steps: it holds blocks, so nobody could take any from it to go on.
            slots = self._computed(incoming) and self._computed(incoming) + self._port.block_tokens
        refusal = self._port.reach(incoming.reservation.request, slots, new)
        if refusal is not None:
            self._may_end(incoming, DestinationEvent.FAILED, refusal.why)
        elif message.end > message.start:
            incoming.deadline_s = now + self._limits.progress_every_s
            self._pull(incoming, message)
            if isinstance(message, Stage):
                self._port.cache(incoming.reservation.request, message.start)
        else:
            incoming.bytes, incoming.seconds = 0, 0.0
            self._have_it(incoming, now)

    def _pull(self, incoming: Incoming, message: Stage | Handover) -> None:
        reservation = incoming.reservation
        self._ticket += 1
        incoming.ticket = self._ticket
        self._tickets[self._ticket] = reservation.migration
        self._port.pull(
            reservation.request,
            self._ticket,
            reservation.source,
            reservation.agents,
            message.start,
            message.end,
            message.blocks,
        )

    def _have_it(self, incoming: Incoming, now: float) -> None:
        """What the source's last word named is here."""
        migration = incoming.reservation.migration
        incoming.deadline_s = now + self._limits.silence_timeout_s
        if self._walk(incoming, DestinationEvent.PULLED) is DestinationAction.INSTALL:
            self._install(incoming, now)
        else:
            incoming.staged_s = now
            self._answer(
                incoming,
                Staged(
                    migration=migration,
                    stage=incoming.stage,
                    bytes=incoming.bytes,
                    seconds=incoming.seconds,
                ),
            )

    def _install(self, incoming: Incoming, now: float) -> None:
        reservation, handover = incoming.reservation, incoming.last
        assert isinstance(handover, Handover)
        refusal = self._port.commit(reservation.request, self._computed(incoming), handover.state)
        if refusal is not None:
            self._may_end(incoming, DestinationEvent.FAILED, refusal.why)
            return
        self._walk(incoming, DestinationEvent.INSTALLED)
        del self._open[reservation.migration]
        self.recent_arrivals[reservation.request] = RecentArrival(
            at_s=now, took_s=now - incoming.began_s
        )
        if len(self.recent_arrivals) > REMEMBERED_MAX:
            del self.recent_arrivals[next(iter(self.recent_arrivals))]
        took = TookOver(
            migration=reservation.migration,
            request=reservation.request,
            epoch=reservation.epoch,
            outputs=incoming.outputs,
            tail=incoming.tail,
        )
        self._out.append(ToFrontend(message=took))
        self._decide(incoming, taken=True)
        progress = self._port.progress(reservation.request)
        if progress.settled and progress.settled + 1 >= progress.tokens:
            self._new[reservation.request] = progress.settled, now

    def _computed(self, incoming: Incoming) -> int:
        """The tokens whose KV is here after the handover: what the source had computed, or what was
        here before if that is more."""
        assert isinstance(incoming.last, Handover)
        return max(incoming.last.end, incoming.hit)

    def _may_end(self, incoming: Incoming, event: DestinationEvent, why: str) -> None:
        """Feeds an event that may end it; if it does, frees what it held and says so."""
        if self._walk(incoming, event) is not DestinationAction.DROP:
            return
        incoming.why = why
        self._decide(incoming, taken=False)
        if incoming.ticket is None:
            self._free(incoming)
        else:
            self._port.cancel(incoming.ticket)

    def _free(self, incoming: Incoming) -> None:
        self._port.drop(incoming.reservation.request)
        del self._open[incoming.reservation.migration]

    def _decide(self, incoming: Incoming, *, taken: bool) -> None:
        reservation = incoming.reservation
        verdict = Verdict(
            migration=reservation.migration,
            taken=taken,
            why=incoming.why,
            bytes=incoming.bytes,
            seconds=incoming.seconds,
        )
        self._verdicts.remember(
            Decided(
                verdict=verdict,
                machine=incoming.machine,
                source=reservation.source,
                address=reservation.address,
            )
        )
        self._answer(incoming, verdict)

    def _walk(self, incoming: Incoming, event: DestinationEvent) -> DestinationAction:
        action = incoming.machine.feed(event)
        state = incoming.machine.state.value
        name = incoming.reservation.migration
        self._on_step("destination", name, event.value, state, action.value)
        return action

    def _answer(self, incoming: Incoming, message: PeerMessage) -> None:
        self._say(incoming.reservation.source, incoming.reservation.address, message)

    def _say(self, engine: EngineIndex, address: str, message: PeerMessage) -> None:
        self._out.append(ToPeer(engine=engine, address=address, message=message))
