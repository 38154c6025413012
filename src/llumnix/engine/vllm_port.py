"""The seam of core/port.py on vLLM's engine: reads and moves requests between two steps.

Everything here happens on the engine core's own thread, so nothing is locked. It touches vLLM's
scheduler from outside; no class of vLLM's is replaced.

vLLM 0.32 internals relied on here (tests/house/test_vllm_migration_contract.py fails when one
changes):
- `Scheduler`: `requests`, `running`, `waiting`, `kv_holding_waiting`, `deferred_waiting`,
  `finished_req_ids`, `reset_preempted_req_ids` (frees runner V2's slot of a request that was
  taken out), `prev_step_scheduled_req_ids` (runner V1 wants all tokens of a resumed request that
  is not in it), `_inflight_prefills`, `finish_requests` (emits nothing).
- A request in `kv_holding_waiting` with status PREEMPTED, computed tokens and blocks is scheduled
  with what is left to compute, which for a decoding request is one token: no prefill.
- `Request`: `num_computed_tokens` runs ahead by `num_in_flight_tokens`; `num_output_placeholders`
  counts tokens that asynchronous scheduling has not seen yet. With both at 0 the KV of all
  computed tokens is written and all output tokens are known.
- `KVCacheManager`: `get_computed_blocks`, `allocate_slots(delay_cache_blocks=True)`,
  `cache_blocks`, `free`, `get_blocks`; `BlockPool.touch` and `free_blocks` count references.
  Slots ahead are got with `num_new_tokens`, never by raising `num_computed_tokens` past what is
  here: sliding-window groups free blocks by it.
- `EngineCore.batch_queue` holds the steps in flight, `request_block_hasher` hashes blocks.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec
from vllm.sampling_params import SamplingType
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from llumnix.core.messages import Blocks
from llumnix.core.port import Phase, Progress, Refusal
from llumnix.core.types import EngineIndex, RequestId
from llumnix.engine.immovable import why_engine_cannot, why_request_cannot
from llumnix.engine.transfer_client import AgentClient
from llumnix.engine.worker import RunnerState

ABSENT = -1
STUCK_STEPS = 3
"""Steps without anything running after which a request that waits with blocks gives them up."""


class Rest(msgspec.Struct, frozen=True, kw_only=True):
    """What a handover carries beside tokens and blocks. `told`: the statistics of its prefill were
    sent to the client."""

    told: bool
    preemptions: int
    generator: bytes


@dataclass(slots=True, kw_only=True)
class Arriving:
    """A request on its way in. `here`: tokens whose KV is in this engine; `pulling`: those it will
    be when the pull under way has ended; `unfed`: tokens that its grammar was not fed yet; `fence`:
    the steps that were in flight when it last got blocks."""

    request: Request
    agents: tuple[str, ...]
    here: int = 0
    pulling: int = 0
    unfed: list[int] = field(default_factory=list)
    fence: list[Any] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Waiting:
    """A pull that must not begin before the steps in flight have ended: one of them may still
    write into a block that was freed under it and is now ours."""

    steps: list[Any]
    ticket: int
    agents: list[str]
    source: list[int]
    destination: list[int]


class VllmPort:
    """Implements `EnginePort` for one engine core."""

    def __init__(self, core: EngineCore, agents: list[str], client: AgentClient) -> None:
        self._core = core
        self._scheduler: Any = core.scheduler
        self._kv = self._scheduler.kv_cache_manager
        self._pool = self._kv.block_pool
        self._agents = agents
        self._client = client
        self._never = why_engine_cannot(core.vllm_config, self._scheduler)
        self._v1 = not core.vllm_config.use_v2_model_runner
        self._stopped: set[RequestId] = set()
        self._pins: dict[RequestId, list[Any]] = {}
        self._arriving: dict[RequestId, Arriving] = {}
        self._waiting: list[Waiting] = []
        self._meeting: dict[int, tuple[str, ...]] = {}
        self._met: set[tuple[str, ...]] = set()
        self._unmet: dict[tuple[str, ...], str] = {}
        self._tickets = 0
        self._stuck_steps = 0
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreRequest)
        self.last_ticket = 0
        self.block_tokens: int = self._scheduler.block_size

    # -- what the host tells it

    def arrived(self, request: Request) -> None:
        """A new request came in. Notes whether its reasoning had ended before its first token: the
        engine overwrites that, and a destination must start from it."""
        structured = request.structured_output_request
        if structured is not None:
            structured.llumnix_reasoning_ended = structured.reasoning_ended

    def stepped(self) -> None:
        """A step ended: pulls that waited for it may begin."""
        self._relieve()
        if not self._waiting:
            return
        for pull in list(self._waiting):
            if not self._in_flight(pull.steps):
                self._waiting.remove(pull)
                self._client.pull(pull.ticket, pull.agents, pull.source, pull.destination)

    def met(self, ticket: int, error: str | None) -> None:
        """A meeting (a negative ticket) with a source's workers has ended."""
        agents = self._meeting.pop(ticket)
        if error is not None:
            self._unmet[agents] = error
        else:
            self._met.add(agents)

    def forget(self, agents: list[str]) -> None:
        """These workers are gone."""
        self._met.discard(tuple(agents))
        self._client.forget(agents)

    def _relieve(self) -> None:
        """Requests that wait with blocks in their hands cannot be preempted by each other: if
        nothing runs and none of them can go on, the last gives its blocks up, as vLLM's own
        preemption would make it."""
        holding = self._scheduler.kv_holding_waiting
        if self._scheduler.running or not holding or self._core.batch_queue:
            self._stuck_steps = 0
            return
        self._stuck_steps += 1
        if self._stuck_steps < STUCK_STEPS:
            return
        self._stuck_steps = 0
        last = list(holding)[-1]
        holding.remove_requests([last])
        self._kv.free(last)
        last.num_computed_tokens = 0
        last.num_preemptions += 1
        self._scheduler.waiting.prepend_request(last)

    @property
    def pulls_wait(self) -> bool:
        """Whether a pull waits for a step."""
        return bool(self._waiting)

    # -- source

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
                priority=known.priority,
                trace_headers=known.trace_headers,
                reasoning_ended=structured and structured.llumnix_reasoning_ended,
                reasoning_parser_kwargs=structured and structured.reasoning_parser_kwargs,
                session_id=known.session_id,
                kv_hints=known.kv_hints,
            )
        )
        if len(parts) != 1:
            return Refusal(why="it carries tensors, which cannot be moved yet")
        return bytes(parts[0])

    def agents(self) -> list[str]:
        return self._agents

    def progress(self, request: RequestId) -> Progress:
        known = self._scheduler.requests.get(request)
        if known is None or known.is_finished():
            self._stopped.discard(request)
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
        self._pool.touch(blocks)
        self._pins.setdefault(request, []).extend(blocks)
        return ids

    def unpin(self, request: RequestId) -> None:
        blocks = self._pins.pop(request, None)
        if blocks:
            self._pool.free_blocks(reversed(blocks))

    def stop(self, request: RequestId) -> None:
        known = self._scheduler.requests[request]
        if known in self._scheduler.running:
            self._scheduler.running.remove(known)
        else:
            self._scheduler.waiting.remove_requests([known])
            self._scheduler.kv_holding_waiting.remove_requests([known])
            self._scheduler.deferred_waiting.discard(known)
        self._scheduler._inflight_prefills.discard(known)
        self._stopped.add(request)

    def rest(self, request: RequestId, start: int) -> tuple[int, Blocks, bytes]:
        known = self._scheduler.requests[request]
        generator = b""
        if known.status == RequestStatus.RUNNING:
            known.status = RequestStatus.PREEMPTED
            self._scheduler.reset_preempted_req_ids.add(request)
        if self._v1 and known.num_output_tokens and _is_seeded(known):
            generator = self._rpc("llumnix_generator", request)[0]
        computed = known.num_computed_tokens
        ids, _ = self._blocks(request, min(start, computed), computed)
        rest = Rest(
            told=known.prefill_stats is None,
            preemptions=known.num_preemptions,
            generator=generator,
        )
        return computed, ids, msgspec.msgpack.encode(rest)

    def resume(self, request: RequestId) -> None:
        self._stopped.discard(request)
        known = self._scheduler.requests.get(request)
        if known is None or known.is_finished():
            return
        if known.status == RequestStatus.RUNNING:
            self._scheduler.running.append(known)
        else:
            self._queue(known)

    def release(self, request: RequestId) -> None:
        self._stopped.discard(request)
        self._scheduler.finish_requests(request, RequestStatus.FINISHED_ABORTED)

    # -- destination

    def reserve(
        self, request: RequestId, body: bytes, outputs: list[int], tokens: int, agents: list[str]
    ) -> int | Refusal:
        scheduler = self._scheduler
        taken = len(scheduler.running) + len(scheduler.kv_holding_waiting) + len(self._arriving)
        if self._never is not None:
            return Refusal(why=self._never)
        if request in scheduler.requests or request in scheduler.finished_req_ids:
            return Refusal(why="what it left there on an earlier visit is not cleared away yet")
        if taken >= scheduler.max_num_active_reqs:
            return Refusal(why=f"the destination runs {taken} requests already (--max-num-seqs)")
        new = Request.from_engine_core_request(
            self._decoder.decode(body), self._core.request_block_hasher
        )
        self.arrived(new)
        coming = Arriving(request=new, agents=tuple(agents))
        if coming.agents not in self._met and coming.agents not in self._meeting.values():
            self._tickets += 1
            self._meeting[-self._tickets] = coming.agents
            self._client.meet(-self._tickets, agents)
        if new.use_structured_output:
            coming.unfed = list(outputs)
            scheduler.structured_output_manager.grammar_init(new)
        else:
            new.append_output_token_ids(outputs)
        if tokens:
            found, hit = None, 0
            if self._kv.enable_caching:
                found, hit, _ = self._kv.get_computed_blocks(new)
            slots = self._kv.allocate_slots(
                new,
                max(tokens - hit, 1),
                num_new_computed_tokens=hit,
                new_computed_blocks=found,
                delay_cache_blocks=True,
            )
            if slots is None:
                return self._no_room(tokens)
            new.num_computed_tokens = coming.here = hit
            coming.fence = list(self._core.batch_queue or ())
        self._arriving[request] = coming
        return coming.here

    def ready(self, request: RequestId) -> bool | Refusal:
        coming = self._arriving[request]
        if coming.agents not in self._met:
            why = self._unmet.pop(coming.agents, None)
            return Refusal(why=f"its blocks cannot be read: {why}") if why else False
        structured = coming.request.structured_output_request
        if structured is None:
            return True
        if not structured.is_grammar_ready:
            return False
        if isinstance(structured.grammar, Exception):
            return Refusal(why=f"its grammar does not compile there ({structured.grammar})")
        return self._feed(coming)

    def reach(self, request: RequestId, tokens: int, outputs: list[int]) -> Refusal | None:
        coming = self._arriving[request]
        new = coming.request
        coming.here = max(coming.here, coming.pulling)
        new.num_computed_tokens = coming.here
        if new.use_structured_output:
            coming.unfed += outputs
            fed = self._feed(coming)
            if isinstance(fed, Refusal):
                return fed
        else:
            new.append_output_token_ids(outputs)
        need = tokens - new.num_computed_tokens
        free = self._pool.get_num_free_blocks()
        if need > 0 and self._kv.allocate_slots(new, need, delay_cache_blocks=True) is None:
            return self._no_room(tokens)
        if self._pool.get_num_free_blocks() != free:
            coming.fence = list(self._core.batch_queue or ())
        return None

    def pull(
        self,
        request: RequestId,
        ticket: int,
        source: EngineIndex,
        agents: list[str],
        start: int,
        end: int,
        blocks: Blocks,
    ) -> None:
        coming = self._arriving[request]
        coming.pulling = end
        self.last_ticket = ticket
        mine, _ = self._blocks(request, start, end)
        pairs = [
            (theirs, ours)
            for group, own in zip(blocks, mine, strict=True)
            for theirs, ours in zip(group, own, strict=True)
            if theirs != ABSENT and ours != ABSENT
        ]
        froms, tos = [p[0] for p in pairs], [p[1] for p in pairs]
        pull = Waiting(
            steps=coming.fence, ticket=ticket, agents=agents, source=froms, destination=tos
        )
        if self._in_flight(pull.steps):
            self._waiting.append(pull)
        else:
            self._client.pull(ticket, agents, froms, tos)

    def commit(self, request: RequestId, computed: int, state: bytes) -> Refusal | None:
        coming = self._arriving[request]
        new = coming.request
        rest = msgspec.msgpack.decode(state, type=Rest)
        if coming.unfed:
            return Refusal(why="its grammar was not ready there")
        new.num_computed_tokens = computed
        new.num_preemptions = rest.preemptions
        if rest.told:
            new.prefill_stats = None
        if computed:
            self._kv.cache_blocks(new, computed)
        else:
            self._kv.free(new)
        started = bool(computed or new.num_output_tokens)
        new.status = RequestStatus.PREEMPTED if started else RequestStatus.WAITING
        if started and self._v1:
            blocks = [list(group) for group in self._kv.get_blocks(request).get_block_ids()]
            runner = RunnerState(
                request=request,
                prompt=new.prompt_token_ids,
                outputs=list(new.output_token_ids),
                computed=computed,
                blocks=blocks,
                generator=rest.generator,
            )
            self._rpc(
                "llumnix_install",
                msgspec.msgpack.encode(runner),
                new.sampling_params,
                new.lora_request,
            )
        del self._arriving[request]
        self._scheduler.requests[request] = new
        self._queue(new)
        return None

    def drop(self, request: RequestId) -> None:
        self._kv.free(self._arriving.pop(request).request)

    # -- both

    def _blocks(self, request: RequestId, start: int, end: int) -> tuple[Blocks, list[Any]]:
        """The blocks of tokens [start, end) in each group: their ids, and those that are real."""
        ids: Blocks = []
        real: list[Any] = []
        groups = self._scheduler.kv_cache_config.kv_cache_groups
        for group, blocks in zip(groups, self._kv.get_blocks(request).blocks, strict=False):
            size = group.kv_cache_spec.block_size
            chosen = blocks[start // size : -(-end // size)]
            ids.append([ABSENT if b.is_null else b.block_id for b in chosen])
            real += [b for b in chosen if not b.is_null]
        return ids, real

    def _queue(self, request: Request) -> None:
        """Puts a request first in line, with the KV that it has."""
        self._scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        queue = self._scheduler.waiting
        if request.num_computed_tokens:
            queue = self._scheduler.kv_holding_waiting
        queue.prepend_request(request)

    def _feed(self, coming: Arriving) -> bool | Refusal:
        """Tells its grammar what it has generated, token by token, as the source's was told."""
        new, manager = coming.request, self._scheduler.structured_output_manager
        structured = new.structured_output_request
        if not structured.is_grammar_ready:
            return False
        while coming.unfed:
            token = coming.unfed.pop(0)
            new.append_output_token_ids([token])
            if not manager.accept_tokens(new, [token]):
                return Refusal(why="its grammar there does not accept what it has generated")
        return True

    def _in_flight(self, steps: list[Any]) -> bool:
        """Whether any of these steps has not come home yet."""
        flying = [id(entry) for entry in self._core.batch_queue or ()]
        return any(id(step) in flying for step in steps)

    def _no_room(self, tokens: int) -> Refusal:
        free = self._pool.get_num_free_blocks() * self.block_tokens
        return Refusal(why=f"no room: {tokens} tokens are needed there, {free} are free")

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        answers: list[Any] = self._core.model_executor.collective_rpc(method, args=args)
        return answers


def _is_seeded(request: Request) -> bool:
    params = request.sampling_params
    return params is not None and params.sampling_type == SamplingType.RANDOM_SEED
