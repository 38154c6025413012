"""Runs vLLM's HTTP server over the fleet.

vLLM 0.32 internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`setup_server(args)` checks the arguments and binds the port, `build_and_serve(engine_client, ...)`
builds the whole application and serves until a signal, and returns what remains to be awaited;
`args.middleware` are import paths of ASGI middlewares, the last the outermost.
"""

import asyncio
import gc
import logging
import signal
import socket
from argparse import Namespace
from collections.abc import Callable

from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.launcher import setup_server

from llumnix.errors import LlumnixError, UsageError
from llumnix.frontend.control import InstanceControl, control_app
from llumnix.frontend.llm import FleetLLM

logger = logging.getLogger("llumnix.frontend")

HTTP_CLOSE_TIMEOUT_S = 5.0
GATE = "llumnix.frontend.gate.Gate"
GARBAGE_EVERY = 10_000
"""So many new objects between two looks for garbage, not Python's 700 (3.11, 3.12): the looks take
time, and requests leave little (some 16 kB each)."""


def bind(args: Namespace) -> tuple[str, socket.socket]:
    """Binds the port before anything expensive starts. Returns the URL and the socket."""
    try:
        return setup_server(args, reuse_port=False)
    except KeyError as error:
        raise UsageError(str(error.args[0])) from error
    except OSError as error:
        where = args.uds or f"{args.host}:{args.port}"
        raise UsageError(
            f"cannot listen on {where} ({error.strerror}): free it, or choose another --port"
        ) from error


async def serve(
    llm: FleetLLM,
    control: InstanceControl,
    listen_address: str,
    sock: socket.socket,
    args: Namespace,
) -> None:
    """Serves until the first SIGINT or SIGTERM, then lets running requests end."""
    llm.control_app = control_app(llm.engine_core, control, docs=not args.disable_fastapi_docs)
    args.middleware = [*args.middleware, GATE]
    gc.set_threshold(GARBAGE_EVERY)
    llm.on_stopping = _arm_second_signal(asyncio.get_running_loop(), llm)
    rest = await build_and_serve(llm, listen_address, sock, args)
    try:
        # A client that never ends its request, or never reads the answer, must not keep us.
        await asyncio.wait_for(rest, HTTP_CLOSE_TIMEOUT_S)
    except TimeoutError:
        logger.warning("Some connections were still open after %.0f s.", HTTP_CLOSE_TIMEOUT_S)
    finally:
        sock.close()
    if not llm.stopping:
        raise LlumnixError("the HTTP server ended by itself; the log above says why")


def _arm_second_signal(loop: asyncio.AbstractEventLoop, llm: FleetLLM) -> Callable[[], None]:
    """From the first signal on, a second one stops at once."""

    def second() -> None:
        print("llumnix: stopping at once", flush=True)
        llm.hurry()

    def arm() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, second)

    def stopping() -> None:
        running = llm.open_http
        timeout = llm.vllm_config.shutdown_timeout
        print(
            f"llumnix: stopping; {running} running requests have {timeout} s to end "
            "(a second signal stops at once)",
            flush=True,
        )
        loop.call_soon_threadsafe(arm)

    return stopping
