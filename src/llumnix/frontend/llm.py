"""vLLM's AsyncLLM over many engines.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- `AsyncLLM.__init__` gets its engine client from `EngineCoreClient.make_async_mp_client`, looked up
  in its own module; there is no argument to pass one in.
- `AsyncLLM.generate` hands its prompt to `self.add_request` as it is, awaits that first, and does
  nothing else with it.
- `AsyncLLM._add_request` registers and sends a request with `n` = 1 (vLLM takes back by itself what
  it registered for others when sending fails).
- `AsyncLLM.add_request` raises `QueueOverflowError` or `MaxQueuedTokensError`, which are answered
  with 503, if the request would exceed the user's limits of vLLM's own.
- `OutputProcessor.request_states[id].queue` takes an exception for the request's consumer, which
  `generate` passes on as it is if it is a `GracefulHTTPError`; `_finish_request` forgets a request.
- `OutputProcessor.request_states[id].stats.first_token_latency`: seconds until a request's first
  token, 0 before; `stats` is None with --disable-log-stats.
- `logger_manager` is built for a fixed list of engine indexes; `_logger_ref` lets the running
  output handler see a new one (vLLM's elastic scaling uses it so).
- `client_count` and `client_index` say how many processes like this there are, and which this is;
  `client_addresses["mp_admission_counters"]` is an array in which they count their requests.
- `shutdown(timeout)` is called on a thread of its own after the first SIGINT or SIGTERM, before the
  HTTP server is told to stop. It closes the engine client, whose end is a dead engine to the task
  `output_handler`, and cancels that task afterwards. `cancel_task_threadsafe` does so in its loop.
  The task tells open requests of a dead engine by `OutputProcessor.propagate_error`.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import (
    GenerationError,
    GracefulHTTPError,
    MaxQueuedTokensError,
    QueueOverflowError,
    VLLMValidationError,
)
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.async_utils import cancel_task_threadsafe, run_in_loop
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine import async_llm as vllm_async_llm
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor
from vllm.v1.metrics.loggers import StatLoggerManager, load_stat_logger_plugin_factories

from llumnix.core.types import RequestId
from llumnix.frontend.client import FleetClient
from llumnix.frontend.context import current_http_request
from llumnix.frontend.direct import DirectOutputs
from llumnix.frontend.early_add import OutputStream, PendingAdd
from llumnix.frontend.engines.outputs import FailedRequest
from llumnix.frontend.grammars import GrammarChecks
from llumnix.frontend.output_guard import guard
from llumnix.frontend.prompt_blocks import one_request
from llumnix.frontend.streams.client import GAVE_UP
from llumnix.frontend.streams.spans import Tracing
from llumnix.observe.exposition import carried

logger = logging.getLogger("llumnix.frontend")

DRAIN_POLL_S = 0.05
ABORT_TIMEOUT_S = 2.0


class RequestLostError(GenerationError, GracefulHTTPError):
    """No engine runs the request any more.

    vLLM ends a stream with the message of a `GenerationError`, without a traceback. It lets a
    `GracefulHTTPError` pass through `generate` as it is."""

    def __init__(self, why: str, code: str | None = None) -> None:
        Exception.__init__(self, why)
        self.code = code
        self.http_status = self.status_code = HTTPStatus.INTERNAL_SERVER_ERROR


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """The frontends of a deployment, of which this process is one."""

    count: int = 1
    slot: int = 0  # which one, from 0
    admission: Any = None  # vLLM's shared counters of requests, if their number is limited


class FleetLLM(AsyncLLM):
    """The engine client that vLLM's HTTP application talks to."""

    engine_core: FleetClient
    tracing: Tracing | None = None

    def __init__(
        self,
        vllm_config: VllmConfig,
        client: FleetClient,
        *,
        log_stats: bool,
        log_requests: bool,
        aggregate_engine_logging: bool,
        on_stopping: Callable[["FleetLLM"], None],
        beside: Beside | None = None,
        lame_duck_s: float = 0.0,
    ) -> None:
        """`on_stopping` is called once, when a stop begins, on the thread of `shutdown`.
        `lame_duck_s`: for how long requests are let in after that."""
        self.leaving = False  # whether a stop has begun
        self.stopping = False  # whether no more requests are let in
        self.lame_duck_s = lame_duck_s
        self.open_http = 0
        self._on_stopping = on_stopping
        self._stop_now = False
        self._aggregate_logging = aggregate_engine_logging
        client.on_failed = self._fail
        self._beside = beside or Beside()
        admission = self._beside.admission
        with injected_client(client):
            super().__init__(
                vllm_config=vllm_config,
                executor_class=Executor.get_class(vllm_config),
                log_stats=log_stats,
                usage_context=UsageContext.OPENAI_API_SERVER,
                log_requests=log_requests,
                aggregate_engine_logging=aggregate_engine_logging,
                client_addresses=(
                    None if admission is None else {"mp_admission_counters": admission}
                ),
                client_count=self._beside.count,
                client_index=self._beside.slot,
            )
        guard(self.output_processor, self._give_up)
        client.first_token_s = self._first_token_s
        if vllm_config.observability_config.otlp_traces_endpoint is not None:
            self.tracing = Tracing(self.output_processor)
        self._grammars = GrammarChecks(
            vllm_config.model_config,
            vllm_config.structured_outputs_config,
            self.input_processor.tokenizer,
        )

    def generate(  # type: ignore[override]
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As vLLM's, with two differences. The request is added now, not when its outputs are asked
        for. While no instance serves, it is refused now, before a stream begins."""
        self.engine_core.ensure_served()
        if isinstance(prompt, AsyncGenerator):  # A session, whose inputs are still to come.
            return super().generate(prompt, sampling_params, request_id, **kwargs)
        pending = PendingAdd(
            self.add_request(request_id, prompt, sampling_params, **kwargs), self.abort
        )
        return OutputStream(
            super().generate(pending, sampling_params, request_id, **kwargs), pending
        )

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(prompt, PendingAdd):
            return await prompt.outcome()
        await self._grammars.check(params)
        http = current_http_request.get()
        try:
            with one_request():
                outputs = await super().add_request(request_id, prompt, params, *args, **kwargs)
        except (QueueOverflowError, MaxQueuedTokensError):
            if http is not None:
                http.refused("queue_limit")
            raise
        if http is not None and outputs.aggregate:
            http.outputs.append(DirectOutputs.of(outputs))
        return outputs

    async def _add_request(self, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        # The client may hang up while the request is placed. The caller does not know the request
        # yet, so its registration is taken back here.
        try:
            await super()._add_request(request, *args, **kwargs)
        except BaseException:
            await self.abort(request.request_id, internal=True)
            raise

    def _fail(self, failed: FailedRequest) -> bool:
        """Has the request's consumer raise. Returns whether an output must still end the
        request."""
        state = self.output_processor.request_states.get(failed.request)
        if state is None:
            return False
        if state.queue is not None:
            state.queue.put(
                VLLMValidationError(failed.why)
                if failed.status == HTTPStatus.BAD_REQUEST
                else RequestLostError(failed.why, failed.code)
            )
        if state.parent_req is not None:  # The other `n` - 1 sequences have lost their consumer.
            others = self.abort(state.parent_req.request_id, internal=True)
            self.engine_core.start_task(others)
        # No output can end these: pooling has none, and a session goes on after one.
        elif state.detokenizer is None or state.streaming_input:
            self.output_processor.abort_requests([failed.request], internal=True)
        else:
            return True
        return False

    def _first_token_s(self, request: RequestId) -> float | None:
        """How long a running request waited for its first token; None if it has none."""
        state = self.output_processor.request_states.get(request)
        stats = getattr(state, "stats", None)
        return (stats.first_token_latency or None) if stats is not None else None

    def _give_up(self, request: str, error: Exception) -> None:
        """One of its outputs could not be processed."""
        self.engine_core.give_up(RequestId(request), error)
        # If its stream has ended already, nobody else tells the consumer.
        state = self.output_processor.request_states.get(request)
        failed = FailedRequest(request=request, slot=0, why=GAVE_UP)
        if state is not None and self._fail(failed):
            self.output_processor._finish_request(state)

    async def check_health(self) -> None:
        await super().check_health()
        if self.stopping or not self.engine_core.serving:
            raise EngineDeadError()

    def grow_metrics(self, slots: int) -> None:
        """Makes room for the metrics of that many instances. As with vLLM's own elastic scaling the
        counters start anew, and `/metrics` adds what they had counted."""
        if self.logger_manager is None or slots <= len(self.engine_core.engine_ranks_managed):
            return
        carried.keep()
        self.engine_core.engine_ranks_managed = list(range(slots))
        self.logger_manager = StatLoggerManager(
            vllm_config=self.vllm_config,
            engine_idxs=list(range(slots)),
            custom_stat_loggers=load_stat_logger_plugin_factories(),
            aggregate_engine_logging=self._aggregate_logging,
            client_count=self._beside.count,
        )
        if hasattr(self, "_logger_ref"):
            self._logger_ref[0] = self.logger_manager
        self.logger_manager.log_engine_initialized()

    def shutdown(self, timeout: float | None = None) -> None:
        """Lets the open HTTP requests end, at most `timeout` seconds, then closes. Before, it lets
        requests in for `lame_duck_s` more, since load balancers may not have noticed yet.

        vLLM calls it on a thread, with the event loop running on.
        """
        if not self.leaving:
            self.leaving = True
            if self._loop_is_here():
                self.stopping = True
            else:
                self._on_stopping(self)
                self._be_lame_duck()
                self.stopping = True
                self._let_streams_end(timeout or 0)
        handler = getattr(self, "output_handler", None)
        if handler is not None:
            # Before the engine client closes, whose end the task would log as its own failure.
            cancel_task_threadsafe(handler)
            # What did not end in time is told so here, since the task told it when it failed.
            loop, tell = handler.get_loop(), self.output_processor.propagate_error
            run_in_loop(loop, tell, EngineDeadError())
        super().shutdown(timeout=0)
        if self.tracing is not None:
            self.tracing.close()

    def _be_lame_duck(self) -> None:
        """Waits while requests are still let in, but not if none could be served."""
        deadline = time.monotonic() + self.lame_duck_s
        while time.monotonic() < deadline and self.engine_core.serving and not self._stop_now:
            time.sleep(DRAIN_POLL_S)

    def _let_streams_end(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.running() and not self._stop_now and time.monotonic() < deadline:
            time.sleep(DRAIN_POLL_S)
        asyncio.run_coroutine_threadsafe(self.engine_core.abort_all(), self.engine_core.loop)
        # The output handler ends with the engine client, so it must pass on what is queued first.
        deadline = time.monotonic() + ABORT_TIMEOUT_S
        while self.get_num_unfinished_requests() and time.monotonic() < deadline:
            time.sleep(DRAIN_POLL_S)

    def running(self) -> int:
        """How many requests a stop waits for: HTTP requests whose body is here, and requests that
        run on after their answer (`background` of the responses API)."""
        return max(self.open_http, self.get_num_unfinished_requests())

    def stop_now(self) -> None:
        """Ends the wait in `shutdown`."""
        self._stop_now = True

    @staticmethod
    def _loop_is_here() -> bool:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return False
        return True

    # -- what has no meaning over several instances ------------------------------------------------

    async def scale_elastic_ep(self, new_data_parallel_size: int, drain_timeout: int = 300) -> None:
        raise _refused("POST /llumnix/v1/instances and DELETE /llumnix/v1/instances/{id} scale")

    async def init_weight_transfer_engine(self, request: Any) -> None:
        if len(self.engine_core.core_engines) > 1:
            raise _refused(
                "a trainer's weight transfer numbers the workers of one engine; use --instances 1"
            )
        await super().init_weight_transfer_engine(request)

    async def handle_fault(self, fault_tolerance_request: Any) -> Any:
        raise _refused("llumnix restarts instances by itself; see GET /llumnix/v1/instances")


def _refused(why: str) -> ValueError:
    return ValueError(f"Not available over several instances: {why}.")


@contextlib.contextmanager
def injected_client(client: FleetClient) -> Iterator[None]:
    """In this context AsyncLLM's constructor gets `client`, instead of making its own."""

    class Injected:
        @staticmethod
        def make_async_mp_client(**_: Any) -> FleetClient:
            return client

    stock = vllm_async_llm.EngineCoreClient
    vllm_async_llm.EngineCoreClient = Injected  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        vllm_async_llm.EngineCoreClient = stock  # type: ignore[misc]
