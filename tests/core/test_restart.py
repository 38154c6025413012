"""When a crashed instance is started again."""

from llumnix.core.supervision.restart import (
    CRASHES_MAX,
    HEALTHY_AFTER_S,
    GiveUp,
    RestartAfter,
    RestartPolicy,
)


def test_the_first_restart_comes_at_once_and_the_next_ones_later_and_later() -> None:
    policy = RestartPolicy()
    verdicts = [policy.crashed(1.0) for _ in range(CRASHES_MAX - 1)]
    delays = [v.delay_s for v in verdicts if isinstance(v, RestartAfter)]
    assert delays == [0.0, 1.0, 2.0, 4.0]


def test_a_crash_loop_ends_with_its_reason() -> None:
    policy = RestartPolicy()
    last = [policy.crashed(0.0) for _ in range(CRASHES_MAX)][-1]
    assert last == GiveUp(why="crashed 5 times, each less than 60 s after it was up")


def test_a_spell_of_health_forgives_what_was_before() -> None:
    policy = RestartPolicy()
    for _ in range(CRASHES_MAX - 1):
        policy.crashed(1.0)
    assert policy.crashed(HEALTHY_AFTER_S) == RestartAfter(delay_s=0.0, why="first crash")
