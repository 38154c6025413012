"""What a simulated engine does, step by step, against vLLM's rules."""

import pytest

from llumnix.core.types import RequestId
from llumnix.sim.model.engine import SimEngine
from llumnix.sim.model.jobs import Batch, Job
from llumnix.sim.model.memory import Memory
from sim.one_engine import engine


def job(name: str, prompt: int, answer: int, arrived_s: float = 0.0, priority: int = 0) -> Job:
    return Job(
        id=RequestId(name), arrived_s=arrived_s, prompt=prompt, answer=answer, priority=priority
    )


def scheduled(batch: Batch | None) -> list[tuple[str, int]]:
    assert batch is not None
    return [(str(seq.job.id), new) for seq, new in batch.scheduled]


def live(it: SimEngine, steps: int, now: float = 0.0) -> list[list[tuple[str, int]]]:
    """Makes steps; what each computed of whom."""
    made = []
    for _ in range(steps):
        batch = it.schedule(now)
        if batch is None:
            break
        made.append(scheduled(batch))
        now += batch.seconds
        it.land(batch, now)
    return made


def test_a_prompt_is_computed_then_a_token_a_step() -> None:
    it = engine()
    it.add(job("a", 20, 3), 0.0)
    assert live(it, 9) == [[("a", 20)], [("a", 1)], [("a", 1)]]
    assert it.memory.free == it.memory.total
    assert (it.finished, it.finished_tokens) == (1, 3)


def test_a_long_prompt_is_cut_to_the_budget_and_those_that_run_go_first() -> None:
    it = engine(budget=16)
    it.add(job("a", 10, 9), 0.0)
    it.add(job("b", 40, 2), 0.0)
    assert live(it, 4) == [
        [("a", 10), ("b", 6)],
        [("a", 1), ("b", 15)],
        [("a", 1), ("b", 15)],
        [("a", 1), ("b", 4)],
    ]


def test_what_a_prompt_has_left_has_no_memory_yet() -> None:
    it = engine(budget=16)
    it.add(job("a", 10, 9), 0.0)
    it.add(job("b", 40, 2), 0.0)
    left = []
    for _ in range(4):
        batch = it.schedule(0.0)
        assert batch is not None
        left.append(it.prefill_tokens())
        it.land(batch, 0.0)
    assert left == [24, 8, 0, 0], "in whole blocks"


def test_near_a_handover_prompts_wait_for_eight_steps_in_a_row_and_no_more() -> None:
    it = engine(budget=16)
    it.add(job("a", 10, 40), 0.0)
    it.land(it.schedule(0.0), 0.0)  # type: ignore[arg-type]
    it.add(job("b", 70, 2), 0.0)
    steps = []
    for _ in range(10):
        batch = it.schedule(0.0, defer=True)
        steps.append(scheduled(batch))
        it.land(batch, 0.0)  # type: ignore[arg-type]
    with_prompt = [("a", 1), ("b", 15)]
    assert steps == [[("a", 1)]] * 8 + [with_prompt, [("a", 1)]]
    assert scheduled(it.schedule(0.0)) == with_prompt, "the rest of a prompt waits likewise"


def test_prompts_are_not_put_off_where_nothing_decodes_or_more_wait_than_a_step_admits() -> None:
    it = engine(budget=16)
    it.add(job("a", 20, 9), 0.0)
    assert scheduled(it.schedule(0.0, defer=True)) == [("a", 16)]
    it = engine(slots=1)
    it.add(job("a", 10, 40), 0.0)
    it.add(job("b", 10, 40), 0.0)
    it.land(it.schedule(0.0), 0.0)  # type: ignore[arg-type]
    it.schedule(0.0, defer=True)
    assert not it.quiet


