"""Whose turn it is in an engine's queue, beyond what vLLM's priority scheduling does by itself.

Rules
- Who has waited for long is queued as the most urgent class, so none starves.
- Who was preempted goes before all of its class that have not started, and is preempted again last:
  its client is in the middle of a stream. (vLLM does so where it serves first come first served; by
  priority it would queue it behind all who came earlier.)

vLLM 0.32 internals relied on here (tests/house/test_vllm_contract.py fails when one changes): with
priority scheduling `scheduler.waiting` is a heap of requests ordered by `priority`, then
`arrival_time` (seconds since the epoch, and used for nothing else in an engine), so either may
change only while its request is out of it; preemption goes by the same two. A step that preempts
admits nobody.
"""

import time
from typing import Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request

from llumnix.core.priorities import Priorities
from llumnix.engine.load_reader import client_priority

LOOK_EVERY_S = 0.5
STARTED_S = 1e11
"""What a request's arrival is put back by once it was preempted: to before the epoch, so that it
shows in the sign."""


class Queueing:
    """Of one engine core."""

    def __init__(self, scheduler: Any, priorities: Priorities) -> None:
        self._scheduler = scheduler
        self._priorities = priorities
        self._next_s = 0.0
        self._since_s: dict[str, float] = {}
        self._preemptions = 0
        self._on = scheduler.policy == SchedulingPolicy.PRIORITY

    def look(self, preemptions: int) -> bool:
        """Queues anew whose turn has changed; whether there was one. Between two steps.
        `preemptions`: of the engine so far."""
        now = time.monotonic()
        if not self._on or (preemptions == self._preemptions and now < self._next_s):
            return False
        self._next_s, self._preemptions = now + LOOK_EVERY_S, preemptions
        queue = list(self._scheduler.waiting)
        self._since_s = {r.request_id: self._since_s.get(r.request_id, now) for r in queue}
        turns = [(request, self._turn(request, now)) for request in queue]
        changed = [(r, turn) for r, turn in turns if turn != (r.priority, r.arrival_time)]
        if changed:
            self._scheduler.waiting.remove_requests([request for request, _ in changed])
        for request, (priority, arrival_time) in changed:
            request.llumnix_priority = client_priority(request)
            request.priority, request.arrival_time = priority, arrival_time
            self._scheduler.waiting.add_request(request)
        return bool(changed)

    def _turn(self, request: Request, now: float) -> tuple[int, float]:
        """The priority and the arrival time that it should be queued by."""
        arrived_s = request.arrival_time
        if request.num_preemptions and arrived_s > 0:
            arrived_s -= STARTED_S
        waited_s = now - self._since_s[request.request_id]
        return self._priorities.aged(request.priority, waited_s), arrived_s
