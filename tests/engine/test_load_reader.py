"""What is reported of an engine is what is in it."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

from vllm import SamplingParams  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402

from llumnix.core.limits import WAITING_SHOWN_MAX  # noqa: E402
from llumnix.core.priorities import Priorities  # noqa: E402
from llumnix.core.reports import ClassLoad, EngineCounts  # noqa: E402
from llumnix.core.settings import PrioritySettings  # noqa: E402
from llumnix.core.types import RequestId  # noqa: E402
from llumnix.engine.reporting.load_reader import LoadReader  # noqa: E402

from .conftest import BLOCK, BLOCKS  # noqa: E402

PRIORITIES = Priorities(PrioritySettings())
TOKEN_BYTES = 8 * 2 * 2 * 32 * 4
"""Of the tiny model: layers, K and V, heads, their width, float32."""


class Count:
    """Counts by itself, from what goes into the engine and comes out of it."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.scheduler = engine, engine.core.scheduler
        self.tokens: dict[str, int] = {}
        self.generated: dict[str, int] = {}
        self.urgent: dict[str, bool] = {}
        self.order: list[str] = []
        self.preempted = {True: 0, False: 0}  # by whether it is urgent
        self.finished = self.finished_tokens = 0
        self.said: set[str] = set()
        preempt = self.scheduler._preempt_request

        def counted(request: Request, *args: Any, **kwargs: Any) -> None:
            self.preempted[self.urgent[request.request_id]] += 1
            preempt(request, *args, **kwargs)

        monkeypatch.setattr(self.scheduler, "_preempt_request", counted)

    def add(self, name: str, prompt: list[int], tokens: int, *, urgent: bool) -> None:
        options = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        made = self.engine.make(RequestId(name), prompt, options)
        made.priority = -100 if urgent else 0
        self.engine.add_core_request(made)
        self.tokens[name], self.generated[name] = len(prompt), 0
        self.urgent[name] = urgent
        self.order.append(name)

    def abort(self, name: str) -> None:
        self.engine.abort(RequestId(name))
        self.tokens.pop(name, None)

    def step(self) -> None:
        self.said.clear()
        for name, tokens, done, output in self.engine.step():
            self.said.add(name)
            self.tokens[name] += len(tokens)
            self.generated[name] += len(tokens)
            if done:
                assert str(output.finish_reason) == "length"
                self.finished += 1
                self.finished_tokens += self.generated[name]
                del self.tokens[name]

    def numbers(self) -> EngineCounts:
        waiting = [n for n in self.tokens if n not in self._running()]
        waiting.sort(key=lambda n: (not self.urgent[n], self.order.index(n)))
        pool = self.scheduler.kv_cache_manager.block_pool
        used = sum(b.ref_cnt > 0 for b in pool.blocks if not b.is_null) * BLOCK
        left = sum(map(self._left, self._running() - self.said))
        needed = [self._needed(name) for name in waiting[:WAITING_SHOWN_MAX]]
        blocked = bool(needed) and needed[0] > BLOCKS * BLOCK - used - left
        return EngineCounts(
            kv_tokens_used=used,
            kv_tokens_total=BLOCKS * BLOCK,
            prefill_tokens=left,
            block_tokens=BLOCK,
            slots=4,
            classes=tuple(self._class(urgent, waiting) for urgent in (True, False)),
            head_tokens=needed[0] if needed else 0,
            waiting_least=min(needed) if blocked else 0,
            kv_token_bytes=TOKEN_BYTES,
            preemptions=sum(self.preempted.values()),
            finished=self.finished,
            finished_tokens=self.finished_tokens,
        )

    def _running(self) -> set[str]:
        known = self.scheduler.requests.values()
        return {r.request_id for r in known if r.status == RequestStatus.RUNNING}

    def _left(self, name: str) -> int:
        """Of one whose last step gave no token."""
        return self.tokens[name] - int(self.scheduler.requests[name].num_computed_tokens)

    def _needed(self, name: str) -> int:
        blocks = 0
        while blocks * BLOCK < self.tokens[name]:
            blocks += 1
        return blocks * BLOCK

    def _class(self, urgent: bool, waiting: list[str]) -> ClassLoad:
        mine = [n for n in self.tokens if self.urgent[n] == urgent]
        queued = [n for n in mine if n in waiting]
        return ClassLoad(
            running=len(mine) - len(queued),
            waiting=len(queued),
            waiting_tokens=sum(self._needed(n) for n in queued),
            waiting_prefill=sum(self.tokens[n] for n in queued),
            preempted=self.preempted[urgent],
        )


