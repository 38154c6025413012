"""Requests of dead engines that an engine goes on with: one llumlet on an engine without a model,
and the frontend's words in the test's hand."""

from typing import Any

import pytest

from llumnix.core.codes import AbortCode
from llumnix.core.messages import (
    Migrate,
    MigrationEnded,
    Out,
    Reserve,
    Revive,
    ToFrontend,
    TookOver,
)
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.migration.port import Refusal
from llumnix.core.migration.revivals import READY_TIMEOUT_S
from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId
from support.fake_engine import FakeEngine, undisturbed

R, OTHER = RequestId("r"), RequestId("other")
PROMPT, TOKENS = list(range(100, 120)), 12
ANSWER = undisturbed(PROMPT, TOKENS)
STEPS_MAX = 100


class Odd(Exception):
    """What nobody expects."""


class Engine(FakeEngine):
    """One whose requests get ready, or do not, as the test says."""

    def __init__(self, **how: Any) -> None:
        super().__init__(EngineIndex(1), **how)
        self.is_ready: bool | Refusal = True
        self.refusal: Refusal | None = None  # of `commit`
        self.odd: dict[str, set[RequestId]] = {"admit": set(), "ready": set(), "commit": set()}

    def admit(self, request: RequestId, made: object, outputs: list[int]) -> Refusal | None:
        refusal = super().admit(request, made, outputs)
        self._trip("admit", request)
        return refusal

    def ready(self, request: RequestId) -> bool | Refusal:
        self._trip("ready", request)
        return self.is_ready

    def commit(self, request: RequestId, computed: int, state: bytes) -> Refusal | None:
        assert (computed, state) == (0, b"")
        self._trip("commit", request)
        return self.refusal or super().commit(request, computed, state)

    def _trip(self, where: str, request: RequestId) -> None:
        if request in self.odd[where]:
            raise Odd(where)


class Llumlets:
    """A llumlet, and what it tells the frontend."""

    def __init__(self, **how: Any) -> None:
        self.engine = Engine(**how)
        self.llumlet = Llumlet(EngineIndex(1), "here", self.engine)
        self.now = 0.0

    def revive(self, outputs: int = 0, request: RequestId = R) -> list[Any]:
        order = Revive(
            migration=MigrationId(f"m {request}"),
            request=request,
            destination=EngineIndex(1),
            epoch=Epoch(4),
            outputs=ANSWER[:outputs],
        )
        try:
            out = self.llumlet.revive(order, (PROMPT, TOKENS), self.now)
        except Odd as error:  # As the host does.
            out = self.llumlet.failed(str(error), self.now)
        return self.told(out)

    def poll(self) -> list[Any]:
        try:
            out = self.llumlet.poll(self.now)
        except Odd as error:
            out = self.llumlet.failed(str(error), self.now)
        return self.told(out)

    def told(self, out: list[Out]) -> list[Any]:
        assert all(isinstance(o, ToFrontend) for o in out)
        return [o.message for o in out]

    def run(self) -> list[int]:
        """What the engine says of the request until it is idle."""
        said: list[int] = []
        for _ in range(STEPS_MAX):
            if self.engine.idle():
                break
            for request, tokens, _done in self.engine.step():
                assert request == R
                said += tokens
        return said

    def check_nothing_left(self) -> None:
        assert (self.engine.blocks_used(), self.engine.requests_held()) == (0, 0)
        assert not self.llumlet.busy
        assert self.llumlet.deadline_s() is None
        assert self.poll() == []


def took_over(outputs: int, request: RequestId = R) -> TookOver:
    return TookOver(
        migration=MigrationId(f"m {request}"),
        request=request,
        epoch=Epoch(4),
        outputs=outputs,
        tail=[],
    )


def declined(why: str, request: RequestId = R, code: AbortCode = AbortCode.OTHER) -> MigrationEnded:
    return MigrationEnded(
        migration=MigrationId(f"m {request}"), request=request, taken=False, why=why, code=code
    )


@pytest.mark.parametrize("outputs", [0, 1, 5, TOKENS - 1])
@pytest.mark.parametrize("depth", [0, 1])
def test_it_is_queued_first_and_goes_on_after_the_tokens_that_its_client_has(
    outputs: int, depth: int
) -> None:
    there = Llumlets(depth=depth)
    there.engine.add(OTHER, PROMPT[:3], 1)
    assert there.revive(outputs) == [took_over(outputs)]
    assert [request.id for request in there.engine.waiting] == [R, OTHER]
    there.engine.abort(OTHER)
    assert there.run() == ANSWER[outputs:]
    there.check_nothing_left()


def test_it_only_waits_so_no_memory_is_needed() -> None:
    there = Llumlets(blocks=8, batch=1)
    there.engine.add(OTHER, PROMPT, TOKENS + 1)
    while there.engine.free:
        there.engine.step()
    assert there.revive(5) == [took_over(5)]
    there.engine.abort(OTHER)
    assert there.run() == ANSWER[5:]
    there.check_nothing_left()


def test_it_is_not_queued_before_it_is_ready() -> None:
    there = Llumlets()
    there.engine.is_ready = False
    assert there.revive(3) == []
    assert there.poll() == []
    assert (there.llumlet.busy, there.engine.idle()) == (True, True)
    assert there.llumlet.deadline_s() == READY_TIMEOUT_S
    there.engine.is_ready = True
    assert there.poll() == [took_over(3)]
    assert not there.llumlet.busy
    assert there.run() == ANSWER[3:]
    there.check_nothing_left()


