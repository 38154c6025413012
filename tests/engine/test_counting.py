"""The engine's load is counted from what changed, and comes out as if all had been counted."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from llumnix.core.prefixes import BLOCK_TOKENS
from llumnix.core.priorities import Priorities
from llumnix.core.reports import ClassLoad
from llumnix.core.settings import PrioritySettings
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.engine.migration.vllm_port import VllmPort
from llumnix.engine.queueing import Queueing
from llumnix.engine.reporting import prefix_reader
from llumnix.engine.reporting.load_reader import LoadReader
from llumnix.engine.reporting.prefix_reader import (
    ENDED_MAX,
    SWEPT_MAX,
    WALKED_MAX,
    PrefixReader,
    RecordingBlockMap,
)
from support.no_model import BLOCK, add, engine_core

CLASSES = Priorities(PrioritySettings())
HIGH, NORMAL = -100, 0


class Engine:
    """An engine core without a model, and what of ours counts on it."""

    def __init__(self, model: Path, blocks: int, **options: Any) -> None:
        self.core: Any = engine_core(model, blocks=blocks, **options)
        self.scheduler = self.core.scheduler
        client: Any = SimpleNamespace()
        self.port = VllmPort(self.core, [], client, lambda ticket, why: None)
        Queueing(self.scheduler, CLASSES)
        self.reader = self.new_reader()

    def new_reader(self) -> LoadReader:
        taken_out = self.port.source.taken_out
        return LoadReader(self.scheduler, 8, CLASSES, taken_out=taken_out)

    def add(self, name: str, prompt: list[int], tokens: int, priority: int) -> Request:
        made = add(self.core, name, prompt, tokens, priority=priority)
        self.reader.arrived(made)
        return made

    def abort(self, name: str) -> None:
        self.reader.left([name])
        self.core.abort_requests([name])

    def step(self) -> None:
        _, ran = self.core.step_fn()
        self.port.between_steps(ran)


@pytest.mark.parametrize("seed", range(8))
def test_it_counts_as_one_that_has_just_begun(tiny_model: Path, seed: int) -> None:
    dice = random.Random(seed)
    engine = Engine(tiny_model, 28, max_num_batched_tokens=64)
    stopped: list[RequestId] = []
    seen: set[str] = set()
    prompts = 0
    for n in range(600):
        here = sorted(engine.scheduler.requests.keys() - set(stopped))
        do = dice.choice(("add", "step", "step", "step", "abort", "stop", "resume", "release"))
        if do == "add":
            prompt = [dice.randrange(500) for _ in range(dice.randrange(3, 9 * BLOCK))]
            engine.add(f"r{n}", prompt, dice.randrange(40, 90), dice.choice((HIGH, NORMAL)))
        elif do == "step":
            engine.step()
        elif do == "abort" and here and dice.random() < 0.3:
            engine.abort(dice.choice(here))
        elif do == "stop" and here and len(stopped) < 3:
            stopped.append(RequestId(dice.choice(here)))
            engine.port.stop(stopped[-1])
        elif do in ("resume", "release") and stopped:
            name = stopped.pop(0)
            if do == "release" or dice.random() < 0.5:
                engine.port.handover_state(name, 0)
            getattr(engine.port, do)(name)
        else:
            continue
        seen.add(do)
        ours, fresh = engine.reader.read(), engine.new_reader().read()
        assert [replace(c, preempted=0) for c in ours.classes] == list(fresh.classes)
        assert ours.prefill_tokens == fresh.prefill_tokens
        assert ours.head_tokens == fresh.head_tokens
        assert sum(c.running + c.waiting for c in ours.classes) == len(engine.scheduler.requests)
        chunks = {r for r in engine.scheduler.running if r.is_prefill_chunk}
        assert chunks <= engine.scheduler._inflight_prefills, "starts.py looks only there"
        prompts += len(chunks)
    assert seen == {"add", "step", "abort", "stop", "resume", "release"}
    preempted = engine.reader.read().preemptions
    assert preempted, "memory should have been short"
    assert prompts, "some should have been computed in chunks"


class Counted(dict[str, Request]):
    """The scheduler's requests, which notes that somebody goes through all of them."""

    gone_through = 0

    def __iter__(self) -> Any:
        Counted.gone_through += 1
        return super().__iter__()

    def keys(self) -> Any:
        Counted.gone_through += 1
        return super().keys()

    def values(self) -> Any:
        Counted.gone_through += 1
        return super().values()

    def items(self) -> Any:
        Counted.gone_through += 1
        return super().items()


def test_a_count_looks_at_what_changed_and_not_at_ten_thousand_that_wait(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny_model, 40)
    for n in range(10_000):
        engine.add(f"r{n}", [n], 3, NORMAL)
    engine.step()
    assert engine.reader.read().classes == (
        ClassLoad(),
        ClassLoad(running=8, waiting=9992, waiting_tokens=9992 * BLOCK, waiting_prefill=9992),
    )
    looked: list[str] = []
    for name in ("_know", "_look_again", "_wanted"):
        real = getattr(LoadReader, name)

        def note(self: Any, of: Any, name: str = name, real: Any = real) -> Any:
            looked.append(name)
            return real(self, of)

        monkeypatch.setattr(LoadReader, name, note)
    engine.scheduler.requests = Counted(engine.scheduler.requests)
    for n in range(20):
        engine.add(f"new{n}", [n], 3, HIGH)
        engine.abort(f"r{5000 + n}")
        engine.reader.read()
        engine.step()
        engine.reader.read()
        assert len(looked) < 60 * (n + 1)
    assert Counted.gone_through == 0
    assert engine.reader.read().classes == engine.new_reader().read().classes


