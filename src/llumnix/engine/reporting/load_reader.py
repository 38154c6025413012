"""Reads an engine's load off vLLM's scheduler, on the engine's own thread, between two steps.

Rules
- Requests are counted only when one came, left, began to run or was preempted. In between nothing
  changes but KV memory, time and what is left of prompts.
- A count looks at the requests that run and at those that came, left or changed sides since the
  last count. It never looks at the whole queue.
- A preemption is counted once the request waits again, or has left.
- A token of KV takes a block's part in each group of layers that grows (`readings.kv_growth`), so
  the memory of a model with several groups holds fewer tokens than blocks times their size.
- A request that was taken out of the batch to be handed over counts as running until it has left.
  The report says apart how many requests are on their way out.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- `scheduler.requests` holds all that are not finished; `running`, `waiting` and
  `kv_holding_waiting` those that run and wait; the first of `waiting` is the next to start, and
  starts only if blocks for all its tokens are free (`scheduler_reserve_full_isl`).
- `Request`: `priority`, `num_tokens`, `num_output_tokens`, `num_preemptions`, `status`; a finished
  one keeps them. `is_prefill_chunk`: it runs, and tokens of its prompt (or, after a preemption, of
  its answer too) beyond the `num_computed_tokens` that are scheduled so far are left.
- `kv_cache_manager.block_pool.get_num_free_blocks()`.
- `Request.num_computed_tokens` of one that waits is what a move brought along, else 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from vllm.v1.request import Request, RequestStatus

from llumnix.core.limits import WAITING_SHOWN_MAX
from llumnix.core.priorities import Priorities
from llumnix.core.reports import ClassLoad, EngineCounts
from llumnix.engine.readings import (
    client_priority,
    kv_growth,
    needed_tokens,
    start_blocks,
    token_bytes,
)

_ANSWERED = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
)


class LoadReader:
    """Of one engine core. `cached_tokens` says how many of a request's tokens are in the prefix
    cache, and how many of them requests hold. It is asked when the request begins to wait.
    `taken_out` gives the requests that moves have taken out of the batch. `blocked` says of the
    head of the queue how many blocks must be free beside it when it starts, and whether a newcomer
    may start before it. `ended` is told of each request that has left."""

    def __init__(
        self,
        scheduler: Any,
        slots: int,
        priorities: Priorities,
        *,
        cached_tokens: Callable[[Request], tuple[int, int]] = lambda request: (0, 0),
        taken_out: Callable[[], list[Request]] = list,
        blocked: Callable[[Request], tuple[int, bool]] = lambda head: (0, False),
        ended: Callable[[Request], None] = lambda request: None,
    ) -> None:
        self._scheduler = scheduler
        self._slots = slots
        self._priorities = priorities
        self._cached_tokens = cached_tokens
        self._taken_out = taken_out
        self._blocked = blocked
        self._ended = ended
        growth = kv_growth(scheduler)
        self._block = growth.tokens
        self._groups = growth.blocks  # blocks that one of so many tokens takes in all
        self._token_bytes = token_bytes(scheduler)
        self._seen: tuple[Any, ...] = ()
        self._known: dict[str, CountedRequest] = {}
        self._running: dict[str, CountedRequest] = {}
        self._sessions: dict[str, CountedRequest] = {}  # those that wait
        # For each class: the requests that wait, and the sums of what `CountedRequest.waits` says.
        self._queued = [[0] * 4 for _ in range(len(priorities))]
        self._new: list[Request] = []
        self._left_out: list[str] = []
        self._unsure = True
        self._classes: tuple[ClassLoad, ...] = ()
        self._prompts: list[Request] = []
        self._last: EngineCounts | None = None
        self._changes = 0
        self._preempted = [0] * len(priorities)
        self._finished = 0
        self._finished_tokens = 0

    def arrived(self, request: Request | None = None) -> None:
        """A request arrived or moved in. Without one, any may have come or left, and all that are
        there are compared with those that were."""
        self._changes += 1
        if request is None:
            self._unsure = True
        else:
            self._new.append(request)

    def mark_changed(self) -> None:
        """A session got another input, which nothing else shows."""
        self._changes += 1

    def left(self, names: list[str]) -> None:
        """These requests were aborted. Others that leave the queue are found too, but that takes
        longer."""
        self._left_out += [name for name in names if name in self._known]

    def read(self) -> EngineCounts:
        """The load of now."""
        scheduler = self._scheduler
        seen = (
            self._changes,
            len(scheduler.requests),
            len(scheduler.waiting),
            len(scheduler.kv_holding_waiting),
            # By identity, since two may have changed places.
            [*map(id, scheduler.running), *map(id, self._taken_out())],
        )
        pool = scheduler.kv_cache_manager.block_pool
        total = pool.num_gpu_blocks - 1  # One block is vLLM's placeholder, never handed out.
        used = self._tokens(total - pool.get_num_free_blocks())
        capacity = self._tokens(total)
        counted = seen != self._seen
        if counted:
            self._seen = seen
            self._count()
        prefill, head, keep, least, passable = self._prefill(), 0, 0, 0, False
        if scheduler.waiting:
            first = next(iter(scheduler.waiting))
            head, (blocks, passable) = self.needed(first), self._blocked(first)
            keep = self._tokens(blocks)
            if head + keep > capacity - used - prefill:
                least = min(map(self.needed, islice(iter(scheduler.waiting), WAITING_SHOWN_MAX)))
        last, now = self._last, (used, prefill, head, keep, passable, least)
        if last is not None and not counted and now == _told(last):
            return last
        self._last = EngineCounts(
            kv_tokens_used=used,
            kv_tokens_total=capacity,
            prefill_tokens=now[1],
            block_tokens=self._block,
            slots=self._slots,
            classes=self._classes,
            head_tokens=head,
            keep_tokens=keep,
            passable=passable,
            waiting_least=least,
            kv_token_bytes=self._token_bytes,
            preemptions=sum(self._preempted),
            finished=self._finished,
            finished_tokens=self._finished_tokens,
        )
        return self._last

    def _tokens(self, blocks: int) -> int:
        """How many tokens fit in so many blocks, in whole blocks of each group."""
        return blocks // self._groups * self._block

    def needed(self, request: Request) -> int:
        """The KV tokens that it needs to start (readings.py). With several groups of layers a
        window takes fewer blocks than all tokens would, so it is asked how many these are."""
        if self._groups == 1:
            return needed_tokens(request, self._block)
        return -(-start_blocks(self._scheduler, request)[0] // self._groups) * self._block

    def _count(self) -> None:
        requests = self._scheduler.requests
        new = [r for r in self._new if requests.get(r.request_id) is r]
        gone = [r for r in self._new if requests.get(r.request_id) is not r]
        self._new = []
        for request in new:
            self._know(request)
        for request in gone:  # It came and ended since the last count.
            known = self._known.get(request.request_id)
            if known is None or known.request is not request:
                self._left(self._counted(request))
        running = [0] * len(self._priorities)
        before, self._running, self._prompts = self._running, {}, []
        for request in chain(self._scheduler.running, self._taken_out()):
            known = self._running[request.request_id] = self._know(request)
            self._waits_no_more(known)
            running[known.rank] += 1
            if request.is_prefill_chunk:
                self._prompts.append(request)
        for known in before.values():
            self._look_again(known)
        for request in new:
            self._look_again(self._known[request.request_id])
        for name in self._left_out:
            if name in self._known:
                self._look_again(self._known[name])
        self._left_out = []
        if self._unsure or len(self._known) != len(requests):
            self._unsure = False
            for name in self._known.keys() - requests.keys():
                self._look_again(self._known[name])
            for name in requests.keys() - self._known.keys():
                self._look_again(self._know(requests[name]))
        for known in self._sessions.copy().values():
            self._waits_no_more(known)
            self._begins_to_wait(known)
        self._classes = tuple(
            ClassLoad(
                running=r,
                waiting=w,
                waiting_tokens=t,
                waiting_shared=s,
                waiting_prefill=p,
                preempted=lost,
            )
            for r, (w, t, s, p), lost in zip(running, self._queued, self._preempted, strict=True)
        )

    def _look_again(self, known: "CountedRequest") -> None:
        """Counts a request among those that wait if it does, or as one that has left."""
        name = known.request.request_id
        if self._known.get(name) is not known:
            return
        if self._scheduler.requests.get(name) is not known.request:
            del self._known[name]
            self._left(known)
        elif name not in self._running and known.waits is None:
            self._begins_to_wait(known)

    def _begins_to_wait(self, known: "CountedRequest") -> None:
        request = known.request
        self._preempted[known.rank] += request.num_preemptions - known.preemptions
        known.preemptions = request.num_preemptions
        known.waits = self._wanted(request)
        if request.resumable:
            self._sessions[request.request_id] = known
        self._queue(known, 1)

    def _waits_no_more(self, known: "CountedRequest") -> None:
        if known.waits is not None:
            self._queue(known, -1)
            known.waits = None
            self._sessions.pop(known.request.request_id, None)

    def _queue(self, known: "CountedRequest", sign: int) -> None:
        assert known.waits is not None
        mine = self._queued[known.rank]
        for n, value in enumerate((1, *known.waits)):
            mine[n] += sign * value

    def _prefill(self) -> int:
        if not self._prompts:
            return 0
        self._prompts = [r for r in self._prompts if r.is_prefill_chunk]
        return sum(int(r.num_tokens - r.num_computed_tokens) for r in self._prompts)

    def _know(self, request: Request) -> "CountedRequest":
        known = self._known.get(request.request_id)
        if known is None or known.request is not request:
            if known is not None:
                self._left(known)  # Another one came under its id.
            known = self._known[request.request_id] = self._counted(request)
        return known

    def _counted(self, request: Request) -> "CountedRequest":
        rank = self._priorities.rank(client_priority(request))
        return CountedRequest(request=request, rank=rank, preemptions=request.num_preemptions)

    def _wanted(self, request: Request) -> tuple[int, int, int]:
        """What is counted of a request that begins to wait. One that was preempted is expected to
        lose its blocks, since memory is short."""
        cached, held = (0, 0) if request.num_preemptions else self._cached_tokens(request)
        moved = int(request.num_computed_tokens)
        tokens = int(request.num_tokens)
        # The last token is computed in any case.
        return self.needed(request), max(held, moved), tokens - min(max(cached, moved), tokens - 1)

    def _left(self, known: "CountedRequest") -> None:
        request = known.request
        self._waits_no_more(known)
        self._preempted[known.rank] += request.num_preemptions - known.preemptions
        self._ended(request)
        if request.status in _ANSWERED:
            self._finished += 1
            self._finished_tokens += request.num_output_tokens


def _told(counts: EngineCounts) -> tuple[Any, ...]:
    """What `read` compares of the counts before."""
    return (
        counts.kv_tokens_used,
        counts.prefill_tokens,
        counts.head_tokens,
        counts.keep_tokens,
        counts.passable,
        counts.waiting_least,
    )


@dataclass(slots=True, kw_only=True)
class CountedRequest:
    """A request that was counted."""

    request: Request
    rank: int  # of its class
    preemptions: int  # so far
    waits: tuple[int, int, int] | None = None
    """What is counted of it while it waits: tokens, those that are in use already, and those to
    compute. A session's tokens become more while it waits."""
