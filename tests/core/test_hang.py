"""When an engine that has not died counts as hung, and when it is fenced."""

from dataclasses import replace

import pytest

from llumnix.core.limits import STALLED_AFTER_S
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.supervision.blame import Fenced
from llumnix.core.supervision.hang import (
    CALL_LOOKS,
    EMPTY_LOOKS,
    FIRST_STEP_S,
    GONE,
    LATE_S,
    LOOK_EVERY_S,
    LOST_LOOKS,
    MINUTE_LOOKS,
    PROMPT_STALL_S,
    SILENT_LOOKS,
    STALL_S,
    STALL_STEPS,
    STANDSTILL_LOOKS,
    HangPolicy,
    Health,
    Standstill,
    StopPolicy,
)
from llumnix.core.types import EngineIndex, InstanceId

BUSY = LoadReport(
    instance=InstanceId("i0"),
    engine_index=EngineIndex(0),
    sequence=1,
    kv_tokens_used=10,
    kv_tokens_total=1000,
    classes=(ClassLoad(running=1),),
    steps=100,
    steps_s=1.0,
)


class Watched:
    """One run's reports, numbered."""

    def __init__(self, policy: HangPolicy | None = None) -> None:
        self.policy = policy or HangPolicy()
        self.report = BUSY
        self.says()

    def says(
        self, *, paused: bool = False, heard: bool = False, owned: int = 0, **changes: object
    ) -> Health:
        """A new report, which differs from the one before in this."""
        sequence = self.report.sequence + 1
        self.report = replace(self.report, sequence=sequence, **changes)  # type: ignore[arg-type]
        return self.policy.look(self.report, paused=paused, heard=heard, owned=owned)

    def silent(self, looks: int, *, heard: bool = False) -> list[Health]:
        return [self.policy.look(self.report, paused=False, heard=heard) for _ in range(looks)]

    def step(self, seconds: float, steps: int = 1) -> Health:
        """A step that the looks follow, and its end."""
        if steps == 1:
            self.says(stalled_s=max(0.0, seconds - LOOK_EVERY_S))
        report = self.report
        ended, took_s = report.steps + steps, report.steps_s + seconds * steps
        return self.says(stalled_s=0.0, steps=ended, steps_s=took_s)

    def fenced_after_s(self) -> float:
        """How long a step may take from now on."""
        for quarter in range(1, 10_000):
            if self.says(stalled_s=quarter / 4).fence is not None:
                return quarter / 4
        raise AssertionError("never")


def test_an_engine_that_reports_steps_or_has_no_requests_is_well() -> None:
    one = Watched()
    assert all(one.says() == Health() for _ in range(100))
    assert one.says(stalled_s=STALLED_AFTER_S) == Health()


def test_one_that_has_not_reported_yet_gets_its_time() -> None:
    """And is asked before it is ended, as any that is silent."""
    policy = HangPolicy()
    *looks, last = (policy.look(None, paused=False, heard=False) for _ in range(CALL_LOOKS))
    assert set(looks) == {Health()}
    why = "its process reports nothing"
    assert last == Health(hung=why, silent=True, fence=Fenced(why=why, blamed=False))


# -- lost messages


def test_one_that_does_not_know_of_its_requests_is_fenced_and_none_is_blamed() -> None:
    one = Watched()
    *looks, last = (one.says(classes=(), owned=1) for _ in range(EMPTY_LOOKS))
    assert set(looks) == {Health()}
    why = "it does not know of requests that it was given"
    assert last == Health(hung=why, fence=Fenced(why=why, blamed=False))
    assert one.says(classes=(ClassLoad(waiting=1),), owned=2) == Health(), "it does know of one"


