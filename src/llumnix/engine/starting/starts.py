"""Which request of an engine's queue starts next where memory is short.

Rules
- Room to grow, bounded passing of a head that does not fit, and short prompts first
  (core/queue_rules.py). Prompts under way get their memory first: vLLM hands it to them chunk by
  chunk, and admits others into it. What a token of a prompt takes is seen of the engine's steps.
- With slices there must be room for all promises instead (promises.py).

What it relies on in vLLM stands in engine/queueing.py, whose queue asks it.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from vllm.v1.request import Request, RequestStatus

from llumnix.core.queue_rules import PromptTimer, QueueRules, Wait
from llumnix.engine.readings import (
    ABLE,
    client_priority,
    head_wait,
    kv_growth,
    needed_tokens,
    prompt_tokens,
    start_blocks,
)
from llumnix.engine.starting.promises import EnginePromises


class Starts:
    """Which request of a queue starts next (core/queue_rules.py). vLLM tries one after the other,
    until one does not fit."""

    def __init__(
        self,
        scheduler: Any,
        rules: QueueRules,
        clock: Callable[[], float],
        arriving: Callable[[], Iterable[Request]] = tuple,
    ) -> None:
        self._scheduler = scheduler
        self.promises: EnginePromises | None = None
        if rules.slices is not None:
            self.promises = EnginePromises(scheduler, rules.slices, arriving)
        self._rules = rules
        self._clock = clock
        self._kv = scheduler.kv_cache_manager
        self._watermark = self._kv.watermark_blocks  # what the operator wants free
        self._growth = kv_growth(scheduler)
        self._block = self._growth.tokens
        self._prompts: list[Request] = []
        self._passer: tuple[Request, Wait, int] | None = None  # what was let past, and its tokens
        # What was seen, and the free blocks, when none behind the head could pass it.
        self._in_vain: tuple[Any, int] = None, 0
        self._prompt_timer = PromptTimer()
        self._landed_tokens = 0  # of prompts, in the step that landed last
        if rules.short_first:
            self._update = scheduler.update_from_output
            scheduler.update_from_output = self._landing

    def _landing(self, batch: Any, output: Any) -> Any:
        self._landed_tokens += prompt_tokens(batch)
        return self._update(batch, output)

    def stepped(self, seconds: float) -> None:
        """A step has landed, and took so long."""
        self._prompt_timer.record(self._landed_tokens, seconds)
        self._landed_tokens = 0

    def later_s(self, request: Request) -> float:
        """How much later than it came a request is queued that has not begun."""
        token_s = self._prompt_timer.token_s
        if not (token_s and self._rules.short_first):
            return 0.0  # Without a look at the prefix cache.
        left = int(request.num_tokens) - start_blocks(self._scheduler, request)[1]
        return self._rules.later_s(left, token_s)

    def prepare(self, queue: Any) -> None:
        """Before a step is scheduled."""
        scheduler, self._prompts = self._scheduler, []
        self._count_passer()
        if self.promises is None:
            prompts = scheduler._inflight_prefills
            self._prompts = [r for r in prompts if r.is_prefill_chunk] if queue else []
        else:
            # Where no slot is free nobody starts. An idle session has one.
            taken = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
            if queue and taken < scheduler.max_num_active_reqs:
                self.promises.before_step()
            else:
                self.promises.skip(waiting=bool(queue))
        # Those that hold KV wait for no more. `choose` sets it for those of the queue.
        self._kv.watermark_blocks = 0

    def room(self, request: Request) -> int:
        """Blocks that must be free beside what the request needs to start."""
        return self._room(request, self._promises_made())

    def _room(self, request: Request | None, made: int | None) -> int:
        """As `room`. None as the request: whichever leaves least; `made`: blocks that are promised,
        None where nothing is."""
        room = 0
        if self._rules.growth:
            running = len(self._scheduler.running)
            preempted = request is not None and bool(request.num_preemptions)
            room = self._rules.room(running, preempted=preempted) * self._growth.blocks
        if self.promises is not None and made is not None:
            first = 0 if request is None else self.promises.first_slice(request)
            room = max(room, made + first)
        return max(self._watermark, room)

    def _promises_made(self) -> int | None:
        """Blocks that are promised. None where nothing runs, or no promises are made."""
        promises = self.promises if self._scheduler.running else None
        return None if promises is None else promises.made()

    def passable(self, head: Request) -> bool:
        """Whether a newcomer may start before the head of the queue."""
        needed = needed_tokens(head, self._block)
        return self._rules.passable(head_wait(head), self._clock(), needed, self._block)

    def choose(self, head: Request, queue: Any) -> Request:
        """The head, or one that passes it. Sets the watermark for it."""
        self._count_passer()
        if self.promises is None:
            promised = self._promised()
        else:
            self.promises.admitting()
            promised = 0  # The rest of prompts is a part of `room`.
        free, made = self._kv.block_pool.get_num_free_blocks() - promised, self._promises_made()
        chosen, room = head, self._room(head, made)
        seen = (head, queue.version, len(self._scheduler.running))
        in_vain = seen == self._in_vain[0] and free <= self._in_vain[1]
        if head.status in ABLE and not in_vain and not self._fits(head, free - room):
            chosen = self._passing(head, queue, free, made)
            self._in_vain = (seen, free) if chosen is head else (None, 0)
            if chosen is not head:
                room = self._room(chosen, made)
        self._kv.watermark_blocks = room + promised
        return chosen

    def _passing(self, head: Request, queue: Any, free: int, made: int | None) -> Request:
        """The first of those behind the head that may pass it; the head if there is none. `made`:
        as in `_room`."""
        rules, now, wait = self._rules, self._clock(), head_wait(head)
        if wait is None:
            wait = Wait(since_s=now)
            head.llumnix_blocked = wait, head.num_preemptions
            queue.queue_again(head)
        if not rules.may_pass(wait, now) or self._room(None, made) > free:
            return head
        needed = needed_tokens(head, self._block)
        group = head.priority, client_priority(head)
        for request in islice(iter(queue), 1, rules.passers + 1):
            if request.status not in ABLE or group != (request.priority, client_priority(request)):
                continue
            room = self._room(request, made)
            if room > free:
                continue  # Without a look at the prefix cache.
            blocks = start_blocks(self._scheduler, request)[0]
            tokens = blocks * self._block // self._growth.blocks
            if rules.may_take(wait, needed, tokens) and blocks + room <= free:
                self._passer = request, wait, tokens
                return request
        return head

    def _count_passer(self) -> None:
        """vLLM took the last passer, or it skipped it for some other reason than memory."""
        if self._passer is not None:
            request, wait, tokens = self._passer
            self._passer = None
            if request.status == RequestStatus.RUNNING:
                wait.passed_tokens += tokens

    def _fits(self, request: Request, free: int) -> bool:
        """Whether it could start with so many free blocks."""
        if free < 0:
            return False
        # The prefix cache is looked up only where it decides.
        most = needed_tokens(request, self._block) // self._block * self._growth.blocks
        if self._growth.whole and most <= free:
            return True
        return start_blocks(self._scheduler, request)[0] <= free

    def _promised(self) -> int:
        """Blocks that prompts under way have not taken yet."""
        promised = 0
        for request in self._prompts:
            held = self._growth.held(self._kv.get_blocks(request.request_id).blocks)
            promised += max(0, needed_tokens(request, self._block) // self._block - held)
        return promised * self._growth.blocks
