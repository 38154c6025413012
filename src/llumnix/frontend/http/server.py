"""Runs vLLM's HTTP server over the fleet.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`build_and_serve(engine_client, ...)` builds the whole application and serves until a signal, and
returns what remains to be awaited; what else it is given goes to uvicorn's configuration. With
`peer_loads`, processes that share a socket accept by turns, the least loaded first;
`args.middleware` are import paths of ASGI middlewares, the last the outermost.
"""

import asyncio
import gc
import logging
import signal
import socket
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.types import ASGIApp
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.envs import enable_envs_cache

from llumnix.errors import LlumnixError
from llumnix.frontend.door.probes import Probes
from llumnix.frontend.http.control import Control
from llumnix.frontend.http.page import page_router
from llumnix.frontend.http.protocol import HttpProtocol
from llumnix.frontend.http.routes import control_app
from llumnix.frontend.llm import FleetLLM
from llumnix.frontend.streams.pace import StreamPace
from llumnix.frontend.streams.waiting import show_waiting
from llumnix.observe.console import say
from llumnix.observe.service_manager import notify
from llumnix.tasks import keep_running

logger = logging.getLogger("llumnix.frontend")

HTTP_CLOSE_TIMEOUT_S = 5.0
GATE = "llumnix.frontend.http.gate.Gate"
GARBAGE_EVERY = 10_000
"""How many new objects there are between two searches for garbage, instead of Python's 700 (3.11,
3.12). Searches take time, and a request leaves little garbage, some 16 kB."""


class Served(Protocol):
    """The listening socket, and where clients find it."""

    @property
    def url(self) -> str: ...

    socket: socket.socket

    def stop_answering(self) -> None:
        """Leaves the socket to vLLM's server."""
        ...

    def close(self) -> None:
        """Stops listening."""
        ...


async def serve(
    llm: FleetLLM,
    control: Control,
    listener: Served,
    args: Namespace,
    announce: Callable[[], Awaitable[None]],
    *,
    on_state: Callable[[Any], None] = lambda state: None,
    peer_loads: tuple[Any, int] | None = None,
) -> None:
    """Serves until the first SIGINT or SIGTERM, then lets running requests end. `announce` is
    awaited once requests are answered. `on_state` gets the application's state when all of it is
    there. `peer_loads`: the open connections of all processes that accept here, and which is this
    one's. The `llm` is to call `stop_begins` when it stops."""
    gc.set_threshold(GARBAGE_EVERY)
    enable_envs_cache()  # vLLM asks for variables at each token, and that takes 2 µs.
    page = None
    if not args.no_ui:
        page = page_router(llm.engine_core, control, args, stopping=lambda: llm.stopping)
    docs = not args.disable_fastapi_docs
    ours = control_app(llm.engine_core, control, docs=docs, page=page, settings=args.settings)
    serving = _once(listener, announce)
    pace = StreamPace(llm.output_processor, args.max_stream_interval)
    streams = llm.engine_core.streams
    beside = {
        "following the event loop": pace.run,
        "showing streams that wait": lambda: show_waiting(streams),
    }
    tasks = [asyncio.create_task(keep_running(what, work, logger)) for what, work in beside.items()]
    try:
        rest = await build_and_serve(
            llm,
            listener.url,
            listener.socket,
            with_gate(args, ours, Probes(control.fleet, args.ready_min), on_state, control),
            peer_loads=peer_loads,
            callback_notify=serving,
            http=HttpProtocol,
        )
    finally:
        for task in tasks:
            task.cancel()
    try:
        # Bounded, since a client may never end its request, or never read the answer.
        await asyncio.wait_for(rest, HTTP_CLOSE_TIMEOUT_S)
    except TimeoutError:
        logger.warning("Some connections were still open after %.0f s.", HTTP_CLOSE_TIMEOUT_S)
    finally:
        listener.close()
    if not llm.stopping:
        raise LlumnixError("the HTTP server ended by itself; the log above says why")


def with_gate(
    args: Namespace,
    ours: FastAPI,
    probes: ASGIApp,
    on_state: Callable[[Any], None] = lambda state: None,
    control: Control | None = None,
) -> Namespace:
    """vLLM's arguments with the gate around its application, and ours beside it. vLLM hands them on
    to the gate in the application's state. `control` makes the metrics."""
    middleware = [*args.middleware, GATE]
    more = {"control_app": ours, "probes": probes, "on_state": on_state, "control": control}
    return Namespace(**{**vars(args), "middleware": middleware, **more})


def _once(
    listener: Served, announce: Callable[[], Awaitable[None]]
) -> Callable[[], Awaitable[None]]:
    """A callback that announces once. uvicorn calls it when it accepts connections, and again from
    time to time."""
    announced = False

    async def serving() -> None:
        nonlocal announced
        if not announced:
            announced = True
            await asyncio.to_thread(listener.stop_answering)
            await announce()

    return serving


def stop_begins(llm: FleetLLM) -> None:
    """Says how a stop that the first signal began goes on. From now on, a second signal stops at
    once. Any thread."""
    loop = llm.engine_core.loop

    def second() -> None:
        say("stopping at once")
        llm.stop_now()

    def arm() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, second)

    say_stopping(llm.running(), llm.vllm_config.shutdown_timeout, llm.lame_duck_s)
    loop.call_soon_threadsafe(arm)


def say_stopping(running: int, timeout_s: float, lame_duck_s: float = 0.0) -> None:
    """Says that a stop has begun, to the user and to the service manager."""
    text = f"{running} running requests have {timeout_s} s to end"
    if lame_duck_s:
        text = (
            f"new requests are let in for {lame_duck_s:g} s more, then those that run have "
            f"{timeout_s} s to end"
        )
    say(f"stopping; {text} (a second signal stops at once)")
    notify("STOPPING=1", f"STATUS=stopping; {text}")
