"""What enters the prefix cache with a request that moved in, and when its blocks are written to."""

from collections import deque
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm")

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from llumnix.core.types import EngineIndex, RequestId
from llumnix.engine.migration.vllm_core import HandoverState, VllmCore
from llumnix.engine.migration.vllm_destination import (
    ReservedRequest,
    VllmDestination,
)
from llumnix.engine.readings import came_with

SIZE, WINDOW = 16, 128
TOKENS = list(range(1000, 1400))


def request(name: str, tokens: list[int]) -> Request:
    kv_cache_utils.init_none_hash(sha256)
    hasher = kv_cache_utils.get_request_block_hasher(SIZE, sha256)
    return Request(name, tokens, SamplingParams(max_tokens=9), None, block_hasher=hasher)


def manager() -> KVCacheManager:
    shape: dict[str, Any] = {
        "block_size": SIZE, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32
    }  # fmt: skip
    specs = [FullAttentionSpec(**shape), SlidingWindowSpec(**shape, sliding_window=WINDOW)]
    groups = [KVCacheGroupSpec([str(n)], spec) for n, spec in enumerate(specs)]
    config = KVCacheConfig(num_blocks=200, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(config, 4096, scheduler_block_size=SIZE, hash_block_size=SIZE)


@pytest.mark.parametrize("gaps", [True, False])
def test_what_its_source_no_longer_had_is_not_found(gaps: bool) -> None:
    """Of a layer that looks through a window the source has the last one alone."""
    kv = manager()
    new = request("a", TOKENS)
    assert kv.allocate_slots(new, len(TOKENS), delay_cache_blocks=True) is not None
    waiting = SimpleNamespace(prepend_request=lambda request: None)
    core = object.__new__(VllmCore)
    core.kv, core.runner_v1 = kv, False
    core.scheduler = SimpleNamespace(
        requests={}, prev_step_scheduled_req_ids=set(), kv_holding_waiting=waiting, waiting=waiting
    )
    arrivals = object.__new__(VllmDestination)
    arrivals._core, arrivals._kv, arrivals._scheduler = core, kv, core.scheduler
    arrivals._on_commit = lambda request: None
    arrivals._arriving = {RequestId("a"): ReservedRequest(request=new, agents=(), gaps=gaps)}
    handed = msgspec.msgpack.encode(HandoverState(cached=None, preemptions=0, generator=b""))
    assert arrivals.commit(RequestId("a"), len(TOKENS), handed) is None
    lengths = range(2 * SIZE, len(TOKENS) - SIZE, SIZE)
    hits = [kv.get_computed_blocks(request(f"b{n}", TOKENS[:n]))[1] for n in lengths]
    assert any(hits) is not gaps


@pytest.mark.parametrize(
    ("more", "waits"),
    [pytest.param(4 * SIZE, True, id="it got blocks"), pytest.param(0, False, id="it got none")],
)
def test_a_pull_into_new_blocks_waits_for_the_step_in_flight(more: int, waits: bool) -> None:
    """That step may still write into them, for a request that has just been freed."""
    kv, pulls = manager(), []
    new = request("a", TOKENS)
    assert kv.allocate_slots(new, 10 * SIZE, delay_cache_blocks=True) is not None
    engine = SimpleNamespace(batch_queue=deque(["a step"]))
    core = object.__new__(VllmCore)
    core.kv, core.pool, core.engine = kv, kv.block_pool, engine
    core.scheduler = SimpleNamespace(kv_cache_config=kv.kv_cache_config)
    arrivals = object.__new__(VllmDestination)
    arrivals._core, arrivals._kv, arrivals._deferred = core, kv, []
    arrivals._allocate = partial(kv.allocate_slots, delay_cache_blocks=True)
    arrivals._client = SimpleNamespace(pull=lambda *order, final: pulls.append(final))
    arrivals._arriving = {RequestId("a"): ReservedRequest(request=new, agents=())}
    end = 10 * SIZE + more
    assert arrivals.reach(RequestId("a"), end, []) is None
    theirs = [list(range(end // SIZE))] * 2
    arrivals.pull(RequestId("a"), 1, EngineIndex(0), [], 0, end, theirs, True)
    assert arrivals.pulls_wait is waits
    assert bool(pulls) is not waits
    arrivals.begin_pulls()
    assert bool(pulls) is not waits
    engine.batch_queue.clear()
    arrivals.begin_pulls()
    assert pulls == [True]


def test_a_request_is_known_to_have_come_with_its_tokens() -> None:
    arrivals = object.__new__(VllmDestination)
    arrivals._core = SimpleNamespace(steps_in_flight=list)  # type: ignore[assignment]
    arrivals._scheduler, arrivals._arriving = SimpleNamespace(requests={}), {}
    moved = request("a", TOKENS)
    assert arrivals.admit(RequestId("a"), moved, [7, 8]) is None
    assert (came_with(moved), came_with(request("b", TOKENS))) == (2, 0)
