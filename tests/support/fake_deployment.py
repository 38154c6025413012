"""A deployment that is made up, behind the real page and the real feed: for tests in a browser, and
for pictures. Its world is the same every time."""

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI

from llumnix.core.priorities import Priorities
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.settings import PrioritySettings
from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.errors import ConflictError, UnknownInstanceError, UnknownRequestError
from llumnix.frontend.http.page import router_of
from llumnix.frontend.http.routes import control_app
from llumnix.frontend.own_streams import MoveAsked
from llumnix.frontend.streams.look import Cursor, Ended, Look, Placed, SeenStream
from llumnix.frontend.ui.feed import Feed, Source
from llumnix.frontend.ui.picture import Deployment, Picture, greeting
from llumnix.observe.notes import Notes, Ring

PRIORITIES = Priorities(PrioritySettings())
HIGH, NORMAL = (c.priority for c in PRIORITIES.classes)
NAMES = ("ada", "bea", "cleo", "dora", "enzo", "finn", "gwen", "hugo", "ines", "juno", "kai", "li")
CLEAR = "i1 has 412 steps of freeness, i0 has 9"


@dataclass(slots=True, kw_only=True)
class Request:
    """One made-up request."""

    name: str
    client_id: str
    instance: str
    priority: int = NORMAL
    prompt: int = 200
    out: int = 1
    age_s: float = 10.0
    orphan: bool = False
    waits: bool = False
    speed: float = 1.0
    key: str | None = None  # the name of its client's


