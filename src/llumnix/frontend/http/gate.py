"""The outermost layer of the HTTP application: who may come in, and what each answer carries.

vLLM adds it as the last of its middlewares, by import path, so it takes no arguments and finds
the rest in the application's state: `args.access` has the rules, `args.max_body_mb` the limit of a
body, `args.control_app` the application behind /llumnix, `args.control` makes the metrics.

vLLM internals relied on here (tests/frontend/test_gate.py and tests/house/test_vllm_routes.py
fail when one changes): an `HTTPException` out of `receive()` reaches vLLM's own handler; CORS is
configured by `args.allowed_origins`, `allow_credentials`, `allowed_methods`, `allowed_headers`.
Starlette's `get_route_path` is what its router goes by: two readings of a path would be a way in.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable
from typing import Any

import msgspec
from fastapi import HTTPException
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llumnix.core.keys import KeyMeter, Meters, NamedKey
from llumnix.errors import UsageError
from llumnix.frontend.context import HttpRequest, count_refusal, current_http_request
from llumnix.frontend.door.probes import PROBE_PATHS
from llumnix.frontend.door.refusals import limit_headers, mark, refused
from llumnix.frontend.http import direct_chunks, stream_ends
from llumnix.frontend.http.access import Access, Caller, Refusal, is_json
from llumnix.frontend.http.audit import audited
from llumnix.frontend.http.error_codes import whole_answer, with_code
from llumnix.frontend.http.page import EVENTS_PATH
from llumnix.frontend.http.protocol import WRITE
from llumnix.frontend.llm import FleetLLM
from llumnix.observe import metrics
from llumnix.observe.exposition import METRICS_PATHS, metrics_answer

COMMENT = b": waiting\n\n"
"""A line of a stream of events that its reader skips."""
PRIORITY_HEADER = "x-llumnix-priority"
BYTES_PER_MB = 1_000_000
_TIER = b'"service_tier"'


class Gate:
    """Checks keys and sizes, serves /llumnix, turns requests away during a stop, and names the
    instance in `x-llumnix-instance`. Its own answers carry CORS headers like vLLM's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._meters: Meters | None = None
        self._labels: set[str] = set()  # names of keys that metrics tell apart

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            state = scope["app"].state  # The start: vLLM has made all objects that serve by now.
            stream_ends.adapt(state, state.engine_client.engine_core.ensure_served)
            direct_chunks.adapt(scope["app"])
            state.args.on_state(state)
            self._labels = {k.name for k in state.args.access.ring.keys[: metrics.KEYS_MAX]}
            metrics.settle({"key": [*self._labels, "other"] if self._labels else []})
            await self.app(scope, receive, send)
            return
        began_s = time.monotonic()
        state = scope["app"].state
        write = scope.pop(WRITE, None)
        path = get_route_path(scope)
        headers = Headers(scope=scope)
        if _is_preflight(scope, headers):
            await _with_cors(self.app, state.args)(scope, receive, send)  # CORS answers it.
            return
        caller = state.args.access.caller(headers)
        answer = self._turn_away(scope, path, headers, caller, state)
        if answer is not None:
            await _with_cors(answer, state.args)(scope, receive, send)
            return
        if path in PROBE_PATHS and scope["type"] == "http":
            await _with_cors(state.args.probes, state.args)(scope, receive, send)
            return
        send = audited(scope, path, caller, send)
        http = HttpRequest(
            client_id=headers.get("x-request-id"),
            priority_class=headers.get(PRIORITY_HEADER),
            key=caller.key,
            write=write,
        )
        if caller.named is not None:
            http.key_name, http.cap = caller.named.name, caller.named.cap
        llm = state.engine_client
        body = RequestBody(http, receive, llm, _bytes_max(state.args), is_json(headers))
        if path == "/llumnix" or path.startswith("/llumnix/"):
            ours = _with_cors(state.args.control_app, state.args)
            # A page that is open keeps nobody from stopping.
            received = receive if path == EVENTS_PATH else body
            try:
                await ours(scope, received, send)
            finally:
                body.uncount()
            return
        if path in METRICS_PATHS:
            answer = await metrics_answer(state.args.control.metrics, scope["method"])
            await _with_cors(answer, state.args)(scope, receive, send)
            return
        meter = http.meter = self._meter(scope, caller.named, state)
        over = None if meter is None else meter.admit(began_s)
        if over is not None:
            answer = _turned_away(over.code, over.message, retry_s=over.retry_after_s, meter=meter)
            await _with_cors(answer, state.args)(scope, receive, send)
            return
        http.gate_s = time.monotonic() - began_s
        if caller.named is not None:
            self._count(http, caller.named.name, meter)
        await self._to_vllm(scope, body, http, send)

    def _count(self, http: HttpRequest, key: str, meter: KeyMeter | None) -> None:
        """Has a request counted to its key, and its tokens when they are known."""
        if len(self._labels) < metrics.KEYS_MAX:
            self._labels.add(key)
        label = key if key in self._labels else "other"
        metrics.KEY_REQUESTS.labels(key=label).inc()

        def spend(prompt: int, output: int) -> None:
            for kind, tokens in (("prompt", prompt), ("output", output)):
                metrics.KEY_TOKENS.labels(key=label, kind=kind).inc(tokens)
            if meter is not None:
                meter.spend(prompt + output, time.monotonic())

        http.spend = spend

    async def _to_vllm(
        self, scope: Scope, body: "RequestBody", http: HttpRequest, send: Send
    ) -> None:
        tracing = scope["app"].state.engine_client.tracing
        if tracing is not None and scope.get("method") == "POST":
            http.span = tracing.request(scope, http.client_id)
        token = current_http_request.set(http)
        if scope["type"] == "websocket" or scope["method"] == "GET":
            body.count()
        try:
            await self.app(scope, body, ResponseHead(http, send))
        finally:
            body.uncount()
            http.part_ends()
            current_http_request.reset(token)
            if http.span is not None:
                http.span.end()

    def _meter(self, scope: Scope, key: NamedKey | None, state: Any) -> KeyMeter | None:
        """Counts what a key uses; None if this request costs nothing of what is limited."""
        if key is None or (scope["type"] == "http" and scope["method"] != "POST"):
            return None
        if self._meters is None:
            self._meters = Meters(getattr(state.args, "api_server_count", None) or 1)
        return self._meters.of(key, time.monotonic())

    @staticmethod
    def _turn_away(
        scope: Scope, path: str, headers: Headers, caller: Caller, state: Any
    ) -> JSONResponse | None:
        """The answer to a request that gets no further than here."""
        access: Access = state.args.access
        llm = state.engine_client
        refusal = access.refusal(scope.get("method", "WEBSOCKET"), path, headers, caller)
        if refusal is not None:
            return _refused(refusal)
        if llm.stopping and (scope["type"] == "websocket" or scope["method"] == "POST"):
            return _turned_away("stopping", "The server is stopping.")
        bytes_max = _bytes_max(state.args)
        if int(headers.get("content-length", 0)) > bytes_max:
            return _turned_away("too_large", _too_large(bytes_max))
        name = headers.get(PRIORITY_HEADER)
        try:
            if name is not None:
                llm.engine_core.priorities.rank_named(name)
        except UsageError as error:
            return _turned_away("bad_class", f"{PRIORITY_HEADER}: {error}")
        return None


