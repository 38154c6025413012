from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import Server, real_time
from support.tiny_model import make_lora

# Small enough for tests, and the same numbers on every run.
FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", "33554432", "--max-num-seqs", "16")


@pytest.fixture(scope="session", autouse=True)
def first_in_line() -> None:
    real_time()


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_lora(tmp_path_factory.mktemp("lora") / "adapter", tiny_model)


@pytest.fixture(scope="module")
def server(tiny_model: Path, logs: Path, lora: Path) -> Iterator[Server]:
    """Two instances of the tiny model, shared by a file's tests, which leave them as they were."""
    one = Server(
        str(tiny_model),
        "--served-model-name", "tiny",
        "--enable-lora", "--max-lora-rank", "8",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        *FLAGS,
        log=logs / "shared.log",
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
        VLLM_SERVER_DEV_MODE="1",
    )  # fmt: skip
    yield one.wait_until_serving()
    assert one.stop() == 0
