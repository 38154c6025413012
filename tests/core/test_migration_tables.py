"""The two tables, as tables."""

import pytest

from llumnix.core.machine import Machine
from llumnix.core.migration.tables import (
    DESTINATION,
    SOURCE,
    DestinationEvent,
    DestinationState,
    SourceAction,
    SourceEvent,
    SourceState,
    destination_machine,
    source_machine,
)
from llumnix.errors import ProtocolError

TABLES = [
    (SOURCE, SourceState.RESERVING, (SourceState.COMMITTED, SourceState.ABORTED)),
    (
        DESTINATION,
        DestinationState.PREPARING,
        (DestinationState.COMMITTED, DestinationState.ABORTED),
    ),
]


@pytest.mark.parametrize(("table", "start", "ends"), TABLES)
def test_every_state_is_reached_and_every_open_one_can_end(table, start, ends) -> None:
    reached, todo = {start}, [start]
    while todo:
        for state, _ in table[todo.pop()].values():
            if state not in reached:
                reached.add(state)
                todo.append(state)
    assert reached == set(table)
    for state in set(table) - set(ends):
        assert (
            any(next_ in ends for next_, _ in table[state].values())
            or state.value == "between stages"
        )


@pytest.mark.parametrize(("table", "start", "ends"), TABLES)
def test_what_is_over_stays_over(table, start, ends) -> None:
    for end in ends:
        assert {state for state, _ in table[end].values()} == {end}


def test_after_the_handover_only_a_word_about_the_destination_resumes_the_source() -> None:
    resuming = {
        event
        for event, (_, action) in SOURCE[SourceState.DECIDING].items()
        if action is SourceAction.RESUME
    }
    assert resuming == {SourceEvent.DECLINED, SourceEvent.GRANTED}
    assert SOURCE[SourceState.DECIDING][SourceEvent.TIMED_OUT][0] is SourceState.DECIDING


def test_what_is_not_in_the_table_raises_with_the_whole_story() -> None:
    machine: Machine = source_machine("m7")
    machine.feed(SourceEvent.RESERVED)
    machine.feed(SourceEvent.MORE)
    with pytest.raises(ProtocolError) as error:
        machine.feed(SourceEvent.TAKEN)
    assert str(error.value) == (
        "migration m7 (source): 'taken' cannot happen in state 'copying' (story: reserving "
        "-[reserved]-> between stages -[more]-> copying)"
    )


def test_a_destination_decides_once() -> None:
    machine: Machine = destination_machine("m7")
    for event in (
        DestinationEvent.PREPARED,
        DestinationEvent.HANDOVER,
        DestinationEvent.PULLED,
        DestinationEvent.INSTALLED,
    ):
        machine.feed(event)
    assert machine.over
    machine.feed(DestinationEvent.CANCELLED)
    assert machine.state is DestinationState.COMMITTED
