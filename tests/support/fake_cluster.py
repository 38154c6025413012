"""Engines, their llumlets and frontends over links that lose, delay, repeat and reorder.

Everything that happens is drawn from one seed. The production code under test is the llumlet (with
both machines) and the table of streams; this file is only the world around them, and the checkers:
a table of streams that agrees with itself after every event, one live owner, no block leaked, no
token lost, repeated or out of order, no block of a prefix cache with the bytes of other tokens, no
stream that ends before its last token or waits for an engine for long, nothing left of a frontend
that died.

Engines are killed between any two messages, and others come in their place. One that was taken for
dead may live on for a while as a ghost, which others still hear. If there are several frontends,
they die too, each learns of an engine's death in its own time, and the office tells the engines.

An engine hears through the two queues that engine/migration/host.py has: what comes from outside
waits in one for the end of the engine's step; finished pulls wait in the other, which is emptied
right after the step, and so ahead of what came before them. What one frontend sends it arrives in
order, and so does what it says to that; what others send may overtake it.
"""

import random
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from llumnix.core.events import MoveLimit, MoveOrder
from llumnix.core.limits import MigrationLimits
from llumnix.core.messages import OFFICE, Handover, MigrationEnded, Out, PeerMessage, ToPeer
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.migration.port import Refusal as PortRefusal
from llumnix.core.migration.tables import OnStep
from llumnix.core.settings import SurvivalSettings
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId
from support.fake_engine import FakeEngine, undisturbed
from support.fake_frontend import Client, Frontend, name_of
from support.fake_survival import Survival

