"""What the page's feed costs the process that speaks HTTP, by how many watch.

A process with the real feed over a made-up deployment, whose requests get tokens, move, end and
come. Watchers are connections of another process, which reads all that they get. The process does
nothing else, so that its CPU time with watchers, less that without, is the feed's. Of several
rounds the least counts, since what else runs on the machine only adds.

`python benchmarks/observe.py feed` measures it; as a program this file is the process.
"""

import asyncio
import gc
import itertools
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from common import free_port

WORLDS = {"two": (2, 16), "usual": (8, 256), "page": (64, 2000), "big": (1024, 2000)}
"""Instances and requests of each."""
WATCHERS = (0, 1, 16)
TOKENS_S, MOVES_S, ENDS_S = 25, 20, 20
TICK_S = 0.2
START_TIMEOUT_S = 180
SECONDS = 4.0
"""Of a round."""


# -- the process that is measured


@dataclass(slots=True)
class Stream:
    """A stream as a look sees it."""

    request: Any
    last_owner: int
    info: Any
    machine: Any
    tokens: list[int] = field(default_factory=list)


class World:
    """Streams that live, and reports of instances as the controller sends them."""

    def __init__(self, instances: int, requests: int) -> None:
        from llumnix.core.reports import ClassLoad, LoadReport
        from llumnix.core.types import EngineIndex, InstanceId
        from llumnix.observe.notes import Notes, Ring
        from llumnix.wire import Loads, encode

        self.notes, self.placements, self.ends = Notes(), Ring[Any](4096), Ring[Any](4096)
        self.client_index, self.instances = 1, instances
        self.engines = SimpleNamespace(name=lambda index: InstanceId(f"i{index}"))
        self._names = itertools.count()
        self.streams = [self._stream(n % instances) for n in range(requests)]
        self._turn = 0
        self._payloads = []
        for n in range(8):
            reports = [
                LoadReport(
                    instance=InstanceId(f"i{i}"), engine_index=EngineIndex(i), sequence=n,
                    kv_tokens_used=4000 + 37 * n + i, kv_tokens_total=16_000,
                    classes=(ClassLoad(), ClassLoad(running=2 + (n + i) % 3)),
                )
                for i in range(instances)
            ]  # fmt: skip
            self._payloads.append(encode(Loads(number=n, reports=reports)))

    def _stream(self, owner: int) -> Stream:
        from llumnix.core.streams.states import StreamState
        from llumnix.core.types import RequestId

        name = f"cmpl-{next(self._names):08x}-7f3a"
        info = SimpleNamespace(
            client_id=name[5:], priority=0, prompt_tokens=400, started_s=time.monotonic()
        )
        state = SimpleNamespace(state=StreamState.OWNED)
        return Stream(RequestId(name), owner, info, state, [0])

    async def live(self) -> None:
        """Tokens for all, moves and ends for some, for ever."""
        from llumnix.core.types import InstanceId
        from llumnix.frontend.streams.look import Ended, Placed

        for turn in itertools.count():
            for stream in self.streams:
                stream.tokens += [1] * int(TOKENS_S * TICK_S)
            for n in range(int(MOVES_S * TICK_S)):
                stream = self.streams[(turn * 31 + n * 97) % len(self.streams)]
                source, stream.last_owner = stream.last_owner, (turn + n) % self.instances
                move = {
                    "id": f"m{turn}-{n}", "request_id": stream.info.client_id,
                    "outcome": "migrated", "source": f"i{source}",
                    "destination": f"i{stream.last_owner}",
                    "stages": [{"tokens": 400, "bytes": 2_000_000, "ms": 3.0}],
                    "downtime_ms": 2.1, "reason": "", "why": "freer by 120 steps",
                }  # fmt: skip
                self.notes.note("move", stream.request, "", move=move)
            for n in range(int(ENDS_S * TICK_S)):
                at = (turn * 17 + n * 41) % len(self.streams)
                one = self.streams[at]
                self.ends.add(Ended(one.request, "stop", len(one.tokens), 0.1))
                self.streams[at] = new = self._stream(one.last_owner)
                name = InstanceId(f"i{new.last_owner}")
                self.placements.add(Placed(new.request, name, "soonest: after 0 tokens"))
            await asyncio.sleep(TICK_S)

    async def deployment(self) -> Any:
        """As a frontend has it: the controller's reports come as bytes."""
        from llumnix.core.supervision.lifecycle import InstanceStatus
        from llumnix.core.types import EngineIndex, InstanceId
        from llumnix.frontend.ui.picture import Deployment
        from llumnix.wire import decode

        self._turn += 1
        reports = decode(self._payloads[self._turn % 8]).reports
        statuses = [
            InstanceStatus(
                id=InstanceId(f"i{i}"), state="serving", hung=False, node="host", pid=1,
                engine_index=EngineIndex(i), devices=[], why=None, restarts=0,
            )
            for i in range(self.instances)
        ]  # fmt: skip
        return Deployment(statuses, reports)


