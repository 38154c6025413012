"""Other ways to run: a pooling model, a Ray cluster that was there before."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.server import Server, alive, descendants, eventually, free_port, real_time
from support.tiny_model import WIDTH

from .conftest import FLAGS

pytestmark = pytest.mark.live


@pytest.mark.slow
def test_an_embedding_model_outlives_the_death_of_an_instance(tiny_model: Path, logs: Path) -> None:
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS,
        "--runner", "pooling", "--convert", "embed",
        log=logs / "embed.log",
    ).wait_until_serving()  # fmt: skip
    body = {"model": "tiny", "input": "hello"}
    try:
        first = server.http.post("/v1/embeddings", json=body)
        assert len(first.json()["data"][0]["embedding"]) == WIDTH
        # Held still, an instance keeps its requests until it is killed, or fenced within a second.
        # So the clients are ready before, and so many that both instances get some.
        victim = server.instances()["i0"]["pid"]
        clients = [httpx.Client(base_url=server.url, timeout=60) for _ in range(8)]
        assert {c.get("/health").status_code for c in clients} == {200}
        answers: list[httpx.Response] = []

        def ask(client: httpx.Client) -> None:
            real_time()  # Else it may be left waiting with the lock that this thread needs.
            answers.append(client.post("/v1/embeddings", json=body))

        threads = [threading.Thread(target=ask, args=(one,)) for one in clients]
        os.kill(victim, signal.SIGSTOP)
        for thread in threads:
            thread.start()
        eventually(lambda: any(r["instance"] == "i0" for r in server.requests()), 10)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert {a.status_code for a in answers} == {200}
        assert server.http.post("/v1/embeddings", json=body).status_code == 200
        eventually(lambda: server.instances()["i0"]["state"] == "serving", 120)
    finally:
        assert server.stop() == 0


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[str]:
    """A Ray cluster of this machine that somebody else started."""
    port = free_port()
    environment = {
        **os.environ,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    head = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
            "--node-ip-address", "127.0.0.1", "--port", str(port), "--include-dashboard", "false",
            "--object-store-memory", "80000000",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    yield f"127.0.0.1:{port}"
    for pid in [*descendants(head.pid), head.pid]:
        os.kill(pid, signal.SIGKILL)
    head.wait(30)


@pytest.mark.slow
def test_a_running_ray_cluster_is_joined_and_left_as_it_was(
    ray_head: str, tiny_model: Path, logs: Path
) -> None:
    host, port = ray_head.split(":")
    eventually(lambda: _listens(host, int(port)), 60, "Ray is up")
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS,
        "--instances", "1", "--ray-address", ray_head,
        log=logs / "joined.log",
        RAY_AUTH_MODE="disabled",
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    ).wait_until_serving()  # fmt: skip
    pid = server.instances()["i0"]["pid"]
    assert f"warning: Ray at {ray_head} asks for no token" in server.log
    assert server.complete().status_code == 200
    assert server.stop() == 0
    eventually(lambda: not alive(pid), 10, "its instance is gone")
    assert _listens(host, int(port))


def _listens(host: str, port: int) -> bool:
    import socket

    try:
        with socket.create_connection((host, port), 1):
            return True
    except OSError:
        return False
