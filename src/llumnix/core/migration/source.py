"""Migrations away from one engine: walks the source's machine of core/migration/tables.py.

Rules
- At most `outgoing_max` migrations for the engine, and one for each request.
- A request that finishes, is aborted or is preempted meanwhile is not moved.
- An exception ends the migration that it came from, and no other. Before the handover the request
  goes on here; after it the destination's verdict is still awaited.
- Every block that was named to the destination stays pinned until the migration is over: after the
  handover, until the verdict. So when the destination hears the source again (`Stage`,
  `HandoverAnnounced`, `Handover`), all that it pulled before were the bytes of this request.
"""

from llumnix.core.codes import AbortCode
from llumnix.core.limits import REMEMBERED_MAX, MigrationLimits
from llumnix.core.messages import (
    CancelMigration,
    FromDestination,
    Handover,
    HandoverAnnounced,
    Migrate,
    Out,
    PeerMessage,
    Reserve,
    Reserved,
    Stage,
    Staged,
    StageDone,
    StageProgress,
    ToFrontend,
    ToPeer,
    Verdict,
    not_taken,
)
from llumnix.core.migration.port import EnginePort, Phase, Refusal, busy
from llumnix.core.migration.setbacks import FRONTEND_DIED, Losses, Setbacks
from llumnix.core.migration.stages import GOING_ON, Outgoing, next_event
from llumnix.core.migration.tables import (
    OnStep,
    SourceAction,
    SourceEvent,
    SourceMachine,
    SourceState,
    source_machine,
)
from llumnix.core.types import EngineIndex, MigrationId, RequestId

_HANDED_OVER = (SourceState.DECIDING, SourceState.RELEASING)


