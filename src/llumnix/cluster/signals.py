"""What SIGINT, SIGTERM and SIGHUP do to `llumnix serve`.

While the server starts, the first signal interrupts it. Further ones do nothing, since half a
clean-up would leave Ray's processes and files behind. While it serves, vLLM handles SIGINT and
SIGTERM (frontend/http/server.py); SIGHUP, which comes when the terminal is closed, counts as
SIGTERM. Where there is no terminal and something to reload, it reloads, as services do. While it
cleans up, signals do nothing.
"""

import asyncio
import atexit
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from llumnix.errors import UsageError

logger = logging.getLogger("llumnix.serve")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt() -> None:
    """From now on the first of these signals raises `KeyboardInterrupt` in the main thread."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or not _under_nohup():
            signal.signal(number, _interrupt)


def pass_hangup_on(
    loop: asyncio.AbstractEventLoop, reload: Callable[[], Awaitable[Any]] | None = None
) -> None:
    """From now on SIGHUP counts as SIGTERM; or it reloads, if no terminal can be closed. The loop
    handles it, because uvloop counts a signal twice that comes while it runs a plain handler."""
    if reload is not None and not _has_terminal():
        tasks: set[asyncio.Task[None]] = set()

        def begin() -> None:
            task = loop.create_task(_reload(reload))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        loop.add_signal_handler(signal.SIGHUP, begin)
    elif "NOTIFY_SOCKET" in os.environ:  # It was told to reload.
        why = "Nothing to reload: no --keys, --scheduler-config or --config."
        loop.add_signal_handler(signal.SIGHUP, logger.warning, why)
    elif not _under_nohup():
        loop.add_signal_handler(signal.SIGHUP, os.kill, os.getpid(), signal.SIGTERM)


async def _reload(reload: Callable[[], Awaitable[Any]]) -> None:
    try:
        logger.info("Reloaded: %s.", await reload())
    except UsageError as error:
        logger.error("Not reloaded: %s", error)
    except Exception:
        logger.exception("Not reloaded")


def _has_terminal() -> bool:
    """Whether a terminal controls this process."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def ignore(loop: asyncio.AbstractEventLoop | None = None) -> None:
    """From now on these signals do nothing; handlers of `loop` are removed."""
    for number in STOP_SIGNALS:
        if loop is not None:
            loop.remove_signal_handler(number)
        # Not SIG_IGN: processes that are started from now on would inherit it.
        signal.signal(number, _nothing)


def ignore_at_end() -> None:
    """While this process ends, these signals do nothing. Python gives up its handlers then, and a
    signal would take the place of the exit status."""
    atexit.register(_ignore_for_good)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes that are started in this context, and their children, do not get these signals
    unless they unblock them. A service manager, `timeout` and a terminal send a stop to every
    process of the service, but Ray and the engines must run on until the frontend has let the
    requests end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(*_: Any) -> None:
    ignore()
    raise KeyboardInterrupt


def _ignore_for_good() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _under_nohup() -> bool:
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def _nothing(*_: Any) -> None:
    pass
