"""Makes calls of Ray's that may have to wait for its control service.

They run beside the event loop, which all streams share."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

RAY_CALL_TIMEOUT_S = 10.0


async def off_loop(function: Callable[..., T], *args: Any) -> T:
    """The function's result, from a thread of its own. The thread is a daemon, so that a call that
    never returns does not keep the process from ending. A thread of an executor would."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result, failure = None, None
        try:
            result = function(*args)
        except BaseException as error:  # noqa: BLE001 - raised where the call is awaited
            failure = error
        with contextlib.suppress(RuntimeError):  # The loop is closed: all is over.
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, name="llumnix-ray-call", daemon=True).start()
    return await future


async def ray_call(function: Callable[..., T], *args: Any) -> T:
    """`off_loop` within `RAY_CALL_TIMEOUT_S`. After a `TimeoutError` it is unknown whether the call
    was carried out."""
    async with asyncio.timeout(RAY_CALL_TIMEOUT_S):
        return await off_loop(function, *args)
