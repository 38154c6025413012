"""The source's half of a migration: one llumlet on an engine without a model, and the destination's
words in the test's hand."""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from llumnix.core.codes import AbortCode
from llumnix.core.limits import MigrationLimits
from llumnix.core.messages import (
    OFFICE,
    CancelMigration,
    FromDestination,
    Handover,
    HandoverAnnounced,
    Migrate,
    MigrationEnded,
    Out,
    Reserve,
    Reserved,
    Stage,
    Staged,
    StageProgress,
    ToFrontend,
    ToPeer,
    Verdict,
)
from llumnix.core.migration import source as source_module
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId
from support.fake_engine import FakeEngine

R, M = RequestId("r"), MigrationId("m")
LIMITS = MigrationLimits()
Message = TypeVar("Message")


class Source:
    """One engine with one request of 40 tokens, which is to be moved. `depth`: steps ahead."""

    def __init__(self, copy: str = "staged", depth: int = 0) -> None:
        self.engine = FakeEngine(EngineIndex(0), depth=depth)
        self.llumlet = Llumlet(EngineIndex(0), "here", self.engine)
        self.engine.add(R, list(range(40)), 100)
        self.engine.step()
        self.out: list[Out] = []
        self.now = 1000.0
        for _ in range(5):
            self.step()
        order = Migrate(
            migration=M,
            request=R,
            destination=EngineIndex(1),
            address="there",
            epoch=Epoch(1),
            copy=copy,
        )
        self.out += self.llumlet.migrate(order, self.now)

    def step(self) -> None:
        self.now += 0.01
        self.engine.step()
        self.poll()

    def poll(self) -> None:
        self.out += self.llumlet.poll(self.now)

    def hear(self, message: FromDestination) -> None:
        self.out += self.llumlet.receive(message, self.now)

    def said(self, kind: type[Message]) -> list[Message]:
        messages = [o.message for o in self.out if isinstance(o, ToPeer | ToFrontend)]
        return [m for m in messages if isinstance(m, kind)]

    def hand_over(self) -> Handover:
        """Up to the handover, its stages answered."""
        self.hear(Reserved(migration=M, hit=0))
        for _ in range(20):
            if self.said(Handover):
                return self.said(Handover)[0]
            stages = self.said(Stage)
            if stages:
                self.hear(Staged(migration=M, stage=stages[-1].stage, bytes=1, seconds=0.1))
            self.step()
        raise AssertionError("it never handed over")


def declined() -> Verdict:
    return Verdict(migration=M, taken=False, why="no room")


def test_a_preemption_during_a_copy_ends_the_move_and_says_so() -> None:
    source = Source()
    source.hear(Reserved(migration=M, hit=0))
    assert source.said(Stage)
    source.engine.preempt_somebody()
    source.poll()
    assert [m.why for m in source.said(CancelMigration)] == ["it was preempted meanwhile"]
    ended = source.said(MigrationEnded)
    assert [(e.taken, e.why) for e in ended] == [(False, "it was preempted meanwhile")]
    assert not source.engine.pinned
    assert not source.llumlet.busy


def test_a_stage_took_as_long_as_it_took() -> None:
    source = Source()
    source.hear(Reserved(migration=M, hit=0))
    source.now += 0.25
    source.hear(Staged(migration=M, stage=1, bytes=1, seconds=0.1))
    source.now += 0.25
    source.engine.preempt_somebody()
    source.poll()
    (ended,) = source.said(MigrationEnded)
    assert [stage.ms for stage in ended.stages] == [250.0]
    assert ended.total_ms == 500.0


def test_blocks_that_were_named_stay_as_they_are_from_stage_to_stage() -> None:
    source = Source()
    source.hear(Reserved(migration=M, hit=0))
    stage = source.said(Stage)[0]
    source.hear(Staged(migration=M, stage=1, bytes=1, seconds=0.1))
    assert set(stage.blocks[0]) <= set(source.engine.pinned[R])


