"""Calls that wait until nothing moves: in which order they are made, and what they keep from
moving."""

from concurrent.futures import Future
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.engine.waiting_calls import MOVES_END_MAX_S, WaitingCalls


class Moves:
    """In the llumlet's stead: whether requests are on their way here, and from here."""

    def __init__(self, *, coming: bool = False, going: bool = False) -> None:
        self.coming, self.going = coming, going
        self.let_go = 0  # how often it was said that requests may leave

    def still(self, *, leaving: bool) -> bool:
        return not self.coming and not (leaving and self.going)

    def may_leave(self) -> None:
        self.let_go += 1


class Made:
    """Calls that note their names."""

    def __init__(self, moves: Moves) -> None:
        fake: Any = moves
        self.calls = WaitingCalls(fake)
        self.names: list[str] = []

    def wait(self, name: str, now: float = 0.0, *, leaving: bool) -> Any:
        return self.calls.wait(lambda: self.names.append(name), now, leaving=leaving)


def test_a_call_is_made_at_once_if_nothing_moves() -> None:
    made = Made(Moves())
    assert made.wait("reset", leaving=True) is None
    assert made.names == ["reset"]
    assert len(made.calls) == 0


def test_requests_may_leave_again_only_once_no_call_waits_for_those_that_do() -> None:
    """Else new ones would leave, and the call would wait for them until its time is over."""
    moves = Moves(coming=True, going=True)
    made = Made(moves)
    pause, reset = made.wait("pause", leaving=False), made.wait("reset", leaving=True)
    moves.coming = False
    made.calls.make(1.0)
    assert (made.names, moves.let_go) == (["pause"], 0)
    moves.going = False
    made.calls.make(2.0)
    assert (made.names, moves.let_go) == (["pause", "reset"], 1)
    assert pause.done()
    assert reset.done()


def test_a_later_call_does_not_overtake_though_it_need_not_wait() -> None:
    moves = Moves(going=True)
    made = Made(moves)
    made.wait("reset", leaving=True)
    made.wait("pause", leaving=False)
    resume = made.calls.follow(lambda: made.names.append("resume"))
    made.calls.make(1.0)
    assert made.names == []
    assert not resume.done()
    moves.going = False
    made.calls.make(2.0)
    assert made.names == ["reset", "pause", "resume"]
    assert resume.done()


def test_a_call_that_has_waited_long_enough_is_made_and_may_fail() -> None:
    made = Made(Moves(coming=True))

    def fails() -> None:
        raise RuntimeError("a block is in use")

    answer = made.calls.wait(fails, 5.0, leaving=True)
    made.calls.make(5.0 + MOVES_END_MAX_S - 0.001)
    assert not answer.done()
    made.calls.make(5.0 + MOVES_END_MAX_S)
    with pytest.raises(RuntimeError, match="a block is in use"):
        answer.result(0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("fails", [False, True])
def test_what_vllm_answers_later_is_passed_on_when_it_comes(when: str, fails: bool) -> None:
    vllms: Future[str] = Future()

    def answer() -> None:
        if fails:
            vllms.set_exception(RuntimeError("a block is in use"))
        else:
            vllms.set_result("done")

    moves = Moves(coming=True)
    made = Made(moves)
    waiting = made.calls.wait(lambda: vllms, 0.0, leaving=False)
    if when == "before":
        answer()
    moves.coming = False
    made.calls.make(1.0)
    if when == "after":
        assert not waiting.done()
        answer()
    if fails:
        with pytest.raises(RuntimeError, match="a block is in use"):
            waiting.result(0)
    else:
        assert waiting.result(0) == "done"
