import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

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


@pytest.fixture(autouse=True)
def logs_reach_caplog() -> Iterator[None]:
    """`llumnix serve` keeps its log to itself, also where a test runs a part of it."""
    yield
    logging.getLogger("llumnix").propagate = True
