import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from support.endless import sweepers
from support.tiny_model import make_tiny_model

# A busy machine is no failure of the code.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")

# Under nohup the processes that tests start would not stop at SIGHUP, rightly.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny model."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(autouse=True, scope="module")
def vllm_reads_its_variables() -> None:
    """An engine has vLLM keep what the environment said. Tests of another file set it anew."""
    if envs := sys.modules.get("vllm.envs"):
        envs.disable_envs_cache()


@pytest.fixture(autouse=True)
def logs_reach_caplog() -> Iterator[None]:
    """`llumnix serve` keeps its log to itself, and a part of vLLM raises the root's level, also
    where a test runs it."""
    yield
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("llumnix").propagate = True


@pytest.fixture(autouse=True)
def no_sweeper_is_left() -> Iterator[None]:
    """A thread that sweeps on would take the memory of a later test's dead away before it looks."""
    yield
    assert sweepers() == []
