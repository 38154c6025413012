"""How long an engine's steps take, and whether one more fits in before a handover.

Rules
- The next step is expected to take the median of the last few. Steps that are known to have
  computed prompts do not count, since near a handover none are computed.
- One more step is begun if it would end no later than `LATE_MAX` of a step after the handover.
  Otherwise the engine stands still until then, for less than the rest of a step.
"""

import statistics
from collections import deque

RECENT_STEPS = 9
LATE_MAX = 0.5
"""In steps. With a half, the step ends nearer to the handover than it would begin. With less, the
request that moves would wait less, and all that run at its destination longer."""


class StepTimer:
    """The steps of one engine."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.step_s = 0.0  # of a step without prompts; 0 before the first

    def record_step(self, seconds: float, *, prompts: bool = False) -> None:
        """A step has ended. `prompts`: it is known to have computed some."""
        if not prompts:
            self._recent.append(seconds)
            self.step_s = statistics.median(self._recent)


def one_more_fits(free_s: float, step_s: float, due_s: float) -> bool:
    """Whether an engine that will be free at `free_s` should begin a step of `step_s` then, ahead
    of a handover that is due at `due_s`."""
    return free_s + (1 - LATE_MAX) * step_s <= due_s
