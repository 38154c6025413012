"""Mixed traffic without end: are all streams exact, is memory flat, is anything left?

Two instances on a CPU, four running slots each. Streams with known answers run all the time and are
moved at random, `--per-minute` moves a minute; others come and go beside them, some urgent (and
preempt), some hang up; every `--kill-minutes` an instance is killed. Every answer is compared with
the undisturbed one. The memory of each process is looked at every ten seconds, and the slope after
the first five minutes told for the controller and for the process that speaks HTTP.

    python benchmarks/soak.py [--minutes 30] [--per-minute 60] [--kill-minutes 5] [--out FILE]
    python benchmarks/soak.py --plot FILE.json FILE.png
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import aiohttp

from common import ROOT, real_time, serve, write_result
from shapes import write_shape, write_weights

STREAMS = 4
TOKENS = 160
KNOWN = 12
SAMPLE_EVERY_S = 10.0
SETTLED_S = 300.0
"""From then on memory should be flat."""
SLOPE_MAX_MB_PER_MIN = 1.0
ENDED_WITHIN_S = 5.0
"""Processes that were killed at the stop may take so long to be gone."""


def processes(root: int) -> list[int]:
    """A process and all below it."""
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += [int(c) for c in (task / "children").read_text().split()]
        except OSError:
            continue
        found.append(pid)
    return found


def memory_mb(root: int) -> dict[str, float]:
    """Private memory by role, in MB: `frontend`, `controller`, `engines` (with their workers), and
    `ray` (the rest)."""
    total = dict.fromkeys(("frontend", "controller", "engines", "ray"), 0.0)
    for pid in processes(root):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        role = "ray"
        if pid == root:
            role = "frontend"
        elif "ray::Controller" in title:
            role = "controller"
        elif "ray::EngineActor" in title or "VLLM" in title:
            role = "engines"
        private = (int(x.split()[1]) for x in rollup.splitlines() if x.startswith("Private"))
        total[role] += sum(private) / 1024
    return {role: round(mb, 1) for role, mb in total.items()}


def slope(samples: list[dict[str, Any]], role: str) -> float:
    """MB a minute, least squares over the samples after `SETTLED_S`."""
    points = [(s["s"] / 60, s["memory_mb"][role]) for s in samples if s["s"] >= SETTLED_S]
    if len(points) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope


class Soak:
    """The traffic and what was seen of it."""

    def __init__(self, http: aiohttp.ClientSession, url: str, pid: int) -> None:
        self.http, self.url, self.pid = http, url, pid
        self.dice = random.Random(5)
        self.bodies = [self.body(number) for number in range(KNOWN)]
        self.answers: list[list[int]] = []
        self.running: set[str] = set()
        self.outcomes: dict[str, int] = {}
        self.reasons: dict[str, int] = {}
        self.downtimes: list[float] = []
        self.errors: dict[str, int] = {}
        self.streams = self.wrong = self.hung_up = self.urgent = self.kills = 0
        self.failed = 0
        self.samples: list[dict[str, Any]] = []
        self.stopping = False

    def body(self, number: int) -> dict[str, Any]:
        prompt = [self.dice.randrange(300, 4000) for _ in range(self.dice.randrange(50, 700))]
        sampling = {"temperature": 0} if number % 2 else {"temperature": 0.9, "seed": number}
        return {
            "model": "m", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True,
            "return_token_ids": True, **sampling,
        }  # fmt: skip

    async def ask(self, body: dict[str, Any], name: str, *, high: bool = False) -> list[int]:
        headers = {"X-Request-Id": name}
        if high:
            headers["x-llumnix-priority"] = "high"
        async with self.http.post(
            self.url + "/v1/completions", json=body, headers=headers
        ) as answer:
            answer.raise_for_status()
            return list((await answer.json())["choices"][0]["token_ids"])

    async def try_to_ask(self, body: dict[str, Any], name: str, *, high: bool) -> list[int] | None:
        """None if it failed."""
        self.running.add(name)
        try:
            return await self.ask(body, name, high=high)
        except aiohttp.ClientError as error:
            self.failed += 1
            self.errors[repr(error)] = self.errors.get(repr(error), 0) + 1
            await asyncio.sleep(0.2)
            return None
        finally:
            self.running.discard(name)

    async def known(self) -> None:
        while not self.stopping:
            number = self.dice.randrange(KNOWN)
            found = await self.try_to_ask(self.bodies[number], uuid.uuid4().hex, high=False)
            if found is not None:
                self.streams += 1
                self.wrong += found != self.answers[number]

    async def others(self) -> None:
        while not self.stopping:
            body = {**self.body(1), "max_tokens": self.dice.randrange(5, 80)}
            high = self.dice.random() < 0.3
            self.urgent += high
            task = asyncio.create_task(self.try_to_ask(body, uuid.uuid4().hex, high=high))
            if self.dice.random() < 0.3:
                await asyncio.sleep(self.dice.random() * 0.3)
                self.hung_up += not task.done()
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(self.dice.random() * 0.2)

    async def move(self, every_s: float) -> None:
        tasks: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while not self.stopping:
            due += every_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if self.running:
                name = self.dice.choice(sorted(self.running))
                task = asyncio.create_task(self.move_one(name))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def move_one(self, name: str) -> None:
        order = {"request_id": name}
        async with self.http.post(self.url + "/llumnix/v1/migrations", json=order) as answer:
            body = await answer.json()
        outcome = body.get("outcome") or "not ordered: it had ended, or was being moved"
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if body.get("outcome") == "migrated" and body["downtime_ms"] is not None:
            self.downtimes.append(body["downtime_ms"])
        elif body.get("reason"):
            self.reasons[body["reason"]] = self.reasons.get(body["reason"], 0) + 1

    async def kill(self, every_s: float) -> None:
        """Kills the instances in turns, each once both serve."""
        turns = itertools.cycle(("i0", "i1"))
        due = time.monotonic()
        while not self.stopping:
            due += every_s
            while time.monotonic() < due and not self.stopping:
                await asyncio.sleep(0.5)
            rows = await self.instances()
            if self.stopping or any(row["state"] != "serving" for row in rows.values()):
                continue
            self.kills += 1
            os.kill(rows[next(turns)]["pid"], signal.SIGKILL)

    async def watch(self) -> None:
        began = time.monotonic()
        while not self.stopping:
            await asyncio.sleep(SAMPLE_EVERY_S)
            sample = {
                "s": round(time.monotonic() - began),
                "memory_mb": memory_mb(self.pid),
                "streams": self.streams,
                "wrong": self.wrong,
                "failed": self.failed,
                "migrated": self.outcomes.get("migrated", 0),
                "kills": self.kills,
            }
            self.samples.append(sample)
            print(sample, flush=True)

    async def instances(self) -> dict[str, dict[str, Any]]:
        async with self.http.get(self.url + "/llumnix/v1/instances") as answer:
            return {row["id"]: row for row in (await answer.json())["instances"]}

    async def left(self) -> dict[str, Any]:
        """What is left of requests that are all over: of streams, and of KV memory."""
        async with self.http.get(self.url + "/llumnix/v1/requests") as answer:
            requests = (await answer.json())["requests"]
        used = [row["kv_tokens_used"] for row in (await self.instances()).values()]
        return {"requests": len(requests), "kv_tokens": used}

    def summary(self, minutes: float) -> dict[str, Any]:
        return {
            "minutes": minutes, "streams": self.streams, "wrong": self.wrong,
            "failed": self.failed, "errors": self.errors,
            "kills": self.kills, "urgent": self.urgent, "hung_up": self.hung_up,
            "outcomes": self.outcomes, "reasons": self.reasons,
            "downtime_ms_p50": statistics.median(self.downtimes or [0.0]),
            "slope_mb_per_min": {
                role: round(slope(self.samples, role), 3) for role in ("frontend", "controller")
            },
        }  # fmt: skip


async def traffic(soak: Soak, args: argparse.Namespace) -> None:
    """All of it, for the time that was asked for."""
    work = [soak.known() for _ in range(STREAMS)] + [soak.others() for _ in range(3)]
    work += [soak.move(60 / args.per_minute), soak.watch(), soak.kill(60 * args.kill_minutes)]
    tasks = [asyncio.create_task(w) for w in work]
    await asyncio.sleep(args.minutes * 60)
    soak.stopping = True
    await asyncio.gather(*tasks)
    await asyncio.sleep(2)


async def main(args: argparse.Namespace) -> None:
    real_time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_shape("tiny", Path(temporary) / "tiny")
        write_weights(folder)
        flags = ["--instances", "2", "--dtype", "float32", "--max-num-seqs", "4"]
        flags += ["--max-model-len", "4096", "--kv-cache-memory-bytes", "100000000"]
        shared_memory = set(os.listdir("/dev/shm"))
        server = serve("llumnix", str(folder), "m", flags, Path(temporary) / "server.log")
        try:
            await server.wait_until_up()
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector) as http:
                soak = Soak(http, server.url, server.process.pid)
                for body in soak.bodies:
                    soak.answers.append(await soak.ask(body, uuid.uuid4().hex))
                await traffic(soak, args)
                left = await soak.left()
            below = processes(server.process.pid)
            server.stop()
            ended_by = time.monotonic() + ENDED_WITHIN_S
            while (alive := [p for p in below if Path(f"/proc/{p}").exists()]) and (
                time.monotonic() < ended_by
            ):
                await asyncio.sleep(0.1)
            left["processes"] = len(alive)
            left["shared_memory"] = sorted(set(os.listdir("/dev/shm")) - shared_memory)
            summary = {**soak.summary(args.minutes), "left": left}
            print(summary)
            write_result(args.out, soak.samples, summary=summary)
            assert (soak.wrong, soak.failed) == (0, 0)
            assert max(summary["slope_mb_per_min"].values()) < SLOPE_MAX_MB_PER_MIN
            assert left == {
                "requests": 0, "kv_tokens": [0, 0], "processes": 0, "shared_memory": []
            }  # fmt: skip
        except BaseException:
            print(server.log.read_text()[-4000:])
            raise
        finally:
            server.stop()


def plot(raw: Path, picture: Path) -> None:
    """Memory of the two processes that must not grow, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    samples = json.loads(raw.read_text())["rows"]
    figure, axes = pyplot.subplots(figsize=(8, 3), layout="constrained")
    for role in ("frontend", "controller"):
        axes.plot(
            [s["s"] / 60 for s in samples], [s["memory_mb"][role] for s in samples], label=role
        )
    for before, after in itertools.pairwise(samples):
        if after["kills"] > before["kills"]:
            axes.axvline(after["s"] / 60, color="grey", linewidth=0.7, linestyle=":")
    axes.set(xlabel="minutes (dotted: an instance is killed)", ylabel="private memory, MB")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--per-minute", type=float, default=60)
    parser.add_argument("--kill-minutes", type=float, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/soak.json")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("RAW", "PICTURE"))
    given = parser.parse_args()
    if given.plot:
        plot(*given.plot)
    else:
        asyncio.run(main(given))
