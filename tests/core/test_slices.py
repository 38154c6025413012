"""Promises of running requests (core/slices/promises.py)."""

import math

import pytest

from llumnix.core.queue_rules import SliceRules
from llumnix.core.slices.lengths import End
from llumnix.core.slices.promises import ANSWERS_MIN, SLICE_FIRST, SLICE_MAX, SLICE_MIN, Slices

BLOCK = 16
FAR = 10**9


def slices(tokens: int = 0, quantile: float = 0.8) -> Slices:
    return Slices(SliceRules(tokens=tokens, quantile=quantile), BLOCK)


def test_a_request_may_take_what_its_slice_needs() -> None:
    it = slices(tokens=64)
    assert it.first("", 10, 0, FAR) == 4  # Of five blocks one is there for its prompt.
    promise, left = it.left(None, "", 10, 0, 0, FAR)
    assert (promise.until, promise.blocks, left) == (64, 5, 5)
    # What it takes is taken off, and nothing else changes until the slice ends.
    assert it.left(promise, "", 10 + 30, 30, 3, FAR) == (promise, 2)
    assert it.left(promise, "", 10 + 63, 63, 5, FAR) == (promise, 0)


def test_at_its_end_a_slice_is_followed_by_the_next() -> None:
    it = slices(tokens=64)
    promise, _ = it.left(None, "", 10, 0, 1, FAR)
    again, left = it.left(promise, "", 10 + 64, 64, 5, FAR)
    assert (again.until, again.blocks, left) == (128, 9, 4)


def test_nothing_is_promised_beyond_the_requests_own_limit() -> None:
    it = slices(tokens=64)
    promise, left = it.left(None, "", 10, 0, 1, 20)
    assert (promise.until, left) == (20, 1)
    # One that goes on all the same takes one token after the other.
    assert it.left(promise, "", 10 + 20, 20, 2, 20)[0].until == 21


def test_a_slice_is_a_quarter_of_the_mean_answer_within_bounds() -> None:
    for answer, expected in ((1000, 250), (40, SLICE_MIN), (9000, SLICE_MAX)):
        it = slices()
        for number in range(ANSWERS_MIN - 1):
            it.gone(None, "", answer * (1 + number % 19) // 10, end=End.BY_ITSELF)
        assert it.slice_tokens() == SLICE_FIRST
        it.gone(None, "", answer, end=End.BY_ITSELF)
        assert it.slice_tokens() == pytest.approx(expected, rel=0.2)
    assert slices(tokens=77).slice_tokens() == 77


def test_a_slice_is_shorter_where_most_end_sooner() -> None:
    it = slices(tokens=512)
    for _ in range(100):
        it.gone(None, "", 100, end=End.BY_ITSELF)
    promise, _ = it.left(None, "", 10, 0, 1, FAR)
    assert 80 <= promise.until <= 130
    # Of those that came beyond nothing is known, so that the whole slice is promised.
    assert it.left(promise, "", 10 + 200, 200, 14, FAR)[0].until == 200 + 512


def test_renewals_tell_how_long_those_are_that_still_run() -> None:
    it = slices(tokens=64)
    for _ in range(100):
        it.gone(None, "", 100, end=End.BY_ITSELF)
    for _ in range(300):
        promise, _ = it.left(None, "", 10, 0, 1, FAR)
        for outputs in range(0, 400, 16):
            promise, _ = it.left(promise, "", 10 + outputs, outputs, 99, FAR)
    assert it.lengths.rest("", 0, 0.5) > 300


def test_answers_that_all_end_at_a_limit_are_as_long_as_it_at_least() -> None:
    """As those of a load test with `ignore_eos`, or of a model that always uses what it may."""
    it = slices()
    for number in range(2 * ANSWERS_MIN):
        it.gone(None, "", 2000, end=End.EARLY if number % 2 else End.AT_LIMIT)
        known = number >= 2 * ANSWERS_MIN - 2
        assert it.slice_tokens() == (pytest.approx(500, rel=0.3) if known else SLICE_FIRST)
    assert it.lengths.rest("", 0, 0.8) == math.inf


def test_one_that_was_cut_off_counts_as_far_as_it_came() -> None:
    """However many are cut off at a limit, those that end before it are not taken for all."""
    it = slices()
    for _ in range(100):
        it.gone(None, "", 100, end=End.BY_ITSELF)
    assert it.lengths.rest("", 0, 0.8) < 130
    for _ in range(900):
        it.gone(None, "", 400, end=End.EARLY)
    assert it.lengths.rest("", 0, 0.8) == math.inf
    assert it.lengths.answers == 100


@pytest.mark.parametrize("came", [0, 300])
def test_a_request_counts_from_where_it_began_here_also_if_nobody_waited_then(came: int) -> None:
    """Of those that end at 100 and those that go on, half are long, whenever they are looked at.
    Those that moved in as long ones tell nothing of how many become long."""
    it = slices(tokens=64)
    for _ in range(100):
        it.gone(None, "", 100, end=End.BY_ITSELF)
        promise, _ = it.left(None, "", 10 + 350, 350, 99, FAR, came)
        it.gone(promise, "", 500, came, end=End.BY_ITSELF)
    short = it.lengths.rest("", 0, 0.4)
    assert short < 130
    assert (it.lengths.rest("", 0, 0.6) > 300) is (came == 0)


def test_a_sessions_next_input_makes_its_promise_anew() -> None:
    it = slices(tokens=64)
    promise, _ = it.left(None, "", 16, 0, 1, FAR)
    # Thirty tokens later another input of 50 tokens comes: its answer begins at none.
    again, left = it.left(promise, "", 16 + 30 + 50, 0, 3, FAR)
    assert (again.until, again.blocks, left) == (64, 10, 7)
