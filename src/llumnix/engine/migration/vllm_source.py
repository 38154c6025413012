"""The seam of core/migration/port.py on vLLM's engine: reads and moves requests between two steps.

Everything here happens on the engine core's own thread, so nothing is locked. It touches vLLM's
scheduler from outside; no class of vLLM's is replaced.

vLLM 0.32 internals relied on here (tests/house/test_vllm_migration_contract.py fails when one
changes):
- `Scheduler`: `requests`, `running`, `waiting`, `kv_holding_waiting`, `deferred_waiting`,
  `max_num_active_reqs` (the limit of `running`, asked at every admission),
  `finished_req_ids`, `reset_preempted_req_ids` (frees runner V2's slot of a request that was
  taken out), `prev_step_scheduled_req_ids` (runner V1 wants all tokens of a resumed request that
  is not in it), `_inflight_prefills`, `finish_requests` (emits nothing).
- `pause_state`; with PAUSED_ALL nothing is scheduled. `num_waiting_for_streaming_input` sessions
  wait for their next input in `kv_holding_waiting` and keep their slots. A step that schedules
  nothing is in `batch_queue` too, with `total_num_scheduled_tokens` 0.
- A request in `kv_holding_waiting` with status PREEMPTED, computed tokens and blocks is scheduled
  with what is left to compute, which for a decoding request is one token: no prefill.
- `Request`: `num_computed_tokens` runs ahead by `num_in_flight_tokens`; `num_output_placeholders`
  counts tokens that asynchronous scheduling has not seen yet. With both at 0 the KV of all
  computed tokens is written and all output tokens are known.
- `KVCacheManager`: `get_computed_blocks`, `allocate_slots(delay_cache_blocks=True)`,
  `cache_blocks`, `free`, `get_blocks`; `BlockPool.touch` and `free_blocks` count references.
  Slots ahead are got with `num_new_tokens`, never by raising `num_computed_tokens` past what is
  here: sliding-window groups free blocks by it.
"""

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import msgspec
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackEncoder

from llumnix.core.limits import WAITING_SHOWN_MAX
from llumnix.core.messages import Blocks
from llumnix.core.migration.port import Movable, Phase, Progress, Refusal
from llumnix.core.migration.timing import Pace
from llumnix.core.types import RequestId
from llumnix.engine.kv.agent_client import AgentClient
from llumnix.engine.migration.unsupported import why_request_cannot
from llumnix.engine.migration.vllm_destination import Arrivals, Rest
from llumnix.engine.queueing import waited_s
from llumnix.engine.readings import client_priority, has_prompts

STUCK_STEPS = 3
"""Steps in a row that ran nothing, after which a request that waits with blocks gives them up."""
ABLE = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
"""A request that waits in one of these could start. In others it waits for something from outside:
the next input of a session, a grammar, a KV transfer."""