TICK_S = 0.01
QUIET_TICKS_MAX = 60_000
BURIED_S = 5.0
"""Within this an engine has got rid of all that it had of a dead frontend. What was handed over is
kept until the verdict, which may be lost again and again."""


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
    frontend_crash: float = 0.0
    frontend_killed: float = 0.0  # a frontend, at a message that it or an engine deals with
    frontends: int = 1
    lives: int = 1000
    at_once: int = 2
    engines: int = 3
    requests: int = 6


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
        self.frontends: dict[int, Frontend] = {}
        self.dead_frontends: list[Frontend] = []
        self.buried_s: dict[int, float] = {}  # when the last engine had heard of its death
        self.frontend_of: dict[RequestId, int] = {}
        self.had: set[tuple[EngineIndex, RequestId]] = set()  # which engine ever had a request
        self.engines: dict[EngineIndex, FakeEngine] = {}
        self.llumlets: dict[EngineIndex, Llumlet] = {}
        self.wire: list[tuple[EngineIndex, PeerMessage]] = []
        self.pulls: list[tuple[EngineIndex, int, EngineIndex, list[tuple[int, int]]]] = []
        self.to_engine: dict[EngineIndex, dict[int, deque]] = {}  # by frontend
        self.from_peers: dict[EngineIndex, deque] = {}
        self.finished: dict[EngineIndex, deque[tuple[int, str | None, int]]] = {}
        self.orders: dict[EngineIndex, set[OrderId]] = {}
        self.crashes = 0
        self.starting: list[tuple[float, EngineIndex]] = []
        self.ghosts: dict[EngineIndex, tuple[FakeEngine, Llumlet]] = {}
        self.struck: Counter[str] = Counter()  # deaths by what was being dealt with
        for number in range(world.engines):
            self._start(EngineIndex(number))
        self.next_engine = world.engines
        # A single one is the office too.
        self.next_frontend = OFFICE if world.frontends == 1 else OFFICE + 1
        for _ in range(world.frontends):
            self._start_frontend()
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
        self.to_engine[index], self.from_peers[index] = {}, deque()
        self.finished[index] = deque()
        for frontend in self.frontends.values():
            frontend.heard[index] = deque()

    def _start_frontend(self) -> None:
        settings = SurvivalSettings(lives=self.world.lives, at_once=self.world.at_once)
        self.frontends[self.next_frontend] = Frontend(self.next_frontend, self, settings)
        self.next_frontend += 1

    # -- what tests ask

    @property
    def clients(self) -> dict[RequestId, Client]:
        """Of all frontends, those that died included."""
        return {r: c for f in self._all_frontends() for r, c in f.clients.items()}

    @property
    def ended(self) -> list[MigrationEnded]:
        return [ended for f in self._all_frontends() for ended in f.ended]

    @property
    def wanted(self) -> int:
        return sum(f.wanted for f in self._all_frontends())

    @property
    def survival(self) -> Survival:
        """That of the only frontend."""
        (frontend,) = self.frontends.values()
        return frontend.survival

    def _all_frontends(self) -> list[Frontend]:
        return [*self.dead_frontends, *self.frontends.values()]

    # -- mischief

    def _arrive(self, request: RequestId) -> None:
        prompt = [self.random.randrange(900) for _ in range(self.random.randrange(1, 40))]
        if self.frontend_of and self.random.random() < 0.3:
            other = self.random.choice(list(self.clients.values()))
            whole = other.prompt + other.expected
            prompt = (whole[: self.random.randrange(1, len(whole))] + prompt)[:39]
        count = self.random.randrange(1, 40)
        client = Client(
            prompt=prompt,
            max_tokens=count,
            expected=undisturbed(prompt, count),
            priority=-(len(prompt) % 2),
            detailed=self.happens(self.world.detailed),
        )
        frontend = self.random.choice(list(self.frontends.values()))
        self.frontend_of[request] = frontend.client
        frontend.add(request, client, self.random.choice(frontend.engines))

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

    def happens(self, chance: float) -> bool:
        """Draws, unless it never happens in this world."""
        return chance > 0 and self.random.random() < chance

    def _mischief(self) -> None:
        draw, world = self.random.random, self.world
        if draw() < world.migrate:
            self._some_frontend().move_one(world.staged)
        if draw() < world.order:
            self._order_load()
        if draw() < world.abort:
            self._some_frontend().hang_up()
        if draw() < world.preempt and self.engines:
            self.random.choice(list(self.engines.values())).preempt_somebody()
        if draw() < world.crash and self.engines:
            self._crash(self.random.choice(list(self.engines)), "between two steps")
        if self.happens(world.frontend_crash):
            self._kill_frontend(self._some_frontend(), "between two messages")
        if draw() < world.arrival and self.engines:
            self._arrive(RequestId(f"r{self.next_request}"))
            self.next_request += 1

    def _some_frontend(self) -> Frontend:
        return self.random.choice(list(self.frontends.values()))

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
        self.from_peers[source].append(("order", load))

    def _crash(self, index: EngineIndex, where: str) -> None:
        """An engine dies, or falls silent for frontends. Another comes in its place."""
        self.crashes += 1
        self.struck[where] += 1
        gone = self.engines.pop(index), self.llumlets.pop(index)
        if self.happens(self.world.ghost):
            self.ghosts[index] = gone
        del self.to_engine[index], self.from_peers[index], self.finished[index]
        for pull in [p for p in self.pulls if p[0] == index]:
            self.pulls.remove(pull)
        if len(self.frontends) == 1:
            self.frontends[OFFICE].lose(index)
        else:
            self._tell_engines(("lost", index, (), OFFICE))
            for frontend in self.frontends.values():
                frontend.deaths.append(index)
        if self.world.away_s:
            back_s = self.now + self.random.uniform(0, self.world.away_s)
            self.starting.append((back_s, EngineIndex(self.next_engine)))
        else:
            self._start(EngineIndex(self.next_engine))
        self.next_engine += 1

    def _tell_engines(self, message: tuple) -> None:
        """The office does."""
        for queues in self.to_engine.values():
            queues.setdefault(OFFICE, deque()).append(message)

    def _kill_frontend(self, frontend: Frontend, where: str) -> None:
        """It dies with its streams, and another comes in its place. What it has sent may still
        arrive."""
        self.struck[f"a frontend, {where}"] += 1
        self.dead_frontends.append(self.frontends.pop(frontend.client))
        for request in frontend.open_requests():
            frontend.clients[request].state = "died with its frontend"
        for _ in range(self.random.randrange(1, 3)):  # The office makes sure.
            self._tell_engines(("frontend lost", frontend.client))
        self._start_frontend()

    def _struck(self, where: str, index: EngineIndex | None = None) -> bool:
        """Whether an engine dies just here, that one or any; and a frontend may."""
        if self.happens(self.world.frontend_killed):
            self._kill_frontend(self._some_frontend(), where)
        if not self.happens(self.world.killed) or not self.engines:
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
            for frontend in list(self.frontends.values()):
                if self.random.random() < self.world.heard:
                    self._listen(frontend, index)
        for index in list(self.ghosts):
            self._haunt(index)
        for frontend in self.frontends.values():
            if frontend.deaths and self.random.random() < 0.2:
                frontend.lose(frontend.deaths.pop(0))
            frontend.survival.look()
        for _ in range(3):
            if self.wire and self.random.random() < 0.6:
                self._deliver()
            if self.pulls and self.random.random() < self.world.pull_end:
                self._end_pull(self.random.randrange(len(self.pulls)))
        for frontend in self.frontends.values():
            frontend.ask_fates()
        self.check_owners()
        self._check_buried()

    def _listen(self, frontend: Frontend, index: EngineIndex) -> None:
        """A frontend takes in some of what an engine has said."""
        for _ in range(self.random.randrange(1, 4)):
            said = frontend.heard.get(index)
            if not said or frontend.client not in self.frontends:
                break
            message = said.popleft()
            frontend.take_in(index, message)
            self._struck(f"{name_of(message)} at the frontend")

    def _engine_turn(self, index: EngineIndex) -> None:
        engine, peers = self.engines[index], self.from_peers[index]
        late = self.happens(self.world.late)
        for _ in range(self.random.randrange(5)):
            waiting = [queue for queue in self.to_engine[index].values() if queue and not late]
            if peers:
                waiting.append(peers)
            if waiting:
                message = self.random.choice(waiting).popleft()
                self._engine_hears(index, message)
                self._poll(index)
                if self._struck(f"{name_of(message)} at the engine", index):
                    return
        if not engine.idle():
            for said in engine.step():
                self._say(index, self.frontend_of[said[0]], ("said", said))
        self._poll(index)

    def _say(self, index: EngineIndex, client: int, message: tuple) -> None:
        """An engine says something to a frontend, which may be dead."""
        assert not self.llumlets[index].has_lost(client), f"{message} to a dead frontend"
        frontend = self.frontends.get(client)
        if frontend is not None and index in frontend.heard:
            frontend.heard[index].append(message)

    def _haunt(self, index: EngineIndex) -> None:
        """A ghost goes on. Others hear it, and frontends do not: they know no such engine."""
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
        self.had.update((index, request) for request in self.engines[index].requests)

    def _engine_hears(self, index: EngineIndex, message: tuple) -> None:
        engine, llumlet = self.engines[index], self.llumlets[index]
        match message:
            case ("add", request, prompt, max_tokens, client):
                if not llumlet.has_lost(client):  # As engine/instance.py asks.
                    engine.add(request, prompt, max_tokens, client)
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
                if not llumlet.has_lost(order.client):
                    self._send(index, llumlet.revive(order, made, self.now))
            case ("order", order):
                self._send(index, llumlet.order(order, self.now))
                self.orders[index] -= set(llumlet.answered())
                assert llumlet.moving(self.now).out >= 0
            case ("lost", lost, granted, client):
                self._send(index, llumlet.engine_lost(lost, set(granted), self.now, client))
            case ("frontend lost", client):
                self._bury(index, client)

    def _bury(self, index: EngineIndex, client: int) -> None:
        """An engine hears that a frontend died, and does as engine/instance.py does."""
        engine, llumlet = self.engines[index], self.llumlets[index]
        self._send(index, llumlet.client_lost(client))
        for request in [r.id for r in engine.requests.values() if r.client == client]:
            self._send(index, llumlet.client_gone([request]))
            engine.abort(request)
        self._poll(index)
        if all(each.has_lost(client) for each in self.llumlets.values()):
            self.buried_s.setdefault(client, self.now)

    def _send(self, index: EngineIndex, out: list[Out]) -> None:
        for item in out:
            if isinstance(item, ToPeer):
                if self.random.random() >= self.world.loss:
                    self.wire.append((item.engine, item.message))
                if self.random.random() < self.world.repeat:
                    self.wire.append((item.engine, item.message))
            else:
                self._say(index, item.client, ("llumlet", item.message))

    def _deliver(self) -> None:
        to, message = self.wire.pop(self.random.randrange(len(self.wire)))
        if to in self.llumlets:
            self.from_peers[to].append(("peer", message))

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

    # -- checkers

    def check_owners(self) -> None:
        """No request may run on two live engines, but for those that have yet to read that they are
        to abort it, or that its frontend died."""
        seen: dict[RequestId, EngineIndex] = {}
        for index, engine in self.engines.items():
            for request in (*engine.running, *engine.waiting):
                assert not self.llumlets[index].has_lost(request.client), (
                    f"{request.id} of a dead frontend runs on engine {index}"
                )
                frontend = self.frontends.get(request.client)
                if frontend is None or frontend.will_abort(index, request.id):
                    continue
                assert request.id not in seen, (
                    f"{request.id} runs on engines {seen[request.id]} and {index}"
                )
                seen[request.id] = index

    def check_orphan(self, frontend: Frontend, request: RequestId) -> None:
        """A request without an engine died with one, and no other runs it."""
        assert self.crashes, f"{request} was lost with no crash"
        for index, engine in self.engines.items():
            aborted = frontend.will_abort(index, request)
            assert aborted or not engine.runs(request), f"{request} has none, but runs on {index}"

    def _check_buried(self) -> None:
        """Soon after the last engine has heard of a frontend's death, nothing of that is left."""
        for client, since_s in list(self.buried_s.items()):
            if self.now - since_s < BURIED_S:
                continue
            del self.buried_s[client]
            for index, engine in self.engines.items():
                kept = [*engine.requests.values(), *engine.arriving.values()]
                assert not [r.id for r in kept if r.client == client], f"on {index}, of {client}"
                pinned = [r for r in engine.pinned if self.frontend_of[r] == client]
                assert not pinned, f"pinned on {index}, of {client}: {pinned}"
                moving = self.llumlets[index]._outgoing.requests()
                assert not [r for r in moving if self.frontend_of[r] == client], f"from {index}"

    def _at_rest(self) -> bool:
        return (
            not self.wire
            and not self.pulls
            and not self.starting
            and all(frontend.at_rest() for frontend in self.frontends.values())
            and not any(any(queues.values()) for queues in self.to_engine.values())
            and not any(self.from_peers.values())
            and not any(self.finished.values())
            and all(e.idle() for e in self.engines.values())
            and not any(x.busy for x in self.llumlets.values())
        )

    def _check_rest(self) -> None:
        assert self._at_rest(), "something never came to rest"
        for frontend in self.frontends.values():
            frontend.check_rest(self.world.lives)
        for index, engine in self.engines.items():
            assert not self.orders.get(index), f"engine {index} never answered an order"
            assert not engine.requests, f"engine {index} still holds {list(engine.requests)}"
            assert not engine.arriving
            assert not engine.pinned
            leaked = len(engine.memory) - len(engine.free)
            assert leaked == 0, f"engine {index} leaked {leaked} blocks"
