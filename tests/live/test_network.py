"""What can be reached over a network: between hosts by our own processes, on one host nothing."""

import contextlib
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from llumnix.core.events import InstanceLost, RequestArrived
from llumnix.core.messages import CancelMigration, Reserve
from llumnix.core.types import EngineIndex, Epoch, InstanceId, MigrationId, RequestId
from llumnix.sockets import SocketKeys, connect
from llumnix.wire import LoadsAsked, Ping, encode
from support.server import Server, eventually
from support.streaming import first_difference, stream, stream_moved

from .conftest import FLAGS
from .test_elsewhere import _listens, ray_head

pytestmark = [pytest.mark.live, pytest.mark.slow]

__all__ = ["ray_head"]  # A fixture.

PATH = "/v1/completions"
PROMPT = "Every block of this prompt matters to what comes after it. " * 4
GREEDY = {"prompt": PROMPT, "max_tokens": 180, "temperature": 0, "ignore_eos": True}
SECRETS = ("hf-secret-of-the-environment", "hf-secret-of-the-command-line")


# -- several hosts


@pytest.mark.timeout(600)
def test_between_hosts_strangers_get_nothing_in_and_ray_is_told_no_secret(
    ray_head: str,
    tiny_model: Path,
    logs: Path,
) -> None:
    host, port = ray_head.split(":")
    eventually(lambda: _listens(host, int(port)), 60, "Ray is up")
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS, "--policy", "least-loaded",
        "--ray-address", ray_head, "--hf-token", SECRETS[1],
        log=logs / "strangers.log",
        HF_TOKEN=SECRETS[0],
        RAY_AUTH_MODE="disabled",
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    ).wait_until_serving()  # fmt: skip
    try:
        calm = stream(server, PATH, GREEDY)
        assert calm.error is None
        pids = {name: row["pid"] for name, row in server.instances().items()}
        ours = ray_actors(pids["i0"])
        assert len(ours) == 3
        # Of the controller, the frontend (two), two llumlets, and their workers' agents.
        ports = zmq_and_agents([server.process.pid, *ours]) - {server.port}
        assert len(ports) >= 7, ports
        with pestered(ports) as sent:
            moved = stream_moved(server, PATH, GREEDY, hops=6)
        assert sum(sent.values()) >= 100 * 7, sent
        assert moved.error is None
        assert first_difference(calm, moved) is None
        assert sum(h["outcome"] == "migrated" for h in moved.hops) >= 3, moved.hops
        rows = server.instances()
        assert {name: row["pid"] for name, row in rows.items()} == pids
        assert {(row["state"], row["restarts"]) for row in rows.values()} == {("serving", 0)}
        assert "does not answer" not in server.log
        told = jobs(ray_head) + ray_logs(pids["i0"])
        assert "llumnix serve" in told
        assert [secret for secret in SECRETS if secret in told] == []
    finally:
        assert server.stop() == 0


def ray_actors(beside: int) -> list[int]:
    """Processes of the Ray actors of ours that the same raylet started as this one."""
    raylet = psutil.Process(beside).parent()
    assert raylet is not None
    titles = {process.pid: " ".join(process.cmdline()) for process in raylet.children()}
    return [p for p, t in titles.items() if t.startswith(("ray::Controller", "ray::EngineActor"))]


def zmq_and_agents(pids: list[int]) -> set[int]:
    """TCP ports on which these processes listen, with those of Ray's own left out: of gRPC."""
    found = set()
    for pid in pids:
        actor = psutil.Process(pid)
        for process in [actor, *actor.children(recursive=True)]:
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN and not speaks_grpc(one.laddr.port):
                    found.add(one.laddr.port)
    return found


def speaks_grpc(port: int) -> bool:
    """gRPC's HTTP/2 begins with its settings; ZMQ and our agents with something else."""
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        try:
            return sock.recv(5, socket.MSG_WAITALL)[3:4] == b"\x04"
        except OSError:
            return False


