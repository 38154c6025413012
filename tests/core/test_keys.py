"""What a key may use, in time that the test passes in."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.core.keys import KeyLimits, KeyMeter, Meters, NamedKey, Over, Standing


def codes(meter: KeyMeter, *times_s: float) -> list[str | None]:
    """What each request gets, of which none stays open."""
    found = []
    for now_s in times_s:
        over = meter.admit(now_s)
        found.append(None if over is None else over.code)
        if over is None:
            meter.ended()
    return found


def test_a_minutes_requests_pass_at_once_and_then_as_many_as_come_free() -> None:
    meter = KeyMeter(KeyLimits(requests_per_min=3), 0.0)
    assert codes(meter, 0, 0, 0, 0, 19.9) == [None, None, None, "rate_limited", "rate_limited"]
    assert codes(meter, 20, 20, 40) == [None, "rate_limited", None]
    assert codes(meter, 1000, 1000, 1000, 1000) == [None, None, None, "rate_limited"]


def test_the_pause_is_until_the_next_request_passes() -> None:
    meter = KeyMeter(KeyLimits(requests_per_min=30), 0.0)
    for _ in range(30):
        meter.admit(0.0)
    over = meter.admit(0.5)
    assert over == Over(
        code="rate_limited",
        message="This key may send 30 requests a minute.",
        retry_after_s=pytest.approx(1.5),
    )
    assert meter.admit(2.01) is None


def test_tokens_are_charged_when_they_are_known_and_a_debt_is_paid_first() -> None:
    meter = KeyMeter(KeyLimits(tokens_per_min=60), 0.0)
    assert codes(meter, 0, 0) == [None, None]
    meter.spend(90, 0.0)
    over = meter.admit(10.0)
    assert over is not None
    assert (over.code, over.retry_after_s) == ("rate_limited", pytest.approx(21))
    assert codes(meter, 29.9, 30.5) == ["rate_limited", None]


PER_MIN = 60
"""One a second."""
times = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 150)), min_size=1, max_size=8)


def left(used: list[tuple[float, int]], now_s: float) -> float:
    """What a key has left that used so much and then. In any stretch of time up to now it may use a
    minute's worth, and what the stretch brings."""
    stretches = [
        PER_MIN + (now_s - since_s) * PER_MIN / 60 - sum(u for at_s, u in used if at_s >= since_s)
        for since_s, _ in used
    ]
    return min([PER_MIN, *stretches])


@given(times)
def test_tokens_count_from_when_they_were_used_whoever_asked_before(
    gaps: list[tuple[int, int]],
) -> None:
    """No request comes while they are used, as with long answers."""
    meter, now_s, used = KeyMeter(KeyLimits(tokens_per_min=PER_MIN), 0.0), 0.0, []
    for gap_s, tokens in gaps:
        now_s += gap_s
        meter.spend(tokens, now_s)
        used.append((now_s, tokens))
    over = meter.admit(now_s)
    debt = -left(used, now_s)
    assert (over is None) == (debt < 0)
    if over is not None:
        assert over.retry_after_s == pytest.approx(debt + 1)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=90))
def test_requests_count_from_when_they_were_let_in(gaps: list[int]) -> None:
    meter, now_s, used = KeyMeter(KeyLimits(requests_per_min=PER_MIN), 0.0), 0.0, []
    for gap in gaps:
        now_s += gap / 10
        room = left(used, now_s)
        if abs(room - 1) < 1e-6:
            return  # Either is right, by a rounding.
        assert (meter.admit(now_s) is None) == (room > 1)
        if room > 1:
            used.append((now_s, 1))


def test_so_many_are_open_at_a_time() -> None:
    meter = KeyMeter(KeyLimits(open_max=2, requests_per_min=3), 0.0)
    assert [meter.admit(0.0), meter.admit(0.0)] == [None, None]
    over = meter.admit(0.0)
    assert over is not None
    assert (over.code, over.retry_after_s) == ("too_many_open", 1.0)
    meter.ended()
    assert meter.admit(0.0) is None  # What was refused took nothing of the rate.


def test_processes_share_a_limit_and_each_lets_one_through() -> None:
    limits = KeyLimits(requests_per_min=60, tokens_per_min=100, open_max=3)
    assert limits.shared(1) is limits
    shared = limits.shared(4)
    assert shared == KeyLimits(requests_per_min=15, tokens_per_min=25, open_max=1)
    slow = KeyMeter(KeyLimits(requests_per_min=1).shared(4), 0.0)
    assert codes(slow, 0, 0, 239, 241) == [None, "rate_limited", "rate_limited", None]


def test_a_key_without_limits_has_no_meter_and_new_limits_keep_what_was_used() -> None:
    meters = Meters(1)
    free = NamedKey(name="a", digest=b"", roles=("inference",))
    assert meters.of(None, 0.0) is None
    assert meters.of(free, 0.0) is None
    tight = NamedKey(name="a", digest=b"", roles=(), limits=KeyLimits(open_max=1))
    meter = meters.of(tight, 0.0)
    assert meter is not None
    assert meters.of(tight, 5.0) is meter
    assert meter.admit(0.0) is None
    wide = NamedKey(name="a", digest=b"", roles=(), limits=KeyLimits(open_max=2))
    other = meters.of(wide, 0.0)
    assert other is not None
    assert other.open == 1  # What is open counts on,
    meter.ended()
    assert other.open == 0  # until it ends.
    limits = KeyLimits(requests_per_min=2, tokens_per_min=10, open_max=5)
    half = NamedKey(name="a", digest=b"", roles=(), limits=limits)
    counted = meters.of(half, 10.0)
    assert counted is not None
    assert codes(counted, 10, 10, 10) == [None, None, "rate_limited"]
    more = NamedKey(name="a", digest=b"", roles=(), limits=replace(limits, tokens_per_min=20))
    changed = meters.of(more, 10.0)
    assert changed is not None
    assert codes(changed, 10) == ["rate_limited"]  # This limit did not change.


def test_what_is_left_of_limits_comes_back_with_time() -> None:
    meter = KeyMeter(KeyLimits(requests_per_min=60, tokens_per_min=6000, open_max=9), 0.0)
    meter.admit(0.0)
    meter.admit(0.0)
    meter.spend(9000, 0.0)
    requests, tokens = meter.standings(0.5)
    assert requests == Standing(of="requests", limit=60, remaining=58, reset_s=pytest.approx(1.5))
    assert tokens == Standing(of="tokens", limit=6000, remaining=0, reset_s=pytest.approx(89.5))
    requests, tokens = meter.standings(60.0)
    assert (requests.remaining, requests.reset_s) == (60, 0.0)
    assert (tokens.remaining, tokens.reset_s) == (3000, pytest.approx(30.0))
    assert KeyMeter(KeyLimits(open_max=1), 0.0).standings(0.0) == []


def test_a_request_that_began_before_its_key_was_looked_at_passes() -> None:
    meter = KeyMeter(KeyLimits(requests_per_min=1, tokens_per_min=60), 10.0)
    assert codes(meter, 9.9) == [None]
    assert [each.remaining for each in meter.standings(9.9)] == [0, 60]
