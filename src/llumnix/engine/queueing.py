"""Queue order inside an engine: aging, preempted requests first, short prompts first, and who
starts where memory is short.

Rules
- A request that has waited for `aging_s` is queued as the most urgent class, so that none starves.
  The time that it waited on other instances counts: a move carries it along.
- A preempted request goes before all of its class that have not started, and is preempted again
  last, since its client is in the middle of a stream. vLLM does so where it serves first come first
  served; by priority it would queue the request behind all that came earlier. The request's wait
  begins anew.
- Where memory is short, starting/starts.py says which request is next.

The queue is our own, since vLLM's changes a request's place only by looking at all requests. With
thousands in it that took longer than a step, at every step that preempts. Here each change takes
time in the logarithm of the queue's length. So does a look, for each request that has aged
meanwhile, of which it takes `AGED_MAX` at most. A request that passes the head keeps its place in
the order too: vLLM asks the queue for the next request, and the queue names that one.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`scheduler.waiting` is used by the methods of `RequestQueue` alone; by priority it is ordered by
`priority`, then `arrival_time` (seconds since the epoch, and used for nothing else in an engine);
running requests are preempted by the same two, the last first. A preemption counts in
`num_preemptions` before the request is queued again. Requests that wait with KV blocks are in
another queue, which goes first. `schedule()` alone asks `peek_request()`, after it has given the
running requests their blocks, and then either breaks off or takes that request with
`pop_request()`: to run, with status RUNNING, or to skip it. Beside the blocks that a request needs
to start, `kv_cache_manager.watermark_blocks` must be free, if any request runs. Each step that
lands goes through `update_from_output(scheduler_output, ...)`. `_inflight_prefills` has each
running request whose prompt is computed in chunks.
"""

import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.request import Request

from llumnix.core.priorities import AGING_LOOK_EVERY_S, Priorities
from llumnix.core.queue_rules import QueueRules
from llumnix.engine.readings import (
    client_priority,
    head_wait,
    waits_since,
)
from llumnix.engine.starting.starts import Starts

AGED_MAX = 100
"""Requests whose place one look changes at most. The rest follow at the next step."""
_SLACK = 64
"""A heap is built anew when it has twice as many entries as the queue, and so many more."""

Entry = list
"""In the queue's heap: priority, arrival, a number that differs, the request, or None in its place
once that has left."""


class AgingQueue(RequestQueue):
    """Requests that wait without KV blocks, most urgent first. `starts`: says which of them is
    next; None for the first."""

    def __init__(
        self, priorities: Priorities, clock: Callable[[], float], starts: Starts | None = None
    ) -> None:
        self._priorities = priorities
        self._clock = clock
        self._starts = starts
        self._next: Request | None = None  # what vLLM was last told
        self._heap: list[Any] = []
        self._entries: dict[str, Any] = {}
        # When each request will have aged, soonest first: seconds, number of its entry, its id.
        self._due: list[tuple[float, int, str]] = []
        self._number = 0

    def add_request(self, request: Request) -> None:
        """Queues it by its class, its age and its arrival."""
        now = self._clock()
        waits = waits_since(request)
        if waits is None or waits[1] != request.num_preemptions:
            request.llumnix_waits = now, request.num_preemptions
        request.llumnix_priority = client_priority(request)
        waited_s = now - request.llumnix_waits[0]
        request.priority, request.arrival_time = self._priorities.queue_key(
            request.priority,
            request.arrival_time,
            waited_s=waited_s,
            preempted=bool(request.num_preemptions),
        )
        self._enter(request)

    def _aged(self, request: Request) -> int:
        """The number that a request is queued under once it has waited for long."""
        return self._priorities.aged(request.priority, self._priorities.aging_s)

    def _enter(self, request: Request) -> None:
        self._number += 1
        arrival = request.arrival_time + self._later_s(request)
        entry = Entry((request.priority, arrival, self._number, request))
        self._entries[request.request_id] = entry
        heapq.heappush(self._heap, entry)
        if self._aged(request) != request.priority:  # It is looked at again once it has aged.
            due_s = request.llumnix_waits[0] + self._priorities.aging_s
            heapq.heappush(self._due, (due_s, self._number, request.request_id))
            if len(self._due) > 2 * len(self._entries) + _SLACK:
                self._due = [d for d in self._due if self._waits_as(d) is not None]
                heapq.heapify(self._due)

    def _later_s(self, request: Request) -> float:
        """So much later than it came a request is queued. Found once on an engine."""
        if self._starts is None or request.num_preemptions or request.num_output_tokens:
            return 0.0
        if head_wait(request) is not None:
            return 0.0  # From now on it is passed within bounds alone.
        if request.priority != client_priority(request):
            return 0.0  # It has aged.
        if not hasattr(request, "llumnix_later_s"):
            request.llumnix_later_s = self._starts.later_s(request)
        return float(request.llumnix_later_s)

    def queue_again(self, request: Request) -> None:
        """Gives a request that is there its place anew."""
        self._take(request)
        self._enter(request)

    def _waits_as(self, due: tuple[float, int, str]) -> Request | None:
        """The request, if it still waits with that entry."""
        entry = self._entries.get(due[2])
        return None if entry is None or entry[2] != due[1] else entry[3]

    def _take(self, request: Request) -> None:
        """Takes a request out. Its entry stays where it is, without it."""
        self._entries.pop(request.request_id)[3] = None

    def _trim(self) -> None:
        """Drops entries without a request from the top, and rebuilds the heap if most are
        without."""
        while self._heap and self._heap[0][3] is None:
            heapq.heappop(self._heap)
        if len(self._heap) > 2 * len(self._entries) + _SLACK:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def age(self) -> int:
        """Queues the requests that have waited for long as the most urgent class, `AGED_MAX` at
        most. Returns how many."""
        now, aged = self._clock(), 0
        while self._due and self._due[0][0] <= now and aged < AGED_MAX:
            due = heapq.heappop(self._due)
            if (request := self._waits_as(due)) is not None:
                request.priority = self._aged(request)
                self.queue_again(request)
                aged += 1
        self._trim()
        return aged

    def pop_request(self) -> Request:
        """Takes out the request that was just peeked at, else the first."""
        request, self._next = self._next, None
        if request is None or request.request_id not in self._entries:
            request = self.first()
        self._take(request)
        self._trim()
        return request

    def peek_request(self) -> Request:
        """The next to start: the first request, or one that may pass it."""
        self._next = self.first()
        if self._starts is not None:
            self._next = self._starts.choose(self._next, self)
        return self._next

    def first(self) -> Request:
        """The head of the queue."""
        self._trim()
        if not self._heap:
            raise IndexError("peek from an empty queue")
        return self._heap[0][3]

    @property
    def version(self) -> tuple[int, int]:
        """Differs after each change."""
        return self._number, len(self._entries)

    def prepend_request(self, request: Request) -> None:
        """As `add_request`, since its place does not depend on when it is queued."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """As `add_request`, of each."""
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        """Takes a request out. ValueError if it is not there."""
        entry = self._entries.get(request.request_id)
        if entry is None or entry[3] is not request:
            raise ValueError(f"{request.request_id} is not in the queue")
        self._take(request)
        self._trim()

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Takes out those of the requests that are there."""
        for request in requests:
            entry = self._entries.get(request.request_id)
            if entry is not None and entry[3] is request:
                self._take(request)
        self._trim()

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        """In order. The first few are found without looking at the rest. Not while the queue
        changes."""
        heap = self._heap
        edge = [(heap[0], 0)] if heap else []
        while edge:
            entry, at = heapq.heappop(edge)
            if entry[3] is not None:
                yield entry[3]
            for child in (2 * at + 1, 2 * at + 2):
                if child < len(heap):
                    heapq.heappush(edge, (heap[child], child))


