"""Which request of an engine starts next where memory is short, with vLLM's own scheduler."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import Request, RequestStatus

from llumnix.core.priorities import Priorities
from llumnix.core.queue_rules import PLAIN, QueueRules
from llumnix.core.settings import PriorityClass, PrioritySettings
from llumnix.engine.migration.vllm_port import VllmPort
from llumnix.engine.queueing import Queueing
from llumnix.engine.reporting.load_reader import LoadReader
from llumnix.engine.urgent import UrgentAdmission
from support.no_model import BLOCK, add, engine_core
from support.prompt_times import teach

HIGH, NORMAL = -100, 0
CLASSES = (
    PriorityClass(name="high", priority=HIGH, headroom=0.5),
    PriorityClass(name="normal", priority=NORMAL),
)
GROW = replace(PLAIN, growth=1)
PASS = replace(PLAIN, passers=8, pass_s=20.0, pass_share=0.5)
BOTH = replace(PASS, growth=1)
SHORT = replace(PASS, short_first=4.0)
ALL = replace(SHORT, growth=1)


class Served:
    """An engine core without a model, with our queue, preemption and counts."""

    def __init__(
        self,
        model: Path,
        rules: QueueRules,
        *,
        blocks: int = 20,
        preempt: bool = False,
        aging_s: float = 30.0,
        **args: Any,
    ) -> None:
        self.core: Any = engine_core(model, blocks=blocks, **args)
        self.scheduler = self.core.scheduler
        self.now_s = 1000.0
        settings = PrioritySettings(classes=CLASSES, preempt=preempt, aging_s=aging_s)
        classes = Priorities(settings)
        self.queueing = Queueing(self.scheduler, classes, lambda: self.now_s, rules)
        self.urgent = UrgentAdmission(self.scheduler, classes, self.queueing)
        self.reader = LoadReader(self.scheduler, 8, classes, blocked=self.queueing.blocked)
        client: Any = None
        self.port = VllmPort(self.core, [], client, lambda ticket, why: None)
        self.came = 0

    def add(self, name: str, blocks: int, answer: int = 100, priority: int = NORMAL) -> Request:
        """A request that needs so many whole blocks to start. None shares a prefix."""
        self.came += 1
        prompt = [self.came, *range(1, blocks * BLOCK)]
        came = add(self.core, name, prompt, answer, priority=priority, arrival_time=self.came)
        self.reader.arrived(came)
        return came

    def takes(self, token_s: float) -> "Served":
        """It, where a prompt is known to take so many seconds a token."""
        assert self.queueing._starts is not None
        teach(self.queueing._starts._prompt_timer, token_s)
        return self

    def running(self, blocks: int) -> "Served":
        """It, with a request under way that needs so many blocks."""
        self.add("a", blocks)
        assert self.step() == ["a"]
        return self

    def step(self) -> list[str]:
        """One step; the requests that it started."""
        before = self.waiting()
        self.queueing.look()
        self.queueing.before_step()
        self.urgent.make_room()
        _, ran = self.core.step_fn()
        self.port.between_steps(ran)
        self.queueing.stepped(0.1)
        self.now_s += 0.1
        left = self.waiting()
        return [name for name in before if name not in left]

    def waiting(self) -> list[str]:
        scheduler = self.scheduler
        return [
            r.request_id
            for queue in (scheduler.kv_holding_waiting, scheduler.waiting)
            for r in queue
        ]


@pytest.mark.parametrize(("blocks", "starts"), [(7, True), (8, False)])
def test_a_request_starts_only_if_all_that_run_can_take_a_block_more(
    tiny_model: Path, blocks: int, starts: bool
) -> None:
    it = Served(tiny_model, GROW).running(10)
    it.add("b", blocks)
    # Of 20 blocks the first has eleven, since its answer has begun; each of the two may grow.
    assert it.step() == (["b"] if starts else [])
    counts = it.reader.read()
    assert (counts.head_tokens, counts.keep_tokens) == (
        (0, 0) if starts else (8 * BLOCK, 2 * BLOCK)
    )


def test_each_of_several_that_start_at_once_leaves_the_room(tiny_model: Path) -> None:
    it = Served(tiny_model, GROW).running(4)
    for name in "bcdefg":
        it.add(name, 2)
    # Fifteen are free: after three there are nine for four, after four there would be seven for
    # five, after five five for six.
    assert it.step() == ["b", "c", "d", "e"]


@pytest.mark.parametrize(("blocks", "starts"), [(5, True), (6, False)])
def test_one_that_was_preempted_leaves_twice_as_much(
    tiny_model: Path, blocks: int, starts: bool
) -> None:
    it = Served(tiny_model, GROW).running(10)
    it.add("b", blocks).num_preemptions = 1
    assert it.step() == (["b"] if starts else [])


def test_an_engine_that_runs_nothing_starts_whatever_fits(tiny_model: Path) -> None:
    it = Served(tiny_model, GROW)
    it.add("a", 20, answer=1)
    assert it.step() == ["a"]
    assert it.scheduler.requests == {}


def test_what_prompts_under_way_will_take_is_not_free(tiny_model: Path) -> None:
    for rules, starts in ((PLAIN, ["b"]), (GROW, [])):
        it = Served(tiny_model, rules, long_prefill_token_threshold=4 * BLOCK)
        it.add("a", 10)
        assert it.step() == ["a"]
        it.add("b", 9)  # Of 16 blocks that are free, the first will take six.
        assert it.step() == starts


@pytest.mark.parametrize("alone", [False, True])
def test_one_that_comes_with_its_kv_waits_for_no_room(tiny_model: Path, alone: bool) -> None:
    it = Served(tiny_model, GROW).running(10)
    moved = it.add("moved", 7)
    assert it.step() == ["moved"]
    pool = it.scheduler.kv_cache_manager.block_pool
    while pool.get_num_free_blocks() > 1:
        it.step()
    it.port.stop("moved")
    it.port.handover_state("moved", 0)
    it.port.resume("moved")
    if not alone:
        it.add("b", 1)
    assert moved in it.scheduler.kv_holding_waiting
    pool.get_new_blocks(pool.get_num_free_blocks())
    assert it.step() == ["moved"]


def test_the_operators_watermark_counts_too(tiny_model: Path) -> None:
    it = Served(tiny_model, GROW, watermark=0.25).running(10)
    it.add("b", 5)
    assert it.step() == []
    assert it.reader.read().keep_tokens == 5 * BLOCK


def test_an_urgent_request_preempts_for_the_room_too(tiny_model: Path) -> None:
    it = Served(tiny_model, GROW, preempt=True).running(4)
    it.add("b", 4)
    assert it.step() == ["b"]
    it.add("urgent", 8, priority=HIGH)  # Ten are free, and three would run.
    it.step()
    assert {r.request_id for r in it.scheduler.running} == {"a", "urgent"}


def test_it_preempts_none_for_the_room_of_another_that_is_passed_over(tiny_model: Path) -> None:
    it = Served(tiny_model, GROW, preempt=True).running(4)
    it.add("b", 4)
    assert it.step() == ["b"]
    first = it.add("first", 2, priority=HIGH)
    first.num_preemptions = 1  # It leaves twice as much.
    first.num_stale_output_tokens = 1
    it.add("urgent", 7, priority=HIGH)  # Ten are free, and three would run.
    assert it.step() == ["urgent"]
    assert {r.request_id for r in it.scheduler.running} == {"a", "b", "urgent"}


def test_behind_a_head_that_does_not_fit_the_small_ones_start(tiny_model: Path) -> None:
    it = Served(tiny_model, PASS).running(10)
    it.add("head", 16)
    for name, blocks in (("b", 3), ("large", 12), ("c", 3)):
        it.add(name, blocks)
    assert it.step() == ["b", "c"]
    counts = it.reader.read()
    assert (counts.head_tokens, counts.passable) == (16 * BLOCK, True)
    assert counts.waiting_least == 12 * BLOCK
    assert [r.request_id for r in it.scheduler.waiting] == ["head", "large"]


def test_without_the_rule_all_wait(tiny_model: Path) -> None:
    it = Served(tiny_model, GROW).running(10)
    it.add("head", 16)
    it.add("b", 1)
    assert it.step() == []
    assert not it.reader.read().passable


def test_a_head_is_passed_by_half_of_its_tokens_at_most_however_long_it_waits(
    tiny_model: Path,
) -> None:
    it = Served(tiny_model, PASS).running(10)
    it.add("head", 12)
    started: list[str] = []
    for number in range(30):
        it.add(f"b{number}", 1, answer=1)
        started += it.step()
    assert started == [f"b{number}" for number in range(6)]
    assert not it.reader.read().passable


def test_a_head_is_passed_for_20_s_at_most(tiny_model: Path) -> None:
    it = Served(tiny_model, PASS).running(10)
    it.add("head", 16)
    it.step()
    it.now_s += 19.7
    it.add("b", 1)
    assert it.step() == ["b"]
    it.now_s += 0.2
    it.add("c", 1)
    assert it.step() == []
    assert not it.reader.read().passable


def test_a_head_that_is_held_up_ages_as_the_others_do(tiny_model: Path) -> None:
    it = Served(tiny_model, ALL).running(10)
    head, other = it.add("head", 16), it.add("other", 15)
    it.step()
    it.now_s += 40
    it.step()
    assert (head.priority, other.priority) == (HIGH, HIGH)
    it.add("urgent", 16, priority=HIGH)
    assert it.waiting() == ["head", "other", "urgent"]


def test_one_that_has_aged_is_no_longer_queued_later_for_its_long_prompt(tiny_model: Path) -> None:
    it = Served(tiny_model, replace(SHORT, short_first=1000.0), max_num_seqs=1, aging_s=5.0)
    it.running(4).takes(1 / 600)
    it.add("long", 12)
    it.now_s += 6
    it.queueing.look()
    it.came += 8  # Less than the 20 s that the prompt is queued later.
    urgent = it.add("urgent", 1, priority=HIGH)
    urgent.llumnix_later_s = 0.0
    it.queueing._queue.queue_again(urgent)
    assert it.waiting() == ["long", "urgent"]


def test_no_request_of_another_class_passes(tiny_model: Path) -> None:
    it = Served(tiny_model, replace(PASS, pass_s=50.0)).running(10)
    it.add("urgent", 16, priority=HIGH)
    it.add("b", 1)
    assert it.step() == []
    it.now_s += 31  # It has aged, and is queued as one of the urgent class.
    it.add("urgent-2", 1, priority=HIGH)
    assert it.step() == ["urgent-2"]


def test_a_cached_prompt_counts_for_what_it_takes(tiny_model: Path) -> None:
    it = Served(tiny_model, BOTH).running(10)
    it.add("head", 16)
    options: dict[str, Any] = {"priority": NORMAL, "arrival_time": 50}
    it.reader.arrived(add(it.core, "like-a", [1, *range(1, 10 * BLOCK), 5], 9, **options))
    assert it.step() == ["like-a"]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_short_prompt_starts_before_a_long_one_that_came_just_before(
    tiny_model: Path, ahead: bool
) -> None:
    # The long prompt's tokens are taken for 0.8 s. Requests come a second apart.
    for rules, first in ((SHORT, "short"), (PASS, "long")):
        it = Served(tiny_model, rules, blocks=100, max_num_seqs=1, ahead=ahead)
        a = it.add("a", 4)
        while not a.num_output_tokens:
            it.step()
        it.takes(1 / 600).add("long", 30)
        it.add("short", 2)
        it.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
        assert it.step() == [first]
        arrivals = [r.arrival_time for r in it.scheduler.requests.values()]
        assert sorted(arrivals) == [2, 3], "vLLM preempts by it"


def test_but_not_if_it_comes_later_than_four_times_what_the_long_one_takes(
    tiny_model: Path,
) -> None:
    it = Served(tiny_model, SHORT, blocks=100, max_num_seqs=1).running(4)
    it.takes(1 / 600).add("long", 30)
    it.came += 1
    it.add("in time", 2)
    it.came += 1
    it.add("late", 1)
    assert [r.request_id for r in it.scheduler.waiting] == ["in time", "long", "late"]


def test_what_is_in_the_prefix_cache_makes_no_prompt_long(tiny_model: Path) -> None:
    it = Served(tiny_model, SHORT, blocks=100, max_num_seqs=1).running(30).takes(1 / 4800)
    options: dict[str, Any] = {"priority": NORMAL, "arrival_time": 2}
    for name, first in (("like-a", 1), ("other", 2)):
        add(it.core, name, [first, *range(1, 30 * BLOCK), 5], 9, **options)
    options["arrival_time"] = 2.1  # The other's prompt is taken for 0.1 s, this for 0.03 s.
    add(it.core, "short", [3, *range(1, 10 * BLOCK)], 9, **options)
    assert [r.request_id for r in it.scheduler.waiting] == ["like-a", "short", "other"]


def test_one_that_was_preempted_keeps_its_place(tiny_model: Path) -> None:
    it = Served(tiny_model, SHORT, blocks=100, max_num_seqs=1).running(30).takes(1 / 4800)
    it.add("short", 1)
    (a,) = it.scheduler.running
    it.scheduler.running.remove(a)
    it.scheduler._preempt_request(a, 0.0)
    assert [r.request_id for r in it.scheduler.waiting] == ["a", "short"]


def test_a_head_that_memory_holds_up_is_passed_within_the_bounds_of_passing_alone(
    tiny_model: Path,
) -> None:
    # Its own prompt is taken for seconds, so that by arrival alone the others would go before it.
    it = Served(tiny_model, replace(SHORT, short_first=100.0)).running(10).takes(1 / 600)
    it.add("head", 12)
    started = it.step()
    for number in range(10):
        it.add(f"b{number}", 1, answer=1)
        started += it.step()
    assert started == [f"b{number}" for number in range(6)], "half of the head's blocks"


def test_one_that_waits_for_something_else_is_no_blocked_head(tiny_model: Path) -> None:
    it = Served(tiny_model, PASS).running(10)
    head = it.add("head", 16)
    head.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    it.add("b", 1)
    it.scheduler.waiting.peek_request()
    assert it.scheduler.waiting.peek_request() is head


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_in_no_world_is_a_head_passed_by_more_or_the_batch_short_of_memory(
    tiny_model: Path, seed: int, ahead: bool
) -> None:
    """Looked at from outside. All are served in the end."""
    dice = random.Random(f"{seed} starts")
    blocks = dice.randrange(20, 60)
    it = Served(tiny_model, ALL, blocks=blocks, ahead=ahead, enable_prefix_caching=False)
    left, step, calm_until, passes, preempted = 120, 0, -1, 0, 0
    passed: dict[str, tuple[float, int]] = {}
    while left or it.scheduler.requests:
        if left and dice.random() < 0.15:
            left -= 1
            size = min(dice.choice((1, 2, 3, 12, 18)), blocks - 6)
            it.add(f"r{left}", size, dice.randrange(1, 70), dice.choice((0, 0, 0, HIGH)))
        it.queueing.look()
        queue, now_s = list(it.scheduler.waiting), it.now_s
        sizes = {r: -(-r.num_tokens // BLOCK) * BLOCK for r in queue}
        ran = bool(it.scheduler.running)
        it.step()
        step += 1
        assert step < 20_000
        waiting = {r.request_id for r in it.scheduler.waiting}
        started = [r for r in queue if r.request_id not in waiting]
        head = next((r for r in queue if r.request_id in waiting), None)
        behind = [] if head is None else queue[queue.index(head) + 1 :]
        passing = [r for r in started if r in behind]
        if head is not None and passing:
            passes += len(passing)
            key = f"{head.request_id} {head.num_preemptions}"
            since_s, tokens = passed.get(key, (now_s, 0))
            passed[key] = since_s, tokens + sum(sizes[r] for r in passing)
            assert passed[key][1] <= 0.5 * sizes[head]
            assert now_s - since_s <= 20 + 1e-9
        counts = it.reader.read()
        if counts.preemptions > preempted:
            assert step > calm_until, "what started had no room to grow"
        preempted = counts.preemptions
        if started:
            calm_until = step + BLOCK if ran else -1
    assert passes
