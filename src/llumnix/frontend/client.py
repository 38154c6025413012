"""One engine client over a changing set of engines.

vLLM 0.32 internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- `AsyncMPClient` binds one ROUTER socket, over which it sends to any engine by ZMQ identity
  (`_send_input(..., engine)`, `_call_utility_async(..., engine)`), and one PULL socket, on which
  outputs arrive with their `engine_index`. Its encoder, decoder and queue are used as they are; its
  constructor, which waits for a fixed set of engines, and its output task are replaced.
- An engine announces itself on the ROUTER socket with its READY payload, at any time, once.
- A request with `abort_immediately` is aborted as it arrives, and the engine says nothing of it: a
  KV connector is to hear that it is over.
- `OutputProcessor` keys on the request id alone, drops outputs of requests that it does not know,
  and turns `FinishReason.ERROR` into an error in OpenAI's format (not that of a pooling request).
- A request with `resumable` set is a session: every chunk of input ends with a finish reason, and
  a last request without it ends the whole.
"""

import asyncio
import time
import weakref
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import zmq
import zmq.asyncio
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.utils.network_utils import make_zmq_socket
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.engine.core_client import BackgroundResources
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from llumnix.core.events import Dispatch, InstanceLost, RequestArrived
from llumnix.core.priorities import Priorities
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.frontend.context import HttpRequest, current_http_request
from llumnix.frontend.controller_link import ControllerLink
from llumnix.frontend.engines.calls import EngineCalls
from llumnix.frontend.engines.engine import Engine
from llumnix.frontend.engines.late_queries import LateQueries
from llumnix.frontend.engines.outputs import Complaints, FailedRequest
from llumnix.frontend.engines.state import EngineState
from llumnix.frontend.grammars import BAD_GRAMMAR, may_only_fail_at_grammar
from llumnix.frontend.migrations import Migrations, Place
from llumnix.frontend.prompt_blocks import prompt_blocks
from llumnix.frontend.streams import Stream, Streams
from llumnix.observe.event_log import EventLog
from llumnix.sockets import Listening, SocketKeys, check_secured

STOPPING = "The server is stopping."


