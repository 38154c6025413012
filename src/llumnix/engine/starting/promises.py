"""What one engine's requests may still take in their slices (core/slices/promises.py).

Rules
- It is followed only while requests wait, and while one more could run. While all slots are taken
  it is counted once in `COUNT_IDLE_EVERY` steps, for the load reports. While nobody waits nothing
  is kept of any request.
- All that run are counted once in `COUNT_EVERY` steps. In between the sum follows what happens:
  blocks that a step takes for those that run are taken off, and so is what is left of a request
  that ended. A slice that may be over is renewed. What began to run is added. Where the sum cannot
  follow, as after a preemption or a move, all are counted again. So a step costs no more with many
  requests than with few.
- Requests that come by a move, or hold KV and wait, are few, and counted each time. One that comes
  without KV is promised nothing: it will be queued. Nor is a session that has no input to go on
  with; the next input makes its promise anew.
- With several groups of layers a token takes a block in each that grows (`readings.kv_growth`).
  Blocks that a sliding window gives back are promised all the same.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`scheduler.running` is in the order in which its requests began, and a request is taken out of it
when it ends; `scheduler.finished_req_ids` has those that ended since the last `schedule()`, which
drops them; between its beginning and the first `peek_request()` that call takes blocks for running
requests alone; a session without input has status WAITING_FOR_STREAMING_REQ and a slot, which
`num_waiting_for_streaming_input` counts; its next input is a part of its prompt;
`Request.max_tokens`, `num_output_tokens`, `num_prompt_tokens`, `lora_request`;
`scheduler.max_model_len`, `num_lookahead_tokens`, `num_spec_tokens`.
"""

from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.request import Request, RequestStatus

from llumnix.core.queue_rules import SliceRules
from llumnix.core.slices.lengths import End
from llumnix.core.slices.promises import Promise, Slices
from llumnix.engine.readings import came_with, kv_growth

COUNT_EVERY = 256
COUNT_IDLE_EVERY = 16
_ENDS = {
    RequestStatus.FINISHED_STOPPED: End.BY_ITSELF,
    RequestStatus.FINISHED_REPETITION: End.BY_ITSELF,
    RequestStatus.FINISHED_LENGTH_CAPPED: End.AT_LIMIT,
}


