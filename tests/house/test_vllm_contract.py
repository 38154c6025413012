"""What we rely on inside vLLM: a test that fails names what changed and who relies on it."""

import dataclasses
import inspect
import re
from collections.abc import Iterable
from multiprocessing import process, shared_memory, synchronize
from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

import torch  # noqa: E402
from vllm.config import SchedulerConfig, VllmConfig  # noqa: E402
from vllm.device_allocator.sleep_mode_backend import CuMemBackend  # noqa: E402
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages  # noqa: E402
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat  # noqa: E402
from vllm.entrypoints.openai.models.serving import OpenAIServingModels  # noqa: E402
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses  # noqa: E402
from vllm.entrypoints.serve.exception_handling.error_response import (  # noqa: E402
    create_error_response,
)
from vllm.lora.model_manager import LoRAModelManager  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager  # noqa: E402
from vllm.pooling_params import PoolingParams  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils import network_utils  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.core.block_pool import BlockPool  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.core.sched.output import (  # noqa: E402
    CachedRequestData,
    NewRequestData,
    SchedulerOutput,
)
from vllm.v1.core.sched.request_queue import (  # noqa: E402
    RequestQueue,
    SchedulingPolicy,
    create_request_queue,
)
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.engine import (  # noqa: E402
    EngineCoreEvent,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
    async_llm,
    core,
    core_client,
)
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402
from vllm.v1.engine.core import EngineCoreActor, EngineCoreProc  # noqa: E402
from vllm.v1.engine.core_client import AsyncMPClient, MPClient  # noqa: E402
from vllm.v1.engine.input_processor import InputProcessor  # noqa: E402
from vllm.v1.engine.output_processor import (  # noqa: E402
    OutputProcessor,
    RequestOutputCollector,
    RequestState,
)
from vllm.v1.executor import Executor  # noqa: E402
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc  # noqa: E402
from vllm.v1.executor.uniproc_executor import UniProcExecutor  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    AttentionSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpecKind,
    KVCacheTensor,
    MambaSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.metrics.stats import IterationStats, RequestStateStats  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402
from vllm.v1.worker.worker_base import WorkerWrapperBase  # noqa: E402

from llumnix.engine.queueing import AgingQueue  # noqa: E402
from llumnix.engine.reporting.prefix_reader import RecordingBlockMap  # noqa: E402
from llumnix.frontend.engines.calls import LONG  # noqa: E402
from llumnix.frontend.engines.state import PAUSES  # noqa: E402
from llumnix.frontend.http.stream_ends import ERROR_ITEM  # noqa: E402
from llumnix.versions import SUPPORTED  # noqa: E402
from llumnix.vllm_seam import (  # noqa: E402
    ENDS_MESSAGES_ITSELF,
    SESSION_ENDS,
    V0_33,
    VERSION,
    cli_args,
    error_of,
)
from support.versions import by_version  # noqa: E402


def source(of: object) -> str:
    return inspect.getsource(of)  # type: ignore[arg-type]


def says(of: object, *needles: str, who: str) -> None:
    """Its source has all of these, in this order, however the lines are broken."""
    text, at = " ".join(source(of).split()), 0
    for needle in needles:
        found = text.find(needle, at)
        name = getattr(of, "__qualname__", of)
        assert found >= 0, f"{name}: {needle!r} is gone or moved; {who} relies on it"
        at = found


def busy_loop() -> str:
    """The engine's loop; its decorator hides it from `inspect`."""
    return source(EngineCoreProc).split("def run_busy_loop")[1].split("    def ")[0]


def request(name: str, prompt: Iterable[int] = (1, 2, 3), **fields: Any) -> Any:
    """One of vLLM's, with the hashes of its blocks of 16."""
    kv_cache_utils.init_none_hash(sha256)
    hasher = kv_cache_utils.get_request_block_hasher(16, sha256)
    options = SamplingParams(max_tokens=50)
    return Request(name, list(prompt), options, None, block_hasher=hasher, **fields)


def manager(blocks: int = 10) -> Any:
    """vLLM's KV cache, of that many blocks of 16, one of them its placeholder."""
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    config = KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)]
    )
    return KVCacheManager(config, 256, scheduler_block_size=16, hash_block_size=16)


def test_the_version_is_one_that_was_read() -> None:
    read = {"0.32", "0.33"}
    assert set(SUPPORTED["vllm"]) == read, "read frontend/ and engine/ against the new one first"
    assert vllm.__version__.startswith("{}.{}.".format(*VERSION))


def test_the_client_has_every_attribute_that_vllms_own_sets() -> None:
    """frontend/engines/sockets.py replaces both constructors."""
    from llumnix.frontend.engines.sockets import EngineSockets

    def attributes(cls: type) -> set[str]:
        return set(re.findall(r"self\.(\w+)(?:: [^=\n]+)? = ", source(cls.__init__)))

    stock = attributes(MPClient) | attributes(AsyncMPClient)
    assert stock == attributes(EngineSockets) & stock, stock - attributes(EngineSockets)


def test_the_clients_methods_take_an_engine() -> None:
    for name in ("_send_input", "_call_utility_async"):
        parameters = inspect.signature(getattr(AsyncMPClient, name)).parameters
        assert "engine" in parameters, f"AsyncMPClient.{name} takes no engine (engines/sockets.py)"


def test_every_call_to_one_engine_was_considered() -> None:
    """A method of the client that vLLM adds may need an answer from all engines."""
    ours = {
        "abort_requests_async", "add_lora_async", "add_request_async", "call_utility_all_async",
        "call_utility_async", "call_utility_consensus_async", "collective_rpc_async",
        "compute_weight_checksums_async", "execute_dummy_batch_async", "get_output_async",
        "get_status", "get_supported_tasks_async", "get_weight_version_async", "handle_fault",
        "is_scheduler_paused_async", "is_sleeping_async", "list_loras_async",
        "pause_scheduler_async", "pin_lora_async", "profile_async",
        "release_kv_cache_memory_async", "remove_lora_async", "reset_encoder_cache_async",
        "reset_mm_cache_async", "reset_prefix_cache_async", "resume_scheduler_async",
        "save_sharded_state_async", "set_weight_version_async", "sleep_async", "wake_up_async",
        "_call_utility_async",
    }  # fmt: skip
    ours |= by_version(set(), {"pause_generation_async"})
    found = {n for n, f in vars(AsyncMPClient).items() if inspect.iscoroutinefunction(f)}
    assert found == ours


