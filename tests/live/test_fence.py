"""Engines that live and do nothing are ended and started again. Each test has its own server."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import Server, alive, descendants, eventually

from .conftest import FLAGS

pytestmark = pytest.mark.live

NOTICED_S = 2.0


@pytest.fixture
def pair(tiny_model: Path, logs: Path) -> Iterator[Server]:
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS, log=logs / "fence.log"
    ).wait_until_serving()
    yield server
    server.stop()
    print(server.log[-3000:])


@pytest.fixture
def two_workers(tiny_model: Path, logs: Path) -> Iterator[Server]:
    """One instance with two worker processes."""
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS,
        "--instances", "1", "--tensor-parallel-size", "2",
        log=logs / "workers.log",
    ).wait_until_serving()  # fmt: skip
    yield server
    server.stop()
    print(server.log[-3000:])


def fenced(server: Server, instance: str) -> bool:
    row = server.instances()[instance]
    return row["state"] == "restarting" and (row["why"] or "").startswith("fenced: ")


def of(title: str, pids: set[int]) -> list[int]:
    """Those of the processes whose title has this."""
    return [p for p in pids if title in Path(f"/proc/{p}/cmdline").read_text()]


def test_a_stopped_engine_is_replaced_though_the_controller_is_dead(pair: Server) -> None:
    server = pair
    victim = server.instances()["i1"]
    (controller,) = of("ray::Controller", server.descendants())
    os.kill(controller, signal.SIGSTOP)
    began_s = time.monotonic()
    os.kill(victim["pid"], signal.SIGSTOP)
    eventually(lambda: fenced(server, "i1"), NOTICED_S, "noticed")
    print(f"noticed within {time.monotonic() - began_s:.2f} s")
    assert server.instances()["i1"]["why"] == "fenced: its process is stopped"
    eventually(lambda: not alive(victim["pid"]), 5, "ended")
    assert server.complete().status_code == 200
    os.kill(controller, signal.SIGCONT)
    eventually(lambda: server.instances()["i1"]["state"] == "serving", 120, "comes back")
    back = server.instances()["i1"]
    assert (back["restarts"], back["engine_index"]) == (1, 2)
    assert back["pid"] != victim["pid"]
    assert "Instance i1 is fenced (its process is stopped)" in server.log
    assert {i["state"] for i in server.instances().values()} == {"serving"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "what"), [(signal.SIGSTOP, "is stopped"), (signal.SIGKILL, "is gone")]
)
def test_an_engine_with_a_worker_that_is_stopped_or_gone_is_replaced(
    two_workers: Server, number: signal.Signals, what: str
) -> None:
    server = two_workers
    engine = server.instances()["i0"]["pid"]
    workers = of("VLLM::Worker", descendants(engine))
    assert len(workers) == 2
    began_s = time.monotonic()
    os.kill(workers[1], number)
    eventually(lambda: fenced(server, "i0"), NOTICED_S, "noticed")
    print(f"noticed within {time.monotonic() - began_s:.2f} s")
    assert server.instances()["i0"]["why"] == f"fenced: its worker process {workers[1]} {what}"
    eventually(lambda: not any(map(alive, (engine, *workers))), 5, "all of it is ended")
    eventually(lambda: server.instances()["i0"]["state"] == "serving", 120, "comes back")
    assert server.complete().status_code == 200
