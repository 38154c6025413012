"""What one version of vLLM has and another has not."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.vllm_seam import V0_33, VERSION, start_watchdog

PATIENCE_S = 20.0


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Any]:
    """Of a watchdog that loses patience at once."""
    if VERSION < V0_33:
        yield SimpleNamespace()
        return
    from vllm.utils import watch_dog

    before = watch_dog.get_watch_dog()
    watching = SimpleNamespace(dump_dir=str(tmp_path), timeout=0.01, check_interval=0.01)
    yield SimpleNamespace(watchdog_config=watching)
    if (dog := watch_dog.get_watch_dog()) is not before:
        dog.stop()
    watch_dog._watch_dog = before


def test_a_loop_that_stands_still_has_its_stacks_dumped(config: Any, tmp_path: Path) -> None:
    start_watchdog("engine_7", config)
    until_s = time.monotonic() + (PATIENCE_S if VERSION >= V0_33 else 0.1)
    while not (dumps := list(tmp_path.iterdir())) and time.monotonic() < until_s:
        time.sleep(0.01)
    assert len(dumps) == (VERSION >= V0_33)
    assert all("engine_7" in dump.name for dump in dumps)