def _refused(refusal: Refusal) -> JSONResponse:
    if refusal.status == 401:
        challenge = {"www-authenticate": "Bearer"}
        answer = JSONResponse({"error": refusal.message}, 401, challenge)  # The body is vLLM's.
        mark(answer.headers, refusal.reason)
        count_refusal(refusal.reason)
        return answer
    return _turned_away(refusal.reason, refusal.message)


def _turned_away(
    code: str, message: str, *, retry_s: float | None = None, meter: KeyMeter | None = None
) -> JSONResponse:
    count_refusal(code)
    return refused(code, message, retry_s=retry_s, meter=meter)


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    """Whether a browser asks what it may send. It sends no key with that question."""
    return (
        scope.get("method") == "OPTIONS"
        and "origin" in headers
        and "access-control-request-method" in headers
    )


def _with_cors(app: ASGIApp, args: Any) -> ASGIApp:
    """The application with CORS headers, as vLLM has them around its own."""
    return CORSMiddleware(
        app,
        allow_origins=args.allowed_origins,
        allow_credentials=args.allow_credentials,
        allow_methods=args.allowed_methods,
        allow_headers=args.allowed_headers,
    )


def _bytes_max(args: Any) -> int:
    return int(args.max_body_mb * BYTES_PER_MB)


def _too_large(bytes_max: int) -> str:
    return f"The body is larger than {bytes_max} bytes; --max-body-mb sets the limit."


class _Tier(msgspec.Struct):
    """The one field of a request's body that vLLM reads and does nothing with."""

    service_tier: str | None = None


