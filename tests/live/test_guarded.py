"""The demo model behind keys, with a short time to stop."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.server import Server, eventually, real_time

pytestmark = pytest.mark.live
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def guarded(logs: Path) -> Iterator[Server]:
    server = Server(
        None, "--instances", "1", "--api-key", "secret", "--shutdown-timeout", "1",
        "--admin-api-key", "root-secret", "--max-body-mb", "0.1", log=logs / "guarded.log",
    )  # fmt: skip
    server.http.headers.update(KEY)
    yield server.wait_until_serving()
    server.stop()
    print(server.log[-2000:])


def test_without_a_model_the_demo_model_knows_the_capital_of_france(guarded: Server) -> None:
    """By the line that the server prints."""
    line = next(line for line in guarded.log.splitlines() if line.startswith("  curl "))
    answer = subprocess.run(
        line.strip(), shell=True, capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "KEY": "secret"},
    )  # fmt: skip
    assert "Paris" in answer.stdout


def test_every_route_of_the_application_wants_the_key(guarded: Server) -> None:
    paths = set(guarded.http.get("/openapi.json").json()["paths"])
    paths |= set(guarded.http.get("/llumnix/openapi.json").json()["paths"]) | {"/metrics", "/docs"}
    assert {"/v1/chat/completions", "/invocations", "/llumnix/v1/instances"} <= paths
    for path in sorted(paths - {"/health"}):
        bare = re.sub(r"\{[^}]*\}", "x", path)
        refused = httpx.post(guarded.url + bare, timeout=10)
        assert refused.status_code == 401, path
        assert refused.headers["x-llumnix-reason"] == "invalid_api_key"
        assert httpx.get(guarded.url + bare, timeout=10).status_code == 401, path
    assert httpx.get(guarded.url + "/health", timeout=10).status_code == 200


def test_an_ordinary_key_uses_the_model_and_an_admin_key_administers(guarded: Server) -> None:
    for method, path in [
        ("DELETE", "/llumnix/v1/instances/i7"), ("POST", "/llumnix/v1/instances/i7/undrain"),
        ("GET", "/llumnix/v1/migrations/m7"),
    ]:  # fmt: skip
        answer = guarded.http.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_key_required")
        assert answer.headers["x-llumnix-reason"] == "admin_key_required"
        admin = httpx.request(method, guarded.url + path, headers={"x-api-key": "root-secret"})
        assert admin.status_code == 404  # There is no such instance or migration.
    assert httpx.request("OPTIONS", guarded.url + "/metrics").status_code == 401
    for key in ("secret", "root-secret"):
        headers = {"x-api-key": key}
        assert httpx.get(guarded.url + "/v1/models", headers=headers).status_code == 200
    assert "root-secret" not in guarded.log


def test_a_body_over_the_limit_is_refused_in_openais_form(guarded: Server) -> None:
    headers = {"Content-Type": "application/json"}
    for content in (b"1" * 200_000, iter([b"1" * 50_000] * 4)):
        answer = guarded.http.post("/v1/completions", headers=headers, content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        assert answer.headers["x-llumnix-reason"] == "too_large"
    assert guarded.complete(max_tokens=2).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 50_000, b'{"prompt": ' * 5000,
     b'{"prompt": "x", "max_tokens": 1e400}', b'{"prompt": "x", "n": -1}',
     b'{"prompt": "x", "max_tokens": 1, "service_tier": ' + b"[" * 2000],
)  # fmt: skip
def test_junk_is_the_clients_mistake_and_ends_nothing(guarded: Server, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = guarded.http.post("/v1/completions", headers=headers, content=body)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()  # vLLM has a form of its own for what is nested too deep.
    answer = guarded.http.post(
        "/v1/completions", headers={**headers, "X-Llumnix-Priority": "urgent"}, content=body
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_class")
    assert {row["state"] for row in guarded.instances().values()} == {"serving"}


def test_status_prints_the_instances(guarded: Server) -> None:
    def status(*flags: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "llumnix", "status", "--url", guarded.url, *flags]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)

    refused = status()
    assert refused.returncode == 2
    assert "give --api-key KEY" in refused.stderr
    table = status("--api-key", "secret").stdout.splitlines()
    assert table[0].split() == [
        "INSTANCE", "STATE", "NODE", "PID", "DEVICES", "KV", "TOKENS", "RUNNING", "WAITING",
        "RESTARTS",
    ]  # fmt: skip
    assert [line.split()[:2] for line in table[1:]] == [["i0", "serving"]]
    body = json.loads(status("--api-key", "secret", "--json").stdout)
    (only,) = body["instances"]
    assert only["devices"] == ["cpu:auto"]
    assert only["kv_tokens_total"] is not None


def test_who_is_not_done_in_time_is_told_and_the_server_stops(guarded: Server) -> None:
    """And the class that it asked for was not granted to its key."""
    urgent = {**KEY, "x-llumnix-priority": "high"}
    finish: list[str | None] = []

    def long_stream() -> None:
        real_time()
        body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with httpx.stream(
            "POST", guarded.url + "/v1/completions", json=body, headers=urgent, timeout=60
        ) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    finish.append(json.loads(line[6:])["choices"][0]["finish_reason"])

    thread = threading.Thread(target=long_stream)
    thread.start()
    eventually(lambda: len(finish) > 5, 20)
    admin = {"Authorization": "Bearer root-secret"}
    (row,) = guarded.http.get("/llumnix/v1/requests", headers=admin).json()["requests"]
    assert row["priority"] == 0
    began = time.monotonic()
    guarded.signal(signal.SIGTERM)
    assert guarded.wait() == 0
    thread.join()
    assert 1 <= time.monotonic() - began < 15
    assert finish[-1] == "abort"
