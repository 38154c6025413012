"""The log of one process as files of its own in a folder that its user names (`--log-dir`).

All that the process and its children write to standard output and error goes to
NAME-TIME-PID.log, libraries' prints and the traces of a crash too. At `FILE_MAX_BYTES` the file is
copied to NAME-TIME-PID.log.1 and emptied; what is written in between may be lost. Of each name the
files of the last `RUNS_MAX` processes are kept, and those of every process that still runs.

Somebody may remove the file all the same: by hand, or a process on another host that shares the
folder. It is then made again within `LOOK_EVERY_S`. A child still writes to the removed one, so
what comes there is carried over to the new one.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
from pathlib import Path

FILE_MAX_BYTES = 50 * 10**6
COPIES_MAX = 4
RUNS_MAX = 5
LOOK_EVERY_S = 5.0
PART_BYTES = 2**20
REMOVED_MAX = 4
"""So many removed files of a process are still carried over, the newest ones."""
_SUFFIX = ".log"


def keep_own_log(folder: Path, name: str) -> Path:
    """From now on this process writes there; returns its file. `OSError` if it cannot be made; the
    process writes where it did before then."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in _runs(folder, name)[: 1 - RUNS_MAX]:
        for part in () if _runs_still(old) else folder.glob(old.name + "*"):
            with contextlib.suppress(OSError):
                part.unlink()
    began = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    path = folder / f"{name}-{began}-{os.getpid()}{_SUFFIX}"
    file = _open(path)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # What was written before goes to another file.
            stream.flush()
    _write_to(file)
    log = _OwnLog(path, file)
    threading.Thread(target=log.look_for_ever, name="llumnix-own-log", daemon=True).start()
    return path


def _open(path: Path) -> int:
    """The file, to write to and to read."""
    # Appending is what makes it safe to empty the file while others write to it.
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)


def _write_to(file: int) -> None:
    """Standard output and error go there from now on."""
    for number in (1, 2):
        os.dup2(file, number)


def _runs(folder: Path, name: str) -> list[Path]:
    """The files of earlier processes, the oldest first. A name may go on with a dash itself, so
    that what follows is counted."""
    found = folder.glob(f"{name}-*{_SUFFIX}")
    return sorted(p for p in found if p.name[len(name) :].count("-") == 2)


def _runs_still(path: Path) -> bool:
    """Whether the process of a log lives. Another one may have its id by now: then the file is only
    kept for longer."""
    try:
        os.kill(int(path.stem.rpartition("-")[2]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError, OverflowError):
        pass  # It is another user's, or the file is no log of ours.
    return True


class _OwnLog:
    """The file that this process writes to, on a thread of its own."""

    def __init__(self, path: Path, file: int) -> None:
        self._path = path
        self._file = file
        self._removed: list[int] = []  # files that were there before, which children may have open

    def look_for_ever(self) -> None:
        """Keeps the file in its place, and within its bound."""
        while True:
            time.sleep(LOOK_EVERY_S)
            with contextlib.suppress(OSError):  # The disk is full, say: tried again.
                self._look()

    def _look(self) -> None:
        if not self._in_place():
            self._begin_anew()
        for file in self._removed:
            self._carry_over(file)
        cut(self._path)

    def _in_place(self) -> bool:
        """Whether the path leads to the file that is written to."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def _begin_anew(self) -> None:
        """Makes the file again, and has this process write to it."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = _open(self._path)
        _write_to(file)
        self._removed.append(self._file)
        self._file = file
        for old in self._removed[:-REMOVED_MAX]:
            os.close(old)
        del self._removed[:-REMOVED_MAX]

    def _carry_over(self, removed: int) -> None:
        """Appends to the file what a removed one holds, and empties that."""
        about = os.fstat(removed)
        if about.st_nlink or not about.st_size:  # It may have another name: that is left alone.
            return
        at = 0
        try:
            while part := os.pread(removed, PART_BYTES, at):
                at += os.write(self._file, part)
        finally:  # On a full disk the rest is lost, and its room is free.
            os.ftruncate(removed, 0)


def cut(path: Path) -> None:
    """Copies the file and empties it, if it is too large. The oldest copy goes."""
    if path.stat().st_size <= FILE_MAX_BYTES:
        return
    copy = Path(f"{path}.new")
    try:
        shutil.copyfile(path, copy)
    except OSError:  # The disk is full: the copies that are there must stay.
        copy.unlink(missing_ok=True)
        raise
    os.chmod(copy, 0o600)
    for number in reversed(range(1, COPIES_MAX)):
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{path}.{number}", f"{path}.{number + 1}")
    os.replace(copy, f"{path}.1")
    os.truncate(path, 0)
