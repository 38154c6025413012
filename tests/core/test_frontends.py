"""An engine of several frontends: each of them hears of its own requests, and ends no others'."""

from typing import Any

import pytest

from llumnix.core.events import MoveLimit, MoveOrder
from llumnix.core.messages import (
    OFFICE,
    CancelMigration,
    Handover,
    Migrate,
    MigrationEnded,
    MigrationRequested,
    Out,
    Reserve,
    Reserved,
    Revive,
    ToFrontend,
    TookOver,
    ToPeer,
    Verdict,
)
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.streams.table import StreamTable
from llumnix.core.types import EngineIndex, Epoch, InstanceId, MigrationId, OrderId, RequestId
from support.fake_engine import FakeEngine

HERE, THERE = EngineIndex(0), EngineIndex(1)
PROMPT, TOKENS = list(range(40)), 200
MINE, OTHERS = 3, 5
"""Client indexes of two frontends."""


class Engine:
    """A llumlet on an engine without a model, with one running request of each frontend."""

    def __init__(self) -> None:
        self.pulls: list[int] = []
        self.cancelled: list[int] = []
        self.engine = FakeEngine(
            HERE,
            blocks=200,
            batch=16,
            on_pull=lambda ticket, *_: self.pulls.append(ticket),
            on_cancel=self.cancelled.append,
        )
        self.llumlet = Llumlet(HERE, "here", self.engine)
        self.out: list[Out] = []
        self.now = 0.0
        for client in (MINE, OTHERS):
            self.engine.add(request_of(client), PROMPT, TOKENS, client)
        for _ in range(12):
            self.step()

    def step(self) -> None:
        self.now += 0.01
        self.engine.step()
        self.out += self.llumlet.poll(self.now)

    def migrate(self, client: int, address: str = "there") -> None:
        """That frontend's request is to move."""
        order = Migrate(
            migration=migration_of(client),
            request=request_of(client),
            destination=THERE,
            address=address,
            epoch=Epoch(1),
            client=client,
        )
        self.out += self.llumlet.migrate(order, self.now)

    def hand_over(self, client: int) -> None:
        """Until the destination alone can say who has that frontend's request."""
        self.migrate(client)
        whole = Reserved(migration=migration_of(client), hit=len(PROMPT))
        self.out += self.llumlet.receive(whole, self.now)
        while not any(m.request == request_of(client) for m in self.sent(Handover)):
            self.step()

    def lose_destination(self, client: int, granted: set[MigrationId] = frozenset()) -> None:  # type: ignore[assignment]
        """That frontend says that the destination died."""
        self.out += self.llumlet.engine_lost(THERE, granted, self.now, client)

    def lose(self, client: int) -> None:
        """That frontend dies; done as engine/instance.py does it."""
        self.out += self.llumlet.client_lost(client)
        for name in [r.id for r in self.engine.requests.values() if r.client == client]:
            self.out += self.llumlet.client_gone([name])
            self.engine.abort(name)
        self.out += self.llumlet.poll(self.now)

    def reserve(self, client: int, tokens: int = 60) -> None:
        """A request of that frontend wants to come here."""
        reservation = Reserve(
            migration=MigrationId(f"m{client}-1"),
            request=RequestId(f"coming {client}"),
            source=THERE,
            address="there",
            epoch=Epoch(1),
            body=repr((PROMPT, TOKENS, client)).encode(),
            outputs=[],
            tokens=tokens,
            agents=["fake"],
            client=client,
        )
        self.out += self.llumlet.receive(reservation, self.now)

    def hand_in(self, client: int, end: int = 0) -> None:
        """It comes, with that many tokens of KV."""
        handover = Handover(
            migration=MigrationId(f"m{client}-1"),
            request=RequestId(f"coming {client}"),
            source=THERE,
            address="there",
            start=0,
            end=end,
            blocks=[list(range(end // 4))],
            first_output=0,
            outputs=[],
            state=b"",
        )
        self.out += self.llumlet.receive(handover, self.now)

    def verdict(self, client: int, *, taken: bool) -> None:
        """The destination's, on that frontend's request."""
        verdict = Verdict(migration=migration_of(client), taken=taken, why="")
        self.out += self.llumlet.receive(verdict, self.now)

    def check_nothing_of(self, client: int) -> None:
        """Nothing of that frontend's is here, and all of the others'."""
        assert not [r for r in self.engine.requests.values() if r.client == client]
        assert not self.engine.arriving
        assert not self.engine.pinned
        assert not self.llumlet.busy
        assert self.engine.runs(request_of(OTHERS))
        others = self.engine.requests[request_of(OTHERS)]
        assert self.engine.blocks_used() == len(others.blocks)

    def told(self, client: int) -> list[Any]:
        """What that frontend has heard."""
        return [o.message for o in self.out if isinstance(o, ToFrontend) and o.client == client]

    def sent(self, kind: type) -> list[Any]:
        """What the destination has heard."""
        messages = [o.message for o in self.out if isinstance(o, ToPeer)]
        return [m for m in messages if isinstance(m, kind)]


def request_of(client: int) -> RequestId:
    return RequestId(f"r{client}")


def migration_of(client: int) -> MigrationId:
    return MigrationId(f"m{client}-0")


def test_the_frontend_of_a_request_is_told_how_its_move_ended() -> None:
    one = Engine()
    one.migrate(MINE)
    one.engine.abort(request_of(MINE))
    one.step()
    (ended,) = one.told(MINE)
    assert isinstance(ended, MigrationEnded)
    assert not one.told(OTHERS)


@pytest.mark.parametrize("twice", [False, True])
def test_the_frontend_of_a_request_is_told_that_its_move_does_not_begin(twice: bool) -> None:
    one = Engine()
    if twice:
        one.migrate(MINE)
    one.migrate(MINE, address="there" if twice else "")
    assert [m.taken for m in one.told(MINE)] == [False]


def test_the_destination_tells_the_frontend_that_the_source_named() -> None:
    one = Engine()
    one.reserve(7, tokens=0)
    one.hand_in(7)
    assert [type(m) for m in one.told(7)] == [TookOver]
    assert one.engine.client(RequestId("coming 7")) == 7


def test_the_source_names_the_frontend_to_the_destination() -> None:
    one = Engine()
    one.migrate(MINE)
    assert [m.client for m in one.sent(Reserve)] == [MINE]


@pytest.mark.parametrize("takes", [True, False])
def test_a_revival_is_answered_to_the_frontend_that_asked(takes: bool) -> None:
    one = Engine()
    if not takes:
        one.out += one.llumlet.cancel_all("it is paused", one.now, leaving=False)
    order = Revive(
        migration=MigrationId("m5-1"),
        request=RequestId("revived"),
        destination=HERE,
        epoch=Epoch(2),
        outputs=[],
        client=OTHERS,
    )
    one.out += one.llumlet.revive(order, (PROMPT, TOKENS, OTHERS), one.now)
    assert [type(m) for m in one.told(OTHERS)] == [TookOver if takes else MigrationEnded]
    assert not one.told(MINE)


@pytest.mark.parametrize("gone", [MINE, OTHERS])
def test_the_frontend_of_the_victim_is_asked_to_move_it(gone: int) -> None:
    one = Engine()
    one.engine.abort(request_of(gone))
    limit = MoveLimit(rank=1, tokens_min=0, tokens_wanted=0, tokens_max=10**6, waiting_max=0)
    order = MoveOrder(
        order=OrderId(1),
        source=InstanceId("i0"),
        source_engine=HERE,
        destination=InstanceId("i1"),
        destination_engine=THERE,
        limits=(limit,),
        why="drawn",
    )
    one.out += one.llumlet.order(order, one.now)
    left = ({MINE, OTHERS} - {gone}).pop()
    assert [type(m) for m in one.told(left)] == [MigrationRequested]
    assert not one.told(gone)


def test_a_death_ends_only_the_moves_of_the_frontend_that_tells_of_it() -> None:
    """The others have yet to say what the destination had taken over."""
    one = Engine()
    one.hand_over(MINE)
    one.hand_over(OTHERS)
    one.lose_destination(MINE)
    assert [m.taken for m in one.told(MINE)] == [True]
    assert request_of(MINE) not in one.engine.requests
    assert not one.told(OTHERS)
    assert one.llumlet.busy
    one.lose_destination(OTHERS, {migration_of(OTHERS)})
    assert [m.taken for m in one.told(OTHERS)] == [False]
    assert one.engine.runs(request_of(OTHERS))
    assert not one.llumlet.busy


def test_what_a_frontend_grants_carries_its_index_in_the_name_too() -> None:
    table: StreamTable[None, Any] = StreamTable(MINE)
    stream = table.open(RequestId("r"), None)
    table.placed(stream, HERE)
    order = table.grant(RequestId("r"), THERE, "there")
    assert isinstance(order, Migrate)
    assert (order.client, order.migration) == (MINE, "m3-0")
    table.engine_lost(THERE, [HERE])
    table.engine_lost(HERE, [])
    revived = table.revive(RequestId("r"), EngineIndex(2))
    assert isinstance(revived, Revive)
    assert (revived.client, revived.migration) == (MINE, "m3-1")


# -- a frontend dies


def test_all_requests_of_a_dead_frontend_end_and_no_other() -> None:
    one = Engine()
    one.lose(MINE)
    one.check_nothing_of(MINE)
    one.lose(MINE)
    one.check_nothing_of(MINE)
    assert not one.out


@pytest.mark.parametrize("stage", ["reserving", "copying", "stopping"])
def test_a_move_away_is_called_off_when_its_frontend_dies(stage: str) -> None:
    one = Engine()
    one.migrate(MINE)
    if stage != "reserving":
        hit = 0 if stage == "copying" else len(PROMPT)
        one.out += one.llumlet.receive(Reserved(migration=migration_of(MINE), hit=hit), one.now)
    one.lose(MINE)
    assert [m.why for m in one.sent(CancelMigration)] == ["it ended meanwhile"]
    one.check_nothing_of(MINE)
    assert not one.told(MINE)


@pytest.mark.parametrize("taken", [True, False])
def test_what_was_handed_over_is_kept_for_the_verdict_when_its_frontend_dies(taken: bool) -> None:
    """The destination may be reading it."""
    one = Engine()
    one.hand_over(MINE)
    one.lose(MINE)
    assert one.engine.pinned
    one.verdict(MINE, taken=taken)
    one.check_nothing_of(MINE)
    assert not one.told(MINE)


@pytest.mark.parametrize("first", ["frontend", "destination"])
@pytest.mark.parametrize("by", [OFFICE, OTHERS])
def test_what_was_handed_over_is_given_up_when_frontend_and_destination_are_dead(
    first: str, by: int
) -> None:
    """Nobody is left who knows its fate, and nobody waits for it."""
    one = Engine()
    one.hand_over(MINE)
    if first == "frontend":
        one.lose(MINE)
        one.lose_destination(by)
        one.out += one.llumlet.poll(one.now)
    else:
        one.lose_destination(by)
        assert one.llumlet.busy
        one.lose(MINE)
    one.check_nothing_of(MINE)


@pytest.mark.parametrize("pulling", [True, False])
def test_a_move_to_here_is_declined_when_its_frontend_dies(pulling: bool) -> None:
    one = Engine()
    one.reserve(MINE)
    if pulling:
        one.hand_in(MINE, end=40)
    one.lose(MINE)
    assert [(m.taken, m.why) for m in one.sent(Verdict)] == [(False, "its frontend died")]
    if pulling:
        assert one.cancelled == one.pulls
        one.out += one.llumlet.pulled(one.pulls[0], "cancelled", 0, 0.0, one.now)
    one.check_nothing_of(MINE)


def test_a_request_that_has_moved_in_ends_with_its_frontend() -> None:
    one = Engine()
    one.reserve(MINE, tokens=0)
    one.hand_in(MINE)
    one.lose(MINE)
    one.check_nothing_of(MINE)
    one.hand_in(MINE)  # The source had not heard the verdict.
    assert [m.taken for m in one.sent(Verdict)] == [True, True]


def test_what_a_dead_frontend_had_sent_comes_too_late() -> None:
    one = Engine()
    one.lose(MINE)
    one.reserve(MINE)
    assert [(m.taken, m.why) for m in one.sent(Verdict)] == [(False, "its frontend died")]
    one.hand_in(MINE)
    assert [m.taken for m in one.sent(Verdict)] == [False, False]
    one.migrate(MINE)
    assert not one.sent(Reserve)
    assert not one.told(MINE)


def test_a_revival_that_is_not_ready_ends_with_its_frontend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Engine()
    monkeypatch.setattr(one.engine, "ready", lambda request: False)
    order = Revive(
        migration=MigrationId("m3-7"),
        request=RequestId("revived"),
        destination=HERE,
        epoch=Epoch(2),
        outputs=[],
        client=MINE,
    )
    one.out += one.llumlet.revive(order, (PROMPT, TOKENS, MINE), one.now)
    one.lose(MINE)
    one.check_nothing_of(MINE)
    assert not one.told(MINE)
