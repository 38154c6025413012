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
    CallOff,
    Handover,
    Out,
    PeerMessage,
    Reserve,
    Reserved,
    Stage,
    Staged,
    StageProgress,
    Stopping,
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

QUIET_MAX_S = 0.1
"""So long prompts wait for a source's next word, and for the first step of a request that came: the
one may hang, the other have to wait for a slot."""
_AWAITED = (DestinationState.READY, DestinationState.COMMITTING)


@dataclass(slots=True, kw_only=True)
class Incoming:
    """One migration to here. `ticket`: of the pull that is under way. `staged_s`: when the last
    stage was here. `due_s`: when the source said that its handover would be."""

    order: Reserve
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
class Came:
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
        self.came: dict[RequestId, Came] = {}
        # Taken over with all of their KV, and no step is over: how much is settled, and since when.
        self._new: dict[RequestId, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def deadlines(self) -> list[float]:
        """When each of them wants to be looked at."""
        return [c.deadline_s for c in self._open.values() if not c.machine.over]

    def reserve(self, order: Reserve, now: float) -> None:
        """Has room for a request, or declines it."""
        if order.migration in self._open:
            return  # It came twice.
        if (verdict := self._verdicts.get(order.migration)) is not None:
            self._say(order.source, order.address, verdict)
            return
        coming = Incoming(
            order=order,
            machine=destination_machine(order.migration),
            began_s=now,
            deadline_s=now + self._limits.silence_timeout_s,
            outputs=len(order.outputs),
            tail=order.outputs[-TAIL_MAX:],
        )
        hit = self._make_room(order)
        if isinstance(hit, Refusal):
            coming.why = hit.why
            self._walk(coming, DestinationEvent.FAILED)
            self._decide(coming, taken=False)
            return
        coming.hit = hit
        self._open[order.migration] = self._at = coming
        self._look(coming, now)

    def quiet(self, now: float) -> bool:
        """Whether the next step should compute no prompts: a request may come before its end, or
        has come and waits for its first token."""
        for request, (settled, since_s) in list(self._new.items()):
            progress = self._port.progress(request)
            ended = progress.settled != settled or progress.phase is Phase.GONE
            if ended or now > since_s + QUIET_MAX_S:
                del self._new[request]
        return bool(self._new) or any(
            c.staged_s is not None and now <= c.staged_s + QUIET_MAX_S
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
        self, message: Stage | Stopping | Handover | CallOff, now: float, heard_s: float
    ) -> None:
        """Takes in what a source said, which arrived at `heard_s`."""
        self._at = coming = self._open.get(message.migration)
        if coming is None or coming.machine.over:
            self._verdicts.receive(message)
        elif isinstance(message, CallOff):
            self._may_end(coming, DestinationEvent.CALLED_OFF, message.why)
        elif isinstance(message, Stopping):
            if coming.machine.state is DestinationState.READY:
                self._walk(coming, DestinationEvent.STOPPING)
                coming.due_s = heard_s + message.in_s
                if coming.last is not None:
                    # Now, while the request still runs there: of a long one it takes milliseconds.
                    self._port.cache(coming.order.request, coming.last.end)
        elif coming.machine.state is DestinationState.COMMITTING:
            if isinstance(message, Handover):
                self._walk(coming, DestinationEvent.HANDOVER)
        elif isinstance(message, Handover) or message.stage > coming.stage:
            self._go_on(coming, message, now)

    def pulled(self, ticket: int, error: str | None, size: int, seconds: float, now: float) -> None:
        """A pull that the port began is over. `size` in bytes."""
        coming = self._open.get(self._tickets.pop(ticket, MigrationId("")))
        if coming is None or coming.ticket != ticket:
            raise ProtocolError(f"nobody waits for the end of pull {ticket}")
        self._at = coming
        coming.ticket, coming.bytes, coming.seconds = None, size, seconds
        if coming.machine.over:
            self._free(coming)
        elif error is not None:
            self._may_end(coming, DestinationEvent.FAILED, error)
        else:
            self._have_it(coming, now)

    def client_gone(self, requests: list[str]) -> None:
        """The frontend aborted these requests here."""
        for coming in self._still_open():
            if coming.order.request in requests:
                self._at = coming
                self._may_end(coming, DestinationEvent.CLIENT_GONE, "its client hung up")

    def engine_lost(self, engine: EngineIndex) -> None:
        """A source died."""
        for coming in self._still_open():
            if coming.order.source == engine:
                self._at = coming
                self._may_end(coming, DestinationEvent.SOURCE_LOST, "the source died")

    def fate(self, migration: MigrationId) -> str:
        """`taken`, `declined` or `undecided`. One never heard of is declined from now on."""
        coming = self._open.get(migration)
        if coming is not None and not coming.machine.over:
            return "undecided"
        return self._verdicts.fate(migration)

    def poll(self, now: float) -> None:
        """Looks at every one of them."""
        for coming in self._still_open():
            self._at = coming
            self._look(coming, now)

    def call_off(self, why: str) -> None:
        """Declines all of them."""
        for coming in self._still_open():
            self._at = coming
            self._may_end(coming, DestinationEvent.FAILED, f"the destination takes none: {why}")

    def settled(self) -> None:
        """What was dealt with came to an end without an exception."""
        self._at = None

    def failed(self, why: str) -> None:
        """An exception came out of what was being dealt with: ends that migration, if any."""
        coming, self._at = self._at, None
        if coming is not None and not coming.machine.over:
            self._may_end(coming, DestinationEvent.FAILED, f"an error at its destination: {why}")

    # -- one of them -------------------------------------------------------------------------------

    def _still_open(self) -> list[Incoming]:
        return [c for c in self._open.values() if not c.machine.over]

    def _make_room(self, order: Reserve) -> int | Refusal:
        if self.closed is not None:
            return Refusal(why=f"the destination takes none: {self.closed}")
        if len(self._open) >= self._limits.incoming_max:
            return Refusal(why=f"{len(self._open)} requests are on their way there already")
        if any(c.order.request == order.request for c in self._open.values()):
            return Refusal(why="it is on its way there already")
        return self._port.reserve(
            order.request, order.body, order.outputs, order.tokens, order.agents
        )

    def _look(self, coming: Incoming, now: float) -> None:
        if coming.machine.state is DestinationState.PREPARING:
            ready = self._port.ready(coming.order.request)
            if isinstance(ready, Refusal):
                self._may_end(coming, DestinationEvent.FAILED, ready.why)
                return
            if ready:
                self._walk(coming, DestinationEvent.PREPARED)
                self._answer(coming, Reserved(migration=coming.order.migration, hit=coming.hit))
                return
        if now >= coming.deadline_s and coming.ticket is not None:
            coming.deadline_s = now + self._limits.progress_every_s
            if self._walk(coming, DestinationEvent.LATE) is DestinationAction.SAY_PROGRESS:
                self._answer(
                    coming,
                    StageProgress(migration=coming.order.migration, stage=coming.stage),
                )
        elif now >= coming.deadline_s:
            why = f"the source was silent while {coming.machine.state.value}"
            self._may_end(coming, DestinationEvent.LATE, why)

    def _go_on(self, coming: Incoming, message: Stage | Handover, now: float) -> None:
        new = message.outputs[max(0, coming.outputs - message.first_output) :]
        coming.outputs += len(new)
        coming.tail = [*coming.tail, *new][-TAIL_MAX:]
        coming.last = message
        coming.deadline_s = now + self._limits.silence_timeout_s
        if isinstance(message, Stage):
            coming.stage = message.stage
            self._walk(coming, DestinationEvent.STAGE)
            slots = message.tokens
        else:
            self._walk(coming, DestinationEvent.HANDOVER)
            # And for the next steps: it holds blocks, so nobody could take any from it to go on.
            slots = self._computed(coming) and self._computed(coming) + self._port.block_tokens
        refusal = self._port.reach(coming.order.request, slots, new)
        if refusal is not None:
            self._may_end(coming, DestinationEvent.FAILED, refusal.why)
        elif message.end > message.start:
            coming.deadline_s = now + self._limits.progress_every_s
            self._pull(coming, message)
            if isinstance(message, Stage):
                self._port.cache(coming.order.request, message.start)
        else:
            coming.bytes, coming.seconds = 0, 0.0
            self._have_it(coming, now)

    def _pull(self, coming: Incoming, message: Stage | Handover) -> None:
        order = coming.order
        self._ticket += 1
        coming.ticket = self._ticket
        self._tickets[self._ticket] = order.migration
        self._port.pull(
            order.request,
            self._ticket,
            order.source,
            order.agents,
            message.start,
            message.end,
            message.blocks,
        )

    def _have_it(self, coming: Incoming, now: float) -> None:
        """What the source's last word named is here."""
        migration = coming.order.migration
        coming.deadline_s = now + self._limits.silence_timeout_s
        if self._walk(coming, DestinationEvent.PULLED) is DestinationAction.INSTALL:
            self._install(coming, now)
        else:
            coming.staged_s = now
            self._answer(
                coming,
                Staged(
                    migration=migration,
                    stage=coming.stage,
                    bytes=coming.bytes,
                    seconds=coming.seconds,
                ),
            )

    def _install(self, coming: Incoming, now: float) -> None:
        order, handover = coming.order, coming.last
        assert isinstance(handover, Handover)
        refusal = self._port.commit(order.request, self._computed(coming), handover.state)
        if refusal is not None:
            self._may_end(coming, DestinationEvent.FAILED, refusal.why)
            return
        self._walk(coming, DestinationEvent.INSTALLED)
        del self._open[order.migration]
        self.came[order.request] = Came(at_s=now, took_s=now - coming.began_s)
        if len(self.came) > REMEMBERED_MAX:
            del self.came[next(iter(self.came))]
        took = TookOver(
            migration=order.migration,
            request=order.request,
            epoch=order.epoch,
            outputs=coming.outputs,
            tail=coming.tail,
        )
        self._out.append(ToFrontend(message=took))
        self._decide(coming, taken=True)
        progress = self._port.progress(order.request)
        if progress.settled and progress.settled + 1 >= progress.tokens:
            self._new[order.request] = progress.settled, now

    def _computed(self, coming: Incoming) -> int:
        """The tokens whose KV is here after the handover: what the source had computed, or what was
        here before if that is more."""
        assert isinstance(coming.last, Handover)
        return max(coming.last.end, coming.hit)

    def _may_end(self, coming: Incoming, event: DestinationEvent, why: str) -> None:
        """Feeds an event that may end it; if it does, frees what it held and says so."""
        if self._walk(coming, event) is not DestinationAction.DROP:
            return
        coming.why = why
        self._decide(coming, taken=False)
        if coming.ticket is None:
            self._free(coming)
        else:
            self._port.cancel(coming.ticket)

    def _free(self, coming: Incoming) -> None:
        self._port.drop(coming.order.request)
        del self._open[coming.order.migration]

    def _decide(self, coming: Incoming, *, taken: bool) -> None:
        order = coming.order
        verdict = Verdict(
            migration=order.migration,
            taken=taken,
            why=coming.why,
            bytes=coming.bytes,
            seconds=coming.seconds,
        )
        self._verdicts.remember(
            Decided(
                verdict=verdict,
                machine=coming.machine,
                source=order.source,
                address=order.address,
            )
        )
        self._answer(coming, verdict)

    def _walk(self, coming: Incoming, event: DestinationEvent) -> DestinationAction:
        action = coming.machine.feed(event)
        state = coming.machine.state.value
        name = coming.order.migration
        self._on_step("destination", name, event.value, state, action.value)
        return action

    def _answer(self, coming: Incoming, message: PeerMessage) -> None:
        self._say(coming.order.source, coming.order.address, message)

    def _say(self, engine: EngineIndex, address: str, message: PeerMessage) -> None:
        self._out.append(ToPeer(engine=engine, address=address, message=message))
