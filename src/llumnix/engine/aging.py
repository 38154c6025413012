"""Waiting requests age: who has waited for long is queued as the most urgent class.

vLLM 0.32 internals relied on here (tests/house/test_vllm_contract.py fails when one changes): with
priority scheduling `scheduler.waiting` is a heap of requests ordered by `priority`, then
`arrival_time`, so a number may change only while its request is out of it; preemption goes by the
same two.
"""

import time
from typing import Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy

from llumnix.core.priorities import Priorities
from llumnix.engine.load_reader import client_priority

LOOK_EVERY_S = 0.5


class Aging:
    """Of one engine core's queue."""

    def __init__(self, scheduler: Any, priorities: Priorities) -> None:
        self._scheduler = scheduler
        self._priorities = priorities
        self._next_s = 0.0
        self._since_s: dict[str, float] = {}
        self._on = scheduler.policy == SchedulingPolicy.PRIORITY

    def look(self) -> bool:
        """Queues anew who has aged; whether there was one. Between two steps."""
        now = time.monotonic()
        if not self._on or now < self._next_s:
            return False
        self._next_s = now + LOOK_EVERY_S
        queue = list(self._scheduler.waiting)
        self._since_s = {r.request_id: self._since_s.get(r.request_id, now) for r in queue}
        aged = [
            (request, number)
            for request in queue
            if (number := self._aged(request, now)) != request.priority
        ]
        if aged:
            self._scheduler.waiting.remove_requests([request for request, _ in aged])
        for request, number in aged:
            request.llumnix_priority = client_priority(request)
            request.priority = number
            self._scheduler.waiting.add_request(request)
        return bool(aged)

    def _aged(self, request: Any, now: float) -> int:
        return self._priorities.aged(request.priority, now - self._since_s[request.request_id])