def test_without_chunks_prompts_are_computed_alone_and_whole() -> None:
    it = engine(budget=64, chunked=False)
    it.add(job("a", 20, 3), 0.0)
    assert live(it, 2) == [[("a", 20)], [("a", 1)]]
    it.add(job("b", 30, 2), 0.1)
    it.add(job("c", 30, 2), 0.1)
    it.add(job("d", 30, 2), 0.2)
    assert live(it, 3) == [
        [("b", 30), ("c", 30)],
        [("d", 30)],
        [("a", 1), ("b", 1), ("c", 1), ("d", 1)],
    ]


def test_a_head_that_does_not_fit_holds_up_all_behind_it() -> None:
    it = engine()
    it.add(job("a", 100, 5), 0.0)
    it.add(job("b", 70, 5), 0.1)
    it.add(job("c", 5, 5), 0.2)
    assert live(it, 2) == [[("a", 100)], [("a", 1)]]
    assert it.head_tokens() == 80
    assert it.waiting() == 2


def test_urgent_requests_start_first() -> None:
    it = engine(slots=1)
    it.add(job("a", 5, 1), 0.0)
    it.add(job("b", 5, 1, arrived_s=1.0, priority=-100), 0.0)
    assert live(it, 2) == [[("b", 5)], [("a", 5)]]


def urgent(name: str, prompt: int, answer: int = 1) -> Job:
    return job(name, prompt, answer, arrived_s=5.0, priority=-100)


def test_an_urgent_request_takes_a_slot_from_the_latest_of_a_less_urgent_class() -> None:
    it = engine(slots=2)
    it.add(job("a", 5, 9), 0.0)
    it.add(job("b", 5, 9, arrived_s=1.0), 0.0)
    live(it, 1)
    it.add(urgent("now", 5), 0.0)
    assert live(it, 1) == [[("a", 1), ("now", 5)]]
    it.add(job("c", 5, 9, arrived_s=2.0), 0.0)
    assert it.preemptions == 1, "nobody is preempted for its like"


def test_an_urgent_request_takes_the_memory_that_it_needs_and_no_more() -> None:
    it = engine(prefix_caching=False)
    for n in range(3):
        it.add(job(f"low-{n}", 45, 60, arrived_s=float(n)), 0.0)
    live(it, 1)
    assert it.memory.free == 1
    it.add(urgent("now", 40), 0.0)
    assert live(it, 1) == [[("low-0", 1), ("low-1", 1), ("now", 40)]]
    it.add(urgent("huge", 200), 0.0)
    live(it, 1)
    assert it.preemptions == 1, "nobody is preempted in vain"


def test_an_urgent_request_does_not_wait_for_a_long_prompt() -> None:
    it = engine(budget=32)
    it.add(job("chat", 10, 9), 0.0)
    live(it, 1)
    it.add(job("long", 100, 9, arrived_s=1.0), 0.0)
    assert live(it, 1) == [[("chat", 1), ("long", 31)]]
    it.add(urgent("now", 20), 0.0)
    # It takes its place in the queue again, finds what it computed, and gets what is left.
    assert live(it, 1) == [[("chat", 1), ("now", 20), ("long", 11)]]


def test_a_request_that_has_waited_for_long_is_as_urgent_as_any() -> None:
    it = engine(slots=1)
    it.add(job("a", 5, 1), 0.0)
    it.add(job("b", 5, 1, arrived_s=1.0, priority=-100), 31.0)
    assert live(it, 2, now=32.0) == [[("a", 5)], [("b", 5)]]


def test_memory_that_runs_out_preempts_the_youngest_which_comes_back_first() -> None:
    it = engine(prefix_caching=False)
    it.add(job("a", 78, 60), 0.0)
    it.add(job("b", 78, 60, arrived_s=1.0), 0.0)
    it.add(job("c", 30, 2, arrived_s=2.0), 0.0)
    made = live(it, 4)
    # Two of 78 and one token fill all ten blocks; the next block of either is one too many.
    assert made[:3] == [[("a", 78), ("b", 78)], [("a", 1), ("b", 1)], [("a", 1), ("b", 1)]]
    assert made[3] == [("a", 1)]
    assert it.preemptions == 1
    assert [str(s.job.id) for _, _, s in it._queue] == ["b", "c"]
    assert it.memory.free == 10 - 6


