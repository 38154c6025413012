"""When an instance that died is started again.

The first restart comes at once. Each further one waits twice as long as the one before, unless the
instance was healthy in between. After `CRASHES_MAX` crashes in a row the instance is given up: what
has killed an engine five times will kill it again, and a user needs to read the reason.
"""

from dataclasses import dataclass

CRASHES_MAX = 5
FIRST_DELAY_S = 1.0
HEALTHY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartAfter:
    """Start it again after `delay_s` seconds."""

    delay_s: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Leave it down."""

    why: str


@dataclass(slots=True, kw_only=True)
class RestartPolicy:
    """One instance's history of crashes."""

    crashes: int = 0

    def crashed(self, served_s: float) -> RestartAfter | GiveUp:
        """Takes in one more crash, `served_s` seconds after the instance had become ready
        (0 if it never did)."""
        self.crashes = 1 if served_s >= HEALTHY_AFTER_S else self.crashes + 1
        if self.crashes >= CRASHES_MAX:
            return GiveUp(
                why=f"crashed {self.crashes} times, each less than {HEALTHY_AFTER_S:.0f} s after "
                "it was up"
            )
        if self.crashes == 1:
            return RestartAfter(delay_s=0.0, why="first crash")
        delay = FIRST_DELAY_S * 2 ** (self.crashes - 2)
        return RestartAfter(delay_s=delay, why=f"crash {self.crashes} of {CRASHES_MAX} in a row")
