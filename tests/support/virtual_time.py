"""An event loop whose clock jumps to the next timer as soon as nothing is left to do: hours of
waiting pass in milliseconds, and no test depends on how fast the machine is."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`time()` stands still while there is work, in an executor's threads too."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._in_threads = 0
        real_select = self._selector.select

        def select(timeout: float | None = None) -> Any:
            if timeout is None or self._in_threads:  # A thread is to wake the loop.
                return real_select(timeout)
            events = real_select(0)
            if not events:
                self._now_s += timeout
            return events

        self._selector.select = select

    def run_in_executor(self, *args: Any) -> Any:
        future = super().run_in_executor(*args)
        self._in_threads += 1
        future.add_done_callback(self._left_thread)
        return future

    def _left_thread(self, _: Any) -> None:
        self._in_threads -= 1

    def time(self) -> float:
        return self._now_s


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """As `asyncio.run`, on such a loop."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