class FakeDeployment:
    """Instances and requests that tests move about. `Control` of the routes, as far as they go."""

    def __init__(self, instances: int = 4, cap: int = 16_000, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.cap = cap
        self.states = {f"i{n}": "serving" for n in range(instances)}
        self.whys: dict[str, str | None] = {}
        self.requests: dict[str, Request] = {}
        self.notes = Notes()
        self.ends: Ring[Ended] = Ring(100_000)
        self.placed: Ring[Placed] = Ring(100_000)
        self.moves: list[dict[str, Any]] = []
        self.orders: list[Any] = []
        self.controller = True
        self.number = 0

    # -- what happens in it

    def add_request(self, instance: str, client_id: str | None = None, **more: Any) -> Request:
        name = f"cmpl-{self.number}"
        one = Request(
            name=name,
            client_id=client_id or f"chat-{NAMES[self.number % 12]}-{self.number}",
            instance=instance,
            **more,
        )
        self.number += 1
        self.requests[name] = one
        why = f"soonest start: {instance}, 0.1 steps"
        self.placed.add(Placed(RequestId(name), InstanceId(instance), why))
        return one

    def fill(self, requests: int, share: float = 0.6, urgent: str = "") -> None:
        """So many requests of many lengths, which take that share of the memory. `urgent`: the
        instances that have urgent ones, by their digits; all by default."""
        names = list(self.states)
        mean = share * self.cap * len(names) / max(1, requests)
        for n in range(requests):
            length = max(8, int(mean * self.random.lognormvariate(-0.3, 0.75)))
            prompt = max(4, int(length * self.random.uniform(0.2, 0.8)))
            self.add_request(
                names[n % len(names)],
                priority=HIGH if self._urgent(names[n % len(names)], urgent) else NORMAL,
                prompt=prompt,
                out=max(1, length - prompt),
                age_s=self.random.uniform(1, 90),
                speed=self.random.uniform(0.6, 1.4),
            )

    def _urgent(self, instance: str, among: str) -> bool:
        return self.random.random() < 0.25 and (not among or instance[1:] in among)

    def step(self, tokens: int) -> None:
        """Every running request gets about so many tokens."""
        for one in self.requests.values():
            if not (one.waits or one.orphan or one.out == 0):
                one.out += max(1, round(tokens * one.speed))

    def end(self, name: str, how: str = "stop") -> None:
        one = self.requests.pop(name)
        self.ends.add(Ended(RequestId(name), how, one.out, self.random.uniform(0.02, 0.2)))

    def move(self, name: str, to: str, why: str = CLEAR, downtime_ms: float = 2.4) -> Any:
        """Moves a request at once; returns the record."""
        one, source = self.requests[name], self.requests[name].instance
        held = one.prompt + one.out
        stages = [(held - 9, 4.1), (9, 0.9)]
        record = {
            "id": f"m{len(self.moves)}", "request": name, "request_id": one.client_id,
            "outcome": "migrated", "source": source, "destination": to,
            "stages": [{"tokens": n, "bytes": n * 5000, "ms": ms} for n, ms in stages],
            "downtime_ms": downtime_ms, "total_ms": 11.3, "tokens_before": one.out, "why": why,
            "reason": "",
        }  # fmt: skip
        self.moves.append(record)
        one.instance = to
        begun = {**record, "outcome": "running", "stages": [], "downtime_ms": None}
        self.notes.note("move", name, why, move=begun)
        self.notes.note("move", name, why, move=record)
        return record

    def kill(self, instance: str) -> list[str]:
        """The instance dies; returns its requests, which are orphans."""
        self.states[instance] = "restarting"
        self.whys[instance] = "its process was killed (SIGKILL)"
        self.notes.note("death", instance, self.whys[instance] or "")
        orphans = [r for r in self.requests.values() if r.instance == instance]
        for one in orphans:
            one.orphan, one.waits = True, False
        return [r.name for r in orphans]

    def revive(self, name: str, at: str) -> None:
        one = self.requests[name]
        one.instance, one.orphan = at, False
        shown = {"client_id": one.client_id, "instance": at, "gap_s": 0.31}
        self.notes.note("revive", name, "its engine died", revival=shown)

    # -- what the feed looks at

    async def look(self, since: Cursor) -> Look:
        rings: dict[str, Ring[Any]] = {"n": self.notes, "e": self.ends, "p": self.placed}
        new = {name: ring.since(since.get(name, 0)) for name, ring in rings.items()}
        return Look(
            streams=[self._seen(r) for r in self.requests.values()],
            notes=new["n"],
            ended=new["e"],
            placed=new["p"] if since else [],
            cursor={name: ring.count for name, ring in rings.items()},
        )

    def _seen(self, one: Request) -> SeenStream:
        return SeenStream(
            request=RequestId(one.name),
            client_id=one.client_id,
            instance=InstanceId(one.instance),
            orphan=one.orphan,
            priority=one.priority,
            prompt_tokens=one.prompt,
            output_tokens=0 if one.waits else one.out,
            age_s=one.age_s,
        )

    async def deployment(self) -> Deployment:
        reports = [self._report(name) for name, s in self.states.items() if s in SPEAKING]
        return Deployment(
            [self.status_of(n) for n in self.states], reports if self.controller else None
        )

    def status_of(self, name: str) -> InstanceStatus:
        return InstanceStatus(
            id=InstanceId(name), state=self.states[name], hung=False, node="gpu-host-1", pid=1,
            engine_index=EngineIndex(int(name[1:])), devices=["cpu"], why=self.whys.get(name),
            restarts=int(self.states[name] == "restarting"),
        )  # fmt: skip

    def _report(self, name: str) -> LoadReport:
        mine = [r for r in self.requests.values() if r.instance == name and not r.orphan]
        classes = tuple(
            ClassLoad(
                running=sum(not r.waits and r.priority == p for r in mine),
                waiting=sum(r.waits and r.priority == p for r in mine),
            )
            for p in (HIGH, NORMAL)
        )
        return LoadReport(
            instance=InstanceId(name),
            engine_index=EngineIndex(int(name[1:])),
            sequence=1,
            kv_tokens_used=min(self.cap, sum(r.prompt + r.out for r in mine if not r.waits)),
            kv_tokens_total=self.cap,
            classes=classes,
            accepting=self.states[name] == "serving",
        )

    # -- what the page orders

    async def request(self, name: str) -> dict[str, Any]:
        if name not in self.requests:
            raise UnknownRequestError(f"no request {name}")
        one = self.requests[name]
        moves = [m for m in self.moves if m["request"] == name]
        why = f"{one.instance}: soonest start, 0.1 steps"
        shown = {"why": why, "first_token_s": 0.084, "lives_used": 0, "migrations": moves}
        return {**shown, "key": one.key}

    async def instances(self) -> list[Any]:
        return []

    async def add(self) -> InstanceStatus:
        name = f"i{len(self.states)}"
        self.orders.append("add")
        self.states[name] = "starting"
        self.notes.note("add", name, "a user's order")
        return self.status_of(name)

    async def drain(
        self, instance: InstanceId, why: str, *, again: bool = False, **how: Any
    ) -> InstanceStatus:
        if instance not in self.states:
            raise UnknownInstanceError(f"no instance {instance}")
        if again:
            self.orders.append(("restart", instance))
            self.notes.note("renew", instance, why)
            return self.status_of(instance)
        self.orders.append(("drain", instance))
        self.states[instance], self.whys[instance] = "draining", f"draining: {why}"
        self.notes.note("drain", instance, why)
        return self.status_of(instance)

    async def undrain(self, instance: InstanceId) -> InstanceStatus:
        self.orders.append(("undrain", instance))
        self.states[instance], self.whys[instance] = "serving", None
        self.notes.note("undrain", instance, "")
        return self.status_of(instance)

    async def migrate(self, order: MoveAsked) -> dict[str, Any]:
        if order.request_id not in self.requests:
            raise ConflictError("it has ended")
        self.orders.append(("migrate", order.request_id, order.destination))
        await asyncio.sleep(0.01)
        others = [n for n in self.states if n != self.requests[order.request_id].instance]
        return self.move(order.request_id, order.destination or others[0], "a user's order")


SPEAKING = ("serving", "draining")


class Orders:
    """The deployment as `Control`: its `move` is a user's."""

    def __init__(self, of: FakeDeployment) -> None:
        self._of = of
        self.move = of.migrate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def application(of: FakeDeployment) -> FastAPI:
    """The real routes and the real page over it."""
    hello = greeting(PRIORITIES, model="Qwen3-8B", policy="llumnix", version="0")
    source = Source(look=of.look, deployment=of.deployment)
    page = router_of(Feed(source, lambda: Picture(PRIORITIES), hello))
    client: Any = None
    control: Any = Orders(of)
    return control_app(client, control, docs=False, page=page)


class Served:
    """It, served on loopback by a thread."""

    def __init__(self, app: Any, url: str, loop: asyncio.AbstractEventLoop) -> None:
        self.app = app
        self.url = url
        self.loop = loop

    def do(self, work: Any) -> Any:
        """Calls it on the server's thread, and returns what it does."""

        async def call() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)


@contextmanager
def served(app: Any) -> Iterator[Served]:
    """Serves an application until the end of the block."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off")
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    ready, loops = threading.Event(), []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        ready.set()
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert ready.wait(20)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(app, f"http://127.0.0.1:{port}", loops[0])
    finally:
        server.should_exit = True
        thread.join(10)
