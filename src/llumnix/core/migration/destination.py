"""Migrations to one engine: walks the destination's machine of core/migration/tables.py.

Rules
- At most `incoming_max` migrations for the engine, and one for each request.
- A verdict is remembered and never changed (core/migration/verdicts.py).
- Blocks that are being written are not given away. A migration that is aborted during a pull has
  the pull cancelled, and keeps its room until the pull has ended.
- A pull may take as long as it takes. Meanwhile the source is told every `progress_every_s` that it
  goes on.
- An exception ends the migration that it came from, and no other. The migration is declined, unless
  it was decided already.
- What a stage brought enters the prefix cache when the source is heard again. The source keeps all
  blocks that it named until the migration is over, so a later message proves that nobody had
  overwritten them while they were read. What a handover brought enters with the request, since the
  source keeps those blocks until the verdict.
"""

from collections.abc import Callable

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
from llumnix.core.migration.arrivals import (
    FirstSteps,
    Incoming,
    RecentArrival,
    error_here,
    hold_s,
    message_awaited,
    source_silent,
    takes_none,
)
from llumnix.core.migration.port import EnginePort, Refusal, busy
from llumnix.core.migration.setbacks import FRONTEND_DIED, SOURCE_DIED, Losses
from llumnix.core.migration.tables import (
    DestinationAction,
    DestinationEvent,
    DestinationState,
    OnStep,
    destination_machine,
)
from llumnix.core.migration.verdicts import Decided, Verdicts
from llumnix.core.types import EngineIndex, MigrationId, RequestId
from llumnix.errors import ProtocolError