class OutgoingMigrations:
    """All migrations away from one engine."""

    def __init__(
        self,
        engine: EngineIndex,
        address: str,
        port: EnginePort,
        limits: MigrationLimits,
        out: list[Out],
        on_step: OnStep,
        setbacks: Setbacks,
        losses: Losses,
    ) -> None:
        self._setbacks = setbacks
        self._losses = losses
        self._engine = engine
        self._address = address
        self._port = port
        self._limits = limits
        self._out = out
        self._on_step = on_step
        self._open: dict[RequestId, Outgoing] = {}
        self._ended: dict[MigrationId, SourceMachine] = {}
        self._at: Outgoing | None = None  # the migration that is being dealt with
        self.closed: str | None = None  # why no migration may begin
        self.moved_bytes = 0
        self.moved_s = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def requests(self) -> list[RequestId]:
        """The requests on their way."""
        return list(self._open)

    def deadlines(self) -> list[float]:
        """When each migration wants to be looked at."""
        return [outgoing.deadline_s for outgoing in self._open.values()]

    def defer_prefills(self) -> bool:
        """Whether the next step should compute no prompts, since it has to be as long as was
        announced."""
        return any(
            outgoing.machine.state is SourceState.BETWEEN_STAGES
            and (
                outgoing.announced_at_tokens is not None
                or outgoing.prefill_wait_until_s is not None
            )
            for outgoing in self._open.values()
        )

    def begin(self, grant: Migrate, now: float) -> None:
        """Asks the destination for room, or says at once why the request cannot be moved."""
        described = self._describe(grant, now)
        if isinstance(described, Refusal):
            self.refuse(grant, described)
            return
        progress = self._port.progress(grant.request)
        outputs = self._port.outputs(grant.request, 0)
        without_kv = progress.phase is Phase.WAITING or grant.copy == "recompute"
        ahead = self._limits.ahead_tokens(self._port.block_tokens)
        outgoing = Outgoing(
            grant=grant,
            machine=source_machine(grant.migration),
            began_s=now,
            deadline_s=now + self._limits.reserve_timeout_s,
            preemptions=progress.preemptions,
            outputs_sent=len(outputs),
        )
        self._open[grant.request] = self._at = outgoing
        self._send(
            outgoing,
            Reserve(
                migration=grant.migration,
                request=grant.request,
                source=self._engine,
                address=self._address,
                epoch=grant.epoch,
                body=described,
                outputs=outputs,
                tokens=0 if without_kv else progress.tokens + ahead,
                agents=self._port.agents(),
                client=grant.client,
            ),
        )

    def refuse(self, grant: Migrate, refusal: Refusal) -> None:
        """Tells the frontend that the migration does not begin."""
        self._out.append(not_taken(grant, refusal.why, refusal.code))

    def receive(self, message: FromDestination, now: float) -> None:
        """Takes in a destination's message."""
        self._at = outgoing = next(
            (o for o in self._open.values() if o.grant.migration == message.migration), None
        )
        if outgoing is None:
            self._after_the_end(message)
        elif isinstance(message, Reserved):
            if outgoing.machine.state is SourceState.RESERVING:
                outgoing.done = message.hit
            self._walk(outgoing, SourceEvent.RESERVED, now)
            self.advance(outgoing, now)
        elif isinstance(message, Verdict):
            if message.taken and outgoing.handover is not None:
                self._note_stage(outgoing, outgoing.handover.end, message, now)
            if outgoing.machine.state is not SourceState.RELEASING:
                outgoing.why, outgoing.code = message.why, message.code
            self._walk(outgoing, SourceEvent.TAKEN if message.taken else SourceEvent.DECLINED, now)
        elif message.stage != outgoing.stage or outgoing.machine.state is not SourceState.COPYING:
            pass  # The message was late, or came twice.
        elif isinstance(message, StageProgress):
            self._walk(outgoing, SourceEvent.PROGRESS, now)
        else:
            self._note_stage(outgoing, outgoing.stage_end, message, now)
            outgoing.done = outgoing.stage_end
            self._walk(outgoing, SourceEvent.STAGED, now)
            self.advance(outgoing, now)

    def engine_lost(
        self, engine: EngineIndex, granted: set[MigrationId], now: float, client: int
    ) -> None:
        """A destination died, as a frontend says. That ends the migrations to it which this
        frontend granted: no other knows which of them took over. For those in `granted` it gave
        this engine a fresh epoch."""
        self._losses.engines.add(engine)
        to_it = [o for o in self._open.values() if o.grant.destination == engine]
        for outgoing in [o for o in to_it if o.grant.client == client]:
            self._at = outgoing
            outgoing.why, outgoing.code = "the destination died", AbortCode.PEER_LOST
            mine = outgoing.grant.migration in granted
            self._walk(outgoing, SourceEvent.GRANTED if mine else SourceEvent.FORFEITED, now)
        self.settled()

    def poll(self, now: float) -> None:
        """Looks at every migration."""
        for outgoing in list(self._open.values()):
            self._at = outgoing
            self.advance(outgoing, now)
        self.settled()

    def cancel_all(self, why: str, now: float) -> None:
        """Ends all migrations before their handover. Later ones wait for their verdict."""
        for outgoing in list(self._open.values()):
            if outgoing.machine.state in (*GOING_ON, SourceState.STOPPING):
                self._at = outgoing
                outgoing.why = why
                self._walk(outgoing, SourceEvent.FAILED, now)

    def settled(self) -> None:
        """What was being dealt with is done, without an exception."""
        self._at = None

    def failed(self, why: str, now: float) -> None:
        """An exception came out of what was being dealt with. Ends that migration, if any."""
        outgoing, self._at = self._at, None
        if outgoing is None or self._open.get(outgoing.grant.request) is not outgoing:
            return
        outgoing.why = f"an error at its source: {why}"
        if outgoing.machine.over:
            self._end(outgoing, taken=outgoing.machine.state is SourceState.COMMITTED, now=now)
        elif outgoing.machine.state in _HANDED_OVER and now >= outgoing.deadline_s:
            self._walk(outgoing, SourceEvent.TIMED_OUT, now)
        else:
            self._walk(outgoing, SourceEvent.FAILED, now)
            if not outgoing.machine.over:
                # If it fails again, the others have been looked at.
                self._open[outgoing.grant.request] = self._open.pop(outgoing.grant.request)

    def advance(self, outgoing: Outgoing, now: float) -> None:
        """Looks at the request, and does what follows from its progress."""
        if outgoing.machine.over:
            return
        progress = self._port.progress(outgoing.grant.request)
        event, why = next_event(outgoing, progress, self._port, self._limits, now)
        if self._losses.forfeits(outgoing.grant):
            event, why = SourceEvent.FORFEITED, FRONTEND_DIED.why
            outgoing.code = FRONTEND_DIED.code
        if event is None:
            return
        outgoing.why = why or outgoing.why
        if event is SourceEvent.STEPS_LANDED:
            # Before the machine says that it is handed over: until then it may be taken back.
            outgoing.handover = self._make_handover(outgoing)
        self._walk(outgoing, event, now)

    def _describe(self, grant: Migrate, now: float) -> bytes | Refusal:
        if self.closed is not None:
            return busy(self.closed)
        if not grant.address:
            return busy("its destination is still starting")
        if grant.request in self._open:
            return busy("it is being moved already")
        if len(self._open) >= self._limits.outgoing_max:
            return busy(f"{len(self._open)} requests are being moved away already")
        if self._port.progress(grant.request).phase is Phase.GONE:
            return Refusal(why="it has ended", code=AbortCode.ENDED)
        described = self._port.describe(grant.request)
        if isinstance(described, Refusal):
            self._setbacks.stuck(grant.request, now, for_ever=described.for_ever)
        return described

    def _after_the_end(self, message: FromDestination) -> None:
        machine = self._ended.get(message.migration)
        if machine is None or isinstance(message, Staged | StageProgress):
            return
        event = SourceEvent.RESERVED
        if isinstance(message, Verdict):
            event = SourceEvent.TAKEN if message.taken else SourceEvent.DECLINED
        machine.feed(event)

    def _note_stage(
        self, outgoing: Outgoing, end: int, pulled: Staged | Verdict, now: float
    ) -> None:
        ms = round((now - outgoing.stage_began_s) * 1e3, 3)
        tokens = max(0, end - outgoing.done)
        outgoing.stages.append(StageDone(tokens=tokens, bytes=pulled.bytes, ms=ms))
        self.moved_bytes += pulled.bytes
        self.moved_s += pulled.seconds

    def _walk(self, outgoing: Outgoing, event: SourceEvent, now: float) -> None:
        action = outgoing.machine.feed(event)
        grant = outgoing.grant
        state = outgoing.machine.state.value
        self._on_step("source", grant.migration, event.value, state, action.value)
        if outgoing.machine.over:
            self._setbacks.learn(outgoing.grant, event, action, now)
        match action:
            case SourceAction.NOTHING:
                pass
            case SourceAction.REST | SourceAction.WAIT:
                outgoing.deadline_s = now + self._limits.stage_timeout_s
            case SourceAction.STAGE:
                self._stage(outgoing, now)
            case SourceAction.ANNOUNCE:
                self._announce(outgoing, now)
            case SourceAction.STOP:
                self._port.stop(grant.request)
                outgoing.stopped_s = now
                outgoing.deadline_s = now + self._limits.stage_timeout_s
                if self._port.progress(grant.request).in_flight:
                    in_s = self._port.step_s
                    self._send(outgoing, HandoverAnnounced(migration=grant.migration, in_s=in_s))
                self.advance(outgoing, now)
            case SourceAction.HAND_OVER:
                outgoing.stage_began_s = now
                self._hand_over(outgoing, now)
            case SourceAction.ASK_AGAIN:
                self._hand_over(outgoing, now)
            case SourceAction.RELEASE:
                self._port.unpin(grant.request)
                self._port.release(grant.request)
                self._end(outgoing, taken=True, now=now)
            case SourceAction.RESUME:
                self._port.resume(grant.request)
                self._end(outgoing, taken=False, now=now)
            case SourceAction.STAY:
                self._end(outgoing, taken=False, now=now)
            case SourceAction.CANCEL:
                self._send_cancel(outgoing)
                self._end(outgoing, taken=False, now=now)
            case SourceAction.KEEP_BLOCKS:
                outgoing.deadline_s = now + self._limits.verdict_again_s
                self._send_cancel(outgoing)
            case SourceAction.FREE_BLOCKS:
                self._end(outgoing, taken=False, now=now)
            case SourceAction.TAKE_BACK:
                self._port.resume(grant.request)
                self._send_cancel(outgoing)
                self._end(outgoing, taken=False, now=now)

    def _stage(self, outgoing: Outgoing, now: float) -> None:
        progress = self._port.progress(outgoing.grant.request)
        block = self._port.block_tokens
        outgoing.stage += 1
        outgoing.stage_end = progress.settled // block * block
        outgoing.stage_began_s = now
        outgoing.deadline_s = now + self._limits.stage_timeout_s
        blocks = self._port.pin(outgoing.grant.request, outgoing.done, outgoing.stage_end)
        first, outputs = self._new_outputs(outgoing)
        self._send(
            outgoing,
            Stage(
                migration=outgoing.grant.migration,
                stage=outgoing.stage,
                start=outgoing.done,
                end=outgoing.stage_end,
                blocks=blocks,
                first_output=first,
                outputs=outputs,
                tokens=progress.tokens + self._limits.ahead_tokens(block),
            ),
        )

    def _announce(self, outgoing: Outgoing, now: float) -> None:
        progress = self._port.progress(outgoing.grant.request)
        # It is stopped after one more step. If a step is in flight, the one behind it has it too.
        steps = 2 if progress.in_flight else 1
        in_s = steps * self._port.step_s
        outgoing.announced_at_tokens = progress.settled
        outgoing.announced_until_s = now + in_s + self._limits.near_s
        self._send(outgoing, HandoverAnnounced(migration=outgoing.grant.migration, in_s=in_s))

    def _make_handover(self, outgoing: Outgoing) -> Handover:
        end, blocks, state = self._port.handover_state(outgoing.grant.request, outgoing.done)
        if outgoing.grant.copy == "recompute":
            outgoing.done, end, blocks = 0, 0, [[] for _ in blocks]
        if end > outgoing.done:
            self._port.pin(outgoing.grant.request, outgoing.done, end)
        first, outputs = self._new_outputs(outgoing)
        return Handover(
            migration=outgoing.grant.migration,
            request=outgoing.grant.request,
            source=self._engine,
            address=self._address,
            start=min(outgoing.done, end),
            end=end,
            blocks=blocks,
            first_output=first,
            outputs=outputs,
            state=state,
        )

    def _hand_over(self, outgoing: Outgoing, now: float) -> None:
        assert outgoing.handover is not None
        outgoing.deadline_s = now + self._limits.verdict_again_s
        self._send(outgoing, outgoing.handover)

    def _send_cancel(self, outgoing: Outgoing) -> None:
        self._send(outgoing, CancelMigration(migration=outgoing.grant.migration, why=outgoing.why))

    def _new_outputs(self, outgoing: Outgoing) -> tuple[int, list[int]]:
        first = outgoing.outputs_sent
        outputs = self._port.outputs(outgoing.grant.request, first)
        outgoing.outputs_sent += len(outputs)
        return first, outputs

    def _end(self, outgoing: Outgoing, *, taken: bool, now: float) -> None:
        grant = outgoing.grant
        self._port.unpin(grant.request)
        del self._open[grant.request]
        self._ended[grant.migration] = outgoing.machine
        if len(self._ended) > REMEMBERED_MAX:
            del self._ended[next(iter(self._ended))]
        ended = outgoing.ended(taken=taken, now=now)
        self._out.append(ToFrontend(client=grant.client, message=ended))

    def _send(self, outgoing: Outgoing, message: PeerMessage) -> None:
        to, address = outgoing.grant.destination, outgoing.grant.address
        self._out.append(ToPeer(engine=to, address=address, message=message))
