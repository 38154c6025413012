"""What an orchestrator sees of a server: from its start, over a hung engine, to its stop."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.server import START_TIMEOUT_S, Server, eventually, real_time

from .conftest import FLAGS

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]

ANSWER_S = 1.0
NOTICED_S = 3.0
LAME_DUCK_S = 5
LONG = {"prompt": "x", "max_tokens": 1900, "ignore_eos": True, "stream": True}


class Prober(threading.Thread):
    """Asks the server both probes from its first second on, each time over a connection of its
    own, as an orchestrator does."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server
        self._over = threading.Event()
        self.lives: list[tuple[float, int]] = []  # when it was answered, and what
        self.readies: list[tuple[int, dict[str, Any]]] = []
        self.slowest_s = 0.0
        self.failed: list[str] = []

    def run(self) -> None:
        real_time()
        while not self._over.is_set():
            try:
                self._ask()
            except httpx.TransportError as error:
                if self.lives:  # Before, nobody listens.
                    self.failed.append(repr(error))
            time.sleep(0.05)

    def _ask(self) -> None:
        began_s = time.monotonic()
        live = httpx.get(self._server.url + "/live", timeout=10)
        ended_s = time.monotonic()
        self.slowest_s = max(self.slowest_s, ended_s - began_s)
        self.lives.append((ended_s, live.status_code))
        ready = httpx.get(self._server.url + "/ready?min=2", timeout=10)
        self.readies.append((ready.status_code, ready.json()))

    def end(self) -> None:
        self._over.set()
        self.join()


@pytest.fixture(scope="module", params=[1, 2], ids=["one frontend", "two frontends"])
def probed(
    request: pytest.FixtureRequest, tiny_model: Path, logs: Path
) -> Iterator[tuple[Server, Prober, float]]:
    """A server that is probed since its start, and when it was seen to load vLLM."""
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS,
        "--api-server-count", str(request.param), "--lame-duck", str(LAME_DUCK_S),
        "--shutdown-timeout", "3", "--api-key", "secret",
        log=logs / f"probes{request.param}.log",
    )  # fmt: skip
    server.http.headers["Authorization"] = "Bearer secret"
    prober = Prober(server)
    prober.start()
    try:
        eventually(lambda: "loading vLLM" in server.log, START_TIMEOUT_S, "it begins")
        loads_s = time.monotonic()
        server.wait_until_serving()
        eventually(lambda: prober.readies and prober.readies[-1][0] == 200, 20, "it is ready")
        prober.end()
        yield server, prober, loads_s
    finally:
        prober.end()
        if server.process.poll() is None:
            server.stop()
        print(server.log[-3000:])


def ready(server: Server, least: int) -> tuple[int, dict[str, Any]]:
    answer = httpx.get(f"{server.url}/ready?min={least}", timeout=10)
    return answer.status_code, answer.json()


def test_the_port_answers_while_it_loads_and_says_when_it_is_ready(
    probed: tuple[Server, Prober, float],
) -> None:
    _, prober, loads_s = probed
    first_s = prober.lives[0][0]
    print(f"first answer {first_s - loads_s:+.2f} s from the load, slowest {prober.slowest_s:.2f}")
    assert first_s - loads_s < ANSWER_S
    assert prober.failed == []
    assert {status for _, status in prober.lives} == {200}
    assert len(prober.lives) > 50
    statuses = [status for status, _ in prober.readies]
    first = statuses.index(200)
    assert statuses == [503] * first + [200] * (len(statuses) - first)
    loading, last = prober.readies[:first], prober.readies[-1]
    reasons = [body["reason"] for _, body in loading]
    assert set(reasons) <= {"loading", "too_few", "no_answer"}
    assert reasons.count("loading") > 0.8 * len(reasons)
    assert reasons[0] == "loading"
    steps = [row["step"] for _, body in loading for row in body["instances"]]
    assert {"placing", "loading", "up"} >= set(steps)
    assert "loading" in steps
    assert last[1]["serving"] == 2
    assert [row["state"] for row in last[1]["instances"]] == ["serving", "serving"]


def test_a_second_server_at_the_port_is_refused_at_once_and_harms_nobody(
    probed: tuple[Server, Prober, float], tiny_model: Path
) -> None:
    server, *_ = probed
    words = [sys.executable, "-m", "llumnix", "serve", str(tiny_model), "--port", str(server.port)]
    began_s = time.monotonic()
    second = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    print(f"refused after {time.monotonic() - began_s:.2f} s")
    assert second.returncode == 2
    assert f"cannot listen on 127.0.0.1:{server.port}" in second.stderr
    assert "loading vLLM" not in second.stderr
    assert ready(server, 2)[0] == 200


def test_a_stopped_engine_is_seen_and_the_process_lives(
    probed: tuple[Server, Prober, float],
) -> None:
    server, *_ = probed
    victim = server.instances()["i1"]["pid"]
    lives: list[int] = []
    began_s = time.monotonic()
    os.kill(victim, signal.SIGSTOP)

    def noticed() -> bool:
        lives.append(httpx.get(server.url + "/live", timeout=10).status_code)
        return ready(server, 2)[0] == 503

    eventually(noticed, NOTICED_S, "noticed")
    print(f"noticed after {time.monotonic() - began_s:.2f} s")
    status, body = ready(server, 2)
    assert (status, body["reason"] in ("stalled", "too_few"), body["serving"]) == (503, True, 1)
    assert ready(server, 1)[0] == 200
    assert httpx.get(server.url + "/health", timeout=10).status_code == 200
    assert server.complete(model="tiny").status_code == 200
    eventually(lambda: ready(server, 2)[0] == 200, 150, "comes back")
    assert set(lives) == {200}


def test_a_lame_duck_takes_requests_until_nobody_sends_any_and_then_stops(
    probed: tuple[Server, Prober, float],
) -> None:
    server, *_ = probed
    end: list[str] = []

    def long_stream() -> None:
        headers = server.http.headers
        with httpx.stream(
            "POST", server.url + "/v1/completions", json=LONG, headers=headers, timeout=60
        ) as answer:
            end.extend(answer.iter_lines())

    stream = threading.Thread(target=long_stream)
    stream.start()
    eventually(lambda: server.requests(), 20, "it streams")
    began_s = time.monotonic()
    server.signal()
    _, body = eventually(lambda: (r := ready(server, 1))[0] == 503 and r, 2, "not ready")
    assert (body["reason"], body["phase"]) == ("stopping", "stopping")
    assert server.complete(model="tiny").status_code == 200
    assert httpx.get(server.url + "/health", timeout=10).status_code == 200
    assert httpx.get(server.url + "/live", timeout=10).status_code == 200
    assert time.monotonic() - began_s < LAME_DUCK_S
    refused: list[httpx.Response] = []

    def is_refused() -> bool:
        with contextlib.suppress(httpx.TransportError):
            refused.append(server.complete(model="tiny", max_tokens=1))
        return bool(refused) and refused[-1].status_code == 503

    eventually(is_refused, LAME_DUCK_S + 2, "refused")
    assert time.monotonic() - began_s > LAME_DUCK_S
    assert int(refused[-1].headers["retry-after"]) > 0
    assert server.wait() == 0
    stream.join()
    assert len(end) > 5
    with socket.socket() as one, pytest.raises(ConnectionRefusedError):
        one.connect(("127.0.0.1", server.port))
