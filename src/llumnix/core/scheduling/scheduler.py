"""The scheduler: one mutator that takes facts and returns decisions.

It sees instances, not requests or engines. Its host (the controller's process, the simulator, a
test) passes the time in and carries the decisions out.
"""

from llumnix.core.events import (
    Decision,
    Dispatch,
    DrainInstance,
    Fact,
    FleetReported,
    InstanceLost,
    LoadReported,
    NoInstance,
    PrefixesChanged,
    RequestArrived,
    SettingsChanged,
    Tick,
    UndrainInstance,
)
from llumnix.core.reports import Heard
from llumnix.core.scheduling.dispatch import DISPATCH_POLICIES
from llumnix.core.scheduling.headroom import Headroom
from llumnix.core.scheduling.intake.admission import Admission
from llumnix.core.scheduling.intake.changes import When, changes
from llumnix.core.scheduling.intake.malformed import why_malformed
from llumnix.core.scheduling.pairing import Pairing
from llumnix.core.scheduling.presets import POLICIES, balances, priorities_of
from llumnix.core.scheduling.scaling import Scaling
from llumnix.core.scheduling.view import ClusterView
from llumnix.core.settings import SchedulerSettings
from llumnix.errors import ProtocolError

STORY_MAX = 300
"""Characters of a refused fact that the error shows."""


class Scheduler:
    """Places requests on instances, moves load between them, and scales."""

    def __init__(self, settings: SchedulerSettings) -> None:
        preset = POLICIES[settings.policy]
        self.settings = settings
        self.heard = Heard.NEWS  # what became of the last report
        self.view = ClusterView(priorities_of(settings), settings.migration)
        self._headroom = Headroom(self.view.priorities)
        self._admission = Admission(settings, self.view)
        self._dispatch = DISPATCH_POLICIES[preset.dispatch]()
        self._pairing = Pairing(settings.migration, balance=balances(settings))
        self._scaling = Scaling(settings.scaling)

    def handle(self, fact: Fact, now: float) -> list[Decision]:
        """Takes in one fact at time `now` (seconds, monotonic) and returns what to do. A fact that
        makes no sense changes nothing and raises `ProtocolError`."""
        why = why_malformed(fact, len(self.view.priorities))
        if why is not None:
            raise ProtocolError(f"refused, since it says {why}: {str(fact)[:STORY_MAX]}")
        match fact:
            case LoadReported(report=report):
                self._admission.take(report, now)
                self.heard = self.view.apply(report, now)
                if self.heard is Heard.NEWS:
                    self._headroom.follow(report, self.view, now)
            case RequestArrived():
                return [self._place(fact, now)]
            case Tick():
                return list(self._pairing.round(self.view, now))
            case InstanceLost(instance=instance, engine_index=engine_index):
                over = self.view.is_over(instance, engine_index)
                self.view.lose(instance, engine_index)
                if instance not in self.view:
                    self._headroom.forget(instance, now)
                if not over:  # Each frontend says it, and a successor may have come meanwhile.
                    self._dispatch.forget(instance)
            case PrefixesChanged(instance=instance, engine_index=engine_index):
                if not self.view.is_over(instance, engine_index):
                    self._dispatch.learn(fact)
            case FleetReported():
                return self._scale(fact, now)
            case SettingsChanged(settings=settings):
                self._take(settings)
        return []

    def _take(self, settings: SchedulerSettings) -> None:
        """Goes on with other settings, and with all that it knows."""
        fixed = [knob for knob, when in changes(self.settings, settings) if when is When.AT_START]
        if fixed:
            raise ProtocolError(f"refused: {', '.join(fixed)} cannot change while llumnix runs")
        self.settings = settings
        self.view.follow(settings.migration)
        self._admission.take_limits(settings)
        self._pairing.take(settings.migration, balance=balances(settings))
        self._scaling.take(settings.scaling)

    def _place(self, fact: RequestArrived, now: float) -> Decision:
        refusal = self._admission.refusal(fact, now)
        if refusal is not None:
            return refusal
        found = self._dispatch.choose(self.view, fact, now)
        if found is None:
            return NoInstance(request=fact.request, why="no instance that takes requests is known")
        report = found.instance.report
        self.view.book(
            report.instance,
            fact.request,
            fact.prompt_tokens,
            now,
            priority=fact.priority,
            cached=found.cached,
        )
        return Dispatch(
            request=fact.request,
            instance=report.instance,
            engine_index=report.engine_index,
            why=found.why,
            code=found.code,
        )

    def _scale(self, fact: FleetReported, now: float) -> list[Decision]:
        decisions = self._scaling.decide(self.view, fact, now)
        for decision in decisions:
            if isinstance(decision, DrainInstance):
                self.view.drain(decision.instance, now)
            elif isinstance(decision, UndrainInstance):
                self.view.undrain(decision.instance)
        return list(decisions)


def handling_key(fact: object) -> tuple[int, int]:
    """Sort key for facts that arrived together: news of instances first, then requests, the more
    urgent first. Sorting is stable, so that within a class the first to come is the first."""
    return (1, fact.priority) if isinstance(fact, RequestArrived) else (0, 0)
