from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.engines import RealKind


@pytest.fixture(scope="package")
def real(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealKind]:
    """Two of vLLM's engine cores in this process, their workers in processes of their own."""
    from support.real_engine import RealEngine

    folder = tmp_path_factory.mktemp("kv")
    engines = [
        RealEngine(
            number,
            folder,
            tiny_model,
            block_size=32,
            max_num_batched_tokens=4096,
            enable_lora=True,
            max_lora_rank=8,
        )
        for number in range(2)
    ]
    yield RealKind(engines, lambda n: list(range(n)))
    for engine in engines:
        engine.close()
