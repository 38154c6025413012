"""Adds a request before its consumer asks for its outputs.

vLLM's HTTP application adds a request when it first asks for its outputs. That is one or two turns
of the event loop after the request is complete, and a turn takes milliseconds where many streams
pass through. Here the request is added at once, so that the controller has placed it by the time at
which bare vLLM would add it.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
Abort = Callable[..., Awaitable[None]]


class PendingAdd:
    """A request on its way to an engine. `abort` is that of `AsyncLLM`. Needs a running event
    loop."""

    def __init__(self, add: Coroutine[Any, Any, Any], abort: Abort) -> None:
        self._loop = asyncio.get_running_loop()
        self._abort = abort
        self._added = self._loop.create_task(add)
        self._ending: asyncio.Task[None] | None = None
        self.taken = False

    async def outcome(self) -> Any:
        """What adding it returned or raised; from now on that is its consumer's."""
        self.taken = True
        try:
            return await self._added
        except asyncio.CancelledError:
            self.drop()  # It may be added already, and then nobody else would abort it.
            raise
        except BaseException:
            # Else exception, traceback and this frame would hold each other in a circle.
            del self._added
            raise

    def drop(self) -> None:
        """Nobody will ask for its outputs. Any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._drop)

    def _drop(self) -> None:
        self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        self._added.cancel()  # A cancelled `add` takes back what it did.
        done, _ = await asyncio.wait([self._added])
        for task in done:
            if not task.cancelled() and task.exception() is None:
                await self._abort(task.result().request_id, internal=True)


class OutputStream(AsyncGenerator[T, None]):
    """The outputs that `inner` yields. `inner` begins by asking for the outcome of `pending`. If it
    is closed or forgotten before, nobody else would drop the request, so this does."""

    def __init__(self, inner: AsyncGenerator[T, None], pending: PendingAdd) -> None:
        self._inner = inner
        self._pending: PendingAdd | None = pending

    def __aiter__(self) -> AsyncIterator[T]:  # type: ignore[override]
        # The consumer gets `inner` itself and steps it at once, so that no token passes through us.
        self._pending = None
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
        pending, self._pending = self._pending, None
        if pending is not None and not pending.taken:
            pending.drop()
