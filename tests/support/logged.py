"""A scheduler whose facts and decisions go into an event log, as in cluster/controller.py."""

from pathlib import Path

from llumnix.config import LogPlace
from llumnix.core.events import Decision, Fact
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.settings import SchedulerSettings
from llumnix.observe.event_log import EventLog


class Logged:
    """A scheduler that knows nothing yet, and its log."""

    def __init__(
        self, path: Path, settings: SchedulerSettings | None = None, who: str = "controller 1"
    ) -> None:
        settings = SchedulerSettings() if settings is None else settings
        self.scheduler = Scheduler(settings)
        self.log = EventLog(LogPlace(path=str(path)), who=who)
        self.log.started(settings)

    def tell(self, fact: Fact, at: float) -> list[Decision]:
        """What the scheduler decides on a fact at that time."""
        decisions = self.scheduler.handle(fact, at)
        self.log.fact(fact, at, answered=bool(decisions), heard=self.scheduler.heard)
        for decision in decisions:
            self.log.decision(decision, at)
        return decisions
