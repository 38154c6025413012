"""One frontend of a fake cluster: the production table of streams, and what a frontend does around
it. It checks what its clients get.

A frontend believes that an engine lives until the office tells it otherwise, which may be later
than another frontend learns of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llumnix.core.messages import COPIES, MigrationEnded, MigrationRequested, TookOver
from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.effects import Abort, AskFate, Effect, Moved, Orphaned, Revived, TellLost
from llumnix.core.streams.stream import Refusal
from llumnix.core.streams.table import ENGINE_DIED, StreamTable
from llumnix.core.types import EngineIndex, RequestId
from support.fake_engine import Said
from support.fake_survival import Survival

if TYPE_CHECKING:
    from support.fake_cluster import Cluster


@dataclass(slots=True, kw_only=True)
class Client:
    """One stream as its client sees it."""

    prompt: list[int]
    max_tokens: int
    expected: list[int]
    got: list[int] = field(default_factory=list)
    state: str = "open"
    priority: int = 0
    detailed: bool = False


class Frontend:
    """It, with its client index."""

    def __init__(self, client: int, cluster: Cluster, settings: SurvivalSettings) -> None:
        self.client = client
        self.cluster = cluster
        self.random = cluster.random
        self.streams: StreamTable[None, Said] = StreamTable(client)
        self.clients: dict[RequestId, Client] = {}
        self.survival = Survival(self, settings)
        self.ended: list[MigrationEnded] = []
        self.wanted = 0
        self.asking: list[AskFate] = []
        self.deaths: list[EngineIndex] = []  # told by the office, and not looked at yet
        self.heard: dict[EngineIndex, deque] = {e: deque() for e in cluster.engines}
        self._losing: EngineIndex | None = None

    @property
    def now(self) -> float:
        return self.cluster.now

    @property
    def engines(self) -> list[EngineIndex]:
        """Those that live, as far as it knows."""
        return list(self.heard)

    def send(self, engine: EngineIndex, message: tuple) -> None:
        """In order; lost if the engine is dead."""
        if message[0] == "add":
            self.cluster.had.add((engine, message[1]))
        elif message[0] == "revive":
            self.cluster.had.add((engine, message[1].request))
        if (queues := self.cluster.to_engine.get(engine)) is not None:
            queues.setdefault(self.client, deque()).append(message)

    def will_abort(self, engine: EngineIndex, request: RequestId) -> bool:
        """Whether the engine has yet to read that it is to abort the request."""
        return ("abort", request) in self.cluster.to_engine[engine].get(self.client, ())

    # -- what it is made to do

    def add(self, request: RequestId, client: Client, engine: EngineIndex) -> None:
        """A request comes."""
        self.clients[request] = client
        stream = self.streams.open(request, None, detailed=client.detailed)
        self.streams.placed(stream, engine)
        self.send(engine, ("add", request, client.prompt, client.max_tokens, self.client))

    def open_requests(self) -> list[RequestId]:
        return [r for r, c in self.clients.items() if c.state == "open"]

    def move_one(self, staged: float) -> None:
        """A user orders a move of some request to somewhere. `staged`: the chance of that copy."""
        if not (requests := self.open_requests()) or not self.heard:
            return
        stream = self.streams.get(self.random.choice(requests))
        to = self.random.choice(self.engines)
        if stream is None or stream.owner not in self.heard:
            return
        how = "staged" if self.random.random() < staged else self.random.choice(COPIES)
        order = self.streams.grant(stream.request, to, f"engine {to}", how)
        if not isinstance(order, Refusal):
            self.send(stream.owner, ("migrate", order))

    def hang_up(self) -> None:
        """Some client goes away."""
        if requests := self.open_requests():
            request = self.random.choice(requests)
            self.clients[request].state = "hung up"
            self._close(request)

    def lose(self, index: EngineIndex) -> None:
        """An engine died."""
        del self.heard[index]
        self._losing = index
        self.perform(self.streams.engine_lost(index, self.engines))
        self._losing = None
        self.asking = [a for a in self.asking if a.engine != index]

    def ask_fates(self) -> None:
        """Asks engines what became of requests."""
        llumlets, world = self.cluster.llumlets, self.cluster.world
        for ask in list(self.asking):
            if ask.engine in llumlets and self.random.random() < 0.3:
                if self.cluster.happens(world.mute):
                    self.asking.remove(ask)
                    self.perform(self.streams.fate(ask.migration, "undecided"))
                    continue
                fate = llumlets[ask.engine].fate(ask.migration)
                if fate != "undecided":
                    self.asking.remove(ask)
                    self.heard[ask.engine].append(("fate", ask.migration, fate))

    # -- what engines say

    def take_in(self, index: EngineIndex, message: tuple) -> None:
        match message:
            case ("said", (request, tokens, _) as said):
                due: list[Said] = []
                effects = self.streams.receive(index, request, tokens, said, due)
                self.streams.check()
                for output in due:
                    self._client_gets(output)
                self.perform(effects)
                self.survival.heard(index, request)
            case ("llumlet", TookOver() as took):
                self.perform(self.streams.took_over(index, took))
            case ("llumlet", MigrationEnded() as ended):
                self.ended.append(ended)
                self.perform(self.streams.ended(ended))
            case ("llumlet", MigrationRequested(request=request, destination=to)):
                self.wanted += 1
                stream = self.streams.get(request)
                if stream is not None and stream.owner == index and to in self.heard:
                    order = self.streams.grant(request, to, f"engine {to}", wanted=True)
                    if not isinstance(order, Refusal):
                        self.send(index, ("migrate", order))
            case ("fate", migration, fate):
                self.perform(self.streams.fate(migration, fate))

    def _client_gets(self, said: Said) -> None:
        request, tokens, finished = said
        client = self.clients[request]
        assert client.state == "open", f"{request} heard after its end"
        client.got += tokens
        assert client.got == client.expected[: len(client.got)], f"{request}: a gap or a repeat"
        if finished:
            client.state = "finished"
            self._close(request)

    def _close(self, request: RequestId) -> None:
        self.survival.closed(request)
        closed = self.streams.close(request)
        for engine in closed[1] if closed else ():
            self.send(engine, ("abort", request))
        self.streams.check()

    def perform(self, effects: Sequence[Effect]) -> None:
        self.streams.check()
        for effect in effects:
            match effect:
                case Abort(engine=engine, request=request):
                    self.send(engine, ("abort", request))
                case TellLost(engine=engine, lost=lost, granted=granted):
                    self.send(engine, ("lost", lost, granted, self.client))
                case AskFate():
                    self.asking.append(effect)
                case Orphaned(request=request):
                    self._check_orphan(request, effect.why)
                    if not self.survival.orphaned(effect):
                        self.clients[request].state = "lost"
                        self._close(request)
                case Revived(request=request):
                    self.survival.goes_on(request)
                case Moved(request=request, missing=missing, held=held):
                    self.survival.moved(request)
                    if missing:
                        assert not self.clients[request].detailed, f"{request} got bare tokens"
                        self._client_gets((request, list(missing), False))
                    for said in held:
                        self._client_gets(said)  # type: ignore[arg-type]

    # -- checkers

    def _check_orphan(self, request: RequestId, why: str) -> None:
        """A stream has no engine only if its request died with one."""
        self.cluster.check_orphan(self, request)
        stream, lost = self.streams.get(request), self._losing
        assert stream is not None
        if lost is not None and why == ENGINE_DIED:
            had = (lost, request) in self.cluster.had
            assert had or stream.last_owner not in self.heard, f"{lost} never had {request}"

    def at_rest(self) -> bool:
        return not (self.asking or self.deaths or len(self.streams) or any(self.heard.values()))

    def check_rest(self, lives: int) -> None:
        assert not len(self.streams), "a stream is still open"
        for request, client in self.clients.items():
            assert client.state != "open", f"{request} was forgotten"
            if client.state == "finished":
                assert client.got == client.expected
            assert client.state != "lost" or self.survival.revived[request] >= lives
        assert not self.survival.orphans
        assert not self.survival.orphans.taken_up


def name_of(message: tuple[Any, ...]) -> str:
    """What kind of message it is."""
    return type(message[1]).__name__ if message[0] in ("peer", "llumlet") else message[0]