def test_one_task_reads_what_engines_send_and_one_method_hands_it_on() -> None:
    """frontend/engines/outputs.py replaces both."""
    who = "frontend/engines/outputs.py"
    says(
        AsyncMPClient._ensure_output_queue_task,
        "resources.output_queue_task is not None",
        "await output_socket.recv_multipart(copy=False)",
        "decoder.decode(frames)",
        "outputs.utility_output.call_id == FT_STATUS_CALL_ID",
        "_self._engine_status[outputs.engine_index] = ( outputs.utility_output.result.result )",
        "_process_utility_output( outputs.utility_output, utility_results )",
        "if outputs.outputs or outputs.scheduler_stats: outputs_queue.put_nowait(outputs)",
        "outputs_queue.put_nowait(EngineDeadError())",
        "resources.output_queue_task = asyncio.create_task(",
        who=who,
    )
    says(
        core_client._process_utility_output,
        "future.set_exception(Exception(failure_message))",
        "future.set_result(output.result.result)",
        who=who,
    )
    says(core_client.BackgroundResources.__call__, "self.output_queue_task", who=who)
    handler = AsyncLLM._run_output_handler
    says(
        handler,
        "await engine_core.get_output_async()",
        "output_processor.process_outputs( outputs_slice,",
        "await engine_core.abort_requests_async( processed_outputs.reqs_to_abort )",
        "output_processor.propagate_error(e)",
        who=f"{who}, frontend/output_guard.py",
    )


def test_outputs_are_processed_in_one_pass() -> None:
    text = source(OutputProcessor.process_outputs).split('"""')[2]
    assert re.findall(r"engine_core_outputs\b.*", text) == ["engine_core_outputs:"]
    assert "self.request_states.pop(req_id)" in source(OutputProcessor._finish_request)


def test_a_request_says_how_long_it_waited_for_its_first_token() -> None:
    says(
        IterationStats.update_from_output,
        "req_stats.first_token_latency = first_token_latency",
        who="frontend/llm.py's _first_token_s",
    )
    assert RequestStateStats().first_token_latency == 0.0
    says(RequestState.__init__, "self.stats =", "if log_stats else None", who="frontend/llm.py")


def test_a_consumer_gets_an_exception_and_passes_some_on_as_they_are() -> None:
    who = "frontend/llm.py's RequestLostError"
    says(RequestOutputCollector.put, "isinstance(output, Exception)", who=who)
    says(AsyncLLM.generate, "except (VLLMClientError, GracefulHTTPError", "raise", who=who)


def test_grammars_are_checked_in_one_place_that_can_be_called_elsewhere() -> None:
    """frontend/grammars.py."""
    parameters = list(inspect.signature(SamplingParams._validate_structured_outputs).parameters)
    assert parameters == ["self", "model_config", "structured_outputs_config", "tokenizer"]
    says(SamplingParams.verify, "self._validate_structured_outputs(", who="frontend/grammars.py")
    says(
        InputProcessor._validate_params,
        "params.verify( self.model_config, self.speculative_config, "
        "self.structured_outputs_config, self.tokenizer, )",
        who="frontend/grammars.py",
    )


def test_failed_streams_of_two_routes_end_where_we_say_how() -> None:
    who = "frontend/http/stream_ends.py"
    says(OpenAIServingResponses.create_responses, "self._create_responses(", who=who)
    says(
        OpenAIServingResponses._create_responses, "return self.responses_stream_generator(", who=who
    )
    says(
        OpenAIServingResponses.responses_stream_generator,
        "except GenerationError as e:",
        "error_json = self._convert_generation_error_to_streaming_response(e)",
        "TypeAdapter(StreamingResponsesResponse).validate_json(error_json)",
        who=who,
    )
    converter = AnthropicServingMessages.message_stream_converter
    if ENDS_MESSAGES_ITSELF:
        says(
            converter,
            "if isinstance(origin_chunk, ErrorResponse): raise _StreamError(origin_chunk.error)",
            "if isinstance(e, _StreamError):",
            'AnthropicStreamEvent( type="error",',
            who=who,
        )
        return
    assert "ErrorResponse" not in source(converter), who
    says(
        AnthropicServingMessages.create_messages,
        "return self.message_stream_converter(generator)",
        who=who,
    )
    assert 'f"data: {self._convert_generation_error_to_streaming_response(e)}' in source(
        OpenAIServingChat.chat_completion_stream_generator
    )
    serving = object.__new__(OpenAIServingChat)
    item = f"data: {serving.create_streaming_error_response('x')}"
    assert item.startswith(ERROR_ITEM), who


def test_a_refusal_that_an_engine_explains_reaches_the_client_in_its_words() -> None:
    """frontend/streams/client.py: error_of."""
    fields = EngineCoreOutput.__struct_fields__
    assert ("error" in fields) == (VERSION >= V0_33)
    assert error_of(EngineCoreOutput("r", [], finish_reason=FinishReason.ERROR)) is None
    if VERSION < V0_33:
        return
    from vllm.outputs import RequestError

    said = RequestError(code="engine_paused", message="Paused.", retryable=True)
    output = EngineCoreOutput("r", [], finish_reason=FinishReason.ERROR, error=said)
    assert error_of(output) is said
    assert create_error_response(said.to_exception()).error.code == 503
    says(
        OutputProcessor.process_outputs,
        "error = engine_core_output.error",
        "req_state.queue.put(error.to_exception())",
        who="frontend/streams/client.py",
    )


def test_a_session_of_streamed_inputs_ends_for_these_reasons() -> None:
    """frontend/streams/client.py: SESSION_ENDS."""
    text = " ".join(source(OutputProcessor.process_outputs).split())
    ends = "req_state.streaming_input and ( finish_reason not in (FinishReason.ABORT, FinishReason"
    assert (ends in text) == (FinishReason.ERROR in SESSION_ENDS)
    assert FinishReason.ABORT in SESSION_ENDS


def test_the_watchdog_is_started_by_the_process_and_fed_by_the_loop() -> None:
    """engine/instance.py starts it: `run` is ours."""
    if VERSION < V0_33:
        assert not hasattr(VllmConfig, "watchdog_config")
        return
    from vllm.utils import watch_dog

    who = "engine/instance.py"
    assert "watch_dog" not in source(EngineCoreActor)
    started = 'start_watch_dog(f"engine_{dp_rank}", vllm_config.watchdog_config, logger)'
    says(EngineCoreProc.run_engine_core, started, "engine_core.run_busy_loop()", who=who)
    says(EngineCoreProc._process_engine_step, "get_watch_dog().feed()", who=who)
    waits = "with get_watch_dog().disable(): req = self.input_queue.get(block=block)"
    says(EngineCoreProc._process_input_queue, waits, who=who)
    says(watch_dog.start_watch_dog, "if not watchdog_config.dump_dir: return", who=who)


