"""An event loop whose clock jumps to the next timer as soon as nothing is left to do: hours of
waiting pass in milliseconds, and no test depends on how fast the machine is."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`time()` stands still while there is work."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        real_select = self._selector.select

        def select(timeout: float | None = None) -> Any:
            if timeout is None:  # Only a thread can wake the loop: wait for it.
                return real_select(None)
            events = real_select(0)
            if not events:
                self._now_s += timeout
            return events

        self._selector.select = select

    def time(self) -> float:
        return self._now_s


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """As `asyncio.run`, on such a loop."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
