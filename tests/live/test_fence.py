"""Engines that live and do nothing are ended and started again. Each test has its own server."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import Server, alive, descendants, eventually, unused_memory
from support.streaming import Background, Recorded, stream

from .conftest import FLAGS

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]

NOTICED_S = 2.0
BLAMED = "a request may have caused that"


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """No file in shared memory outlives its processes."""
    unused = unused_memory()
    yield
    eventually(lambda: unused_memory() <= unused, 10, "no shared memory")


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
    (controller,) = server.controllers()
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
    assert BLAMED not in server.log
    # A crash is blamed on a request, and a kill is not.
    for number in (signal.SIGKILL, signal.SIGSEGV):
        os.kill(server.instances()["i0"]["pid"], number)
        eventually(lambda: server.instances()["i0"]["state"] == "restarting", NOTICED_S)
        eventually(lambda: server.instances()["i0"]["state"] == "serving", 120, "comes back")
        assert (BLAMED in server.log) is (number == signal.SIGSEGV)


FREEZER = Path("/sys/fs/cgroup/freezer")


@pytest.fixture
def freezer() -> Iterator[Path]:
    """A group of processes that can be frozen, as a container's is: none of them is stopped, none
    runs, and a kill waits until they are thawed."""
    group = FREEZER / f"llumnix-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no freezer of cgroups here, or not root")
    yield group
    (group / "freezer.state").write_text("THAWED")
    eventually(lambda: not (group / "cgroup.procs").read_text(), 10, "its processes have ended")
    group.rmdir()


def test_an_engine_that_is_silent_and_not_stopped_is_replaced_and_its_streams_go_on(
    pair: Server, freezer: Path
) -> None:
    victim = pair.instances()["i1"]

    def one(thread: int, number: int) -> Recorded:
        body = {"prompt": f"{thread} {number}", "max_tokens": 400, "ignore_eos": True}
        return stream(pair, "/v1/completions", {**body, "return_token_ids": True})

    with Background(4, one).running() as load:
        eventually(lambda: pair.instances()["i1"]["running"], 30, "it has requests")
        for pid in (victim["pid"], *descendants(victim["pid"])):
            (freezer / "cgroup.procs").write_text(str(pid))
        began_s = time.monotonic()
        (freezer / "freezer.state").write_text("FROZEN")
        eventually(lambda: fenced(pair, "i1"), 20, "noticed")
        took_s = time.monotonic() - began_s
        assert pair.instances()["i1"]["why"] == "fenced: its process reports nothing"
        (freezer / "freezer.state").write_text("THAWED")
        eventually(lambda: pair.instances()["i1"]["state"] == "serving", 120, "comes back")
    print(f"noticed after {took_s:.2f} s")
    assert took_s < 10  # Five seconds, and the question whether it answers.
    assert [s.error for s in load.done] == [None] * len(load.done)
    assert {len(s.tokens()) for s in load.done} == {400}
    assert BLAMED not in pair.log


@pytest.mark.parametrize(
    ("number", "what", "blamed"),
    [
        (signal.SIGSTOP, "is stopped", False),
        (signal.SIGKILL, "is gone", False),
        (signal.SIGSEGV, "is gone", True),
    ],
)
def test_an_engine_with_a_worker_that_is_stopped_or_gone_is_replaced(
    two_workers: Server, number: signal.Signals, what: str, blamed: bool
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
    assert (BLAMED in server.log) is blamed
    eventually(lambda: not any(map(alive, (engine, *workers))), 5, "all of it is ended")
    eventually(lambda: server.instances()["i0"]["state"] == "serving", 120, "comes back")
    assert server.complete().status_code == 200


NODES = """
import time
from ray.cluster_utils import Cluster
kept = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=kept)
node = cluster.add_node(**kept)
print(cluster.address, node.all_processes["raylet"][0].process.pid, flush=True)
time.sleep(3600)
"""
"""A cluster of two nodes, both on this machine; it tells its address and the second one's raylet.
`ray start` makes such a one only if it may listen on all addresses."""


@pytest.fixture
def two_nodes(tiny_model: Path, logs: Path) -> Iterator[tuple[Server, int]]:
    """Two instances on two nodes, and the process under which all is that runs on the second."""
    settings = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    nodes = subprocess.Popen(
        [sys.executable, "-c", NODES],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert nodes.stdout is not None
    try:
        address, raylet = nodes.stdout.readline().split()
        server = Server(
            str(tiny_model), "--served-model-name", "tiny", *FLAGS, "--ray-address", address,
            log=logs / "nodes.log", **settings,
        ).wait_until_serving()  # fmt: skip
        try:
            yield server, int(raylet)
        finally:
            for pid in family(int(raylet)):
                os.kill(pid, signal.SIGCONT)
            server.stop()
            print(server.log[-3000:])
    finally:
        end_all(family(nodes.pid))
        nodes.wait(30)


def family(pid: int) -> set[int]:
    """The process and all below it."""
    return {p for p in (pid, *descendants(pid)) if alive(p)}


def end_all(pids: set[int]) -> None:
    """Kills them, and waits until they have let go of their memory."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(map(alive, pids)), 20, "they have ended")


@pytest.mark.parametrize(
    ("whole", "why"),
    [(False, "fenced: its process is stopped"), (True, "fenced: its host does not answer")],
)
def test_an_engine_on_another_node_is_fenced_and_so_is_a_node_that_falls_silent(
    two_nodes: tuple[Server, int], whole: bool, why: str
) -> None:
    server, raylet = two_nodes
    there = family(raylet)
    victims = [i for i in server.instances().values() if i["pid"] in there]
    if not victims:
        pytest.skip("Ray has put all on the first node")
    victim = victims[0]
    name = victim["id"]
    eventually(lambda: of("ray::HostAgent", family(raylet)), 30, "it is watched")
    time.sleep(2)
    began_s = time.monotonic()
    for pid in family(raylet) if whole else [victim["pid"]]:
        os.kill(pid, signal.SIGSTOP)
    eventually(lambda: fenced(server, name), 2 * NOTICED_S, "noticed")
    print(f"noticed within {time.monotonic() - began_s:.2f} s")
    assert server.instances()[name]["why"] == why
    if whole:
        assert all(fenced(server, v["id"]) for v in victims)
        unused = unused_memory()
        end_all(family(raylet))  # Python's resource trackers too.
        eventually(lambda: unused_memory() <= unused, 5, "the living server sweeps")
    else:
        assert server.complete().status_code == 200
        eventually(lambda: not alive(victim["pid"]), 5, "ended there")
        eventually(lambda: server.instances()[name]["state"] == "serving", 120, "comes back")