@contextlib.contextmanager
def pestered(ports: set[int]) -> Iterator[dict[int, int]]:
    """While the block runs, a stranger without our keys sends all kinds of packets to each port."""
    sent = dict.fromkeys(ports, 0)

    def pester() -> None:
        with zmq.Context() as context:
            context.setsockopt(zmq.LINGER, 0)
            for number, (packet, kind, keys) in enumerate(
                itertools.product(packets(), KINDS, (None, SocketKeys.make()))
            ):
                for port in ports:
                    one = context.socket(kind)
                    if kind == zmq.DEALER:
                        one.setsockopt(zmq.IDENTITY, (number % 4).to_bytes(2, "little"))
                    connect(one, f"tcp://127.0.0.1:{port}", keys)
                    with contextlib.suppress(zmq.Again):
                        one.send(packet, zmq.NOBLOCK)
                    one.close(100)
                    sent[port] += 1
                    shout(port, len(packet).to_bytes(4, "big") + packet)
            context.destroy(100)

    thread = threading.Thread(target=pester)
    thread.start()
    try:
        yield sent
    finally:
        thread.join()


def shout(port: int, data: bytes) -> None:
    """Sends bytes as they are."""
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), 1) as plain,
    ):
        plain.sendall(data)


KINDS = (zmq.PUSH, zmq.DEALER, zmq.PAIR, zmq.PUB)


def packets() -> list[bytes]:
    """What would end, mislead or listen to a deployment, and nonsense."""
    move, request = MigrationId("m1"), RequestId("r1")
    reserve = Reserve(
        migration=move, request=request, source=EngineIndex(0), address="tcp://192.0.2.9:1",
        epoch=Epoch(1), body=b"\xc1", outputs=[], tokens=16, agents=["tcp:192.0.2.9:1"] * 3,
    )  # fmt: skip
    lost = InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(60000))
    arrived = RequestArrived(request=request, prompt_tokens=8, priority=0)
    ours = [reserve, lost, arrived, CancelMigration(migration=move, why=""), LoadsAsked(number=1)]
    odd = [b"ENGINE_CORE_DEAD", b"", b"\xc1", bytes(100), b"\x00", b"\x93\xc0\xc0\xc0", b"READY"]
    return [encode(m) for m in (*ours, Ping(number=1))] + odd


def jobs(address: str) -> str:
    """What Ray's control store says of all jobs."""
    code = (
        "import sys; from ray._raylet import GcsClient;"
        "print(GcsClient(address=sys.argv[1]).get_all_job_info("
        "skip_submission_job_info_field=True, skip_is_running_tasks_field=True))"
    )
    run = [sys.executable, "-c", code, address]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    got = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert got.returncode == 0, got.stderr
    return got.stdout


def ray_logs(actor: int) -> str:
    """All logs of the Ray session to which this process belongs."""
    folder = next(
        Path(f.path).parent
        for f in psutil.Process(actor).open_files()
        if "/logs/worker-" in f.path or "/logs/python-core-worker" in f.path
    )
    return "\n".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())


# -- one host, whose name has the address of its network

SET_UP = """
set -e
ip link set lo up
ip link add eth1 type veth peer name eth2
ip addr add 192.0.2.2/24 dev eth1
ip link set eth1 up
ip link set eth2 up
ip route add default via 192.0.2.1 dev eth1
printf '127.0.0.1 localhost\\n192.0.2.2 %s\\n' "$(hostname)" > "$0"
mount --bind "$0" /etc/hosts
exec "$@"
"""
APART = ["unshare", "--net", "--mount", "bash", "-c", SET_UP]


@pytest.mark.parametrize("ranks", [1, 2])
def test_on_one_host_all_of_it_listens_on_loopback_alone(
    tiny_model: Path, logs: Path, tmp_path: Path, ranks: int
) -> None:
    if shutil.which("ip") is None or shutil.which("ss") is None:
        pytest.skip("needs iproute2")
    apart = [*APART, str(tmp_path / "hosts")]
    named = [
        sys.executable,
        "-c",
        "import socket; print(socket.gethostbyname(socket.gethostname()))",
    ]
    tried = subprocess.run([*apart, *named], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"no network namespace can be made here: {tried.stderr.strip()[-200:]}")
    assert tried.stdout.strip() == "192.0.2.2"
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS,
        "--instances", "1", "--tensor-parallel-size", str(ranks),
        log=logs / f"apart-{ranks}.log",
        before=apart,
    ).wait_until_serving()  # fmt: skip
    inside = ["nsenter", "--target", str(server.process.pid), "--net"]
    try:
        got = subprocess.run(
            [*inside, "ss", "-ltnH"], capture_output=True, text=True, check=True
        ).stdout
        where = {re.split(r"\s+", line)[3].rpartition(":")[0] for line in got.splitlines()}
        assert where <= {"127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"}, got
        assert where
    finally:
        server.stop()
