"""Background work that fails is logged and begun again (llumnix/tasks.py)."""

import asyncio
import logging

import pytest

from llumnix.tasks import PAUSE_MAX_S, keep_running
from support.virtual_time import run

logger = logging.getLogger("llumnix.test")


class Work:
    """Fails at the times given, by call; returns "done" after that."""

    def __init__(self, *failures_after_s: float) -> None:
        self.failures_after_s = list(failures_after_s)
        self.began_s: list[float] = []

    async def __call__(self) -> str:
        self.began_s.append(asyncio.get_running_loop().time())
        if not self.failures_after_s:
            return "done"
        await asyncio.sleep(self.failures_after_s.pop(0))
        raise KeyError("a bug")


def test_work_that_fails_is_logged_by_name_and_begun_again_after_growing_pauses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    work = Work(0, 0, 0)
    assert run(keep_running("watching i3", work, logger)) == "done"
    assert work.began_s == [0, 1, 3, 7]
    assert [r.levelno for r in caplog.records] == [logging.ERROR] * 3
    assert all("watching i3 failed unexpectedly (KeyError: 'a bug')" in m for m in caplog.messages)


def test_the_pause_is_bounded_and_work_that_went_well_for_long_starts_the_row_anew() -> None:
    work = Work(*[0.0] * 8, 100.0)
    run(keep_running("w", work, logger))
    pauses = [b - a for a, b in zip(work.began_s, work.began_s[1:], strict=False)]
    assert pauses[:8] == [1, 2, 4, 8, 16, PAUSE_MAX_S, PAUSE_MAX_S, PAUSE_MAX_S]
    assert pauses[8] == 101


def test_the_last_of_so_many_failures_in_a_row_is_raised() -> None:
    work = Work(0, 0, 0, 0)
    with pytest.raises(KeyError):
        run(keep_running("w", work, logger, failures_max=3))
    assert len(work.began_s) == 3


def test_what_is_cancelled_ends() -> None:
    async def main() -> None:
        task = asyncio.create_task(keep_running("w", lambda: asyncio.sleep(1e9), logger))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