@pytest.mark.parametrize(
    "differs",
    [
        {"owned": 0},
        {"heard": True},
        {"paused": True},
        {"classes": (ClassLoad(running=1),)},
        {"classes": (ClassLoad(waiting=1),)},
        {"moving_in": 1},
        {"moving_out": 1},
    ],
    ids=str,
)
def test_one_look_that_finds_otherwise_starts_over(differs: dict[str, object]) -> None:
    one = Watched()
    empty: dict[str, object] = {"classes": (), "moving_in": 0, "moving_out": 0, "owned": 1}
    for _ in range(EMPTY_LOOKS - 1):
        one.says(**empty)  # type: ignore[arg-type]
    one.says(**{**empty, **differs})  # type: ignore[arg-type]
    for _ in range(EMPTY_LOOKS - 1):
        assert one.says(**empty) == Health()  # type: ignore[arg-type]
    assert one.says(**empty).fence is not None  # type: ignore[arg-type]


# -- stalls


def test_one_that_never_reported_was_not_heard_of_when_its_host_falls_silent() -> None:
    policy = HangPolicy()
    for heard, unheard in ((False, 1), (False, 2), (True, 0), (False, 1)):
        assert policy.look(None, paused=False, heard=heard) == Health()
        assert policy.unheard_looks == unheard


def test_requests_without_a_step_are_a_hang_until_a_report_says_otherwise() -> None:
    one = Watched()
    hung = Health(hung="no step for 1 s, and it has requests")
    assert one.says(stalled_s=1.1) == hung
    assert one.silent(1) == [hung]
    assert one.says(stalled_s=0.0) == Health()


def test_a_stall_is_fenced_and_blamed() -> None:
    one = Watched()
    assert one.says(stalled_s=STALL_S).fence is None
    fence = one.says(stalled_s=STALL_S + 0.6).fence
    assert fence == Fenced(why="no step for 11 s, and it has requests", blamed=True)


def test_where_steps_are_long_a_stall_has_to_be_longer() -> None:
    one = Watched()
    one.step(5.0)
    assert one.fenced_after_s() == pytest.approx(STALL_STEPS * 5.0, abs=0.3), "beyond a minute"
    one = Watched()
    one.step(0.2, steps=3)
    assert one.fenced_after_s() == STALL_S + 0.25
    one.says(stalled_s=0.0)
    one.step(2.0, steps=3)  # They were not seen to stand still.
    assert one.fenced_after_s() == pytest.approx(STALL_STEPS * 2.0, abs=0.3)


def test_a_long_step_counts_for_a_minute() -> None:
    one = Watched()
    one.step(2.0)
    for _ in range(MINUTE_LOOKS):
        one.step(0.01, steps=25)
    assert one.fenced_after_s() == STALL_S + 0.25


def test_a_stall_is_not_the_measure_of_itself() -> None:
    one = Watched()
    assert one.fenced_after_s() == STALL_S + 0.25


@pytest.mark.parametrize(
    "prompts", [{"prefill_tokens": 5}, {"classes": (ClassLoad(), ClassLoad(waiting=1))}]
)
def test_a_prompt_may_take_longer(prompts: dict[str, object]) -> None:
    one = Watched()
    one.says(**prompts)
    assert one.fenced_after_s() == PROMPT_STALL_S + 0.25


def test_a_first_step_may_compile() -> None:
    one = Watched(HangPolicy(stall_s=1.5))
    one.says(steps=0, steps_s=0.0)
    assert one.fenced_after_s() == FIRST_STEP_S + 0.25
    one.says(steps=0, steps_s=0.0, stalled_s=0.0)
    one.step(30.0)
    one.policy.stall_s = None
    assert one.fenced_after_s() == STALL_S + 0.25, "and is no measure for the next"


def test_a_user_may_say_how_long_a_step_may_take() -> None:
    one = Watched(HangPolicy(stall_s=1.5))
    one.step(2.0)
    one.says(prefill_tokens=5)
    assert one.fenced_after_s() == 1.75


