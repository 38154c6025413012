"""The outermost layer: keys, pages, sizes, stopping, and the header that names the instance."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Body, FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from prometheus_client import REGISTRY

pytest.importorskip("vllm")

from starlette.middleware.cors import CORSMiddleware

from llumnix.core.priorities import Priorities
from llumnix.core.settings import PrioritySettings
from llumnix.core.supervision.readiness import FleetSeen
from llumnix.core.types import InstanceId
from llumnix.frontend.context import HttpRequest, RefusedError, current_http_request
from llumnix.frontend.door.probes import Probes
from llumnix.frontend.door.refusals import REFUSALS
from llumnix.frontend.http.access import Access, digests, needs_admin
from llumnix.frontend.http.gate import COMMENT, Gate, ResponseHead
from llumnix.frontend.http.routes import control_app

PAGE = "http://page.example"
KEY = {"Authorization": "Bearer secret"}


def application(
    keys: list[str] | None = None,
    *,
    admins: list[str] | None = None,
    administer: bool = True,
    hosts: frozenset[str] | None = frozenset(),
    origins: tuple[str, ...] = (),
    stopping: bool = False,
    root: str = "",
    body_mb: float = 0.001,
) -> FastAPI:
    """An application behind the gate, with CORS further in as vLLM has it. A mounted application
    answers every method and every path that begins with /metrics, as vLLM's does."""
    app = FastAPI(root_path=root)

    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("inside")(scope, receive, send)

    app.mount("/metrics", mounted)

    @app.post("/v1/parsed")
    async def parsed(body: Annotated[Any, Body()]) -> Any:
        http = current_http_request.get()
        assert http is not None
        return {"body": body, "tier": http.service_tier, "key": http.key}

    @app.post("/v1/streamed")
    async def streamed(request: Request) -> Any:
        return {"bytes": sum([len(part) async for part in request.stream()])}

    @app.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def anything(path: str) -> PlainTextResponse:
        return PlainTextResponse("inside")

    async def scrape() -> bytes:
        return b"inside"

    async def control(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("ours")(scope, receive, send)

    async def fleet() -> FleetSeen:
        return FleetSeen(instances=[], stopping=stopping)

    app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"])
    app.add_middleware(Gate)
    app.state.args = SimpleNamespace(
        access=Access(
            client_digests=digests(keys or ()),
            admin_digests=digests(admins or ()),
            clients_administer=administer,
            hosts=hosts,
            origins=origins,
        ),
        allowed_origins=origins,
        allow_credentials=False,
        allowed_methods=["*"],
        allowed_headers=["*"],
        max_body_mb=body_mb,
        control_app=control,
        probes=Probes(fleet, 1),
        control=SimpleNamespace(metrics=scrape),
    )
    core = SimpleNamespace(priorities=Priorities(PrioritySettings()))
    app.state.engine_client = SimpleNamespace(
        stopping=stopping, open_http=0, tracing=None, engine_core=core
    )
    return app


def client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t")


def reason(answer: httpx.Response) -> tuple[int, Any]:
    return answer.status_code, answer.json()["error"]["code"]


# -- keys


PATHS = [
    "/v1/chat/completions", "/metrics", "/invocations", "/llumnix/v1/instances", "/llumnix",
    "/pause", "/score", "/docs", "/", "/healthz", "/health/", "/HEALTH", "//health", "/version",
    "/health%2f..%2fmetrics", "/health/../metrics", "/health;x=1", "/health%00", "/%6d%65trics",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
async def test_the_key_guards_every_path(path: str) -> None:
    async with client(application(["secret"])) as http:
        assert (await http.get(path)).status_code == 401
        assert (await http.post(path)).status_code == 401
        wrong = {"Authorization": "Bearer other"}
        assert (await http.get(path, headers=wrong)).status_code == 401
        assert (await http.get(path, headers=KEY)).status_code == 200


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD", "PUT", "PROPFIND", "BREW"])
@pytest.mark.parametrize("path", ["/metrics", "/metricsfoo", "/metrics/x", "/v1/models"])
async def test_no_method_gets_in_without_the_key(method: str, path: str) -> None:
    async with client(application(["secret"])) as http:
        for headers in ({}, {"Origin": PAGE}, {"Access-Control-Request-Method": "GET"}):
            assert (await http.request(method, path, headers=headers)).status_code == 401


async def test_a_preflight_is_answered_and_reaches_no_application() -> None:
    async with client(application(["secret"], origins=(PAGE,))) as http:
        for path in ("/metrics", "/metricsfoo", "/v1/chat/completions", "/llumnix/v1/instances"):
            asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
            asked["Access-Control-Request-Headers"] = "authorization"
            answer = await http.request("OPTIONS", path, headers=asked)
            assert (answer.status_code, answer.text) == (200, "OK")
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert answer.headers["access-control-allow-headers"] == "authorization"
            asked["Origin"] = "http://evil.example"
            answer = await http.request("OPTIONS", path, headers=asked)
            assert (answer.status_code, answer.text) == (400, "Disallowed CORS origin")


async def test_anthropics_header_carries_a_key_too() -> None:
    async with client(application(["secret"])) as http:
        for headers in (
            {"x-api-key": "secret"},
            {"x-api-key": "secret", "Authorization": ""},
            {"x-api-key": "secret", "Authorization": "Basic dTpw"},
            {"Authorization": "bearer secret"},
        ):
            answer = await http.post("/v1/parsed", headers=headers, json=1)
            assert answer.json()["key"] == "secret"  # What caps by key go by.
        for headers in (
            {"x-api-key": "other"},
            {"x-api-key": ""},
            {"Authorization": "Basic secret"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer secretsecret"},
            {"Authorization": "Bearer secret "},
        ):
            assert (await http.post("/v1/parsed", headers=headers, json=1)).status_code == 401


async def test_health_is_open_and_any_of_several_keys_will_do() -> None:
    async with client(application(["a", "b"])) as http:
        assert (await http.get("/health")).text == "inside"
        for key in "ab":
            headers = {"Authorization": f"Bearer {key}"}
            assert (await http.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize("root", ["/", "/api", "/api/", "/v1"])
async def test_the_gate_reads_a_path_as_the_router_does(root: str) -> None:
    async with client(application(["secret"], admins=["root"], root=root)) as http:
        for path in ("/sleep", "/api/sleep", "/apisleep", "/v1/sleep", "/v1sleep", "//sleep"):
            answer = await http.post(path, headers=KEY)
            inside = path.startswith("/v1/") and root != "/v1"
            assert answer.status_code == (200 if inside else 403), path
        assert (await http.get("/health")).status_code == 200


async def test_a_root_path_opens_nothing() -> None:
    async with client(application(["a"], root="/api")) as http:
        assert (await http.get("/api/v1/models")).status_code == 401
        assert (await http.get("/api/llumnix/v1/instances")).status_code == 401
        assert (await http.get("/api/health")).status_code == 200


async def websocket(app: FastAPI, **headers: str) -> int:
    """The status that a WebSocket's opening is refused with; 0 if it gets in."""
    statuses: list[int] = []

    async def send(message: Any) -> None:
        statuses.append(message.get("status", 0))

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        statuses.append(0)

    scope = {
        "type": "websocket", "path": "/v1/realtime", "root_path": "", "app": app,
        "headers": [(n.encode(), v.encode()) for n, v in headers.items()],
        "extensions": {"websocket.http.response": {}},
    }  # fmt: skip
    await Gate(inside)(scope, None, send)  # type: ignore[arg-type]
    return statuses[0]


async def test_a_websocket_needs_the_key_too() -> None:
    assert await websocket(application(["a"])) == 401
    assert await websocket(application(["a"]), authorization="Bearer a") == 0


async def test_a_page_of_another_origin_opens_no_websocket() -> None:
    assert await websocket(application(), origin=PAGE, host="t") == 403
    assert await websocket(application(), origin="http://t", host="t") == 0
    assert await websocket(application(origins=(PAGE,)), origin=PAGE, host="t") == 0


# -- administrators

ADMINISTRATION = [
    ("POST", "/llumnix/v1/instances"), ("DELETE", "/llumnix/v1/instances/i0"),
    ("POST", "/llumnix/v1/instances/i0/drain"), ("POST", "/llumnix/v1/migrations"),
    ("GET", "/llumnix/v1/requests"), ("GET", "/llumnix/v1/migrations"),
    ("GET", "/llumnix/v1/migrations/m1"), ("POST", "/sleep"), ("POST", "/pause"),
    ("POST", "/collective_rpc"), ("POST", "/start_profile"), ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/load_lora_adapter/"), ("GET", "/server_info"), ("GET", "/metricsfoo"),
    ("POST", "/unheard-of"), ("POST", "/%73leep"), ("POST", "/v1%2Fload%5Flora_adapter"),
    ("POST", "/v1/load_lora_adapter%0A"), ("POST", "/v1/unload_lora_adapter%0A"),
    ("POST", "/inference/v1/abort_requests"), ("DELETE", "/adapters/x"),
]  # fmt: skip
USE = [
    ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("POST", "/tokenize"),
    ("POST", "/invocations"), ("GET", "/metrics"), ("GET", "/version"), ("GET", "/docs"),
    ("GET", "/llumnix/v1/instances"), ("POST", "/v2/rerank"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ADMINISTRATION)
@pytest.mark.parametrize("root", ["", "/api"])
async def test_with_an_admin_key_an_ordinary_one_does_not_administer(
    method: str, path: str, root: str
) -> None:
    async with client(application(["secret"], admins=["root"], root=root)) as http:
        refused = await http.request(method, root + path, headers=KEY)
        assert reason(refused) == (403, "admin_key_required")
        assert (await http.request(method, root + path)).status_code == 401
        for admin in ({"Authorization": "Bearer root"}, {**KEY, "x-api-key": "root"}):
            assert (await http.request(method, root + path, headers=admin)).status_code == 200


@pytest.mark.parametrize(("method", "path"), USE)
async def test_both_kinds_of_key_use_the_model(method: str, path: str) -> None:
    async with client(application(["secret"], admins=["root"])) as http:
        for key in ("secret", "root"):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await http.request(method, path, headers=headers)).status_code == 200
        assert (await http.request(method, path)).status_code == 401


async def test_an_admin_key_alone_leaves_the_model_open() -> None:
    async with client(application(admins=["root"])) as http:
        assert (await http.post("/v1/completions")).status_code == 200
        assert (await http.post("/v1/completions", headers=KEY)).status_code == 200
        for headers in ({}, KEY):
            assert (await http.post("/sleep", headers=headers)).status_code == 401
        assert (await http.post("/sleep", headers={"x-api-key": "root"})).status_code == 200


async def test_where_no_key_administers_nobody_does() -> None:
    async with client(application(["secret"], administer=False)) as http:
        answer = await http.delete("/llumnix/v1/instances/i0", headers=KEY)
        assert reason(answer) == (403, "admin_key_required")
        assert "--admin-api-key" in answer.json()["error"]["message"]
        assert (await http.get("/llumnix/v1/instances", headers=KEY)).status_code == 200


@pytest.mark.parametrize(("method", "path"), ADMINISTRATION)
async def test_without_admin_keys_every_key_administers(method: str, path: str) -> None:
    async with client(application(["secret"])) as http:
        assert (await http.request(method, path, headers=KEY)).status_code == 200
    async with client(application()) as http:
        assert (await http.request(method, path)).status_code == 200


def test_no_key_is_in_a_repr() -> None:
    app = application(["secret"], admins=["root"])
    access = app.state.args.access
    caller = access.caller({"authorization": "Bearer secret"})
    assert caller.key == "secret"
    assert "secret" not in repr(HttpRequest(client_id=None, key="secret"))
    assert "secret" not in repr(app.state.args) + repr(caller)


def test_a_path_that_looks_like_a_listed_one_is_not() -> None:
    for path in ("/v1", "/v1x", "/V1/models", "//v1/models", "/versionx", "/", "/llumnix"):
        assert needs_admin("GET", path), path
    assert needs_admin("POST", "/llumnix/v1/instances/")
    assert not needs_admin("GET", "/llumnix/v1/instances/")


def test_who_may_see_all_requests_may_watch_them() -> None:
    assert needs_admin("GET", "/llumnix/v1/requests")
    assert needs_admin("GET", "/llumnix/v1/requests/r1")
    assert needs_admin("GET", "/llumnix/v1/events")


# -- web pages, where no key guards

OWN = [
    "127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:8000", "localhost.", "x.localhost:1",
    "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]:8", "192.0.2.7:8000", "llumnix:8000", "",
]  # fmt: skip
STRANGE = [
    "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example",
    "evil.example.", "[evil.example]", "localhost.evil.example:80", "1.2.3",
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/llumnix/v1/instances"])
async def test_a_name_of_somebody_elses_does_not_lead_here(path: str) -> None:
    async with client(application()) as http:
        for host in OWN:
            assert (await http.get(path, headers={"Host": host})).status_code == 200, host
        for host in STRANGE:
            headers = {"Host": host, "Origin": f"http://{host}"}
            for method in ("GET", "POST"):
                answer = await http.request(method, path, headers=headers)
                assert reason(answer) == (403, "host_not_allowed"), host


async def test_a_name_that_is_allowed_a_key_or_a_socket_lead_here() -> None:
    headers = {"Host": "LLM.corp.example:443"}
    for app in (
        application(hosts=frozenset({"llm.corp.example"})),
        application(hosts=frozenset({"*"})),
        application(hosts=None),
    ):
        async with client(app) as http:
            assert (await http.get("/v1/models", headers=headers)).status_code == 200
    async with client(application(["secret"])) as http:
        assert (await http.get("/v1/models", headers={**headers, **KEY})).status_code == 200
        assert (await http.get("/v1/models", headers=headers)).status_code == 401


@pytest.mark.parametrize("path", ["/llumnix/v1/instances", "/sleep", "/v1/audio/transcriptions"])
async def test_a_page_of_another_origin_changes_nothing(path: str) -> None:
    foreign = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
    async with client(application()) as http:
        assert reason(await http.post(path, headers=foreign)) == (403, "foreign_origin")
        assert (await http.post(path, headers={"Origin": "null"})).status_code == 403
        assert (await http.get(path, headers=foreign)).status_code == 200
        for own in ({"Origin": "http://t"}, {"Origin": "http://T"}, {}):
            assert (await http.post(path, headers=own)).status_code == 200
    async with client(application(origins=(PAGE,))) as http:
        assert (await http.post(path, headers={"Origin": PAGE})).status_code == 200
        assert (await http.post(path, headers=foreign)).status_code == 403
    async with client(application(["secret"])) as http:  # No page knows the key by itself.
        assert (await http.post(path, headers={**foreign, **KEY})).status_code == 200


async def test_json_of_another_origin_was_asked_for_before_but_does_not_administer() -> None:
    headers = {"Origin": PAGE, "Content-Type": "application/json; charset=utf-8"}
    for origins in ((), ("*",)):
        async with client(application(origins=origins)) as http:
            assert (await http.post("/v1/chat/completions", headers=headers)).status_code == 200
            answer = await http.post("/v1/load_lora_adapter", headers=headers)
            assert reason(answer) == (403, "foreign_origin")


async def test_what_the_gate_answers_itself_carries_cors_headers() -> None:
    page = {"Origin": PAGE}
    strange = {**page, "Host": "evil.example"}
    large = {**page, **KEY, "Content-Length": "2000"}
    for app, headers, status in [
        (application(["secret"], origins=(PAGE,)), page, 401),
        (application(origins=(PAGE,)), strange, 403),
        (application(stopping=True, origins=(PAGE,)), page, 503),
        (application(["secret"], origins=(PAGE,)), large, 413),
        (application(origins=(PAGE,)), page, 200),
    ]:
        async with client(app) as http:
            for path in ("/v1/completions", "/llumnix/v1/instances"):
                answer = await http.post(path, headers=headers)
                assert answer.status_code == status
                assert answer.headers.get_list("access-control-allow-origin") == [PAGE]


# -- bodies


def parts(*sizes: int) -> AsyncIterator[bytes]:
    async def each() -> AsyncIterator[bytes]:
        for size in sizes:
            yield b"1" * size

    return each()


@pytest.mark.parametrize("path", ["/v1/parsed", "/v1/streamed"])
async def test_a_body_over_the_limit_is_refused_by_its_length_or_when_it_comes(path: str) -> None:
    async with client(application()) as http:
        headers = {"Content-Type": "application/json"}
        for content in (b"1" * 1000, parts(500, 500), parts(*[1] * 1000)):
            answer = await http.post(path, headers=headers, content=content)
            assert answer.status_code == 200
        for content in (b"1" * 1001, parts(500, 501), parts(5000), parts(*[1] * 1001)):
            answer = await http.post(path, headers=headers, content=content)
            assert answer.status_code == 413
            assert "larger than 1000 bytes; --max-body-mb" in answer.text


async def test_a_body_of_a_length_that_is_too_large_is_not_read() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("read")

    for path in ("/v1/parsed", "/llumnix/v1/migrations"):
        scope = {
            "type": "http", "path": path, "method": "POST", "app": application(),
            "headers": [(b"content-length", b"1001")],
        }  # fmt: skip
        await Gate(receive)(scope, receive, send)  # type: ignore[arg-type]
        assert sent[-2]["status"] == 413
        assert json.loads(sent[-1]["body"])["error"]["code"] == "too_large"


async def test_our_own_routes_have_the_limit_and_openais_form_of_errors() -> None:
    app = application()
    app.state.args.control_app = control_app(None, None)  # type: ignore[arg-type]
    async with client(app) as http:
        headers = {"Content-Type": "application/json"}
        order = await http.post("/llumnix/v1/migrations", headers=headers, content=parts(1001))
        assert reason(order) == (413, "too_large")
        assert reason(await http.get("/llumnix/v1/nothing")) == (404, 404)
        assert reason(await http.put("/llumnix/v1/migrations")) == (405, 405)


async def test_a_packed_body_is_not_unpacked() -> None:
    async with client(application()) as http:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        answer = await http.post("/v1/parsed", headers=headers, content=b"\x1f\x8b" + bytes(90))
        assert answer.status_code in (400, 422)


TIERS = [
    (b'{"a": [1], "service_tier": "priority"}', "priority"),
    (b'{"service_tier" : "flex", "messages": [{"content": "x"}]}', "flex"),
    (b'{"tools": [{"service_tier": "priority"}]}', None),
    (b'{"content": "say \\"service_tier\\": \\"priority\\""}', None),
    (b'{"service_tier": null}', None),
    (b'{"service_tier": 5}', None),
    (b'{"a": ' + b"[" * 200 + b"]" * 200 + b', "service_tier": "auto"}', "auto"),
]


@pytest.mark.parametrize(("body", "tier"), TIERS)
@pytest.mark.parametrize("size", [1, 7, 13, 14, 4096])
async def test_the_service_tier_is_found_wherever_a_body_is_cut(
    body: bytes, tier: str | None, size: int
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), size):
            yield body[at : at + size]

    async with client(application()) as http:
        headers = {"Content-Type": "application/json"}
        answer = await http.post("/v1/parsed", headers=headers, content=pieces())
        assert answer.json()["tier"] == tier


# -- stopping, and what answers carry


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, str, dict[str, str]], int, str | None]] = {
    "invalid_api_key": ({"keys": ["k"]}, ("POST", "/v1/x", {}), 401, None),
    "admin_key_required": (
        {"keys": ["secret"], "admins": ["root"]}, ("POST", "/pause", KEY), 403, None,
    ),
    "host_not_allowed": ({}, ("GET", "/v1/models", {"Host": "evil.example"}), 403, None),
    "foreign_origin": ({}, ("POST", "/v1/x", {"Origin": PAGE}), 403, None),
    "too_large": ({}, ("POST", "/v1/x", {"Content-Length": "5000"}), 413, None),
    "bad_class": ({}, ("POST", "/v1/x", {"X-Llumnix-Priority": "urgent"}), 400, None),
    "stopping": ({"stopping": True}, ("POST", "/v1/x", {}), 503, "1"),
}  # fmt: skip
"""By code: the server, the request, the status and when to try again."""


def counted(code: str) -> float:
    value = REGISTRY.get_sample_value("llumnix_gate_refusals_total", {"code": code})
    assert value is not None
    return value


@pytest.mark.parametrize("code", REFUSED)
async def test_a_refusal_has_its_code_in_head_and_body_and_is_counted_once(code: str) -> None:
    server, (method, path, headers), status, retry = REFUSED[code]
    before = {other: counted(other) for other in REFUSED}
    async with client(application(**server)) as http:
        answer = await http.request(method, path, headers=headers)
    assert answer.status_code == status == REFUSALS[code].status
    assert answer.headers["x-llumnix-reason"] == code
    assert answer.headers.get("retry-after") == retry
    if code == "invalid_api_key":
        assert answer.json() == {"error": "Unauthorized"}  # As vLLM's.
    else:
        assert answer.json()["error"]["code"] == code
        assert answer.json()["error"]["type"] == REFUSALS[code].kind
    after = {other: counted(other) for other in REFUSED}
    assert after == {**before, code: before[code] + 1}


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_is_refused_inside_the_application_carries_its_code_too(streamed: bool) -> None:
    """vLLM's handlers know the status alone."""
    before = counted("no_instance")
    error = {"message": "No instance serves.", "type": "Service Unavailable", "code": 503}
    body = json.dumps({"error": error}).encode()
    http = HttpRequest(client_id=None)
    refusal = RefusedError("no_instance", "No instance serves.", retry_s=12.2)
    assert refusal.http_status == 503
    refusal.note(http)
    if streamed:
        event = b"data: " + body + b"\n\n"
        head, answer = await sent_of(http, (200, EVENTS), (event, 1), code=None)
    else:
        kind = [(b"content-type", b"application/json")]
        head, answer = await sent_of(http, (503, kind), (body,), code=None)
    found = {name.decode(): value.decode() for name, value in head["headers"]}
    assert (head["status"], found["x-llumnix-reason"]) == (503, "no_instance")
    assert found["retry-after"] == "13"
    assert told(answer["body"])["code"] == "no_instance"
    assert counted("no_instance") == before + 1


async def test_a_body_that_grows_too_large_is_refused_with_its_code() -> None:
    before = counted("too_large")

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield b"1" * 500

    async with client(application()) as http:
        answer = await http.post("/v1/streamed", content=parts())
    assert answer.status_code == 413
    assert counted("too_large") == before + 1


async def test_while_stopping_nothing_new_comes_in() -> None:
    async with client(application(stopping=True)) as http:
        for path in ("/v1/completions", "/llumnix/v1/instances"):
            answer = await http.post(path)
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "The server is stopping."
            assert answer.headers["retry-after"] == "1"
        assert (await http.get("/llumnix/v1/instances")).text == "ours"


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


async def test_a_stop_waits_for_requests_that_have_come_whole_and_for_no_upload() -> None:
    """A client may never send the rest of its body."""
    app = application()
    llm = app.state.engine_client
    rest, seen = asyncio.Event(), []

    def note() -> None:
        seen.append(llm.open_http)
        if llm.open_http:
            assert REGISTRY.get_sample_value("llumnix_http_open") == llm.open_http

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        note()
        while (await receive()).get("more_body"):
            note()
        note()
        await PlainTextResponse("done")(scope, receive, send)

    async def receive() -> dict[str, Any]:
        if not rest.is_set():
            rest.set()
            return {"type": "http.request", "body": b"{", "more_body": True}
        return {"type": "http.request", "body": b"}", "more_body": False}

    async def send(message: Any) -> None:
        pass

    for method, counts in (("POST", [0, 0, 1]), ("GET", [1, 1, 1])):
        rest.clear()
        seen.clear()
        scope = {"type": "http", "method": method, "path": "/v1/x", "headers": [], "app": app}
        await Gate(inside)(scope, receive, send)
        assert seen == counts
        assert llm.open_http == 0
        assert REGISTRY.get_sample_value("llumnix_http_open") == 0


@pytest.mark.parametrize("path", ["/v1/x", "/llumnix/v1/x", "/llumnix/v1/events", "/live"])
@pytest.mark.parametrize("ends", ["answers", "raises", "is left"])
async def test_a_stop_waits_for_no_request_that_is_over(path: str, ends: str) -> None:
    app, began = application(), asyncio.Event()

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        began.set()
        if ends == "raises":
            raise RuntimeError("the handler failed")
        if ends == "is left":
            await asyncio.Event().wait()
        await PlainTextResponse("done")(scope, receive, send)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    app.state.args.control_app = inside
    for method in ("POST", "GET"):
        began.clear()
        scope = {"type": "http", "method": method, "path": path, "headers": [], "app": app}
        answering = asyncio.create_task(Gate(inside)(scope, receive, send))
        waiting = asyncio.create_task(began.wait())
        await asyncio.wait([answering, waiting], return_when=asyncio.FIRST_COMPLETED)
        for task in (answering, waiting) if ends == "is left" else (waiting,):
            task.cancel()
        await asyncio.wait([answering])
        assert app.state.engine_client.open_http == 0


@pytest.mark.parametrize(("path", "counted"), [("/llumnix/v1/events", 0), ("/llumnix/v1/x", 1)])
async def test_a_stop_does_not_wait_for_who_watches(path: str, counted: int) -> None:
    app = application()
    seen = []

    async def control(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        seen.append(app.state.engine_client.open_http)
        await PlainTextResponse("ours")(scope, receive, send)

    app.state.args.control_app = control
    async with client(app) as http:
        assert (await http.get(path)).text == "ours"
    assert seen == [counted]


async def test_probes_are_open_and_answer_while_it_stops() -> None:
    """Whatever name they are addressed to, since an orchestrator asks by address."""
    app = application(["secret"], hosts=frozenset(), stopping=True, root="/behind/proxy")
    async with client(app) as http:
        for headers in ({}, {"Host": "pod.example"}, {"Authorization": "Bearer wrong"}):
            answer = await http.get("/live", headers=headers)
            assert (answer.status_code, answer.json()) == (200, {"live": True})
            answer = await http.get("/behind/proxy/ready?min=3", headers=headers)
            assert answer.status_code == 503
            assert answer.json() == {
                "ready": False, "phase": "stopping", "reason": "stopping", "serving": 0, "min": 3,
                "instances": [],
            }  # fmt: skip
        for path in ("/ready/", "/readyz", "/live/x", "//ready"):
            assert (await http.get(path)).status_code == 401, path


@pytest.mark.parametrize(
    ("kind", "commented"), [("text/event-stream; charset=utf-8", True), ("application/json", False)]
)
async def test_a_stream_of_events_that_stands_still_gets_comments(
    kind: str, commented: bool
) -> None:
    http = HttpRequest(client_id=None)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    head = ResponseHead(http, send)
    http.waits()  # No head has come from vLLM.
    await head(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", kind.encode())],
        }
    )
    http.waits()  # It is still held back.
    await asyncio.sleep(0)
    assert sent == []
    http.dispatched(InstanceId("i1"))
    await asyncio.sleep(0)
    http.waits()
    await asyncio.sleep(0)
    await head({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
    http.waits()
    await asyncio.sleep(0)
    bodies = [m["body"] for m in sent if m["type"] == "http.response.body"]
    assert bodies == ([COMMENT, b"data: 1\n\n", COMMENT] if commented else [b"data: 1\n\n"])
    assert COMMENT.startswith(b":")
    assert COMMENT.endswith(b"\n\n")


async def test_a_comment_that_comes_too_late_harms_nobody() -> None:
    http = HttpRequest(client_id=None)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise RuntimeError("Unexpected ASGI message")

    head = ResponseHead(http, send)
    http.dispatched(InstanceId("i1"))
    headers = [(b"content-type", b"text/event-stream")]
    await head({"type": "http.response.start", "status": 200, "headers": headers})
    http.waits()
    assert head._commenting is not None
    await head._commenting


ERROR = {"message": "no", "type": "InternalServerError", "param": None, "code": 500}
ERROR_EVENT = b'data: {"error": ' + json.dumps(ERROR).encode() + b"}\n\n"
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


async def sent_of(
    http: HttpRequest,
    *messages: tuple[Any, ...],
    code: str | None = "request_quarantined",
    after: int = 0,
) -> list[Any]:
    """What leaves if vLLM sends these heads (status, headers) and bodies. It has failed, with a
    code, before message number `after`; None: with the code that the request has already."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    head = ResponseHead(http, send)
    for number, (first, *more) in enumerate(messages):
        if number == after and code is not None:
            http.code = code
        if isinstance(first, int):
            await head({"type": "http.response.start", "status": first, "headers": list(more[0])})
        else:
            await head({"type": "http.response.body", "body": first, "more_body": bool(more)})
        await asyncio.sleep(0)
    return sent


def told(body: bytes) -> Any:
    """The error in a body or in an event."""
    return json.loads(body.removeprefix(b"data: "))["error"]


@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize(
    ("code", "retry"), [("request_quarantined", "false"), ("engine_died", None)]
)
async def test_an_error_with_a_code_of_its_own_carries_it(
    dispatched: bool, code: str, retry: str | None
) -> None:
    http = HttpRequest(client_id=None)
    if dispatched:
        http.dispatched(InstanceId("i1"))
    body = json.dumps({"error": ERROR}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    head, answer = await sent_of(http, (500, headers), (body,), code=code)
    assert head["status"] == 500
    assert told(answer["body"]) == {**ERROR, "code": code, "retryable": code == "engine_died"}
    found = {name.decode(): value.decode() for name, value in head["headers"]}
    assert found["content-length"] == str(len(answer["body"]))
    assert found.get("x-should-retry") == retry
    assert found.get("x-llumnix-instance") == ("i1" if dispatched else None)


async def test_an_error_in_a_stream_carries_its_code_behind_the_tokens_before_it() -> None:
    http = HttpRequest(client_id=None)
    http.dispatched(InstanceId("i1"))
    messages = [(200, EVENTS), (b"data: 1\n\n", 1), (b"data: 2\n\n", 1), (ERROR_EVENT, 1)]
    messages += [(b"data: [DONE]\n\n",)]
    head, *bodies = await sent_of(http, *messages, code="engine_died", after=2)
    assert head["status"] == 200
    assert [b["body"] for b in bodies[:2]] == [b"data: 1\n\n", b"data: 2\n\n"]
    assert told(bodies[2]["body"]) == {**ERROR, "code": "engine_died", "retryable": True}
    assert bodies[2]["body"].endswith(b"}\n\n")
    assert bodies[3]["body"] == b"data: [DONE]\n\n"


async def test_a_stream_that_is_refused_before_it_begins_is_an_ordinary_error() -> None:
    http = HttpRequest(client_id=None)
    event = ERROR_EVENT.replace(b"500", b"422")
    head, answer = await sent_of(http, (200, EVENTS), (event, 1), (b"data: [DONE]\n\n",))
    assert head["status"] == 422
    found = {name.decode(): value.decode() for name, value in head["headers"]}
    assert found == {
        "content-type": "application/json",
        "content-length": str(len(answer["body"])),
        "x-should-retry": "false",
        "x-llumnix-reason": "request_quarantined",
    }
    assert told(answer["body"])["code"] == "request_quarantined"
    assert not answer.get("more_body")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"error": "text"}', b'{"a": 1}', b"\xff"])
async def test_what_is_no_error_passes_as_it_is(body: bytes) -> None:
    whole = json.dumps({"error": ERROR, "of": "a part"}).encode()
    for status, sent in ((200, body), (500, body), (200, whole)):
        head, answer = await sent_of(
            HttpRequest(client_id=None), (status, [(b"content-type", b"text/plain")]), (sent,)
        )
        assert (head["status"], answer["body"]) == (status, sent)


async def test_a_token_waits_for_the_head_before_it() -> None:
    """The head was given to the connection at the dispatch, and may take its time."""
    http, sent = HttpRequest(client_id=None), list[str]()
    taken = asyncio.Event()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            await taken.wait()
        sent.append(message["type"])

    head = ResponseHead(http, send)
    await head({"type": "http.response.start", "status": 200, "headers": []})
    http.dispatched(InstanceId("i3"))
    token = asyncio.ensure_future(head({"type": "http.response.body", "body": b"token"}))
    for _ in range(5):
        await asyncio.sleep(0)
    assert sent == []
    taken.set()
    await token
    assert sent == ["http.response.start", "http.response.body"]


# -- traces


async def test_a_request_is_traced_from_its_coming_to_its_answer() -> None:
    """Those that compute something: a GET is not."""
    app, told = application(), list[Any]()
    span = SimpleNamespace(answered=told.append, end=lambda: told.append("end"))

    def begin(scope: Any, client_id: str | None) -> Any:
        told.append((scope["path"], client_id))
        return span

    app.state.engine_client.tracing = SimpleNamespace(request=begin)
    async with client(app) as http:
        await http.get("/v1/x")
        assert told == []
        await http.post("/v1/x", headers={"x-request-id": "mine"})
    assert told == [("/v1/x", "mine"), 200, "end"]
