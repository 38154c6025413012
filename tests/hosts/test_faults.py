"""Faults of the network between two hosts, and of a host: no client notices."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from support.hosts import Network, ServerOnHosts, needs_hosts
from support.server import eventually
from support.streaming import Recorded, first_difference, stream

pytestmark = [needs_hosts, pytest.mark.hosts, pytest.mark.live, pytest.mark.timeout(600)]

COMPLETIONS = "/v1/completions"
KINDS: list[dict[str, Any]] = [
    {"prompt": f"stream {i} " * (1 + 8 * (i % 3)), "max_tokens": 400, "temperature": 0.3,
     "seed": i, "ignore_eos": True, "return_token_ids": True}
    for i in range(6)
]  # fmt: skip


@pytest.fixture(scope="module")
def calm(server: ServerOnHosts) -> list[Recorded]:
    """The same streams with nothing going on."""
    seen = [stream(server, COMPLETIONS, body) for body in KINDS]
    assert [s.error for s in seen] == [None] * len(KINDS)
    return seen


class Streams:
    """All of `KINDS` at once; the block begins once each has some tokens."""

    def __init__(self, server: ServerOnHosts) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(len(KINDS))
        self._begun = [threading.Event() for _ in KINDS]
        self._futures: list[Future[Recorded]] = []

    def __enter__(self) -> "Streams":
        for body, begun in zip(KINDS, self._begun, strict=True):

            def heard(count: int, begun: threading.Event = begun) -> None:
                if count > 20:
                    begun.set()

            arguments = (self._server, COMPLETIONS, body)
            self._futures.append(self._pool.submit(stream, *arguments, on_chunk=heard))
        for begun in self._begun:
            assert begun.wait(60)
        return self

    def ended(self) -> list[Recorded]:
        return [future.result(120) for future in self._futures]

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def same(calm: list[Recorded], seen: list[Recorded]) -> None:
    assert [s.error for s in seen] == [None] * len(seen)
    assert [first_difference(a, b) for a, b in zip(calm, seen, strict=True)] == [None] * len(seen)


def test_a_link_that_is_down_for_a_second_ends_nothing(
    net: Network, server: ServerOnHosts, calm: list[Recorded]
) -> None:
    before = {i: row["pid"] for i, row in server.instances().items()}
    with Streams(server) as streams:
        net.both_ways(*net.hosts, cut=True)
        time.sleep(1)
        net.both_ways(*net.hosts)
        same(calm, streams.ended())
    assert {i: row["pid"] for i, row in server.instances().items()} == before


def test_a_host_that_is_lost(net: Network, server: ServerOnHosts, calm: list[Recorded]) -> None:
    lost = next(r for r in server.instances().values() if server.host_of(r) is net.hosts[1])
    with Streams(server) as streams:
        began_s = time.monotonic()
        net.hosts[1].kill()
        eventually(lambda: server.instances()[lost["id"]]["state"] != "serving", 10, "noticed")
        print(f"noticed after {time.monotonic() - began_s:.2f} s")
        same(calm, streams.ended())
