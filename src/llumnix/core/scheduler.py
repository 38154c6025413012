"""The scheduler: one mutator that takes facts and returns decisions.

It sees instances, not engines: whoever hosts it (the controller's process, a simulator, a test)
passes the time in and carries the decisions out.
"""

from llumnix.core.events import (
    Decision,
    Dispatch,
    Fact,
    InstanceLost,
    LoadReported,
    NoInstance,
    RequestArrived,
)
from llumnix.core.policies.dispatch import DispatchPolicy
from llumnix.core.view import ClusterView


class Scheduler:
    """Places requests on instances by a policy."""

    def __init__(self, dispatch: DispatchPolicy) -> None:
        self.view = ClusterView()
        self._dispatch = dispatch

    def handle(self, fact: Fact, now: float) -> list[Decision]:
        """Takes in one fact at time `now` (seconds, monotonic) and returns what to do."""
        match fact:
            case LoadReported(report=report):
                self.view.apply(report, now)
                return []
            case InstanceLost(instance=instance, engine_index=engine_index):
                self.view.lose(instance, engine_index)
                return []
            case RequestArrived():
                return [self._place(fact, now)]

    def _place(self, fact: RequestArrived, now: float) -> Decision:
        candidates = self.view.candidates(now)
        if not candidates:
            return NoInstance(request=fact.request, why="no instance that takes requests is known")
        chosen, why = self._dispatch.choose(candidates)
        report = chosen.report
        self.view.book(report.instance, fact.request, fact.prompt_tokens, now)
        return Dispatch(
            request=fact.request,
            instance=report.instance,
            engine_index=report.engine_index,
            why=why,
        )
