"""Engines, their llumlets and one frontend over links that lose, delay, repeat and reorder.

Everything that happens is drawn from one seed. The production code under test is the llumlet (with
both machines) and the table of streams; this file is only the world around them, and the checkers:
a table of streams that agrees with itself after every event, one live owner, no block leaked, no
token lost, repeated or out of order, no block of a prefix cache with the bytes of other tokens, no
stream that ends before its last token or waits for an engine for long.

Engines are killed between any two messages, and others come in their place. One that was taken for
dead may live on for a while as a ghost, which others still hear.

An engine hears through the two queues that engine/migration/host.py has: what comes from outside
waits in one for the end of the engine's step; finished pulls wait in the other, which is emptied
right after the step, and so ahead of what came before them. What the frontend sends it arrives in
order; so does what it says to the frontend. Peers' messages may overtake the frontend's.
"""

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llumnix.core.events import MoveLimit, MoveOrder
from llumnix.core.limits import MigrationLimits
from llumnix.core.messages import (
    COPIES,
    OFFICE,
    Handover,
    MigrationEnded,
    MigrationRequested,
    Out,
    PeerMessage,
    TookOver,
    ToPeer,
)
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.migration.port import Refusal as PortRefusal
from llumnix.core.migration.tables import OnStep
from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.effects import Abort, AskFate, Effect, Moved, Orphaned, Revived, TellLost
from llumnix.core.streams.stream import Refusal
from llumnix.core.streams.table import StreamTable
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId
from support.fake_engine import FakeEngine, Said, undisturbed
from support.fake_survival import Survival

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
    cancelled: float = 0.7  # a pull, at once
    heard: float = 0.6
    late: float = 0.0  # of what the frontend sent, while an engine deals with what its peers sent
    blocks: tuple[int, ...] = (20, 40, 80)
    turn: float = 0.7
    staged: float = 0.8
    fault_ticks: int = 250
    killed: float = 0.0  # an engine, at a message that it or the frontend deals with
    away_s: float = 0.0  # at most so long until another comes in its place
    ghost: float = 0.0  # of a death, that it is none
    mute: float = 0.0  # of a question for a fate, that it is never answered
    unready: float = 0.0  # of a look at a request that is taken up, that it is not ready
    decline: float = 0.0  # of the same, that it is declined
    detailed: float = 0.0  # of a stream
    lives: int = 1000
    at_once: int = 2
    engines: int = 3
    requests: int = 6


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


class RoughEngine(FakeEngine):
    """One that may take its time with a request that comes without a source, or decline it."""

    def __init__(self, index: EngineIndex, cluster: "Cluster", **how: Any) -> None:
        super().__init__(index, **how)
        self._cluster = cluster

    def ready(self, request: RequestId) -> bool | PortRefusal:
        world, draw = self._cluster.world, self._cluster.random.random
        if self.arriving[request].preemptions:
            if draw() < world.decline:
                return PortRefusal(why="drawn")
            return draw() >= world.unready
        return True


