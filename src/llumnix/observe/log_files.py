"""The files of an event log: how lines get there, and how a full file is followed by the next.

The newest file is PATH. At `file_max_bytes` it becomes PATH.1, which becomes PATH.2, and so on;
`FILES_MAX` are kept in all. All processes of a host write to the same files.
"""

import contextlib
import errno
import fcntl
import logging
import os
import queue
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from llumnix.errors import UsageError

logger = logging.getLogger("llumnix")
encode = msgspec.json.Encoder().encode

LOG_VERSION = 2
"""Raised whenever the name or the meaning of a fact, a decision or a migration's event changes.
Files of version 1 have no such line."""
QUEUED_MAX = 20_000
RETRY_S = 5.0
CLOSE_TIMEOUT_S = 2.0
FILES_MAX = 4
FIRST_LINE_BYTES_MAX = 1000
NOT_A_LINE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What reading a torn line raises: it may be cut within a character."""
LOOK_EVERY_S = 1.0
"""Between two looks at the file's size, and at whether another process has renamed it."""
IDLE_S = 10.0
"""After so long without a line a writer looks whether its file is still the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstLine:
    """What the first line of a file says."""

    version: int
    goes_on: bool = False  # whether lines of other files came before those of this one


def first_line(path: Path) -> FirstLine | None:
    """The first line of an event log; None if the file is empty, or no event log. OSError if it
    cannot be read."""
    if not stat.S_ISREG(path.stat().st_mode):
        return None  # To read a pipe would wait for its writer.
    with path.open("rb") as file:
        first = file.readline(FIRST_LINE_BYTES_MAX)
    try:
        line = msgspec.json.decode(first, type=dict[str, Any])
    except NOT_A_LINE:
        # Version 1 could begin with a line of any length.
        return FirstLine(version=1) if first.startswith(b'{"at":') else None
    if line.get("kind") == "log":
        version = line.get("version")
        if not isinstance(version, int):
            return None
        return FirstLine(version=version, goes_on=line.get("goes_on") is True)
    return FirstLine(version=1) if {"at", "who", "kind"} <= line.keys() else None


def files_of(path: Path) -> list[Path]:
    """The files of the event log at `path`, the oldest first: those of the same version as the
    newest that follow one another without a gap. `path` itself is always among them. OSError if one
    cannot be read."""
    files, newest = [path], first_line(path)
    while newest is not None and first_goes_on(files[0]):
        before = _older(path, len(files))
        if not before.is_file() or (first := first_line(before)) is None:
            break
        if first.version != newest.version:
            break
        files.insert(0, before)
    return files


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of the event log at `path`, of all its files, the oldest first. Torn ones are left
    out. `UsageError` if it is none, or one of another version, or cannot be read."""
    try:
        check_version(path)
        if first_line(path) is None:
            raise UsageError(f"{path} is no event log; give what `llumnix serve --event-log` wrote")
        for file in files_of(path):
            with file.open("rb") as opened:
                for raw in opened:
                    with contextlib.suppress(*NOT_A_LINE):
                        yield msgspec.json.decode(raw, type=dict[str, Any])
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error


def check_version(path: Path) -> None:
    """`UsageError` if the file is an event log of another version. OSError if it cannot be read."""
    first = first_line(path)
    if first is not None and first.version != LOG_VERSION:
        raise UsageError(
            f"{path} is an event log of version {first.version}, and this llumnix reads version "
            f"{LOG_VERSION}; read it with the llumnix that wrote it"
        )


def first_goes_on(path: Path) -> bool:
    """Whether lines of another file came before those of this one."""
    first = first_line(path)
    return first is not None and first.goes_on


def _older(path: Path | str, number: int) -> Path:
    return Path(f"{path}.{number}")


def line_of(who: str, kind: str, at: float, rest: dict[str, Any]) -> bytes:
    """One line of the log."""
    return encode({"at": at, "time": time.time(), "who": who, "kind": kind, **rest}) + b"\n"


