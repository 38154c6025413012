"""The log of one process as files of its own in a folder that its user names (`--log-dir`).

All that the process and its children write to standard output and error goes to
NAME-TIME-PID.log, libraries' prints and the traces of a crash too. At `FILE_MAX_BYTES` the file is
copied to NAME-TIME-PID.log.1 and emptied; what is written in between may be lost. Of each name the
last `RUNS_MAX` processes are kept.
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
_SUFFIX = ".log"


def keep_own_log(folder: Path, name: str) -> Path:
    """From now on this process writes there; returns its file. `OSError` if it cannot be made; the
    process writes where it did before then."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in _runs(folder, name)[: 1 - RUNS_MAX]:
        for part in folder.glob(old.name + "*"):
            with contextlib.suppress(OSError):
                part.unlink()
    began = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    path = folder / f"{name}-{began}-{os.getpid()}{_SUFFIX}"
    # Appending is what makes it safe to empty the file while others write to it.
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # What was written before goes to another file.
            stream.flush()
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    threading.Thread(target=_look, args=(path,), name="llumnix-own-log", daemon=True).start()
    return path


def _runs(folder: Path, name: str) -> list[Path]:
    """The files of earlier processes, the oldest first. A name may go on with a dash itself, so
    that what follows is counted."""
    found = folder.glob(f"{name}-*{_SUFFIX}")
    return sorted(p for p in found if p.name[len(name) :].count("-") == 2)


def _look(path: Path) -> None:
    while True:
        time.sleep(LOOK_EVERY_S)
        with contextlib.suppress(OSError):  # The disk is full, say: tried again.
            cut(path)


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
