"""Listens on the server's port before anything is loaded, and answers from the first second.

Loading a model takes minutes. Until vLLM's server takes the socket over, a small server on a thread
of its own answers each request with 503 and says what the start is waiting for. Only `/live`
gets 200. Both servers accept from one listening socket, so no connection is refused in between.
"""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import uvicorn
from starlette.responses import JSONResponse

from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.errors import UsageError
from llumnix.frontend.door import probes
from llumnix.frontend.door.refusals import error_of, mark

BACKLOG = 2048
CLOSE_TIMEOUT_S = 1
CLOSE_POLL_S = 0.02
THREAD = "starting"
"""The small server's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenAddress:
    """Where to listen, and with which certificate: vLLM's flags of these names."""

    host: str
    port: int
    uds: str | None
    ssl_keyfile: str | None
    ssl_certfile: str | None
    ssl_ca_certs: str | None
    ssl_cert_reqs: int
    ssl_ciphers: str | None

    @classmethod
    def of(cls, args: Namespace) -> "ListenAddress":
        """As a command line has it; `UsageError` if that cannot work."""
        if not 0 <= args.port <= 65535:
            raise UsageError(f"--port {args.port}: must be 1 to 65535, or 0 for any free port")
        if args.ssl_keyfile and not args.ssl_certfile:
            raise UsageError("--ssl-keyfile is given without its certificate: add --ssl-certfile")
        return cls(
            host=args.host,
            port=args.port,
            uds=args.uds,
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            ssl_cert_reqs=args.ssl_cert_reqs,
            ssl_ciphers=args.ssl_ciphers,
        )


@dataclass(slots=True, kw_only=True)
class StartProgress:
    """How far the start is."""

    began_s: float  # time.monotonic()
    phase: str = "loading"
    code: Literal["loading", "no_frontend"] = "loading"  # why nobody else answers
    ready_min: int = 1  # so many instances must serve for it to be ready
    instances: Callable[[], list[InstanceStatus]] = field(default=list)

    def answer(self, now_s: float) -> dict[str, Any]:
        """What a client reads during the start: an error in OpenAI's form, and the same as
        fields."""
        elapsed_s = now_s - self.began_s
        message = f"llumnix is starting ({elapsed_s:.0f} s): {self.phase}."
        return {
            "error": error_of(self.code, message),
            "phase": self.phase,
            "elapsed_s": round(elapsed_s, 1),
            "instances": probes.rows(self.instances()),
        }

    def ready(self, least: int | None, now_s: float) -> JSONResponse:
        """What a probe gets that wants `least` instances to serve; None: it asks for nonsense."""
        if least is None:
            return probes.bad_min()
        more = {"doing": self.phase, "elapsed_s": round(now_s - self.began_s, 1)}
        phase = "loading" if self.code == "loading" else "serving"
        return probes.ready(self.instances(), least, self.code, phase=phase, **more)


class _SmallServer(uvicorn.Server):
    """uvicorn's, but a client whose connection it has accepted and whose request is still on its
    way is answered before it ends. uvicorn would reset such a connection."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                # First a pause, since a connection is listed a moment after it was accepted.
                await asyncio.sleep(CLOSE_POLL_S)
                while self.server_state.connections:
                    await asyncio.sleep(CLOSE_POLL_S)
        await super().shutdown(sockets)


def _not_of_the_small_server(record: logging.LogRecord) -> bool:
    """vLLM sets the level of uvicorn's logger before it takes the socket over. The end of the small
    server would read as that of the whole."""
    return record.threadName != THREAD


class Listener:
    """The listening socket, and the small server that answers on it until vLLM's does."""

    def __init__(self, address: ListenAddress, progress: StartProgress) -> None:
        self.address = address
        self.socket: socket.socket = socket.socket(_family(address))
        self._progress = progress
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port, also where any free one was asked for."""
        return self.address.port if self.address.uds else int(self.socket.getsockname()[1])

    @property
    def url(self) -> str:
        """Where clients find it."""
        if self.address.uds:
            return f"unix:{self.address.uds}"
        host = self.address.host or "0.0.0.0"
        scheme = "https" if self.address.ssl_certfile else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def open(self) -> None:
        """Listens and begins to answer; `UsageError` if the address cannot be had."""
        config = self._server_config()  # First, since a certificate may be of no use.
        try:
            self._bind()
            # Linux lets two sockets bind one port as long as neither listens.
            self.socket.listen(BACKLOG)
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that is no host name.
            self.socket.close()
            where = self.address.uds or f"{self.address.host}:{self.address.port}"
            fix = "another --uds" if self.address.uds else "another --port, or --port 0 for any"
            raise UsageError(
                f"cannot listen on {where} ({getattr(error, 'strerror', error)}): free it, or "
                f"choose {fix}"
            ) from error
        self._answer_with(config)

    def answer(self) -> None:
        """Begins to answer again, while nobody else accepts from the socket."""
        if self._server is None:
            self._answer_with(self._server_config())

    def _answer_with(self, config: uvicorn.Config) -> None:
        self._server = _SmallServer(config)
        # A duplicate, since the small server closes it and vLLM's keeps the other.
        sockets = [self.socket.dup()]
        self._thread = threading.Thread(
            target=self._server.run, args=(sockets,), name=THREAD, daemon=True
        )
        logging.getLogger("uvicorn.error").addFilter(_not_of_the_small_server)
        self._thread.start()

    def stop_answering(self) -> None:
        """Leaves the socket to vLLM's server. Returns once the small one accepts no connection any
        more."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()
            self._server = self._thread = None

    def close(self) -> None:
        """Stops listening."""
        self.stop_answering()
        self.socket.close()
        if self.address.uds:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address.uds)

    def _bind(self) -> None:
        if self.address.uds:
            _remove_if_dead(self.address.uds)
            self.socket.bind(self.address.uds)
        else:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((self.address.host, self.address.port))

    def _server_config(self) -> uvicorn.Config:
        address = self.address
        config = uvicorn.Config(
            self._answer,
            loop="asyncio",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",
            access_log=False,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            ssl_keyfile=address.ssl_keyfile,
            ssl_certfile=address.ssl_certfile,
            ssl_ca_certs=address.ssl_ca_certs,
            ssl_cert_reqs=address.ssl_cert_reqs,
            ssl_ciphers=address.ssl_ciphers,
        )
        try:
            config.load()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError.
            why = error.reason if isinstance(error, ssl.SSLError) else None
            raise UsageError(
                "the certificate cannot be used "
                f"({why or getattr(error, 'strerror', None) or error}): check --ssl-keyfile, "
                "--ssl-certfile, --ssl-ca-certs and --ssl-ciphers"
            ) from error
        return config

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        answer = self._answer_to(scope)
        answer.headers["connection"] = "close"
        await answer(scope, receive, send)

    def _answer_to(self, scope: Any) -> JSONResponse:
        progress, now_s = self._progress, time.monotonic()
        if scope["path"] in probes.PROBE_PATHS and scope["method"] not in probes.METHODS:
            return probes.wrong_method()
        if scope["path"] == probes.LIVE_PATH:
            return probes.live()
        if scope["path"] == probes.READY_PATH:
            return progress.ready(probes.least_asked(scope, progress.ready_min), now_s)
        answer = JSONResponse(progress.answer(now_s), 503)
        mark(answer.headers, progress.code)
        return answer


def _family(address: ListenAddress) -> socket.AddressFamily:
    if address.uds:
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET


def _remove_if_dead(path: str) -> None:
    """Removes the socket of a server that was killed: nobody listens on it."""
    if not Path(path).is_socket():
        return
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            return  # Binding will fail, and say what is wrong.