def test_the_blocks_of_a_handover_are_kept_until_the_verdict_though_the_client_hangs_up() -> None:
    for copy in ("staged", "blocking"):
        source = Source(copy)
        handover = source.hand_over()
        bytes_ = [list(source.engine.memory[b]) for b in handover.blocks[0]]
        source.engine.abort(R)
        source.poll()
        assert source.said(CancelMigration)
        # Another client's request takes all memory that is free.
        source.engine.add(RequestId("another"), [7] * 250, 100)
        for _ in range(30):
            source.step()
        assert [source.engine.memory[b] for b in handover.blocks[0]] == bytes_
        assert not source.said(MigrationEnded)
        source.hear(declined())
        assert [e.why for e in source.said(MigrationEnded)] == ["it ended meanwhile"]
        assert not source.engine.pinned
        assert not source.llumlet.busy


def test_a_lost_verdict_does_not_keep_the_blocks_for_ever() -> None:
    source = Source()
    source.hand_over()
    source.engine.abort(R)
    source.poll()
    source.now += LIMITS.verdict_again_s
    source.poll()
    assert len(source.said(Handover)) == 2  # Asked again: it will be answered again.
    source.hear(declined())
    source.hear(declined())
    assert not source.engine.pinned


def test_it_is_asked_for_again_though_every_look_at_it_fails() -> None:
    source = Source()
    source.hand_over()
    source.engine.abort(R)
    source.poll()
    for _ in range(2):
        source.now += LIMITS.verdict_again_s
        source.engine.progress = lambda request: 1 / 0  # type: ignore[assignment,return-value]
        with pytest.raises(ZeroDivisionError):
            source.poll()
        source.out += source.llumlet.failed("an error", source.now)
    assert len(source.said(Handover)) == 3


def test_the_room_asked_for_holds_the_request_and_what_it_generates_meanwhile() -> None:
    source = Source()
    reserve = source.said(Reserve)[0]
    tokens = len(source.engine.requests[R].tokens)
    assert reserve.tokens == tokens + LIMITS.ahead_tokens(source.engine.block_tokens)


def test_a_stage_has_as_long_as_the_destination_says_that_it_goes_on() -> None:
    source = Source()
    source.hear(Reserved(migration=M, hit=0))
    for _ in range(10):
        source.now += LIMITS.stage_timeout_s - 1
        source.poll()
        source.hear(StageProgress(migration=M, stage=1))
    assert not source.said(CancelMigration)
    source.now += LIMITS.stage_timeout_s
    source.poll()
    assert [m.why for m in source.said(CancelMigration)] == [
        "the destination was silent while copying"
    ]


def test_what_a_move_took_is_told_in_milliseconds() -> None:
    source = Source()
    began = source.now
    source.hand_over()
    source.now += 0.5
    source.hear(Verdict(migration=M, taken=True, why=""))
    (told,) = source.said(MigrationEnded)
    assert told.total_ms == pytest.approx((source.now - began) * 1e3)
    assert told.downtime_ms is not None
    # It stopped no more than a step before it was handed over.
    assert 500 <= told.downtime_ms < 520


def test_a_move_whose_last_step_is_in_flight_is_cancelled_too() -> None:
    source = Source("blocking", depth=1)
    source.hear(Reserved(migration=M, hit=0))
    assert source.said(HandoverAnnounced)
    assert source.engine.running == []
    source.out += source.llumlet.cancel_all("it sleeps", source.now, leaving=True)
    assert [m.why for m in source.said(CancelMigration)] == ["it sleeps"]
    assert [(m.taken, m.why) for m in source.said(MigrationEnded)] == [(False, "it sleeps")]
    assert source.llumlet.still(leaving=True)
    outputs = len(source.engine.requests[R].outputs)
    for _ in range(5):
        source.step()
    assert not source.said(Handover)
    assert len(source.engine.requests[R].outputs) > outputs + 2, "it goes on here"


def test_progress_of_a_stage_that_is_over_changes_nothing() -> None:
    source = Source()
    source.hear(Reserved(migration=M, hit=0))
    for _ in range(2):
        source.hear(StageProgress(migration=M, stage=7))
        source.hear(Staged(migration=M, stage=1, bytes=1, seconds=0.1))
        source.hear(StageProgress(migration=M, stage=1))
    source.hear(declined())
    source.hear(StageProgress(migration=M, stage=1))
    assert not source.llumlet.busy


