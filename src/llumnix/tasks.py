"""Keeps background work going: an exception is logged and the work begun again, never lost.

asyncio says nothing of a task that failed while somebody holds it, so every long-lived task runs in
`keep_running`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from llumnix.errors import LlumnixError

T = TypeVar("T")

FIRST_PAUSE_S = 1.0
PAUSE_MAX_S = 30.0
CALM_AFTER_S = 60.0
"""Work that failed after this long has begun a new row of failures."""


async def keep_running(
    what: str,
    work: Callable[[], Awaitable[T]],
    logger: logging.Logger,
    *,
    failures_max: int | None = None,
) -> T:
    """Awaits `work()` until it returns. After an exception it is logged under the name `what`, and
    `work()` is called again after a pause that doubles with each failure in a row, up to
    `PAUSE_MAX_S`. The last of `failures_max` failures in a row is raised; None: there is no last.
    An error of our own (`LlumnixError`) says all in its one line; others are bugs, and are logged
    with their traceback.
    """
    loop = asyncio.get_running_loop()
    failures = 0
    while True:
        began_s = loop.time()
        try:
            return await work()
        except Exception as error:
            failures = 1 if loop.time() - began_s >= CALM_AFTER_S else failures + 1
            if failures == failures_max:
                raise
            pause_s = min(FIRST_PAUSE_S * 2 ** min(failures - 1, 16), PAUSE_MAX_S)
            log = logger.error if isinstance(error, LlumnixError) else logger.exception
            log(
                "%s failed unexpectedly (%s: %s); it is tried again in %.0f s.",
                what,
                type(error).__name__,
                error,
                pause_s,
            )
            await asyncio.sleep(pause_s)