class Writer:
    """Appends lines to the log at `path`, on a thread of its own. A file that cannot be opened is
    tried again like one that cannot be written: a log keeps no process from starting. With
    `must_open` that is an `OSError`."""

    def __init__(self, path: str, who: str, file_max_bytes: int, *, must_open: bool) -> None:
        self._path = path
        self._who = who
        self._file_max_bytes = file_max_bytes
        self._file: int | None = None
        self._begun = self._torn = self._stands_still = False
        try:
            self._opened()
        except OSError as error:
            if must_open:
                raise
            self._tell(error)
        with contextlib.suppress(OSError):  # The disk is full: the thread tries again.
            self._begin()
        self._lines: queue.Queue[bytes | None] = queue.Queue(QUEUED_MAX)
        self._full = self._failed = 0  # lines without room in the queue, and on the disk
        self._told = 0  # how many of them lines `dropped` have named
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llumnix-event-log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """How many lines could not be written so far."""
        return self._full + self._failed

    def put(self, line: bytes) -> None:
        """One thread of the process at a time. Never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._full += 1

    def close(self) -> None:
        """Writes what waits, within `CLOSE_TIMEOUT_S`, and closes the file."""
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_TIMEOUT_S)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive() and self._file is not None:
            os.close(self._file)

    # -- on the thread

    def _run(self) -> None:
        look_s, last_try = 0.0, False
        while (line := self._next_line()) is not None:
            try:
                if (now := time.monotonic()) >= look_s:
                    self._turn_over()
                    look_s = now + LOOK_EVERY_S
                if not self._begun:
                    self._begin()
                self._append(line)
                self._tell(None)
            except Exception as error:  # noqa: BLE001 - without the thread nothing would be told
                # A full disk must not stop an engine. Once it has room again, the log goes on.
                self._tell(error)
                self._failed += 1
                if last_try:
                    return
                last_try = self._closing.wait(RETRY_S)

    def _next_line(self) -> bytes | None:
        """Waits for it; None: the log is closed."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._lines.get(timeout=IDLE_S)
            self._let_go()

    def _let_go(self) -> None:
        """Closes a file that is not the newest any more. Else it would take room on the disk after
        the others have removed it. The next line opens the newest."""
        if self._file is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                return
        os.close(self._file)
        self._file, self._begun = None, False

    def _tell(self, error: Exception | None) -> None:
        """Says once that the log stands still, and once that it goes on."""
        if error is not None and not self._stands_still:
            why = getattr(error, "strerror", None) or repr(error)
            logger.error("The event log stands still (%s): %s", self._who, why)
        elif error is None and self._stands_still:
            logger.warning("The event log goes on (%s): %d lines lack", self._who, self.dropped)
        self._stands_still = error is not None

    def _append(self, line: bytes) -> None:
        if self._torn:
            self._put_down(b"\n")
            self._torn = False
        if missing := self.dropped - self._told:
            self._put_down(line_of(self._who, "dropped", time.monotonic(), {"lines": missing}))
            self._told += missing
        self._put_down(line)

    def _put_down(self, line: bytes) -> None:
        count = os.write(self._opened(), line)
        if count < len(line):
            # The disk is full, and part of the line is written. The next begins with a line break.
            self._torn = True
            raise _no_room()

    # -- files

    def _opened(self) -> int:
        """The file, which is opened if it could not be before."""
        if self._file is None:
            self._file = self._open()
        return self._file

    def _open(self) -> int:
        """The file to append to, which may be empty."""
        with contextlib.suppress(FileNotFoundError):
            first = first_line(Path(self._path))
            if first is not None and first.version != LOG_VERSION:
                self._put_aside()
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _begin(self) -> None:
        """Writes the first line if the file is empty."""
        file = self._opened()
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if not os.fstat(file).st_size:
                goes_on = False
                with contextlib.suppress(FileNotFoundError):
                    before = first_line(_older(self._path, 1))
                    goes_on = before is not None and before.version == LOG_VERSION
                more = {"version": LOG_VERSION, "goes_on": goes_on}
                line = line_of(self._who, "log", time.monotonic(), more)
                if os.write(file, line) < len(line):
                    os.ftruncate(file, 0)
                    raise _no_room()
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
        self._begun = True

    def _put_aside(self) -> None:
        """Makes every file one older. The oldest goes."""
        for number in reversed(range(1, FILES_MAX - 1)):
            with contextlib.suppress(FileNotFoundError):
                os.replace(_older(self._path, number), _older(self._path, number + 1))
        os.replace(self._path, _older(self._path, 1))

    def _turn_over(self) -> None:
        """Begins a new file if this one is full, or if another process has begun one."""
        file = self._opened()
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            mine = os.fstat(file)
            try:
                there = os.stat(self._path)
            except FileNotFoundError:
                there = None  # Somebody removed it.
            if there is not None and there.st_ino == mine.st_ino:
                if there.st_size < self._file_max_bytes:
                    return
                self._put_aside()
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
        self._file, self._begun = self._open(), False
        os.close(file)


def _no_room() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
