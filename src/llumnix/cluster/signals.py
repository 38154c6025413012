"""What SIGINT, SIGTERM and SIGHUP do to `llumnix serve`.

While it starts, the first one interrupts it, and the others do nothing: half a clean-up would
leave Ray's processes and files behind. While it serves, SIGINT and SIGTERM are vLLM's
(frontend/http/server.py), and SIGHUP, which comes when the terminal goes, counts as SIGTERM. While
it cleans up, they do nothing.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt() -> None:
    """From now on each of them raises `KeyboardInterrupt` in the main thread, once."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or not _under_nohup():
            signal.signal(number, _interrupt)


def pass_hangup_on(loop: asyncio.AbstractEventLoop) -> None:
    """From now on SIGHUP is a SIGTERM. By the loop: uvloop takes a signal for two that comes while
    it runs a plain handler."""
    if not _under_nohup():
        loop.add_signal_handler(signal.SIGHUP, os.kill, os.getpid(), signal.SIGTERM)


def ignore(loop: asyncio.AbstractEventLoop | None = None) -> None:
    """From now on they do nothing; what `loop` was to do on them neither."""
    for number in STOP_SIGNALS:
        if loop is not None:
            loop.remove_signal_handler(number)
        # SIG_IGN would be passed on to the processes that are started from now on.
        signal.signal(number, _nothing)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes started meanwhile, and theirs, do not get these signals, except those that unblock
    them. A service manager, `timeout` and a terminal send a stop to every process of the service:
    Ray and the engines are to run on until the frontend has let the requests end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(*_: Any) -> None:
    ignore()
    raise KeyboardInterrupt


def _under_nohup() -> bool:
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def _nothing(*_: Any) -> None:
    pass
