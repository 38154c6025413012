"""The outermost layer of the HTTP application: who may come in, and what each answer carries.

vLLM's own key check covers /v1 and a few more prefixes; this one covers every path but /health,
with vLLM's comparison of the key. vLLM adds it as the last of its middlewares, by import path, so
it takes no arguments and finds the rest in the application's state.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from llumnix.errors import UsageError
from llumnix.frontend.arguments import api_keys
from llumnix.frontend.context import HttpRequest, current_http_request
from llumnix.frontend.control import openai_error

OPEN_PATHS = ("/health",)
RETRY_AFTER_S = 1
PRIORITY_HEADER = "x-llumnix-priority"


class Gate:
    """Checks the key, serves /llumnix, turns requests away while stopping, and names the instance
    in `x-llumnix-instance`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._check: AuthenticationMiddleware | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        state = scope["app"].state
        llm = state.engine_client
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers = Headers(scope=scope)
        if not self._may_enter(scope, path, headers, state.args):
            refusal = JSONResponse(content={"error": "Unauthorized"}, status_code=401)
            await refusal(scope, receive, send)
        elif llm.stopping and (scope["type"] == "websocket" or scope["method"] == "POST"):
            answer = openai_error("The server is stopping.", 503, "service_unavailable")
            answer.headers["retry-after"] = str(RETRY_AFTER_S)
            await answer(scope, receive, send)
        elif path == "/llumnix" or path.startswith("/llumnix/"):
            if scope.get("method") not in ("GET", "HEAD") and _from_elsewhere(headers):
                refusal = openai_error("Not from a page of another origin.", 403, "forbidden")
                await refusal(scope, receive, send)
            else:
                await llm.control_app(scope, receive, send)
        else:
            name = headers.get(PRIORITY_HEADER)
            try:
                if name is not None:
                    llm.engine_core.priorities.rank_named(name)
            except UsageError as error:
                refusal = openai_error(f"{PRIORITY_HEADER}: {error}", 400, "invalid_request_error")
                await refusal(scope, receive, send)
                return
            http = HttpRequest(
                client_id=headers.get("x-request-id"),
                priority_class=name,
                key=headers.get("authorization", "").partition(" ")[2] or None,
            )
            token = current_http_request.set(http)
            llm.open_http += 1
            try:
                await self.app(scope, _Question(http, receive), _Answer(http, send))
            finally:
                llm.open_http -= 1
                current_http_request.reset(token)

    def _may_enter(self, scope: Scope, path: str, headers: Headers, args: Any) -> bool:
        if path in OPEN_PATHS or scope.get("method") == "OPTIONS":
            return True
        if self._check is None:
            self._check = AuthenticationMiddleware(self.app, api_keys(args))
        return not self._check.api_tokens or self._check.verify_token(headers)


def _from_elsewhere(headers: Headers) -> bool:
    """Whether a browser sent this for a page of another origin: it can do so without asking, and a
    server on loopback has no other guard against any page that its user happens to visit."""
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


class _Tier(msgspec.Struct):
    """The one field of a request's body that vLLM reads and does nothing with."""

    service_tier: str | None = None


class _Question:
    """A request's body on its way to vLLM; notes OpenAI's `service_tier` in passing. A body without
    the word is not parsed."""

    def __init__(self, http: HttpRequest, receive: Receive) -> None:
        self._http = http
        self._receive = receive
        self._parts: list[bytes] = []

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._parts.append(message.get("body", b""))
            if not message.get("more_body"):
                body = b"".join(self._parts)
                self._parts.clear()
                if b'"service_tier"' in body:
                    self._note(body)
        return message

    def _note(self, body: bytes) -> None:
        try:
            self._http.service_tier = msgspec.json.decode(body, type=_Tier).service_tier
        except msgspec.MsgspecError:
            return  # vLLM says what is wrong with it.


class _Answer:
    """A response whose head waits until the instance is known, or the first byte of the body.

    A streaming response sends its head before vLLM has placed the request; holding it back until
    then costs the client nothing, since no token can come earlier.
    """

    def __init__(self, http: HttpRequest, send: Send) -> None:
        self._http = http
        self._send = send
        self._head: Message | None = None
        self._sending: asyncio.Task[None] | None = None
        self._begun = False
        http.on_dispatch = self._dispatched

    def __call__(self, message: Message) -> Awaitable[None]:
        # No coroutine of its own for what only passes: that is every token of every stream.
        if self._begun:
            return self._send(message)
        return self._begin(message)

    async def _begin(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            if self._http.instance is not None:
                await self._send_head()
            return
        if self._sending is not None:
            await self._sending
        elif self._head is not None:
            await self._send_head()
        self._begun = True
        await self._send(message)

    def _dispatched(self) -> None:
        if self._head is not None:
            self._sending = asyncio.create_task(self._send_head())

    async def _send_head(self) -> None:
        head, self._head = self._head, None
        if head is None:
            return
        if self._http.instance is not None:
            instance = self._http.instance.encode()
            head["headers"] = [*head.get("headers", ()), (b"x-llumnix-instance", instance)]
        await self._send(head)
