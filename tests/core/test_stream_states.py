"""The protocol of a stream: every transition occurs, no other does, and the check sees a record
that cannot be."""

from collections.abc import Callable
from typing import Any

import pytest

from llumnix.core.messages import Grant, MigrationEnded
from llumnix.core.streams.states import STREAM
from llumnix.core.streams.states import StreamEvent as E
from llumnix.core.streams.states import StreamState as S
from llumnix.core.types import MigrationId
from llumnix.errors import ProtocolError
from support.stream_table import DESTINATION, SOURCE, THIRD, R, Table, moving, orphan, reviving

# -- stories that end in a state


def placing() -> Table:
    table = Table()
    table.open(R, "")
    return table


def place(table: Table) -> None:
    table.placed(table.one(), SOURCE)


def granted(table: Table) -> Grant:
    """The grant that is live."""
    grant = table.one().grant
    assert grant is not None
    return grant


def owned() -> Table:
    table = Table()
    table.open_on(SOURCE)
    table.hear(SOURCE, 1, "")
    return table


def revoked(again: bool = False) -> Table:
    """Its first destination died; it is `again` to be moved, to another."""
    table = moving(outputs=1)[0]
    table.lose(DESTINATION, SOURCE)
    if again:
        table.order(THIRD)
    return table


def released() -> Table:
    table, order = moving(outputs=1)
    table.end(order, taken=True)
    return table


def holding(tail: int = 9) -> Table:
    table, order = moving(outputs=1)
    table.take(order, 3, list(range(tail)))
    return table


def asking() -> Table:
    table, _ = moving(outputs=1)
    table.lose(SOURCE, DESTINATION)
    return table


def revoked_but_taken(table: Table) -> None:
    (migration,) = table.one().revoked
    table.ended(MigrationEnded(migration=migration, request=R, taken=True, why=""))


# -- transitions

TRANSITIONS: dict[tuple[S, E], tuple[Callable[[], Table], Callable[[Table], Any]]] = {
    (S.PLACING, E.PLACED): (placing, place),
    (S.OWNED, E.GRANT): (owned, Table.order),
    (S.OWNED, E.OWNER_LOST): (owned, lambda t: t.lose(SOURCE)),
    (S.OWNED, E.REVOKED_BUT_TAKEN): (revoked, revoked_but_taken),
    (S.GRANTED, E.KEPT): (lambda: moving(1)[0], lambda t: t.end(granted(t), taken=False)),
    (S.GRANTED, E.LET_GO): (lambda: moving(1)[0], lambda t: t.end(granted(t), taken=True)),
    (S.GRANTED, E.TOOK_OVER): (lambda: moving(1)[0], lambda t: t.take(granted(t), 2)),
    (S.GRANTED, E.OWNER_LOST): (lambda: moving(1)[0], lambda t: t.lose(SOURCE)),
    (S.GRANTED, E.DESTINATION_LOST): (lambda: moving(1)[0], lambda t: t.lose(DESTINATION)),
    (S.GRANTED, E.REVOKED_BUT_TAKEN): (lambda: revoked(again=True), revoked_but_taken),
    (S.RELEASED, E.TOOK_OVER): (released, lambda t: t.take(granted(t), 2)),
    (S.RELEASED, E.OWNER_LOST): (released, lambda t: t.lose(SOURCE)),
    (S.RELEASED, E.DESTINATION_LOST): (released, lambda t: t.lose(DESTINATION)),
    (S.HOLDING, E.CAUGHT_UP): (holding, lambda t: t.hear(SOURCE, 2, "")),
    (S.HOLDING, E.OWNER_LOST): (holding, lambda t: t.lose(SOURCE)),
    (S.HOLDING, E.GAP): (lambda: holding(tail=1), lambda t: t.lose(SOURCE)),
    (S.HOLDING, E.DESTINATION_LOST): (holding, lambda t: t.lose(DESTINATION)),
    (S.ASKING, E.TOOK_OVER): (asking, lambda t: t.take(granted(t), 2)),
    (S.ASKING, E.DECLINED): (asking, lambda t: t.tell(granted(t), "declined")),
    (S.ASKING, E.DESTINATION_LOST): (asking, lambda t: t.lose(DESTINATION)),
    (S.ORPHAN, E.REVIVE): (orphan, Table.ask),
    (S.REVIVING, E.TOOK_OVER): (lambda: reviving()[0], lambda t: t.take(granted(t), 1)),
    (S.REVIVING, E.DECLINED): (lambda: reviving()[0], lambda t: t.end(granted(t), taken=False)),
    (S.REVIVING, E.DESTINATION_LOST): (lambda: reviving()[0], lambda t: t.lose(THIRD)),
}


@pytest.mark.parametrize(("state", "event"), [(s, e) for s, row in STREAM.items() for e in row])
def test_every_transition_of_the_table_occurs(state: S, event: E) -> None:
    story, then = TRANSITIONS[state, event]
    table = story()
    stream = table.one()
    assert stream.state is state
    before = len(stream.machine.history)
    then(table)
    walked = stream.machine.history[before:]
    # A take-over, or a death while holding, is followed at once by what it leads to.
    assert (event, STREAM[state][event][0]) in walked
    assert walked[0][0] is event or walked[0] == (E.OWNER_LOST, S.HOLDING)
    table.check()


def test_an_event_that_cannot_happen_raises_with_the_story() -> None:
    table, order = moving(outputs=1)
    table.end(order, taken=True)
    with pytest.raises(ProtocolError) as error:
        table.end(order, taken=True)
    assert str(error.value) == (
        "stream r: 'source let go' cannot happen in state 'released' (story: placing "
        "-[placed]-> owned -[grant]-> granted -[source let go]-> released)"
    )


# -- records

BROKEN: dict[str, tuple[Callable[[], Table], Callable[[Table], object]]] = {
    "owner None": (owned, lambda t: t._own(t.one(), None)),
    "grant None": (lambda: moving()[0], lambda t: t._drop_grant(t.one())),
    "take-over None": (holding, lambda t: setattr(t.one(), "takeover", None)),
    "1 outputs are held": (owned, lambda t: t.one().held.append(([7], "x"))),
    "3 of 3 tokens": (holding, lambda t: t.one().tokens.extend([8, 9])),
    "owner 0 died: True": (owned, lambda t: t._dead.add(SOURCE)),
    "owner 2": (orphan, lambda t: t._own(t.one(), THIRD)),
    "revoked {'m7'}": (orphan, lambda t: t.one().revoked.add(MigrationId("m7"))),
    "destination 2 died": (lambda: reviving()[0], lambda t: t._dead.add(THIRD)),
    "destination 1 died": (lambda: moving()[0], lambda t: t._dead.add(DESTINATION)),
    "epochs: grant 1, owner 2": (lambda: moving()[0], lambda t: setattr(t.one(), "epoch", 2)),
    "epochs: 1, last 0": (owned, lambda t: setattr(t.one(), "epoch", 1)),
    "by engine": (owned, lambda t: t._by_engine.clear()),
    "by migration": (lambda: moving()[0], lambda t: t._by_migration.clear()),
    "is granted twice": (lambda: moving()[0], lambda t: t.one().revoked.add(MigrationId("m0"))),
    "is kept as": (owned, lambda t: t._streams.update(other=t.one())),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_check_sees_a_record_that_cannot_be(what: str) -> None:
    story, spoil = BROKEN[what]
    table = story()
    table.check()
    spoil(table)
    with pytest.raises(AssertionError, match=what):
        table.check()
