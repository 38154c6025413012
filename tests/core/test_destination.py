"""The destination's half of a migration: one llumlet on an engine without a model, and the source's
words in the test's hand."""

from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import pytest

from llumnix.core.codes import AbortCode
from llumnix.core.limits import TAIL_MAX, MigrationLimits
from llumnix.core.messages import (
    CancelMigration,
    Handover,
    HandoverAnnounced,
    Out,
    PeerMessage,
    Reserve,
    Stage,
    Staged,
    StageProgress,
    ToFrontend,
    TookOver,
    ToPeer,
    Verdict,
)
from llumnix.core.migration import verdicts
from llumnix.core.migration.arrivals import RecentArrival
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.migration.port import Refusal
from llumnix.core.migration.verdicts import Decided, Verdicts
from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId
from llumnix.errors import ProtocolError
from support.fake_engine import FakeEngine

R, M = RequestId("r"), MigrationId("m")
PROMPT = list(range(100, 140))
LIMITS = MigrationLimits()
Message = TypeVar("Message")


class Destination:
    """One engine to which a request of 40 tokens is being moved; the source is memory only."""

    def __init__(self, outputs: list[int] | None = None) -> None:
        self.source = FakeEngine(EngineIndex(0))
        for block in range(20):
            self.source.memory[block] = (PROMPT + list(range(200, 240)))[4 * block : 4 * block + 4]
        self.pulls: list[tuple[int, list[tuple[int, int]]]] = []
        self.cancelled: list[int] = []
        self.engine = FakeEngine(
            EngineIndex(1),
            on_pull=lambda ticket, _, pairs: self.pulls.append((ticket, pairs)),
            on_cancel=self.cancelled.append,
        )
        self.llumlet = Llumlet(EngineIndex(1), "here", self.engine)
        self.out: list[Out] = []
        self.now = 1000.0
        self.hear(
            Reserve(
                migration=M,
                request=R,
                source=EngineIndex(0),
                address="there",
                epoch=Epoch(1),
                body=repr((PROMPT, 600)).encode(),
                outputs=outputs or [],
                tokens=60,
                agents=["fake"],
            )
        )

    def hear(self, message: PeerMessage) -> None:
        self.out += self.llumlet.receive(message, self.now)

    def poll(self) -> None:
        self.out += self.llumlet.poll(self.now)

    def pull(self, error: str | None = None) -> None:
        """The oldest pull ends."""
        ticket, pairs = self.pulls.pop(0)
        self.engine.copy(self.source, pairs)
        self.out += self.llumlet.pulled(ticket, error, len(pairs), 0.1, self.now)

    def stage(self, number: int, start: int, end: int, outputs: list[int] | None = None) -> None:
        self.hear(
            Stage(
                migration=M,
                stage=number,
                start=start,
                end=end,
                blocks=[list(range(start // 4, end // 4))],
                first_output=0,
                outputs=outputs or [],
                tokens=60,
            )
        )

    def handover(self, start: int, end: int, first_output: int, outputs: list[int]) -> None:
        self.hear(
            Handover(
                migration=M,
                request=R,
                source=EngineIndex(0),
                address="there",
                start=start,
                end=end,
                blocks=[list(range(start // 4, -(-end // 4)))],
                first_output=first_output,
                outputs=outputs,
                state=b"",
            )
        )

    def said(self, kind: type[Message]) -> list[Message]:
        messages = [o.message for o in self.out if isinstance(o, ToPeer | ToFrontend)]
        return [m for m in messages if isinstance(m, kind)]

    @property
    def cached_tokens(self) -> int:
        return 4 * len(self.engine.cached)


def test_what_a_stage_brought_can_be_found_only_after_the_sources_next_word() -> None:
    there = Destination()
    there.stage(1, 0, 20)
    there.pull()
    assert there.said(Staged)
    assert there.cached_tokens == 0
    there.stage(2, 20, 32)
    assert there.cached_tokens == 20  # Not what is being pulled.
    there.pull()
    assert there.cached_tokens == 20
    there.hear(HandoverAnnounced(migration=M, in_s=0.01))
    assert there.cached_tokens == 32
    there.engine.check_cache()


def test_nothing_of_a_stage_is_found_if_the_source_called_it_off_while_it_was_read() -> None:
    there = Destination()
    there.stage(1, 0, 32)
    there.source.memory = [[7] * 4 for _ in there.source.memory]  # Preempted, and overwritten.
    there.pull()
    there.hear(CancelMigration(migration=M, why="it was preempted meanwhile"))
    assert there.cached_tokens == 0
    assert there.engine.blocks_used() == 0


def test_the_engine_is_told_which_pull_the_request_stands_still_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there, final = Destination(), list[bool]()
    pull = there.engine.pull

    def pulls(*order: Any) -> None:
        final.append(order[-1])
        pull(*order)

    monkeypatch.setattr(there.engine, "pull", pulls)
    there.stage(1, 0, 32)
    there.pull()
    there.handover(32, 42, 0, [200, 201, 202])
    assert final == [False, True]


def test_a_handover_without_an_announcement_enters_all_of_it() -> None:
    there = Destination()
    there.stage(1, 0, 32)
    there.pull()
    there.handover(32, 42, 0, [200, 201, 202])
    there.now += 0.5
    there.pull()
    assert [v.taken for v in there.said(Verdict)] == [True]
    assert there.llumlet._incoming.recent_arrivals[R] == RecentArrival(at_s=1000.5, took_s=0.5)
    assert there.cached_tokens == 40
    there.engine.check_cache()


def test_the_tail_of_a_take_over_is_of_all_that_was_generated() -> None:
    """A frontend whose source died before it had sent its last tokens finds them there."""
    there = Destination(outputs=[200, 201])
    there.stage(1, 0, 32, [200, 201, 202])
    there.pull()
    there.handover(32, 44, 3, [203, 204])
    there.pull()
    took = there.said(TookOver)[0]
    assert (took.outputs, took.tail) == (5, [200, 201, 202, 203, 204])


def slots_asked_for(there: Destination) -> list[int]:
    """From now on, by `reach`."""
    asked: list[int] = []
    reach = there.engine.reach
    there.engine.reach = lambda r, tokens, new: (asked.append(tokens), reach(r, tokens, new))[1]  # type: ignore[method-assign]
    return asked


def test_a_request_that_comes_with_its_blocks_has_one_more_to_go_on() -> None:
    """It holds blocks and waits for its first step: no other could make room for it."""
    there = Destination()
    there.stage(1, 0, 32)
    there.pull()
    asked = slots_asked_for(there)
    there.handover(32, 42, 0, [200, 201, 202])
    assert asked == [42 + there.engine.block_tokens]


def test_a_request_that_comes_without_kv_asks_for_no_blocks() -> None:
    """It waited, or is computed anew: it starts like any other that waits."""
    there = Destination()
    asked = slots_asked_for(there)
    there.handover(0, 0, 0, [200])
    assert asked == [0]


def test_outputs_that_are_told_twice_count_once() -> None:
    there = Destination(outputs=[200, 201])
    there.stage(1, 0, 32, [200, 201, 202])  # From number 0 on.
    there.pull()
    there.handover(32, 44, 2, [202, 203, 204])
    there.pull()
    assert there.engine.requests[R].outputs == [200, 201, 202, 203, 204]


def test_the_tail_has_an_end() -> None:
    there = Destination(outputs=list(range(TAIL_MAX)))
    there.handover(0, 0, TAIL_MAX, [1001, 1002])
    assert there.said(TookOver)[0].tail == [*range(2, TAIL_MAX), 1001, 1002]


# -- pulls that take long, and pulls that nobody wants any more


def test_a_stage_that_takes_minutes_is_not_given_up_by_either_side() -> None:
    """4 GiB at 100 MB/s take 43 s; a source waits 30 s for a word."""
    there = Destination()
    there.stage(1, 0, 32)
    began, said = there.now, list[float]()
    while there.now < began + 300:
        there.now += 0.5
        there.poll()
        if len(there.said(StageProgress)) > len(said):
            said.append(there.now)
    gaps = [b - a for a, b in pairwise([began, *said, there.now])]
    assert max(gaps) < MigrationLimits().stage_timeout_s / 2
    there.pull()
    assert there.said(Staged)
    assert not there.said(Verdict)


def test_a_source_that_is_silent_between_stages_is_given_up() -> None:
    there = Destination()
    there.stage(1, 0, 32)
    there.pull()
    there.now += MigrationLimits().silence_timeout_s
    there.poll()
    assert ["silent" in v.why for v in there.said(Verdict)] == [True]
    assert there.engine.blocks_used() == 0


def test_a_handover_that_takes_minutes_ends_well() -> None:
    there = Destination()
    there.handover(0, 42, 0, [200, 201, 202])
    for _ in range(300):
        there.now += 1
        there.poll()
    assert not there.said(Verdict)
    there.pull()
    assert [v.taken for v in there.said(Verdict)] == [True]


def test_a_pull_that_nobody_wants_any_more_is_cancelled_and_gives_its_room_back() -> None:
    there = Destination()
    there.stage(1, 0, 32)
    ticket = there.pulls[0][0]
    there.hear(CancelMigration(migration=M, why="it ended meanwhile"))
    assert there.cancelled == [ticket]
    assert there.engine.blocks_used() > 0  # It may still be written to.
    there.pull("cancelled")
    assert there.engine.blocks_used() == 0
    assert not there.llumlet.busy


# -- a destination that does not remember


@pytest.mark.parametrize("here", [True, False])
def test_a_handover_that_is_not_remembered_is_answered_each_time(here: bool) -> None:
    there = Destination()
    there.hear(CancelMigration(migration=M, why=""))
    there.llumlet._incoming._verdicts._decided.clear()  # As 4,096 others would have had it.
    if here:
        there.engine.add(R, PROMPT, 10)
    before = len(there.said(Verdict))
    for _ in range(3):
        there.handover(0, 40, 0, [])
    assert [v.taken for v in there.said(Verdict)[before:]] == [here] * 3


def test_who_asks_for_a_fate_knows_that_the_source_died() -> None:
    """Its last message may have come after the news of its death."""
    there = Destination()
    assert R in there.engine.arriving
    assert there.llumlet.fate(M) == "declined"
    there.poll()
    assert [v.taken for v in there.said(Verdict)] == [False]
    assert not there.engine.arriving
    assert not there.llumlet.busy


def test_what_was_declined_unheard_stays_declined() -> None:
    there = Destination()
    other = MigrationId("other")
    assert there.llumlet.fate(other) == "declined"
    before = len(there.said(Verdict))
    there.hear(
        Reserve(
            migration=other,
            request=RequestId("late"),
            source=EngineIndex(0),
            address="there",
            epoch=Epoch(1),
            body=repr((PROMPT, 5)).encode(),
            outputs=[],
            tokens=40,
            agents=["fake"],
        )
    )
    assert [v.taken for v in there.said(Verdict)[before:]] == [False]


def test_of_more_verdicts_than_are_remembered_the_last_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handover that comes again after its request went on from here is still answered rightly."""
    monkeypatch.setattr(verdicts, "REMEMBERED_MAX", 2)
    known = Verdicts(FakeEngine(EngineIndex(1)), [])
    names = [MigrationId(f"m{n}") for n in range(4)]
    for name in names:
        known.remember(Decided(verdict=Verdict(migration=name, taken=True, why="")))
    assert [known.get(name) is not None for name in names] == [False, False, True, True]
    assert known.fate(names[-1]) == "taken"


# -- what it declines, and what fails


def reserve(name: str) -> Reserve:
    return Reserve(
        migration=MigrationId(f"move of {name}"), request=RequestId(name), source=EngineIndex(0),
        address="there", epoch=Epoch(1), body=repr((PROMPT, 600)).encode(), outputs=[], tokens=0,
        agents=["fake"],
    )  # fmt: skip


def last(there: Destination) -> tuple[bool, AbortCode, str]:
    verdict = there.said(Verdict)[-1]
    return verdict.taken, verdict.code, verdict.why


def test_what_it_declines_says_why_and_holds_nothing() -> None:
    there = Destination()
    for n in range(LIMITS.incoming_max - 1):
        there.hear(reserve(f"r{n}"))
    assert there.said(Verdict) == []
    there.hear(reserve("one more"))
    most = LIMITS.incoming_max
    assert last(there) == (
        False, AbortCode.BUSY, f"{most} requests are on their way there already"
    )  # fmt: skip
    assert set(there.engine.arriving) == {R, *(RequestId(f"r{n}") for n in range(most - 1))}
    there.hear(CancelMigration(migration=M, why=""))
    there.hear(reserve("r0"))  # The message came twice.
    again = replace(reserve("r0"), migration=MigrationId("another move"))
    there.hear(again)
    assert last(there) == (False, AbortCode.BUSY, "it is on its way there already")


def test_while_it_takes_none_it_says_so_and_ends_what_is_on_its_way() -> None:
    there = Destination()
    there.out += there.llumlet.cancel_all("it is going to sleep", there.now, leaving=False)
    assert last(there) == (
        False, AbortCode.BUSY, "the destination takes none: it is going to sleep"
    )  # fmt: skip
    assert there.engine.blocks_used() == 0
    there.hear(reserve("late"))
    assert last(there)[2] == "the destination takes none: it is going to sleep"
    there.llumlet.welcome()
    there.hear(reserve("later"))
    assert RequestId("later") in there.engine.arriving


def test_one_over_which_an_exception_was_raised_is_declined() -> None:
    there = Destination()
    there.llumlet._incoming._at = there.llumlet._incoming._open[M]
    there.out += there.llumlet.failed("ValueError: no", there.now)
    assert last(there) == (False, AbortCode.OTHER, "an error at its destination: ValueError: no")
    assert there.engine.blocks_used() == 0
    assert not there.llumlet.busy
    said = len(there.out)
    there.out += there.llumlet.failed("ValueError: no", there.now)
    assert len(there.out) == said, "nothing was being dealt with"


@pytest.mark.parametrize("at", ["ready", "reach", "commit"])
def test_what_the_engine_refuses_on_the_way_ends_the_move(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, at, lambda *_: Refusal(why=f"no {at}", code=AbortCode.STATE))
    there = Destination()
    if at != "ready":
        there.handover(0, 0, 0, [200])
    assert last(there) == (False, AbortCode.STATE, f"no {at}")
    assert there.engine.blocks_used() == 0
    assert not there.llumlet.busy
    assert not there.said(TookOver)


def test_the_end_of_a_pull_that_was_never_begun_is_a_mistake() -> None:
    with pytest.raises(ProtocolError, match="nobody waits for the end of pull 7"):
        Destination().llumlet.pulled(7, None, 1, 0.1, 0.0)


def test_a_word_about_a_move_that_is_over_is_answered_once_more_if_it_wants_an_answer() -> None:
    there = Destination()
    there.handover(0, 0, 0, [200])
    assert [v.taken for v in there.said(Verdict)] == [True]
    there.stage(1, 0, 32)  # It came twice, or late.
    there.hear(HandoverAnnounced(migration=M, in_s=0.01))
    assert len(there.said(Verdict)) == 1
    there.handover(0, 0, 0, [200])
    assert [v.taken for v in there.said(Verdict)] == [True, True]
