import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import Server, real_time
from support.tiny_model import make_lora

# Small enough for tests, and the same numbers on every run.
FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", "33554432", "--max-num-seqs", "16")
FILES_THAT_SHARE = ("test_api.py", "test_migration.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that share a server run one after the other: a server takes a minute to start."""
    here = Path(__file__).parent
    live = [i for i, item in enumerate(items) if item.path.parent == here]
    order = sorted((items[i] for i in live), key=lambda i: i.path.name not in FILES_THAT_SHARE)
    for at, item in zip(live, order, strict=True):
        items[at] = item


@pytest.fixture(scope="session", autouse=True)
def first_in_line() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # Else the others' tests would go last.
        real_time()


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_lora(tmp_path_factory.mktemp("lora") / "adapter", tiny_model)


class OneServer:
    """At most one shared server at a time: two engines fill this machine."""

    def __init__(self) -> None:
        self._kind: str | None = None
        self._server: Server | None = None

    def of(self, kind: str, model: Path, log: Path, *flags: str, **env: str) -> Server:
        """The running server of that kind; what ran before it is stopped."""
        if self._kind != kind:
            self.stop()
            server = Server(str(model), "--served-model-name", "tiny", *flags, log=log, **env)
            self._server = server.wait_until_serving()
            self._kind = kind
        assert self._server is not None
        return self._server

    def stop(self) -> None:
        """Stops it; it must have stood all that it was put through."""
        server, self._server, self._kind = self._server, None, None
        if server is not None:
            restarts = [i["restarts"] for i in server.instances().values()]
            assert server.stop() == 0
            print(server.log[-3000:])
            assert restarts == [0, 0]


@pytest.fixture(scope="session")
def one_server() -> Iterator[OneServer]:
    one = OneServer()
    yield one
    one.stop()


@pytest.fixture(scope="module", autouse=True)
def room_for_others(request: pytest.FixtureRequest, one_server: OneServer) -> None:
    """A file with servers of its own finds no shared one running."""
    if request.path.name not in FILES_THAT_SHARE:
        one_server.stop()


@pytest.fixture
def server(
    one_server: OneServer, tiny_model: Path, logs: Path, lora: Path, tmp_path: Path
) -> Server:
    """Two instances of the tiny model, shared by tests, which leave them as they were. Only tests
    move requests there."""
    still = tmp_path / "still.yaml"
    still.write_text("migration: {balance: false}\n")
    return one_server.of(
        "main", tiny_model, logs / "main.log", *FLAGS,
        "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapter={lora}",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        "--scheduler-config", str(still),
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
        VLLM_SERVER_DEV_MODE="1",
    )  # fmt: skip
