"""Runs vLLM's HTTP server over the fleet.

vLLM 0.32 internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`build_and_serve(engine_client, ...)` builds the whole application and serves until a signal, and
returns what remains to be awaited; what else it is given goes to uvicorn's configuration;
`args.middleware` are import paths of ASGI middlewares, the last the outermost.
"""

import asyncio
import gc
import logging
import signal
from argparse import Namespace
from collections.abc import Awaitable, Callable

from vllm.entrypoints.launchers.api_server.entry import build_and_serve

from llumnix.errors import LlumnixError
from llumnix.frontend.http.listener import Listener
from llumnix.frontend.http.protocol import HttpProtocol
from llumnix.frontend.http.routes import InstanceControl, control_app
from llumnix.frontend.llm import FleetLLM
from llumnix.observe.console import say

logger = logging.getLogger("llumnix.frontend")

HTTP_CLOSE_TIMEOUT_S = 5.0
GATE = "llumnix.frontend.http.gate.Gate"
GARBAGE_EVERY = 10_000
"""So many new objects between two looks for garbage, not Python's 700 (3.11, 3.12): the looks take
time, and requests leave little (some 16 kB each)."""


async def serve(
    llm: FleetLLM,
    control: InstanceControl,
    listener: Listener,
    args: Namespace,
    announce: Callable[[], Awaitable[None]],
) -> None:
    """Serves until the first SIGINT or SIGTERM, then lets running requests end. `announce` is
    awaited once requests are answered."""
    llm.control_app = control_app(llm.engine_core, control, docs=not args.disable_fastapi_docs)
    args.middleware = [*args.middleware, GATE]
    gc.set_threshold(GARBAGE_EVERY)
    llm.on_stopping = _arm_second_signal(asyncio.get_running_loop(), llm)
    serving = _once(listener, announce)
    rest = await build_and_serve(
        llm, listener.url, listener.socket, args, callback_notify=serving, http=HttpProtocol
    )
    try:
        # A client that never ends its request, or never reads the answer, must not keep us.
        await asyncio.wait_for(rest, HTTP_CLOSE_TIMEOUT_S)
    except TimeoutError:
        logger.warning("Some connections were still open after %.0f s.", HTTP_CLOSE_TIMEOUT_S)
    finally:
        listener.close()
    if not llm.stopping:
        raise LlumnixError("the HTTP server ended by itself; the log above says why")


def _once(
    listener: Listener, announce: Callable[[], Awaitable[None]]
) -> Callable[[], Awaitable[None]]:
    """For uvicorn, which calls it once it accepts connections, and again from time to time."""
    announced = False

    async def serving() -> None:
        nonlocal announced
        if not announced:
            announced = True
            await asyncio.to_thread(listener.stop_answering)
            await announce()

    return serving


def _arm_second_signal(loop: asyncio.AbstractEventLoop, llm: FleetLLM) -> Callable[[], None]:
    """From the first signal on, a second one stops at once."""

    def second() -> None:
        say("stopping at once")
        llm.hurry()

    def arm() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, second)

    def stopping() -> None:
        running = llm.running()
        timeout = llm.vllm_config.shutdown_timeout
        say(
            f"stopping; {running} running requests have {timeout} s to end "
            "(a second signal stops at once)"
        )
        loop.call_soon_threadsafe(arm)

    return stopping
