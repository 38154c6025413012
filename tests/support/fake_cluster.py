"""Engines, their llumlets and one frontend over links that lose, delay, repeat and reorder.

Everything that happens is drawn from one seed. The production code under test is the llumlet (with
both machines) and the table of streams; this file is only the world around them, and the checkers:
a table of streams that agrees with itself after every event, one live owner, no block leaked, no
token lost, repeated or out of order, no block of a prefix cache with the bytes of other tokens, no
stream lost that an engine goes on with.

An engine hears through the two queues that engine/migration/host.py has: what comes from outside
waits in one for the end of the engine's step; finished pulls wait in the other, which is emptied
right after the step, and so ahead of what came before them.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from llumnix.core.events import MoveLimit, MoveOrder
from llumnix.core.limits import MigrationLimits
from llumnix.core.messages import (
    COPIES,
    Handover,
    MigrationEnded,
    MigrationRequested,
    Out,
    PeerMessage,
    TookOver,
    ToPeer,
)
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.migration.tables import OnStep
from llumnix.core.streams.effects import Abort, AskFate, Effect, Moved, Orphaned, TellLost
from llumnix.core.streams.stream import Refusal
from llumnix.core.streams.table import StreamTable
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId
from support.fake_engine import FakeEngine, Said, undisturbed

TICK_S = 0.01
QUIET_TICKS_MAX = 60_000


@dataclass(slots=True, kw_only=True)
class World:
    """How rough it is. Each is a chance in a tick or of a message; `blocks`: of an engine's KV
    cache, one of these."""

    loss: float = 0.05
    repeat: float = 0.05
    crash: float = 0.0
    abort: float = 0.002
    preempt: float = 0.003
    failed_pull: float = 0.02
    migrate: float = 0.15
    order: float = 0.1
    arrival: float = 0.02
    pull_end: float = 0.4
    blocks: tuple[int, ...] = (20, 40, 80)
    turn: float = 0.7
    staged: float = 0.8
    fault_ticks: int = 250


@dataclass(slots=True, kw_only=True)
class Client:
    """One stream as its client sees it."""

    prompt: list[int]
    max_tokens: int
    expected: list[int]
    got: list[int] = field(default_factory=list)
    state: str = "open"


class Cluster:
    """The world of one seed."""

    def __init__(
        self,
        seed: int,
        world: World,
        *,
        engines: int = 3,
        requests: int = 6,
        on_step: OnStep = lambda *_: None,
    ) -> None:
        self.random = random.Random(seed)
        self.world = world
        self.on_step = on_step
        self.now = 0.0
        self.streams: StreamTable[None, Said] = StreamTable()
        self.engines: dict[EngineIndex, FakeEngine] = {}
        self.llumlets: dict[EngineIndex, Llumlet] = {}
        self.wire: list[tuple[EngineIndex, PeerMessage]] = []
        self.pulls: list[tuple[EngineIndex, int, EngineIndex, list[tuple[int, int]]]] = []
        self.to_engine: dict[EngineIndex, deque] = {}
        self.finished: dict[EngineIndex, deque[tuple[int, str | None, int]]] = {}
        self.to_frontend: dict[EngineIndex, deque] = {}
        self.asking: list[AskFate] = []
        self.clients: dict[RequestId, Client] = {}
        self.ended: list[MigrationEnded] = []
        self.orders: dict[EngineIndex, set[OrderId]] = {}
        self.wanted = 0
        self.crashed = False
        for number in range(engines):
            self._start(EngineIndex(number))
        self.next_engine = engines
        for number in range(requests):
            self._arrive(RequestId(f"r{number}"))
        self.next_request = requests
        self.next_order = 0

    # -- the world

    def _start(self, index: EngineIndex) -> None:
        engine = FakeEngine(
            index,
            blocks=self.random.choice(self.world.blocks),
            depth=self.random.randrange(2),
            on_pull=lambda ticket, source, pairs: self.pulls.append((index, ticket, source, pairs)),
            on_cancel=lambda ticket: self._cancel(index, ticket),
        )
        self.engines[index] = engine
        self.llumlets[index] = Llumlet(
            index,
            f"engine {index}",
            engine,
            MigrationLimits(incoming_max=3, outgoing_max=3),
            self.on_step,
        )
        self.to_engine[index] = deque()
        self.finished[index] = deque()
        self.to_frontend[index] = deque()

    def _arrive(self, request: RequestId) -> None:
        prompt = [self.random.randrange(900) for _ in range(self.random.randrange(1, 40))]
        if self.clients and self.random.random() < 0.3:
            other = self.random.choice(list(self.clients.values()))
            whole = other.prompt + other.expected
            prompt = (whole[: self.random.randrange(1, len(whole))] + prompt)[:39]
        count = self.random.randrange(1, 40)
        client = Client(prompt=prompt, max_tokens=count, expected=undisturbed(prompt, count))
        self.clients[request] = client
        index = self.random.choice(list(self.engines))
        self.streams.placed(self.streams.open(request, None), index)
        self.to_engine[index].append(("add", request, prompt, client.max_tokens))

    def run(self) -> None:
        """Lives through the rough time, then lets everything come to rest, and checks."""
        for _ in range(self.world.fault_ticks):
            self._mischief()
            self._tick()
        calm = self.world
        self.world = World(
            loss=0, repeat=0, crash=0, abort=0, preempt=0, failed_pull=0, migrate=0, order=0
        )
        for _ in range(QUIET_TICKS_MAX):
            if self._at_rest():
                break
            self._tick()
        self.world = calm
        self._check_rest()

    def _mischief(self) -> None:
        draw, world = self.random.random, self.world
        if draw() < world.migrate:
            self._order_migration()
        if draw() < world.order:
            self._order_load()
        if draw() < world.abort:
            open_ = [r for r, c in self.clients.items() if c.state == "open"]
            if open_:
                self._hang_up(self.random.choice(open_))
        if draw() < world.preempt:
            self.random.choice(list(self.engines.values())).preempt_somebody()
        if draw() < world.crash and len(self.engines) > 1:
            self._crash(self.random.choice(list(self.engines)))
        if draw() < world.arrival:
            self._arrive(RequestId(f"r{self.next_request}"))
            self.next_request += 1

    def _order_migration(self) -> None:
        open_ = [r for r, c in self.clients.items() if c.state == "open"]
        if not open_:
            return
        request = self.random.choice(open_)
        stream = self.streams.get(request)
        to = self.random.choice(list(self.engines))
        if stream is None or stream.owner is None or stream.owner not in self.engines:
            return
        how = "staged" if self.random.random() < self.world.staged else self.random.choice(COPIES)
        order = self.streams.grant(request, to, f"engine {to}", how)
        if not isinstance(order, Refusal):
            self.to_engine[stream.owner].append(("migrate", order))

    def _order_load(self) -> None:
        """As the scheduler would, but with limits that are drawn."""
        source, to = (self.random.choice(list(self.engines)) for _ in range(2))
        if source == to:
            return
        limit = MoveLimit(
            rank=1,
            tokens_min=self.random.randrange(30),
            tokens_wanted=self.random.randrange(60),
            tokens_max=self.random.randrange(120),
            waiting_max=self.random.randrange(60),
        )
        order = OrderId(self.next_order)
        self.next_order += 1
        self.orders.setdefault(source, set()).add(order)
        load = MoveOrder(
            order=order,
            source=InstanceId(f"i{source}"),
            source_engine=source,
            destination=InstanceId(f"i{to}"),
            destination_engine=to,
            limits=(limit,),
            why="drawn",
        )
        self.to_engine[source].append(("order", load))

    def _hang_up(self, request: RequestId) -> None:
        self.clients[request].state = "hung up"
        self._close(request)

    def _crash(self, index: EngineIndex) -> None:
        self.crashed = True
        del self.engines[index], self.llumlets[index]
        del self.to_engine[index], self.to_frontend[index], self.finished[index]
        for pull in [p for p in self.pulls if p[0] == index]:
            self.pulls.remove(pull)
        self._perform(self.streams.engine_lost(index, list(self.engines)))
        self.asking = [a for a in self.asking if a.engine != index]
        self._start(EngineIndex(self.next_engine))
        self.next_engine += 1

    # -- one tick

    def _tick(self) -> None:
        self.now += TICK_S
        for index in list(self.engines):
            if self.random.random() < self.world.turn:
                self._engine_turn(index)
            if self.to_frontend[index] and self.random.random() < 0.6:
                for _ in range(self.random.randrange(1, 4)):
                    if self.to_frontend[index]:
                        self._frontend_hears(index, self.to_frontend[index].popleft())
        for _ in range(3):
            if self.wire and self.random.random() < 0.6:
                self._deliver()
            if self.pulls and self.random.random() < self.world.pull_end:
                self._end_pull(self.random.randrange(len(self.pulls)))
        for ask in list(self.asking):
            if ask.engine in self.engines and self.random.random() < 0.3:
                fate = self.llumlets[ask.engine].fate(ask.migration)
                if fate != "undecided":
                    self.asking.remove(ask)
                    self.to_frontend[ask.engine].append(("fate", ask.migration, fate))
        self.check_owners()

    def _engine_turn(self, index: EngineIndex) -> None:
        engine, inbox = self.engines[index], self.to_engine[index]
        for _ in range(self.random.randrange(5)):
            if inbox:
                self._engine_hears(index, inbox.popleft())
                self._poll(index)
        if not engine.idle():
            for said in engine.step():
                self.to_frontend[index].append(("said", said))
        self._poll(index)

    def _poll(self, index: EngineIndex) -> None:
        llumlet, finished = self.llumlets[index], self.finished[index]
        while finished:
            ticket, error, size = finished.popleft()
            self._send(index, llumlet.pulled(ticket, error, size, 0.0, self.now))
        self._send(index, llumlet.poll(self.now))
        self.engines[index].check_cache()

    def _engine_hears(self, index: EngineIndex, message: tuple) -> None:
        engine, llumlet = self.engines[index], self.llumlets[index]
        match message:
            case ("add", request, prompt, max_tokens):
                engine.add(request, prompt, max_tokens)
            case ("abort", request):
                self._send(index, llumlet.client_gone([request]))
                engine.abort(request)
            case ("peer", message):
                pulls = len(self.pulls)
                self._send(index, llumlet.receive(message, self.now))
                begun = isinstance(message, Handover) and len(self.pulls) > pulls
                if begun and self.random.random() < 0.5:
                    # The host gives the pull of a handover a moment to end.
                    self._end_pull(len(self.pulls) - 1)
            case ("migrate", order):
                self._send(index, llumlet.migrate(order, self.now))
            case ("order", order):
                self._send(index, llumlet.order(order, self.now))
                self.orders[index] -= set(llumlet.answered())
                assert llumlet.moving(self.now).out >= 0
            case ("lost", lost, granted):
                self._send(index, llumlet.engine_lost(lost, set(granted), self.now))

    def _send(self, index: EngineIndex, out: list[Out]) -> None:
        for item in out:
            if isinstance(item, ToPeer):
                if self.random.random() >= self.world.loss:
                    self.wire.append((item.engine, item.message))
                if self.random.random() < self.world.repeat:
                    self.wire.append((item.engine, item.message))
            else:
                self.to_frontend[index].append(("llumlet", item.message))

    def _deliver(self) -> None:
        to, message = self.wire.pop(self.random.randrange(len(self.wire)))
        if to in self.llumlets:
            self.to_engine[to].append(("peer", message))

    def _end_pull(self, number: int) -> None:
        index, ticket, source, pairs = self.pulls.pop(number)
        error = None
        if source not in self.engines or self.random.random() < self.world.failed_pull:
            error = "the copy failed"
        else:
            self.engines[index].copy(self.engines[source], pairs)
        self.finished[index].append((ticket, error, len(pairs)))

    def _cancel(self, index: EngineIndex, ticket: int) -> None:
        """A pull is cancelled at once, or was too far to be."""
        if self.random.random() < 0.7:
            for pull in [p for p in self.pulls if p[:2] == (index, ticket)]:
                self.pulls.remove(pull)
                if (source := self.engines.get(pull[2])) is not None:
                    self.engines[index].copy(source, pull[3][:1])
                self.finished[index].append((ticket, "cancelled", 0))

    # -- the frontend

    def _frontend_hears(self, index: EngineIndex, message: tuple) -> None:
        match message:
            case ("said", (request, tokens, _) as said):
                due: list[Said] = []
                effects = self.streams.receive(index, request, tokens, said, due)
                self.streams.check()
                for output in due:
                    self._client_gets(output)
                self._perform(effects)
            case ("llumlet", TookOver() as took):
                self._perform(self.streams.took_over(index, took))
            case ("llumlet", MigrationEnded() as ended):
                self.ended.append(ended)
                self._perform(self.streams.ended(ended))
            case ("llumlet", MigrationRequested(request=request, destination=to)):
                self.wanted += 1
                stream = self.streams.get(request)
                if stream is not None and stream.owner == index and to in self.engines:
                    order = self.streams.grant(request, to, f"engine {to}", wanted=True)
                    if not isinstance(order, Refusal):
                        self.to_engine[index].append(("migrate", order))
            case ("fate", migration, fate):
                self._perform(self.streams.fate(migration, fate))

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
        closed = self.streams.close(request)
        for engine in closed[1] if closed else ():
            self.to_engine[engine].append(("abort", request))
        self.streams.check()

    def _perform(self, effects: Sequence[Effect]) -> None:
        self.streams.check()
        for effect in effects:
            match effect:
                case Abort(engine=engine, request=request):
                    if engine in self.to_engine:
                        self.to_engine[engine].append(("abort", request))
                case TellLost(engine=engine, lost=lost, granted=granted):
                    self.to_engine[engine].append(("lost", lost, granted))
                case AskFate():
                    self.asking.append(effect)
                case Orphaned(request=request):
                    self._check_lost(request)
                    self.clients[request].state = "lost"
                    self._close(request)
                case Moved(request=request, missing=missing, held=held):
                    if missing:
                        self._client_gets((request, list(missing), False))
                    for said in held:
                        self._client_gets(said)  # type: ignore[arg-type]

    # -- checkers

    def check_owners(self) -> None:
        """No request may run on two live engines."""
        seen: dict[RequestId, EngineIndex] = {}
        for index, engine in self.engines.items():
            for request in (*engine.running, *engine.waiting):
                assert request.id not in seen, (
                    f"{request.id} runs on engines {seen[request.id]} and {index}"
                )
                seen[request.id] = index

    def _check_lost(self, request: RequestId) -> None:
        """A stream may end with an error only if its request died with an engine."""
        assert self.crashed, f"{request} was lost with no crash"
        for index, engine in self.engines.items():
            assert not engine.runs(request), f"{request} was lost, but runs on engine {index}"

    def _at_rest(self) -> bool:
        return (
            not self.wire
            and not self.pulls
            and not self.asking
            and not any(self.to_engine.values())
            and not any(self.finished.values())
            and not any(self.to_frontend.values())
            and all(e.idle() for e in self.engines.values())
            and not any(x.busy for x in self.llumlets.values())
        )

    def _check_rest(self) -> None:
        assert self._at_rest(), "something never came to rest"
        assert not len(self.streams), "a stream is still open"
        for request, client in self.clients.items():
            assert client.state != "open", f"{request} was forgotten"
            if client.state == "finished":
                assert client.got == client.expected
        for index, engine in self.engines.items():
            assert not self.orders.get(index), f"engine {index} never answered an order"
            assert not engine.requests, f"engine {index} still holds {list(engine.requests)}"
            assert not engine.arriving
            assert not engine.pinned
            leaked = len(engine.memory) - len(engine.free)
            assert leaked == 0, f"engine {index} leaked {leaked} blocks"