def test_the_parser_of_the_command_line_is_where_we_look() -> None:
    """frontend/arguments.py."""
    used = ("make_arg_parser", "validate_parsed_serve_args", "propagate_flash_late_interaction")
    assert all(inspect.isfunction(getattr(cli_args(), name)) for name in used)


def test_a_users_pause_is_one_of_the_calls_that_are_told_to_new_engines() -> None:
    """frontend/engines/state.py, and engine/memory_calls.py for who is refused."""
    call = by_version("pause_scheduler", "pause_generation")
    says(AsyncLLM.pause_generation, f"self.engine_core.{call}_async(", who="engines/state.py")
    assert call in PAUSES
    assert call in LONG, "engines/calls.py"
    if VERSION < V0_33:
        return
    who = "engine/memory_calls.py"
    says(
        EngineCoreProc.pause_generation,
        "future = self.pause_scheduler(mode, clear_cache)",
        "self.reject_new_requests = mode != ",
        who=who,
    )
    says(EngineCoreProc.resume_scheduler, "self.reject_new_requests = False", who=who)
    says(
        EngineCoreProc._handle_client_request,
        "or self._reject_add_while_paused(req): return self.add_request(req, request_wave)",
        who=who,
    )


def test_late_interaction_goes_by_the_checksum_of_the_query() -> None:
    from vllm.v1.pool import late_interaction

    says(
        late_interaction.get_late_interaction_engine_index,
        'return zlib.crc32(query_key.encode("utf-8")) % num_engines',
        who="frontend/engines/late_queries.py",
    )


def test_outputs_go_to_the_frontend_whose_request_it_is() -> None:
    who = "engine/instance.py, of a frontend's `client_index`"
    says(
        Scheduler.update_from_output,
        "outputs[request.client_index].append(",
        "outputs[request.client_index].append(",
        "for client_index, outs in outputs.items()",
        "eco := next(iter(engine_core_outputs.values()), None)",
        "engine_core_outputs[0] = eco = EngineCoreOutputs()",
        "eco.scheduler_stats = stats",
        who=who,
    )
    says(
        EngineCoreProc._handle_client_request,
        "client_idx, call_id, method_name, args = request",
        "(client_idx, EngineCoreOutputs(utility_output=out))",
        who="frontend/engines/calls.py",
    )


def test_a_grammar_that_does_not_compile_ends_its_request_with_an_error() -> None:
    says(
        Scheduler.update_from_output,
        *by_version(
            ["error_req_ids = set(self.grammar_compile_error_reqs)"],
            [
                "request_errors = self.grammar_compile_error_reqs",
                "error_req_ids = set(request_errors)",
            ],
        ),
        "self.finish_requests( error_req_ids, RequestStatus.FINISHED_ERROR",
        *by_version([], ["error=request_errors.get(request.request_id)"]),
        who="frontend/streams/client.py's BAD_GRAMMAR",
    )


def test_generators_are_turned_back_after_the_draw_of_the_same_step() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    who = "engine/seeded.py"
    turned = "gen = self.input_batch.generators.get(int(i))"
    says(
        GPUModelRunner._bookkeeping_sync,
        "self.discard_request_mask.np[:num_reqs]",
        turned,
        "gen.set_offset(gen.get_offset() - 4)",
        who=who,
    )
    assert source(GPUModelRunner).count("set_offset(") == 1, who
    says(GPUModelRunner.sample_tokens, "self._sample(", "self._bookkeeping_sync(", who=who)
    says(InputBatch._make_sampling_metadata, "generators=self.generators,", who=who)
    assert not {"_sample", "_bookkeeping_sync"} & set(vars(CPUModelRunner)), who


def test_the_sequences_of_one_request_are_copies_of_it() -> None:
    who = "frontend/prompt_blocks.py"
    says(AsyncLLM.add_request, "request if idx == parent_params.n - 1 else copy(request)", who=who)


def test_a_refused_request_is_added_only_to_be_aborted() -> None:
    who = "frontend/client.py"
    says(AsyncLLM.notify_kv_transfer_request_rejected, "abort_immediately=True", who=who)
    says(core.EngineCore.add_request, "if request.abort_immediately:", who=who)


def test_async_llm_makes_its_client_by_a_name_of_its_module() -> None:
    """frontend/llm.py puts another one there."""
    assert async_llm.EngineCoreClient is core_client.EngineCoreClient
    assert "EngineCoreClient.make_async_mp_client(" in source(AsyncLLM.__init__)
    assert "self.engine_core.engine_ranks_managed" in source(AsyncLLM.__init__)
    assert "self._logger_ref = [self.logger_manager]" in source(AsyncLLM._run_output_handler)


def test_generate_leaves_its_prompt_to_add_request() -> None:
    text = source(AsyncLLM.generate).split('"""')[2]
    assert re.findall(r"\bprompt\b", text) == ["prompt"]
    assert "q = await self.add_request( request_id, prompt, sampling_params," in " ".join(
        text.split()
    )


def test_requests_are_registered_and_sent_in_one_place() -> None:
    text = source(AsyncLLM._add_request)
    assert "output_processor.add_request" in text
    assert "engine_core.add_request_async" in text


def test_an_end_is_logged_in_these_words() -> None:
    who = "cluster/supervision/processes.py"
    says(EngineCoreActor.run, '"EngineCore encountered a fatal error."', who=who)
    says(
        MultiprocExecutor.start_worker_monitor,
        '"Worker proc %s died unexpectedly (exit code: %s), "',
        "proc.exitcode",
        who=who,
    )


def test_shared_memory_is_named_by_python_and_made_after_a_workers_extension_is_there() -> None:
    who = "engine/folders.py"
    assert "name = _make_filename()" in source(shared_memory.SharedMemory.__init__)
    assert not inspect.signature(shared_memory._make_filename).parameters, who
    says(synchronize.SemLock._make_name, "process.current_process()._config['semprefix']", who=who)
    says(process.BaseProcess.__init__, "self._config = _current_process._config.copy()", who=who)
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

    says(ShmRingBuffer.__init__, "SharedMemory( create=True, size=", who=who)
    worker = Path(vllm.__file__).parent / "v1/worker/cpu_worker.py"
    named = 'os.environ["VLLM_DIST_IDENT"] = ( os.path.basename(init_method'
    assert named in " ".join(worker.read_text().split()), who
    text = source(WorkerProc.__init__)
    assert text.index("wrapper.init_worker(") < text.index("self.worker.init_device()"), who
    says(
        WorkerWrapperBase.init_worker, "resolve_obj_by_qualname( parallel_config.worker_ex", who=who
    )


def test_the_workers_are_these_processes() -> None:
    who = "engine/readings.py"
    says(MultiprocExecutor, "self.workers = WorkerProc.wait_for_ready", who=who)
    says(MultiprocExecutor, "[w.proc for w in workers]", who=who)
    assert "self.workers" not in source(UniProcExecutor)


