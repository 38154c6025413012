"""Which rules of an engine's queue a deployment has."""

import random
from dataclasses import replace

import pytest

from llumnix.core.queue_rules import (
    HALF_LIFE_STEPS,
    PLAIN,
    PromptTimer,
    QueueRules,
    SliceRules,
    Wait,
)
from llumnix.core.scheduling.presets import POLICIES, queue_rules_of
from llumnix.core.settings import QueueSettings, SchedulerSettings
from llumnix.errors import UsageError

RULES = QueueRules(growth=1, passers=8, pass_s=20.0, pass_share=0.5, short_first=4.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_baselines_have_vllms_queue(policy: str) -> None:
    rules = queue_rules_of(SchedulerSettings(policy=policy))
    if policy in ("llumnix", "llumnix-base"):
        assert rules == RULES
    elif policy == "scls":
        assert rules == replace(RULES, growth=0, slices=SliceRules(), short_first=0.0)
    else:
        assert rules.slices is None
        assert (rules.growth, rules.passers, rules.short_first) == (0, 0, 0)
        assert replace(rules, pass_s=0.0, pass_share=0.0) == PLAIN


def test_knobs_win_over_the_policy() -> None:
    off = QueueSettings(growth_blocks=0, passers=0, pass_s=3.0, short_first=0.0)
    assert queue_rules_of(SchedulerSettings(queue=off)) == replace(
        RULES, growth=0, passers=0, pass_s=3.0, short_first=0.0
    )
    on = QueueSettings(growth_blocks=1, passers=8, short_first=4.0)
    assert queue_rules_of(SchedulerSettings(policy="infaas++", queue=on)) == RULES
    sliced = QueueSettings(slices=True, slice_tokens=99, slice_quantile=0.5)
    assert queue_rules_of(SchedulerSettings(queue=sliced)) == replace(
        RULES, slices=SliceRules(tokens=99, quantile=0.5)
    )
    whole = QueueSettings(slices=False)
    assert queue_rules_of(SchedulerSettings(policy="scls", queue=whole)).slices is None


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("growth_blocks", -1),
        ("passers", 65),
        ("pass_s", -1),
        ("pass_share", 1.5),
        ("slice_tokens", 0),
        ("slice_quantile", 1.0),
        ("short_first", -1),
    ],
)
def test_a_knob_out_of_bounds_is_named(knob: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"queue\.{knob}: {value:g} must be"):
        QueueSettings(**{knob: value})  # type: ignore[arg-type]


def test_room_grows_with_the_batch_and_is_none_where_nothing_runs() -> None:
    assert [RULES.room(n, preempted=False) for n in (0, 1, 9)] == [0, 2, 10]
    assert [RULES.room(n, preempted=True) for n in (0, 1, 9)] == [0, 4, 20]
    assert PLAIN.room(9, preempted=True) == 0


def test_a_head_is_passed_for_so_long_and_by_so_much() -> None:
    wait = Wait(since_s=100.0, passed_tokens=300)
    assert [RULES.may_pass(wait, now) for now in (100.0, 120.0, 120.1)] == [True, True, False]
    assert [RULES.may_take(wait, 1000, tokens) for tokens in (200, 201)] == [True, False]
    assert not replace(RULES, passers=0).may_pass(wait, 100.0)


def test_a_request_is_queued_later_by_its_own_prompts_time_within_a_bound() -> None:
    assert RULES.later_s(1000, 0.0005) == pytest.approx(2.0)
    assert RULES.later_s(1000, 0.0) == 0, "what a token takes is not known yet"
    assert RULES.later_s(1000, 1.0) == RULES.pass_s
    assert PLAIN.later_s(1000, 0.0005) == 0


def test_what_a_step_takes_in_any_case_is_not_counted_as_its_prompts() -> None:
    timer = PromptTimer()
    assert timer.token_s == 0
    for tokens in (16, 32, 64, 2048):
        timer.record(tokens, 0.02 + 0.0001 * tokens)
    assert timer.token_s == pytest.approx(0.0001)


@pytest.mark.parametrize("slow_s", [0.02, 1.0])
def test_the_first_long_prompt_after_many_short_ones_is_queued_little_later(slow_s: float) -> None:
    """A step of 20 ms and some noise hides all that a short prompt takes. One step was slow."""
    dice, timer = random.Random(1), PromptTimer()
    for number in range(300):
        seconds = slow_s if number == 7 else dice.gauss(0.02, 0.0002)
        timer.record(dice.randrange(12, 20), seconds + 0.00002 * 16)
    # 8,000 tokens take 0.16 s. As parts of such steps they would take 10 s.
    assert RULES.later_s(8000, timer.token_s) < 1.0


def test_a_long_prompt_is_seen_for_what_it_takes_at_once() -> None:
    dice, timer = random.Random(1), PromptTimer()
    for _ in range(300):
        timer.record(dice.randrange(12, 20), dice.gauss(0.02, 0.0002))
    for _ in range(4):
        timer.record(2048, 0.02 + 0.00002 * 2048)
    assert timer.token_s == pytest.approx(0.00002, rel=0.1)


def test_prompts_that_are_all_alike_tell_nothing_of_a_token() -> None:
    timer = PromptTimer()
    for number in range(10):
        timer.record(0, 0.01)
        timer.record(16, 0.02 + 0.001 * (number % 2))
    assert timer.token_s == 0


def test_an_engine_that_has_become_faster_is_seen_to_be() -> None:
    timer = PromptTimer()
    for seconds in (1.0, 0.1):
        for number in range(5 * HALF_LIFE_STEPS):
            timer.record(1000 * (1 + number % 2), seconds * (1 + number % 2))
    assert timer.token_s == pytest.approx(0.0001, rel=0.2)
