"""The seam of core/migration/port.py on vLLM's engine, one half: requests that move away.

vLLM internals relied on here, beside those of vllm_core.py
(tests/house/test_vllm_migration_contract.py fails when one changes):
- `Scheduler`: `requests`, `running`, `deferred_waiting`, `max_num_active_reqs` (the limit of
  `running`, asked at every admission), `reset_preempted_req_ids` (frees runner V2's slot of a
  request that was taken out), `_inflight_prefills`, `finish_requests` (emits nothing).
- `Request`: `num_computed_tokens` runs ahead by `num_in_flight_tokens`; `num_output_placeholders`
  counts tokens that asynchronous scheduling has not seen yet. With both at 0 the KV of all computed
  tokens is written and all output tokens are known.
- `BlockPool.touch` and `free_blocks` count references.
"""

import time
from itertools import islice
from typing import Any

import msgspec
from vllm.sampling_params import SamplingType
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackEncoder

from llumnix.core.codes import AbortCode
from llumnix.core.limits import WAITING_SHOWN_MAX
from llumnix.core.messages import OFFICE, Blocks
from llumnix.core.migration.port import Movable, Phase, Progress, Refusal
from llumnix.core.types import RequestId
from llumnix.engine.migration.unsupported import request_unsupported
from llumnix.engine.migration.vllm_core import HandoverState, VllmCore
from llumnix.engine.readings import client_priority, waited_s


