"""How many instances there are: the mean freeness of normal requests is kept within a range.

Rules
- The mean is pooled: spare tokens of all instances that stay, over all their requests. Instances
  that are starting count as empty ones, so that one shortage is not answered twice.
- Below the range for `up_after_s`: drains are taken back first, then as many instances start as
  bring the mean back into the range. Only drains that the scheduler decided are taken back. What a
  user or a signal drains stays drained, though another instance may start in its place.
- Above the range for `down_after_s`, with nothing starting, draining or cooling down: the instance
  with the fewest requests is drained, but only if the mean of the others stays within the range.
- More instances than the maximum, which a reload may have lowered, are drained one after the other.
- Fewer instances than the minimum are made up for at once. What kills one instance may kill the
  next: after the second that was given up in a row nothing starts for `RETRY_FIRST_S`, after each
  further one for twice as long, up to `RETRY_MAX_S`. The row ends when none has been given up for
  `ROW_ENDS_AFTER_S`.
"""

import math
from dataclasses import replace

from llumnix.core.events import (
    AddInstances,
    DrainInstance,
    FleetReported,
    ScalingDecision,
    UndrainInstance,
)
from llumnix.core.scheduling.tuning import (
    RETRY_FIRST_S,
    RETRY_MAX_S,
    ROW_ENDS_AFTER_S,
    TARGET_RATIO,
)
from llumnix.core.scheduling.view import ClusterView, InstanceView
from llumnix.core.settings import ScalingSettings


class Scaling:
    """Decides on the number of instances whenever the fleet reports."""

    def __init__(self, settings: ScalingSettings) -> None:
        self.settings = settings
        self._below_since_s: float | None = None
        self._above_since_s: float | None = None
        self._changed_s = -math.inf
        self._failures = _Failures()

    def take(self, settings: ScalingSettings) -> None:
        """Goes on with other settings."""
        self.settings = settings
        if not settings.on:
            self._below_since_s = self._above_since_s = None

    def decide(self, view: ClusterView, fleet: FleetReported, now: float) -> list[ScalingDecision]:
        """What to change now, if anything."""
        most = self.settings.instances_max
        if most is None:
            return []
        least = self.settings.instances_min or 1
        fleet = _with_drains_decided(fleet, view)
        there = len(fleet.serving) + fleet.starting
        if fleet.starting:
            self._changed_s = now
        self._failures.note(fleet.given_up, now)
        if there < least:
            return self._grow(least - there, fleet, now, f"{there} of at least {least} are there")
        serving = [v for i in fleet.serving if (v := view.get(i)) is not None]
        if there > most and serving and not fleet.draining:
            return [_drain(serving, f"{there} are there, and at most {most} may be")]
        if len(serving) < len(fleet.serving) or not serving:
            return []  # Some have not reported yet, so that the mean would leave them out.
        size = max(v.load.total for v in serving)
        if not size:
            return []  # The model keeps no KV, so that there is no load to go by.
        spare = sum(v.load.spare(view.priorities) for v in serving) + size * fleet.starting
        requests = sum(v.load.batch + v.load.waiting for v in serving)
        low, high = view.observed.scaling_thresholds(self.settings)
        mean = spare / max(1, requests)
        self._below_since_s = _since(self._below_since_s, mean < low, now)
        self._above_since_s = _since(self._above_since_s, mean > high, now)
        seen = f"mean freeness {mean:.0f}"
        if self._below_since_s is not None and there < most:
            if now - self._below_since_s >= self.settings.up_after_s:
                short = math.ceil((TARGET_RATIO * low * requests - spare) / size)
                count = max(1, min(short, most - there))
                return self._grow(count, fleet, now, f"{seen} is below {low:.0f}")
        elif (
            self._above_since_s is not None
            and now - self._above_since_s >= self.settings.down_after_s
            and now - self._changed_s >= self.settings.cooldown_s
            and there > least
            and not fleet.draining
            and (spare - size) / max(1, requests) > TARGET_RATIO * low
        ):
            self._above_since_s = None
            self._changed_s = now
            return [_drain(serving, f"{seen} is above {high:.0f}")]
        return []

    def _grow(
        self, count: int, fleet: FleetReported, now: float, why: str
    ) -> list[ScalingDecision]:
        own = [i for i in fleet.draining if fleet.drained_by.get(i) == "scheduler"]
        decisions: list[ScalingDecision] = [
            UndrainInstance(instance=i, why=why) for i in own[:count]
        ]
        if len(own) < count and now >= self._failures.pause_until_s:
            there = len(fleet.serving) + fleet.starting
            more = count - len(own)
            decisions.append(AddInstances(count=more, total=there + count, why=why))
        if decisions:
            self._below_since_s = None
            self._changed_s = now
        return decisions


def _drain(serving: list[InstanceView], why: str) -> DrainInstance:
    """Of the instance with the fewest requests."""
    # On a tie the newest, since its prefix cache is the coldest.
    idlest = min(reversed(serving), key=lambda v: v.requests)
    why = f"{why}; it has the fewest requests ({idlest.requests})"
    return DrainInstance(instance=idlest.report.instance, why=why)


class _Failures:
    """Counts how many instances in a row were given up."""

    def __init__(self) -> None:
        self._total: int | None = None
        self._in_a_row = 0
        self._last_s = -math.inf
        self.pause_until_s = -math.inf

    def note(self, given_up: int, now: float) -> None:
        """Takes in the fleet's running total. Several at a time count as one: they have one
        cause."""
        if self._total is not None and given_up > self._total:
            self._in_a_row = 1 if now - self._last_s > ROW_ENDS_AFTER_S else self._in_a_row + 1
            self._last_s = now
            if self._in_a_row > 1:
                pause_s = RETRY_FIRST_S * 2 ** min(self._in_a_row - 2, 16)
                self.pause_until_s = now + min(pause_s, RETRY_MAX_S)
        self._total = given_up


def _with_drains_decided(fleet: FleetReported, view: ClusterView) -> FleetReported:
    """The fleet once it has begun the drains that this scheduler decided: a report that was made
    before the fleet heard of a drain still lists that instance among those that serve."""
    serving = [v for i in fleet.serving if (v := view.get(i)) is not None]
    drains = tuple(v.report.instance for v in serving if v.drain_decided_s is not None)
    if not drains:
        return fleet
    return replace(
        fleet,
        serving=tuple(i for i in fleet.serving if i not in drains),
        draining=fleet.draining + drains,
        drained_by={**fleet.drained_by, **dict.fromkeys(drains, "scheduler")},
    )


def _since(since_s: float | None, holds: bool, now: float) -> float | None:
    if not holds:
        return None
    return now if since_s is None else since_s
