"""Which request of a simulated engine starts next where memory is short."""

import random
from dataclasses import replace

import pytest

from llumnix.core.events import Decision
from llumnix.core.queue_rules import AGAIN, PLAIN, QueueRules
from llumnix.core.settings import (
    PriorityClass,
    PrioritySettings,
    QueueSettings,
    SchedulerSettings,
)
from llumnix.core.types import RequestId
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.cluster import Cluster
from llumnix.sim.model.jobs import Job, Sequence
from llumnix.sim.model.profile import Profile
from sim import one_engine
from sim.recorded_runs import MANY_MOVES, spec
from support.prompt_times import teach

BLOCK = 16
PROFILE = replace(one_engine.PROFILE, step_s=0.1, kv_tokens=20 * BLOCK)
GROW = replace(PLAIN, growth=1)
PASS = replace(PLAIN, passers=8, pass_s=20.0, pass_share=0.5)
BOTH = replace(PASS, growth=1)
SHORT = replace(PASS, short_first=4.0)
ALL = replace(SHORT, growth=1)
CLASSES = PrioritySettings(
    classes=(
        PriorityClass(name="high", priority=-100, headroom=0.5),
        PriorityClass(name="normal", priority=0),
    ),
    preempt=False,
)


class Served:
    """An engine that makes its steps one after the other."""

    def __init__(self, rules: QueueRules, profile: Profile = PROFILE, **options: int) -> None:
        self.engine = one_engine.engine(rules, profile, CLASSES, **options)
        self.now = 0.0

    def takes(self, token_s: float) -> "Served":
        """It, where a prompt is known to take so many seconds a token."""
        teach(self.engine._prompt_timer, token_s)
        return self

    def add(self, name: str, blocks: int, answer: int = 100, priority: int = 0) -> Job:
        """A request that needs so many whole blocks to start."""
        job = Job(
            id=RequestId(name),
            arrived_s=self.now,
            prompt=blocks * BLOCK,
            answer=answer,
            priority=priority,
        )
        self.engine.add(job, self.now)
        return job

    def running(self, blocks: int) -> "Served":
        """It, with a request under way that needs so many blocks."""
        self.add("a", blocks)
        assert self.step() == ["a"]
        return self

    def step(self) -> list[str]:
        """One step; the requests that it started."""
        before = list(self.engine.running)
        batch = self.engine.schedule(self.now)
        started = [str(s.job.id) for s in self.engine.running if s not in before]
        self.now += 0.0 if batch is None else batch.seconds
        if batch is not None:
            self.engine.land(batch, self.now)
        return started


# -- room to grow


@pytest.mark.parametrize(("blocks", "starts"), [(13, True), (14, False)])
def test_a_request_starts_only_if_all_that_run_can_take_a_block_more(
    blocks: int, starts: bool
) -> None:
    it = Served(GROW).running(4)
    it.add("b", blocks)
    # Of 20 blocks the first has five, since its answer has begun; each of the two may grow by one.
    assert it.step() == (["b"] if starts else [])
    assert it.engine.counts().keep_tokens == (0 if starts else 2 * BLOCK)


@pytest.mark.parametrize(("blocks", "starts"), [(11, True), (12, False)])
def test_one_that_was_preempted_leaves_twice_as_much(blocks: int, starts: bool) -> None:
    it = Served(GROW).running(4)
    it.add("b", blocks)
    it.engine.requests[RequestId("b")].preemptions = 1
    assert it.step() == (["b"] if starts else [])
    assert AGAIN == 2


def test_an_engine_that_runs_nothing_starts_whatever_fits() -> None:
    it = Served(GROW)
    it.add("a", 20)
    assert it.step() == ["a"]


def test_one_that_comes_with_its_kv_waits_for_no_room() -> None:
    it = Served(GROW).running(10)
    moved = it.add("moved", 9)
    seq = it.engine.requests[moved.id]
    it.engine.stop(moved.id)
    it.engine.memory.take(9)
    seq.blocks, seq.computed = 9, 9 * BLOCK - 1
    it.engine.resume(moved.id)
    assert it.step() == ["moved"]


# -- bounded passing


def test_behind_a_head_that_does_not_fit_the_small_ones_start() -> None:
    it = Served(PASS).running(10)
    it.add("head", 16)
    for name, blocks in (("b", 3), ("large", 12), ("c", 3)):
        it.add(name, blocks)
    assert it.step() == ["b", "c"]
    assert it.engine.counts().head_tokens == 16 * BLOCK, "the head stays where it is"


def test_without_the_rule_all_wait() -> None:
    it = Served(GROW).running(10)
    it.add("head", 16)
    it.add("b", 1)
    assert it.step() == []
    assert not it.engine.counts().passable


