"""An urgent request that cannot start has less urgent ones preempted, and nobody more than that."""

from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

from vllm import SamplingParams  # noqa: E402

from engine.conftest import BLOCK, BLOCKS  # noqa: E402
from llumnix.core.priorities import Priorities  # noqa: E402
from llumnix.core.settings import PriorityClass, PrioritySettings  # noqa: E402
from llumnix.core.types import RequestId  # noqa: E402
from llumnix.engine.urgent import UrgentAdmission  # noqa: E402
from support import no_model  # noqa: E402

HIGH, NORMAL, LOW = -100, 0, 10
CLASSES = tuple(
    PriorityClass(name=name, priority=priority)
    for name, priority in (("high", HIGH), ("normal", NORMAL), ("low", LOW))
)
SLOTS = 4


class Line:
    """An engine with our preemption before each of its steps, as engine/instance.py has it."""

    def __init__(self, engine: Any, **settings: Any) -> None:
        self.engine = engine
        self.scheduler = engine.core.scheduler
        self.urgent = UrgentAdmission(
            self.scheduler, Priorities(PrioritySettings(classes=CLASSES, **settings))
        )
        self.answers: dict[str, list[int]] = {}
        self.ended: list[str] = []

    def add(self, name: str, priority: int, prompt: int = 20, tokens: int = 8) -> None:
        options = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        words = [3 + (n * 7 + sum(map(ord, name)) * 31) % 400 for n in range(prompt)]
        made = self.engine.make(RequestId(name), words, options)
        made.priority = priority
        self.engine.add_core_request(made)

    def step(self) -> int:
        preempted = self.urgent.make_room()
        for name, tokens, done, _ in self.engine.step():
            self.answers.setdefault(str(name), []).extend(tokens)
            if done:
                self.ended.append(str(name))
        return preempted

    def steps_until_first_token(self, name: str) -> int:
        for count in range(1, 50):
            self.step()
            if self.answers.get(name):
                return count
        raise AssertionError(f"{name} has no token after 50 steps")

    def finish(self) -> None:
        for _ in range(300):
            if self.engine.idle():
                return
            self.step()
        raise AssertionError("the engine did not become idle")

    def runs(self) -> set[str]:
        return {r.request_id for r in self.scheduler.running}


@pytest.fixture
def line(engine: Any) -> Line:
    return Line(engine)


def in_flight(engine: Any) -> int:
    """Steps that a step ahead adds before an answer is seen."""
    return 1 if engine.core.batch_queue is not None else 0


def test_an_urgent_request_takes_the_slot_of_the_least_urgent_and_latest(line: Line) -> None:
    for name, priority in (("low-a", LOW), ("normal", NORMAL), ("low-b", LOW), ("high", HIGH)):
        line.add(name, priority, tokens=40)
    line.step()
    assert line.runs() == {"low-a", "normal", "low-b", "high"}
    line.add("urgent", HIGH)
    assert line.steps_until_first_token("urgent") <= 1 + in_flight(line.engine)
    assert line.runs() == {"low-a", "normal", "high", "urgent"}
    line.finish()
    assert set(line.ended) == {"low-a", "normal", "low-b", "high", "urgent"}


