"""The event log: facts, decisions, steps of migrations, revivals, requests; one JSON object a line.

All processes of a deployment on one host append to the same file. Each line is written with one
call, so lines never mix. `at` is the writer's monotonic clock in seconds, `time` the wall clock.
Lines of one writer (`who`) are in the order of the events. observe/replay.py runs the core on the
log again, and the simulator takes its requests as a trace (sim/workloads/traces.py).

Rules
- The first line of a file names the version of its lines (`LOG_VERSION`). A replay refuses a file
  of another version. A writer renames such a file to PATH.1 and does not append to it.
- A thread writes, so that a slow disk delays no engine, frontend or controller. At most
  `QUEUED_MAX` lines wait for it. A line that finds no room in the queue or on the disk is counted.
  Writing is tried again every `RETRY_S`; a line `dropped` then says how many lines are missing.
- A tick without a decision is not written. Of reports that say nothing new, only the last before a
  line that may depend on its time is written, as a short line `again`.
- At `FILE_MAX_BYTES` the file is renamed to PATH.1, replacing an older one, and begun again.
"""

import contextlib
import errno
import fcntl
import logging
import os
import queue
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from llumnix.core.events import Decision, Fact, LoadReported, PrefixesChanged, Tick
from llumnix.core.reports import LoadReport
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import InstanceId, MigrationId
from llumnix.observe.notes import Notes

logger = logging.getLogger("llumnix")
_encoder = msgspec.json.Encoder()

LOG_VERSION = 2
"""Raised whenever the name or the meaning of a fact, a decision or a migration's event changes.
Files of version 1 have no such line."""
QUEUED_MAX = 20_000
RETRY_S = 5.0
CLOSE_TIMEOUT_S = 2.0
FILE_MAX_BYTES = 2**30
FIRST_LINE_BYTES_MAX = 1000
LOOK_EVERY_S = 1.0
"""Between two looks at the file's size, and at whether another process has renamed it."""


class EventLog:
    """One writer of the log at `path`; without a path it writes nothing. `OSError` if the file
    cannot be opened. `notes` keeps what happened lately to requests, with or without a path."""

    def __init__(self, path: str | None, *, who: str) -> None:
        self._who = who
        self.notes = Notes()
        self._writer: _Writer | None = None
        self._reports: dict[InstanceId, LoadReport] = {}
        # The last report of each instance that was left out, and when it came.
        self._again: dict[InstanceId, tuple[LoadReport, float]] = {}
        if path is not None:
            self._writer = _Writer(path, who)

    def close(self) -> None:
        """Writes what waits, and closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def started(self, settings: SchedulerSettings) -> None:
        """A scheduler begins, knowing nothing but its settings. Keys are not written."""
        self._reports.clear()
        self._again.clear()
        self._write("started", time.monotonic(), {"settings": settings.without_keys()})

    def fact(self, fact: Fact, at: float, *, answered: bool = True) -> None:
        """A fact that the scheduler handled then. `answered`: whether decisions followed."""
        if self._writer is None:
            return
        match fact:
            case LoadReported(report=report):
                before, self._reports[report.instance] = self._reports.get(report.instance), report
                if before is not None and _same(before, report):
                    self._again[report.instance] = report, at
                    return
                self._catch_up(report.instance)
            case Tick() if not answered:
                return
            case PrefixesChanged():
                pass
            case _:
                self._catch_up()
        self._write("fact", at, {"name": type(fact).__name__, "body": fact})

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

    def request(self, shown: dict[str, Any]) -> None:
        """A request as its frontend saw it, when it is over."""
        self._write("request", time.monotonic(), {"body": shown})

    def _write(self, kind: str, at: float, rest: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.put(_line(self._who, kind, at, rest))


def _line(who: str, kind: str, at: float, rest: dict[str, Any]) -> bytes:
    line = {"at": at, "time": time.time(), "who": who, "kind": kind, **rest}
    return _encoder.encode(line) + b"\n"


def log_version(path: str | Path) -> int | None:
    """The version of the event log at `path`; None if it is empty, or no event log. OSError if it
    cannot be read."""
    if not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        first = file.readline(FIRST_LINE_BYTES_MAX)
    try:
        line = msgspec.json.decode(first, type=dict[str, Any])
    except msgspec.DecodeError:
        # Version 1 could begin with a line of any length.
        return 1 if first.startswith(b'{"at":') else None
    if line.get("kind") == "log":
        version = line.get("version")
        return version if isinstance(version, int) else None
    return 1 if {"at", "who", "kind"} <= line.keys() else None


def _same(before: LoadReport, report: LoadReport) -> bool:
    """Whether a report says no more than that its engine lives, or still stands still."""
    news = replace(report, sequence=before.sequence, stalled_s=before.stalled_s)
    return news == before and before.engine_index == report.engine_index


class _Writer:
    """Appends lines to a file, on a thread of its own."""

    def __init__(self, path: str, who: str) -> None:
        self._path = path
        self._who = who
        self._file = self._open()
        self._lines: queue.Queue[bytes | None] = queue.Queue(QUEUED_MAX)
        self._dropped = 0
        self._torn = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llumnix-event-log", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Any thread. Never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Writes what waits, within `CLOSE_TIMEOUT_S`, and closes the file."""
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_TIMEOUT_S)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            os.close(self._file)

    def _open(self) -> int:
        """The file to append to. Its first line is there."""
        with contextlib.suppress(FileNotFoundError):
            if log_version(self._path) not in (None, LOG_VERSION):
                os.replace(self._path, f"{self._path}.1")
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if not os.fstat(file).st_size:
                more = {"version": LOG_VERSION}
                os.write(file, _line(self._who, "log", time.monotonic(), more))
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
        return file

    def _run(self) -> None:
        look_s, last_try = 0.0, False
        while (line := self._lines.get()) is not None:
            try:
                if (now := time.monotonic()) >= look_s:
                    self._turn_over()
                    look_s = now + LOOK_EVERY_S
                self._append(line)
            except OSError as error:
                # A full disk must not stop an engine. Once it has room again, the log goes on.
                logger.error("The event log stands still (%s): %s", self._who, error.strerror)
                self._dropped += 1
                if last_try:
                    return
                last_try = self._closing.wait(RETRY_S)

    def _append(self, line: bytes) -> None:
        if self._torn:
            self._put_down(b"\n")
            self._torn = False
        if dropped := self._dropped:
            self._put_down(_line(self._who, "dropped", time.monotonic(), {"lines": dropped}))
            self._dropped -= dropped
        self._put_down(line)

    def _put_down(self, line: bytes) -> None:
        count = os.write(self._file, line)
        if count < len(line):
            # The disk is full, and part of the line is written. The next begins with a line break.
            self._torn = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _turn_over(self) -> None:
        """Begins a new file if this one is full, or if another process has begun one."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            mine = os.fstat(self._file)
            try:
                there = os.stat(self._path)
            except FileNotFoundError:
                there = None  # Somebody removed it.
            if there is not None and there.st_ino == mine.st_ino:
                if there.st_size < FILE_MAX_BYTES:
                    return
                os.replace(self._path, f"{self._path}.1")
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        before, self._file = self._file, self._open()
        os.close(before)
