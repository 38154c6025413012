"""Moves that failed, and for how long they are not asked for again.

Rules
- A request that a destination declined, or was silent about, is not sent there again for a while:
  `REQUEST_PAUSE_S`, and twice as long after each failure in a row, at most `PAUSE_MAX_S`.
- Nor is any other request, for a shorter while (`DESTINATION_PAUSE_S`, twice as long each time, at
  most `DESTINATION_PAUSE_MAX_S`), or a destination that declines all would be asked by each in
  turn. One that was full gets room from one step to the next. A move that goes well ends that.
- A request that its own engine cannot move is not chosen again for a while, and if it never can,
  never again.
- A request that finished or was preempted meanwhile has not failed to move.
- Users' orders are carried out all the same.
"""

from dataclasses import dataclass
from math import inf

from llumnix.core.types import EngineIndex, RequestId

REQUEST_PAUSE_S = 2.0
PAUSE_MAX_S = 60.0
DESTINATION_PAUSE_S = 0.25
DESTINATION_PAUSE_MAX_S = 4.0
SETBACKS_MAX = 4096
"""Requests and destinations that are remembered; the oldest are forgotten first."""

_Key = tuple[RequestId | None, EngineIndex | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setback:
    """So many failures in a row; no new try before `until_s`."""

    failures: int
    until_s: float


class Setbacks:
    """One engine's."""

    def __init__(self) -> None:
        self._known: dict[_Key, _Setback] = {}

    def declined(self, request: RequestId, destination: EngineIndex, now: float) -> None:
        """The destination would not have it, or said nothing."""
        self._note((request, destination), REQUEST_PAUSE_S, PAUSE_MAX_S, now)
        self._note((None, destination), DESTINATION_PAUSE_S, DESTINATION_PAUSE_MAX_S, now)

    def stuck(self, request: RequestId, now: float, *, for_ever: bool = False) -> None:
        """This engine cannot move it away, wherever it should go."""
        if for_ever:
            self._note((request, None), inf, inf, now)
        else:
            self._note((request, None), REQUEST_PAUSE_S, PAUSE_MAX_S, now)

    def moved(self, request: RequestId, destination: EngineIndex) -> None:
        """It went well."""
        self._known.pop((request, destination), None)
        self._known.pop((None, destination), None)

    def pauses(self, request: RequestId | None, destination: EngineIndex, now: float) -> bool:
        """Whether the request should not be sent there now; None: nothing should."""
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
