"""Migrations away from one engine: walks the source's machine of core/migration/tables.py.

Rules
- One migration of a request at a time, `outgoing_max` of them for the engine.
- A request that finished, was aborted or was preempted meanwhile is not moved.
- An exception ends the migration that it came from, and no other: before the handover the request
  goes on here, after it the destination's verdict is still awaited.
- All blocks that were named to the destination stay pinned until the migration is over, which after
  the handover is the verdict. So each further word of the source (`Stage`, `Stopping`, `Handover`)
  proves that what the destination pulled before it are the bytes of this request.
"""

from llumnix.core.limits import REMEMBERED_MAX, MigrationLimits
from llumnix.core.messages import (
    CallOff,
    FromDestination,
    Handover,
    Migrate,
    MigrationEnded,
    Out,
    PeerMessage,
    Reserve,
    Reserved,
    Stage,
    Staged,
    StageDone,
    StageProgress,
    Stopping,
    ToFrontend,
    ToPeer,
    Verdict,
)
from llumnix.core.migration.port import EnginePort, Phase, Refusal
from llumnix.core.migration.setbacks import Setbacks
from llumnix.core.migration.stages import Outgoing, next_event
from llumnix.core.migration.tables import (
    OnStep,
    SourceAction,
    SourceEvent,
    SourceMachine,
    SourceState,
    source_machine,
)
from llumnix.core.types import EngineIndex, MigrationId, RequestId

_NOT_TAKEN = (SourceEvent.DECLINED, SourceEvent.LATE)
_GOING_ON = (SourceState.RESERVING, SourceState.COPYING, SourceState.IDLE)
_HANDED_OVER = (SourceState.DECIDING, SourceState.RELEASING)


