"""A table of transitions being walked through: an event in a state gives a new state and an action.

The owner of a machine feeds it events, and carries out the actions that it names. An event that a
state does not name is a bug, and raises with the story.
"""

import enum
from typing import Generic, TypeVar

from llumnix.errors import ProtocolError

StateT = TypeVar("StateT", bound=enum.Enum)
EventT = TypeVar("EventT", bound=enum.Enum)
ActionT = TypeVar("ActionT", bound=enum.Enum)
HISTORY_MAX = 64


class Machine(Generic[StateT, EventT, ActionT]):
    """One table being walked through."""

    def __init__(
        self,
        name: str,
        table: dict[StateT, dict[EventT, tuple[StateT, ActionT]]],
        start: StateT,
        ends: tuple[StateT, ...],
    ) -> None:
        self.name = name
        self.state = start
        self.history: list[tuple[EventT, StateT]] = []
        self._table = table
        self._start = start
        self._ends = ends

    @property
    def over(self) -> bool:
        """Whether a final state was reached."""
        return self.state in self._ends

    def feed(self, event: EventT) -> ActionT:
        """Takes in an event and returns what to do; `ProtocolError` if it cannot happen here."""
        known = self._table[self.state].get(event)
        if known is None:
            story = " ".join(f"-[{e.value}]-> {s.value}" for e, s in self.history)
            raise ProtocolError(
                f"{self.name}: '{event.value}' cannot happen in state "
                f"'{self.state.value}' (story: {self._start.value} {story})"
            )
        self.state, action = known
        self.history.append((event, self.state))
        del self.history[:-HISTORY_MAX]
        return action