class Queueing:
    """Puts a queue of ours in place of a scheduler's, if that goes by priority."""

    def __init__(
        self,
        scheduler: Any,
        priorities: Priorities,
        clock: Callable[[], float] = time.monotonic,
        rules: QueueRules | None = None,
        arriving: Callable[[], Iterable[Request]] = tuple,
    ) -> None:
        self._clock = clock
        self._next_s = 0.0
        self._queue: AgingQueue | None = None
        self._starts: Starts | None = None
        if scheduler.policy == SchedulingPolicy.PRIORITY:
            if rules is not None and (
                rules.growth or rules.passers or rules.short_first or rules.slices
            ):
                self._starts = Starts(scheduler, rules, clock, arriving)
            self._queue = AgingQueue(priorities, clock, self._starts)
            self._queue.prepend_requests(scheduler.waiting)
            scheduler.waiting = self._queue

    def look(self) -> None:
        """Between two steps, queues requests anew that have waited for long."""
        if self._queue is not None and self._clock() >= self._next_s:
            more = self._queue.age() == AGED_MAX
            self._next_s = self._clock() + (0.0 if more else AGING_LOOK_EVERY_S)

    def before_step(self) -> None:
        """Before a step is scheduled."""
        if self._starts is not None and self._queue is not None:
            self._starts.prepare(self._queue)

    def stepped(self, seconds: float) -> None:
        """A step has landed, and took so long."""
        if self._starts is not None:
            self._starts.stepped(seconds)

    def blocked(self, head: Request) -> tuple[int, bool]:
        """Of the head of the queue: blocks that must be free beside what it needs, and whether a
        newcomer may start before it."""
        if self._starts is None:
            return 0, False
        return self._starts.room(head), self._starts.passable(head)

    @property
    def room(self) -> Callable[[Request], int] | None:
        """Says how many blocks must be free beside those that a request needs to start. None:
        vLLM's watermark does."""
        return None if self._starts is None else self._starts.room

    @property
    def for_reports(self) -> dict[str, Callable[[Request], Any]]:
        """What it says to a `LoadReader`, and hears from it."""
        return {"blocked": self.blocked, "ended": self.ended}

    def left(self, request: Request) -> int:
        """Blocks that are promised to a request that runs."""
        promises = None if self._starts is None else self._starts.promises
        return 0 if promises is None else promises.left(request)

    def ended(self, request: Request) -> None:
        """A request has left the engine."""
        if self._starts is not None and self._starts.promises is not None:
            self._starts.promises.ended(request)