class Cluster:
    """The world of one seed."""

    def __init__(
        self,
        seed: int,
        world: World,
        *,
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
        self.from_peers: dict[EngineIndex, deque] = {}  # if that is a queue of its own
        self.finished: dict[EngineIndex, deque[tuple[int, str | None, int]]] = {}
        self.to_frontend: dict[EngineIndex, deque] = {}
        self.asking: list[AskFate] = []
        self.clients: dict[RequestId, Client] = {}
        self.ended: list[MigrationEnded] = []
        self.orders: dict[EngineIndex, set[OrderId]] = {}
        self.wanted = 0
        self.crashes = 0
        self.starting: list[tuple[float, EngineIndex]] = []
        self.ghosts: dict[EngineIndex, tuple[FakeEngine, Llumlet]] = {}
        self.struck: Counter[str] = Counter()  # deaths by what was being dealt with
        settings = SurvivalSettings(lives=world.lives, at_once=world.at_once)
        self.survival = Survival(self, settings)
        for number in range(world.engines):
            self._start(EngineIndex(number))
        self.next_engine = world.engines
        for number in range(world.requests):
            self._arrive(RequestId(f"r{number}"))
        self.next_request = world.requests
        self.next_order = 0

    # -- the world

    def _start(self, index: EngineIndex) -> None:
        engine = RoughEngine(
            index,
            self,
            blocks=self.random.choice(self.world.blocks),
            depth=self.random.randrange(2),
            on_pull=lambda *pull: self._begin_pull(index, *pull),
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
        self.to_engine[index], self.from_peers[index] = deque(), deque()
        self.finished[index] = deque()
        self.to_frontend[index] = deque()

    def _arrive(self, request: RequestId) -> None:
        prompt = [self.random.randrange(900) for _ in range(self.random.randrange(1, 40))]
        if self.clients and self.random.random() < 0.3:
            other = self.random.choice(list(self.clients.values()))
            whole = other.prompt + other.expected
            prompt = (whole[: self.random.randrange(1, len(whole))] + prompt)[:39]
        count = self.random.randrange(1, 40)
        client = Client(
            prompt=prompt,
            max_tokens=count,
            expected=undisturbed(prompt, count),
            priority=-(len(prompt) % 2),
            detailed=self._happens(self.world.detailed),
        )
        self.clients[request] = client
        index = self.random.choice(list(self.engines))
        stream = self.streams.open(request, None, detailed=client.detailed)
        self.streams.placed(stream, index)
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
        self.ghosts.clear()
        for _ in range(QUIET_TICKS_MAX):
            if self._at_rest():
                break
            self._tick()
        self.world = calm
        self._check_rest()

    def _happens(self, chance: float) -> bool:
        """Draws, unless it never happens in this world."""
        return chance > 0 and self.random.random() < chance

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
        if draw() < world.preempt and self.engines:
            self.random.choice(list(self.engines.values())).preempt_somebody()
        if draw() < world.crash and self.engines:
            self._crash(self.random.choice(list(self.engines)), "between two steps")
        if draw() < world.arrival and self.engines:
            self._arrive(RequestId(f"r{self.next_request}"))
            self.next_request += 1

    def _order_migration(self) -> None:
        open_ = [r for r, c in self.clients.items() if c.state == "open"]
        if not open_ or not self.engines:
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
        if not self.engines:
            return
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

    def _crash(self, index: EngineIndex, where: str) -> None:
        """An engine dies, or falls silent for the frontend. Another comes in its place."""
        self.crashes += 1
        self.struck[where] += 1
        gone = self.engines.pop(index), self.llumlets.pop(index)
        if self._happens(self.world.ghost):
            self.ghosts[index] = gone
        del self.to_engine[index], self.to_frontend[index], self.finished[index]
        del self.from_peers[index]
        for pull in [p for p in self.pulls if p[0] == index]:
            self.pulls.remove(pull)
        self._perform(self.streams.engine_lost(index, list(self.engines)))
        self.asking = [a for a in self.asking if a.engine != index]
        if self.world.away_s:
            back_s = self.now + self.random.uniform(0, self.world.away_s)
            self.starting.append((back_s, EngineIndex(self.next_engine)))
        else:
            self._start(EngineIndex(self.next_engine))
        self.next_engine += 1

    def _struck(self, where: str, index: EngineIndex | None = None) -> bool:
        """Whether an engine dies just here, that one or any."""
        if not self._happens(self.world.killed) or not self.engines:
            return False
        self._crash(self.random.choice(list(self.engines)) if index is None else index, where)
        return True

    # -- one tick

    def _tick(self) -> None:
        self.now += TICK_S
        for back_s, index in [each for each in self.starting if each[0] <= self.now]:
            self.starting.remove((back_s, index))
            self._start(index)
        for index in list(self.engines):
            if index in self.engines and self.random.random() < self.world.turn:
                self._engine_turn(index)
            said = self.to_frontend.get(index)
            if said and self.random.random() < self.world.heard:
                for _ in range(self.random.randrange(1, 4)):
                    if index in self.engines and self.to_frontend[index]:
                        self._frontend_hears(index, self.to_frontend[index].popleft())
        for index in list(self.ghosts):
            self._haunt(index)
        self.survival.look()
        for _ in range(3):
            if self.wire and self.random.random() < 0.6:
                self._deliver()
            if self.pulls and self.random.random() < self.world.pull_end:
                self._end_pull(self.random.randrange(len(self.pulls)))
        for ask in list(self.asking):
            if ask.engine in self.engines and self.random.random() < 0.3:
                if self._happens(self.world.mute):
                    self.asking.remove(ask)
                    self._perform(self.streams.fate(ask.migration, "undecided"))
                    continue
                fate = self.llumlets[ask.engine].fate(ask.migration)
                if fate != "undecided":
                    self.asking.remove(ask)
                    self.to_frontend[ask.engine].append(("fate", ask.migration, fate))
        self.check_owners()

    def _engine_turn(self, index: EngineIndex) -> None:
        engine, inbox = self.engines[index], self.to_engine[index]
        peers = self.from_peers[index]
        late = self._happens(self.world.late)
        for _ in range(self.random.randrange(5)):
            if peers or late:
                inbox = peers if late or self._happens(0.5) else self.to_engine[index]
            else:
                inbox = self.to_engine[index]
            if inbox:
                message = inbox.popleft()
                self._engine_hears(index, message)
                self._poll(index)
                if self._struck(f"{_name(message)} at the engine", index):
                    return
        if not engine.idle():
            for said in engine.step():
                self.to_frontend[index].append(("said", said))
        self._poll(index)

    def _haunt(self, index: EngineIndex) -> None:
        """A ghost goes on. Others hear it, and the frontend does not: it knows no such engine."""
        engine, llumlet = self.ghosts[index]
        if self.random.random() < 0.02:
            del self.ghosts[index]
            return
        if not engine.idle():
            engine.step()
        for item in llumlet.poll(self.now):
            if isinstance(item, ToPeer):
                self.wire.append((item.engine, item.message))

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
            case ("revive", order, made):
                self._send(index, llumlet.revive(order, made, self.now))
            case ("order", order):
                self._send(index, llumlet.order(order, self.now))
                self.orders[index] -= set(llumlet.answered())
                assert llumlet.moving(self.now).out >= 0
            case ("lost", lost, granted):
                self._send(index, llumlet.engine_lost(lost, set(granted), self.now, OFFICE))

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
            inbox = self.from_peers if self.world.late else self.to_engine
            inbox[to].append(("peer", message))

    def _begin_pull(
        self, index: EngineIndex, ticket: int, source: EngineIndex, pairs: list[tuple[int, int]]
    ) -> None:
        if index in self.engines:  # No ghost.
            self.pulls.append((index, ticket, source, pairs))

    def _readable(self, source: EngineIndex) -> FakeEngine | None:
        ghost = self.ghosts.get(source)
        return self.engines.get(source) or (ghost[0] if ghost is not None else None)

    def _end_pull(self, number: int) -> None:
        index, ticket, source, pairs = self.pulls.pop(number)
        error, there = None, self._readable(source)
        if there is None or self.random.random() < self.world.failed_pull:
            error = "the copy failed"
        else:
            self.engines[index].copy(there, pairs)
        self.finished[index].append((ticket, error, len(pairs)))

    def _cancel(self, index: EngineIndex, ticket: int) -> None:
        """A pull is cancelled at once, or was too far to be."""
        if self.random.random() < self.world.cancelled:
            for pull in [p for p in self.pulls if p[:2] == (index, ticket)]:
                self.pulls.remove(pull)
                if (source := self._readable(pull[2])) is not None:
                    self.engines[index].copy(source, pull[3][:1])
                self.finished[index].append((ticket, "cancelled", 0))

    # -- the frontend

    def _frontend_hears(self, index: EngineIndex, message: tuple) -> None:
        self._frontend_takes_in(index, message)
        self._struck(f"{_name(message)} at the frontend")

    def _frontend_takes_in(self, index: EngineIndex, message: tuple) -> None:
        match message:
            case ("said", (request, tokens, _) as said):
                due: list[Said] = []
                effects = self.streams.receive(index, request, tokens, said, due)
                self.streams.check()
                for output in due:
                    self._client_gets(output)
                self._perform(effects)
                self.survival.heard(index, request)
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
        self.survival.closed(request)
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
                    self._check_orphan(request)
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

    def check_owners(self) -> None:
        """No request may run on two live engines, but for those that have yet to read that they are
        to abort it."""
        seen: dict[RequestId, EngineIndex] = {}
        for index, engine in self.engines.items():
            for request in (*engine.running, *engine.waiting):
                if ("abort", request.id) in self.to_engine[index]:
                    continue
                assert request.id not in seen, (
                    f"{request.id} runs on engines {seen[request.id]} and {index}"
                )
                seen[request.id] = index

    def _check_orphan(self, request: RequestId) -> None:
        """A stream has no engine only if its request died with one."""
        assert self.crashes, f"{request} was lost with no crash"
        for index, engine in self.engines.items():
            aborted = ("abort", request) in self.to_engine[index]
            assert aborted or not engine.runs(request), f"{request} has none, but runs on {index}"

    def _at_rest(self) -> bool:
        return (
            not self.wire
            and not self.pulls
            and not self.asking
            and not self.starting
            and not len(self.streams)
            and not any(self.to_engine.values())
            and not any(self.from_peers.values())
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
            assert client.state != "lost" or self.survival.revived[request] >= self.world.lives
        assert not self.survival.orphans
        assert not self.survival.orphans.taken_up
        for index, engine in self.engines.items():
            assert not self.orders.get(index), f"engine {index} never answered an order"
            assert not engine.requests, f"engine {index} still holds {list(engine.requests)}"
            assert not engine.arriving
            assert not engine.pinned
            leaked = len(engine.memory) - len(engine.free)
            assert leaked == 0, f"engine {index} leaked {leaked} blocks"


def _name(message: tuple) -> str:
    """What kind it is."""
    return type(message[1]).__name__ if message[0] in ("peer", "llumlet") else message[0]