class FleetClient(EngineCalls):
    """vLLM's engine client whose engines come and go."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        addresses: dict[str, str],
        link: ControllerLink,
        slots: int,
        log: EventLog,
        priorities: Priorities,
        *,
        hash_prefixes: bool = False,
        keys: SocketKeys | None = None,
    ) -> None:
        # Stands in for the constructors of MPClient and AsyncMPClient: the same attributes, with
        # the engines left out. The contract test compares the two sets of attributes.
        self.vllm_config = vllm_config
        self._renderer = None
        self._effective_attention_block_sizes: set[int | None] = set()
        self._kv_event_sources = {}
        sync_context = zmq.Context(io_threads=2)
        self.ctx = zmq.asyncio.Context(sync_context)
        self._listening = Listening(sync_context, keys)
        for option, value in self._listening.options().items():
            self.ctx.setsockopt(option, value)
        self.resources = BackgroundResources(ctx=sync_context)
        self._finalizer = weakref.finalize(self, self.resources)
        self.engines_running = False
        self.stats_update_address = None
        self.input_socket = self.resources.input_socket = make_zmq_socket(
            self.ctx, addresses["input_address"], zmq.ROUTER, bind=True
        )
        self.resources.output_socket = make_zmq_socket(
            self.ctx, addresses["output_address"], zmq.PULL
        )
        check_secured(self.input_socket, keys)
        check_secured(self.resources.output_socket, keys)
        self.encoder = MsgpackEncoder()
        self.decoder = MsgpackDecoder(EngineCoreOutputs)
        self.engine_ranks_managed = list(range(slots))
        self.core_engines: list[bytes] = []
        self.core_engine = b""
        self.utility_results: dict[int, asyncio.Future[Any]] = {}
        self.client_count = 1
        self.client_index = 0
        self.outputs_queue: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()
        self._engine_status: dict[int, dict] = {}

        self.priorities = priorities
        caching = vllm_config.cache_config.enable_prefix_caching
        self._hash_prefixes = hash_prefixes and bool(caching)
        self.streams = Streams()
        self._log = log
        self.migrations = Migrations(self.streams, self, log)
        self.complaints = Complaints()
        self.on_failed: Callable[[FailedRequest], bool] = lambda failed: True
        self.on_leave: Callable[[InstanceId, str], None] = lambda instance, why: None
        self._placing: set[str] = set()
        self._engines: dict[EngineIndex, Engine] = {}
        self._slots: dict[InstanceId, int] = {}
        self._link = link
        self._calls: dict[EngineIndex, set[asyncio.Future[Any]]] = {}
        self.told = EngineState()
        self._late_queries = LateQueries()
        self._rotation = 0
        self._greeter: asyncio.Task[None] | None = None

    # -- membership ------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to listen for engines and their outputs; call it with the event loop running."""
        self.loop = asyncio.get_running_loop()
        self._link.start()
        self._ensure_output_queue_task()
        self._greeter = asyncio.create_task(self._greet(), name="llumnix-engine-greeter")

    def close(self) -> None:
        """Closes the sockets."""
        if self._greeter is not None:
            self._greeter.cancel()
            self._link.close()
        self._listening.close()
        self.shutdown()

    def expect(self, instance: InstanceId, engine_index: EngineIndex, slot: int) -> None:
        """Makes an engine known that will announce itself."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._engines[engine_index] = Engine(
            instance=instance, engine_index=engine_index, slot=slot, ready=ready
        )
        self.streams.instances[engine_index] = instance
        self._slots[instance] = slot

    def locate(self, engine_index: EngineIndex, address: str) -> None:
        """Says where the engine's llumlet listens."""
        if (engine := self._engines.get(engine_index)) is not None:
            engine.address = address

    def places(self) -> list[Place]:
        """The engines that take requests, in order of their instances' ids."""
        return [
            Place(instance=e.instance, engine_index=e.engine_index, address=e.address)
            for e in self._takers()
        ]

    def place(self, engine_index: EngineIndex) -> Place | None:
        return next((p for p in self.places() if p.engine_index == engine_index), None)

    def leave_wanted(self, engine_index: EngineIndex, why: str) -> None:
        if (engine := self._engines.get(engine_index)) is not None:
            self.on_leave(engine.instance, why)

    def knows(self, engine_index: EngineIndex) -> bool:
        return engine_index in self._engines

    def name_of(self, engine_index: EngineIndex) -> str:
        engine = self._engines.get(engine_index)
        return engine.instance if engine is not None else f"engine {engine_index}"

    async def connected(self, engine_index: EngineIndex) -> None:
        """Returns once the engine has announced itself."""
        await asyncio.shield(self._engines[engine_index].ready)

    def accept(self, engine_index: EngineIndex, accepting: bool) -> None:
        """Says whether the engine gets new requests from here."""
        if (engine := self._engines.get(engine_index)) is not None:
            engine.accepting = accepting

    async def lose(self, engine_index: EngineIndex) -> int:
        """Takes the engine out: its streams end with an error, calls to it fail. Returns how many
        streams that were."""
        engine = self._engines.pop(engine_index, None)
        if engine is None:
            return 0
        self._refresh()
        self.told.forget(engine_index)
        self.fail_calls(engine_index)
        self._link.tell(InstanceLost(instance=engine.instance, engine_index=engine_index))
        others = [EngineIndex(e.engine_index) for e in self._engines.values() if e.ready.done()]
        lost = self.migrations.engine_lost(engine_index, others, engine.address)
        # Nobody else says that nothing runs there any more.
        nothing = EngineCoreOutputs(engine_index=engine.slot, scheduler_stats=SchedulerStats())
        self.outputs_queue.put_nowait(nothing)
        return lost

    async def abort_at(self, engine_index: EngineIndex, requests: list[str]) -> None:
        if (engine := self._engines.get(engine_index)) is not None:
            await self._send_input(EngineCoreRequestType.ABORT, requests, engine.identity)

    def deliver(self, engine_index: EngineIndex, outputs: list[EngineCoreOutput]) -> None:
        slot = self._engines[engine_index].slot
        self._note_finished(engine_index, outputs)
        self.outputs_queue.put_nowait(EngineCoreOutputs(engine_index=slot, outputs=outputs))

    def end(self, request: RequestId, why: str) -> None:
        stream = self.streams.get(request)
        if stream is None:
            return
        for engine_index in self._close(request, FinishReason.ERROR):
            self.migrations.later(self.abort_at(engine_index, [request]))
        self._fail(stream, why, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _fail(self, stream: Stream, why: str, status: HTTPStatus) -> None:
        slot = self._slots[stream.instance]
        failed = FailedRequest(request=stream.request, slot=slot, why=why, status=status)
        self.outputs_queue.put_nowait(failed)

    def fail(self, failed: FailedRequest) -> EngineCoreOutputs:
        last = EngineCoreOutput(failed.request, [], finish_reason=FinishReason.ERROR)
        ends = self.on_failed(failed)
        return EngineCoreOutputs(engine_index=failed.slot, outputs=[last] if ends else [])

    async def abort_all(self) -> None:
        """Ends every open stream, as vLLM does when it stops at once."""
        for engine in list(self._engines.values()):
            for stream in self.streams.on(engine.engine_index):
                self._close(stream.request, FinishReason.ABORT)
                if stream.pooling:  # It has no output that says so.
                    self._fail(stream, STOPPING, HTTPStatus.INTERNAL_SERVER_ERROR)
                    continue
                last = EngineCoreOutput(stream.request, [], finish_reason=FinishReason.ABORT)
                outputs = EngineCoreOutputs(engine_index=engine.slot, outputs=[last])
                self.outputs_queue.put_nowait(outputs)

    def in_flight(self, engine_index: EngineIndex) -> int:
        """How many of this frontend's requests the engine holds."""
        return self.streams.count(engine_index)

    @property
    def serving(self) -> bool:
        """Whether a request that came now would find an engine."""
        return any(e.takes_requests for e in self._engines.values())

    def ensure_served(self) -> None:
        """Raises if a request that came now would find no engine."""
        if not self.serving:
            raise GracefulHTTPError(
                "No instance serves at the moment; try again shortly "
                "(GET /llumnix/v1/instances tells why).",
                HTTPStatus.SERVICE_UNAVAILABLE,
            )

    @property
    def link(self) -> ControllerLink:
        """The line to the controller."""
        return self._link

    async def _greet(self) -> None:
        while True:
            frames = await self.input_socket.recv_multipart()
            try:
                self._let_in(frames[0], frames[-1])
            except Exception as error:  # noqa: BLE001 - else no engine would be let in any more
                self.complaints.note("An engine announced itself badly", repr(error), error)

    def _let_in(self, identity: bytes, payload: bytes) -> None:
        engine = self._engines.get(EngineIndex(int.from_bytes(identity, "little")))
        if engine is None or engine.ready.done():
            what = "An engine that nobody started announced itself"
            self.complaints.note(what, identity.hex())
            return
        # vLLM adds up the blocks of data-parallel engines; ours come and go, so the
        # configuration that the frontend shows is that of one of them.
        cache_config = self.vllm_config.cache_config
        blocks, cache_config.num_gpu_blocks = cache_config.num_gpu_blocks, None
        try:
            self._apply_ready_response(payload)
        except BaseException:
            cache_config.num_gpu_blocks = blocks
            raise
        engine.ready.set_result(None)
        self._refresh()

    def _refresh(self) -> None:
        """`core_engines`, which vLLM's calls to all engines go by: those that are up."""
        up = [e for e in self._engines.values() if e.ready.done()]
        self.core_engines = [e.identity for e in up]
        self.core_engine = self.core_engines[0] if up else b""

    # -- requests --------------------------------------------------------------------------------

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        known = self.streams.get(request.request_id)
        if known is not None:
            await self._continue(known, request)
            return
        if request.abort_immediately:
            await self._send_to(self._place_alone(), request)
            return
        came_s = time.monotonic()
        http = current_http_request.get()
        request.priority = self._priority(request.priority, http)
        tokens = len(request.prompt_token_ids or ())
        self._placing.add(request.request_id)
        try:
            engine = await self._place(request, tokens)
            if request.request_id not in self._placing:
                return  # Aborted meanwhile; its stream has been told.
        finally:
            self._placing.discard(request.request_id)
        self.streams.open(
            Stream(
                request=RequestId(request.request_id),
                client_id=(http and http.client_id)
                or request.external_req_id
                or request.request_id,
                instance=engine.instance,
                engine_index=engine.engine_index,
                prompt_tokens=tokens,
                priority=request.priority,
                started_s=came_s,
                pooling=request.pooling_params is not None,
                session=request.resumable,
                grammar=may_only_fail_at_grammar(request, self.vllm_config),
                logprobs=getattr(request.sampling_params, "num_logprobs", None) is not None,
                ledger=self.migrations.open(RequestId(request.request_id), engine.engine_index),
            )
        )
        if http is not None:
            http.dispatched(engine.instance)
        await self._send_to(engine, request)

    def _priority(self, number: int, http: HttpRequest | None) -> int:
        """The number that the request runs under; `number`: vLLM's own field."""
        if http is None:
            return self.priorities.resolve(number)
        return self.priorities.resolve(number, http.priority_class, http.service_tier, http.key)

    async def _continue(self, stream: Stream, request: EngineCoreRequest) -> None:
        """A session's next input, or its end, goes where the first went."""
        engine = self._engines[stream.engine_index]
        if request.resumable:
            stream.between_inputs = False
        elif stream.between_inputs:
            # The engine says nothing more.
            self._close(stream.request, FinishReason.STOP)
        else:
            stream.session = False
        await self._send_to(engine, request)

    async def _send_to(self, engine: Engine, request: EngineCoreRequest) -> None:
        request.client_index = self.client_index
        await self._send_input(EngineCoreRequestType.ADD, request, engine.identity)

    async def _place(self, request: EngineCoreRequest, tokens: int) -> Engine:
        """The engine that the request goes to: the controller's choice if it can be had."""
        held = self._late_queries.engine(request.pooling_params, self._engines)
        if held is not None:
            return held
        decision = await self._link.place(
            RequestArrived(
                request=RequestId(request.request_id),
                prompt_tokens=tokens,
                priority=request.priority,
                prefix=prompt_blocks(request) if self._hash_prefixes else (),
            )
        )
        if isinstance(decision, Dispatch):
            engine = self._engines.get(decision.engine_index)
            if engine is not None and engine.takes_requests:
                return engine
        return self._place_alone()

    def _takers(self) -> list[Engine]:
        return sorted((e for e in self._engines.values() if e.takes_requests), key=lambda e: e.slot)

    def _place_alone(self) -> Engine:
        """Without the controller: fewest of this frontend's own requests, then in turn."""
        self.ensure_served()
        engines = self._takers()
        self._rotation += 1
        turn = self._rotation % len(engines)
        in_turn = engines[turn:] + engines[:turn]
        return min(in_turn, key=lambda e: self.streams.count(e.engine_index))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        by_engine: dict[EngineIndex, list[str]] = {}
        for request_id in request_ids:
            self._placing.discard(request_id)
            for engine_index in self._close(request_id, FinishReason.ABORT):
                by_engine.setdefault(engine_index, []).append(request_id)
        for engine_index, mine in by_engine.items():
            await self.abort_at(engine_index, mine)

    def _close(self, request_id: str, reason: FinishReason) -> list[EngineIndex]:
        """Forgets a stream; returns the engines that may still hold its request."""
        stream = self.streams.close(request_id)
        if stream is None:
            return []
        self._log.request(stream.shown(str(reason)))
        return self.migrations.close(RequestId(request_id))

    def receive(self, outputs: EngineCoreOutputs) -> None:
        """Passes on what each stream's owner says, and labels it with the instance's slot for the
        metrics."""
        index = EngineIndex(outputs.engine_index)
        engine = self._engines.get(index)
        if engine is None:  # Said by an engine that is gone: its streams have ended.
            outputs.outputs = []
            outputs.scheduler_stats = None
            return
        outputs.engine_index = engine.slot
        engine.clock.translate(outputs, time.monotonic())
        if outputs.outputs:
            outputs.outputs = self.migrations.hear(index, outputs.outputs)
            self._note_finished(index, outputs.outputs)

    def _note_finished(self, index: EngineIndex, outputs: list[EngineCoreOutput]) -> None:
        """Closes the streams that these outputs end."""
        for output in (o for o in outputs if o.finish_reason is not None):
            try:
                self._note_finish(index, output, output.finish_reason)
            except Exception as error:  # noqa: BLE001 - the other outputs must arrive
                self.migrations.give_up(RequestId(output.request_id), error)

    def _note_finish(
        self, index: EngineIndex, output: EngineCoreOutput, reason: FinishReason
    ) -> None:
        stream = self.streams.get(output.request_id)
        if stream is None:
            return
        begins = stream.grammar and stream.output_tokens <= len(output.new_token_ids)
        if reason is FinishReason.ERROR and begins:
            self._fail(stream, BAD_GRAMMAR, HTTPStatus.BAD_REQUEST)
        if stream.session and reason is not FinishReason.ABORT:
            stream.between_inputs = True
            return
        for other in self._close(output.request_id, reason):
            if other != index:  # It was on its way there.
                self.migrations.later(self.abort_at(other, [output.request_id]))
