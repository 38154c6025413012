"""Which requests may have killed their engine, and how the one that did is found.

Rules
- A death counts if it was of the engine's own making (core/supervision/blame.py). Its suspects are
  the requests that the engine was starting, or if there are none, all that it ran
  (engine/reporting/flight_recorder.py). Requests that waited there are no suspects. If it is not
  known what the engine ran, all its requests are.
- A suspect is revived on probation: one at a time for an engine, in the order in which they came.
  It passes its probation with its first token and `CLEARED_AFTER` more.
- If the engine dies of its own making meanwhile, and the request is a suspect again, it is
  condemned: nobody computes it again.
- A request is condemned too if it is the only suspect common to two deaths within `SAME_CAUSE_S`.
- If more than half of the instances have died of their own making, no suspect is revived until one
  of them serves again. Requests are not to blame for a bad driver, and must not take it to the
  instances that are left.
- Where there are several frontends, one of them at a time has the turn to revive suspects
  (core/supervision/frontends.py), and the suspects of a death are those of all frontends.
"""

import enum
from collections import deque
from collections.abc import Collection, Iterable
from collections.abc import Set as AbstractSet

from llumnix.core.types import EngineIndex, InstanceId, RequestId

CLEARED_AFTER = 16
"""Tokens after the first one."""
SAME_CAUSE_S = 60.0


class Verdict(enum.Enum):
    """Whether a request whose engine died may have killed it."""

    INNOCENT = "innocent"
    SUSPECT = "suspect"
    CONDEMNED = "condemned"


class Probation:
    """The suspects of one frontend."""

    def __init__(self) -> None:
        self._suspects: dict[RequestId, EngineIndex | None] = {}  # where each is on probation
        self._until: dict[RequestId, int] = {}  # how many outputs end its probation
        self._at: dict[EngineIndex, RequestId] = {}
        self._condemned: set[RequestId] = set()
        self._deaths: deque[tuple[float, frozenset[RequestId]]] = deque()
        self._down: set[InstanceId] = set()
        self.held = False  # because too many instances are down
        self.turn = True  # whether this frontend, of several, may have suspects computed again

    # -- deaths

    def lost(self, engine: EngineIndex) -> None:
        """An engine is gone. A request that was on probation there is a suspect as before."""
        request = self._at.pop(engine, None)
        if request is not None:
            self._suspects[request] = None
            del self._until[request]

    def died(
        self,
        engine: EngineIndex,
        instance: InstanceId,
        accused: AbstractSet[RequestId],
        everyone: AbstractSet[RequestId],
        serving: Collection[InstanceId],
        now: float,
    ) -> None:
        """An engine died of its own making. `accused`: its suspects; `everyone`: those of all
        frontends; `serving`: the instances that are left."""
        tried = self._at.get(engine)
        if tried is not None and tried in accused:
            self._condemned.add(tried)
        while self._deaths and now - self._deaths[0][0] > SAME_CAUSE_S:
            self._deaths.popleft()
        for _, before in self._deaths:
            if len(common := before & everyone) == 1:
                self._condemned |= common & accused
        self._deaths.append((now, frozenset(everyone)))
        self.lost(engine)
        for request in accused:
            self._suspects.setdefault(request, None)
        self.serve(serving)
        self._down.add(instance)
        self.held = self.held or len(self._down) > len(serving)

    def serve(self, instances: Iterable[InstanceId]) -> None:
        """These instances take requests."""
        if self._down and (back := self._down.intersection(instances)):
            self._down -= back
            self.held = False

    # -- one request

    def verdict(self, request: RequestId) -> Verdict:
        """Whether the request may have killed an engine."""
        if request in self._condemned:
            return Verdict.CONDEMNED
        return Verdict.SUSPECT if request in self._suspects else Verdict.INNOCENT

    def begin(self, request: RequestId, engine: EngineIndex, outputs: int) -> None:
        """The engine is asked to go on with a request that has so many outputs. If that is a
        suspect, it is on probation there."""
        if request in self._suspects:
            self._suspects[request] = engine
            self._until[request] = outputs + 1 + CLEARED_AFTER
            self._at[engine] = request

    def back(self, request: RequestId) -> None:
        """The engine does not go on with it after all."""
        engine = self._suspects.get(request)
        if engine is not None:
            self.lost(engine)

    def passed(self, request: RequestId, outputs: int) -> bool:
        """Whether it has passed its probation, with so many outputs."""
        return request in self._until and outputs >= self._until[request]

    def drop(self, request: RequestId) -> None:
        """It is no suspect any more, or has ended."""
        self.back(request)
        self._suspects.pop(request, None)
        self._condemned.discard(request)

    # -- engines

    def engine_of(self, request: RequestId) -> EngineIndex | None:
        """Where it is on probation."""
        return self._suspects.get(request)

    def may_try(self, engine: EngineIndex) -> bool:
        """Whether a suspect may be revived there."""
        return self.turn and not self.held and engine not in self._at

    @property
    def any(self) -> bool:
        """Whether there are suspects."""
        return bool(self._suspects)

    @property
    def busy(self) -> bool:
        """Whether a request is on probation."""
        return bool(self._at)