class VllmPort(Arrivals):
    """Implements `EnginePort` for one engine core; `agents` are its own workers'. `pace` has to be
    told how long its steps take."""

    def __init__(
        self,
        core: EngineCore,
        agents: list[str],
        client: AgentClient,
        pull_failed: Callable[[int, str], None],
    ) -> None:
        super().__init__(core, client, pull_failed)
        self.pace = Pace()
        self._agents = agents
        self._stopped: set[RequestId] = set()
        self._pins: dict[RequestId, list[Any]] = {}
        self._places: set[RequestId] = set()
        self._stuck_steps = 0
        self._encoder = MsgpackEncoder()

    def stepped(self, ran: bool) -> None:
        """A step of the engine has ended. `ran`: whether it ran the model."""
        if ran or not self._deadlocked():
            self._stuck_steps = 0
            return
        self._stuck_steps += 1
        if self._stuck_steps >= STUCK_STEPS:
            self._stuck_steps = 0
            self._relieve()

    @property
    def step_s(self) -> float:
        return self.pace.step_s

    @property
    def prompts_in_flight(self) -> bool:
        return any(has_prompts(batch) for _, batch, _ in self._core.batch_queue or ())

    # -- source

    def movable(self) -> list[Movable]:
        if self._never is not None:
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
            tokens=-(-known.num_tokens // self.block_tokens) * self.block_tokens,
            waiting=waiting,
            busy=prefilling or why_request_cannot(known) is not None,
        )

    def describe(self, request: RequestId) -> bytes | Refusal:
        known = self._scheduler.requests[request]
        why = self._never or why_request_cannot(known)
        if why is not None:
            return Refusal(why=why)
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
            return Refusal(why="it carries tensors, which cannot be moved yet", for_ever=True)
        return bytes(parts[0])

    def agents(self) -> list[str]:
        return self._agents

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

    def outputs(self, request: RequestId, first: int) -> list[int]:
        return list(self._scheduler.requests[request].output_token_ids[first:])

    def pin(self, request: RequestId, start: int, end: int) -> Blocks:
        ids, blocks = self._blocks(request, start, end)
        pins = self._pins.setdefault(request, [])
        if start and not pins:
            # Those before them too, so that all are freed together: else the end of the request
            # could outlive its beginning in the prefix cache.
            blocks = self._blocks(request, 0, start)[1] + blocks
        self._pool.touch(blocks)
        pins += blocks
        return ids

    def unpin(self, request: RequestId) -> None:
        blocks = self._pins.pop(request, None)
        if blocks:
            self._pool.free_blocks(reversed(blocks))

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
        """Requests with KV that moves have taken out of the batch."""
        known = map(self._scheduler.requests.get, self._stopped)
        return [r for r in known if r is not None and r.num_computed_tokens]

    def rest(self, request: RequestId, start: int) -> tuple[int, Blocks, bytes]:
        known = self._scheduler.requests[request]
        generator = b""
        if known.status == RequestStatus.RUNNING:
            known.status = RequestStatus.PREEMPTED
            self._scheduler.reset_preempted_req_ids.add(request)
            self._give_up_place(request)
        if self._v1 and known.num_output_tokens and _is_seeded(known):
            generator = self._rpc("llumnix_generator", request)[0]
            if isinstance(generator, str):
                raise RuntimeError(f"its generator's state cannot be read: {generator}")
        computed = known.num_computed_tokens
        ids, _ = self._blocks(request, min(start, computed), computed)
        now = time.monotonic()
        rest = Rest(
            cached=known.prefill_stats and known.prefill_stats.num_cached_tokens,
            preemptions=known.num_preemptions,
            generator=generator,
            waited_s=waited_s(known, now),
            priority=known.priority,
            events=[(int(e.type), now - e.timestamp) for e in known.events],
        )
        return computed, ids, msgspec.msgpack.encode(rest)

    def resume(self, request: RequestId) -> None:
        was_stopped = request in self._stopped
        self._forget(request)
        known = self._scheduler.requests.get(request)
        if not was_stopped or known is None or known.is_finished():
            return
        if known.status != RequestStatus.RUNNING:
            self._queue(known)
        elif known not in self._scheduler.running:
            self._scheduler.running.append(known)

    def release(self, request: RequestId) -> None:
        self._forget(request)
        self._scheduler.finish_requests(request, RequestStatus.FINISHED_ABORTED)

    def _forget(self, request: RequestId) -> None:
        """It is not stopped any more."""
        self._stopped.discard(request)
        self._give_up_place(request)

    def _keep_place(self, request: RequestId) -> None:
        """Until its last step is home the request may have to go back into the batch, and its
        worker's slot is taken: nobody may be admitted in its stead."""
        self._places.add(request)
        self._scheduler.max_num_active_reqs -= 1

    def _give_up_place(self, request: RequestId) -> None:
        if request in self._places:
            self._places.remove(request)
            self._scheduler.max_num_active_reqs += 1

    def _deadlocked(self) -> bool:
        """Whether nothing runs because requests that wait hold the KV memory that each of them
        lacks."""
        scheduler = self._scheduler
        flying = any(b.total_num_scheduled_tokens for _, b, _ in self._core.batch_queue or ())
        if flying or scheduler.running or scheduler.pause_state == PauseState.PAUSED_ALL:
            return False
        if scheduler.num_waiting_for_streaming_input >= scheduler.max_num_active_reqs:
            return False  # Sessions have all slots.
        able = sum(r.status in ABLE for r in scheduler.kv_holding_waiting)
        # What moves hold comes back by itself, and one alone gains nothing if it gives up its own.
        return able > 1 or (able == 1 and not (self._arriving or self._pins or self._stopped))

    def _relieve(self) -> None:
        """Requests that wait with blocks in their hands cannot be preempted by each other: the last
        gives its blocks up, as vLLM's own preemption would make it."""
        holding = self._scheduler.kv_holding_waiting
        self._give_up([r for r in holding if r.status in ABLE][-1])

    def give_up_blocks(self) -> None:
        """All requests that wait with blocks, since they have just come or come back, go on waiting
        without: vLLM preempts only those that run."""
        holding = self._scheduler.kv_holding_waiting
        for request in reversed([r for r in holding if r.status in ABLE]):
            self._give_up(request)

    def _give_up(self, request: Request) -> None:
        self._scheduler.kv_holding_waiting.remove_requests([request])
        self._kv.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._scheduler.waiting.prepend_request(request)


def _is_seeded(request: Request) -> bool:
    params = request.sampling_params
    return params is not None and params.sampling_type == SamplingType.RANDOM_SEED