def test_the_engine_actor_is_told_addresses_and_runs_until_asked() -> None:
    parameters = list(inspect.signature(EngineCoreActor.__init__).parameters)
    assert parameters == [
        "self", "vllm_config", "local_client", "addresses", "executor_class", "log_stats",
        "dp_rank", "local_dp_rank",
    ]  # fmt: skip
    assert "engine_index=dp_rank" in source(EngineCoreActor.__init__)
    assert 'identity = self.engine_index.to_bytes(length=2, byteorder="little")' in source(
        EngineCoreProc.__init__
    )
    assert "raise SystemExit" in busy_loop()
    says(
        EngineCoreActor.run,
        "self.run_busy_loop()", "except Exception:", "raise", "finally: self.shutdown()",
        who="engine/instance.py",
    )  # fmt: skip
    says(core.EngineCore.shutdown, "self.model_executor.shutdown()", who="engine/instance.py")


def test_an_engine_cores_sockets_are_made_where_we_give_them_keys() -> None:
    """engine/vllm_sockets.py stands in for `make_zmq_socket` of that module, and sets its context's
    defaults; frontend/engines/sockets.py sets those of its own context."""
    who = "engine/vllm_sockets.py"
    makes = {
        "process_input_sockets": "make_zmq_socket( ctx, input_address, zmq.DEALER,",
        "process_output_sockets": "make_zmq_socket(ctx, output_path, zmq.PUSH,",
    }
    for method, call in makes.items():
        says(getattr(EngineCoreProc, method), "zmq.Context() as ctx", call, who=who)
        assert ".socket(" not in source(getattr(EngineCoreProc, method)), who
    says(
        EngineCoreProc.process_output_sockets,
        "make_zmq_socket(ctx, output_path, zmq.PUSH, linger=4000)",
        "for output_path in output_paths",
        "for socket in sockets: socket.send(output)",
        "while pending and pending[-1][0].done:",
        "self._send_msg_tracking_payload( sockets[client_index], buffers )",
        who=who,
    )
    says(
        EngineCoreProc._send_msg_tracking_payload,
        "tracker = socket.send(buffers[0], more_flag, copy=False, track=True)",
        "socket.send_multipart(buffers[1:], copy=False)",
        who=who,
    )
    assert core.make_zmq_socket is network_utils.make_zmq_socket
    says(network_utils.make_zmq_socket, "socket = ctx.socket(socket_type)", who=who)


def test_what_is_copied_to_engines_elsewhere_is_named_by_vllm() -> None:
    """engine/launch.py goes by both, and keeps what belongs to one host."""
    from vllm.ray.ray_env import get_env_vars_to_copy
    from vllm.v1.executor.ray_utils import WORKER_SPECIFIC_ENV_VARS

    assert {"VLLM_HOST_IP", "VLLM_NIXL_SIDE_CHANNEL_HOST"} <= WORKER_SPECIFIC_ENV_VARS
    assert {"VLLM_PORT", "S3_SECRET_ACCESS_KEY"} <= get_env_vars_to_copy()


def test_the_busy_loop_calls_where_we_listen() -> None:
    """engine/instance.py reads the load in both."""
    assert busy_loop().count("_maybe_publish_request_counts()") == 2
    assert "self._notify_idle_state_callbacks()" in source(EngineCoreProc._process_input_queue)
    assert "self.add_request(req, request_wave)" in source(EngineCoreProc._handle_client_request)
    assert "self.shutdown_state == EngineShutdownState.REQUESTED" in source(
        EngineCoreProc._handle_shutdown
    )


def test_the_scheduler_counts_what_we_report() -> None:
    assert "len(self.running)" in source(Scheduler.get_request_counts)
    assert "null_block" in source(BlockPool.__init__), "one block less is usable than there are"
    assert hasattr(BlockPool, "get_num_free_blocks")
    assert "self.block_size = block_size" in source(Scheduler.__init__)


# -- what is read off the scheduler: engine/reporting/load_reader.py


def test_the_scheduler_knows_every_request_that_is_not_finished() -> None:
    who = "engine/reporting/load_reader.py"
    says(Scheduler.add_request, "self.requests[request.request_id] = request", who=who)
    says(Scheduler._free_blocks, "del self.requests[request.request_id]", who=who)
    says(
        Scheduler.__init__,
        "self.parallel_config = vllm_config.parallel_config",
        "self.requests: dict[str, Request] = {}",
        "self.waiting = create_request_queue(self.policy)",
        "self.kv_holding_waiting = create_request_queue(self.policy)",
        "self.running: list[Request] = []",
        who=who,
    )
    # Who is preempted waits again, and is counted there.
    says(
        Scheduler._preempt_request,
        "request.num_preemptions += 1",
        "self.waiting.prepend_request(request)",
        who=who,
    )


def test_in_a_step_with_a_preemption_nobody_starts() -> None:
    """So every change of who runs and who waits shows in how many do."""
    says(
        Scheduler.schedule,
        "preempted_reqs.append(preempted_req)",
        "if not preempted_reqs and self._pause_state",
        "request_queue = self.waiting",
        who="engine/reporting/load_reader.py's read()",
    )


def test_outputs_and_events_bear_the_engines_monotonic_clock() -> None:
    who = "frontend/engines/clock.py"
    says(EngineCoreOutputs.__post_init__, "self.timestamp = time.monotonic()", who=who)
    says(EngineCoreEvent.new_event, "time.monotonic() if timestamp is None", who=who)
    says(IterationStats.update_from_output, "engine_core_timestamp - req_stats.last_t", who=who)


def test_the_next_in_the_queue_starts_once_all_its_tokens_fit() -> None:
    who = "engine/reporting/load_reader.py's head_tokens"
    fits = "full_sequence_must_fit=self.scheduler_reserve_full_isl"
    says(Scheduler.schedule, "request = request_queue.peek_request()", fits, who=who)
    parameters = inspect.signature(KVCacheManager.allocate_slots).parameters
    assert "full_sequence_must_fit" in parameters, who
    defaults = {f.name: f.default for f in dataclasses.fields(SchedulerConfig)}
    assert defaults["scheduler_reserve_full_isl"] is True, who