def test_a_pause_and_a_call_are_no_stall() -> None:
    one = Watched()
    assert one.says(stalled_s=1000.0, paused=True) == Health()
    assert one.says(stalled_s=1000.0, in_call=True).fence is None
    # Nor is the call a long step.
    one.says(stalled_s=0.0, in_call=False, steps=101)
    assert one.fenced_after_s() == STALL_S + 0.25


# -- silence


def test_silence_is_a_hang_and_at_last_fenced_without_blame() -> None:
    one = Watched()
    looks = one.silent(LOST_LOOKS)
    assert [h.hung for h in looks[: SILENT_LOOKS - 1]] == [None] * (SILENT_LOOKS - 1)
    assert {h.hung for h in looks[SILENT_LOOKS - 1 :]} == {"its process reports nothing"}
    assert [h.silent for h in looks] == [h.hung is not None for h in looks]
    assert [h.fence for h in looks[:-1]] == [None] * (LOST_LOOKS - 1)
    assert looks[-1].fence == Fenced(why="its process reports nothing", blamed=False)
    assert one.says() == Health()
    assert one.silent(LOST_LOOKS - 1)[-1].fence is None


def test_outputs_are_a_sign_of_life_to_us_though_not_to_the_controller() -> None:
    one = Watched()
    looks = one.silent(2 * LOST_LOOKS, heard=True)
    assert looks[-1] == Health(hung="its process reports nothing", silent=True)
    looks = one.silent(LOST_LOOKS)
    assert [h.fence is not None for h in looks] == [False] * (LOST_LOOKS - 1) + [True]


def test_a_call_may_keep_an_engine_from_reporting() -> None:
    one = Watched()
    one.says(in_call=True)
    looks = one.silent(CALL_LOOKS)
    assert [h.fence is not None for h in looks] == [False] * (CALL_LOOKS - 1) + [True]


def test_a_report_that_the_controller_forgot_is_no_news() -> None:
    one = Watched()
    looks = [one.policy.look(None, paused=False, heard=False) for _ in range(SILENT_LOOKS)]
    assert looks[-1].hung is not None


# -- stopped and gone


def looks(policy: StopPolicy, *states: str, pid: int = 7) -> list[Standstill | None]:
    """Looks at the right pace at one of two processes."""
    found = []
    for state in states:
        now_s = (policy.looked_s or 0.0) + LOOK_EVERY_S
        found.append(policy.look(now_s, {1: "S", pid: state}))
    return found


@pytest.mark.parametrize("pid", [1, 7])
@pytest.mark.parametrize(("state", "gone"), [("T", False), (GONE, True), ("Z", True)])
def test_a_process_that_is_stopped_or_gone_in_three_looks_stands_still(
    pid: int, state: str, gone: bool
) -> None:
    found = looks(StopPolicy(), "S", *[state] * STANDSTILL_LOOKS, pid=pid)
    assert found == [None] * STANDSTILL_LOOKS + [Standstill(pid=pid, gone=gone)]


@pytest.mark.parametrize("state", ["R", "S", "D", "t", "I"])
def test_what_runs_sleeps_or_is_held_by_a_debugger_does_not(state: str) -> None:
    assert set(looks(StopPolicy(), *[state] * 100)) == {None}


def test_three_looks_must_follow_each_other() -> None:
    assert set(looks(StopPolicy(), *["T", "T", "S"] * 20)) == {None}
    policy = StopPolicy()
    for n in range(20):
        assert (
            policy.look(n * LOOK_EVERY_S, {1: "T" if n % 2 else "S", 7: "ST"[n % 2 == 0]}) is None
        )


def test_a_look_that_comes_late_starts_over() -> None:
    policy = StopPolicy()
    assert looks(policy, "T", "T") == [None, None]
    assert policy.looked_s is not None
    assert policy.look(policy.looked_s + LATE_S + 0.01, {7: "T"}) is None
    found = looks(policy, "T", "T", "T")
    assert found == [None, None, Standstill(pid=7, gone=False)]
