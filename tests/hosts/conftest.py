from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hosts import Network, ServerOnHosts, network
from support.server import real_time

FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", "33554432", "--max-num-seqs", "16")


@pytest.fixture(scope="session", autouse=True)
def first_in_line() -> None:
    real_time()


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Two hosts."""
    with network(tmp_path_factory.mktemp("hosts")) as net:
        yield net


@pytest.fixture(scope="module")
def server(net: Network, tiny_model: Path) -> Iterator[ServerOnHosts]:
    """An instance on each of the two hosts."""
    log = net.hosts[0].folder / "serve.log"
    server = ServerOnHosts(net, tiny_model, *FLAGS, log=log)
    try:
        server.wait_until_serving()
        places = {server.host_of(row).name for row in server.instances().values()}
        assert len(places) == 2, "Ray has put both on one host"
        yield server
        server.stop()
    finally:
        server.kill()
        print(server.log[-6000:])