@pytest.mark.parametrize(
    ("happens", "code"),
    [
        (lambda s: s.hear(Verdict(migration=M, taken=False, why="", code=AbortCode.NO_ROOM)),
         AbortCode.NO_ROOM),
        (lambda s: s.engine.abort(R), AbortCode.ENDED),
        (lambda s: s.engine.preempt_somebody(), AbortCode.PREEMPTED),
        (lambda s: setattr(s, "now", s.now + 2 * LIMITS.silence_timeout_s), AbortCode.SILENT),
        (lambda s: s.out.extend(s.llumlet.engine_lost(EngineIndex(1), {M}, s.now, OFFICE)),
         AbortCode.PEER_LOST),
    ],
)  # fmt: skip
def test_an_aborted_move_says_why_in_one_word(
    happens: Callable[[Source], object], code: AbortCode
) -> None:
    source = Source()
    happens(source)
    source.poll()
    (ended,) = source.said(MigrationEnded)
    assert (ended.taken, ended.code) == (False, code)


def test_a_second_move_of_a_request_is_refused_as_busy() -> None:
    source = Source()
    again = Migrate(
        migration=MigrationId("m2"), request=R, destination=EngineIndex(2), address="x",
        epoch=Epoch(2),
    )  # fmt: skip
    source.out += source.llumlet.migrate(again, source.now)
    (ended,) = source.said(MigrationEnded)
    assert ended.code is AbortCode.BUSY


# -- what cannot begin, and what fails


def another(name: str, **fields: object) -> Migrate:
    given: dict[str, Any] = {
        "migration": MigrationId(f"move of {name}"), "request": RequestId(name),
        "destination": EngineIndex(1), "address": "there", "epoch": Epoch(1),
    }  # fmt: skip
    return Migrate(**(given | fields))


def test_what_cannot_begin_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    for n in range(LIMITS.outgoing_max):
        source.engine.add(RequestId(f"r{n}"), [1], 100)
    source.engine.step()

    def told(order: Migrate) -> tuple[AbortCode, str]:
        source.out.clear()
        source.out += source.llumlet.migrate(order, source.now)
        (ended,) = source.said(MigrationEnded)
        assert (ended.taken, ended.migration) == (False, order.migration)
        return ended.code, ended.why

    assert told(another("r0", address="")) == (
        AbortCode.BUSY, "its destination is still starting"
    )  # fmt: skip
    assert told(another("nobody")) == (AbortCode.ENDED, "it has ended")
    for n in range(LIMITS.outgoing_max - 1):
        source.llumlet.migrate(another(f"r{n}"), source.now)
    most = LIMITS.outgoing_max
    assert told(another(f"r{most - 1}")) == (
        AbortCode.BUSY, f"{most} requests are being moved away already"
    )  # fmt: skip
    source.llumlet.cancel_all("it is going to sleep", source.now, leaving=True)
    code, why = told(another("r0"))
    assert (code, "it is going to sleep" in why) == (AbortCode.BUSY, True)
    source.llumlet.may_leave()
    source.out.clear()
    source.out += source.llumlet.migrate(another("r0"), source.now)
    assert source.said(Reserve)


def test_a_move_over_which_an_exception_was_raised_ends_and_the_request_stays() -> None:
    source = Source()
    source.hear(Reserved(migration=M, hit=0))
    source.llumlet._outgoing._at = source.llumlet._outgoing._open[R]
    source.out += source.llumlet.failed("ValueError: no", source.now)
    (ended,) = source.said(MigrationEnded)
    assert (ended.taken, ended.why) == (False, "an error at its source: ValueError: no")
    assert not source.llumlet.busy
    assert not source.engine.pinned
    source.out.clear()
    source.out += source.llumlet.failed("ValueError: no", source.now)
    assert source.out == [], "nothing was being dealt with"


def test_of_more_moves_than_are_remembered_the_last_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word about one that is forgotten is no mistake of anybody's."""
    monkeypatch.setattr(source_module, "REMEMBERED_MAX", 1)
    source = Source()
    source.hear(declined())
    source.out += source.llumlet.migrate(another("r", migration=MigrationId("m2")), source.now)
    source.hear(Verdict(migration=MigrationId("m2"), taken=False, why=""))
    assert list(source.llumlet._outgoing._ended) == ["m2"]
    source.hear(declined())