def test_a_head_is_passed_by_half_of_its_tokens_at_most_however_long_it_waits() -> None:
    it = Served(PASS).running(10)
    it.add("head", 12)
    started = []
    for number in range(30):
        it.add(f"b{number}", 1, answer=1)
        started += it.step()
        assert it.engine.counts().passable == (len(started) < 6)
    assert started == [f"b{number}" for number in range(6)]


def test_what_passed_a_head_counts_though_an_urgent_one_was_before_it_for_a_while() -> None:
    it = Served(PASS).running(10)
    it.add("head", 12)
    for number in range(4):
        it.add(f"b{number}", 1, answer=1)
    assert it.step() == ["b0", "b1", "b2", "b3"]
    it.add("urgent", 11, priority=-100)
    it.step()
    it.engine.abort(RequestId("urgent"))
    for number in range(4):
        it.add(f"c{number}", 1, answer=1)
    assert it.step() == ["c0", "c1"]


def test_a_head_is_passed_for_20_s_at_most() -> None:
    it = Served(PASS, replace(PROFILE, step_s=1.0)).running(10)
    it.add("head", 18)
    since_s = it.now
    last_s = 0.0
    while it.now < since_s + 30:
        it.add(f"b{it.now}", 1, answer=1)
        began_s = it.now
        if it.step():
            last_s = began_s - since_s
        it.engine.requests[RequestId("head")].wait.passed_tokens = 0  # type: ignore[union-attr]
    assert 19 < last_s <= 20
    assert not it.engine.counts().passable


def test_no_request_of_another_class_passes() -> None:
    it = Served(replace(PASS, pass_s=50.0)).running(10)
    it.add("urgent", 16, priority=-100)
    it.add("b", 1)
    assert it.step() == []
    it.now += 31  # It has aged, and is queued as one of the urgent class.
    it.add("urgent-2", 1, priority=-100)
    assert it.step() == ["urgent-2"]


def test_who_passes_leaves_room_to_grow_too() -> None:
    it = Served(BOTH).running(10)
    it.add("head", 16)
    it.add("b", 8)  # Nine blocks are free, and both may grow by one.
    it.add("c", 7)
    assert it.step() == ["c"]


# -- short prompts first


def long_and_short(rules: QueueRules, gap_s: float) -> list[str]:
    """What starts, step by step, where a long prompt has come, and a short one `gap_s` later,
    while nothing but a place in the batch is missing."""
    it = Served(rules, replace(PROFILE, kv_tokens=100 * BLOCK), slots=1).running(4)
    it.takes(1 / 600)
    it.add("long", 30)
    it.now += gap_s
    it.add("short", 2)
    it.engine.abort(RequestId("a"))
    started = it.step()
    it.engine.abort(RequestId(started[0]))
    return [*started, *it.step()]


def test_a_short_prompt_starts_before_a_long_one_that_came_just_before() -> None:
    assert long_and_short(SHORT, 1.0) == ["short", "long"]
    assert long_and_short(PASS, 1.0) == ["long", "short"]


def test_but_not_if_it_comes_later_than_four_times_what_the_long_one_takes() -> None:
    # The long prompt's 480 tokens are taken for 0.8 s, and the short one's for 0.05 s.
    assert long_and_short(SHORT, 2.9) == ["short", "long"]
    assert long_and_short(SHORT, 3.3) == ["long", "short"]
    assert long_and_short(replace(SHORT, pass_s=2.0), 2.9) == ["long", "short"]


def test_what_is_in_the_prefix_cache_makes_no_prompt_long() -> None:
    it = Served(SHORT, replace(PROFILE, kv_tokens=100 * BLOCK), slots=1).takes(1 / 600)
    shared = {"prefix": tuple(range(28)), "prefix_blocks": 1}
    for name, more in (("first", shared), ("long", shared), ("middle", {})):
        blocks = 10 if name == "middle" else 30
        job = Job(id=RequestId(name), arrived_s=it.now, prompt=blocks * BLOCK, answer=9, **more)
        it.engine.add(job, it.now)
        if name == "first":
            assert it.step() == ["first"]
            it.now += 1.0
    it.engine.abort(RequestId("first"))
    assert it.step() == ["long"]


def test_one_that_was_preempted_keeps_its_place() -> None:
    it = Served(SHORT, replace(PROFILE, kv_tokens=100 * BLOCK), slots=2).running(30)
    it.takes(1 / 600)
    it.add("b", 2)
    assert it.step() == ["b"]
    seq = it.engine.requests[RequestId("a")]
    it.engine._preempt(seq, it.now)
    it.add("short", 1)
    assert it.step() == ["a"]
    assert seq.later_s == 0


