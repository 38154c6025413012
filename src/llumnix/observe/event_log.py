"""The event log: facts, decisions, steps of migrations, revivals, requests, what became of
instances; one JSON object a line.

All processes of a deployment on one host append to the same file. Each line is written with one
call, so lines never mix. `at` is the writer's monotonic clock in seconds, `time` the wall clock.
Lines of one writer (`who`) are in the order of the events. observe/replay.py runs the core on the
log again, the simulator takes its requests as a trace (sim/workloads/traces.py), and the page shows
it as it was (frontend/ui/past.py).

Rules
- The first line of a file names the version of its lines (`LOG_VERSION`). A replay refuses a file
  of another version. A writer puts such a file aside and does not append to it.
- A thread writes, so that a slow disk delays no engine, frontend or controller, and a file that
  cannot be opened keeps none from starting. At most `QUEUED_MAX` lines wait for the thread. A line
  that finds no room in the queue or on the disk is counted.
  Writing is tried again every `RETRY_S`; a line `dropped` then says how many lines are missing.
- A tick without a decision is not written. Of reports that change nothing but when their instance
  was heard last, only the last before a line that may depend on it is written, as a short line
  `again`. One that is too late to change anything is not written. What a fleet says again is
  left out once nothing can follow from it. What a prefix cache says again is a short line `kept`.
- A fact that ended with an exception is a line `failed` with the reason.
- Files are bounded in size and number (observe/log_files.py).
"""

import time
from typing import Any

from llumnix.config import LogPlace
from llumnix.core.events import (
    Decision,
    Fact,
    FleetReported,
    LoadReported,
    PrefixesChanged,
    SettingsChanged,
    Tick,
)
from llumnix.core.reports import Heard, LoadReport
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import InstanceId, MigrationId
from llumnix.observe.log_files import Writer, line_of
from llumnix.observe.notes import Notes


class EventLog:
    """One writer of the log at `place`; without one it writes nothing. `must_open`: `OSError` if
    the file cannot be opened; else that is said once, and tried again. `notes` keeps what happened
    lately to requests, with or without a place."""

    def __init__(self, place: LogPlace | None, *, who: str, must_open: bool = False) -> None:
        self._who = who
        self.notes = Notes()
        self._writer: Writer | None = None
        # The last report of each instance that was left out, and when it came.
        self._again: dict[InstanceId, tuple[LoadReport, float]] = {}
        self._fleet: FleetReported | None = None
        self._prefixes: dict[InstanceId, PrefixesChanged] = {}  # the last of each instance
        self._scales = False
        # Whether the fleet has said that since the last fact from which scaling may follow.
        self._settled = False
        if place is not None:
            self._writer = Writer(place.path, who, place.file_max_bytes, must_open=must_open)

    @property
    def dropped(self) -> int:
        """How many lines could not be written so far."""
        return 0 if self._writer is None else self._writer.dropped

    def close(self) -> None:
        """Writes what waits, and closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def started(self, settings: SchedulerSettings) -> None:
        """A scheduler begins, knowing nothing but its settings. Keys are not written."""
        self._again.clear()
        self._prefixes.clear()
        self._fleet, self._settled = None, False
        self._scales = settings.scaling.on
        self._write("started", time.monotonic(), {"settings": settings.without_keys()})

    def fact(
        self, fact: Fact, at: float, *, answered: bool = True, heard: Heard = Heard.NEWS
    ) -> None:
        """A fact that the scheduler handled then. `answered`: whether decisions followed. `heard`:
        if it is a report, what became of that."""
        if self._writer is None:
            return
        match fact:
            case LoadReported(report=report):
                if heard is Heard.AGAIN:
                    self._again[report.instance] = report, at
                if heard in (Heard.AGAIN, Heard.TOO_LATE):
                    return
                self._catch_up(report.instance)
                self._settled = False
            case Tick() if not answered:
                return
            case PrefixesChanged(instance=instance):
                last, self._prefixes[instance] = self._prefixes.get(instance), fact
                if fact.cleared and fact == last:
                    self._write("kept", at, {"instance": instance})
                    return
            case FleetReported():
                known, self._fleet = self._fleet, fact
                if fact == known and not answered and (self._settled or not self._scales):
                    return
                # While instances start, each report counts.
                self._settled = not answered and not fact.starting
                self._catch_up()
            case SettingsChanged(settings=settings):
                self._scales, self._settled = settings.scaling.on, False
                self._catch_up()
            case _:
                self._catch_up()
                self._settled = False
        self._write("fact", at, {"name": type(fact).__name__, "body": fact})

    def failed(self, fact: Fact, at: float, why: str) -> None:
        """A fact that the scheduler could not handle, which is a bug. It may have taken in a half,
        so what it decides from then on does not follow from the facts alone."""
        self._catch_up()
        self._write("failed", at, {"name": type(fact).__name__, "body": fact, "why": why})

    def _catch_up(self, instance: InstanceId | None = None) -> None:
        """Writes the reports that were left out last, of one instance or of all. What is written
        next may depend on when they came."""
        names = list(self._again) if instance is None else [instance]
        known = [self._again.pop(name) for name in names if name in self._again]
        for report, at in sorted(known, key=lambda pair: pair[1]):
            more = {"sequence": report.sequence, "stalled_s": report.stalled_s}
            self._write("again", at, {"instance": report.instance, **more})

    def decision(self, decision: Decision, at: float) -> None:
        """A decision of the scheduler."""
        self._write("decision", at, {"name": type(decision).__name__, "body": decision})

    def step(self, role: str, migration: MigrationId, event: str, state: str, action: str) -> None:
        """A transition of one side of a migration."""
        if self._writer is not None:
            step = {"role": role, "migration": migration}
            self._write(
                "step", time.monotonic(), {**step, "event": event, "state": state, "action": action}
            )

    def migration(self, shown: dict[str, Any]) -> None:
        """A migration as its frontend sees it: when it is ordered, and when it has ended."""
        self.notes.note("move", shown.get("request", ""), shown.get("why", ""), move=shown)
        self._write("migration", time.monotonic(), {"body": shown})

    def revival(self, shown: dict[str, Any]) -> None:
        """A request whose engine died goes on at another."""
        self.notes.note("revive", shown.get("request", ""), shown.get("why", ""), revival=shown)
        self._write("revival", time.monotonic(), {"body": shown})

    def instance(self, note: dict[str, Any]) -> None:
        """What became of an instance, as its fleet notes it (observe/notes.py)."""
        self._write("instance", time.monotonic(), {"body": note})

    def request(self, shown: dict[str, Any]) -> None:
        """A request as its frontend saw it, when it is over."""
        self._write("request", time.monotonic(), {"body": shown})

    def _write(self, kind: str, at: float, rest: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.put(line_of(self._who, kind, at, rest))
