"""Runs the core again on an event log, and compares its decisions with the logged ones.

Each scheduler gets its facts at their times, each machine of a migration its events. If a
scheduler's start is not in the log, its facts are counted and not replayed. A log of another
version is refused, since its names of messages and events differ.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import msgspec

from llumnix.core.events import Decision, Fact, LoadReported
from llumnix.core.migration.tables import (
    DestinationEvent,
    SourceEvent,
    destination_machine,
    source_machine,
)
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import InstanceId
from llumnix.errors import ProtocolError, UsageError
from llumnix.observe.event_log import LOG_VERSION, log_version

DIFFERENCES_MAX = 20
_FACTS: dict[str, type] = {c.__name__: c for c in get_args(Fact)}
_DECISIONS: dict[str, type] = {c.__name__: c for c in get_args(Decision)}
_SIDES = {
    "source": (source_machine, SourceEvent),
    "destination": (destination_machine, DestinationEvent),
}


@dataclass(slots=True, kw_only=True)
class Replayed:
    """How a replay went."""

    facts: int = 0
    decisions: int = 0
    steps: int = 0  # transitions of migrations
    skipped: int = 0  # facts of schedulers whose start is not in the log
    dropped: int = 0  # lines that the writers had to leave out
    differences: list[str] = field(default_factory=list)  # the first `DIFFERENCES_MAX`


class _Replay:
    def __init__(self) -> None:
        self.result = Replayed()
        self._lines = 0
        self._schedulers: dict[str, Scheduler] = {}
        self._expected: dict[str, list[Any]] = {}
        self._machines: dict[tuple[str, str, str], Any] = {}
        # Writers with missing lines, and migrations that began before the gap.
        self._lossy: set[str] = set()
        self._unknown: set[tuple[str, str, str]] = set()

    def line(self, number: int, line: dict[str, Any]) -> None:
        self._lines = number
        who, kind = line["who"], line["kind"]
        if kind == "started":
            self.no_more(who, number)
            settings = msgspec.convert(line["settings"], SchedulerSettings)
            self._schedulers[who] = Scheduler(settings)
        elif kind == "fact":
            self.no_more(who, number)
            scheduler = self._schedulers.get(who)
            if scheduler is None:
                self.result.skipped += 1
                return
            fact: Fact = msgspec.convert(line["body"], _FACTS[line["name"]])
            self.result.facts += 1
            self._expected[who] = scheduler.handle(fact, line["at"])
        elif kind == "again" and who in self._schedulers:
            self.no_more(who, number)
            scheduler = self._schedulers[who]
            known = scheduler.view.get(InstanceId(line["instance"]))
            if known is not None:
                more = {"sequence": line["sequence"], "stalled_s": line["stalled_s"]}
                report = replace(known.report, admitted=(), orders=(), **more)
                scheduler.handle(LoadReported(report=report), line["at"])
        elif kind == "dropped":
            self.forget(who, line["lines"])
        elif kind == "decision" and who in self._schedulers:
            self.result.decisions += 1
            was: Decision = msgspec.convert(line["body"], _DECISIONS[line["name"]])
            now = self._expected.get(who)
            again = now.pop(0) if now else None
            if again != was:
                self.differ(number, f"was {was}, is {again}")
        elif kind == "step":
            self.step(number, line)

    def step(self, number: int, line: dict[str, Any]) -> None:
        key = (line["who"], line["role"], line["migration"])
        if key in self._unknown:
            return
        make, events = _SIDES[line["role"]]
        new = key not in self._machines
        machine = self._machines.setdefault(key, make(line["migration"]))
        try:
            action = machine.feed(events(line["event"]))
        except ProtocolError as error:
            if new and line["who"] in self._lossy:
                self._unknown.add(key)
            else:
                self.result.steps += 1
                self.differ(number, str(error))
            return
        self.result.steps += 1
        was, again = (line["state"], line["action"]), (machine.state.value, action.value)
        if was != again:
            self.differ(number, f"was {was}, is {again}")

    def forget(self, who: str, lines: int) -> None:
        """So many lines of a writer are missing. What follows them cannot be compared."""
        self.result.dropped += lines
        self._schedulers.pop(who, None)
        self._expected.pop(who, None)
        self._lossy.add(who)
        for key in [key for key in self._machines if key[0] == who]:
            del self._machines[key]
            self._unknown.add(key)

    def end(self) -> None:
        for who in list(self._expected):
            self.no_more(who, self._lines + 1)

    def no_more(self, who: str, number: int) -> None:
        """Every decision of the replay must have been read from the log by now."""
        for decision in self._expected.pop(who, []):
            self.differ(number, f"before this line: was nothing, is {decision}")

    def differ(self, number: int, text: str) -> None:
        if len(self.result.differences) < DIFFERENCES_MAX:
            self.result.differences.append(f"line {number}: {text}")


def replay(path: Path) -> Replayed:
    """Replays the log; `UsageError` if the file is not one, or one of another version."""
    run = _Replay()
    torn: UsageError | None = None  # A full disk tore the line, if a line `dropped` follows.
    try:
        version = log_version(path)
        if version is not None and version != LOG_VERSION:
            raise UsageError(
                f"{path} is an event log of version {version}, and this llumnix replays version "
                f"{LOG_VERSION}; replay it with the llumnix that wrote it"
            )
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = msgspec.json.decode(raw)
                except msgspec.DecodeError as error:
                    torn = torn or _not_a_line(path, number, error)
                    continue
                try:
                    torn = None if line["kind"] == "dropped" else torn
                    run.line(number, line)
                except (
                    msgspec.MsgspecError,
                    AttributeError,
                    KeyError,
                    RecursionError,
                    TypeError,
                    ValueError,
                ) as error:
                    raise _not_a_line(path, number, error) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error
    if torn is not None:
        raise torn
    run.end()
    return run.result


def _not_a_line(path: Path, number: int, error: Exception) -> UsageError:
    return UsageError(
        f"{path}, line {number}: not a line of an event log ({error}); give a file that "
        "`llumnix serve --event-log` wrote"
    )
