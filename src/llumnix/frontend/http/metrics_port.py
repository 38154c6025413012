"""/metrics, /live and /ready at a port of their own (`--metrics-port`), from the process that has
the fleet. So Prometheus and probes need neither the model's port nor a frontend that has time.

It speaks plain HTTP. On loopback it wants no key. Elsewhere it wants one that may read the metrics
at the model's port too, unless `--metrics-open` says otherwise.

uvicorn internals relied on here (tests/frontend/test_metrics_port.py fails when one changes):
`Server.capture_signals` is a context in which the server takes signals, and ours are dealt with
already; `Server.servers` are what listens, which a server that is cancelled leaves open.

vLLM internals relied on here: `VLLM_HTTP_TIMEOUT_KEEP_ALIVE`, for how long a connection may be idle
(`arguments.settle_variables`).
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import uvicorn
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from llumnix.config import is_loopback
from llumnix.errors import UsageError
from llumnix.frontend.door.probes import PROBE_PATHS
from llumnix.frontend.http.access import Access
from llumnix.observe.exposition import METRICS_PATHS, metrics_answer
from llumnix.reload.key_file import KeyRing

BACKLOG = 128
CLOSE_TIMEOUT_S = 1


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class MetricsPort:
    """The port, which is taken at once and answers from `serve` on; `UsageError` if it cannot be
    had. A client that connects before waits. `access` has the rules of the model's port; `public`:
    whether nobody needs a key."""

    def __init__(self, host: str, port: int, access: Access, *, public: bool) -> None:
        keyless = public or is_loopback(host)
        if not keyless and not access.keyed:
            raise UsageError(
                f"--metrics-host {host} is reachable from elsewhere: give --api-key KEY or --keys "
                "FILE, or --metrics-open to show metrics without one"
            )
        self._access = access
        if keyless:
            # A web page that a user of this machine visits may not read them by a name of its own.
            hosts = None if public else access.hosts or frozenset()
            self._access = replace(
                access, client_digests=(), admin_digests=(), ring=KeyRing(), hosts=hosts
            )
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
            # A port that is bound alone can be bound by another process, too.
            self._socket.listen(BACKLOG)
        except (OSError, UnicodeError) as error:
            self._socket.close()
            raise UsageError(
                f"cannot listen on {host}:{port} ({getattr(error, 'strerror', error)}): free it, "
                "or choose another --metrics-port"
            ) from error
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port, also where any free one was asked for."""
        return int(self._socket.getsockname()[1])

    def serve(self, text: Callable[[], Awaitable[bytes]], probes: ASGIApp) -> None:
        """Answers from now on, on this event loop. `text` makes the metrics."""
        from vllm import envs  # The help of `serve` does without vLLM.

        self._text, self._probes = text, probes
        config = uvicorn.Config(
            self, lifespan="off", ws="none", log_config=None, log_level="critical",
            access_log=False, interface="asgi3", timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        )  # fmt: skip
        self._task = asyncio.create_task(self._serve(_Server(config)), name="llumnix-metrics-port")

    async def _serve(self, server: uvicorn.Server) -> None:
        try:
            await server.serve(sockets=[self._socket])
        finally:
            for listening in server.servers:
                listening.close()

    def close(self) -> None:
        """Stops listening. What is being answered ends with the event loop."""
        self._socket.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if get_route_path(scope) in PROBE_PATHS:
            await self._probes(scope, receive, send)
            return
        answer = await self._answer(scope)
        await answer(scope, receive, send)

    async def _answer(self, scope: Scope) -> Response:
        if get_route_path(scope) not in METRICS_PATHS:
            return PlainTextResponse("Here are /metrics, /live and /ready.\n", 404)
        headers = Headers(scope=scope)
        caller = self._access.caller(headers)
        refusal = self._access.refusal(scope["method"], METRICS_PATHS[0], headers, caller)
        if refusal is not None:
            challenge = {"www-authenticate": "Bearer"} if refusal.status == 401 else None
            return PlainTextResponse(refusal.message, refusal.status, challenge)
        return await metrics_answer(self._text, scope["method"])
