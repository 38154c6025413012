"""How long an engine's steps take, and whether one more fits in before a handover.

Rules
- A step is guessed to be as long as the median of the last few: a prompt among them says little
  about the next.
- One more step is begun if it would end nearer to the handover than the step before it does: too
  late by half a step at most, or the engine stands still for half a step at most.
"""

import statistics
from collections import deque

RECENT_STEPS = 9


class Pace:
    """One engine's. `step_s`: of a step, of late; 0 before the first."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.step_s = 0.0

    def took(self, seconds: float) -> None:
        """A step has ended."""
        self._recent.append(seconds)
        self.step_s = statistics.median(self._recent)


def one_more_fits(free_s: float, step_s: float, due_s: float) -> bool:
    """Whether an engine that will be free at `free_s` should begin a step of `step_s` then, ahead
    of a handover that is due at `due_s`."""
    return free_s + step_s / 2 <= due_s