class OutgoingMigrations:
    """All of one engine's."""

    def __init__(
        self,
        engine: EngineIndex,
        address: str,
        port: EnginePort,
        limits: MigrationLimits,
        out: list[Out],
        on_step: OnStep,
        setbacks: Setbacks,
    ) -> None:
        self._setbacks = setbacks
        self._engine = engine
        self._address = address
        self._port = port
        self._limits = limits
        self._out = out
        self._on_step = on_step
        self._open: dict[RequestId, Outgoing] = {}
        self._ended: dict[MigrationId, SourceMachine] = {}
        self._at: Outgoing | None = None  # The migration that is being dealt with.
        self.closed: str | None = None  # why no migration may begin
        self.moved_bytes = 0
        self.moved_s = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def requests(self) -> list[RequestId]:
        """Those on their way."""
        return list(self._open)

    def deadlines(self) -> list[float]:
        """When each of them wants to be looked at."""
        return [g.deadline_s for g in self._open.values()]

    def quiet(self) -> bool:
        """Whether the next step should compute no prompts: it has to be as long as was said."""
        return any(
            g.machine.state is SourceState.IDLE
            and (g.near_at is not None or g.hushed_until_s is not None)
            for g in self._open.values()
        )

    def begin(self, order: Migrate, now: float) -> None:
        """Asks the destination for room, or says at once why the request cannot be moved."""
        described = self._describe(order, now)
        if isinstance(described, Refusal):
            self.refuse(order, described)
            return
        progress = self._port.progress(order.request)
        outputs = self._port.outputs(order.request, 0)
        without_kv = progress.phase is Phase.WAITING or order.copy == "recompute"
        ahead = self._limits.ahead_tokens(self._port.block_tokens)
        going = Outgoing(
            order=order,
            machine=source_machine(order.migration),
            began_s=now,
            deadline_s=now + self._limits.reserve_timeout_s,
            preemptions=progress.preemptions,
            outputs_sent=len(outputs),
        )
        self._open[order.request] = self._at = going
        self._send(
            going,
            Reserve(
                migration=order.migration,
                request=order.request,
                source=self._engine,
                address=self._address,
                epoch=order.epoch,
                body=described,
                outputs=outputs,
                tokens=0 if without_kv else progress.tokens + ahead,
                agents=self._port.agents(),
            ),
        )

    def refuse(self, order: Migrate, refusal: Refusal) -> None:
        """Tells the frontend that the migration does not begin."""
        ended = MigrationEnded(
            migration=order.migration, request=order.request, taken=False, why=refusal.why
        )
        self._out.append(ToFrontend(message=ended))

    def receive(self, message: FromDestination, now: float) -> None:
        """Takes in what a destination said."""
        going = next(
            (g for g in self._open.values() if g.order.migration == message.migration), None
        )
        self._at = going
        if going is None:
            self._after_the_end(message)
        elif isinstance(message, Reserved):
            if going.machine.state is SourceState.RESERVING:
                going.done = message.hit
            self._walk(going, SourceEvent.RESERVED, now)
            self.look(going, now)
        elif isinstance(message, Verdict):
            if message.taken and going.handover is not None:
                self._note_stage(going, going.handover.end, message, now)
            if going.machine.state is not SourceState.RELEASING:
                going.why = message.why
            self._walk(going, SourceEvent.TAKEN if message.taken else SourceEvent.DECLINED, now)
        elif message.stage != going.stage or going.machine.state is not SourceState.COPYING:
            pass  # It was late, or came twice.
        elif isinstance(message, StageProgress):
            self._walk(going, SourceEvent.PROGRESS, now)
        else:
            self._note_stage(going, going.stage_end, message, now)
            going.done = going.stage_end
            self._walk(going, SourceEvent.STAGED, now)
            self.look(going, now)

    def engine_lost(self, engine: EngineIndex, granted: set[MigrationId], now: float) -> None:
        """A destination died; for `granted` the frontend gave this engine a fresh epoch."""
        for going in [g for g in self._open.values() if g.order.destination == engine]:
            self._at = going
            going.why = "the destination died"
            mine = going.order.migration in granted
            self._walk(going, SourceEvent.GRANTED if mine else SourceEvent.FORFEITED, now)
        self.settled()

    def poll(self, now: float) -> None:
        """Looks at every one of them."""
        for going in list(self._open.values()):
            self._at = going
            self.look(going, now)
        self.settled()

    def call_off(self, why: str, now: float) -> None:
        """Ends all that have not been handed over; those that have wait for their verdict."""
        for going in list(self._open.values()):
            if going.machine.state in (*_GOING_ON, SourceState.STOPPING):
                self._at = going
                going.why = why
                self._walk(going, SourceEvent.FAILED, now)
        self.settled()

    def settled(self) -> None:
        """What was dealt with came to an end without an exception."""
        self._at = None

    def failed(self, why: str, now: float) -> None:
        """An exception came out of what was being dealt with: ends that migration, if any."""
        going, self._at = self._at, None
        if going is None or self._open.get(going.order.request) is not going:
            return
        going.why = f"an error at its source: {why}"
        if going.machine.over:
            self._end(going, taken=going.machine.state is SourceState.COMMITTED, now=now)
        elif going.machine.state in _HANDED_OVER and now >= going.deadline_s:
            self._walk(going, SourceEvent.LATE, now)
        else:
            self._walk(going, SourceEvent.FAILED, now)
            if not going.machine.over:
                # Others are looked at first, if it should fail again.
                self._open[going.order.request] = self._open.pop(going.order.request)

    def look(self, going: Outgoing, now: float) -> None:
        """What has become of the request, and what follows from it."""
        if going.machine.over:
            return
        state = going.machine.state
        progress = self._port.progress(going.order.request)
        if progress.phase is Phase.GONE and state is not SourceState.RELEASING:
            going.why = "it ended meanwhile"
            self._walk(going, SourceEvent.GONE, now)
        elif state in _GOING_ON and progress.preemptions != going.preemptions:
            going.why = "it was preempted meanwhile"
            self._walk(going, SourceEvent.GONE, now)
        elif state is SourceState.STOPPING and not progress.in_flight:
            # Before the machine says that it is handed over: until then it may be taken back.
            going.handover = self._rest(going)
            self._walk(going, SourceEvent.DRAINED, now)
        elif now >= going.deadline_s:
            if state is not SourceState.RELEASING:
                going.why = f"the destination was silent while {state.value}"
            self._walk(going, SourceEvent.LATE, now)
        elif state is SourceState.IDLE and (
            event := next_event(going, progress, self._port, self._limits, now)
        ):
            self._walk(going, event, now)

    def _describe(self, order: Migrate, now: float) -> bytes | Refusal:
        if self.closed is not None:
            return Refusal(why=self.closed)
        if not order.address:
            return Refusal(why="its destination is still starting")
        if order.request in self._open:
            return Refusal(why="it is being moved already")
        if len(self._open) >= self._limits.outgoing_max:
            return Refusal(why=f"{len(self._open)} requests are being moved away already")
        if self._port.progress(order.request).phase is Phase.GONE:
            return Refusal(why="it has ended")
        described = self._port.describe(order.request)
        if isinstance(described, Refusal):
            self._setbacks.stuck(order.request, now, for_ever=described.for_ever)
        return described

    def _after_the_end(self, message: FromDestination) -> None:
        machine = self._ended.get(message.migration)
        if machine is None or isinstance(message, Staged | StageProgress):
            return
        event = SourceEvent.RESERVED
        if isinstance(message, Verdict):
            event = SourceEvent.TAKEN if message.taken else SourceEvent.DECLINED
        machine.feed(event)

    def _note_stage(self, going: Outgoing, end: int, pulled: Staged | Verdict, now: float) -> None:
        ms = round((now - going.stage_began_s) * 1e3, 3)
        tokens = max(0, end - going.done)
        going.stages.append(StageDone(tokens=tokens, bytes=pulled.bytes, ms=ms))
        self.moved_bytes += pulled.bytes
        self.moved_s += pulled.seconds

    def _walk(self, going: Outgoing, event: SourceEvent, now: float) -> None:
        action = going.machine.feed(event)
        order = going.order
        state = going.machine.state.value
        self._on_step("source", order.migration, event.value, state, action.value)
        if going.machine.over:
            self._learn(going, event, action, now)
        match action:
            case SourceAction.NOTHING:
                pass
            case SourceAction.REST | SourceAction.WAIT:
                going.deadline_s = now + self._limits.stage_timeout_s
            case SourceAction.STAGE:
                self._stage(going, now)
            case SourceAction.ANNOUNCE:
                self._announce(going, now)
            case SourceAction.STOP:
                self._port.stop(order.request)
                going.stopped_s = now
                going.deadline_s = now + self._limits.stage_timeout_s
                if self._port.progress(order.request).in_flight:
                    in_s = self._port.step_s
                    self._send(going, Stopping(migration=order.migration, in_s=in_s))
                self.look(going, now)
            case SourceAction.HAND_OVER:
                self._hand_over(going, now)
            case SourceAction.ASK_AGAIN:
                assert going.handover is not None
                going.deadline_s = now + self._limits.verdict_again_s
                self._send(going, going.handover)
            case SourceAction.RELEASE:
                self._port.unpin(order.request)
                self._port.release(order.request)
                self._end(going, taken=True, now=now)
            case SourceAction.RESUME:
                self._port.resume(order.request)
                self._end(going, taken=False, now=now)
            case SourceAction.STAY:
                self._end(going, taken=False, now=now)
            case SourceAction.CALL_OFF:
                self._call_off(going)
                self._end(going, taken=False, now=now)
            case SourceAction.KEEP_BLOCKS:
                going.deadline_s = now + self._limits.verdict_again_s
                self._call_off(going)
            case SourceAction.FREE_BLOCKS:
                self._end(going, taken=False, now=now)
            case SourceAction.TAKE_BACK:
                self._port.resume(order.request)
                self._call_off(going)
                self._end(going, taken=False, now=now)

    def _learn(self, going: Outgoing, event: SourceEvent, action: SourceAction, now: float) -> None:
        """What a migration that is over says of the next ones."""
        request, destination = going.order.request, going.order.destination
        if action is SourceAction.RELEASE:
            self._setbacks.moved(request, destination)
        elif event is SourceEvent.FAILED:
            self._setbacks.stuck(request, now)
        elif event in _NOT_TAKEN and action is not SourceAction.FREE_BLOCKS:
            self._setbacks.declined(request, destination, now)

    def _stage(self, going: Outgoing, now: float) -> None:
        progress = self._port.progress(going.order.request)
        block = self._port.block_tokens
        going.stage += 1
        going.stage_end = progress.settled // block * block
        going.stage_began_s = now
        going.deadline_s = now + self._limits.stage_timeout_s
        blocks = self._port.pin(going.order.request, going.done, going.stage_end)
        first, outputs = self._new_outputs(going)
        self._send(
            going,
            Stage(
                migration=going.order.migration,
                stage=going.stage,
                start=going.done,
                end=going.stage_end,
                blocks=blocks,
                first_output=first,
                outputs=outputs,
                tokens=progress.tokens + self._limits.ahead_tokens(block),
            ),
        )

    def _announce(self, going: Outgoing, now: float) -> None:
        progress = self._port.progress(going.order.request)
        # The step that it will be stopped after; and if they are queued, the one behind that.
        steps = 2 if progress.in_flight else 1
        in_s = steps * self._port.step_s
        going.near_at = progress.settled
        going.near_until_s = now + in_s + self._limits.near_s
        self._send(going, Stopping(migration=going.order.migration, in_s=in_s))

    def _rest(self, going: Outgoing) -> Handover:
        end, blocks, state = self._port.rest(going.order.request, going.done)
        if going.order.copy == "recompute":
            going.done, end, blocks = 0, 0, [[] for _ in blocks]
        if end > going.done:
            self._port.pin(going.order.request, going.done, end)
        first, outputs = self._new_outputs(going)
        return Handover(
            migration=going.order.migration,
            request=going.order.request,
            source=self._engine,
            address=self._address,
            start=min(going.done, end),
            end=end,
            blocks=blocks,
            first_output=first,
            outputs=outputs,
            state=state,
        )

    def _hand_over(self, going: Outgoing, now: float) -> None:
        assert going.handover is not None
        going.stage_began_s = now
        going.deadline_s = now + self._limits.verdict_again_s
        self._send(going, going.handover)

    def _call_off(self, going: Outgoing) -> None:
        self._send(going, CallOff(migration=going.order.migration, why=going.why))

    def _new_outputs(self, going: Outgoing) -> tuple[int, list[int]]:
        first = going.outputs_sent
        outputs = self._port.outputs(going.order.request, first)
        going.outputs_sent += len(outputs)
        return first, outputs

    def _end(self, going: Outgoing, *, taken: bool, now: float) -> None:
        order = going.order
        self._port.unpin(order.request)
        del self._open[order.request]
        self._ended[order.migration] = going.machine
        if len(self._ended) > REMEMBERED_MAX:
            del self._ended[next(iter(self._ended))]
        down = None if going.stopped_s is None else round((now - going.stopped_s) * 1e3, 3)
        ended = MigrationEnded(
            migration=order.migration,
            request=order.request,
            taken=taken,
            why=going.why,
            stages=going.stages,
            downtime_ms=down,
            total_ms=round((now - going.began_s) * 1e3, 3),
        )
        self._out.append(ToFrontend(message=ended))

    def _send(self, going: Outgoing, message: PeerMessage) -> None:
        to, address = going.order.destination, going.order.address
        self._out.append(ToPeer(engine=to, address=address, message=message))
