from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BLOCK = 32
BLOCKS = 24
ASYNC = {"force_async": True, "worker_cls": "support.async_cpu_worker.AsyncCpuWorker"}


@pytest.fixture(
    scope="package",
    params=[
        # As on GPUs: the next step is scheduled before this one has ended.
        pytest.param(ASYNC, id="a-step-ahead", marks=pytest.mark.live),
        pytest.param({}, id="one-step-at-a-time", marks=[pytest.mark.live, pytest.mark.slow]),
    ],
)
def shared_engine(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """One of vLLM's engine cores with room for little: it queues, preempts and evicts."""
    from support.real_engine import RealEngine

    one = RealEngine(
        0,
        tmp_path_factory.mktemp("engine"),
        tiny_model,
        block_size=BLOCK,
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=4,
        num_gpu_blocks_override=BLOCKS + 1,  # One is vLLM's placeholder.
        scheduling_policy="priority",
        **request.param,
    )
    yield one
    one.close()


@pytest.fixture
def engine(shared_engine: Any) -> Iterator[Any]:
    """It, with nothing in it."""
    yield shared_engine
    shared_engine.die()
    assert shared_engine.core.scheduler.reset_prefix_cache()


@pytest.fixture(scope="module")
def shared_hosts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two engines without a model, each with its llumlet's host (`support.hosted.Hosts`)."""
    from support.hosted import Hosts

    one = Hosts(tmp_path_factory.mktemp("hosts"), tiny_model)
    yield one
    one.close()


@pytest.fixture
def hosts(shared_hosts: Any) -> Iterator[Any]:
    """They, with nothing in them."""
    shared_hosts.renew()
    yield shared_hosts
    for engine in shared_hosts.engines:
        engine.core.abort_requests(list(engine.core.scheduler.requests))
    shared_hosts.until_at_rest()
