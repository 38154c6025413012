"""One engine client over a changing set of engines: vLLM's face of the fleet.

Calls go down only. The client knows the engines (engines/directory.py), which of them owns each
stream (core/streams/table.py), the migrations (streams/migration_records.py) and the line to the
controller. None of these knows it: what follows from an event comes back as effects, which the
client carries out (streams/client.py).

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- A request with `abort_immediately` is aborted as it arrives, and the engine says nothing of it: a
  KV connector is to hear that it is over.
- A request with `resumable` set is a session: every chunk of input ends with a finish reason, and
  a last request without it ends the whole.
"""

import time
from http import HTTPStatus

from vllm.config import VllmConfig
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import SchedulerStats

from llumnix.core.codes import DispatchCode
from llumnix.core.events import Dispatch, InstanceLost, NoInstance, RequestArrived
from llumnix.core.priorities import Priorities
from llumnix.core.settings import SurvivalSettings
from llumnix.core.types import EngineIndex, RequestId
from llumnix.frontend.context import HttpRequest, RefusedError, current_http_request
from llumnix.frontend.controller_link import ControllerLink
from llumnix.frontend.engines.engine import Engine
from llumnix.frontend.engines.late_queries import LateQueries
from llumnix.frontend.engines.sockets import ClientPlace
from llumnix.frontend.grammars import may_only_fail_at_grammar
from llumnix.frontend.prompt_blocks import prompt_blocks
from llumnix.frontend.streams.info import FleetStream, StreamInfo
from llumnix.frontend.streams.look import Placed
from llumnix.frontend.streams.reviving import RevivingClient
from llumnix.observe import metrics
from llumnix.observe.event_log import EventLog
from llumnix.sockets import SocketKeys

STOPPING = "The server is stopping."
PLACED_ALONE = "the frontend placed it by itself, where it had the fewest"
_GATE, _HASH, _DISPATCH, _SEND, _TOTAL = (
    metrics.ROUTING.labels(part) for part in ("gate", "hash", "dispatch", "send", "total")
)
_VIA = {via: metrics.DISPATCH_S.labels(via) for via in ("controller", "self")}