class IncomingMigrations:
    """All migrations to one engine."""

    def __init__(
        self,
        port: EnginePort,
        limits: MigrationLimits,
        out: list[Out],
        on_step: OnStep,
        losses: Losses,
    ) -> None:
        self._port, self._losses = port, losses
        self._limits = limits
        self._out = out
        self._on_step = on_step
        self._open: dict[MigrationId, Incoming] = {}
        self._verdicts = Verdicts(port, out)
        self._tickets: dict[int, MigrationId] = {}
        self._ticket = 0
        self._at: Incoming | None = None  # the migration that is being dealt with
        self.closed: str | None = None  # why no request may come
        self.recent_arrivals: dict[RequestId, RecentArrival] = {}
        self._first_steps = FirstSteps(port)

    def __len__(self) -> int:
        return len(self._open)

    def deadlines(self) -> list[float]:
        """When each of them wants to be looked at."""
        return [incoming.deadline_s for incoming in self._still_open()]

    def reserve(self, reservation: Reserve, now: float) -> None:
        """Makes room for a request, or declines it."""
        if reservation.migration in self._open:
            return  # The message came twice.
        if (verdict := self._verdicts.get(reservation.migration)) is not None:
            self._answer(reservation, verdict)
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
            incoming.why, incoming.code = hit.why, hit.code
            self._walk(incoming, DestinationEvent.FAILED)
            self._decide(incoming, taken=False)
            return
        incoming.hit = hit
        self._open[reservation.migration] = self._at = incoming
        self._advance(incoming, now)

    def defer_prefills(self, now: float) -> bool:
        """Whether the next step should compute no prompts: a request may come before its end, or
        has come and waits for its first token."""
        awaited = any(message_awaited(incoming, now) for incoming in self._still_open())
        return self._first_steps.awaited(now) or awaited

    def hold_s(self, free_s: float, now: float) -> float:
        """How long to begin no step, since one begun at `free_s` would keep the next handover
        waiting."""
        return hold_s(self._open.values(), free_s, self._port.step_s, self._limits, now)

    def receive(
        self,
        message: Stage | HandoverAnnounced | Handover | CancelMigration,
        now: float,
        heard_s: float,
    ) -> None:
        """Takes in a source's message, which arrived at `heard_s`."""
        self._at = incoming = self._open.get(message.migration)
        if incoming is None or incoming.machine.over:
            self._verdicts.receive(message)
        elif isinstance(message, CancelMigration):
            self._may_end(incoming, DestinationEvent.CANCELLED, Refusal(why=message.why))
        elif isinstance(message, HandoverAnnounced):
            if incoming.machine.state is DestinationState.READY:
                self._walk(incoming, DestinationEvent.ANNOUNCED)
                incoming.due_s = heard_s + message.in_s
                if incoming.last is not None:
                    # While the request still runs there: for a long one it takes milliseconds.
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
            self._may_end(incoming, DestinationEvent.FAILED, Refusal(why=error))
        else:
            self._have_it(incoming, now)

    def client_gone(self, gone: Callable[[Reserve], bool], why: str) -> None:
        """The frontend aborted the requests of these reservations here, or died."""
        for incoming in self._still_open():
            if gone(incoming.reservation):
                self._at = incoming
                self._may_end(incoming, DestinationEvent.CLIENT_GONE, Refusal(why=why))
        self.settled()

    def engine_lost(self, engine: EngineIndex) -> None:
        """A source died."""
        for incoming in self._still_open():
            if incoming.reservation.source == engine:
                self._at = incoming
                self._may_end(incoming, DestinationEvent.SOURCE_LOST, SOURCE_DIED)

    def fate(self, migration: MigrationId) -> str:
        """`taken`, `declined` or `undecided`, of a migration whose source died. One that was never
        heard of is declined from now on."""
        incoming = self._open.get(migration)
        if incoming is not None:  # It may have come after the news of the death.
            self._may_end(incoming, DestinationEvent.SOURCE_LOST, SOURCE_DIED)
            if not incoming.machine.over:
                return "undecided"
        return self._verdicts.fate(migration)

    def poll(self, now: float) -> None:
        """Looks at every migration."""
        for incoming in self._still_open():
            self._at = incoming
            self._advance(incoming, now)
        self.settled()

    def cancel_all(self, why: str) -> None:
        """Declines all that are not decided."""
        for incoming in self._still_open():
            self._at = incoming
            self._may_end(incoming, DestinationEvent.FAILED, takes_none(why))
        self.settled()

    def settled(self) -> None:
        """What was being dealt with is done, without an exception."""
        self._at = None

    def failed(self, why: str) -> None:
        """An exception came out of what was being dealt with. Ends that migration, if any."""
        incoming, self._at = self._at, None
        if incoming is not None and not incoming.machine.over:
            self._may_end(incoming, DestinationEvent.FAILED, error_here(why))

    # -- one of them -------------------------------------------------------------------------------

    def _still_open(self) -> list[Incoming]:
        return [incoming for incoming in self._open.values() if not incoming.machine.over]

    def _make_room(self, reservation: Reserve) -> int | Refusal:
        if reservation.client in self._losses.clients:
            return FRONTEND_DIED
        if self.closed is not None:
            return takes_none(self.closed)
        if len(self._open) >= self._limits.incoming_max:
            return busy(f"{len(self._open)} requests are on their way there already")
        if any(other.reservation.request == reservation.request for other in self._open.values()):
            return busy("it is on its way there already")
        about = reservation
        return self._port.reserve(
            about.request, about.body, about.outputs, about.tokens, about.agents
        )

    def _advance(self, incoming: Incoming, now: float) -> None:
        about, name = incoming.reservation, incoming.reservation.migration
        if incoming.machine.state is DestinationState.PREPARING:
            ready = self._port.ready(about.request)
            if isinstance(ready, Refusal):
                self._may_end(incoming, DestinationEvent.FAILED, ready)
                return
            if ready:
                self._walk(incoming, DestinationEvent.PREPARED)
                self._answer(about, Reserved(migration=name, hit=incoming.hit))
                return
        if now >= incoming.deadline_s and incoming.ticket is not None:
            incoming.deadline_s = now + self._limits.progress_every_s
            if self._walk(incoming, DestinationEvent.TIMED_OUT) is DestinationAction.SAY_PROGRESS:
                self._answer(about, StageProgress(migration=name, stage=incoming.stage))
        elif now >= incoming.deadline_s:
            self._may_end(incoming, DestinationEvent.TIMED_OUT, source_silent(incoming))

    # Output tokens are numbered from 0, and those below `incoming.outputs` are known. The message
    # brings tokens from `first_output` on. It may repeat known ones and skips none, since each
    # message with tokens is answered before the next one is sent. So the new ones begin at place
    # `incoming.outputs - first_output` of the message.
    #
    # Slots are wanted, in tokens,
    # - for a stage: what the source says. That is all its tokens, and as many more as it may
    #   generate until the handover, so that the handover needs no new blocks
    #   (`MigrationLimits.ahead_tokens`).
    # - for a handover with KV: all computed tokens and one more block. The request arrives holding
    #   blocks, and vLLM preempts only requests that run. Without a slot for its next token it would
    #   wait, and nobody could take its blocks.
    # - for a handover without KV, of a request that waited or is computed anew: none. It starts
    #   like any other that waits.

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
            computed = self._computed(incoming)
            slots = computed + self._port.block_tokens if computed else 0
        refusal = self._port.reach(incoming.reservation.request, slots, new)
        if refusal is not None:
            self._may_end(incoming, DestinationEvent.FAILED, refusal)
        elif message.end > message.start:
            incoming.deadline_s = now + self._limits.progress_every_s
            self._pull(incoming, message)
            if isinstance(message, Stage):  # The source has been heard again since those before it.
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
            isinstance(message, Handover),
        )

    def _have_it(self, incoming: Incoming, now: float) -> None:
        """The blocks that the source's last message named are here."""
        incoming.deadline_s = now + self._limits.silence_timeout_s
        if self._walk(incoming, DestinationEvent.PULLED) is DestinationAction.INSTALL:
            self._install(incoming, now)
        else:
            incoming.staged_s = now
            staged = Staged(
                migration=incoming.reservation.migration,
                stage=incoming.stage,
                bytes=incoming.bytes,
                seconds=incoming.seconds,
            )
            self._answer(incoming.reservation, staged)

    def _install(self, incoming: Incoming, now: float) -> None:
        reservation, handover = incoming.reservation, incoming.last
        assert isinstance(handover, Handover)
        refusal = self._port.commit(reservation.request, self._computed(incoming), handover.state)
        if refusal is not None:
            self._may_end(incoming, DestinationEvent.FAILED, refusal)
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
        self._out.append(ToFrontend(client=reservation.client, message=took))
        self._decide(incoming, taken=True)
        self._first_steps.came(reservation.request, now)

    def _computed(self, incoming: Incoming) -> int:
        """The tokens whose KV is here after the handover: what the source had computed, or what was
        here before, if that is more."""
        assert isinstance(incoming.last, Handover)
        return max(incoming.last.end, incoming.hit)

    def _may_end(self, incoming: Incoming, event: DestinationEvent, ended: Refusal) -> None:
        """Feeds an event that may end the migration. Then frees its room and tells the source."""
        if self._walk(incoming, event) is not DestinationAction.DROP:
            return
        incoming.why, incoming.code = ended.why, ended.code
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
            code=incoming.code,
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
        self._answer(reservation, verdict)

    def _walk(self, incoming: Incoming, event: DestinationEvent) -> DestinationAction:
        action = incoming.machine.feed(event)
        state = incoming.machine.state.value
        name = incoming.reservation.migration
        self._on_step("destination", name, event.value, state, action.value)
        return action

    def _answer(self, reservation: Reserve, message: PeerMessage) -> None:
        engine, address = reservation.source, reservation.address
        self._out.append(ToPeer(engine=engine, address=address, message=message))
