"""What more than one part of the engine's process reads off vLLM's objects.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes, for
steps tests/house/test_vllm_migration_contract.py):
- `scheduler.kv_cache_config` is one worker's: every tensor of it has the `size` in bytes of the
  whole allocation, which `num_blocks` share; `kv_cache_groups[i].kv_cache_spec.block_size`.
- The spec of a group is one of `v1/kv_cache_interface.py`; a Mamba group keeps a block for each of
  its blocks of tokens only in `mamba_cache_mode` "all". `scheduler.block_size` is the least common
  multiple of all groups' block sizes.
- `MultiprocExecutor.workers[i].proc`: each worker's process. The executor of a single worker that
  runs in the engine's own process has no `workers`.
- `KVCacheManager.get_computed_blocks` and `coordinator.get_num_blocks_to_allocate` change nothing.
- `SchedulerOutput`: `total_num_scheduled_tokens`, and by request `num_scheduled_tokens` and, of
  these, `scheduled_spec_decode_tokens`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.kv_cache_interface import (
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    MambaSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request, RequestStatus

from llumnix.core.queue_rules import Wait

ABLE = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
"""A request that waits in one of these could start. In others it waits for something from outside:
the next input of a session, a grammar, a KV transfer."""


def token_bytes(scheduler: Any) -> int:
    """The bytes of one token's KV, over all layers and all of the instance's workers."""
    config = scheduler.kv_cache_config
    # Every tensor is a view of one allocation. A token has its place in a block of each group.
    allocated = max((tensor.size for tensor in config.kv_cache_tensors), default=0)
    block_bytes = allocated // max(1, config.num_blocks)
    groups = (group.kv_cache_spec.block_size for group in config.kv_cache_groups)
    one = sum(block_bytes // tokens for tokens in groups)
    return int(one * scheduler.parallel_config.tensor_parallel_size)


def client_priority(request: Request) -> int:
    """The priority that its client gave a request. vLLM's own number is lower once it has waited
    for long."""
    return int(getattr(request, "llumnix_priority", request.priority))


def has_prompts(batch: Any) -> bool:
    """Whether a step computes prompts (or checks drafts). `batch`: vLLM's `SchedulerOutput`."""
    return bool(batch.total_num_scheduled_tokens > len(batch.num_scheduled_tokens))


def prompt_tokens(batch: Any) -> int:
    """The tokens of prompts that a step computes but for the last of each. `batch`: vLLM's
    `SchedulerOutput`."""
    drafts = sum(map(len, batch.scheduled_spec_decode_tokens.values()))
    return int(batch.total_num_scheduled_tokens - len(batch.num_scheduled_tokens) - drafts)


def worker_pids(executor: Any) -> list[int]:
    """The engine's workers that are processes of their own. `executor`: vLLM's."""
    return [worker.proc.pid for worker in getattr(executor, "workers", ())]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGrowth:
    """How the KV of a request grows."""

    group: int = 0  # the group of layers whose blocks are counted for all
    tokens: int  # of a block there
    blocks: int = 1  # taken in all groups for one there
    whole: bool = True  # no other group takes blocks

    def held(self, blocks: Sequence[Sequence[Any]]) -> int:
        """Those of that group. `blocks`: of a request, by group; none where a model has no KV."""
        return len(blocks[self.group]) if blocks else 0


def kv_growth(scheduler: Any) -> KvGrowth:
    """Of a model with several groups of layers. State that is no longer for a longer request, as of
    Mamba layers, does not grow."""
    groups = scheduler.kv_cache_config.kv_cache_groups
    sizes = {n: g.kv_cache_spec.block_size for n, g in enumerate(groups) if _grows(g)}
    if len(groups) < 2 or not sizes:
        return KvGrowth(tokens=int(scheduler.block_size))  # None at all, if it only embeds.
    group = max(sizes, key=lambda n: sizes[n])
    most = sizes[group]
    return KvGrowth(
        group=group,
        tokens=most,
        blocks=sum(-(-most // size) for size in sizes.values()),
        whole=len(sizes) == len(groups),
    )


def _grows(group: Any) -> bool:
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = spec.first_spec
    if isinstance(spec, MambaSpec):
        return bool(spec.mamba_cache_mode == "all")
    return not isinstance(spec, CrossAttentionSpec | EncoderOnlyAttentionSpec)


def needed_tokens(request: Request, block: int) -> int:
    """The KV tokens, in whole blocks, that a request needs to start or holds while it runs."""
    return -(-int(request.num_tokens) // block) * block


def start_blocks(scheduler: Any, request: Request) -> tuple[int, int]:
    """The free blocks that a request takes which waits without KV, counted as vLLM does when it
    admits it, and how many of its tokens are in the prefix cache."""
    kv = scheduler.kv_cache_manager
    computed, cached, *_ = kv.get_computed_blocks(request)
    blocks = kv.coordinator.get_num_blocks_to_allocate(
        request_id=request.request_id,
        num_tokens=request.num_tokens,
        new_computed_blocks=computed.blocks,
        num_encoder_tokens=0,
        total_computed_tokens=cached,
        num_local_computed_tokens=cached,
        num_tokens_main_model=request.num_tokens,
        apply_admission_cap=True,
        prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
    )
    return blocks, cached


def has_adapter_room(scheduler: Any, lora: LoRARequest | None, others: Iterable[Request]) -> bool:
    """Whether a request with this LoRA adapter may run in a step with these: of their adapters vLLM
    takes `max_loras`, and passes over requests with another one."""
    config = scheduler.lora_config
    if lora is None or config is None:
        return True
    taken = {other.lora_request.lora_int_id for other in others if other.lora_request is not None}
    return lora.lora_int_id in taken or len(taken) < config.max_loras


def waited_s(request: Request, now: float) -> float:
    """How long a request has waited without KV blocks, over all instances. 0 if it runs."""
    waits = waits_since(request)
    if waits is None or request.num_computed_tokens or waits[1] != request.num_preemptions:
        return 0.0
    return max(0.0, now - waits[0])


def came_with(request: Request) -> int:
    """The tokens of answer that a request had when its move here began; 0 if it began here."""
    return int(getattr(request, "llumnix_came_with", 0))


def has_waited(request: Request, seconds: float, now: float) -> None:
    """Notes that a request waited that long on another instance. Before it is queued."""
    request.llumnix_waits = now - seconds, request.num_preemptions


def waits_since(request: Request) -> tuple[float, int] | None:
    """Since when a request waits (seconds), and its preemptions by then."""
    return getattr(request, "llumnix_waits", None)


def head_wait(request: Request) -> Wait | None:
    """How long it has been a head that did not fit, since it was last preempted."""
    wait, preemptions = getattr(request, "llumnix_blocked", (None, 0))
    return wait if preemptions == request.num_preemptions else None
