"""How long engines take to start, and so when the next one will be there."""

from collections import deque
from statistics import median

from llumnix.core.types import EngineIndex

REMEMBERED_MAX = 16
AT_LEAST_S = 1.0
"""A frontend that joins later finds engines that are up already. These say nothing of a start."""


class StartTimes:
    """The starts of which one frontend knows. Times are of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._began_s: dict[EngineIndex, float] = {}
        self._took_s: deque[float] = deque(maxlen=REMEMBERED_MAX)

    def began(self, engine_index: EngineIndex, now_s: float) -> None:
        """An engine is being started."""
        self._began_s[engine_index] = now_s

    def up(self, engine_index: EngineIndex, now_s: float) -> None:
        """It is there."""
        began_s = self._began_s.pop(engine_index, None)
        if began_s is not None and now_s - began_s > AT_LEAST_S:
            self._took_s.append(now_s - began_s)

    def over(self, engine_index: EngineIndex) -> None:
        """It is gone, whether or not it was ever there."""
        self._began_s.pop(engine_index, None)

    def left_s(self, now_s: float) -> float | None:
        """Until the next engine is there, if all take as long as they use to. One that takes longer
        is expected at any moment. None if nothing is known."""
        if not self._took_s:
            return None
        usual_s = median(self._took_s)
        return max(0.0, usual_s - now_s + min(self._began_s.values(), default=now_s))