def test_a_request_that_is_handed_over_counts_as_running_until_it_has_left(
    tiny_model: Path,
) -> None:
    engine = Engine(tiny_model, 40)
    for name in "abc":
        engine.add(name, [ord(name)] * BLOCK, 100, NORMAL)
    engine.add("waits", list(range(39 * BLOCK)), 3, NORMAL)
    engine.step()
    before = engine.reader.read().classes
    assert (before[1].running, before[1].waiting) == (3, 1)
    engine.port.stop(RequestId("a"))
    engine.port.stop(RequestId("waits"))
    assert engine.reader.read().classes == before
    engine.port.handover_state(RequestId("a"), 0)
    assert engine.reader.read().classes == before
    for name in ("a", "waits"):
        engine.port.release(RequestId(name))
    after = engine.reader.read().classes
    assert (after[1].running, after[1].waiting) == (2, 0)


# -- which prefixes are kept: engine/reporting/prefix_reader.py


class Named:
    """A reader of an engine's prefix cache, and who runs."""

    def __init__(self, model: Path, blocks: int) -> None:
        self.core: Any = engine_core(model, blocks=blocks)
        self.kv = self.core.scheduler.kv_cache_manager
        self.running: list[Request] = []
        manager = self.kv.coordinator.single_type_managers[0]
        self.reader = PrefixReader(
            InstanceId("i0"), EngineIndex(0), manager, 0, lambda: None, lambda: self.running
        )

    def computed(self, name: str, prompt: list[int]) -> Request:
        options = SamplingParams(max_tokens=9)
        made = Request(name, prompt, options, None, block_hasher=self.core.request_block_hasher)
        found, hit, _ = self.kv.get_computed_blocks(made)
        assert self.kv.allocate_slots(
            made, len(prompt) - hit, num_new_computed_tokens=hit, new_computed_blocks=found
        )
        made.num_computed_tokens = len(prompt)
        self.reader.track(made)
        return made

    def end(self, request: Request) -> None:
        request.status = RequestStatus.FINISHED_STOPPED
        self.kv.free(request)


def test_requests_that_ended_are_not_kept_where_more_is_computed_than_can_be_named(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_reader, "READ_EVERY_S", 0.0)
    named = Named(tiny_model, 400)
    for k in range(60):
        for n in range(20):
            prompt = [k, n, *range(64 * BLOCK - 2)]
            named.end(named.computed(f"r{k}-{n}", prompt))
        named.reader.read()
        assert len(named.reader._tracked) + len(named.reader._ended) <= ENDED_MAX + 20
    assert len(named.reader._ended) > ENDED_MAX - 20
    while named.reader.read(at_once=True) or named.reader.more:
        pass
    assert not named.reader._ended


def test_a_call_goes_over_a_bounded_number_of_blocks_though_all_are_known(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = Named(tiny_model, 400)
    units = 30
    prompt = list(range(units * BLOCK_TOKENS))
    named.running = [named.computed("first", prompt)]
    while named.reader.read(at_once=True) or named.reader.more:
        pass
    named.running += [named.computed(f"n{n}", [*prompt, n]) for n in range(100)]
    walked: list[Any] = []
    real = RecordingBlockMap.get_one_block
    monkeypatch.setattr(
        RecordingBlockMap, "get_one_block", lambda self, key: walked.append(key) or real(self, key)
    )
    calls = 1
    named.reader.read(at_once=True)
    while named.reader.more:
        assert len(walked) <= WALKED_MAX
        walked.clear()
        named.reader.read(at_once=True)
        calls += 1
    assert calls >= 100 * units / WALKED_MAX


def test_a_call_does_not_look_at_all_who_wait(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_reader, "READ_EVERY_S", 0.0)
    named = Named(tiny_model, 40)
    for n in range(2000):
        made = Request(f"r{n}", [n] * 80, SamplingParams(max_tokens=9), None)
        named.reader.track(made)
    looked: list[int] = []
    real = Request.is_finished
    monkeypatch.setattr(Request, "is_finished", lambda self: looked.append(1) or real(self))
    named.running = [named.computed("runs", list(range(5 * BLOCK_TOKENS)))]
    fact = named.reader.read()
    assert fact is not None
    assert len(fact.stored) == 5
    assert len(looked) <= SWEPT_MAX + 2


def test_two_that_change_places_between_two_reports_are_seen_to(tiny_model: Path) -> None:
    engine = Engine(tiny_model, 40)
    for n in range(8):
        engine.add(f"r{n}", [n] * 5, 50, NORMAL)
    engine.step()
    engine.add("urgent", [9] * 5, 50, HIGH)
    assert [c.running for c in engine.reader.read().classes] == [0, 8]
    out = engine.scheduler.running.pop()
    engine.scheduler._preempt_request(out, 0.0)
    engine.step()
    classes = engine.reader.read().classes
    assert [(c.running, c.waiting) for c in classes] == [(1, 0), (7, 1)]