def serve(port: int, world: str) -> None:
    """Serves the feed until it is killed. `/cpu` tells its CPU time and the feed's tasks."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import uvicorn
    from fastapi import FastAPI

    from llumnix.core.priorities import Priorities
    from llumnix.core.settings import PrioritySettings
    from llumnix.frontend.http.page import router_of
    from llumnix.frontend.http.server import GARBAGE_EVERY
    from llumnix.frontend.own_streams import OwnStreams
    from llumnix.frontend.ui.feed import Feed, Source
    from llumnix.frontend.ui.picture import Picture, greeting

    one: Any = World(*WORLDS[world])
    priorities = Priorities(PrioritySettings())
    own = OwnStreams(one)

    async def look(since: Any) -> Any:
        return own.look(since)

    source = Source(look=look, deployment=one.deployment)
    app = FastAPI()
    hello = greeting(priorities, model="m", policy="llumnix", version="0")
    app.include_router(router_of(Feed(source, lambda: Picture(priorities), hello)))

    @app.get("/cpu")
    async def cpu() -> dict[str, float]:
        tasks = sum(t.get_name() == "llumnix-feed" for t in asyncio.all_tasks())
        return {"cpu_s": time.process_time(), "at_s": time.monotonic(), "feed_tasks": tasks}

    gc.collect()
    gc.freeze()  # What vLLM's modules hold is none of the feed's.
    gc.set_threshold(GARBAGE_EVERY)

    async def run() -> None:
        living = asyncio.create_task(one.live())
        config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical")
        await uvicorn.Server(config).serve()
        living.cancel()

    import uvloop

    uvloop.run(run())


# -- the watchers


async def watch(port: int, counts: list[int], number: int) -> None:
    """Reads the feed and counts bytes, until it is cancelled."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /llumnix/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    try:
        while data := await reader.read(1 << 16):
            counts[number] += len(data)
    finally:
        writer.close()


async def round_of(http: httpx.AsyncClient, port: int, watchers: int, seconds: float) -> dict:
    """CPU time a second of the process, and bytes a second of a watcher, with so many of them."""
    counts = [0] * watchers
    tasks = [asyncio.create_task(watch(port, counts, n)) for n in range(watchers)]
    await asyncio.sleep(1.0)  # The first message is the whole deployment.
    before, had = (await http.get("/cpu")).json(), sum(counts)
    await asyncio.sleep(seconds)
    after, have = (await http.get("/cpu")).json(), sum(counts)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0.3)
    took_s = after["at_s"] - before["at_s"]
    return {
        "share": (after["cpu_s"] - before["cpu_s"]) / took_s,
        "bytes_s": (have - had) / took_s / max(1, watchers),
        "feed_tasks": after["feed_tasks"],
    }


async def measure(world: str, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """A row for each number of watchers."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, __file__, str(port), world],
        cwd=Path(__file__).parent,
    )
    found: dict[int, list[dict]] = {n: [] for n in WATCHERS}
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while True:
                try:
                    await http.get("/cpu")
                    break
                except httpx.ConnectError:
                    if time.monotonic() > deadline_s or process.poll() is not None:
                        raise
                    await asyncio.sleep(0.2)
            for _ in range(rounds):
                for watchers in WATCHERS:
                    found[watchers].append(await round_of(http, port, watchers, seconds))
    finally:
        process.kill()
        process.wait()
    least = {n: min(one["share"] for one in got) for n, got in found.items()}
    instances, requests = WORLDS[world]
    return [
        {
            "world": world, "instances": instances, "requests": requests, "watchers": n,
            "process_share": round(least[n], 5), "feed_share": round(least[n] - least[0], 5),
            "bytes_s": round(max(one["bytes_s"] for one in got)),
            "feed_tasks": max(one["feed_tasks"] for one in got),
        }
        for n, got in found.items()
    ]  # fmt: skip


def feed(rounds: int) -> list[dict[str, Any]]:
    """All worlds, with each number of watchers."""
    return [row for world in WORLDS for row in asyncio.run(measure(world, SECONDS, rounds))]


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