def test_it_takes_only_the_kv_memory_that_it_needs(line: Line) -> None:
    each = (BLOCKS // 3) * BLOCK
    for n in range(3):
        line.add(f"low-{n}", LOW, prompt=each - 20, tokens=10)
        line.step()
    assert line.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 0
    line.add("urgent", HIGH, prompt=5 * BLOCK)
    assert line.steps_until_first_token("urgent") <= 1 + in_flight(line.engine)
    assert line.runs() == {"low-0", "low-1", "urgent"}
    line.finish()
    assert len(line.ended) == 4


def test_it_does_not_wait_for_a_long_prompt_to_be_computed(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line.scheduler, "max_num_scheduled_tokens", 64)
    line.add("chat", LOW, tokens=30)
    line.step()
    line.add("long", LOW, prompt=400, tokens=4)
    line.step()
    line.step()
    assert [r.request_id for r in line.scheduler.running if r.is_prefill_chunk] == ["long"]
    line.add("urgent", HIGH, prompt=50)
    assert line.steps_until_first_token("urgent") <= 1 + in_flight(line.engine)
    assert "chat" in line.runs(), "it has no tokens of a step worth taking"
    line.finish()
    assert set(line.ended) == {"chat", "long", "urgent"}


def test_preempted_requests_answer_as_if_nothing_had_been(engine: Any) -> None:
    alone = Line(engine, preempt=False)
    for n in range(SLOTS):
        alone.add(f"low-{n}", LOW, prompt=30 + n, tokens=60)
    alone.finish()
    engine.core.scheduler.reset_prefix_cache()
    line = Line(engine)
    for n in range(SLOTS):
        line.add(f"low-{n}", LOW, prompt=30 + n, tokens=60)
    preempted = 0
    for n in range(36):
        if n % 9 == 2:
            line.add(f"urgent-{n}", HIGH, tokens=2)
        preempted += line.step()
    assert preempted >= 3
    line.finish()
    assert {n: a for n, a in line.answers.items() if n.startswith("low")} == alone.answers


@pytest.mark.parametrize(
    ("settings", "priority"), [({"preempt": False}, HIGH), ({}, LOW), ({}, NORMAL)]
)
def test_nobody_is_preempted_for_its_like_or_where_it_is_off(
    engine: Any, settings: dict[str, Any], priority: int
) -> None:
    line = Line(engine, **settings)
    for n in range(SLOTS):
        line.add(f"running-{n}", NORMAL, tokens=12)
    line.step()
    line.add("waits", priority)
    assert sum(line.step() for _ in range(6)) == 0
    assert "waits" not in line.runs()
    line.finish()


def test_nobody_is_preempted_in_vain(line: Line) -> None:
    """All that is less urgent gives too little."""
    line.add("high", HIGH, prompt=15 * BLOCK - 20, tokens=10)
    line.step()
    line.add("low", LOW, prompt=2 * BLOCK, tokens=12)
    line.step()
    line.add("urgent", HIGH, prompt=14 * BLOCK, tokens=2)
    assert line.step() == 0
    assert {"high", "low"} <= line.runs()
    line.finish()


@pytest.mark.parametrize(("blocks", "preempted"), [(13, 1), (15, 0)])
def test_blocks_that_others_share_do_not_become_free(
    tiny_model: Path, blocks: int, preempted: int
) -> None:
    """Of 24 blocks a request and one less urgent hold 12, of which the latter has one for itself:
    without it there are 13."""
    size = no_model.BLOCK
    core = no_model.engine_core(tiny_model, blocks=24)
    prompt = list(range(10 * size + 1))
    for name, priority in (("high", HIGH), ("low", LOW)):
        no_model.add(core, name, prompt, 10, priority=priority)
        core.step_fn()
    pool = core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == 12
    no_model.add(core, "urgent", list(range(1000, 1000 + blocks * size)), 1, priority=HIGH)
    urgent = UrgentAdmission(core.scheduler, Priorities(PrioritySettings(classes=CLASSES)))
    assert urgent.make_room() == preempted


def test_workers_get_all_tokens_of_one_that_is_resumed_at_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the urgent one leaves of the next step is given to the one that was preempted for it.
    With asynchronous scheduling a worker fails on one that has generated some and comes without its
    tokens."""
    core = no_model.engine_core(tiny_model, blocks=64, max_num_batched_tokens=64)
    scheduler, batches, launch = core.scheduler, [], core.model_executor.execute_model

    def noted(batch: Any, *args: Any, **more: Any) -> Any:
        batches.append(batch)
        return launch(batch, *args, **more)

    monkeypatch.setattr(core.model_executor, "execute_model", noted)
    low = no_model.add(core, "low", list(range(300)), 40, priority=LOW)
    while low.num_output_tokens < 4:
        core.step_fn()
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    core.step_fn()  # Begins to compute all of it once more.
    assert low.is_prefill_chunk
    no_model.add(core, "urgent", list(range(1000, 1050)), 2, priority=HIGH)
    assert UrgentAdmission(scheduler, Priorities(PrioritySettings(classes=CLASSES))).make_room()
    core.step_fn()
    assert set(batches[-1].num_scheduled_tokens) == {"urgent", "low"}
    cached = batches[-1].scheduled_cached_reqs
    assert cached.resumed_req_ids == {"low"}
    assert cached.all_token_ids["low"] == list(low.all_token_ids)


def test_one_that_aged_preempts_nobody_and_is_not_preempted(line: Line) -> None:
    line.add("aged", LOW, tokens=30)
    aged = line.scheduler.requests["aged"]
    line.scheduler.waiting.remove_requests([aged])
    aged.llumnix_priority, aged.priority = LOW, HIGH
    for n in range(SLOTS):
        line.add(f"low-{n}", LOW, tokens=12)
    line.step()
    line.scheduler.waiting.add_request(aged)
    assert line.step() == 0
    while "aged" not in line.runs():
        line.step()
    for n in range(SLOTS):
        line.add(f"urgent-{n}", HIGH, tokens=6)
        line.step()
    assert "aged" in line.runs()
    line.finish()
