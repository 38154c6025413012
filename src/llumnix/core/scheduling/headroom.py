"""How much headroom is kept: no more than is of use where all instances are full.

Rules
- Urgent requests decode faster among fewer neighbours. Where other instances use half of their
  memory, one that keeps 88 % free is far faster. Where they use nearly all of it, so much headroom
  fills them up, and normal requests pay for it.
- So an instance with headroom may use `priorities.headroom_need` times what the instances that take
  requests use on the mean, as they report it, smoothed over `USE_S`.
- The headroom changes in steps of `HEADROOM_STEP`, at most once in `USE_EVERY_S`.
- It follows from what the event log has, so that a replay keeps the same. It changes when a report
  brings news and at no other time, because the log leaves out reports that repeat the one before,
  and rounds of pairing that decided nothing. What an instance has reported counts until its next
  news, or until it is lost, because the log does not tell when an instance fell silent.
"""

import math
from collections.abc import Iterable

from llumnix.core.priorities import Priorities
from llumnix.core.reports import LoadReport
from llumnix.core.scheduling.load import Load, derive, mean_use, used_by
from llumnix.core.scheduling.tuning import HEADROOM_STEP, USE_EVERY_S, USE_S
from llumnix.core.scheduling.view import ClusterView
from llumnix.core.types import EngineIndex, InstanceId

Freeness = dict[tuple[InstanceId, EngineIndex], float]
"""Tokens a request, of each run of an instance."""


def kept_now(priorities: Priorities, loads: Iterable[Load]) -> Priorities:
    """The classes as they are set, with the headroom that is kept where instances have these loads.
    Only for showing freeness: decisions use the smoothed mean of `Headroom`."""
    return priorities.needed(mean_use(loads))


def freeness_now(priorities: Priorities, reports: Iterable[LoadReport]) -> Freeness:
    """The freeness to show of each instance that takes requests, in tokens a request."""
    loads = [(report, derive(report, (), 0)) for report in reports]
    kept = kept_now(priorities, (load for _, load in loads))
    return {
        (report.instance, report.engine_index): load.freeness(kept)
        for report, load in loads
        if report.accepting
    }


class Headroom:
    """The headroom of one deployment. `priorities`: its classes as they are set."""

    def __init__(self, priorities: Priorities) -> None:
        self._set = priorities
        # KV tokens that are used and that there are, of each instance that takes requests.
        self._known: dict[InstanceId, tuple[int, int]] = {}
        self._used = self._total = 0  # their sums
        self._mean = 0.0  # the share that is used, smoothed until
        self._until_s = 0.0  # then
        self._looked_s = -math.inf

    def follow(self, report: LoadReport, view: ClusterView, now: float) -> None:
        """Takes in a report that brings news: adapts what the view keeps to the use of memory."""
        if not self._set.headroom_max:
            return
        total = report.kv_tokens_total if report.accepting else 0
        self._count(report.instance, min(used_by(report), total), total, now)
        if now - self._looked_s < USE_EVERY_S or not self._total:
            return
        self._looked_s = now
        found = self._set.needed(self._mean)
        if abs(found.headroom_max - view.priorities.headroom_max) >= HEADROOM_STEP:
            view.keep(found)

    def forget(self, instance: InstanceId, now: float) -> None:
        """The instance is gone."""
        self._count(instance, 0, 0, now)
        del self._known[instance]

    def _count(self, instance: InstanceId, used: int, total: int, now: float) -> None:
        """From now on this instance uses so many of its KV tokens."""
        began = not self._total
        if not began:
            short = self._used / self._total - self._mean
            self._mean -= short * math.expm1((self._until_s - now) / USE_S)
        self._until_s = now
        was_used, was_total = self._known.get(instance, (0, 0))
        self._known[instance] = used, total
        self._used += used - was_used
        self._total += total - was_total
        if began and self._total:
            self._mean = self._used / self._total
