"""Runs the core again on an event log, and compares its decisions with the logged ones.

Each scheduler gets its facts at their times, each machine of a migration its events. If a
scheduler's start is not in the log, its facts are counted and not replayed. Of a log of several
files all are read, the oldest first. A log of another version is refused, since its names of
messages and events differ.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import msgspec

from llumnix.core.events import Decision, Fact, LoadReported, PrefixesChanged
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
from llumnix.observe.log_files import NOT_A_LINE, check_version, files_of, first_goes_on

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
    failed: int = 0  # facts that ended with an exception
    differences: list[str] = field(default_factory=list)  # the first `DIFFERENCES_MAX`


class _Replay:
    def __init__(self, *, cut: bool) -> None:
        """`cut`: the log begins in the midst of things, since older files have gone."""
        self.result = Replayed()
        self._cut = cut
        self._place = ""  # of the line that is read
        # The last that each instance said of its prefix cache.
        self._prefixes: dict[tuple[str, str], PrefixesChanged] = {}
        self._schedulers: dict[str, Scheduler] = {}
        self._expected: dict[str, list[Any]] = {}
        self._machines: dict[tuple[str, str, str], Any] = {}
        # Writers with missing lines, and migrations that began before the gap.
        self._lossy: set[str] = set()
        self._unknown: set[tuple[str, str, str]] = set()

    def line(self, place: str, line: dict[str, Any]) -> None:
        self._place = place
        who, kind = line["who"], line["kind"]
        if kind == "started":
            self.no_more(who)
            settings = msgspec.convert(line["settings"], SchedulerSettings)
            self._schedulers[who] = Scheduler(settings)
        elif kind == "fact":
            self.no_more(who)
            scheduler = self._schedulers.get(who)
            if scheduler is None:
                self.result.skipped += 1
                return
            fact: Fact = msgspec.convert(line["body"], _FACTS[line["name"]])
            self.result.facts += 1
            if isinstance(fact, PrefixesChanged):
                self._prefixes[who, fact.instance] = fact
            self._expected[who] = scheduler.handle(fact, line["at"])
        elif kind == "again" and who in self._schedulers:
            self.no_more(who)
            scheduler = self._schedulers[who]
            known = scheduler.view.get(InstanceId(line["instance"]))
            if known is not None:
                more = {"sequence": line["sequence"], "stalled_s": line["stalled_s"]}
                report = replace(known.report, admitted=(), orders=(), **more)
                scheduler.handle(LoadReported(report=report), line["at"])
        elif kind == "kept" and who in self._schedulers:
            self.no_more(who)
            said = self._prefixes[who, line["instance"]]
            self._expected[who] = self._schedulers[who].handle(said, line["at"])
        elif kind == "dropped":
            self.forget(who, line["lines"])
        elif kind == "failed":
            self.no_more(who)
            self.result.failed += 1
            self.forget(who, 0)
        elif kind == "decision" and who in self._schedulers:
            self.result.decisions += 1
            was: Decision = msgspec.convert(line["body"], _DECISIONS[line["name"]])
            now = self._expected.get(who)
            again = now.pop(0) if now else None
            if again != was:
                self.differ(f"was {was}, is {again}")
        elif kind == "step":
            self.step(line)

    def step(self, line: dict[str, Any]) -> None:
        key = (line["who"], line["role"], line["migration"])
        if key in self._unknown:
            return
        make, events = _SIDES[line["role"]]
        # It may have begun before the lines that are there.
        unsure = key not in self._machines and (self._cut or line["who"] in self._lossy)
        machine = self._machines.setdefault(key, make(line["migration"]))
        was, again = (line["state"], line["action"]), None
        try:
            action = machine.feed(events(line["event"]))
            again = (machine.state.value, action.value)
        except ProtocolError as error:
            differs = str(error)
        else:
            differs = f"was {was}, is {again}"
        if was != again and unsure:
            del self._machines[key]
            self._unknown.add(key)
            return
        self.result.steps += 1
        if was != again:
            self.differ(differs)

    def forget(self, who: str, lines: int) -> None:
        """So many lines of a writer are missing. What follows cannot be compared."""
        self.result.dropped += lines
        self._schedulers.pop(who, None)
        self._expected.pop(who, None)
        self._lossy.add(who)
        for key in [key for key in self._machines if key[0] == who]:
            del self._machines[key]
            self._unknown.add(key)

    def end(self) -> None:
        self._place = "at the end"
        for who in list(self._expected):
            self.no_more(who)

    def no_more(self, who: str) -> None:
        """Every decision of the replay must have been read from the log by now."""
        for decision in self._expected.pop(who, []):
            self.differ(f"before this line: was nothing, is {decision}")

    def differ(self, text: str) -> None:
        if len(self.result.differences) < DIFFERENCES_MAX:
            self.result.differences.append(f"{self._place}: {text}")


def replay(path: Path) -> Replayed:
    """Replays the log; `UsageError` if the file is not one, or one of another version."""
    try:
        check_version(path)
        files = files_of(path)
        run = _Replay(cut=first_goes_on(files[0]))
        _read(files, run)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error
    run.end()
    return run.result


def _read(files: list[Path], run: _Replay) -> None:
    torn: UsageError | None = None  # A full disk tore the line, if a line `dropped` follows.
    for path in files:
        of_file = f"{path.name}, " if len(files) > 1 else ""
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = msgspec.json.decode(raw)
                except NOT_A_LINE as error:
                    torn = torn or _not_a_line(path, number, error)
                    continue
                try:
                    torn = None if line["kind"] == "dropped" else torn
                    run.line(f"{of_file}line {number}", line)
                except (
                    msgspec.MsgspecError,
                    AttributeError,
                    KeyError,
                    RecursionError,
                    TypeError,
                    ValueError,
                ) as error:
                    raise _not_a_line(path, number, error) from error
    if torn is not None:
        raise torn


def _not_a_line(path: Path, number: int, error: Exception) -> UsageError:
    return UsageError(
        f"{path}, line {number}: not a line of an event log ({error}); give a file that "
        "`llumnix serve --event-log` wrote"
    )
