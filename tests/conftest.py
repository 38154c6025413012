from pathlib import Path

import pytest

from support.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny model."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")
