"""The head's host dies, and with it all that llumnix is."""

import sys
import time
from pathlib import Path

import pytest

from support.hosts import Host, Network, ServerOnHosts, needs_hosts
from support.server import alive, eventually, title

from .conftest import FLAGS
from .streams import Streams

pytestmark = [
    needs_hosts, pytest.mark.hosts, pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(600)
]  # fmt: skip

BODIES = [{"prompt": f"stream {i}", "max_tokens": 1500, "ignore_eos": True} for i in range(2)]
ENGINES_END_S = 20.0  # 10 s unasked, and a look a second
RAY_ENDS_S = 240.0
"""Its processes wait for their head to come back: 122 s were measured."""


def left(host: Host) -> list[str]:
    """What runs on it, but for what makes it a host."""
    titles = [title(pid) for pid in host.processes("")]
    return [t for t in titles if t and not t.startswith(("sh -ec", "sleep"))]


def test_with_the_head_all_ends_and_the_other_host_joins_a_new_one(
    net: Network, server: ServerOnHosts, tiny_model: Path, tmp_path: Path
) -> None:
    head, there = net.hosts
    engines = there.processes("ray::EngineActor")
    assert engines
    with Streams(server, BODIES) as streams:
        began_s = time.monotonic()
        head.kill()
        assert server.wait(10) != 0
        assert all(seen.error for seen in streams.ended(20)), "clients hear of it"
    eventually(lambda: not any(map(alive, engines)), ENGINES_END_S, "engines end by themselves")
    engines_s = time.monotonic() - began_s
    eventually(
        lambda: not there.processes("raylet") + there.processes("ray::"), RAY_ENDS_S, "Ray ends"
    )
    print(f"engines ended after {engines_s:.1f} s, Ray after {time.monotonic() - began_s:.1f} s")
    there.run(sys.executable, "-m", "ray.scripts.scripts", "stop")  # It leaves its log monitor.
    assert left(there) == []
    assert there.run("ls", "/dev/shm") == ""
    head.start({h.name: h.address for h in net.hosts})
    again = ServerOnHosts(net, tiny_model, *FLAGS, log=tmp_path / "again.log")
    try:
        again.wait_until_serving()
        assert {again.host_of(row) for row in again.instances().values()} == set(net.hosts)
        assert again.complete().status_code == 200
        again.stop()
    finally:
        again.kill()