class RequestBody:
    """A request's body on its way to vLLM. Limits its size and reads OpenAI's `service_tier`.

    The parts of a JSON body are kept until the last one has come; they are the same objects that
    vLLM gets. They are joined and parsed only if the field's name is in them. Other bodies, such as
    audio, only pass. A stop waits for a request once its body is here, since a client may never
    send the rest.
    """

    def __init__(
        self,
        http: HttpRequest,
        receive: Receive,
        llm: FleetLLM,
        bytes_max: int,
        is_json: bool = True,
    ) -> None:
        self._http = http
        self._receive = receive
        self._llm = llm
        self._counted = False
        self._bytes_max = bytes_max
        self._is_json = is_json
        self._bytes = 0
        self._parts: list[bytes] = []
        self._named = False
        self._end = b""  # the last bytes so far, since the name may lie across two parts

    def count(self) -> None:
        """From now on a stop waits for the request."""
        if not self._counted:
            self._counted = True
            self._llm.open_http += 1
            metrics.HTTP_OPEN.set(self._llm.open_http)

    def uncount(self) -> None:
        """The request is over."""
        if self._counted:
            self._llm.open_http -= 1
            metrics.HTTP_OPEN.set(self._llm.open_http)

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            if not message.get("more_body"):
                self.count()
            part = message.get("body", b"")
            self._bytes += len(part)
            if self._bytes > self._bytes_max:
                self._parts.clear()
                self._http.refused("too_large")
                raise HTTPException(413, _too_large(self._bytes_max))
            if self._is_json:
                self._keep(part, last=not message.get("more_body"))
        return message

    def _keep(self, part: bytes, *, last: bool) -> None:
        overlap = len(_TIER) - 1
        self._named = self._named or _TIER in part or _TIER in self._end + part[:overlap]
        self._end = (self._end + part[-overlap:])[-overlap:]
        self._parts.append(part)
        if last:
            if self._named:
                self._note(b"".join(self._parts))
            self._parts.clear()

    def _note(self, body: bytes) -> None:
        try:
            self._http.service_tier = msgspec.json.decode(body, type=_Tier).service_tier
        except (msgspec.MsgspecError, RecursionError):
            return  # vLLM says what is wrong with it.


class ResponseHead:
    """The head of a response, which waits until the instance is known, or for the first byte of the
    body. And comments in a stream of events that stands still, for proxies that cut off what does.

    vLLM sends the head of a stream before the request is placed. Holding it back until then costs
    the client nothing, since no token can come earlier.
    """

    def __init__(self, http: HttpRequest, send: Send) -> None:
        self._http = http
        self._send = send
        self._head: Message | None = None
        self._sending: asyncio.Task[None] | None = None
        self._begun = False
        self._over = False  # whether all was sent
        self._events = False  # whether the response is a stream of events
        self._commenting: asyncio.Task[None] | None = None
        http.on_dispatch = self._dispatched
        http.on_wait = self._comment

    def __call__(self, message: Message) -> Awaitable[None]:
        # Tokens of streams come here and only pass. They need no coroutine of their own.
        if self._http.code is not None:
            return self._end(message, self._http.code)
        if self._begun:
            return self._send(message)
        return self._begin(message)

    async def _begin(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            kind = Headers(raw=message.get("headers", [])).get("content-type", "")
            self._events = kind.startswith("text/event-stream")
            if self._http.instance is not None:
                await self._send_head()
            return
        if self._sending is not None:
            await self._sending
        elif self._head is not None:
            await self._send_head()
        self._begun = True
        await self._send(message)

    async def _end(self, message: Message, code: str) -> None:
        """The request has failed in a way that has a code of its own."""
        if self._over:
            return
        if message["type"] == "http.response.start":
            self._head = message
            return
        body = message.get("body", b"")
        answer = None
        if self._head is not None:
            answer = whole_answer(self._head, body, code, retry_s=self._http.retry_s)
        if answer is None:
            await self._begin({**message, "body": with_code(body, code)})
            return
        self._over = True
        self._head, whole = answer
        await self._send_head()
        await self._send(whole)

    def _dispatched(self) -> None:
        if self._head is not None:
            self._sending = asyncio.create_task(self._send_head())

    def _comment(self) -> None:
        """Sends one, unless the head has still to be sent. vLLM sends whole events, so a comment
        stands between two."""
        if self._events and self._head is None:
            self._commenting = asyncio.create_task(self._send_comment())

    async def _send_comment(self) -> None:
        with contextlib.suppress(RuntimeError):  # The response has just ended.
            await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})

    async def _send_head(self) -> None:
        head, self._head = self._head, None
        if head is None:
            return
        head["headers"] = [*head.get("headers", ()), *limit_headers(self._http.meter)]
        if self._http.instance is not None:
            head["headers"].append((b"x-llumnix-instance", self._http.instance.encode()))
        if self._http.span is not None:
            self._http.span.answered(head["status"])
        await self._send(head)
