"""The network between the hosts of these tests: it must do what they ask of it."""

import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from support.hosts import Network, needs_hosts, network

pytestmark = [needs_hosts, pytest.mark.hosts, pytest.mark.slow]

ECHO = """
import socket, sys
server = socket.create_server(("", 7000))
print("up", flush=True)
connection, _ = server.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := connection.recv(65536):
    connection.sendall(data)
"""


@pytest.fixture
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with network(tmp_path_factory.mktemp("hosts")) as net:
        yield net


class Echo:
    """A connection to the second host, which sends back what it gets."""

    def __init__(self, net: Network) -> None:
        there = net.hosts[1]
        self.process = subprocess.Popen(
            [*there.inside, sys.executable, "-c", ECHO], stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"up\n"
        self.socket = socket.create_connection((there.address, 7000), 10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def trip_s(self, size: int = 1) -> float:
        began_s = time.monotonic()
        self.socket.sendall(b"x" * size)
        left = size
        while left:
            left -= len(self.socket.recv(65536))
        return time.monotonic() - began_s

    def trips_s(self, count: int) -> list[float]:
        return [self.trip_s() for _ in range(count)]

    def close(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def echo(net: Network) -> Iterator[Echo]:
    echo = Echo(net)
    yield echo
    echo.close()


def test_hosts_reach_each_other_and_nothing_else(net: Network, echo: Echo) -> None:
    assert statistics.median(echo.trips_s(50)) < 0.01
    assert net.hosts[0].run("hostname").strip() == net.hosts[0].name
    assert socket.gethostname() not in (h.name for h in net.hosts)
    with pytest.raises(OSError, match="unreachable"):
        socket.create_connection(("198.51.100.1", 80), 1)


def test_a_delay_is_kept_both_ways(net: Network, echo: Echo) -> None:
    net.both_ways(*net.hosts, delay_s=0.02)
    assert 0.04 <= statistics.median(echo.trips_s(10)) < 0.08
    net.both_ways(*net.hosts)
    assert statistics.median(echo.trips_s(10)) < 0.01


def test_a_cut_way_lets_nothing_through_until_it_is_mended(net: Network, echo: Echo) -> None:
    net.way(*net.hosts, cut=True)
    echo.socket.settimeout(0.5)
    with pytest.raises(TimeoutError):
        echo.trip_s()
    net.way(*net.hosts)
    echo.socket.settimeout(10)
    assert echo.socket.recv(1) == b"x", "TCP sends it again"


def test_what_is_lost_comes_late(net: Network, echo: Echo) -> None:
    net.both_ways(*net.hosts, loss=0.2)
    trips_s = echo.trips_s(30)
    assert max(trips_s) > 0.1
    assert min(trips_s) < 0.02


def test_a_slow_way_takes_its_time(net: Network, echo: Echo) -> None:
    echo.trip_s(100_000)
    net.way(*net.hosts, bytes_per_s=500_000)
    assert 0.2 < echo.trip_s(200_000) < 3
    net.way(*net.hosts)


def test_nothing_of_a_host_is_left(tmp_path_factory: pytest.TempPathFactory) -> None:
    with network(tmp_path_factory.mktemp("hosts"), count=1) as net:
        (host,) = net.hosts
        sleeper = subprocess.Popen([*host.inside, "sleep", "1000"])
        assert host.processes("sleep")
    assert sleeper.wait(10) != 0
    assert (
        host.name
        not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    )