def test_a_preempted_request_finds_what_nobody_has_overwritten() -> None:
    it = engine()
    first, second = job("a", 78, 6), job("b", 78, 60, arrived_s=1.0)
    it.add(first, 0.0)
    it.add(second, 0.0)
    live(it, 6)
    assert second.preemptions == 1
    # Its last block, which was not full and cannot be found, was freed first and is what the other
    # took; the four full ones are still there.
    batch = it.schedule(1.0)
    assert scheduled(batch) == [("b", 81 - 64)]


def test_a_step_costs_what_the_profile_says() -> None:
    it = engine()
    it.add(job("a", 20, 5), 0.0)
    first = it.schedule(0.0)
    assert first is not None
    assert first.seconds == pytest.approx(0.01 + 20 * 0.0001)
    it.land(first, 0.0)
    second = it.schedule(0.0)
    assert second is not None
    assert second.seconds == pytest.approx(0.01 + 0.001 + 21 * 0.00001)


def test_prompts_share_blocks_that_are_there() -> None:
    it = engine()
    shared = {"prefix": (7, 8), "prefix_blocks": 2}
    for name in ("a", "b"):
        it.add(Job(id=RequestId(name), arrived_s=0.0, prompt=70, answer=4, **shared), 0.0)  # type: ignore[arg-type]
    made = live(it, 1)
    assert made == [[("a", 70), ("b", 70)]]  # At once, so neither knew of the other.
    live(it, 9)
    assert it.memory.free == it.memory.total
    it.add(Job(id=RequestId("c"), arrived_s=1.0, prompt=70, answer=2, **shared), 1.0)  # type: ignore[arg-type]
    assert live(it, 1) == [[("c", 6)]]


def test_cached_blocks_go_in_the_order_in_which_they_were_freed() -> None:
    memory = Memory(10, caching=True)
    memory.take(4)
    assert memory.publish([1, 2]) == [1, 2]
    memory.unhold([1, 2], 2)
    assert memory.hits([1, 2, 3]) == 2
    memory.take(6)  # All that lay before them.
    assert memory.hits([1, 2]) == 2
    memory.take(2)
    assert memory.hits([1, 2]) == 1  # The last of a prefix is the first to go.
    memory.take(2)
    assert memory.hits([1, 2]) == 0


def test_a_step_ends_where_a_request_preempts_itself() -> None:
    """The second of the batch is the youngest, and wants a block when there is none."""
    it = engine(prefix_caching=False)
    it.add(job("a", 4, 40, 0.0), 0.0)
    it.add(job("young", 15, 40, 0.9), 0.0)
    live(it, 1)
    it.add(job("b", 4, 40, 0.5), 0.1)
    assert live(it, 1, 0.1) == [[("a", 1), ("young", 1), ("b", 4)]]
    it.memory.take(it.memory.free)
    assert live(it, 2, 0.2) == [[("a", 1)], [("a", 1), ("b", 1)]]
    assert not it.requests[RequestId("young")].running


@pytest.mark.parametrize("chunked", [True, False])
def test_a_step_with_nothing_in_it_is_over_at_once(chunked: bool) -> None:
    """The first of the batch preempts itself: the next step begins as any other, so without chunks
    the prompt that waits is computed alone."""
    it = engine(chunked=chunked, prefix_caching=False)
    it.add(job("first", 15, 40, 0.9), 0.0)
    live(it, 1)
    it.add(job("urgent", 4, 40, 0.0, -100), 0.1)
    live(it, 1 if chunked else 2, 0.1)
    assert it.requests[RequestId("first")].computed == 16
    it.memory.take(it.memory.free)
    it.add(job("waits", 4, 40, 0.5, -100), 0.2)
    with_prompt = [("urgent", 1), ("waits", 4)] if chunked else [("waits", 4)]
    assert live(it, 2, 0.2) == [with_prompt, [("urgent", 1), ("waits", 1)]]
    assert not it.requests[RequestId("first")].running
