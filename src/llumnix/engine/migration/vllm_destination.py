"""The seam of core/migration/port.py on vLLM's engine, one half: requests that move in.

vLLM internals relied on here, beside those of vllm_core.py
(tests/house/test_vllm_migration_contract.py fails when one changes):
- `Scheduler.finished_req_ids`: requests that the workers still have to hear the end of.
- `KVCacheManager`: `get_computed_blocks`, `allocate_slots(delay_cache_blocks=True)`,
  `cache_blocks`, `remove_skipped_blocks`, `free`. With `has_scheduled_reqs=False` the watermark
  does not count, which the queue sets for its own head (engine/starting/starts.py). Slots ahead
  are got with `num_new_tokens`, never by raising `num_computed_tokens` past what is here:
  sliding-window groups free blocks by it.
- `StructuredOutputManager.accept_tokens` advances a compiled grammar.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType
from vllm.v1.request import Request, RequestStatus

from llumnix.core.codes import AbortCode
from llumnix.core.messages import ABSENT, Blocks
from llumnix.core.migration.port import Refusal, busy
from llumnix.core.types import EngineIndex, RequestId
from llumnix.engine.kv.agent_client import AgentClient
from llumnix.engine.migration.grammars import Grammars
from llumnix.engine.migration.request_decoder import RequestDecoder
from llumnix.engine.migration.vllm_core import HandoverState, VllmCore
from llumnix.engine.migration.worker import RunnerState
from llumnix.engine.readings import client_priority, has_adapter_room, has_waited
from llumnix.errors import ProtocolError

FED_MAX = 256
"""Tokens that a grammar is fed between two steps."""


@dataclass(slots=True, kw_only=True)
class ReservedRequest:
    """A request on its way in."""

    request: Request
    agents: tuple[str, ...] = ()  # of its source's workers; it has none if its engine died
    revived: int | None = None  # tokens that its client has, if its engine died
    here: int = 0  # tokens whose KV is in this engine
    pulling: int = 0  # the same, once the pull under way has ended
    gaps: bool = False  # some of those tokens have no blocks
    unfed: deque[int] = field(default_factory=deque)  # tokens that its grammar was not fed yet
    fence: list[Any] = field(default_factory=list)  # steps in flight when it last got blocks


@dataclass(slots=True, kw_only=True)
class DeferredPull:
    """A pull that must not begin before some steps have ended. One of them may still write into a
    block that was freed under it and is now a reserved request's."""

    steps: list[Any]
    ticket: int
    begin: Callable[[], None]