class EnginePromises:
    """Of one engine core. `arriving`: requests that a move brings, which have blocks already."""

    def __init__(
        self, scheduler: Any, rules: SliceRules, arriving: Callable[[], Iterable[Request]] = tuple
    ) -> None:
        self._growth = kv_growth(scheduler)
        self.slices = Slices(rules, self._growth.tokens)
        self._scheduler = scheduler
        self._kv = scheduler.kv_cache_manager
        self._arriving = arriving
        self._ahead = scheduler.num_lookahead_tokens  # tokens that have a place before they are
        self._pace = 1 + scheduler.num_spec_tokens  # tokens that a request gets in a step at most
        self._known: dict[str, Request] = {}  # those that run, as counted
        self._left = 0  # blocks that these may still take
        self._due: dict[int, list[Request]] = {}  # by the step at which their slices may be over
        self._step = 0
        self._free: int | None = None  # blocks when the step began; None once `admitting` took it
        self._skipped = True  # nobody asked in the step before
        self._skips = 0  # steps in which nobody asked, though requests wait
        self._forgot = True  # nothing is known of those that run

    def before_step(self) -> None:
        """Before a step is scheduled, while requests wait."""
        scheduler, known = self._scheduler, self._known
        running = scheduler.running
        self._step += 1
        for name in scheduler.finished_req_ids:
            if (request := known.pop(name, None)) is not None:
                held = -(-(int(request.num_tokens) + self._ahead) // self.slices.block_tokens)
                self._left -= max(0, _promise(request).blocks - held)
        count = len(known)
        followed = self._free is None and not self._skipped and self._step % COUNT_EVERY != 0
        if followed and count <= len(running) and (not count or _is(running[count - 1], known)):
            for request in running[count:]:
                self._add(request)
            if over := self._due.pop(self._step, None):
                self._renew(over)
        else:
            self._count()
        self._free, self._skipped = self._kv.block_pool.get_num_free_blocks(), False
        self._skips = 0

    def skip(self, *, waiting: bool) -> None:
        """Nobody is expected to ask in this step. `waiting`: whether requests wait."""
        self._free, self._skipped = None, True
        if not waiting:
            self._known, self._left, self._due = {}, 0, {}
            self._forgot, self._skips = True, 0
            return
        if self._skips % COUNT_IDLE_EVERY == 0:
            self._count()
        self._skips += 1

    def admitting(self) -> None:
        """Those that run have got their blocks, and the queue is asked who starts."""
        running, free = self._scheduler.running, self._kv.block_pool.get_num_free_blocks()
        if self._free is not None:
            taken = max(0, self._free - free) // self._growth.blocks
            self._left, self._free = max(0, self._left - taken), None
        if self._skipped or len(running) < len(self._known):
            self._count()  # Some were preempted for an urgent request.
            self._skipped = False
        for request in running[len(self._known) :]:
            self._add(request)

    def made(self) -> int:
        """Blocks that are promised. So many must be free beside what a request takes that starts,
        and its first slice."""
        if self._forgot:
            self._count()  # Requests have come since the last step.
        others = [*self._scheduler.kv_holding_waiting, *self._arriving()]
        return (self._left + sum(map(self._left_of_other, others))) * self._growth.blocks

    def first_slice(self, request: Request) -> int:
        """Blocks that a request takes in the slice after its start."""
        tokens, outputs = int(request.num_tokens), request.num_output_tokens
        blocks = self.slices.first(_key(request), tokens, outputs, self._most(request))
        return blocks * self._growth.blocks

    def left(self, request: Request) -> int:
        """Blocks that a running request may still take, as it was last counted."""
        promise = getattr(request, "llumnix_promise", None)
        if promise is None or request.request_id not in self._known:
            return 0
        return max(0, promise.blocks - self._held(request)) * self._growth.blocks

    def ended(self, request: Request) -> None:
        """Learns from a request that has left."""
        self.slices.gone(
            getattr(request, "llumnix_promise", None),
            _key(request),
            request.num_output_tokens,
            came_with(request),
            end=_ENDS.get(request.status, End.EARLY),
        )

    def _count(self) -> None:
        """Counts all that run."""
        self._known, self._left, self._due, self._forgot = {}, 0, {}, False
        for request in self._scheduler.running:
            self._add(request)

    def _add(self, request: Request) -> None:
        self._known[request.request_id] = request
        self._left += self._left_of(request)
        self._watch(request)

    def _renew(self, requests: Iterable[Request]) -> None:
        """Renews the slices that are over."""
        for request in requests:
            if self._known.get(request.request_id) is request:
                promise = _promise(request)
                if request.num_output_tokens >= promise.until:
                    held = self._held(request)
                    before = max(0, promise.blocks - held)
                    self._left += self._left_of(request, held) - before
                self._watch(request)

    def _watch(self, request: Request) -> None:
        """Looks at it again when its slice may be over."""
        rest = _promise(request).until - request.num_output_tokens
        self._due.setdefault(self._step + max(1, rest // self._pace), []).append(request)

    def _left_of(self, request: Request, held: int | None = None) -> int:
        """Blocks that it may still take in one group, its slice renewed if it is over."""
        request.llumnix_promise, left = self.slices.left(
            getattr(request, "llumnix_promise", None),
            _key(request),
            int(request.num_tokens) + self._ahead,
            request.num_output_tokens,
            self._held(request) if held is None else held,
            self._most(request),
            came_with(request),
        )
        return left

    def _left_of_other(self, request: Request) -> int:
        """Of one that does not run: if it holds KV and will go on by itself."""
        idle = request.status == RequestStatus.WAITING_FOR_STREAMING_REQ or not self._held(request)
        return 0 if idle else self._left_of(request)

    def _held(self, request: Request) -> int:
        return self._growth.held(self._kv.get_blocks(request.request_id).blocks)

    def _most(self, request: Request) -> int:
        room = self._scheduler.max_model_len - request.num_prompt_tokens
        return int(min(request.max_tokens, room))


def _promise(request: Request) -> Promise:
    promise: Promise = request.llumnix_promise
    return promise


def _key(request: Request) -> str:
    """Who asks, as far as an engine knows."""
    lora = request.lora_request
    return "" if lora is None else str(lora.lora_name)


def _is(request: Request, known: dict[str, Request]) -> bool:
    return known.get(request.request_id) is request
