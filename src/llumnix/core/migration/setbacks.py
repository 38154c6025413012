"""What stands in the way of moves: those that failed before, and the deaths that were told.

Rules
- A request that a destination declined, or was silent about, is not sent there again for
  `REQUEST_PAUSE_S`, and for twice as long after each further failure in a row, at most
  `PAUSE_MAX_S`.
- No other request is sent there either, for a shorter while: `DESTINATION_PAUSE_S`, twice as long
  each time, at most `DESTINATION_PAUSE_MAX_S`. Otherwise each request in turn would ask a
  destination that declines all. A destination that was full gets room from one step to the next, so
  this pause is short. A move that succeeds ends it.
- A request that its own engine cannot move is not chosen again for a while; one that it can never
  move is never chosen again.
- A request that finished or was preempted meanwhile has not failed to move.
- Moves that a user asks for are tried all the same.
- A frontend's requests die with it, and nothing that it sent before counts. Its messages may still
  come, since they take another socket than the news of its death.
- A migration is forfeited if both its frontend and its destination are dead: the frontend alone
  could say whether the destination had taken over, the destination alone could give the verdict.
"""

from dataclasses import dataclass
from math import inf

from llumnix.core.codes import AbortCode
from llumnix.core.messages import Migrate
from llumnix.core.migration.port import Refusal
from llumnix.core.migration.tables import SourceAction, SourceEvent
from llumnix.core.types import EngineIndex, RequestId

REQUEST_PAUSE_S = 2.0
PAUSE_MAX_S = 60.0
DESTINATION_PAUSE_S = 0.25
DESTINATION_PAUSE_MAX_S = 4.0
SETBACKS_MAX = 4096
"""Requests and destinations that are remembered; the oldest are forgotten first."""

SOURCE_DIED = Refusal(why="the source died", code=AbortCode.PEER_LOST)
FRONTEND_DIED = Refusal(why="its frontend died", code=AbortCode.PEER_LOST)
_NOT_TAKEN = (SourceEvent.DECLINED, SourceEvent.TIMED_OUT)
_Key = tuple[RequestId | None, EngineIndex | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setback:
    failures: int  # in a row
    until_s: float  # no new try before


class Setbacks:
    """The setbacks of one engine's requests."""

    def __init__(self) -> None:
        self._known: dict[_Key, _Setback] = {}

    def learn(self, grant: Migrate, event: SourceEvent, action: SourceAction, now: float) -> None:
        """A migration has ended with this event and this action."""
        if action is SourceAction.RELEASE:
            self.moved(grant.request, grant.destination)
        elif event is SourceEvent.FAILED:
            self.stuck(grant.request, now)
        elif event in _NOT_TAKEN and action is not SourceAction.FREE_BLOCKS:
            self.declined(grant.request, grant.destination, now)

    def declined(self, request: RequestId, destination: EngineIndex, now: float) -> None:
        """The destination declined the request, or was silent."""
        self._note((request, destination), REQUEST_PAUSE_S, PAUSE_MAX_S, now)
        self._note((None, destination), DESTINATION_PAUSE_S, DESTINATION_PAUSE_MAX_S, now)

    def stuck(self, request: RequestId, now: float, *, for_ever: bool = False) -> None:
        """This engine cannot move the request, wherever it should go."""
        if for_ever:
            self._note((request, None), inf, inf, now)
        else:
            self._note((request, None), REQUEST_PAUSE_S, PAUSE_MAX_S, now)

    def moved(self, request: RequestId, destination: EngineIndex) -> None:
        """The request has moved."""
        self._known.pop((request, destination), None)
        self._known.pop((None, destination), None)

    def pauses(self, request: RequestId | None, destination: EngineIndex, now: float) -> bool:
        """Whether the request should not be sent there now. With `None` for the request: whether no
        request should."""
        keys = [(request, destination)]
        if request is not None:
            keys.append((request, None))  # type: ignore[arg-type]
        return any((known := self._known.get(key)) and now < known.until_s for key in keys)

    def _note(self, key: _Key, first_s: float, most_s: float, now: float) -> None:
        before = self._known.pop(key, None)
        failures = 1 if before is None else before.failures + 1
        pause_s = min(first_s * 2.0 ** min(failures - 1, 16), most_s)
        self._known[key] = _Setback(failures=failures, until_s=now + pause_s)
        if len(self._known) > SETBACKS_MAX:
            del self._known[next(iter(self._known))]


class Losses:
    """The frontends and engines that this engine was told are dead."""

    def __init__(self) -> None:
        self.clients: set[int] = set()  # frontends, by client index
        self.engines: set[EngineIndex] = set()

    def forfeits(self, grant: Migrate) -> bool:
        """Whether nobody is left who could say what becomes of the migration."""
        return grant.client in self.clients and grant.destination in self.engines
