"""The part of a fake frontend that has other engines go on with the requests of a dead
one. Which, in which order and how many at a time is the production code's word
(core/streams/survival.py); what is around that is done as frontend/streams/reviving.py does it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.effects import Orphaned
from llumnix.core.streams.stream import Refusal
from llumnix.core.streams.survival import Orphan, Orphans
from llumnix.core.types import EngineIndex, RequestId

if TYPE_CHECKING:
    from support.fake_frontend import Frontend

ASKED_AT_ONCE = 0.6
"""The chance that the controller's answer is here in the same moment."""


class Survival:
    """It, of one frontend."""

    def __init__(self, frontend: Frontend, settings: SurvivalSettings) -> None:
        self.orphans = Orphans(settings)
        self.revived: Counter[RequestId] = Counter()
        self.engines_used: Counter[RequestId] = Counter()
        """That went on with it, or died before they could."""
        self.declined: Counter[str] = Counter()  # by reason
        self.waited_s = 0.0  # the longest from an engine's death to the next one's first token
        self._frontend = frontend
        self._taking_up: dict[RequestId, EngineIndex] = {}  # until its first token
        self._outputs: dict[RequestId, int] = {}  # of each, when it was asked for
        self._asked: set[RequestId] = set()  # whose new engine has not answered
        self._chosen: tuple[Orphan, EngineIndex] | None = None  # asked for, and not sent yet

    def orphaned(self, orphaned: Orphaned) -> bool:
        """Whether another engine may go on with it."""
        frontend, request = self._frontend, orphaned.request
        stream, client = frontend.streams.get(request), frontend.clients[request]
        assert stream is not None
        self._forget(request)
        if request in self._asked:
            self._asked.remove(request)
            self.engines_used[request] += not orphaned.declined
        assert stream.lives_used == self.engines_used[request], request
        if stream.lives_used >= self.orphans.settings.lives:
            return False
        if orphaned.declined:
            self.declined[orphaned.why] += 1
        orphan = Orphan(
            request=request,
            priority=client.priority,
            tokens=len(client.prompt) + stream.outputs,
            arrived_s=0.0,
            since_s=frontend.now,
            why=orphaned.why,
            warm=orphaned.warm,
        )
        why = self.orphans.add(orphan, declined=orphaned.declined, now=frontend.now)
        assert why is None, f"{request}: {why}"
        return True

    def goes_on(self, request: RequestId) -> None:
        """An engine has it again."""
        self._asked.remove(request)
        self.engines_used[request] += 1

    def heard(self, index: EngineIndex, request: RequestId) -> None:
        """An engine has said a token, and it was taken in."""
        stream = self._frontend.streams.get(request)
        taking_up = self.orphans.engine_of(request) == index
        if taking_up and (stream is None or stream.owner is not None):
            self._goes_on(request)

    def moved(self, request: RequestId) -> None:
        """It has gone from the engine that took it up to another."""
        if self.orphans.engine_of(request) is not None:
            self._goes_on(request)

    def closed(self, request: RequestId) -> None:
        """The stream is over."""
        self._forget(request)
        self._asked.discard(request)
        self.orphans.ended(request)

    def _goes_on(self, request: RequestId) -> None:
        orphan = self.orphans.drop(request)
        assert orphan is not None
        self._forget(request)
        self.waited_s = max(self.waited_s, self._frontend.now - orphan.since_s)

    def _forget(self, request: RequestId) -> None:
        self._taking_up.pop(request, None)
        self._outputs.pop(request, None)

    def look(self) -> None:
        """Sends what may be sent. The controller's choice may come later, and out of date."""
        frontend = self._frontend
        for request, outputs in self._outputs.items():
            stream = frontend.streams.get(request)
            assert stream is not None
            assert stream.outputs == outputs, f"{request} has a token, and counts as taken up"
        late = self.orphans.late(frontend.now)
        assert not late, f"{late} waited for too long"
        while True:
            if self._chosen is None:
                orphan = self.orphans.next(frontend.engines, frontend.now)
                if orphan is None:
                    return
                self._chosen = orphan, self._engine_for(orphan)
                if frontend.random.random() >= ASKED_AT_ONCE:
                    return
            self._send(*self._chosen)
            self._chosen = None

    def _engine_for(self, orphan: Orphan) -> EngineIndex:
        frontend, engine = self._frontend, orphan.warm
        if engine not in frontend.engines:
            engine = frontend.random.choice(frontend.engines)
        assert engine is not None
        if not self.orphans.may_take(engine, orphan):
            engine = self.orphans.fewest(frontend.engines, orphan)
        assert engine is not None
        return engine

    def _send(self, orphan: Orphan, engine: EngineIndex) -> None:
        frontend, request = self._frontend, orphan.request
        order = frontend.streams.revive(request, engine)
        frontend.streams.check()
        if isinstance(order, Refusal):
            assert order in (Refusal.ENGINE_DEAD, Refusal.NO_ORPHAN), order
            return
        self.orphans.begin(request, engine, len(order.outputs))
        self._taking_up[request] = engine
        self._outputs[request] = len(order.outputs)
        self._asked.add(request)
        many = sum(taker == engine for taker in self._taking_up.values())
        assert many <= self.orphans.settings.at_once, f"engine {engine} takes up {many}"
        self.revived[request] += 1
        client = frontend.clients[request]
        assert order.outputs == client.got
        made = client.prompt, client.max_tokens, frontend.client
        frontend.send(engine, ("revive", order, made))
