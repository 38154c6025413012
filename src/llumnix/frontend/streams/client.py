"""The streams of the fleet's client.

The client passes their tokens on, moves their requests, and carries out the effects of
core/streams, which nothing else does.

vLLM internals relied on here (tests/house/test_vllm_contract.py and
test_vllm_migration_contract.py fail when one changes):
- `OutputProcessor` keys on the request id alone, drops outputs of requests that it does not know,
  and turns `FinishReason.ERROR` into an error in OpenAI's format (not that of a pooling request).
- An engine's outputs are sent in order, so a message that an output carries in its
  `kv_transfer_params` stands in one order with that engine's tokens.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from http import HTTPStatus
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.engine.exceptions import EngineDeadError

from llumnix.core.codes import MoveCode
from llumnix.core.messages import (
    IN_BAND,
    DrainRequested,
    MigrationEnded,
    MigrationRequested,
    TookOver,
)
from llumnix.core.streams.effects import (
    Abort,
    AskFate,
    Effect,
    GrantEnded,
    Moved,
    Orphaned,
    TellLost,
)
from llumnix.core.streams.stream import Refusal
from llumnix.core.streams.table import ENGINE_DIED, StreamTable
from llumnix.core.types import EngineIndex, RequestId
from llumnix.errors import ConflictError, UnknownRequestError, UsageError
from llumnix.frontend.engines.calls import EngineCalls
from llumnix.frontend.engines.directory import EngineTarget
from llumnix.frontend.engines.engine import Engine
from llumnix.frontend.engines.outputs import DIED_CODE, QUARANTINED_CODE, FailedRequest
from llumnix.frontend.engines.sockets import ClientPlace
from llumnix.frontend.grammars import BAD_GRAMMAR
from llumnix.frontend.streams.info import FleetStream, FleetStreams, shown
from llumnix.frontend.streams.look import Ended, Placed
from llumnix.frontend.streams.migration_records import Migration, MigrationRecords
from llumnix.observe import metrics
from llumnix.observe.event_log import EventLog
from llumnix.observe.notes import SHORT_KEPT, Ring
from llumnix.sockets import SocketKeys
from llumnix.vllm_seam import SESSION_ENDS, error_of
from llumnix.wire import decode, encode

ENDED_HOW = {DIED_CODE: "lost", QUARANTINED_CODE: "quarantined"}
"""By error code."""
_OPEN = metrics.STREAMS.labels("open")
_ENDED = {
    how: metrics.STREAMS_ENDED.labels(how) for how in (*map(str, FinishReason), *ENDED_HOW.values())
}
GAVE_UP = "llumnix failed at this request. Please send it again."


def died(why: str = "") -> str:
    """What the client of a request reads that did not outlive its engine. `why`: no other goes on
    with it."""
    more = f", and {why}" if why else ""
    return f"The instance that ran this request died{more}. Please send the request again."


class StreamClient(EngineCalls):
    """The part of the fleet's client that has the streams."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        place: ClientPlace,
        slots: int,
        log: EventLog,
        keys: SocketKeys | None = None,
    ) -> None:
        super().__init__(vllm_config, place, slots, keys)
        self.streams: FleetStreams = StreamTable(self.client_index)
        self.migrations = MigrationRecords(log)
        self.on_failed: Callable[[FailedRequest], bool] = lambda failed: True
        self.notes = log.notes
        self.placements: Ring[Placed] = Ring(SHORT_KEPT)
        self.ends: Ring[Ended] = Ring(SHORT_KEPT)
        self.first_token_s: Callable[[RequestId], float | None] = lambda request: None
        self._log = log
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what engines say ------------------------------------------------------------------------

    def receive(self, outputs: EngineCoreOutputs) -> None:
        """Passes on the outputs of each stream's owner, labelled with the instance's slot for the
        metrics."""
        index = EngineIndex(outputs.engine_index)
        engine = self.engines.get(index)
        if engine is None:  # The engine is gone, and its streams have ended.
            outputs.outputs = []
            outputs.scheduler_stats = None
            return
        outputs.engine_index = engine.slot
        engine.clock.translate(outputs, time.monotonic())
        if outputs.outputs:
            outputs.outputs = self._due(index, outputs.outputs)
            self._note_finished(index, outputs.outputs)

    def _due(
        self, engine_index: EngineIndex, outputs: list[EngineCoreOutput]
    ) -> list[EngineCoreOutput]:
        """The outputs that clients get now."""
        due: list[EngineCoreOutput] = []
        receive: Any = self.streams.receive  # It takes vLLM's request id, a plain string.
        for output in outputs:
            try:
                params = output.kv_transfer_params
                if params is not None and IN_BAND in params:
                    self._receive_llumlet(engine_index, params[IN_BAND], due)
                    continue
                tokens = output.new_token_ids
                effects = receive(engine_index, output.request_id, tokens, output, due)
                if effects:
                    self._perform(effects, due)
            except Exception as error:  # noqa: BLE001 - one output must not end other streams
                self.give_up(RequestId(output.request_id), error)
        return due

    def _receive_llumlet(
        self, engine_index: EngineIndex, payload: bytes, due: list[EngineCoreOutput]
    ) -> None:
        match decode(payload):
            case TookOver() as message:
                self.migrations.took_over(message)
                self._perform(self.streams.took_over(engine_index, message), due)
            case MigrationEnded() as message:
                self.migrations.source_ended(message)
                self._perform(self.streams.ended(message), due)
            case MigrationRequested() as message:
                self._migration_wanted(engine_index, message)
            case DrainRequested(why=why):
                self.drain_requested(engine_index, why)

    def _deliver(self, output: EngineCoreOutput) -> None:
        """Passes an output on as if the stream's owner had just sent it."""
        stream = self.streams.get(RequestId(output.request_id))
        if stream is not None and stream.owner is not None:
            slot = self.engines.slot(stream.owner)
            self._note_finished(stream.owner, [output])
            self.outputs_queue.put_nowait(EngineCoreOutputs(engine_index=slot, outputs=[output]))

    def _note_finished(self, index: EngineIndex, outputs: list[EngineCoreOutput]) -> None:
        """Closes the streams that these outputs end."""
        for output in (o for o in outputs if o.finish_reason is not None):
            try:
                self._note_finish(index, output, output.finish_reason)
            except Exception as error:  # noqa: BLE001 - the other outputs must arrive
                self.give_up(RequestId(output.request_id), error)

    def _note_finish(
        self, index: EngineIndex, output: EngineCoreOutput, reason: FinishReason
    ) -> None:
        stream = self.streams.get(RequestId(output.request_id))
        if stream is None:
            return
        begins = stream.info.grammar and stream.outputs <= len(output.new_token_ids)
        if reason is FinishReason.ERROR and begins and error_of(output) is None:
            self._fail(stream, BAD_GRAMMAR, HTTPStatus.BAD_REQUEST)
        if stream.info.session and reason not in SESSION_ENDS:
            stream.info.between_inputs = True
            return
        for other in self._close(stream.request, reason):
            if other != index:  # The request was on its way there.
                self.start_task(self._abort_at(other, [stream.request]))

    # -- migrations ------------------------------------------------------------------------------

    def _migration_wanted(self, engine_index: EngineIndex, message: MigrationRequested) -> None:
        """A source has chosen a request to give away. Orders the move if it is still there.
        If not, or if it is being moved already, the choice lapses."""
        stream = self.streams.get(message.request)
        target = self.engines.target(message.destination)
        if stream is not None and target is not None and stream.owner == engine_index:
            self.start_task(self.migrate(stream, target, wanted=message))

    async def migrate(
        self,
        stream: FleetStream,
        target: EngineTarget,
        copy: str = "staged",
        wanted: MigrationRequested | None = None,
    ) -> Migration:
        """Moves a stream's request to `target`, and returns when the migration has ended. `copy` is
        one of `COPIES` in core/messages.py. `wanted` is the source's message that asked for it;
        None if a user did."""
        source = stream.owner
        order = self.streams.grant(
            stream.request,
            target.engine_index,
            target.address,
            copy,
            wanted=wanted is not None,
        )
        if isinstance(order, Refusal):
            raise _refused(stream, target, order)
        assert source is not None
        migration = self.migrations.began(
            order,
            request_id=stream.info.client_id,
            source=self.engines.name(source),
            source_engine=source,
            destination=target.instance,
            why="a user's order" if wanted is None else wanted.why,
            code=MoveCode.USER if wanted is None else wanted.code,
            span=None if stream.info.http is None else stream.info.http.span,
        )
        try:
            await self.call_engine(source, "llumnix_migrate", encode(order))
        except EngineDeadError:
            pass  # `lose` takes the death in, and with it the end of the migration.
        except Exception as error:  # noqa: BLE001 - vLLM raises a bare Exception for a failed call
            why = f"the source refused the order: {error}"
            self._perform(self.streams.refused(order.migration, why), [])
            self.migrations.refused(order.migration, why)
        await migration.done.wait()
        return migration

    # -- effects ---------------------------------------------------------------------------------

    def _perform(self, effects: Iterable[Effect], due: list[EngineCoreOutput]) -> None:
        """Carries effects out, in order. Outputs that clients get now are added to `due`."""
        for effect in effects:
            try:
                self._perform_one(effect, due)
            except Exception as error:  # noqa: BLE001 - the effects on other requests must follow
                self.give_up(RequestId(getattr(effect, "request", "")), error)

    def _perform_one(self, effect: Effect, due: list[EngineCoreOutput]) -> None:
        match effect:
            case Abort(engine=engine, request=request):
                self.start_task(self._abort_at(engine, [request]))
            case TellLost():
                self.start_task(self._tell_lost(effect))
            case AskFate():
                self.start_task(self._ask_fate(effect))
            case Moved():
                self._moved(effect, due)
            case GrantEnded():
                self.migrations.grant_ended(effect)
            case Orphaned():
                self.orphaned(effect)

    def orphaned(self, orphaned: Orphaned) -> None:
        """No engine runs the request any more."""
        raise NotImplementedError

    def _moved(self, moved: Moved, due: list[EngineCoreOutput]) -> None:
        if moved.missing:
            due.append(EngineCoreOutput(moved.request, list(moved.missing)))
        due += moved.held  # type: ignore[arg-type]

    def _lose(self, request: RequestId) -> None:
        """Ends a stream that has lost something irreplaceable with an engine."""
        self.migrations.lost(request, ENGINE_DIED)
        self.end(request, died(), DIED_CODE)

    async def _tell_lost(self, tell: TellLost) -> None:
        if await self.tell_lost(tell.engine, tell.lost, list(tell.granted)):
            return
        # The source would keep these for ever, as it waits for the dead engine's decision.
        for stream in map(self.streams.of, tell.granted):
            if stream is not None:
                self._lose(stream.request)

    async def _ask_fate(self, ask: AskFate) -> None:
        """The source died, so only the destination can say what became of the request."""
        fate = await self.ask_fate(ask.engine, ask.migration)
        if fate is not None:
            self._perform(self.streams.fate(ask.migration, fate), [])

    def start_task(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs `work` in a task of its own, and logs what it raises."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        # An order that came too late and an engine that is gone are no faults.
        if error is not None and not isinstance(error, UsageError | EngineDeadError):
            self.complaints.note("What was begun beside failed", repr(error), error)

    # -- the ends of streams ---------------------------------------------------------------------

    def end(self, request: RequestId, why: str, code: str | None = None) -> None:
        """Ends a stream with an error, wherever its request is. `why` is what its client reads,
        `code` what its program goes by."""
        stream = self.streams.get(request)
        if stream is None:
            return
        how = ENDED_HOW.get(code or "")
        for engine_index in self._close(request, FinishReason.ERROR, how):
            self.start_task(self._abort_at(engine_index, [request]))
        self._fail(stream, why, HTTPStatus.INTERNAL_SERVER_ERROR, code)

    def give_up(self, request: RequestId, error: Exception) -> None:
        """Ends a request after an exception over a message about it, or over an effect."""
        self.complaints.note("Gave a request up", f"{request}: {error!r}", error)
        try:
            self.migrations.lost(request, f"the frontend failed: {error!r}")
            self.end(request, GAVE_UP)
        except Exception as worse:  # noqa: BLE001 - the rest of the message must be handled
            self.complaints.note("Could not give a request up", f"{request}: {worse!r}", worse)

    def fail(self, failed: FailedRequest) -> EngineCoreOutputs:
        last = EngineCoreOutput(failed.request, [], finish_reason=FinishReason.ERROR)
        ends = self.on_failed(failed)
        return EngineCoreOutputs(engine_index=failed.slot, outputs=[last] if ends else [])

    def _fail(
        self, stream: FleetStream, why: str, status: HTTPStatus, code: str | None = None
    ) -> None:
        slot = self.engines.slot(stream.last_owner)
        if stream.info.http is not None:
            stream.info.http.code = code
        failed = FailedRequest(request=stream.request, slot=slot, why=why, status=status, code=code)
        self.outputs_queue.put_nowait(failed)

    async def send_to(self, engine: Engine, request: EngineCoreRequest) -> None:
        """Sends a request to an engine."""
        request.client_index = self.client_index
        await self._send_input(EngineCoreRequestType.ADD, request, engine.identity)

    async def _abort_at(self, engine_index: EngineIndex, requests: list[str]) -> None:
        if (engine := self.engines.get(engine_index)) is not None:
            await self._send_input(EngineCoreRequestType.ABORT, requests, engine.identity)

    def show_open(self) -> None:
        """Has the metrics show how many streams there are."""
        _OPEN.set(len(self.streams))

    def _close(
        self, request: RequestId, reason: FinishReason, counted: str | None = None
    ) -> list[EngineIndex]:
        """Forgets a stream; returns the engines that may still hold its request. `counted`: how the
        metrics have its end, if not by vLLM's word."""
        closed = self.streams.close(request)
        if closed is None:
            return []
        stream, holders = closed
        _ENDED[counted or str(reason)].inc()
        self.show_open()
        self.migrations.closed(request)
        http = stream.info.http
        if http is not None:
            http.part_ends()
            if http.spend is not None and stream.last_owner is not None:
                http.spend(stream.info.prompt_tokens, stream.outputs)
        if stream.last_owner is not None:
            how, waited_s = str(reason), self.first_token_s(request)
            self.ends.add(Ended(request, how, stream.outputs, waited_s))
            name = self.engines.name(stream.last_owner)
            self._log.request(shown(stream, name, how, waited_s))
        return holders


def _refused(stream: FleetStream, target: EngineTarget, refusal: Refusal) -> UsageError:
    """Why a user's order cannot be given."""
    name = f"request {stream.info.client_id}"
    match refusal:
        case Refusal.THERE:
            return ConflictError(f"{name} is on {target.instance} already")
        case Refusal.NOT_RUNNING:
            return UnknownRequestError(f"{name} has ended")
    return ConflictError(f"{name} {refusal.value}")
