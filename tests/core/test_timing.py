"""When an engine's steps end, and the handover that they are timed for."""

from typing import Any

import pytest

from conformance.engines import FakeKind
from llumnix.core.limits import MigrationLimits
from llumnix.core.messages import (
    CancelMigration,
    Handover,
    HandoverAnnounced,
    PeerMessage,
    Stage,
    Staged,
)
from llumnix.core.migration.arrivals import DEFER_PREFILLS_MAX_S, LATE_MAX, StepTimer, one_more_fits
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.migration.port import Phase
from llumnix.core.types import RequestId
from support.duo import Duo
from support.fake_engine import STEP_S, undisturbed

NEAR_S = MigrationLimits().near_s
PROMPT = list(range(40))


def started(depth: int = 0, max_tokens: int = 30) -> tuple[Duo, RequestId]:
    """Two engines, and a request that runs on the first."""
    duo = FakeKind(depth).duo()
    request = duo.add("r", PROMPT, max_tokens)
    duo.turn_until(lambda: len(duo.got[request]) >= 3)
    return duo, request


def arrived() -> tuple[Duo, Llumlet]:
    """A request has come to the second engine, which makes no steps; that one's llumlet."""
    duo, request = started()
    assert duo.migrate(request)
    duo.engines[1].port.step = list
    duo.turn_until(lambda: duo.ended)
    return duo, duo.llumlets[1]


def announced(depth: int = 0) -> tuple[Duo, HandoverAnnounced]:
    """Two engines, and what the first has just sent to the second."""
    duo, request = started(depth)
    assert duo.migrate(request)
    while not (told := [m for _, m in duo.wire if isinstance(m, HandoverAnnounced)]):
        duo.turn()
    duo.deliver()
    return duo, told[0]


def test_a_prompt_among_the_steps_does_not_change_the_pace() -> None:
    step_timer = StepTimer()
    assert step_timer.step_s == 0
    for seconds in (0.01, 0.01, 0.2, 0.01):
        step_timer.record_step(seconds)
    assert step_timer.step_s == 0.01


def test_steps_that_are_known_to_have_prompts_do_not_count_at_all() -> None:
    step_timer = StepTimer()
    step_timer.record_step(0.01)
    for _ in range(20):
        step_timer.record_step(0.2, prompts=True)
    assert step_timer.step_s == 0.01


@pytest.mark.parametrize("due_ms", range(5, 60))
def test_no_step_keeps_the_handover_waiting_for_long_nor_the_engine_idle(due_ms: int) -> None:
    free_s, step_s = 0.0, 0.01
    while one_more_fits(free_s, step_s, due_ms / 1e3):
        free_s += step_s
    late_s = free_s - due_ms / 1e3
    assert -(1 - LATE_MAX) * step_s - 1e-9 <= late_s <= LATE_MAX * step_s + 1e-9


@pytest.mark.parametrize("depth", [0, 1])
def test_the_handover_is_announced_one_step_before_the_request_is_stopped(depth: int) -> None:
    duo, message = announced(depth)
    source = duo.engines[0].port
    before = source.progress("r")
    assert (before.phase, before.in_flight) == (Phase.RUNNING, depth > 0)
    assert message.in_s == (1 + depth) * STEP_S
    duo.turn_until(lambda: any(isinstance(m, Handover) for m in duo.delivered))
    (handover,) = (m for m in duo.delivered if isinstance(m, Handover))
    outputs = handover.first_output + len(handover.outputs)
    assert outputs == before.outputs + 1 + depth
    again = [m.in_s for m in duo.delivered if isinstance(m, HandoverAnnounced)][1:]
    assert again == [STEP_S] * depth


@pytest.mark.parametrize("depth", [0, 1])
def test_no_prompts_should_be_computed_while_a_handover_is_near(depth: int) -> None:
    duo, request = started(depth)
    source, there = duo.llumlets[0], duo.llumlets[1]
    wanted: dict[type, list[bool]] = {Stage: [], Staged: [], HandoverAnnounced: [], Handover: []}

    def before(message: PeerMessage) -> None:
        if isinstance(message, Staged | HandoverAnnounced | Handover):
            wanted[type(message)].append(there.defer_prefills(duo.now))
        elif isinstance(message, Stage) and message.stage == 1:
            wanted[Stage].append(there.defer_prefills(duo.now))
        if isinstance(message, HandoverAnnounced):
            phase = duo.engines[0].port.progress(request).phase
            assert source.defer_prefills(duo.now) or phase is Phase.STOPPED

    duo.before = before
    assert duo.migrate(request)
    duo.turn_until(lambda: duo.ended)
    assert duo.ended[0].taken
    assert not any(wanted.pop(Stage)), "until the first stage is here there is time"
    assert all(wanted.values()), "all of them came"
    assert all(all(each) for each in wanted.values())


@pytest.mark.parametrize("depth", [0, 1])
def test_nor_until_the_first_step_of_a_request_that_came_is_over(depth: int) -> None:
    duo, request = started(depth)
    assert duo.migrate(request)
    port, there = duo.engines[1].port, duo.llumlets[1]
    duo.turn_until(lambda: there.defer_prefills(duo.now))
    quiet_steps, scheduled = [], port._schedule

    def schedule() -> Any:
        before = request in port.requests and not port.requests[request].in_flight
        quiet_steps.append((before, there.defer_prefills(duo.now)))
        return scheduled()

    port._schedule = schedule
    duo.turn_until(lambda: duo.ended)
    for _ in range(3):
        duo.turn()
    assert duo.ended[0].taken
    first = next(i for i, (here, _) in enumerate(quiet_steps) if here)
    assert all(quiet for _, quiet in quiet_steps[: first + 1 + depth])
    assert not any(quiet for _, quiet in quiet_steps[first + 1 + depth :])
    assert not there.defer_prefills(duo.now)


