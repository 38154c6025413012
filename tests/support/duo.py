"""Two engines (fake or real), their llumlets, a frontend, and every message in the test's hand.

Nothing happens by itself: the test steps engines and delivers messages, and may do anything in
between. The same scenarios thus run on an engine without a model and on vLLM's.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llumnix.core.messages import (
    OFFICE,
    MigrationEnded,
    Out,
    PeerMessage,
    Revive,
    TookOver,
    ToPeer,
)
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.streams.effects import Abort, AskFate, Effect, Moved, Orphaned, Revived, TellLost
from llumnix.core.streams.stream import Refusal
from llumnix.core.streams.table import StreamTable
from llumnix.core.types import EngineIndex, RequestId

Said = tuple[RequestId, list[int], bool, Any]
"""Of one request: new tokens, whether it is finished, and what else came with them."""
TURNS_MAX = 5000
Prompt = list[int]


class TestEngine(Protocol):
    """What a duo needs of an engine, beside its port."""

    port: Any

    def add(
        self, request: RequestId, prompt: Prompt, options: Any, *more: Any, client: int = OFFICE
    ) -> None: ...
    def again(self, order: Revive, *sent: Any) -> Any: ...
    def abort(self, request: RequestId) -> None: ...
    def step(self) -> list[Said]: ...
    def idle(self) -> bool: ...
    def preempt_somebody(self) -> None: ...
    def pulls(self) -> list[tuple[int, str | None, int, float]]: ...
    def blocks_used(self) -> int: ...
    def requests_held(self) -> int: ...
    def runs(self, request: RequestId) -> bool: ...
    def requests_of(self, client: int) -> list[RequestId]: ...
    def die(self) -> None: ...


class Duo:
    """The two of them. `before(message)` is called ahead of every delivery; it may return False to
    lose the message. With `survival` the other engine goes on with a dead one's requests; without,
    their streams end."""

    def __init__(self, make: Callable[[int, "Duo"], TestEngine]) -> None:
        self.now = 0.0
        self.streams: StreamTable[None, Said] = StreamTable(OFFICE)
        self.dead_frontends: set[int] = set()
        self.client: dict[RequestId, int] = {}
        self.engines: dict[EngineIndex, TestEngine] = {}
        self.llumlets: dict[EngineIndex, Llumlet] = {}
        self.addresses: dict[str, EngineIndex] = {}
        self.wire: deque[tuple[EngineIndex, PeerMessage]] = deque()
        self.before: Callable[[PeerMessage], bool | None] = lambda message: None
        self.survival = False
        self.orphans: list[RequestId] = []
        self.revived = 0
        self.sent: dict[RequestId, tuple[Any, ...]] = {}  # what `again` makes a request of
        self.hold_pulls = False
        self.fail_pulls = False
        self.got: dict[RequestId, list[int]] = {}
        self.extras: dict[RequestId, list[Any]] = {}
        self.state: dict[RequestId, str] = {}
        self.ended: list[MigrationEnded] = []
        self.delivered: list[PeerMessage] = []
        self.orders: list[tuple[EngineIndex, tuple]] = []
        for number in range(2):
            self._join(EngineIndex(number), make(number, self))

    def _join(self, index: EngineIndex, engine: TestEngine) -> None:
        self.engines[index] = engine
        self.llumlets[index] = Llumlet(index, f"engine {index}", engine.port)

    # -- what a test does

    def add(
        self,
        request: str,
        prompt: Prompt,
        options: Any,
        on: int = 0,
        more: tuple[Any, ...] = (),
        client: int = OFFICE,
    ) -> RequestId:
        """A new request. `more`: what else the engine is to be given, such as an adapter. One with
        another `client` than `OFFICE` cannot be moved."""
        name = RequestId(request)
        self.got[name], self.extras[name], self.state[name] = [], [], "open"
        self.sent[name] = prompt, options, *more
        self.streams.placed(self.streams.open(name, None), EngineIndex(on))
        self.client[name] = client
        self.engines[EngineIndex(on)].add(name, *self.sent[name], client=client)
        return name

    def migrate(self, request: RequestId, to: int | None = None, copy: str = "staged") -> bool:
        stream = self.streams.get(request)
        if stream is None or stream.owner is None:
            return False
        if to is None:
            to = next(i for i in self.engines if i != stream.owner)
        order = self.streams.grant(request, EngineIndex(to), f"engine {to}", copy)
        if isinstance(order, Refusal):
            return False
        self._send(stream.owner, self.llumlets[stream.owner].migrate(order, self.now))
        return True

    def hang_up(self, request: RequestId) -> None:
        if self.state[request] == "open":
            self.state[request] = "hung up"
            self._close(request)

    def lose_frontend(self, first: int, client: int = OFFICE) -> None:
        """A frontend dies with its streams. The engine `first` hears of it at once, the other one
        in its next turn."""
        self.dead_frontends.add(client)
        for request in [r for r, c in self.client.items() if c == client]:
            if self.state[request] == "open":
                self.state[request] = "died with its frontend"
                self.streams.close(request)
        self._obey(EngineIndex(first), ("frontend lost", client))
        self.orders += [(e, ("frontend lost", client)) for e in self.engines if e != first]

    def kill(self, index: int, successor: bool = True) -> None:
        """The engine dies; an empty one takes its hardware under a new index."""
        lost = EngineIndex(index)
        engine = self.engines.pop(lost)
        del self.llumlets[lost]
        engine.die()
        self.wire = deque((to, m) for to, m in self.wire if to != lost)
        self._perform(self.streams.engine_lost(lost, list(self.engines)))
        if successor:
            self._join(EngineIndex(max([*self.engines, lost]) + 1), engine)

    def turn(self) -> None:
        """One step of each engine, and all that is to be delivered and done."""
        self.now += 0.005
        self._revive()
        for index in list(self.engines):
            if index in self.engines:
                self.step(index)
        for index, order in self.orders[:]:
            self.orders.remove((index, order))
            self._obey(index, order)
        for _ in range(len(self.wire)):
            if self.wire:
                self.deliver()
        for index in list(self.engines):
            if index in self.engines and not self.hold_pulls:
                for ticket, error, size, seconds in self.engines[index].pulls():
                    error = "the copy failed" if self.fail_pulls else error
                    out = self.llumlets[index].pulled(ticket, error, size, seconds, self.now)
                    self._send(index, out)
        self.check()

    def step(self, index: EngineIndex) -> None:
        engine = self.engines[index]
        if not engine.idle():
            for said in engine.step():
                self._hear(index, said)
        self._send(index, self.llumlets[index].poll(self.now))

    def deliver(self) -> None:
        to, message = self.wire.popleft()
        if self.before(message) is False or to not in self.llumlets:
            return
        self.delivered.append(message)
        self._send(to, self.llumlets[to].receive(message, self.now))

    def turn_until(self, true: Callable[[], Any], what: str = "") -> None:
        for _ in range(TURNS_MAX):
            if true():
                return
            self.turn()
        raise AssertionError(f"never: {what}")

    def finish(self) -> None:
        """Until nothing is left to do."""
        self.turn_until(self.at_rest, "everything at rest")

    def at_rest(self) -> bool:
        return (
            not self.wire
            and not self.orders
            and not self.orphans
            and all(e.idle() for e in self.engines.values())
            and not any(x.busy for x in self.llumlets.values())
            and all(s != "open" for s in self.state.values())
        )

    # -- checkers

    def check(self) -> None:
        for request in self.got:
            owners = [i for i, e in self.engines.items() if e.runs(request)]
            assert len(owners) <= 1, f"{request} runs on {owners}"

    def check_nothing_left(self) -> None:
        for index, engine in self.engines.items():
            assert engine.blocks_used() == 0, f"engine {index} leaks {engine.blocks_used()} blocks"
            assert engine.requests_held() == 0, f"engine {index} holds requests"

    # -- the frontend

    def _revive(self) -> None:
        """The engine goes on with an orphan that was started first, so not one that has just taken
        a dead one's place."""
        orphans, self.orphans = self.orphans, []
        for request in orphans:
            order = self.streams.revive(request, min(self.engines))
            if isinstance(order, Revive):
                self.orders.append((order.destination, ("revive", order)))

    def _hear(self, index: EngineIndex, said: Said) -> None:
        request, tokens = said[0], said[1]
        due: list[Said] = []
        effects = self.streams.receive(index, request, tokens, said, due)
        self.streams.check()
        for output in due:
            self._client_gets(output)
        self._perform(effects)

    def _client_gets(self, said: Said) -> None:
        request, tokens, finished, extra = said
        assert self.state[request] == "open"
        self.got[request] += tokens
        self.extras[request].append(extra)
        if finished:
            self.state[request] = "finished"
            self._close(request)

    def _close(self, request: RequestId) -> None:
        closed = self.streams.close(request)
        for index in closed[1] if closed else ():
            self.orders.append((index, ("abort", request)))

    def _obey(self, index: EngineIndex, order: tuple) -> None:
        if index not in self.engines:
            return
        llumlet = self.llumlets[index]
        match order:
            case ("abort", request):
                self._send(index, llumlet.client_gone([request]))
                self.engines[index].abort(request)
            case ("frontend lost", client):  # As engine/instance.py does.
                self._send(index, llumlet.client_lost(client))
                requests = self.engines[index].requests_of(client)
                self._send(index, llumlet.client_gone(list(requests)))
                for request in requests:
                    self.engines[index].abort(request)
                self._send(index, llumlet.poll(self.now))
            case ("lost", lost, granted):
                self._send(index, llumlet.engine_lost(lost, set(granted), self.now, OFFICE))
            case ("revive", order):
                made = self.engines[index].again(order, *self.sent[order.request])
                self._send(index, llumlet.revive(order, made, self.now))
            case ("fate", migration):
                fate = llumlet.fate(migration)
                if fate == "undecided":
                    self.orders.append((index, order))
                else:
                    self._perform(self.streams.fate(migration, fate))

    def _send(self, index: EngineIndex, out: list[Out]) -> None:
        for item in out:
            if isinstance(item, ToPeer):
                self.wire.append((item.engine, item.message))
            elif item.client in self.dead_frontends:
                pass  # Nobody reads it.
            elif isinstance(item.message, TookOver):
                self._perform(self.streams.took_over(index, item.message))
            else:
                self.ended.append(item.message)
                self._perform(self.streams.ended(item.message))

    def _perform(self, effects: Sequence[Effect]) -> None:
        self.streams.check()
        for effect in effects:
            match effect:
                case Abort(engine=engine, request=request):
                    self.orders.append((engine, ("abort", request)))
                case TellLost(engine=engine, lost=lost, granted=granted):
                    self.orders.append((engine, ("lost", lost, granted)))
                case AskFate(engine=engine, migration=migration):
                    self.orders.append((engine, ("fate", migration)))
                case Orphaned(request=request) if self.survival:
                    self.orphans.append(request)
                case Revived():
                    self.revived += 1
                case Orphaned(request=request):
                    self.state[request] = "lost"
                    self._close(request)
                case Moved(request=request, missing=missing, held=held):
                    if missing:
                        self._client_gets((request, list(missing), False, None))
                    for said in held:
                        self._client_gets(said)  # type: ignore[arg-type]
