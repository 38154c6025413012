"""Virtual time: a heap of events, each a call at a time.

Simultaneous events happen by rank, and those of one rank in the order in which they were made. So a
run is the same for the same seed, and what happens at one instant has an order that means
something: clients get their tokens before a crash takes them, a request that arrives finds all
messages delivered, and the scheduler looks at the loads last.
"""

import heapq
from collections.abc import Callable
from typing import Any

TOKENS, DEATHS, MESSAGES, ARRIVALS, TICKS = range(5)
"""The ranks, first to last. Ends of steps count as tokens."""


class EventHeap:
    """The events to come. `now`: the time of the one that happens, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, when_s: float, rank: int, what: Callable[..., None], *args: Any) -> None:
        """Calls `what(*args)` at that time."""
        self._count += 1
        heapq.heappush(self._heap, (when_s, rank, self._count, what, args))

    def run(self, until_s: float, over: Callable[[], bool]) -> None:
        """Lets events happen until that time, or until it is over."""
        heap = self._heap
        while heap and heap[0][0] <= until_s and not over():
            self.now, _, _, what, args = heapq.heappop(heap)
            what(*args)
