"""Slices in simulated engines: who starts, and what that saves."""

import random
from dataclasses import replace

import pytest

from llumnix.core.priorities import Priorities
from llumnix.core.queue_rules import PLAIN, QueueRules, SliceRules
from llumnix.core.settings import MigrationSettings, QueueSettings, SchedulerSettings
from llumnix.core.types import RequestId
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.cluster import Cluster
from llumnix.sim.model.jobs import Job, Sequence
from sim.test_cluster import SPEC
from sim.test_queue_rules import BLOCK, CLASSES, PASS, PROFILE, Served

SLICES = replace(PLAIN, slices=SliceRules(tokens=3 * BLOCK))
PASSED = replace(PASS, slices=SliceRules(tokens=3 * BLOCK))


@pytest.mark.parametrize(("blocks", "starts"), [(9, True), (10, False)])
def test_a_request_starts_only_if_its_slice_fits_beside_all_promises(
    blocks: int, starts: bool
) -> None:
    it = Served(SLICES).running(4)
    it.add("b", blocks)
    # Of 20 blocks the first has five and may take three more; the newcomer's slice is three too.
    assert it.step() == (["b"] if starts else [])
    assert it.engine.counts().keep_tokens == (0 if starts else 6 * BLOCK)


def test_several_that_start_at_once_count_with_their_promises() -> None:
    it = Served(SLICES).running(2)
    for name in "bcdefg":
        it.add(name, 1)
    # The first takes six in all, each of the others four.
    assert it.step() == ["b", "c", "d"]


def test_an_engine_that_runs_nothing_starts_whatever_fits() -> None:
    it = Served(SLICES)
    it.add("a", 20)
    assert it.step() == ["a"]


def test_room_to_grow_and_slices_go_together() -> None:
    it = Served(replace(SLICES, growth=4)).running(4)
    it.add("b", 9)
    assert it.step() == []
    assert it.engine.counts().keep_tokens == 8 * BLOCK


def test_one_that_holds_its_kv_or_arrives_has_a_promise_too() -> None:
    it = Served(SLICES).running(4)
    moved = it.add("moved", 3)
    assert it.step() == ["moved"]
    before = it.engine.promised()
    it.engine.stop(moved.id)
    it.step()
    it.engine.resume(moved.id)
    it.engine._promised = None
    assert it.engine.promised() == before
    # Of the next one 40 tokens are there, with memory for them; its slice needs three blocks more.
    job = Job(id=RequestId("in"), arrived_s=0.0, prompt=40, answer=50)
    it.engine._job_of = lambda _: job
    assert it.engine.reserve(job.id, b"", [], 40, []) == 0
    it.engine._promised = None
    assert it.engine.promised() == before + 3


def test_one_that_arrives_without_kv_is_promised_nothing() -> None:
    it = Served(SLICES).running(4)
    before = it.engine.promised()
    job = Job(id=RequestId("in"), arrived_s=0.0, prompt=40, answer=50)
    it.engine._job_of = lambda _: job
    assert it.engine.reserve(job.id, b"", [], 0, []) == 0
    it.engine._promised = None
    assert it.engine.promised() == before


def test_an_engine_learns_of_one_that_moves_on_and_of_one_that_moved_in() -> None:
    it = Served(replace(PLAIN, slices=SliceRules()))
    job = Job(id=RequestId("in"), arrived_s=0.0, prompt=40, answer=50)
    it.engine._job_of = lambda _: job
    assert it.engine.reserve(job.id, b"", [7] * 30, 70, []) == 0
    assert it.engine.commit(job.id, 69, b"") is None
    while job.id in it.engine.requests:
        it.step()
    it.add("a", 1, answer=90)
    for _ in range(24):
        it.step()
    it.engine.abort(RequestId("a"))
    assert it.engine.slices is not None
    left = it.engine.slices.lengths._all.left
    # Edges are 16, 23, 32, 45 and 64: the first came with 30 and had 50, the other left with 24.
    assert left[:5] == [1, 1, 1, 1, 1]