def test_one_that_does_not_get_ready_is_declined() -> None:
    there = Llumlets()
    there.engine.is_ready = False
    assert there.revive(3) == []
    there.now = READY_TIMEOUT_S - 0.1
    assert there.poll() == []
    there.now = READY_TIMEOUT_S
    assert there.poll() == [declined("it was not ready within 60 s")]
    there.check_nothing_left()


def test_one_that_is_still_here_is_declined_and_what_is_here_stays() -> None:
    there = Llumlets()
    there.engine.add(R, PROMPT, TOKENS)
    assert there.revive(3) == [declined("still leaving")]
    assert there.run() == ANSWER
    there.check_nothing_left()


def test_one_that_is_on_its_way_already_is_declined_and_the_first_goes_on() -> None:
    there = Llumlets()
    there.engine.is_ready = False
    assert there.revive(3) == []
    assert there.revive(3) == [declined("still leaving")]
    there.engine.is_ready = True
    assert there.poll() == [took_over(3)]
    assert there.run() == ANSWER[3:]
    there.check_nothing_left()


def test_one_whose_grammar_refuses_its_tokens_is_declined() -> None:
    there = Llumlets()
    there.engine.is_ready = Refusal(why="its grammar does not take token 7")
    assert there.revive(3) == [declined("its grammar does not take token 7")]
    there.check_nothing_left()


def test_one_that_cannot_be_queued_is_declined() -> None:
    there = Llumlets()
    there.engine.refusal = Refusal(why="a worker does not take it")
    assert there.revive(3) == [declined("a worker does not take it")]
    there.check_nothing_left()


def test_a_client_that_hangs_up_ends_it_without_a_word() -> None:
    there = Llumlets()
    there.engine.is_ready = False
    there.revive(3)
    there.revive(3, OTHER)
    assert there.told(there.llumlet.client_gone([R])) == []
    there.engine.abort(R)
    there.engine.is_ready = True
    assert there.poll() == [took_over(3, OTHER)]
    there.engine.abort(OTHER)
    there.check_nothing_left()


def test_an_engine_that_takes_no_requests_declines_until_it_does() -> None:
    there = Llumlets()
    there.engine.is_ready = False
    there.revive(3)
    there.revive(2, OTHER)
    assert not there.llumlet.still(leaving=False)
    why = "the engine takes none: it is asleep"
    out = there.llumlet.cancel_all("it is asleep", there.now, leaving=False)
    later = declined(why, code=AbortCode.BUSY)
    assert there.told(out) == [later, declined(why, OTHER, AbortCode.BUSY)]
    assert there.llumlet.still(leaving=True)
    there.check_nothing_left()
    there.engine.is_ready = True
    assert there.revive(3) == [later]
    there.check_nothing_left()
    there.llumlet.welcome()
    assert there.revive(3) == [took_over(3)]
    assert there.run() == ANSWER[3:]
    there.check_nothing_left()


@pytest.mark.parametrize("where", ["admit", "ready", "commit"])
def test_an_exception_ends_the_one_that_it_came_from(where: str) -> None:
    there = Llumlets()
    if where == "ready":
        there.engine.is_ready = False
    there.revive(3, OTHER)
    there.engine.abort(OTHER)  # If it is queued already.
    there.engine.odd[where].add(R)
    why = f"an error at the engine that was to go on with it: {where}"
    assert there.revive(3) == [declined(why)]
    there.engine.is_ready = True
    assert there.poll() == ([took_over(3, OTHER)] if where == "ready" else [])
    there.engine.abort(OTHER)
    if where == "admit":
        there.engine.drop(R)  # The guard's part: what a call that failed has left (guard.py).
    there.check_nothing_left()


def test_an_exception_while_all_are_looked_at_ends_one_and_the_others_go_on() -> None:
    there, names = Llumlets(), [RequestId(f"r{n}") for n in range(3)]
    there.engine.is_ready = False
    for name in names:
        there.revive(3, name)
    there.engine.is_ready = True
    there.engine.odd["ready"].add(names[1])
    why = "an error at the engine that was to go on with it: ready"
    # What was said before it comes with it.
    assert there.poll() == [took_over(3, names[0]), declined(why, names[1])]
    assert there.poll() == [took_over(3, names[2])]
    for name in names:
        there.engine.abort(name)
    there.check_nothing_left()


def test_an_exception_ends_no_move_that_was_looked_at_before() -> None:
    there, coming = Llumlets(), RequestId("coming")
    there.engine.add(OTHER, PROMPT, TOKENS)
    move = Migrate(
        migration=MigrationId("m"),
        request=OTHER,
        destination=EngineIndex(2),
        address="there",
        epoch=Epoch(1),
    )
    assert len(there.llumlet.migrate(move, there.now)) == 1
    reserve = Reserve(
        migration=MigrationId("m other"),
        request=coming,
        source=EngineIndex(3),
        address="elsewhere",
        epoch=Epoch(1),
        body=repr((PROMPT, TOKENS)).encode(),
        outputs=[],
        tokens=60,
        agents=["fake"],
    )
    assert len(there.llumlet.receive(reserve, there.now)) == 1
    there.engine.is_ready = False
    there.revive(3)
    there.engine.odd["ready"].add(R)
    assert there.poll() == [declined("an error at the engine that was to go on with it: ready")]
    moves = there.llumlet.moving(there.now)
    assert (moves.out, coming in there.engine.arriving) == (1, True)


def test_an_exception_from_elsewhere_ends_none() -> None:
    there = Llumlets()
    there.engine.is_ready = False
    there.revive(3)
    assert there.told(there.llumlet.failed("odd", there.now)) == []
    assert there.poll() == []
    assert there.told(there.llumlet.failed("odd", there.now)) == []
    there.engine.is_ready = True
    assert there.poll() == [took_over(3)]