class VllmDestination:
    """The destination's half of `EnginePort`, for one engine core."""

    def __init__(
        self,
        core: VllmCore,
        client: AgentClient,
        pull_failed: Callable[[int, str], None],
        on_commit: Callable[[Request], None],
    ) -> None:
        self._core = core
        self._scheduler = core.scheduler
        self._kv = core.kv
        self._allocate = partial(
            core.kv.allocate_slots, delay_cache_blocks=True, has_scheduled_reqs=False
        )
        self._client = client
        self._pull_failed = pull_failed
        self._on_commit = on_commit
        self._arriving: dict[RequestId, ReservedRequest] = {}
        self._deferred: list[DeferredPull] = []
        self._decoder = RequestDecoder()
        # Links to the workers of a source, by their addresses: those that are being opened (by the
        # ticket of that), those that are open, and why the others are not.
        self._linking: dict[int, tuple[str, ...]] = {}
        self._linked: set[tuple[str, ...]] = set()
        self._link_errors: dict[tuple[str, ...], str] = {}
        self._link_tickets = 0
        self._grammars = Grammars(self._scheduler.structured_output_manager)
        self.last_ticket = 0

    # -- what the host tells it

    def holds(self) -> bool:
        """Whether requests on their way here hold blocks."""
        return bool(self._arriving)

    def arriving(self) -> list[Request]:
        """Requests on their way here."""
        return [incoming.request for incoming in self._arriving.values()]

    def begin_pulls(self) -> None:
        """Between two steps, begins the pulls whose steps have ended."""
        for pull in list(self._deferred):
            if not self._in_flight(pull.steps):
                self._deferred.remove(pull)
                try:
                    pull.begin()
                except Exception as error:  # noqa: BLE001 - the pull failed, whatever it is
                    self._pull_failed(pull.ticket, f"{type(error).__name__}: {error}")

    def linked(self, ticket: int, error: str | None) -> None:
        """The links to a source's workers are open, or cannot be opened. Their tickets are
        negative."""
        agents = self._linking.pop(ticket, None)
        if agents is None:
            return  # It could not be begun with all workers.
        if error is not None:
            self._link_errors[agents] = error
        else:
            self._linked.add(agents)

    def forget(self, agents: list[str]) -> None:
        """Drops the links to a source's workers, which are gone."""
        self._linked.discard(tuple(agents))
        self._link_errors.pop(tuple(agents), None)
        self._client.forget(agents)

    @property
    def pulls_wait(self) -> bool:
        """Whether a pull waits for a step to end."""
        return bool(self._deferred)

    # -- arrivals

    def reserve(
        self, request: RequestId, body: bytes, outputs: list[int], tokens: int, agents: list[str]
    ) -> int | Refusal:
        scheduler = self._scheduler
        here = [*scheduler.running, *scheduler.kv_holding_waiting, *self.arriving()]
        if self._core.unsupported is not None:
            return Refusal(why=self._core.unsupported, code=AbortCode.IMMOVABLE)
        if request in scheduler.requests:
            return busy("it has not quite left there since its last visit")
        if len(here) >= scheduler.max_num_active_reqs:
            why = f"the destination runs {len(here)} requests already (--max-num-seqs)"
            return Refusal(why=why, code=AbortCode.NO_ROOM)
        if len(agents) != self._client.ranks:
            return Refusal(
                why=f"{len(agents)} workers have its KV, and {self._client.ranks} would take it: "
                "all instances need the same --tensor-parallel-size",
                code=AbortCode.IMMOVABLE,
            )
        try:
            described = self._decoder.read(body)
        except ProtocolError as error:
            return Refusal(why=f"it cannot be read there: {error}", code=AbortCode.STATE)
        if not has_adapter_room(scheduler, described.lora_request, here):
            return busy("as many other adapters run there as may (--max-loras)")
        new = self._core.new_request(described)
        new.llumnix_came_with = len(outputs)
        incoming = ReservedRequest(request=new, agents=tuple(agents))
        if incoming.agents not in self._linked and incoming.agents not in self._linking.values():
            self._link_errors.pop(incoming.agents, None)
            self._link_tickets += 1
            self._client.open_links(-self._link_tickets, agents)
            self._linking[-self._link_tickets] = incoming.agents
        if new.use_structured_output:
            incoming.unfed.extend(outputs)
            self._grammars.begin(new)
        else:
            new.append_output_token_ids(outputs)
        if tokens:
            found, hit = None, 0
            if self._kv.enable_caching:
                found, hit, _ = self._kv.get_computed_blocks(new)
            slots = self._allocate(
                new,
                max(tokens - hit, 1),
                num_new_computed_tokens=hit,
                new_computed_blocks=found,
            )
            if slots is None:
                return self._no_room(tokens)
            new.num_computed_tokens = incoming.here = hit
            incoming.fence = self._core.steps_in_flight()
        self._arriving[request] = incoming
        return incoming.here

    def admit(self, request: RequestId, made: object, outputs: list[int]) -> Refusal | None:
        assert isinstance(made, Request)
        if request in self._scheduler.requests or request in self._arriving:
            return busy("it has not quite left there since its last visit")
        incoming = ReservedRequest(
            request=made, revived=len(outputs), fence=self._core.steps_in_flight()
        )
        made.llumnix_came_with = len(outputs)
        if made.use_structured_output:
            incoming.unfed.extend(outputs)  # The engine began to compile when the request came.
        else:
            made.append_output_token_ids(outputs)
        self._arriving[request] = incoming
        return None

    def ready(self, request: RequestId) -> bool | Refusal:
        incoming = self._arriving[request]
        if request in self._scheduler.finished_req_ids:
            return False  # The workers have still to hear that it left the last time.
        if incoming.revived is not None and self._in_flight(incoming.fence):
            return False  # A step may have computed a token for it before it was aborted here.
        if incoming.agents and incoming.agents not in self._linked:
            why = self._link_errors.get(incoming.agents)
            unread = Refusal(why=f"its blocks cannot be read: {why}", code=AbortCode.STATE)
            return unread if why else False
        structured = incoming.request.structured_output_request
        if structured is None:
            return True
        if not structured.is_grammar_ready:
            return False
        if isinstance(structured.grammar, Exception):
            why = f"its grammar does not compile there ({structured.grammar})"
            return Refusal(why=why, code=AbortCode.GRAMMAR)
        return self._feed(incoming, FED_MAX)

    def reach(self, request: RequestId, tokens: int, outputs: list[int]) -> Refusal | None:
        incoming = self._arriving[request]
        new = incoming.request
        incoming.here = max(incoming.here, incoming.pulling)
        new.num_computed_tokens = incoming.here
        if new.use_structured_output:
            incoming.unfed += outputs
            fed = self._feed(incoming, len(incoming.unfed))
            if isinstance(fed, Refusal):
                return fed
        else:
            new.append_output_token_ids(outputs)
        need = tokens - new.num_computed_tokens
        free = self._core.pool.get_num_free_blocks()
        if need > 0 and self._allocate(new, need) is None:
            return self._no_room(tokens)
        if self._core.pool.get_num_free_blocks() != free:
            incoming.fence = self._core.steps_in_flight()
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
        final: bool,
    ) -> None:
        incoming = self._arriving[request]
        incoming.pulling = end
        incoming.gaps |= any(ABSENT in group for group in blocks)
        self.last_ticket = ticket
        mine, _ = self._core.blocks(request, start, end)
        pairs = [
            (theirs, ours)
            for group, own in zip(blocks, mine, strict=True)
            for theirs, ours in zip(group, own, strict=True)
            if theirs != ABSENT and ours != ABSENT
        ]
        froms, tos = [p[0] for p in pairs], [p[1] for p in pairs]
        begin = partial(self._client.pull, ticket, agents, froms, tos, final=final)
        if self._in_flight(incoming.fence):
            self._deferred.append(DeferredPull(steps=incoming.fence, ticket=ticket, begin=begin))
        else:
            begin()

    def cancel(self, ticket: int) -> None:
        waiting = next((pull for pull in self._deferred if pull.ticket == ticket), None)
        if waiting is None:
            self._client.cancel(ticket)
        else:
            self._deferred.remove(waiting)
            self._pull_failed(ticket, "it was cancelled before it began")

    def cache(self, request: RequestId, tokens: int) -> None:
        incoming = self._arriving[request]
        if not incoming.gaps:
            self._kv.cache_blocks(incoming.request, min(tokens, incoming.request.num_tokens))

    def commit(self, request: RequestId, computed: int, state: bytes) -> Refusal | None:
        incoming = self._arriving[request]
        new = incoming.request
        try:
            handed = self._handed(incoming, state)
        except msgspec.MsgspecError as error:
            return Refusal(why=f"its state cannot be read there: {error}", code=AbortCode.STATE)
        if incoming.unfed:
            return Refusal(why="its grammar was not ready there", code=AbortCode.GRAMMAR)
        new.num_computed_tokens = computed
        new.num_preemptions = handed.preemptions
        now = time.monotonic()
        has_waited(new, handed.waited_s, now)
        new.events = [
            EngineCoreEvent.new_event(EngineCoreEventType(kind), now - ago_s)
            for kind, ago_s in handed.events
        ]
        if handed.priority is not None:
            new.llumnix_priority, new.priority = client_priority(new), handed.priority
        if handed.cached is None:
            new.prefill_stats = None
        elif computed:
            new.prefill_stats.set(new.num_prompt_tokens, handed.cached, 0)
        if computed:
            if incoming.gaps:
                # What the source did not have is not here either, and must not be found.
                self._kv.remove_skipped_blocks(request, computed)
            self._kv.cache_blocks(new, computed)
        else:
            self._kv.free(new)
        started = bool(computed or new.num_output_tokens)
        new.status = RequestStatus.PREEMPTED if started else RequestStatus.WAITING
        if (
            started
            and self._core.runner_v1
            and (why := self._install(new, computed, handed.generator, incoming.revived or 0))
        ):
            # Some workers may have it by now.
            self._scheduler.finished_req_ids.add(request)
            why = f"its state cannot be installed there: {why}"
            return Refusal(why=why, code=AbortCode.STATE)
        self._on_commit(new)
        # Last, since nothing may fail after it: a refused request must not be in any queue.
        self._core.queue(new)
        self._scheduler.requests[request] = new
        del self._arriving[request]
        return None

    def _handed(self, incoming: ReservedRequest, state: bytes) -> HandoverState:
        """What the source handed over. Without a source: as of a request that was preempted, or of
        a new one."""
        if incoming.revived is None:
            return msgspec.msgpack.decode(state, type=HandoverState)
        if incoming.revived:
            return HandoverState(cached=None, preemptions=1, generator=b"")
        queued = [(int(EngineCoreEventType.QUEUED), 0.0)] if self._scheduler.log_stats else []
        return HandoverState(cached=0, preemptions=0, generator=b"", events=queued)

    def _install(self, new: Request, computed: int, generator: bytes, draws: int) -> str | None:
        """Gives the workers' runners (V1) what they keep of a request. `draws`: see `RunnerState`.
        Returns why one cannot take it, or None."""
        blocks = self._kv.get_blocks(new.request_id).get_block_ids()
        runner = RunnerState(
            request=new.request_id,
            prompt=new.prompt_token_ids,
            outputs=list(new.output_token_ids),
            computed=computed,
            blocks=[list(group) for group in blocks],
            generator=generator,
            draws=draws,
        )
        answers = self._core.rpc(
            "llumnix_install",
            msgspec.msgpack.encode(runner),
            new.sampling_params,
            new.lora_request,
        )
        return next((why for why in answers if why), None)

    def drop(self, request: RequestId) -> None:
        self._kv.free(self._arriving.pop(request).request)

    def _feed(self, incoming: ReservedRequest, most: int) -> bool | Refusal:
        """Feeds a request's grammar what it has generated, token by token, as the source's was fed.
        Returns whether that was all."""
        new, manager = incoming.request, self._scheduler.structured_output_manager
        structured = new.structured_output_request
        if not structured.is_grammar_ready:
            return False
        for _ in range(min(most, len(incoming.unfed))):
            token = incoming.unfed.popleft()
            new.append_output_token_ids([token])
            if not manager.accept_tokens(new, [token]):
                why = "its grammar there does not accept what it has generated"
                return Refusal(why=why, code=AbortCode.GRAMMAR)
        return not incoming.unfed

    def _in_flight(self, steps: list[Any]) -> bool:
        """Whether any of these steps has not ended yet."""
        flying = [id(entry) for entry in self._core.steps_in_flight()]
        return any(id(step) in flying for step in steps)

    def _no_room(self, tokens: int) -> Refusal:
        free = self._core.pool.get_num_free_blocks() * self._core.block_tokens
        why = f"no room: {tokens} tokens are needed there, {free} are free"
        return Refusal(why=why, code=AbortCode.NO_ROOM)