def _uncovered(sequences: list[Sequence], free: int) -> bool:
    """Whether those that run may take more than there is, as their slices stand."""
    left = 0
    for seq in sequences:
        assert seq.promise is not None
        left += max(0, seq.promise.blocks - seq.blocks)
    return left > free


@pytest.mark.parametrize("rules", [SLICES, PASSED])
@pytest.mark.parametrize("seed", range(20))
def test_while_all_slices_are_covered_nobody_is_preempted(rules: QueueRules, seed: int) -> None:
    """And what starts is covered; all are served in the end. Looked at from outside."""
    dice = random.Random(f"{seed} slices")
    blocks = dice.randrange(20, 60)
    it = Served(
        replace(rules, slices=SliceRules(tokens=dice.choice((0, 16, 48, 100)))),
        replace(PROFILE, kv_tokens=blocks * BLOCK),
        prefix_caching=False,
    )
    engine, left, steps, covered_steps = it.engine, 150, 0, 0
    while left or engine.requests:
        if left and dice.random() < 0.2:
            left -= 1
            size = min(dice.choice((1, 2, 3, 12)), blocks - 12)
            it.add(f"r{left}", size, 1 + min(150, int(dice.expovariate(1 / 50))))
        engine._promised = None
        engine.promised()  # Slices that are over are renewed, as the step would.
        covered = not _uncovered(engine.running, engine.memory.free)
        covered_steps += covered and len(engine.running) > 1
        preempted, ran = engine.preemptions, list(engine.running)
        started = it.step()
        assert not (covered and engine.preemptions > preempted)
        if started and ran:
            there = [s for s in engine.running if s.promise is not None]
            assert not _uncovered(there, engine.memory.free)
        steps += 1
        assert steps < 30_000
    assert covered_steps > 50


def test_slices_preempt_less_than_a_fixed_room_and_that_less_than_vllms_admission() -> None:
    off = QueueSettings(growth_blocks=0, passers=0)
    variants = (
        SchedulerSettings(policy="scls"),
        SchedulerSettings(),
        SchedulerSettings(queue=off, migration=MigrationSettings(rescues=0)),
    )
    found = []
    for settings in variants:
        spec = replace(
            SPEC,
            scheduler=settings,
            engine=EngineOptions(kv_tokens=13616),
            trace="sharegpt",
            scale=1.0,
            rate_per_s=0.7,
            cv=1.0,
            instances=1,
        )
        jobs, cluster = spec.jobs(), Cluster(spec.setup())
        cluster.run(jobs)
        assert all(job.ended_s is not None for job in jobs)
        found.append(cluster.preemptions)
    assert 2 * found[0] < found[1] < found[2], found


def test_a_watermark_is_kept_free_where_something_runs() -> None:
    for watermark, starts in ((0.0, ["b"]), (0.3, [])):
        it = Served(PLAIN).running(4)
        it.engine.options = replace(it.engine.options, watermark=watermark)
        it.add("b", 11)
        assert it.step() == starts
    it = Served(PLAIN)
    it.engine.options = replace(it.engine.options, watermark=0.3)
    it.add("a", 20)
    assert it.step() == ["a"]


def test_an_urgent_request_preempts_no_more_than_its_slice_needs() -> None:
    """The promises of those that are preempted for it count no more."""
    it = Served(SLICES)
    it.engine._priorities = Priorities(replace(CLASSES, preempt=True))
    for name in "abc":
        it.add(name, 2)
    it.step()
    # Its slice is three blocks more. Each of the others has two and is promised four.
    it.add("urgent", 5, priority=-100)
    it.step()
    assert it.engine.preemptions == 1
    assert str(it.engine.running[-1].job.id) == "urgent"


def test_an_answer_that_ends_is_learnt_and_one_that_is_aborted_is_not() -> None:
    it = Served(SLICES)
    for name in ("a", "b"):
        it.add(name, 1, answer=5)
        it.step()
    it.engine.abort(RequestId("b"))
    while it.engine.requests:
        it.step()
    slices = it.engine.slices
    assert slices is not None
    assert slices.lengths.answers == 1