def test_a_running_request_can_be_preempted_between_two_steps() -> None:
    who = "engine/urgent.py, engine/migration/vllm_destination.py"
    says(
        Scheduler.reset_prefix_cache,
        "request = self.running.pop()",
        "self._preempt_request(request, timestamp, drop_stale_output=True)",
        "self.prev_step_scheduled_req_ids.clear()",
        who=who,
    )
    says(
        Scheduler.schedule,
        "token_budget = self.max_num_scheduled_tokens",
        "while req_index < len(self.running) and token_budget > 0",
        "drop_stale_output=self.requires_kv_delivery",
        "request_queue = self.kv_holding_waiting",
        "request_queue = self.waiting",
        "num_running = len(self.running) + self.num_waiting_for_streaming_input",
        "if num_running >= self.max_num_active_reqs",
        "ready_to_schedule = self._handle_blocked_waiting_request(request)",
        "if request.num_stale_output_tokens and not request.drop_stale_output:",
        "len(scheduled_loras) == self.lora_config.max_loras",
        "request.lora_request.lora_int_id not in scheduled_loras",
        who=who,
    )
    says(
        KVCacheManager.allocate_slots,
        "if has_scheduled_reqs and request.status in (",
        "watermark_blocks = self.watermark_blocks",
        "full_num_tokens = min(request.num_tokens, self.max_model_len)",
        "apply_admission_cap=True",
        "required_blocks = num_blocks_to_allocate + watermark_blocks",
        who=who,
    )
    cache = manager()
    known = request("r", range(40))
    free = cache.block_pool.get_num_free_blocks()
    computed, cached, *_ = cache.get_computed_blocks(known)
    assert cached == 0
    needed = cache.coordinator.get_num_blocks_to_allocate(
        request_id="r", num_tokens=40, new_computed_blocks=computed.blocks, num_encoder_tokens=0,
        total_computed_tokens=0, num_local_computed_tokens=0, num_tokens_main_model=40,
        apply_admission_cap=True, prefill_end=40,
    )  # fmt: skip
    assert (needed, cache.block_pool.get_num_free_blocks()) == (3, free)


def test_a_prompt_in_chunks_says_so_until_its_last() -> None:
    says(
        Scheduler._update_after_schedule,
        "request.num_computed_tokens += num_scheduled_token",
        "request.is_prefill_chunk = request.num_computed_tokens < (",
        who="engine/reporting/load_reader.py's prefill_tokens",
    )


def test_a_request_that_has_ended_keeps_what_we_count() -> None:
    ours = {"num_tokens", "num_output_tokens", "num_preemptions", "priority", "status"}
    known = request("a")
    known.append_output_token_ids([5, 6])
    known.status = RequestStatus.FINISHED_STOPPED
    assert {n for n in ours if not hasattr(known, n)} == set(), "engine/reporting/load_reader.py"
    assert (known.num_tokens, known.num_output_tokens, known.num_preemptions) == (5, 2, 0)
    for method in (Scheduler._free_request, Scheduler._free_blocks, Scheduler._free_request_blocks):
        assert not re.search(r"request\.(_output|num_|status =)", source(method)), method
    finished = {s.name for s in RequestStatus if RequestStatus.is_finished(s)}
    answered = {"FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_REPETITION"}
    others = {"FINISHED_ABORTED", "FINISHED_IGNORED", "FINISHED_ERROR"}
    assert finished == answered | others, (
        "is the new end an answer? (engine/reporting/load_reader.py)"
    )


def test_blocks_that_only_the_cache_holds_are_free() -> None:
    kv = manager()
    one = request("a", range(64))
    assert kv.allocate_slots(one, 64) is not None
    assert kv.block_pool.get_num_free_blocks() == 10 - 1 - 4, "engine/reporting/load_reader.py"
    kv.free(one)
    assert kv.block_pool.get_num_free_blocks() == 10 - 1, "engine/reporting/load_reader.py"
    assert kv.get_computed_blocks(request("b", range(65)))[1] == 64


def test_all_kv_tensors_are_views_of_one_allocation() -> None:
    """engine/readings.py takes one of their sizes for all."""
    path = Path(vllm.__file__).parent / "v1/worker/utils.py"
    text = " ".join(path.read_text().split())
    assert "sizes = {tensor.size for tensor in kv_cache_config.kv_cache_tensors}" in text
    assert "assert len(sizes) == 1" in text
    assert "size" in KVCacheTensor.__dataclass_fields__
    fields = {*KVCacheConfig.__dataclass_fields__, *KVCacheGroupSpec.__dataclass_fields__}
    assert {"num_blocks", "kv_cache_tensors", "kv_cache_groups", "kv_cache_spec"} <= fields


# -- the queue: engine/queueing.py


def test_waiting_requests_go_by_priority_then_arrival() -> None:
    who = "engine/queueing.py"
    queue = create_request_queue(SchedulingPolicy.PRIORITY)
    made = {n: request(n) for n in "abcd"}
    for at, (known, number) in enumerate(zip(made.values(), (5, 0, 5, 0), strict=True)):
        known.arrival_time, known.priority = float(at), number
        queue.add_request(known)
    assert [r.request_id for r in queue] == ["b", "d", "a", "c"], who
    assert queue.peek_request() is made["b"]
    queue.remove_requests([made["c"]])
    made["c"].llumnix_priority, made["c"].priority = 5, 0  # No __slots__ forbid it.
    queue.add_request(made["c"])
    assert [r.request_id for r in queue] == ["b", "c", "d", "a"], who
    policy = "self.policy = SchedulingPolicy(self.scheduler_config.policy)"
    says(Scheduler.__init__, policy, who=who)
    victim = "max( self.running, key=lambda r: (r.priority, r.arrival_time), )"
    says(Scheduler.schedule, "self.policy == SchedulingPolicy.PRIORITY", victim, who=who)
    says(Scheduler.schedule, "if not preempted_reqs and self._pause_state", who=who)


def test_the_scheduler_knows_its_queue_by_its_methods_alone() -> None:
    """Ours stands in its place."""
    who = "engine/queueing.py"
    text = inspect.getsource(Scheduler)
    used = set(re.findall(r"self\.waiting\.(\w+)", text)) | set(
        re.findall(r"request_queue\.(\w+)", text)
    )
    assert used <= RequestQueue.__abstractmethods__, who
    own = {n for n in RequestQueue.__abstractmethods__ if n in vars(AgingQueue)}
    assert own == RequestQueue.__abstractmethods__, who
    made = "self.waiting = create_request_queue(self.policy)"
    assert text.count("self.waiting = ") == text.count(made) == 1, who
    says(
        Scheduler._preempt_request,
        "request.num_preemptions += 1",
        "self.waiting.prepend_request(request)",
        who=who,
    )
    first = "request_queue = self.kv_holding_waiting if not request_queue"
    says(Scheduler.schedule, first, who=who)


