"""What more than one part of the engine's process reads off vLLM's objects.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes, for
steps tests/house/test_vllm_migration_contract.py):
- `scheduler.kv_cache_config` is one worker's: every tensor of it has the `size` in bytes of the
  whole allocation, which `num_blocks` share; `kv_cache_groups[i].kv_cache_spec.block_size`.
- `MultiprocExecutor.workers[i].proc`: each worker's process. The executor of a single worker that
  runs in the engine's own process has no `workers`.
- `SchedulerOutput`: `total_num_scheduled_tokens`, and `num_scheduled_tokens` by request.
"""

from typing import Any

from vllm.v1.request import Request, RequestStatus

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


def worker_pids(executor: Any) -> list[int]:
    """The engine's workers that are processes of their own. `executor`: vLLM's."""
    return [worker.proc.pid for worker in getattr(executor, "workers", ())]
