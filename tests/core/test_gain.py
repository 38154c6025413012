"""What a pair gains from a move: the formulas of gain.py beside a look at every size."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llumnix.core.priorities import Priorities
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.gain import GainRule, room_in, smallest_relief
from llumnix.core.scheduling.tuning import STOP_STEPS
from llumnix.core.scheduling.view import ClusterView, InstanceView
from llumnix.core.settings import MigrationSettings, PrioritySettings
from llumnix.core.types import EngineIndex, InstanceId

TOTAL = 1000
NORMAL = 1
PRIORITIES = Priorities(PrioritySettings())


def pair(*loads: tuple[int, int, int, int], block_tokens: int = 16) -> list[InstanceView]:
    """Instances of which each has so many tokens in use, so many normal and urgent requests that
    run, and a head of the queue that needs so many tokens."""
    view = ClusterView(PRIORITIES, MigrationSettings())
    for number, (used, running, urgent, head) in enumerate(loads):
        waiting = ClassLoad(running=running, waiting=int(head > 0), waiting_tokens=head)
        report = LoadReport(
            instance=InstanceId(f"i{number}"),
            engine_index=EngineIndex(number),
            sequence=1,
            kv_tokens_used=used,
            kv_tokens_total=TOTAL,
            block_tokens=block_tokens,
            classes=(ClassLoad(running=urgent), waiting),
            head_tokens=head,
        )
        view.apply(report, 0.0)
    return list(view)


def rule(copy_steps: float = 0.0, gain_min: float = 2.0) -> GainRule:
    return GainRule(priorities=PRIORITIES, threshold=20.0, gain_min=gain_min, copy_steps=copy_steps)


def gains(rule: GainRule, source: InstanceView, destination: InstanceView, tokens: int) -> bool:
    """Whether moving one normal request that runs with so many tokens is a gain, worked out on the
    loads that the two have afterwards."""
    left = source.load.changed(NORMAL, -1, -tokens).freeness(PRIORITIES)
    there = destination.load.changed(NORMAL, 1, tokens).freeness(PRIORITIES)
    least = source.freeness + rule.gain_min + STOP_STEPS
    cost, slack = rule.copy_steps * tokens, 1e-9
    return (
        left + slack >= least + cost
        and there + slack >= max(least, rule.threshold, 0.0) + cost
        and there + slack >= left
        and tokens <= room_in(destination)
    )


@given(
    st.tuples(st.integers(700, TOTAL), st.integers(2, 12), st.just(0), st.sampled_from([0, 200])),
    st.tuples(st.integers(0, 600), st.integers(0, 12), st.integers(0, 1), st.just(0)),
    st.sampled_from([0.0, 0.001, 0.02, 0.3]),
)
def test_every_size_within_the_limits_is_a_gain_and_no_other_is(source, destination, copy_steps):
    """To a token: what a limit leaves out for being rounded is no more than that."""
    one, other = pair(source, destination)
    # With more, a size that is too small may gain as well: see the next test.
    assume(copy_steps * max(1, one.load.batch - 1) < 1)
    decided = rule(copy_steps).limits(one, other)
    sizes = [t for t in range(1, TOTAL + 1) if gains(rule(copy_steps), one, other, t)]
    running = [x for x in decided if x.rank == NORMAL and x.tokens_max >= x.tokens_min]
    within = {t for x in running for t in range(x.tokens_min, x.tokens_max + 1)}
    assert within <= set(sizes)
    if sizes:
        assert set(sizes[1:-1]) <= within


def test_where_the_copy_costs_more_than_it_frees_no_size_is_a_gain() -> None:
    """Eleven go on, so that a token that leaves is worth 1/11 step, and its copy takes 1/2."""
    one, other = pair((990, 12, 0, 0), (0, 0, 0, 0))
    assert rule(0.0).limits(one, other)
    assert rule(0.5).limits(one, other) == ()
    assert smallest_relief(100.0, 11, TOTAL, 20.0, 0.5) > TOTAL


def test_the_relief_that_is_wanted_lets_a_blocked_head_start() -> None:
    one, other = pair((900, 5, 0, 250), (0, 0, 0, 0))
    (limit,) = rule().limits(one, other)
    assert limit.tokens_wanted == 150
    one.load = one.load._replace(keep=30)
    (limit,) = rule().limits(one, other)
    assert limit.tokens_wanted == 180, "and leaves the batch room to grow"


def test_without_a_head_the_relief_that_is_wanted_lifts_the_source_over_the_threshold() -> None:
    one, other = pair((980, 5, 0, 0), (0, 0, 0, 0))
    (limit,) = rule().limits(one, other)
    assert limit.tokens_wanted == 20 * 4 - 20


@pytest.mark.parametrize(("running", "gain"), [(3, True), (0, False)])
def test_a_class_without_requests_has_no_limit(running: int, gain: bool) -> None:
    one, other = pair((980, running, 0, 0), (0, 0, 0, 0))
    assert bool(rule().limits(one, other)) is gain


@pytest.mark.parametrize("block_tokens", [16, 128])
def test_what_waits_goes_only_where_a_move_has_its_reserve_too(block_tokens: int) -> None:
    one, other = pair((900, 5, 0, 250), (0, 0, 0, 0), block_tokens=block_tokens)
    (limit,) = rule().limits(one, other)
    assert limit.waiting_max == min(TOTAL - 20, room_in(other))
    assert room_in(other) < TOTAL