def test_the_scheduler_asks_the_queue_anew_before_each_start() -> None:
    """So a request may pass the head without a change to either's place."""
    who = "engine/queueing.py"
    landed = "self.scheduler.update_from_output( scheduler_output, model_output )"
    for step in (core.EngineCore.step, core.EngineCore.step_with_batch_queue):
        says(step, landed, who=who)
    assert inspect.getsource(Scheduler).count("peek_request(") == 1, who
    says(
        Scheduler.schedule,
        "new_blocks = self.kv_cache_manager.allocate_slots(",
        "request_queue = self.kv_holding_waiting",
        "request = request_queue.peek_request()",
        "has_scheduled_reqs=bool(self.running)",
        "if new_blocks is None:",
        "break",
        "request = request_queue.pop_request()",
        "self.running.append(request)",
        "request.status = RequestStatus.RUNNING",
        who=who,
    )
    text = source(Scheduler.schedule)
    skips = text.split("def skip_request(")[1].split("while token_budget")[0]
    assert "from_queue.pop_request()" in skips, who
    known = request("a")
    known.llumnix_blocked = None, 0  # No __slots__ forbid it.


def test_a_watermark_must_be_free_beside_what_a_waiting_request_needs() -> None:
    who = "engine/queueing.py"
    says(KVCacheManager.__init__, "self.watermark_blocks = int(watermark *", who=who)
    says(
        KVCacheManager.allocate_slots,
        "if has_scheduled_reqs and request.status in ( RequestStatus.WAITING, "
        "RequestStatus.PREEMPTED, ): watermark_blocks = self.watermark_blocks",
        who=who,
    )
    says(Scheduler.__init__, "self.kv_cache_config = kv_cache_config", who=who)
    kv = manager()  # Of nine blocks.
    assert kv.watermark_blocks == 0, who
    running, waits = request("a", range(48)), request("b", range(100, 148))
    assert kv.allocate_slots(running, 48) is not None
    kv.watermark_blocks = 4
    ask = {"full_sequence_must_fit": True, "has_scheduled_reqs": True}
    assert kv.allocate_slots(waits, 48, **ask) is None, who
    running.status = RequestStatus.RUNNING
    running.num_computed_tokens = 48
    kv.watermark_blocks = 99
    assert kv.allocate_slots(running, 1) is not None, who
    kv.watermark_blocks = 2
    assert kv.allocate_slots(waits, 48, **ask) is not None, who


# -- slices: engine/starting/promises.py


def test_what_runs_is_kept_in_order_and_what_ended_is_named_until_the_next_step() -> None:
    who = "engine/starting/promises.py"
    says(
        Scheduler.__init__,
        "self.max_model_len = vllm_config.model_config.max_model_len",
        "self.num_spec_tokens = vllm_config.num_speculative_tokens",
        "self.num_lookahead_tokens = vllm_config.num_lookahead_tokens",
        who=who,
    )
    says(Scheduler._free_request, "self.finished_req_ids.add(request_id)", who=who)
    says(Scheduler._update_after_schedule, "self.finished_req_ids = set()", who=who)
    says(
        Scheduler.schedule,
        "while req_index < len(self.running) and token_budget > 0",
        "request_queue.peek_request()",
        "self.running.append(request)",
        who=who,
    )
    known = request("a")
    assert known.lora_request is None, who
    assert known.num_prompt_tokens == 3, who
    assert known.num_output_tokens == 0, who
    assert known.max_tokens >= 1, who
    known.llumnix_promise = None  # No __slots__ forbid it.


def test_a_session_without_input_has_a_slot_and_its_next_answer_begins_at_none() -> None:
    who = "engine/starting/promises.py"
    says(
        Scheduler.schedule,
        "num_running = len(self.running) + self.num_waiting_for_streaming_input",
        who=who,
    )
    says(
        Scheduler._handle_stopped_request,
        "request.status = RequestStatus.WAITING_FOR_STREAMING_REQ",
        who=who,
    )
    says(
        Scheduler._update_request_as_session,
        "session._output_token_ids.clear()",
        "session.num_prompt_tokens = len(session.prompt_token_ids)",
        who=who,
    )


def test_how_a_groups_blocks_grow_is_told_by_its_spec() -> None:
    who = "engine/readings.py"
    says(kv_cache_utils.resolve_kv_cache_block_sizes, "math.lcm(*group_block_sizes)", who=who)
    modes = {f.name: f.default for f in dataclasses.fields(MambaSpec)}
    assert modes["mamba_cache_mode"] == "none", who
    for spec in (CrossAttentionSpec, EncoderOnlyAttentionSpec):
        assert issubclass(spec, AttentionSpec), who
    assert isinstance(inspect.getattr_static(UniformTypeKVCacheSpecs, "first_spec"), property), who


# -- the prefix cache: engine/reporting/prefix_reader.py


def test_what_enters_and_leaves_the_prefix_cache_goes_through_its_map() -> None:
    kv = manager()
    pool = kv.block_pool
    noted = pool.cached_block_hash_to_block = RecordingBlockMap(pool.cached_block_hash_to_block)
    twins = [request(n, range(40), cache_salt="salt") for n in "ab"]
    for twin in twins:
        assert kv.allocate_slots(twin, 40) is not None
    keys = [kv_cache_utils.make_block_hash_with_group_id(h, 0) for h in twins[0].block_hashes]
    assert len(keys) == 2
    assert [noted.get_one_block(key).ref_cnt for key in keys] == [1, 1]
    assert noted.dropped == []
    twins[0].append_output_token_ids(list(range(40, 48)))
    twins[0].num_computed_tokens = 40
    assert kv.allocate_slots(twins[0], 8) is not None
    keys.append(kv_cache_utils.make_block_hash_with_group_id(twins[0].block_hashes[2], 0))
    assert noted.get_one_block(keys[2]) is not None
    for twin in twins:
        kv.free(twin)
    other = request("c", range(500, 644))
    assert kv.allocate_slots(other, 144) is not None
    assert sorted(noted.dropped) == sorted([*keys, *keys[:2]])
    assert all(noted.get_one_block(key) is None for key in keys)
    kv.free(other)
    assert kv.reset_prefix_cache()
    assert pool.cached_block_hash_to_block is not noted, "engine/reporting/prefix_reader.py"


def test_block_hashes_are_seen_in_the_size_of_a_group() -> None:
    hashes = [b"a", b"b", b"c", b"d"]
    assert kv_cache_utils.resolve_block_hashes(hashes, 16, 16) is hashes
    assert kv_cache_utils.resolve_block_hashes(hashes, 16, 32)[1] == b"d"