@pytest.mark.parametrize("seed", range(2))
def test_the_numbers_agree_with_a_count_at_every_step(
    engine: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Before and after each step, as the busy loop asks. Prompts take several."""
    monkeypatch.setattr(engine.core.scheduler, "max_num_scheduled_tokens", 100)
    dice = random.Random(seed)
    count = Count(engine, monkeypatch)
    reader = LoadReader(engine.core.scheduler, 4, PRIORITIES)
    assert reader.read() == count.numbers()
    most_waiting = most_used = most_left = 0
    for step in range(3000):
        while len(count.order) < 20 and dice.random() < (0.3 if step else 1.0):
            prompt = [dice.randrange(3, 500) for _ in range(dice.randrange(50, 250))]
            name = f"r{seed}-{len(count.order)}"
            count.add(name, prompt, dice.randrange(1, 200), urgent=dice.random() < 0.3)
            reader.arrived()
        if count.tokens and dice.random() < 0.01:
            count.abort(dice.choice(sorted(count.tokens)))
        numbers = reader.read()
        assert numbers == count.numbers()
        most_waiting = max(most_waiting, sum(c.waiting for c in numbers.classes))
        most_used = max(most_used, numbers.kv_tokens_used)
        most_left = max(most_left, numbers.prefill_tokens)
        if engine.idle():
            break
        count.step()
        assert reader.read() == count.numbers()
    assert engine.idle()
    idle = (ClassLoad(preempted=count.preempted[urgent]) for urgent in (True, False))
    assert numbers.classes == tuple(idle)
    assert sum(count.preempted.values()) > 0, "a workload that never preempts shows little"
    assert most_waiting > 3
    assert most_used > 0.8 * BLOCKS * BLOCK
    assert most_left > BLOCK
    assert count.finished > 10


def test_blocks_that_only_the_prefix_cache_holds_count_as_free(engine: Any) -> None:
    reader = LoadReader(engine.core.scheduler, 4, PRIORITIES)
    options = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    engine.add(RequestId("a"), list(range(3, 203)), options)
    while not engine.idle():
        engine.step()
    numbers = reader.read()
    assert (numbers.kv_tokens_used, numbers.finished) == (0, 0), "it came before the reader"
    made = engine.make(RequestId("b"), list(range(3, 203)), options)
    again, _ = engine.core.preprocess_add_request(made)
    assert engine.core.scheduler.kv_cache_manager.get_computed_blocks(again)[1] == 192


def test_an_answer_that_came_and_ended_between_two_reports_counts(engine: Any) -> None:
    ended = list[str]()
    reader = LoadReader(
        engine.core.scheduler, 4, PRIORITIES, ended=lambda request: ended.append(request.request_id)
    )
    options = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    for name in ("a", "aborted"):
        engine.add(RequestId(name), list(range(3, 23)), options)
        reader.arrived(engine.core.scheduler.requests[name])
    engine.abort(RequestId("aborted"))
    while not engine.idle():
        engine.step()
    numbers = reader.read()
    assert (numbers.finished, numbers.finished_tokens) == (1, 2)
    assert ended == ["a", "aborted"]
    assert reader.read() == numbers


def test_of_those_who_wait_what_is_found_is_not_computed_and_what_is_shared_takes_no_memory(
    engine: Any,
) -> None:
    scheduler = engine.core.scheduler
    asked: list[str] = []
    answers = {"a": (4 * BLOCK, BLOCK), "b": (50, 0), "c": (16, 16)}

    def found(request: Any) -> tuple[int, int]:
        asked.append(request.request_id)
        return answers[request.request_id]

    reader = LoadReader(scheduler, 4, PRIORITIES, cached_tokens=found)
    for name, length in (("a", 5 * BLOCK), ("b", 3 * BLOCK), ("c", 20)):
        engine.add_core_request(
            engine.make(RequestId(name), list(range(length)), SamplingParams(max_tokens=1))
        )
    numbers = reader.read()
    assert numbers.classes[1] == ClassLoad(
        waiting=3,
        waiting_tokens=5 * BLOCK + 3 * BLOCK + reader.needed(scheduler.requests["c"]),
        waiting_shared=BLOCK + 16,
        waiting_prefill=BLOCK + (3 * BLOCK - 50) + 4,
    )
    assert numbers.head_tokens == 5 * BLOCK
    reader.arrived()
    reader.read()
    assert sorted(asked) == ["a", "b", "c"], "once each"
    for name in answers:
        engine.abort(RequestId(name))


def test_a_clients_number_counts_and_not_the_one_it_is_queued_under(engine: Any) -> None:
    """engine/queueing.py changes the latter."""
    reader = LoadReader(engine.core.scheduler, 4, PRIORITIES)
    made = engine.make(RequestId("a"), [3, 4, 5], SamplingParams(max_tokens=1))
    engine.add_core_request(made)
    known = engine.core.scheduler.requests["a"]
    known.llumnix_priority, known.priority = known.priority, -100
    waiting = ClassLoad(waiting=1, waiting_tokens=BLOCK, waiting_prefill=3)
    assert reader.read().classes == (ClassLoad(), waiting)
    engine.abort(RequestId("a"))


def test_a_tokens_bytes_are_counted_once_whatever_views_there_are() -> None:
    """vLLM describes the one allocation in as many tensors as there are kinds of layers; each of
    the workers has one."""

    def reader(groups: list[int], tensors: int, workers: int = 1) -> LoadReader:
        specs = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=b)) for b in groups]
        config = SimpleNamespace(
            num_blocks=10,
            kv_cache_tensors=[SimpleNamespace(size=16_000)] * tensors,
            kv_cache_groups=specs,
        )
        parallel = SimpleNamespace(tensor_parallel_size=workers)
        scheduler = SimpleNamespace(block_size=16, kv_cache_config=config, parallel_config=parallel)
        return LoadReader(scheduler, 4, PRIORITIES)

    assert reader([16], 1)._token_bytes == 100
    assert reader([16], 3)._token_bytes == 100
    assert reader([16, 16], 2)._token_bytes == 200
    assert reader([16, 32], 2)._token_bytes == 150
    assert reader([16], 1, workers=4)._token_bytes == 400
