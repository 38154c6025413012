"""What is known of how long answers become."""

import math
import random
from statistics import fmean

import pytest

from llumnix.core.slices.lengths import (
    ANSWERS_MIN,
    EDGES,
    HALF_LIFE_ANSWERS,
    KEY_ANSWERS_MIN,
    KEYS_MAX,
    End,
    Lengths,
    bucket_of,
)


def learnt(answers: list[int], key: str = "", lengths: Lengths | None = None) -> Lengths:
    """After all of these have ended, counted as running requests are: now and then."""
    lengths = lengths or Lengths()
    for answer in answers:
        bucket = 0
        for outputs in range(0, answer, 50):
            bucket = lengths.passed(key, bucket, outputs)
        lengths.gone(key, bucket, answer, End.BY_ITSELF)
    return lengths


def drawn(seed: int, count: int = 3000, mean: float = 300.0) -> list[int]:
    dice = random.Random(f"{seed} lengths")
    return [max(1, round(dice.expovariate(1 / mean))) for _ in range(count)]


def test_before_twenty_answers_have_ended_nothing_is_known() -> None:
    lengths = learnt([100] * (ANSWERS_MIN - 1))
    assert (lengths.rest("", 0, 0.8), lengths.mean()) == (math.inf, None)
    learnt([100], lengths=lengths)
    assert lengths.rest("", 0, 0.8) < 130


def test_counting_a_request_now_and_then_counts_as_much_as_once_at_its_end() -> None:
    """What is known is worked out anew by how much has been counted since."""
    often, once = learnt([400]), Lengths()
    once.gone("", 0, 400, End.BY_ITSELF)
    assert often._all.events == once._all.events


@pytest.mark.parametrize("seed", range(3))
def test_the_rest_covers_the_share_of_answers_that_was_asked_for(seed: int) -> None:
    lengths = learnt(drawn(seed))
    later = drawn(seed + 100)
    for outputs in (0, 20, 128, 400):
        rests = [a - outputs for a in later if a > outputs]
        for share in (0.5, 0.8, 0.9):
            covered = fmean(r <= lengths.rest("", outputs, share) for r in rests)
            assert covered == pytest.approx(share, abs=0.06), (outputs, share)


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_is_that_of_the_answers(seed: int) -> None:
    answers = drawn(seed)
    mean = learnt(answers).mean()
    assert mean is not None
    assert mean == pytest.approx(fmean(answers), rel=0.05)


def test_the_rest_grows_with_the_share_and_is_never_below_zero() -> None:
    lengths = learnt([10, 11, 12] * 50 + drawn(1, 200))
    for outputs in (0, 1, 15, 16, 17, 1000, EDGES[-1], 10**6):
        rests = [lengths.rest("", outputs, share) for share in (0.1, 0.5, 0.8, 0.99)]
        assert rests == sorted(rests)
        assert rests[0] >= 0


def test_over_lengths_at_which_no_answer_ends_the_rest_falls_token_by_token() -> None:
    lengths = learnt([20] * 50 + [1000] * 50)
    assert lengths.rest("", 30, 0.8) - lengths.rest("", 50, 0.8) == pytest.approx(20)


def test_long_answers_that_still_run_are_counted() -> None:
    """Short ones end first. An estimate from ends alone would take all answers for short."""
    lengths = learnt([40] * 100)
    for _ in range(100):
        lengths.passed("", 0, 900)
    assert lengths.rest("", 0, 0.5) > 40 - 16
    assert lengths.rest("", 64, 0.5) == math.inf
    mean = lengths.mean()
    assert mean is not None
    assert mean > 300


def test_what_is_cut_off_neither_ended_nor_went_on() -> None:
    """A request that was aborted at 100 tokens had not ended before, and is not known after."""
    lengths = learnt([300] * 100)
    before = lengths.rest("", 128, 0.8), lengths.rest("", 0, 0.8)
    for _ in range(400):
        lengths.passed("", 0, 100)
    assert (lengths.rest("", 128, 0.8), lengths.rest("", 0, 0.8)) == before


def test_one_that_came_by_a_move_is_counted_from_there_on() -> None:
    lengths = learnt([40] * 100)
    before = lengths.rest("", 0, 0.8)
    for _ in range(100):
        lengths.gone("", bucket_of(500), 600, End.BY_ITSELF)
    assert lengths.rest("", 0, 0.8) == before
    assert lengths.rest("", 520, 0.8) <= 200


def test_a_key_speaks_for_itself_once_it_is_known() -> None:
    lengths = learnt([400] * 200)
    learnt([20] * (KEY_ANSWERS_MIN - 1), "short", lengths)
    assert lengths.rest("short", 0, 0.8) == lengths.rest("other", 0, 0.8) > 300
    learnt([20], "short", lengths)
    assert lengths.rest("short", 0, 0.5) < 30
    assert lengths.rest("other", 0, 0.8) > 300


def test_what_all_others_do_counts_where_a_key_has_come_to_few_times() -> None:
    lengths = learnt([400] * 200)
    learnt([20] * 200, "short", lengths)
    assert 60 < lengths.rest("short", 330, 0.8) < 200


def test_keys_are_bounded_and_the_least_recent_is_forgotten() -> None:
    lengths = learnt([400] * 5000)
    learnt([20] * KEY_ANSWERS_MIN, "first", lengths)
    for number in range(KEYS_MAX - 1):
        lengths.passed(f"k{number}", 0, 20)
    assert lengths.rest("first", 0, 0.5) < 30
    lengths.passed("one more", 0, 20)
    assert lengths.rest("first", 0, 0.5) > 300


def test_what_was_long_ago_counts_less() -> None:
    lengths = learnt([40] * HALF_LIFE_ANSWERS)
    assert lengths.answers == HALF_LIFE_ANSWERS / 2
    learnt([400] * HALF_LIFE_ANSWERS, lengths=lengths)
    assert lengths.rest("", 0, 0.5) > 300
