"""SCLS as published: batches of a pool, and which instance serves them."""

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.core.slices.published import (
    INTERVAL_MIN_S,
    STATIC,
    SliceCost,
    batches,
    interval,
    most,
    offload,
    served,
)
from llumnix.errors import UsageError

COST = SliceCost(
    step_s=0.03, request_s=0.0003, context_s=1.5e-6, prompt_s=1e-4, prompt_context_s=2e-8
)


def cuts(count: int) -> list[list[int]]:
    """All ways to cut so many requests into batches."""
    if not count:
        return [[]]
    return [[size, *rest] for size in range(1, count + 1) for rest in cuts(count - size)]


def seconds(lengths: list[int], sizes: list[int], slice_tokens: int) -> float:
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    each = zip(sizes, ends, strict=True)
    return sum(COST.seconds(size, lengths[end - 1], slice_tokens) for size, end in each)


@given(
    lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=10),
    slice_tokens=st.integers(1, 300),
    kv_tokens=st.integers(100, 12_000),
    limit=st.sampled_from([0, 1, 3]),
)
def test_no_other_batches_take_less_time(
    lengths: list[int], slice_tokens: int, kv_tokens: int, limit: int
) -> None:
    lengths.sort()
    found = batches(lengths, slice_tokens, kv_tokens, COST, limit)
    fit = []
    for sizes in cuts(len(lengths)):
        ends = [lengths[sum(sizes[: n + 1]) - 1] for n in range(len(sizes))]
        largest = [most(end, slice_tokens, kv_tokens) for end in ends]
        if all(s <= m and s <= (limit or s) for s, m in zip(sizes, largest, strict=True)):
            fit.append(sizes)
    assert found in fit
    least = min(seconds(lengths, sizes, slice_tokens) for sizes in fit)
    assert seconds(lengths, found, slice_tokens) == pytest.approx(least)


def test_two_thousand_requests_are_cut_within_a_second() -> None:
    dice = random.Random(1)
    lengths = sorted(dice.randrange(1, 2000) for _ in range(2000))
    began = time.process_time()
    sizes = batches(lengths, 128, 40_000, COST)
    assert time.process_time() - began < 1.0
    assert sum(sizes) == 2000


def test_a_request_that_fits_nowhere_is_a_batch_of_its_own() -> None:
    assert batches([10, 10, 5000], 128, 1000, COST) == [2, 1]


def test_the_longest_batch_goes_first_to_the_least_loaded() -> None:
    assert offload([1.0, 5.0, 2.5], [0.0, 3.0]) == [0, 0, 1]
    assert offload([], [1.0]) == []


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.lists(st.floats(0, 50), max_size=20))
def test_no_instance_is_ahead_by_more_than_its_last_batch(
    loads: list[float], estimates: list[float]
) -> None:
    places = offload(estimates, loads)
    after = list(loads)
    for place, estimate in zip(places, estimates, strict=True):
        after[place] += estimate
    for instance in set(places):
        last = min(e for p, e in zip(places, estimates, strict=True) if p == instance)
        assert after[instance] - last <= min(after) + 1e-9


def test_the_pool_is_looked_at_the_less_often_the_more_there_is_to_do() -> None:
    assert interval([0.0, 90.0]) == INTERVAL_MIN_S
    assert interval([20.0, 90.0]) == 10.0


def test_each_policy_has_one_idea_more_than_the_one_before() -> None:
    ideas = [
        (rules.slices, rules.sorted, rules.by_memory, rules.max_min, rules.by_load)
        for rules in STATIC.values()
    ]
    assert [sum(i) for i in ideas] == list(range(6))
    assert all(sum(a != b for a, b in zip(x, y, strict=True)) == 1 for x, y in pairwise(ideas))


@pytest.mark.parametrize("policy", STATIC)
def test_no_engine_has_them(policy: str) -> None:
    with pytest.raises(UsageError, match=rf"policy {policy}: it is simulated only"):
        served(policy)
    assert served("scls") == "scls"
