"""Keys of the file of --keys at the gate: roles, classes, limits, and a file that is read again."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY

from frontend.test_feed import PRIORITIES, World, until
from frontend.test_gate import application, client, reason
from llumnix.errors import UsageError
from llumnix.frontend.context import current_http_request
from llumnix.frontend.http.control import OwnControl
from llumnix.frontend.http.page import page_router
from llumnix.frontend.http.routes import control_app
from llumnix.observe import metrics
from llumnix.reload.key_file import KeyRing
from llumnix.reload.reloading import Reloading

MODEL, SEEN, STATUS = "/v1/chat/completions", "/llumnix/v1/requests", "/llumnix/v1/instances"
FILE = """
ada: {key: user, class: high}
vic: {key: viewer, roles: [view]}
all: {key: both, roles: [inference, view]}
ops: {key: root, roles: [admin]}
"""


def ring(tmp_path: Path, text: str = FILE) -> KeyRing:
    path = tmp_path / "keys.yaml"
    path.touch(mode=0o600)
    path.write_text(text)
    found = KeyRing(str(path), ["high", "normal"])
    found.replace(found.read())
    return found


def guarded(named: KeyRing, frontends: int = 1, **more: Any) -> Any:
    app = application(**more)
    app.state.args.access = replace(app.state.args.access, ring=named)
    app.state.args.api_server_count = frontends
    return app


LIMIT_RESETS = {1: [f"{n}s" for n in range(5, 31)], 0: ["1m0s", *(f"{n}s" for n in range(30, 60))]}
"""A slow machine may take seconds for a request."""


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("method", "path", "let_in"),
    [
        ("POST", MODEL, "user both root"),
        ("GET", "/v1/models", "user both root"),
        ("POST", "/score", "user both root"),
        ("GET", "/metrics", "user viewer both root"),
        ("GET", STATUS, "user viewer both root"),
        ("GET", "/version", "user viewer both root"),
        ("GET", SEEN, "viewer both root"),
        ("GET", SEEN + "/r1", "viewer both root"),
        ("GET", "/llumnix/v1/events", "viewer both root"),
        ("GET", "/llumnix/v1/config", "viewer both root"),
        ("POST", "/llumnix/v1/migrations", "root"),
        ("DELETE", "/llumnix/v1/quarantine", "root"),
        ("POST", STATUS, "root"),
        ("POST", "/pause", "root"),
        ("GET", "/server_info", "root"),
        ("POST", "/v1/load_lora_adapter", "root"),
    ],
)
async def test_a_key_opens_what_its_roles_are_for(
    tmp_path: Path, method: str, path: str, let_in: str
) -> None:
    async with client(guarded(ring(tmp_path))) as http:
        opened = [
            key
            for key in ("user", "viewer", "both", "root")
            if (await http.request(method, path, headers=bearer(key))).status_code not in (401, 403)
        ]
        assert opened == let_in.split()
        for headers in ({}, bearer("other")):
            assert (await http.request(method, path, headers=headers)).status_code == 401


async def test_a_refusal_says_which_key_would_do(tmp_path: Path) -> None:
    async with client(guarded(ring(tmp_path))) as http:
        model = await http.post(MODEL, headers=bearer("viewer"))
        assert reason(model) == (403, "role_required")
        assert "the role `inference`" in model.text
        seen = await http.get(SEEN, headers=bearer("user"))
        assert reason(seen) == (403, "admin_key_required")
        assert "use an admin key, or one with the role `view`" in seen.text
        drain = await http.post(STATUS, headers=bearer("viewer"))
        assert drain.json()["error"]["message"].endswith("use an admin key.")


async def test_where_there_is_a_file_nobody_administers_without_the_role(tmp_path: Path) -> None:
    """On loopback ordinary keys administer where there is no admin key at all."""
    keys = ring(tmp_path, "ada: {key: user}")
    async with client(guarded(keys, keys=["old"])) as http:
        assert (await http.post("/v1/models", headers=bearer("old"))).status_code == 200
        for key in ("old", "user"):
            assert (await http.post("/pause", headers=bearer(key))).status_code == 403


async def test_the_name_and_the_class_go_with_the_request_and_the_key_does_not(
    tmp_path: Path,
) -> None:
    app = guarded(ring(tmp_path))
    seen: list[Any] = []

    @app.middleware("http")
    async def note(request: Any, go_on: Any) -> Any:
        seen.append(current_http_request.get())
        return await go_on(request)

    app.user_middleware.reverse()  # The gate is the outermost, as in vLLM's.
    async with client(app) as http:
        await http.post(MODEL, headers=bearer("user"))
        await http.post(MODEL, headers=bearer("root"))
    assert [(h.key_name, h.cap) for h in seen] == [("ada", "high"), ("ops", None)]
    assert "user" not in repr(seen)


async def test_a_key_over_its_limits_is_told_when_to_come_again(tmp_path: Path) -> None:
    keys = ring(tmp_path, "ada: {key: user, requests_per_min: 2}\nbea: {key: free}\n")
    async with client(guarded(keys)) as http:
        for _ in range(2):
            assert (await http.post(MODEL, headers=bearer("user"))).status_code == 200
        over = await http.post(MODEL, headers=bearer("user"))
        assert reason(over) == (429, "rate_limited")
        assert over.json()["error"]["type"] == "rate_limit_error"
        assert 25 <= int(over.headers["retry-after"]) <= 30
        assert (await http.get("/v1/models", headers=bearer("user"))).status_code == 200
        assert (await http.post(MODEL, headers=bearer("free"))).status_code == 200


async def test_every_answer_says_what_is_left_of_a_keys_limits(tmp_path: Path) -> None:
    def told(answer: httpx.Response) -> dict[str, str]:
        begin = "x-ratelimit-"
        found = answer.headers.items()
        return {name.removeprefix(begin): value for name, value in found if begin in name}

    keys = ring(
        tmp_path,
        "ada: {key: user, requests_per_min: 2, tokens_per_min: 900}\n"
        "bea: {key: free, open_max: 3}\n",
    )
    async with client(guarded(keys)) as http:
        tokens = {"limit-tokens": "900", "remaining-tokens": "900", "reset-tokens": "0s"}
        for left, status in ((1, 200), (0, 200), (0, 429)):
            answer = await http.post(MODEL, headers=bearer("user"))
            found = told(answer)
            assert found.pop("reset-requests") in LIMIT_RESETS[left]
            requests = {"limit-requests": "2", "remaining-requests": str(left)}
            assert (answer.status_code, found) == (status, tokens | requests)
        for key, path in (("free", MODEL), ("user", "/llumnix/v1/reload")):
            assert told(await http.post(path, headers=bearer(key))) == {}


async def test_frontends_share_a_limit(tmp_path: Path) -> None:
    keys = ring(tmp_path, "ada: {key: user, requests_per_min: 4}")
    async with client(guarded(keys, frontends=2)) as http:
        statuses = [(await http.post(MODEL, headers=bearer("user"))).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]


async def test_so_many_requests_are_open_at_a_time(tmp_path: Path) -> None:
    keys = ring(tmp_path, "ada: {key: user, open_max: 1}")
    app, go_on, begun = guarded(keys), asyncio.Event(), asyncio.Event()

    @app.middleware("http")
    async def wait(request: Any, answer: Any) -> Any:
        begun.set()
        await go_on.wait()
        return await answer(request)

    app.user_middleware.reverse()
    async with client(app) as http:
        first = asyncio.create_task(http.post(MODEL, headers=bearer("user")))
        await begun.wait()
        assert reason(await http.post(MODEL, headers=bearer("user"))) == (429, "too_many_open")
        go_on.set()
        assert (await first).status_code == 200
        assert (await http.post(MODEL, headers=bearer("user"))).status_code == 200


async def test_the_file_is_read_again_while_it_serves(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    control: Any = OwnControl(SimpleNamespace(client_index=0), SimpleNamespace(), Reloading(keys))  # type: ignore[arg-type]
    async with client(guarded(keys)) as http:
        assert (await http.post(MODEL, headers=bearer("new"))).status_code == 401
        Path(str(keys.path)).write_text("ada: {key: new}\nops: {key: root, roles: [admin]}\n")
        assert await control.reload() == {
            "keys": 2, "added": [], "removed": ["all", "vic"], "changed": ["ada"],
            "settings": {"now": [], "engines": [], "start": []}, "unconfirmed": [],
        }  # fmt: skip
        statuses = {k: await _status(http, k) for k in ("new", "user", "both", "root")}
        assert statuses == {"new": 200, "user": 401, "both": 401, "root": 200}
        Path(str(keys.path)).write_text("ada: {}")
        with pytest.raises(UsageError, match="ada: give one of key and sha256"):
            await control.reload()
        assert await _status(http, "new") == 200


async def test_a_feed_ends_when_its_key_goes_and_others_go_on(tmp_path: Path) -> None:
    keys, world = ring(tmp_path), World()

    async def nothing() -> list[Any]:
        return []

    def watched() -> float | None:
        return REGISTRY.get_sample_value("llumnix_ui_watchers")

    fakes: Any = SimpleNamespace(
        priorities=PRIORITIES, link=SimpleNamespace(loads=nothing), look=world.look,
        instances=nothing,
    )  # fmt: skip
    args: Any = SimpleNamespace(
        access=replace(application().state.args.access, ring=keys),
        served_model_name=["m"], policy="llumnix",
    )  # fmt: skip
    page = page_router(fakes, fakes, args, stopping=lambda: world.stopping)
    app = control_app(fakes, fakes, page=page)
    file = Path(str(keys.path))
    async with client(app) as http:
        feeds = {
            key: asyncio.create_task(http.get("/llumnix/v1/events", headers=bearer(key)))
            for key in ("viewer", "both", "root")
        }
        await until(lambda: watched() == len(feeds))
        file.write_text(FILE.replace("viewer", "other").replace("[inference, view]", "[inference]"))
        keys.replace(keys.read())
        await until(lambda: watched() == 1)
        ended = [await feeds[key] for key in ("viewer", "both")]
        assert [answer.status_code for answer in ended] == [200, 200]
        assert not feeds["root"].done()
        # A key that goes between the gate's look and the feed's beginning.
        async with asyncio.timeout(5):
            await http.get("/llumnix/v1/events", headers=bearer("viewer"))
        world.stopping = True
        assert (await feeds["root"]).status_code == 200


async def _status(http: httpx.AsyncClient, key: str) -> int:
    return (await http.post(MODEL, headers=bearer(key))).status_code


async def test_use_is_counted_by_the_names_of_keys(tmp_path: Path) -> None:
    def count(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"llumnix_key_{name}_total", labels) or 0.0

    app, seen = guarded(ring(tmp_path)), []

    @app.middleware("http")
    async def note(request: Any, go_on: Any) -> Any:
        seen.append(current_http_request.get())
        return await go_on(request)

    app.user_middleware.reverse()
    before = {n: count("requests", key=n) for n in ("ada", "ops", "vic")}
    tokens = [count("tokens", key="ada", kind=kind) for kind in ("prompt", "output")]
    async with client(app) as http:
        for key in ("user", "user", "root", "viewer", "other"):
            await http.post(MODEL, headers=bearer(key))
    after = {n: count("requests", key=n) - b for n, b in before.items()}
    assert after == {"ada": 2, "ops": 1, "vic": 0}
    seen[0].spend(5, 7)
    spent = [count("tokens", key="ada", kind=kind) for kind in ("prompt", "output")]
    assert spent == [tokens[0] + 5, tokens[1] + 7]


async def test_no_more_names_are_told_apart_than_metrics_bear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "KEYS_MAX", 1)
    before = REGISTRY.get_sample_value("llumnix_key_requests_total", {"key": "other"}) or 0.0
    async with client(guarded(ring(tmp_path))) as http:
        for key in ("both", "user", "root"):
            await http.post(MODEL, headers=bearer(key))
    after = REGISTRY.get_sample_value("llumnix_key_requests_total", {"key": "other"})
    assert after == before + 2
