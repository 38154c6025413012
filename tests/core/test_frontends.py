"""An engine of several frontends: each of them hears of its own requests, and ends no others'."""

from typing import Any

import pytest

from llumnix.core.events import MoveLimit, MoveOrder
from llumnix.core.messages import (
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
        self.engine = FakeEngine(HERE, blocks=200, batch=16)
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
    reservation = Reserve(
        migration=MigrationId("m7-1"),
        request=RequestId("moving"),
        source=THERE,
        address="there",
        epoch=Epoch(1),
        body=repr((PROMPT, TOKENS, 7)).encode(),
        outputs=[],
        tokens=0,
        agents=["fake"],
        client=7,
    )
    handover = Handover(
        migration=MigrationId("m7-1"),
        request=RequestId("moving"),
        source=THERE,
        address="there",
        start=0,
        end=0,
        blocks=[[]],
        first_output=0,
        outputs=[],
        state=b"",
    )
    for message in (reservation, handover):
        one.out += one.llumlet.receive(message, one.now)
    assert [type(m) for m in one.told(7)] == [TookOver]
    assert one.engine.client(RequestId("moving")) == 7


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