def test_what_tells_blocks_apart_is_what_we_name_them_by() -> None:
    """engine/reporting/prefix_reader.py and frontend/client.py: the tokens, adapter and salt, or
    nothing."""
    who = "engine/reporting/prefix_reader.py"
    says(
        kv_cache_utils.generate_block_hash_extra_keys,
        "start_token_idx == 0 and request.cache_salt",
        "lora_extra_keys + mm_extra_keys + cache_salt_keys + prompt_embeds_keys",
        who=who,
    )
    adapter = LoRARequest("adapter", 1, "/nowhere")
    assert adapter.name == adapter.lora_name == "adapter"
    read = {"prompt_token_ids", "lora_request", "cache_salt", "mm_features", "prompt_embeds"}
    assert read <= set(EngineCoreRequest.__struct_fields__), "frontend/client.py"
    assert isinstance(EngineCoreRequest.params, property), "frontend/client.py"
    assert SamplingParams(prompt_logprobs=1).skip_reading_prefix_cache is True
    assert hasattr(PoolingParams(), "skip_reading_prefix_cache")
    assert request("a").skip_reading_prefix_cache is False, who


def test_who_waits_has_computed_nothing() -> None:
    """Unless it came with a move."""
    who = "engine/reporting/load_reader.py"
    assert request("a").num_computed_tokens == 0, who
    says(Scheduler._preempt_request, "request.num_computed_tokens = 0", who=who)


def test_the_groups_of_layers_are_named_by_kind() -> None:
    kv = manager()
    assert kv.kv_cache_event_metadata == (("full_attention", None),)
    (group,) = kv.coordinator.single_type_managers
    assert (group.block_size, group.block_pool) == (16, kv.block_pool)
    assert kv.enable_caching is True
    assert {kind.value for kind in KVCacheSpecKind} == {
        "full_attention", "mla_attention", "sink_full_attention",  # These look at all of a prompt.
        "sliding_window", "sliding_window_mla", "mamba", "chunked_local_attention",
        "encoder_only_attention", "cross_attention", "unknown",
    }, "does the new kind look at the whole prompt? (prefix_reader.py)"  # fmt: skip


def test_an_idle_engine_that_is_woken_looks_around() -> None:
    """engine/instance.py wakes it to have the prefix cache's snapshot told."""
    says(
        EngineCoreProc._process_input_queue,
        "while not self.has_work() and self.is_running():",
        "self._notify_idle_state_callbacks()",
        "req = self.input_queue.get(block=block)",
        who="engine/reporting/prefix_reader.py",
    )
    says(
        EngineCoreProc._handle_client_request,
        "if request_type == EngineCoreRequestType.WAKEUP: return",
        who="engine/reporting/prefix_reader.py",
    )


def test_every_abort_is_carried_out_twice() -> None:
    """engine/instance.py forgets those that came before a request that is sent again."""
    says(
        EngineCoreProc.process_input_sockets,
        "self.aborts_queue.put_nowait(request)",
        "self.input_queue.put_nowait((request_type, request))",
        who="engine/instance.py",
    )
    says(
        EngineCoreProc._process_aborts_queue,
        "while not self.aborts_queue.empty():",
        "ids = self.aborts_queue.get_nowait()",
        "self.abort_requests(request_ids)",
        who="engine/instance.py",
    )


def test_an_engine_that_failed_a_request_ends_its_stream_with_an_error() -> None:
    """Our client says so on behalf of an engine that died."""
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    assert "GenerationError" in source(GenerateBaseServing._raise_if_error)


def test_the_server_shuts_the_engine_client_down_first_and_on_a_thread() -> None:
    from vllm.entrypoints.launchers import launcher

    text = source(launcher.serve_http)
    assert "partial(engine_client.shutdown, timeout=timeout)" in text
    assert text.index("engine_client.shutdown") < text.index("server.should_exit = True")


def test_a_stop_cancels_the_output_handler_after_the_client_is_closed() -> None:
    text = source(AsyncLLM.shutdown)
    assert text.index("engine_core.shutdown(") < text.index("cancel_task_threadsafe(handler)")
    assert "output_processor.propagate_error(e)" in source(AsyncLLM._run_output_handler)


def test_middlewares_are_added_last_and_by_path() -> None:
    from vllm.entrypoints.serve.middleware import register

    text = source(register.init_entrypoints_middleware)
    assert text.rindex("app.add_middleware(imported)") > text.rindex("AuthenticationMiddleware")