def test_a_request_that_came_and_gets_no_step_keeps_prompts_out_for_a_while_only() -> None:
    duo, there = arrived()
    assert there.defer_prefills(duo.now)
    assert not there.defer_prefills(duo.now + 2 * DEFER_PREFILLS_MAX_S)
    assert not there.defer_prefills(duo.now)


def test_orders_may_forget_who_came_before_its_first_step() -> None:
    """They do once a move has paid."""
    duo, there = arrived()
    there._incoming.recent_arrivals.clear()
    assert there.defer_prefills(duo.now)


def test_a_source_that_says_nothing_more_keeps_prompts_out_for_a_while_only() -> None:
    duo, request = started()
    there = duo.llumlets[1]
    duo.before = lambda message: False if isinstance(message, Staged) else None
    assert duo.migrate(request)
    duo.turn_until(lambda: there.defer_prefills(duo.now))
    assert there.busy
    assert not there.defer_prefills(duo.now + 2 * DEFER_PREFILLS_MAX_S)


def test_a_request_that_came_in_the_middle_of_its_prompt_puts_none_off() -> None:
    duo = FakeKind(0).duo()
    request = duo.add("r", list(range(100)), 30)
    there, port = duo.llumlets[1], duo.engines[1].port
    duo.turn_until(lambda: duo.engines[0].port.progress(request).settled)
    duo.engines[1].port.step = list  # So it gets no step there.
    assert duo.migrate(request, copy="blocking")
    duo.turn_until(lambda: duo.ended)
    progress = port.progress(request)
    assert duo.ended[0].taken
    assert 0 < progress.settled < progress.tokens - 1, "the set-up: in the middle"
    assert not there.defer_prefills(duo.now)


def test_prompts_in_flight_are_let_end_before_it_is_announced() -> None:
    duo, request = started(1, 90)
    port, source = duo.engines[0].port, duo.llumlets[0]
    hushed, announced_amid_prompts = [], []

    def before(message: PeerMessage) -> None:
        if isinstance(message, HandoverAnnounced):
            announced_amid_prompts.append(port.prompts_in_flight)

    duo.before = before
    assert duo.migrate(request)
    while not duo.ended:
        if not hushed:
            duo.add(f"short {duo.now}", list(range(12)), 1)
        duo.turn()
        if port.prompts_in_flight and source.defer_prefills(duo.now):
            assert not announced_amid_prompts
            hushed.append(duo.now)
    assert hushed
    assert duo.ended[0].taken
    assert announced_amid_prompts
    assert not any(announced_amid_prompts)


def test_an_engine_that_never_stops_computing_prompts_hands_over_all_the_same() -> None:
    """As one with a long queue does: vLLM puts no prompts off then."""
    duo, request = started(1, 90)
    assert duo.migrate(request)
    while not duo.ended:
        duo.add(f"short {duo.now}", list(range(12)), 1)
        duo.turn()
        assert duo.engines[0].port.prompts_in_flight, "the set-up: until the end"
    assert duo.ended[0].taken


def test_it_is_handed_over_even_if_nobody_heard_the_announcement() -> None:
    duo = FakeKind(1).duo()
    request = duo.add("r", PROMPT, 30)
    duo.before = lambda message: False if isinstance(message, HandoverAnnounced) else None
    duo.turn_until(lambda: len(duo.got[request]) >= 3)
    assert duo.migrate(request)
    duo.finish()
    assert [e.taken for e in duo.ended] == [True]
    assert duo.got[request] == undisturbed(PROMPT, 30)


def test_a_request_that_stands_still_is_handed_over_all_the_same() -> None:
    """As one of an engine that was paused does."""
    duo, message = announced()
    held = duo.engines[0].port
    held.step = list  # It makes no more steps.
    duo.now += message.in_s + NEAR_S
    duo.turn_until(lambda: duo.ended)
    assert duo.ended[0].taken


def test_a_destination_begins_what_fits_in_before_the_handover_and_then_nothing() -> None:
    duo, message = announced()
    there, now = duo.llumlets[1], duo.now
    due_s = now + message.in_s
    assert there.hold_s(due_s - STEP_S / 2, now) == 0
    assert there.hold_s(due_s - STEP_S / 4, now) == pytest.approx(message.in_s + NEAR_S)
    duo.turn_until(lambda: duo.ended)
    assert duo.ended[0].taken
    assert there.hold_s(due_s, due_s) == 0


def test_the_time_counts_from_when_the_announcement_arrived() -> None:
    duo, message = announced()
    there, now = duo.llumlets[1], duo.now
    there.receive(message, now, now - 0.004)
    due_s = now - 0.004 + message.in_s
    assert there.hold_s(due_s, now) == pytest.approx(due_s + NEAR_S - now)


def after_a_while(duo: Duo, message: HandoverAnnounced) -> float:
    return duo.now + message.in_s + NEAR_S


def called_off(duo: Duo, message: PeerMessage) -> float:
    duo.llumlets[1].receive(CancelMigration(migration=message.migration, why="it ended"), duo.now)
    return duo.now


@pytest.mark.parametrize("end", [after_a_while, called_off])
def test_a_destination_does_not_wait_for_what_does_not_come(end) -> None:
    duo, message = announced()
    assert duo.llumlets[1].hold_s(duo.now + message.in_s, duo.now)
    now = end(duo, message)
    assert duo.llumlets[1].hold_s(now, now) == 0
