"""vLLM's own engine core, with its scheduler and KV cache manager, and no model: a step gives every
request one more token, in no time. For what happens between steps."""

import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request

from llumnix.engine.kv.agent import TransferOptions, WorkerAgent
from llumnix.engine.migration.unsupported import WORKER_EXTENSION

BLOCK = 16
TOKEN = 7
"""What every step generates."""


class NoModel(Executor):
    """Answers the engine core in its workers' stead. `core`: set by `engine_core`."""

    core: EngineCore
    layers: dict[str, KVCacheSpec] | None = None  # of the model; None for one that sees all

    def _init_executor(self) -> None:
        self._scheduled: SchedulerOutput | None = None

    def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        answers: dict[str, Any] = {
            "get_kv_cache_spec": self.layers or {"layer": spec},
            "get_supported_kv_cache_layouts": ["LBHNC"],
            "determine_available_memory": 2**30,
            "llumnix_generator": b"",
        }
        if method == "llumnix_hold":
            self.agent.hold(held=args[0])
        if method == "llumnix_open":
            return [self._open(*args)]
        return [answers.get(method)]

    def _open(self, listen: str, key: bytes, options: TransferOptions) -> str:
        blocks = self.cache_config.num_gpu_blocks
        assert blocks is not None
        self.agent = WorkerAgent(
            tensors=[torch.zeros(blocks, 2, BLOCK, 8)],
            blocks=blocks,
            listen=listen.format(rank=0),
            key=key,
            options=options,
        )
        return self.agent.start()

    def compile_or_warm_up_model(self) -> None:
        pass

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        self._scheduled = scheduler_output
        if scheduler_output.total_num_scheduled_tokens:
            return _done(None, non_block)  # `sample_tokens` follows.
        return _done(EMPTY_MODEL_RUNNER_OUTPUT, non_block)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        assert self._scheduled is not None
        names = list(self._scheduled.num_scheduled_tokens)
        known = [self.core.scheduler.requests[name] for name in names]
        tokens = [[TOKEN] if r.num_computed_tokens >= r.num_tokens else [] for r in known]
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: n for n, name in enumerate(names)},
            sampled_token_ids=tokens,
        )
        return _done(output, non_block)

    def check_health(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def _done(value: Any, non_block: bool) -> Any:
    if not non_block:
        return value
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def engine_config(model: Path, *, blocks: int, ahead: bool = False, **args: Any) -> Any:
    """Of an engine core with that many KV blocks. `ahead`: steps are scheduled one ahead, as in
    production."""
    settings: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": BLOCK,
        "max_model_len": min(2048, blocks * BLOCK),
        "max_num_seqs": 8,
        "scheduling_policy": "priority",
        "num_gpu_blocks_override": blocks + 1,  # One is vLLM's placeholder.
        **args,
    }
    config = EngineArgs(**settings).create_engine_config(UsageContext.ENGINE_CONTEXT)
    config.parallel_config.worker_extension_cls = WORKER_EXTENSION
    config.scheduler_config.async_scheduling = ahead
    return config


def engine_core(
    model: Path,
    *,
    blocks: int,
    ahead: bool = False,
    layers: dict[str, KVCacheSpec] | None = None,
    **args: Any,
) -> EngineCore:
    """An engine core of that kind. `layers`: what each keeps."""
    config = engine_config(model, blocks=blocks, ahead=ahead, **args)
    executor = type("NoModelOfLayers", (NoModel,), {"layers": layers})
    core = EngineCore(config, executor, log_stats=False)
    core.model_executor.core = core
    return core


def made(core: EngineCore, name: str, prompt: list[int], tokens: int, **more: Any) -> Request:
    """A request for it."""
    options = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return Request(name, prompt, options, None, block_hasher=core.request_block_hasher, **more)


def add(core: EngineCore, name: str, prompt: list[int], tokens: int, **more: Any) -> Request:
    """A request comes."""
    new = made(core, name, prompt, tokens, **more)
    core.add_request(new)
    return new