def test_prometheus_labels_engines_by_a_fixed_list() -> None:
    """Hence the slots: an instance keeps its label over restarts."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    assert "idx: [model_name, str(idx)] for idx in engine_indexes" in source(
        PrometheusStatLogger.__init__
    )


def test_prometheus_metrics_begin_with_vllm_and_are_made_anew_with_each_logger() -> None:
    from vllm.v1.metrics import prometheus
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    who = "observe/exposition.py"
    says(PrometheusStatLogger.__init__, 'labelnames = ["model_name", "engine"]', who=who)
    says(PrometheusStatLogger.__init__, "unregister_vllm_metrics()", who=who)
    says(prometheus.unregister_vllm_metrics, 'startswith("vllm:")', who=who)


def test_nothing_on_our_sockets_is_unpickled_unless_asked_for() -> None:
    """engine/migration/request_decoder.py does not even then: a request comes from another
    engine."""
    from vllm import envs
    from vllm.v1.serial_utils import MsgpackDecoder

    assert envs.VLLM_ALLOW_INSECURE_SERIALIZATION is False
    who = "engine/migration/request_decoder.py"
    says(MsgpackDecoder.__init__, "ext_hook=self.ext_hook", who=who)
    says(
        MsgpackDecoder.ext_hook,
        "if code == CUSTOM_TYPE_RAW_VIEW: return data",
        "if envs.VLLM_ALLOW_INSECURE_SERIALIZATION:",
        "return pickle.loads(data)",
        who=who,
    )
    assert source(MsgpackDecoder).count("pickle.loads(") == 2, who


def test_the_ready_message_is_what_we_read() -> None:
    assert "input_socket.send(ready_payload)" in source(EngineCoreProc.process_input_sockets)
    assert hasattr(MPClient, "_apply_ready_response")
    assert core.EngineShutdownState.REQUESTED


def test_what_a_start_checks_is_what_the_server_checks_before_it_binds() -> None:
    """frontend/checks.py calls these itself, since the port is ours from the first second on."""
    from vllm.entrypoints.launchers import launcher

    who = "frontend/checks.py"
    plugins = [
        "ToolParserManager.import_tool_parser(args.tool_parser_plugin)",
        "ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)",
    ]
    if VERSION >= V0_33:
        says(launcher.init_parser_plugin, *plugins, who=who)
        plugins = ["init_parser_plugin(args)"]
    says(
        launcher.setup_server,
        *plugins,
        "validate_api_server_args(args)",
        "create_server_socket",
        "set_ulimit()",
        who=who,
    )


def test_shared_memory_that_a_worker_wants_is_what_doctor_asks_for() -> None:
    from vllm import envs
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, ShmRingBuffer

    from llumnix.cluster.ray_runtime import OBJECT_STORE_BYTES
    from llumnix.commands import doctor

    who = "commands/doctor.py"
    sizes = inspect.signature(MessageQueue.__init__).parameters
    assert sizes["max_chunks"].default == doctor.RING_CHUNKS, who
    assert sizes["max_chunk_bytes"].default == doctor.ANSWERS_CHUNK_MB * 2**20, who
    assert envs.environment_variables["VLLM_MQ_MAX_CHUNK_BYTES_MB"]() == doctor.STEPS_CHUNK_MB, who
    says(
        MultiprocExecutor._init_executor,
        "max_chunk_bytes = envs.VLLM_MQ_MAX_CHUNK_BYTES_MB * 1024 * 1024",
        "self.rpc_broadcast_mq = MessageQueue( self.world_size, self.local_world_size,",
        who=who,
    )
    says(WorkerProc._init_message_queues, "self.worker_response_mq = MessageQueue(1, 1)", who=who)
    says(ShmRingBuffer, "check_shm_free_space(self.total_bytes_of_buffer)", who=who)
    assert doctor.OBJECTS_BYTES == OBJECT_STORE_BYTES


def test_an_executor_is_found_by_its_name_alone() -> None:
    who = "frontend/checks.py"
    text = source(Executor.get_class)
    assert text.count("vllm_config") == 2, f"{who} gives it no other part of the configuration"
    says(
        Executor.get_class,
        "parallel_config.distributed_executor_backend",
        "resolve_obj_by_qualname(distributed_executor_backend)",
        who=who,
    )
    assert Executor.uses_ray is False


def test_a_variable_has_torch_compile_nothing_and_the_sampler_is_compiled_otherwise() -> None:
    import torch._dynamo.config as compiling
    from vllm.v1.sample.ops import topk_topp_sampler

    variable = 'disable = os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1"'
    says(compiling, variable, who="launch.py")
    says(topk_topp_sampler, "@torch.compile(", "def compiled_random_sample(", who="launch.py")


def test_the_server_serves_on_a_socket_that_listens_and_says_when() -> None:
    import uvicorn
    from vllm.entrypoints.launchers import launcher
    from vllm.entrypoints.launchers.api_server import entry

    says(entry.build_and_serve, "return await serve_http(", "**uvicorn_kwargs", who="server.py")
    says(launcher.serve_http, "uvicorn.Config(app, **uvicorn_kwargs)", who="server.py")
    idle = "timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
    says(entry.build_and_serve, idle, who="arguments.py")
    assert "callback_notify" in inspect.signature(uvicorn.Config).parameters
    says(uvicorn.Server.on_tick, "await self.config.callback_notify()", who="server.py")
    says(uvicorn.Server.main_loop, "on_tick(counter)", "while not should_exit", who="server.py")


def test_a_chat_template_is_read_by_what_a_start_calls() -> None:
    from vllm.entrypoints.launchers.api_server import app_state

    assert "load_chat_template(args.chat_template)" in source(app_state)


def test_the_file_through_which_workers_meet_has_a_name_that_can_be_changed() -> None:
    from vllm.v1.executor import multiproc_executor, uniproc_executor

    for module in (multiproc_executor, uniproc_executor):
        assert "distributed_init_method = get_file_store_init_method()" in source(module)


def test_a_step_is_launched_where_the_flight_recorder_hears_of_it() -> None:
    """engine/reporting/flight_recorder.py stands in for the executor's method."""
    who = "reporting/flight_recorder.py"
    for step in (core.EngineCore.step, core.EngineCore.step_with_batch_queue):
        says(
            step,
            "scheduler_output = self.scheduler.schedule(",
            "self.model_executor.execute_model( scheduler_output, non_block=True"
            if step is core.EngineCore.step_with_batch_queue
            else "self.model_executor.execute_model(scheduler_output, non_block=True",
            who=who,
        )
        assert source(step).count("model_executor.execute_model(") == 1, who
    says(
        core.EngineCore.step_with_batch_queue,
        "batch_queue.appendleft((future, scheduler_output, exec_future))",
        who=who,
    )
    fields = {f.name for f in dataclasses.fields(SchedulerOutput)}
    assert {
        "scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens",
        "total_num_scheduled_tokens", "scheduled_spec_decode_tokens",
    } <= fields, who  # fmt: skip
    assert "req_id" in {f.name for f in dataclasses.fields(NewRequestData)}, who
    cached = {f.name for f in dataclasses.fields(CachedRequestData)}
    assert {"req_ids", "resumed_req_ids", "num_output_tokens"} <= cached, who
    says(
        Scheduler.schedule,
        "if self.use_v2_model_runner: scheduled_new_reqs.extend(scheduled_resumed_reqs)",
        who=who,
    )
    says(
        Scheduler._make_cached_request_data,
        "if idx >= num_running_reqs: resumed_req_ids.add(req_id)",
        "num_output_tokens.append( req.num_output_tokens + req.num_output_placeholders )",
        who=who,
    )


def test_what_an_engine_is_told_about_standing_still_and_adapters() -> None:
    """frontend/engines/state.py, and engines/calls.py for the errors."""
    who = "engines/state.py"
    calls = (
        "pause_scheduler", "resume_scheduler", "sleep", "wake_up", "release_kv_cache_memory",
        "add_lora", "remove_lora", "pin_lora",
    )  # fmt: skip
    assert [c for c in calls if not callable(getattr(core.EngineCore, c, None))] == []
    says(core.EngineCore.sleep, "self.pause_scheduler(mode=mode", who=who)
    says(CuMemBackend.suspend, "if level == 1:", '"weights"', who=who)
    says(
        core.EngineCore.wake_up,
        "fully_awake = not self.model_executor.is_sleeping",
        "if fully_awake: self.resume_scheduler()",
        "return fully_awake",
        who=who,
    )
    says(AsyncMPClient.wake_up_async, 'call_utility_all_async("wake_up", tags)', who=who)
    for name in ("pause_scheduler", "resume_scheduler", "sleep", "release_kv_cache_memory"):
        says(getattr(AsyncMPClient, f"{name}_async"), f'"{name}"', who=who)
    says(create_error_response, "status_code = exc.http_status", who="engines/calls.py")
    says(
        OpenAIServingModels.unload_lora_adapter,
        "del self.lora_requests[lora_name]",
        'return f"Success',
        who=who,
    )
    says(LoRAModelManager.capacity.fget, "return self.lora_config.max_cpu_loras", who=who)
    says(
        LRUCacheWorkerLoRAManager.add_adapter,
        "len(self._adapter_manager) + 1 > self._adapter_manager.capacity",
        "remove_oldest_adapter()",
        who=who,
    )