class FleetClient(RevivingClient):
    """vLLM's engine client, over engines that come and go.

    `slots` is how many instances have metrics. `hash_prefixes` says whether the controller's policy
    looks at prefix caches, `policy` is that policy's name."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        place: ClientPlace,
        link: ControllerLink,
        slots: int,
        log: EventLog,
        priorities: Priorities,
        *,
        hash_prefixes: bool = False,
        policy: str = "",
        keys: SocketKeys | None = None,
        survival: SurvivalSettings | None = None,
    ) -> None:
        super().__init__(vllm_config, place, slots, log, keys, survival=survival)
        self.link = link
        self.priorities = priorities
        self._hash_prefixes = hash_prefixes and bool(vllm_config.cache_config.enable_prefix_caching)
        self._late_queries = LateQueries()
        self._log_dropped = 0  # lines that the metrics have
        self._placed = {code: metrics.DISPATCHES.labels(policy, code) for code in DispatchCode}

    def start(self) -> None:
        """Begins to work; call it with the event loop running."""
        self.link.on_look = self._look_at_log
        self.link.start()
        self.listen()

    def _look_at_log(self) -> None:
        """Counts the lines that the event log has lost."""
        dropped = self._log.dropped
        if dropped != self._log_dropped:
            metrics.EVENT_LOG_DROPPED.labels("frontend").inc(max(0, dropped - self._log_dropped))
            self._log_dropped = dropped

    def close(self) -> None:
        """Closes the sockets."""
        if self._greeter is not None:
            self.link.close()
        self.close_sockets()

    # -- engines ---------------------------------------------------------------------------------

    async def lose(
        self,
        engine_index: EngineIndex,
        *,
        blamed: bool = False,
        suspects: frozenset[RequestId] | None = None,
    ) -> int:
        """Takes an engine out, and calls to it fail. Other engines go on with its streams; those
        with which none can end with an error. Returns how many ended. `blamed`: whether a request
        may have caused its end; then it was one of the `suspects`, if any are known."""
        engine = self.take_out(engine_index)
        if engine is None:
            return 0
        self.link.tell(InstanceLost(instance=engine.instance, engine_index=engine_index))
        self.note_death(engine, blamed=blamed, suspects=suspects)
        living = [e.engine_index for e in self.engines.up()]
        effects = self.streams.engine_lost(engine_index, living)
        due: list[EngineCoreOutput] = []
        open_before = len(self.streams)
        self._perform(effects, due)
        ended = open_before - len(self.streams)
        self.migrations.source_lost(engine_index)
        for output in due:
            self._deliver(output)
        # The metrics must show that nothing runs there. The engine cannot report that any more.
        nothing = EngineCoreOutputs(engine_index=engine.slot, scheduler_stats=SchedulerStats())
        self.outputs_queue.put_nowait(nothing)
        return ended

    def in_flight(self, engine_index: EngineIndex) -> int:
        """How many of this frontend's requests the engine owns, or was asked to go on with."""
        asked = (self.streams.get(request) for request in self.orphans.at(engine_index))
        coming = sum(stream is not None and stream.owner is None for stream in asked)
        return self.streams.count(engine_index) + coming

    @property
    def serving(self) -> bool:
        """Whether a request that came now would find an engine."""
        return self.engines.serving

    def ensure_served(self) -> None:
        """Raises if the request at hand would find no engine."""
        try:
            self._check_served()
        except RefusedError as error:
            error.note(current_http_request.get())
            raise

    def _check_served(self) -> None:
        if not self.serving:
            why = (
                "No instance serves at the moment; try again shortly "
                "(GET /llumnix/v1/instances tells why)."
            )
            raise RefusedError("no_instance", why, retry_s=self.engines.next_in_s())

    # -- requests --------------------------------------------------------------------------------

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        known = self.streams.get(RequestId(request.request_id))
        if known is not None:
            await self._continue(known, request)
            return
        if request.abort_immediately:
            await self.send_to(self._place_alone(), request)
            return
        http = current_http_request.get()
        self.check_quarantine(request, http)
        request.priority = self._priority(request.priority, http)
        stream = self.streams.open(
            RequestId(request.request_id),
            self._info(request, http),
            detailed=getattr(request.sampling_params, "num_logprobs", None) is not None,
        )
        self.show_open()
        if http is not None:
            http.part_begins()
        self.keep(stream.info, request)
        try:
            engine = await self.choose(request, 0)
        except BaseException as error:
            if self.streams.get(stream.request) is stream:
                self._close(stream.request, FinishReason.ABORT)
            if isinstance(error, RefusedError):
                error.note(http)
            raise
        if not self.streams.placed(stream, engine.engine_index):
            return  # The request was aborted meanwhile, and its client has been told.
        placed_s = time.monotonic()
        if http is not None:
            http.dispatched(engine.instance)
        await self.send_to(engine, request)
        sent_s, gate_s = time.monotonic(), 0.0 if http is None else http.gate_s
        _GATE.observe(gate_s)
        _SEND.observe(sent_s - placed_s)
        _TOTAL.observe(gate_s + sent_s - stream.info.started_s)

    def _priority(self, number: int, http: HttpRequest | None) -> int:
        """The priority number that the request runs under. `number` is vLLM's own field."""
        if http is None:
            return self.priorities.resolve(number)
        return self.priorities.resolve(
            number, http.priority_class, http.service_tier, http.key, http.cap
        )

    def _info(self, request: EngineCoreRequest, http: HttpRequest | None) -> StreamInfo:
        named = http.client_id if http is not None else None
        return StreamInfo(
            client_id=named or request.external_req_id or request.request_id,
            prompt_tokens=len(request.prompt_token_ids or ()),
            priority=request.priority,
            started_s=time.monotonic(),
            http=http,
            pooling=request.pooling_params is not None,
            session=request.resumable,
            grammar=may_only_fail_at_grammar(request, self.vllm_config),
        )

    async def _continue(self, stream: FleetStream, request: EngineCoreRequest) -> None:
        """Sends a session's next input, or its end, to the engine that has the session."""
        engine = self.engines.get(stream.owner)
        if engine is None:
            raise EngineDeadError()
        if request.resumable:
            stream.info.between_inputs = False
        elif stream.info.between_inputs:
            # The engine will say nothing more, so the stream ends here.
            self._close(stream.request, FinishReason.STOP)
        else:
            stream.info.session = False
        await self.send_to(engine, request)

    async def choose(
        self, request: EngineCoreRequest, outputs: int, *, again: bool = False
    ) -> Engine:
        held = self._late_queries.engine(request.pooling_params, self.engines.by_index)
        if held is not None:
            self.count_dispatch(DispatchCode.PINNED)
            return held
        began_s = time.monotonic()
        prefix = prompt_blocks(request) if self._hash_prefixes else ()
        asked_s = time.monotonic()
        decision = await self.link.place(
            RequestArrived(
                request=RequestId(request.request_id),
                prompt_tokens=len(request.prompt_token_ids or ()) + outputs,
                priority=request.priority,
                prefix=prefix,
                again=again,
            )
        )
        if isinstance(decision, NoInstance) and decision.code != "no_instance":
            self._placed[DispatchCode.NONE].inc()
            raise RefusedError(
                decision.code, f"The server is busy: {decision.why}.", retry_s=decision.retry_s
            )
        engine, why, code = None, PLACED_ALONE, DispatchCode.BYPASS
        if isinstance(decision, Dispatch):
            engine, why, code = self.engines.get(decision.engine_index), decision.why, decision.code
        via = "controller"
        if engine is None or not engine.takes_requests:
            via, why, code = "self", PLACED_ALONE, DispatchCode.BYPASS
            try:
                engine = self._place_alone()
            except RefusedError:
                self.count_dispatch(DispatchCode.NONE)
                raise
        took_s = time.monotonic() - asked_s
        _HASH.observe(asked_s - began_s)
        _DISPATCH.observe(took_s)
        _VIA[via].observe(took_s)
        if not again:
            self.count_dispatch(code)
        stream = self.streams.get(RequestId(request.request_id))
        if stream is not None and (http := stream.info.http) is not None and http.span is not None:
            about = {"request": stream.request, "instance": engine.instance, "via": via}
            code = DispatchCode.REVIVED if again else code
            http.span.placed(asked_s, **about, code=code, why=why)
        return self._note_place(stream, engine, why)

    def count_dispatch(self, code: DispatchCode) -> None:
        self._placed[code].inc()

    def _note_place(self, stream: FleetStream | None, engine: Engine, why: str) -> Engine:
        if stream is not None and not stream.info.why_placed:
            stream.info.why_placed = f"{engine.instance}: {why}"
            self.placements.add(Placed(stream.request, engine.instance, why))
        return engine

    def _place_alone(self) -> Engine:
        """The engine for a request without the controller: the one with the fewest requests of this
        frontend, in turn if several have as few."""
        self._check_served()
        return min(self.engines.in_turn(), key=lambda e: self.streams.count(e.engine_index))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        by_engine: dict[EngineIndex, list[str]] = {}
        for request_id in request_ids:
            for engine_index in self._close(RequestId(request_id), FinishReason.ABORT):
                by_engine.setdefault(engine_index, []).append(request_id)
        for engine_index, mine in by_engine.items():
            await self._abort_at(engine_index, mine)

    async def abort_all(self) -> None:
        """Ends every open stream, as vLLM does when it stops at once."""
        for stream in self.streams:
            slot = self.engines.slot(stream.owner)
            self._close(stream.request, FinishReason.ABORT)
            if stream.info.pooling:  # It has no output that says so.
                self._fail(stream, STOPPING, HTTPStatus.INTERNAL_SERVER_ERROR)
                continue
            last = EngineCoreOutput(stream.request, [], finish_reason=FinishReason.ABORT)
            self.outputs_queue.put_nowait(EngineCoreOutputs(engine_index=slot, outputs=[last]))