class VllmSource:
    """The source's half of `EnginePort`, for one engine core. `agents`: of its own workers."""

    def __init__(self, core: VllmCore, agents: list[str]) -> None:
        self._core = core
        self._scheduler = core.scheduler
        self._agents = agents
        self._stopped: set[RequestId] = set()
        self._pins: dict[RequestId, list[Any]] = {}
        self._places: set[RequestId] = set()  # that stopped requests keep in the batch
        self._encoder = MsgpackEncoder()

    def holds(self) -> bool:
        """Whether requests that move away hold blocks."""
        return bool(self._pins or self._stopped)

    def progress(self, request: RequestId) -> Progress:
        known = self._scheduler.requests.get(request)
        if known is None or known.is_finished():
            self._forget(request)
            return Progress(phase=Phase.GONE)
        phase = Phase.RUNNING
        if request in self._stopped:
            phase = Phase.STOPPED
        elif known.status != RequestStatus.RUNNING and not known.num_computed_tokens:
            phase = Phase.WAITING
        return Progress(
            phase=phase,
            settled=max(0, known.num_computed_tokens - known.num_in_flight_tokens),
            in_flight=known.num_in_flight_tokens > 0 or known.num_output_placeholders > 0,
            tokens=known.num_tokens,
            outputs=known.num_output_tokens,
            preemptions=known.num_preemptions,
        )

    def client(self, request: RequestId) -> int:
        known = self._scheduler.requests.get(request)
        return OFFICE if known is None else int(known.client_index)

    def movable(self) -> list[Movable]:
        if self._core.unsupported is not None:
            return []
        waiting = [
            self._movable(r, waiting=True)
            for r in islice(iter(self._scheduler.waiting), WAITING_SHOWN_MAX)
        ]
        return waiting + [self._movable(r, waiting=False) for r in self._scheduler.running]

    def _movable(self, known: Request, *, waiting: bool) -> Movable:
        settled = known.num_computed_tokens - known.num_in_flight_tokens
        prefilling = not waiting and settled + 1 < known.num_tokens
        return Movable(
            request=RequestId(known.request_id),
            priority=client_priority(known),
            tokens=-(-known.num_tokens // self._core.block_tokens) * self._core.block_tokens,
            waiting=waiting,
            busy=prefilling or request_unsupported(known) is not None,
        )

    def describe(self, request: RequestId) -> bytes | Refusal:
        known = self._scheduler.requests[request]
        why = self._core.unsupported or request_unsupported(known)
        if why is not None:
            return Refusal(why=why, code=AbortCode.IMMOVABLE)
        structured = known.structured_output_request
        parts = self._encoder.encode(
            EngineCoreRequest(
                request_id=known.request_id,
                prompt_token_ids=known.prompt_token_ids,
                mm_features=None,
                sampling_params=known.sampling_params,
                pooling_params=None,
                arrival_time=known.arrival_time,
                lora_request=known.lora_request,
                cache_salt=known.cache_salt,
                data_parallel_rank=None,
                client_index=known.client_index,
                priority=client_priority(known),
                trace_headers=known.trace_headers,
                reasoning_ended=structured and structured.llumnix_reasoning_ended,
                reasoning_parser_kwargs=structured and structured.reasoning_parser_kwargs,
                session_id=known.session_id,
                kv_hints=known.kv_hints,
            )
        )
        if len(parts) != 1:
            why = "it carries tensors, which cannot be moved yet"
            return Refusal(why=why, code=AbortCode.IMMOVABLE, for_ever=True)
        return bytes(parts[0])

    def agents(self) -> list[str]:
        return self._agents

    def outputs(self, request: RequestId, first: int) -> list[int]:
        return list(self._scheduler.requests[request].output_token_ids[first:])

    def pin(self, request: RequestId, start: int, end: int) -> Blocks:
        ids, blocks = self._core.blocks(request, start, end)
        pins = self._pins.setdefault(request, [])
        if start and not pins:
            # The blocks before `start` too, so that all are freed together. Otherwise the end of
            # the request could outlive its beginning in the prefix cache.
            blocks = self._core.blocks(request, 0, start)[1] + blocks
        self._core.pool.touch(blocks)
        pins += blocks
        return ids

    def unpin(self, request: RequestId) -> None:
        blocks = self._pins.pop(request, None)
        if blocks:
            self._core.pool.free_blocks(reversed(blocks))

    def stop(self, request: RequestId) -> None:
        known = self._scheduler.requests[request]
        self._stopped.add(request)
        if known in self._scheduler.running:
            self._scheduler.running.remove(known)
            self._keep_place(request)
        else:
            self._scheduler.waiting.remove_requests([known])
            self._scheduler.kv_holding_waiting.remove_requests([known])
            self._scheduler.deferred_waiting.discard(known)
        self._scheduler._inflight_prefills.discard(known)

    def taken_out(self) -> list[Request]:
        """The requests with KV that moves have taken out of the batch."""
        known = map(self._scheduler.requests.get, self._stopped)
        return [r for r in known if r is not None and r.num_computed_tokens]

    def handover_state(self, request: RequestId, start: int) -> tuple[int, Blocks, bytes]:
        known = self._scheduler.requests[request]
        generator = b""
        if known.status == RequestStatus.RUNNING:
            known.status = RequestStatus.PREEMPTED
            self._scheduler.reset_preempted_req_ids.add(request)
            self._give_up_place(request)
        if self._core.runner_v1 and known.num_output_tokens and _is_seeded(known):
            generator = self._core.rpc("llumnix_generator", request)[0]
            if isinstance(generator, str):
                raise RuntimeError(f"its generator's state cannot be read: {generator}")
        computed = known.num_computed_tokens
        ids, _ = self._core.blocks(request, min(start, computed), computed)
        now = time.monotonic()
        state = HandoverState(
            cached=known.prefill_stats and known.prefill_stats.num_cached_tokens,
            preemptions=known.num_preemptions,
            generator=generator,
            waited_s=waited_s(known, now),
            priority=known.priority,
            events=[(int(e.type), now - e.timestamp) for e in known.events],
        )
        return computed, ids, msgspec.msgpack.encode(state)

    def resume(self, request: RequestId) -> None:
        was_stopped = request in self._stopped
        self._forget(request)
        known = self._scheduler.requests.get(request)
        if not was_stopped or known is None or known.is_finished():
            return
        if known.status != RequestStatus.RUNNING:
            self._core.queue(known)
        elif known not in self._scheduler.running:
            self._scheduler.running.append(known)
            if known.is_prefill_chunk:
                self._scheduler._inflight_prefills.add(known)

    def release(self, request: RequestId) -> None:
        self._forget(request)
        self._scheduler.finish_requests(request, RequestStatus.FINISHED_ABORTED)

    def _forget(self, request: RequestId) -> None:
        """The request is not stopped any more."""
        self._stopped.discard(request)
        self._give_up_place(request)

    def _keep_place(self, request: RequestId) -> None:
        """Until its last step has ended, the request may have to go back into the batch, and its
        slot in the workers is taken. No other may be admitted in its place."""
        self._places.add(request)
        self._scheduler.max_num_active_reqs -= 1

    def _give_up_place(self, request: RequestId) -> None:
        if request in self._places:
            self._places.remove(request)
            self._scheduler.max_num_active_reqs += 1


def _is_seeded(request: Request) -> bool:
    params = request.sampling_params
    return params is not None and params.sampling_type == SamplingType.RANDOM_SEED
