"""What both halves of the seam (vllm_source.py, vllm_destination.py) ask of vLLM's engine core.

vLLM internals relied on here (tests/house/test_vllm_migration_contract.py fails when one
changes):
- `EngineCore.request_block_hasher` hashes blocks.
- `EngineCore.batch_queue` holds the steps in flight; `model_executor.collective_rpc` calls a method
  of every worker.
- `Scheduler.kv_holding_waiting`: requests that wait with KV blocks. One with status PREEMPTED,
  computed tokens and blocks is scheduled with what is left to compute, which for a decoding request
  is one token: no prefill. `waiting`: those without blocks.
- `Scheduler.prev_step_scheduled_req_ids`: runner V1 wants all tokens of a resumed request that is
  not in it.
- A queue that is first come first served is a deque of its requests, the next to start first.
- `KVCacheManager.get_blocks`, block by block of each group; a block that `is_null` was given up.
- `SamplingParams.extra_args` and `PoolingParams.extra_kwargs` carry anything that msgpack can, and
  the engine looks at no key in them that it does not know.
"""

import logging
from typing import Any

import msgspec
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, RequestQueue
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request, RequestStatus

from llumnix.core.messages import ABSENT, REVIVE, Blocks, Revive
from llumnix.core.types import RequestId
from llumnix.engine.migration.packed_tokens import Prompt
from llumnix.engine.migration.unsupported import engine_unsupported
from llumnix.errors import ProtocolError
from llumnix.wire import decode

logger = logging.getLogger("llumnix.engine")


class HandoverState(msgspec.Struct, frozen=True, kw_only=True):
    """What a handover carries beside tokens and blocks."""

    cached: int | None
    """Prompt tokens that the source found in its prefix cache; None if the client was told."""
    preemptions: int
    generator: bytes
    """State of the request's seeded generator, empty without one."""
    waited_s: float = 0.0
    """How long it has waited without KV."""
    priority: int | None = None
    """The number that it is queued under."""
    events: list[tuple[int, float]] = []
    """What the client's statistics were not told yet: kind, and how many seconds ago. The clocks of
    two hosts have nothing in common, so no time of one is of use to the other."""


class VllmCore:
    """One engine core. Its own thread only."""

    def __init__(self, engine: EngineCore) -> None:
        self.engine = engine
        self.scheduler: Any = engine.scheduler
        self.kv = self.scheduler.kv_cache_manager
        self.pool = self.kv.block_pool
        self.block_tokens: int = self.scheduler.block_size
        self.unsupported = engine_unsupported(engine.vllm_config, self.scheduler)
        self.runner_v1 = not engine.vllm_config.use_v2_model_runner

    def new_request(self, described: EngineCoreRequest) -> Request:
        """The request that came with a move, as vLLM makes one of a client's."""
        if described.prompt_token_ids is not None:
            described.prompt_token_ids = Prompt(described.prompt_token_ids)
        new = Request.from_engine_core_request(described, self.engine.request_block_hasher)
        note_reasoning(new)
        return new

    def blocks(self, request: RequestId, start: int, end: int) -> tuple[Blocks, list[Any]]:
        """The blocks of tokens [start, end) in each group: their ids, and those that are real."""
        ids: Blocks = []
        real: list[Any] = []
        groups = self.scheduler.kv_cache_config.kv_cache_groups
        for group, blocks in zip(groups, self.kv.get_blocks(request).blocks, strict=False):
            size = group.kv_cache_spec.block_size
            chosen = blocks[start // size : -(-end // size)]
            ids.append([ABSENT if b.is_null else b.block_id for b in chosen])
            real += [b for b in chosen if not b.is_null]
        return ids, real

    def queue(self, request: Request) -> None:
        """Queues it with the KV that it has. One that has started goes first."""
        self.scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        if request.num_computed_tokens:
            self.scheduler.kv_holding_waiting.prepend_request(request)
        elif request.num_output_tokens:
            self.scheduler.waiting.prepend_request(request)
        else:
            queue_by_arrival(self.scheduler.waiting, request)

    def steps_in_flight(self) -> list[Any]:
        """The entries of the batch queue."""
        return list(self.engine.batch_queue or ())

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Every worker's answer."""
        answers: list[Any] = self.engine.model_executor.collective_rpc(method, args=args)
        return answers


def take_order(request: Request) -> Revive | None:
    """Takes the frontend's order out of a request that is sent again, since its engine died. What
    its client wrote there itself is dropped."""
    more = _more(request)
    body = more.pop(REVIVE, None) if more else None
    if not isinstance(body, bytes):  # A client's JSON can hold none.
        return None
    try:
        order = decode(body)
    except ProtocolError as error:
        logger.error("Request %s: its order to go on here: %s", request.request_id, error)
        return None
    return order if isinstance(order, Revive) and order.request == request.request_id else None


def is_sent_again(request: Request) -> bool:
    """Whether it has such an order."""
    more = _more(request)
    return bool(more) and isinstance(more.get(REVIVE), bytes)


def _more(request: Request) -> dict[str, Any] | None:
    """What a request carries beside vLLM's own parameters."""
    sampling, pooling = request.sampling_params, request.pooling_params
    return sampling.extra_args if sampling is not None else pooling and pooling.extra_kwargs


def note_reasoning(request: Request) -> None:
    """Of a new request: keeps whether its reasoning had ended before its first token. The engine
    overwrites that, and a destination must start from it."""
    structured = request.structured_output_request
    if structured is not None:
        structured.llumnix_reasoning_ended = structured.reasoning_ended


def queue_by_arrival(queue: RequestQueue, request: Request) -> None:
    """Queues a request that has not started, and that came by a move or stayed after one. Where
    vLLM serves first come first served, it goes behind all that arrived before it, on any
    instance."""
    if not isinstance(queue, FCFSRequestQueue):
        queue.add_request(request)
        return
    at = len(queue)
    while (
        at
        and queue[at - 1].status == RequestStatus.WAITING
        and (queue[at - 1].arrival_time > request.arrival_time)
    ):
        at -= 1
    queue.insert(at, request)
