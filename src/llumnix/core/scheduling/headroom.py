"""How much headroom is kept: no more than is of use where all instances are full.

Rules
- Urgent requests decode faster among fewer neighbours. Where other instances use half of their
  memory, one that keeps 88 % free is far faster. Where they use nearly all of it, so much headroom
  fills them up, and normal requests pay for it.
- So an instance with headroom may use `priorities.headroom_need` times what instances use on the
  mean, as they report it, smoothed over `USE_S`.
- The headroom changes in steps of `HEADROOM_STEP`, at most once in `USE_EVERY_S`. It changes when a
  report comes and not in a round of pairing, because the event log has only those rounds that
  decided something.
- The log leaves out most reports that repeat the one before, so that a replay smooths in other
  steps. Where the headroom is near its next step, its decisions may differ from the logged ones.
"""

import math
from collections.abc import Iterable

from llumnix.core.priorities import Priorities
from llumnix.core.reports import LoadReport
from llumnix.core.scheduling.load import Load, derive, mean_use
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
        self._used: float | None = None  # None before the first report
        self._looked_s = -math.inf

    def follow(self, view: ClusterView, now: float) -> None:
        """Takes in that a report has come: adapts what the view keeps to the use of memory."""
        past_s = now - self._looked_s
        if not self._set.headroom_max or past_s < USE_EVERY_S:
            return
        self._looked_s = now
        loads = [v.load for v in view if v.accepting and v.answers(now)]
        if not loads:
            return
        used = mean_use(loads)
        before = used if self._used is None else self._used
        self._used = before + (used - before) * min(1.0, past_s / USE_S)
        found = self._set.needed(self._used)
        if abs(found.headroom_max - view.priorities.headroom_max) >= HEADROOM_STEP:
            view.keep(found)