def test_a_head_that_memory_holds_up_is_passed_within_the_bounds_of_passing_alone() -> None:
    it = Served(SHORT).running(10).takes(1 / 100)
    it.add("head", 12)
    assert it.step() == []
    started = []
    for number in range(10):
        it.add(f"b{number}", 1, answer=1)
        started += it.step()
    assert started == [f"b{number}" for number in range(6)], "half of the head's blocks"


# -- whatever comes


PROMPT_S = 0.01
"""What a token of a prompt takes in the world below."""


def needed(seq: Sequence) -> int:
    return -(-seq.tokens // BLOCK) * BLOCK


@pytest.mark.parametrize("seed", range(12))
def test_in_no_world_is_a_head_passed_by_more_or_the_batch_short_of_memory(seed: int) -> None:
    """Requests of two classes at an engine that is short of memory, step by step, looked at from
    outside. All are served in the end."""
    dice = random.Random(f"{seed} queue rules")
    profile = replace(PROFILE, kv_tokens=dice.randrange(20, 60) * BLOCK, prompt_s=PROMPT_S)
    options = {"chunked": dice.random() < 0.5, "budget": dice.choice((64, 2048)), "slots": 12}
    it = Served(ALL, profile, prefix_caching=False, **options)
    total, left = it.engine.memory.total, 150
    passed: dict[tuple[str, int], tuple[float, int]] = {}
    calm_until, step = -1, 0
    passes = calm = overtaken = 0
    while left or it.engine.requests:
        if left and dice.random() < 0.15:
            left -= 1
            blocks = min(dice.choice((1, 2, 3, 12, 18)), total - 6)
            it.add(f"r{left}", blocks, dice.randrange(1, 70), dice.choice((0, 0, 0, -100)))
        queue = [seq for _, _, seq in it.engine._queue]
        sizes = {seq: needed(seq) for seq in queue}
        later_s = {seq: seq.later_s for seq in queue}
        running, preemptions, now = list(it.engine.running), it.engine.preemptions, it.now
        it.step()
        step += 1
        # Some may have aged just before the step.
        queue.sort(key=lambda s: (s.turn.priority, s.turn.arrived_s + later_s[s]))
        waiting = {s for _, _, s in it.engine._queue}
        started = [s for s in queue if s not in waiting]
        head = next((s for s in queue if s in waiting), None)
        behind = [] if head is None else queue[queue.index(head) + 1 :]
        passing = [s for s in started if s in behind]
        if head is not None and passing:
            passes += len(passing)
            key = (str(head.job.id), head.preemptions)
            since_s, tokens = passed.get(key, (now, 0))
            passed[key] = since_s, tokens + sum(sizes[s] for s in passing)
            assert passed[key][1] <= 0.5 * sizes[head]
            assert now - since_s <= 20 + 1e-9
            assert {s.job.priority for s in passing} == {head.job.priority}
        for seq in started:
            # What was preempted in this step was not there to be overtaken.
            for other in waiting.intersection(queue) if seq not in passing else ():
                if other.turn.priority == seq.turn.priority and not seq.preemptions:
                    bound_s = 4 * PROMPT_S * other.tokens
                    assert seq.job.arrived_s <= other.job.arrived_s + min(20.0, bound_s)
                    overtaken += seq.job.arrived_s > other.job.arrived_s
        if it.engine.preemptions > preemptions:
            assert step > calm_until, "what started had no room to grow"
        if started and running:
            calm_until = step + BLOCK
        elif started:
            calm_until = -1
        calm += step <= calm_until
        assert step < 20_000
    assert passes
    assert overtaken or seed == 2, "the queues of that world are short"
    assert calm > 100


def test_where_memory_is_not_short_the_rules_change_nothing() -> None:
    """Not one decision, and no request's time."""
    case = spec(engine=EngineOptions(kv_tokens=60_000), requests=250, rate_per_s=20.0, seed=3)
    off = QueueSettings(growth_blocks=0, passers=0, short_first=0.0)
    moving = replace(MANY_MOVES, source_below=8000.0, destination_above=8000.0)
    seen = []
    for queue, migration in ((QueueSettings(), moving), (off, replace(moving, rescues=0))):
        decided: list[str] = []
        scheduler = SchedulerSettings(queue=queue, migration=migration)
        one = replace(case, scheduler=scheduler)

        def record(now: float, what: object, decided: list[str] = decided) -> None:
            if isinstance(what, Decision):
                decided.append(f"{now:.6f} {what}")

        jobs, cluster = one.jobs(), Cluster(one.setup(), record=record)
        cluster.run(jobs)
        assert cluster.preemptions == 0
        seen.append((decided, [(j.first_s, j.ended_s) for j in jobs]))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) > 250 + 20, "and some moves"
