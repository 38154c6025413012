"""Threads of the code that run for as long as their process does end with their test here."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest

SWEEPERS = frozenset({"llumnix-sweep", "llumnix-host-agent"})
"""They remove the shared memory of the dead: left over, they would do so under a later test."""


def sweepers() -> list[threading.Thread]:
    """Those that run in this process."""
    return [thread for thread in threading.enumerate() if thread.name in SWEEPERS]


@contextmanager
def sweepers_end(module: ModuleType) -> Iterator[None]:
    """The threads that this module starts meanwhile end with it. They sleep in `time.sleep`."""
    over = threading.Event()

    def sleep(seconds: float) -> None:
        if over.wait(seconds):
            raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
        patch.setattr(threading, "excepthook", _quiet)
        yield
        over.set()
        for thread in sweepers():
            thread.join(10)


def _quiet(args: threading.ExceptHookArgs) -> None:
    """Python's own, which passes over `SystemExit`. pytest's warns of it."""
    threading.__excepthook__(args)
