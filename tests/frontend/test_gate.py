"""The outermost layer: the key, stopping, and the header that names the instance."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, StreamingResponse

pytest.importorskip("vllm")

from llumnix.core.types import InstanceId
from llumnix.frontend.context import current_http_request
from llumnix.frontend.gate import Gate


def application(keys: list[str] | None = None, stopping: bool = False, root: str = "") -> FastAPI:
    app = FastAPI(root_path=root)

    @app.api_route("/{path:path}", methods=["GET", "POST", "OPTIONS"])
    async def anything(path: str) -> PlainTextResponse:
        return PlainTextResponse("inside")

    async def control(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("ours")(scope, receive, send)

    app.add_middleware(Gate)
    app.state.args = SimpleNamespace(api_key=keys)
    app.state.engine_client = SimpleNamespace(stopping=stopping, open_http=0, control_app=control)
    return app


def client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t")


PATHS = [
    "/v1/chat/completions", "/metrics", "/invocations", "/llumnix/v1/instances", "/llumnix",
    "/pause", "/score", "/docs", "/", "/healthz", "/health/", "/HEALTH", "//health", "/version",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
async def test_the_key_guards_every_path(path: str) -> None:
    async with client(application(["secret"])) as http:
        assert (await http.get(path)).status_code == 401
        assert (await http.post(path)).status_code == 401
        wrong = {"Authorization": "Bearer other"}
        assert (await http.get(path, headers=wrong)).status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert (await http.get(path, headers=right)).status_code == 200


async def test_health_is_open_and_any_of_several_keys_will_do() -> None:
    async with client(application(["a", "b"])) as http:
        assert (await http.get("/health")).text == "inside"
        for key in "ab":
            headers = {"Authorization": f"Bearer {key}"}
            assert (await http.get("/v1/models", headers=headers)).status_code == 200


async def test_a_root_path_opens_nothing() -> None:
    async with client(application(["a"], root="/api")) as http:
        assert (await http.get("/api/v1/models")).status_code == 401
        assert (await http.get("/api/llumnix/v1/instances")).status_code == 401
        assert (await http.get("/api/health")).status_code == 200


async def test_a_websocket_needs_the_key_too() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    app = application(["a"])
    scope = {
        "type": "websocket", "path": "/v1/realtime", "headers": [], "root_path": "", "app": app,
        "extensions": {"websocket.http.response": {}},
    }  # fmt: skip
    await Gate(app)(scope, None, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 401


async def test_while_stopping_nothing_new_comes_in() -> None:
    async with client(application(stopping=True)) as http:
        for path in ("/v1/completions", "/llumnix/v1/instances"):
            answer = await http.post(path)
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "The server is stopping."
            assert answer.headers["retry-after"] == "1"
        assert (await http.get("/llumnix/v1/instances")).text == "ours"


async def test_a_page_of_another_origin_cannot_add_instances() -> None:
    async with client(application()) as http:
        foreign = {"Origin": "http://evil.example"}
        assert (await http.post("/llumnix/v1/instances", headers=foreign)).status_code == 403
        assert (await http.get("/llumnix/v1/instances", headers=foreign)).status_code == 200
        own = {"Origin": "http://t"}
        assert (await http.post("/llumnix/v1/instances", headers=own)).status_code == 200


async def test_a_streams_head_leaves_at_the_dispatch_before_any_token() -> None:
    app = application()
    token = asyncio.Event()

    async def body() -> Any:
        http = current_http_request.get()
        assert http is not None
        assert http.client_id == "mine"
        http.dispatched(InstanceId("i3"))
        http.dispatched(InstanceId("i4"))  # A second choice of the same request.
        await token.wait()
        yield b"token"

    async def stream() -> StreamingResponse:
        return StreamingResponse(body())

    app.router.routes.insert(0, app.router.route_class("/s", stream, methods=["GET"]))  # type: ignore[attr-defined]
    sent: list[Any] = []
    headed = asyncio.Event()

    async def send(message: Any) -> None:
        sent.append(message)
        headed.set()

    async def receive() -> Any:
        await asyncio.sleep(60)

    scope = {
        "type": "http", "path": "/s", "raw_path": b"/s", "root_path": "", "method": "GET",
        "query_string": b"", "headers": [(b"x-request-id", b"mine")], "http_version": "1.1",
        "scheme": "http", "server": ("t", 80), "client": ("c", 1), "state": {}, "extensions": {},
        "asgi": {"version": "3.0", "spec_version": "2.4"},
    }  # fmt: skip
    running = asyncio.create_task(app(scope, receive, send))
    await asyncio.wait_for(headed.wait(), 5)
    assert [m["type"] for m in sent] == ["http.response.start"]
    assert dict(sent[0]["headers"])[b"x-llumnix-instance"] == b"i3"
    token.set()
    await asyncio.wait_for(running, 5)
    assert [m.get("body") for m in sent[1:]] == [b"token", b""]
    assert app.state.engine_client.open_http == 0
