"""When an engine that has not died counts as hung."""

from llumnix.core.limits import STALLED_AFTER_S
from llumnix.core.supervision.hang import (
    LOST_LOOKS,
    SILENT_LOOKS,
    STOPPED_LOOKS,
    HangPolicy,
)


def test_an_engine_that_reports_steps_or_has_no_requests_is_well() -> None:
    policy = HangPolicy()
    assert all(policy.look(n, 0.0, stopped=False).hung is None for n in range(100))
    assert policy.look(100, STALLED_AFTER_S, stopped=False).hung is None


def test_one_that_has_not_reported_yet_is_not_judged() -> None:
    policy = HangPolicy()
    assert all(policy.look(None, 0.0, stopped=True).hung is None for _ in range(100))


def test_requests_without_a_step_are_a_hang_until_a_report_says_otherwise() -> None:
    policy = HangPolicy()
    assert policy.look(1, 1.1, stopped=False).hung == "no step for 1 s, and it has requests"
    assert policy.look(1, 1.1, stopped=False).hung == "no step for 1 s, and it has requests"
    assert not policy.look(2, 5.0, stopped=False).lost
    assert policy.look(3, 0.0, stopped=False).hung is None


def test_silence_is_a_hang_and_at_last_a_loss() -> None:
    policy = HangPolicy()
    policy.look(1, 0.0, stopped=False)
    looks = [policy.look(1, 0.0, stopped=False) for _ in range(LOST_LOOKS)]
    assert [h.hung for h in looks[: SILENT_LOOKS - 1]] == [None] * (SILENT_LOOKS - 1)
    assert {h.hung for h in looks[SILENT_LOOKS - 1 :]} == {"its process reports nothing"}
    assert [h.lost for h in looks] == [False] * (LOST_LOOKS - 1) + [True]
    assert policy.look(2, 0.0, stopped=False).hung is None


def test_a_process_that_is_seen_stopped_is_lost_sooner() -> None:
    policy = HangPolicy()
    policy.look(1, 0.0, stopped=False)
    looks = [policy.look(1, 0.0, stopped=n > 0) for n in range(LOST_LOOKS)]
    first = next(n for n, health in enumerate(looks) if health.lost)
    assert first == max(SILENT_LOOKS - 1, STOPPED_LOOKS)
    assert looks[first].hung == "its process is stopped"


def test_a_report_that_the_controller_forgot_is_no_news() -> None:
    policy = HangPolicy()
    policy.look(1, 0.0, stopped=False)
    looks = [policy.look(None, 0.0, stopped=False) for _ in range(SILENT_LOOKS)]
    assert looks[-1].hung is not None
