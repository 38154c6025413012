"""Moves that failed, and for how long they are not asked for again.

Rules
- A request that a destination declined, or was silent about, is not sent there again for a while:
  `REQUEST_PAUSE_S`, and twice as long after each failure in a row, at most `PAUSE_MAX_S`.
- Nor is any other request, for a shorter while, or a destination that declines all would be asked
  by each in turn. A move that goes well ends that.
- A request that its own engine cannot move is not chosen again for a while, and if it never can,
  never again.
- A request that finished or was preempted meanwhile has not failed to move.
- Users' orders are carried out all the same.
"""

from dataclasses import dataclass

from llumnix.core.types import EngineIndex, RequestId

REQUEST_PAUSE_S = 2.0
DESTINATION_PAUSE_S = 0.25
PAUSE_MAX_S = 60.0
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
        self._note((request, destination), REQUEST_PAUSE_S, now)
        self._note((None, destination), DESTINATION_PAUSE_S, now)

    def stuck(self, request: RequestId, now: float, *, for_ever: bool = False) -> None:
        """This engine cannot move it away, wherever it should go."""
        self._note((request, None), float("inf") if for_ever else REQUEST_PAUSE_S, now)

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

    def _note(self, key: _Key, pause_s: float, now: float) -> None:
        before = self._known.pop(key, None)
        failures = 1 if before is None else before.failures + 1
        if pause_s != float("inf"):
            pause_s = min(pause_s * 2.0 ** min(failures - 1, 16), PAUSE_MAX_S)
        self._known[key] = _Setback(failures=failures, until_s=now + pause_s)
        if len(self._known) > SETBACKS_MAX:
            del self._known[next(iter(self._known))]
