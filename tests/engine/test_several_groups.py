"""Models with several groups of layers, as Gemma 3 has them: one group sees all tokens, five see a
window. On vLLM's own engine core, without a model."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from llumnix.core.priorities import Priorities
from llumnix.core.reports import MoveCounts, compose_report
from llumnix.core.settings import PriorityClass, PrioritySettings
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.engine.readings import start_blocks
from llumnix.engine.reporting.load_reader import LoadReader
from llumnix.engine.urgent import UrgentAdmission
from support import no_model
from support.no_model import BLOCK

WINDOW = 20 * BLOCK
SHAPE: dict[str, Any] = {
    "block_size": BLOCK,
    "num_kv_heads": 1,
    "head_size": 8,
    "dtype": torch.float32,
}
ONE: dict[str, KVCacheSpec] = {"full": FullAttentionSpec(**SHAPE)}
SIX = ONE | {f"window{n}": SlidingWindowSpec(**SHAPE, sliding_window=WINDOW) for n in range(5)}
CLASSES = tuple(
    PriorityClass(name=name, priority=priority) for name, priority in (("high", -100), ("low", 0))
)
PRIORITIES = Priorities(PrioritySettings(classes=CLASSES))


def core_of(model: Path, layers: dict[str, KVCacheSpec], blocks: int) -> Any:
    """`blocks`: of each group."""
    return no_model.engine_core(
        model,
        blocks=blocks * len(layers),
        layers=layers,
        max_model_len=60 * BLOCK,
        max_num_batched_tokens=60 * BLOCK,
    )


@pytest.mark.parametrize("layers", [ONE, SIX], ids=["one group", "six groups"])
def test_a_report_says_that_the_head_lacks_memory_where_vllm_cannot_start_it(
    tiny_model: Path, layers: dict[str, KVCacheSpec]
) -> None:
    """Below the window and above it. vLLM keeps no watermark here."""
    found = set[tuple[bool, bool]]()
    for length in (4, 19, 20, 30, 55):
        core = core_of(tiny_model, layers, 64)
        scheduler = core.scheduler
        reader = LoadReader(scheduler, 8, PRIORITIES)
        no_model.add(core, "runs", list(range(3, 3 + 25 * BLOCK)), 400)
        core.step_fn()
        no_model.add(core, "head", list(range(3000, 3000 + length * BLOCK)), 10)
        reader.arrived()
        report = compose_report(
            reader.read(),
            MoveCounts(),
            instance=InstanceId("i0"),
            engine_index=EngineIndex(0),
            sequence=1,
        )
        needed, _ = start_blocks(scheduler, scheduler.requests["head"])
        starts = needed <= scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        lacks = report.lacks(report.kv_tokens_total - report.kv_tokens_used)
        assert lacks != starts, f"{length} blocks of tokens"
        assert report.kv_tokens_total == 64 * BLOCK
        found.add((lacks, length < WINDOW // BLOCK))
        core.shutdown()
    assert (True, False) in found
    assert (False, True) in found


def test_for_an_urgent_request_memory_is_made_in_every_group(tiny_model: Path) -> None:
    """The four that run have filled their blocks, and take all that is free in the next step."""
    core = core_of(tiny_model, SIX, 64)
    scheduler = core.scheduler
    urgent = UrgentAdmission(scheduler, PRIORITIES)
    for n in range(4):
        no_model.add(core, f"low{n}", [5 + n] * (15 * BLOCK), 400)
    core.step_fn()
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 4 * len(SIX)
    head = no_model.made(core, "urgent", [99] * (2 * BLOCK), 4)
    head.priority = -100
    core.add_request(head)
    assert urgent.make_room() == 1
    core.step_fn()
    assert "urgent" in {r.request_id for r in scheduler.running}
    core.shutdown()
