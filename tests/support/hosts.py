"""Several hosts on this machine: namespaces, with a network of their own between them.

Each host has its own network, processes, shared memory, host name and folder for Ray; files are
this machine's. Nothing outside changes, and the end of a host's first process ends all of it.
Needs root, `ip`, `unshare`, `nsenter` and /dev/net/tun.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import relay
from support.server import Server

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PACE = "0,6,0,0"
"""A step takes 6 ms for each of its requests (benchmarks/paced_worker.py). Else two engines would
take all of this machine's two cores, and the other host's, which computes on when it is cut off,
would slow ours down."""
NETWORK = "192.0.2."  # for documentation: nobody's
RAY_PORT = 6379
TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname")
INIT = """
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
mkdir -p {folder}/ray /tmp/ray
mount --bind {folder}/ray /tmp/ray
hostname {name}
mount --bind {folder}/hosts /etc/hosts
echo $$ > {folder}/up
while [ -e /sys/class/net/eth0 ]; do sleep 1; done
"""
"""The shell buries orphans, as a host's first process must: else Ray takes a raylet that has ended
for one that lives. It ends with the network, so that nothing is left of a run that was killed."""


def missing() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun here"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"not here: {', '.join(absent)}" if absent else None


needs_hosts = pytest.mark.skipif(missing() is not None, reason=str(missing()))


class Host:
    """One of them."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name = name
        self.address = address
        self.folder = folder
        self._init: subprocess.Popen[bytes] | None = None

    def start(self, names: dict[str, str]) -> None:
        """`names`: all hosts' addresses."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{a} {n}" for n, a in names.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        up = self.folder / "up"
        up.unlink(missing_ok=True)
        script = INIT.format(folder=self.folder, name=self.name)
        unshare = "unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc sh -ec"
        self._init = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *unshare.split(), script],
            stderr=subprocess.DEVNULL,  # unshare complains as its child is killed.
            start_new_session=True,
        )
        deadline_s = time.monotonic() + 10
        while not (up.exists() and up.read_text().strip()):
            assert time.monotonic() < deadline_s, f"host {self.name} does not come up"
            time.sleep(0.02)

    @property
    def inside(self) -> list[str]:
        """The command that runs another on this host."""
        assert self._init is not None
        (first,) = _children(self._init.pid)
        return ["nsenter", "-t", str(first), "-m", "-u", "-i", "-n", "-p", "--"]

    def run(self, *words: str, timeout_s: float = 60, **env: str) -> str:
        """Runs a command here; its output."""
        done = subprocess.run(
            [*self.inside, *words],
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def processes(self, title: str) -> list[int]:
        """Ids, as this machine knows them, of its processes with this in their command lines."""
        assert self._init is not None
        found = []
        for pid in _descendants(self._init.pid):
            with contextlib.suppress(OSError):
                if title.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def kill(self) -> None:
        """Ends all of it at once, as a power cut would."""
        if self._init is not None and self._init.poll() is None:
            for pid in _children(self._init.pid):
                os.kill(pid, signal.SIGKILL)
            self._init.wait(10)


class Network:
    """The hosts, and how the ways between them are."""

    def __init__(self, folder: Path, count: int) -> None:
        # A device's and a namespace's name is short.
        names = [f"h{os.getpid()}{letter}" for letter in "abcdefgh"[:count]]
        self.hosts = [Host(n, f"{NETWORK}{i + 1}", folder / n) for i, n in enumerate(names)]
        self._relay: subprocess.Popen[str] | None = None

    def start(self) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "netns", "add", host.name], check=True)
        self._relay = subprocess.Popen(
            [sys.executable, relay.__file__, *(f"{h.name}={h.address}" for h in self.hosts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._answered()
        for host in self.hosts:
            host.start({h.name: h.address for h in self.hosts})

    def way(self, source: Host, destination: Host, **how: Any) -> None:
        """How packets go from one to the other from now on (support/relay.py); as at first with
        nothing given."""
        assert self._relay is not None
        assert self._relay.stdin is not None
        line = {"from": source.name, "to": destination.name, **how}
        self._relay.stdin.write(json.dumps(line) + "\n")
        self._relay.stdin.flush()
        self._answered()

    def both_ways(self, one: Host, other: Host, **how: Any) -> None:
        self.way(one, other, **how)
        self.way(other, one, **how)

    def _answered(self) -> None:
        assert self._relay is not None
        assert self._relay.stdout is not None
        assert self._relay.stdout.readline() == "ok\n"

    def close(self) -> None:
        for host in self.hosts:
            host.kill()
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait(10)
        for host in self.hosts:
            subprocess.run(["ip", "netns", "del", host.name], check=False)


@contextlib.contextmanager
def network(folder: Path, count: int = 2) -> Iterator[Network]:
    """Hosts that are gone afterwards in any case. The calling thread, and what it starts, is in the
    first one's network meanwhile: its loopback is that host's."""
    net = Network(folder, count)
    try:
        net.start()
        with relay.inside(net.hosts[0].name):
            yield net
    finally:
        net.close()


class ServerOnHosts(Server):
    """`llumnix serve` on the first host, over a Ray cluster of all."""

    def __init__(self, net: Network, model: Path, *flags: str, log: Path, **env: str) -> None:
        self.net = net
        token = net.hosts[0].folder / "token"
        token.write_text("a-token-of-the-tests-0123456789abcdef")
        self.settings = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
            "LLUMNIX_PACE": PACE,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(BENCHMARKS), os.getenv("PYTHONPATH")])),
            **env,
        }
        for host in net.hosts:
            self.join(host)
        head = net.hosts[0]
        super().__init__(
            str(model), "--served-model-name", "tiny", *flags,
            "--worker-cls", "paced_worker.PacedWorker",
            "--ray-address", f"{head.address}:{RAY_PORT}",
            log=log, before=head.inside, **self.settings,
        )  # fmt: skip

    def join(self, host: Host) -> None:
        """Starts Ray on it."""
        head = self.net.hosts[0]
        how = ["--head", "--port", str(RAY_PORT), "--include-dashboard=false"]
        if host is not head:
            how = ["--address", f"{head.address}:{RAY_PORT}"]
        host.run(
            sys.executable, "-m", "ray.scripts.scripts", "start", *how,
            "--node-ip-address", host.address, "--num-cpus", "2",
            "--object-store-memory", str(80 * 2**20), "--disable-usage-stats",
            **self.settings,
        )  # fmt: skip

    def signal(self, number: int = signal.SIGTERM, *, group: bool = True) -> None:
        """`nsenter` passes none on, so it is the group's."""
        super().signal(number, group=True)

    def host_of(self, row: dict[str, Any]) -> Host:
        """Where an instance runs."""
        (host,) = [h for h in self.net.hosts if h.address in row["node"] or h.name in row["node"]]
        return host


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def _descendants(pid: int) -> list[int]:
    found = _children(pid)
    for child in found:
        found += _children(child)
    return found
