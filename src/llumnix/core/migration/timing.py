"""How long an engine's steps take, and whether one more fits in before a handover.

Rules
- A step is guessed to be as long as the median of the last few. Those with prompts do not count
  where that is known, for near a handover none are computed.
- One more step is begun if it would end no more than `LATE_MAX` of a step after the handover. If
  not, the engine stands still until then, for less than the rest of a step.
"""

import statistics
from collections import deque

RECENT_STEPS = 9
LATE_MAX = 0.5
"""With a half, that step ends nearer to the handover than it would begin. Less would be a shorter
gap for the request that moves, and a longer one for all that run where it goes."""


class StepTimer:
    """One engine's. `step_s`: of a step without prompts, of late; 0 before the first."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.step_s = 0.0

    def record_step(self, seconds: float, *, prompts: bool = False) -> None:
        """A step has ended; `prompts`: it is known to have computed some."""
        if not prompts:
            self._recent.append(seconds)
            self.step_s = statistics.median(self._recent)


def one_more_fits(free_s: float, step_s: float, due_s: float) -> bool:
    """Whether an engine that will be free at `free_s` should begin a step of `step_s` then, ahead
    of a handover that is due at `due_s`."""
    return free_s + (1 - LATE_MAX) * step_s <= due_s
