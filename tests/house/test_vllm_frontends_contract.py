"""What several frontends rely on inside vLLM, as in test_vllm_contract.py."""

import dataclasses
import inspect

import pytest

pytest.importorskip("vllm")

from vllm import envs
from vllm.config import ParallelConfig
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.api_server import app_state, entry
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.utils import network_utils
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.admission_control import SharedAdmissionStats
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerManager

from llumnix.cluster.frontends.processes import COUNTERS_EACH, NOT_ACCEPTING

from .test_vllm_contract import says, source


def test_several_frontends_are_clients_of_the_same_engines() -> None:
    who = "frontend/engines/sockets.py, frontend/llm.py and http/server.py"
    make = source(network_utils.make_zmq_socket)
    assert "socket.setsockopt(zmq.USE_FD, listener.detach())" in make, who
    made = inspect.signature(AsyncLLM.__init__).parameters
    assert {"client_addresses", "client_count", "client_index"} <= made.keys(), who
    says(AsyncLLM.__init__, 'if client_addresses is not None and "mp_admission_counters"', who=who)
    assert "peer_loads" in inspect.signature(entry.build_and_serve).parameters, who
    assert "client_count" in inspect.signature(StatLoggerManager.__init__).parameters, who


def test_frontends_share_their_counters_by_slot() -> None:
    """cluster/frontends/processes.py clears those of a process that has ended."""
    assert launcher._NOT_ACCEPTING == NOT_ACCEPTING
    assert SharedAdmissionStats.COUNTERS_PER_SLOT == COUNTERS_EACH
    counters = [0] * SharedAdmissionStats.num_counters(2)
    second = SharedAdmissionStats({"mp_admission_counters": counters}, 2, 1)
    second.set_num_requests(3)
    assert counters[COUNTERS_EACH] == 3


def test_statistics_of_a_step_without_outputs_go_to_client_0() -> None:
    says(
        Scheduler.update_from_output,
        "engine_core_outputs[0] = eco = EngineCoreOutputs()",
        "eco.scheduler_stats = stats",
        who="frontend/office/engine_client.py",
    )


def test_adapters_are_listed_in_the_process_that_loads_them() -> None:
    who = "frontend/office/adapters.py"
    load = source(OpenAIServingModels.load_lora_adapter)
    assert "await self.engine_client.add_lora(lora_request)" in load, who
    assert "self.lora_requests[lora_name] = lora_request" in load, who
    unload = source(OpenAIServingModels.unload_lora_adapter)
    assert "del self.lora_requests[lora_name]" in unload, who
    assert "engine_client" not in unload, who
    assert "state.openai_serving_models" in source(app_state.init_app_state), who
    assert LoRARequest.__struct_fields__ == (
        "lora_name", "lora_int_id", "lora_path", "base_model_name", "load_inplace",
        "is_3d_lora_weight",
    ), who  # fmt: skip


def test_what_several_frontends_cannot_do_is_known_by_name() -> None:
    """frontend/checks.py refuses it."""
    assert "enable_store" in source(OpenAIServingResponses.__init__)
    assert hasattr(envs, "VLLM_ENABLE_RESPONSES_API_STORE")
    assert LoRAResolverRegistry.get_supported_resolvers() == set()


def test_a_configuration_says_how_many_frontends_there_are_and_which_has_it() -> None:
    """frontend/arguments.py and frontend/office/process.py set it."""
    names = {f.name for f in dataclasses.fields(ParallelConfig)}
    assert {"_api_process_count", "_api_process_rank"} <= names
    assert "`[0, {self._api_process_count})`" in inspect.getsource(ParallelConfig)
