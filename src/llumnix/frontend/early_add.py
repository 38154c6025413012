"""Adds a request ahead of its consumer.

vLLM's HTTP application asks for a request's outputs one or two turns of the event loop after it has
everything that the request consists of, and adds it only then. Where many streams pass through, a
turn takes milliseconds. A request is added here as soon as it can be, so that the controller's
answer is there when bare vLLM would begin.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
Abort = Callable[..., Awaitable[None]]


class Adding:
    """A request on its way to an engine. `abort`: of `AsyncLLM`. Needs a running event loop."""

    def __init__(self, add: Coroutine[Any, Any, Any], abort: Abort) -> None:
        self._loop = asyncio.get_running_loop()
        self._abort = abort
        self._added = self._loop.create_task(add)
        self._ending: asyncio.Task[None] | None = None
        self.taken = False

    async def outcome(self) -> Any:
        """What adding it came to; from now on that is its consumer's."""
        self.taken = True
        try:
            return await self._added
        except asyncio.CancelledError:
            self.drop()  # It may be done already, and then nobody else has its result.
            raise
        except BaseException:
            # Or the exception would hold its traceback, that this frame, and that the exception.
            del self._added
            raise

    def drop(self) -> None:
        """Nobody will ask for its outputs. Any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._drop)

    def _drop(self) -> None:
        self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        self._added.cancel()  # Takes back by itself what it did, unless it is done.
        done, _ = await asyncio.wait([self._added])
        for task in done:
            if not task.cancelled() and task.exception() is None:
                await self._abort(task.result().request_id, internal=True)


class Outputs(AsyncGenerator[T, None]):
    """What `inner` yields; it asks for the outcome of `adding` first. Drops the request if it never
    does: only then does nothing in it see to that."""

    def __init__(self, inner: AsyncGenerator[T, None], adding: Adding) -> None:
        self._inner = inner
        self._adding: Adding | None = adding

    def __aiter__(self) -> AsyncIterator[T]:  # type: ignore[override]
        # Whoever iterates has `inner` itself, and steps it at once: nothing of ours is in the way
        # of a token.
        self._adding = None
        return self._inner

    async def asend(self, value: None) -> T:
        return await self._inner.asend(value)

    async def athrow(self, *args: Any) -> T:
        return await self._inner.athrow(*args)

    async def aclose(self) -> None:
        self._give_up()
        await self._inner.aclose()

    def __del__(self) -> None:
        self._give_up()

    def _give_up(self) -> None:
        adding, self._adding = self._adding, None
        if adding is not None and not adding.taken:
            adding.drop()
