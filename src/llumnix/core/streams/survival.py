"""Which requests outlive their engine, and in which order other engines take them up.

Rules
- A request outlives `lives` engines. Then its stream ends with an error.
- An engine that takes up a request computes the whole of it anew, while all requests that run there
  wait. So it takes up `at_once` requests at a time; a request counts until its next token.
- The most urgent go first, then those with the fewest tokens. Suspects of a death go after them,
  one at a time for an engine (core/streams/probation.py).
- A request that was declined waits for a while. It is declined `DECLINED_MAX` times at most. An
  engine that takes none just now, since it is paused or asleep, is asked again every `LATER_S`.
- A request waits `wait_s` for an engine, over all engines that decline it or die meanwhile. While
  suspects go on one after the other, the wait of those behind them does not count. While an engine
  takes none just now, no wait counts.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from llumnix.core.codes import AbortCode
from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.probation import Probation, Verdict
from llumnix.core.types import EngineIndex, RequestId

SHOWN_EVERY_S = 15.0
"""So often the client of a request that waits is shown that its connection lives."""
DECLINED_MAX = 8
DECLINED_PAUSE_S = 0.1
"""After the first time; each further pause is twice as long."""
LATER_S = 0.5


@dataclass(slots=True, kw_only=True)
class Orphan:
    """A request whose engine died."""

    request: RequestId
    priority: int  # vLLM's number
    tokens: int  # prompt and output
    arrived_s: float  # when its client sent it
    since_s: float  # when its engine died; of several in a row, the first
    why: str  # it has no engine
    warm: EngineIndex | None = None  # engine that may have a part of its KV in its cache
    declined: int = 0  # times
    start_s: float = 0.0  # it is not asked for before
    shown_s: float | None = None  # when its client was last shown that it waits

    @property
    def turn(self) -> tuple[int, int, float, RequestId]:
        """Lower goes first."""
        return self.priority, self.tokens, self.since_s, self.request


class Orphans:
    """The orphans of one frontend, and the requests that engines are taking up."""

    def __init__(self, settings: SurvivalSettings) -> None:
        self.settings = settings
        self.probation = Probation()
        self._tried_s = 0.0  # when a suspect had its turn last
        self._shut_s = 0.0  # when an engine last said that it takes none just now
        self._waiting: dict[RequestId, Orphan] = {}
        self._taken_up: dict[RequestId, tuple[EngineIndex, Orphan]] = {}
        self._at: Counter[EngineIndex] = Counter()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def taken_up(self) -> bool:
        """Whether an engine is taking one up, and has sent no token of it yet."""
        return bool(self._taken_up)

    @property
    def watched(self) -> bool:
        """Whether it matters what engines say of any of them."""
        return bool(self._taken_up) or self.probation.busy

    def engine_of(self, request: RequestId) -> EngineIndex | None:
        """The engine that is taking it up."""
        known = self._taken_up.get(request)
        return None if known is None else known[0]

    def at(self, engine: EngineIndex) -> list[RequestId]:
        """Those that the engine is taking up."""
        return [request for request, (at, _) in self._taken_up.items() if at == engine]

    def add(self, orphan: Orphan, *, declined: AbortCode | None, now: float) -> str | None:
        """A request has lost its engine. `declined`: why the engine that was to take it up does
        not; None if it died. Returns why the request waits for no other one, or None if it
        does."""
        before = self.drop(orphan.request)
        self.probation.back(orphan.request)
        if before is not None:
            orphan.since_s, orphan.declined = before.since_s, before.declined
        if declined is AbortCode.BUSY:
            self._shut_s = now
            orphan.start_s = now + LATER_S
        elif declined is not None:
            if orphan.declined >= DECLINED_MAX:
                return f"no instance can go on with it ({orphan.why})"
            orphan.start_s = now + DECLINED_PAUSE_S * 2**orphan.declined
            orphan.declined += 1
            orphan.warm = None
        self._waiting[orphan.request] = orphan
        return None

    def next(self, engines: Iterable[EngineIndex], now: float) -> Orphan | None:
        """The request to be taken up now, if one of these engines, which take requests, may."""
        free = [engine for engine in engines if self._has_room(engine)]
        if not free:
            return None
        able = [o for o in self._waiting.values() if o.start_s <= now]
        others = [o for o in able if not self._suspected(o)]
        if others:
            return min(others, key=lambda o: o.turn)
        if able and any(map(self.probation.may_try, free)):
            self._tried_s = now
            return min(able, key=lambda o: (o.arrived_s, o.request))
        return None

    def may_take(self, engine: EngineIndex, orphan: Orphan) -> bool:
        """Whether the engine may take it up beside what it is taking up."""
        tried = not self._suspected(orphan) or self.probation.may_try(engine)
        return tried and self._has_room(engine)

    def _has_room(self, engine: EngineIndex) -> bool:
        return self._at[engine] < self.settings.at_once

    def _suspected(self, orphan: Orphan) -> bool:
        return self.probation.verdict(orphan.request) is not Verdict.INNOCENT

    def fewest(self, engines: Iterable[EngineIndex], orphan: Orphan) -> EngineIndex | None:
        """Of these engines the one that is taking up the fewest, if it may take this one up."""
        able = (engine for engine in engines if self.may_take(engine, orphan))
        return min(able, key=lambda e: (self._at[e], e), default=None)

    def begin(self, request: RequestId, engine: EngineIndex, outputs: int) -> None:
        """The engine is asked to take the request up, which has so many outputs."""
        self._taken_up[request] = engine, self._waiting.pop(request)
        self._at[engine] += 1
        self.probation.begin(request, engine, outputs)

    def drop(self, request: RequestId) -> Orphan | None:
        """The request has a token from its new engine, or is over. Returns what was known of it."""
        if (waiting := self._waiting.pop(request, None)) is not None:
            return waiting
        if (known := self._taken_up.pop(request, None)) is None:
            return None
        self._at[known[0]] -= 1
        if not self._at[known[0]]:
            del self._at[known[0]]
        return known[1]

    def to_show(self, now: float) -> list[RequestId]:
        """Those that wait, and whose clients were not shown that for `SHOWN_EVERY_S`."""
        silent = [
            o
            for o in self._waiting.values()
            if now - (o.since_s if o.shown_s is None else o.shown_s) > SHOWN_EVERY_S
        ]
        for orphan in silent:
            orphan.shown_s = now
        return [orphan.request for orphan in silent]

    def ended(self, request: RequestId) -> None:
        """Its stream has ended."""
        self.drop(request)
        self.probation.drop(request)

    def late(self, now: float) -> list[RequestId]:
        """Those that have waited for too long."""
        if self.probation.busy or not self.probation.turn:
            self._tried_s = now
        since = (
            (o.request, max(o.since_s, self._shut_s, self._tried_s if self._suspected(o) else 0.0))
            for o in self._waiting.values()
        )
        return [request for request, since_s in since if now - since_s > self.settings.wait_s]
