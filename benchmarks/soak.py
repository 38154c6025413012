"""Migrations without end, under traffic: are all streams exact, is memory flat, is anything left?

Two instances on a CPU. Streams with known answers run all the time and are moved at random,
`--per-minute` moves a minute; others come and go beside them, some hang up. Every answer is
compared with the undisturbed one; memory of all processes is looked at every ten seconds.

    python benchmarks/soak.py [--minutes 10] [--per-minute 200] [--out FILE]
"""

import argparse
import asyncio
import random
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


def memory_mb(root: int) -> float:
    """Private memory of a process and all below it, in MB."""
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += [int(c) for c in (task / "children").read_text().split()]
        except OSError:
            continue
        total += sum(int(x.split()[1]) for x in rollup.splitlines() if x.startswith("Private"))
    return total / 1024


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
        self.streams = self.wrong = self.hung_up = 0
        self.samples: list[dict[str, Any]] = []
        self.stopping = False

    def body(self, number: int) -> dict[str, Any]:
        prompt = [self.dice.randrange(300, 4000) for _ in range(self.dice.randrange(50, 700))]
        sampling = {"temperature": 0} if number % 2 else {"temperature": 0.9, "seed": number}
        return {
            "model": "m", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True,
            "return_token_ids": True, **sampling,
        }  # fmt: skip

    async def ask(self, body: dict[str, Any], name: str) -> list[int]:
        async with self.http.post(
            self.url + "/v1/completions", json=body, headers={"X-Request-Id": name}
        ) as answer:
            answer.raise_for_status()
            return list((await answer.json())["choices"][0]["token_ids"])

    async def known(self) -> None:
        while not self.stopping:
            number = self.dice.randrange(KNOWN)
            name = uuid.uuid4().hex
            self.running.add(name)
            try:
                found = await self.ask(self.bodies[number], name)
            finally:
                self.running.discard(name)
            self.streams += 1
            self.wrong += found != self.answers[number]

    async def others(self) -> None:
        while not self.stopping:
            body = {**self.body(1), "max_tokens": self.dice.randrange(5, 80)}
            name = uuid.uuid4().hex
            self.running.add(name)
            task = asyncio.create_task(self.ask(body, name))
            if self.dice.random() < 0.3:
                await asyncio.sleep(self.dice.random() * 0.3)
                self.hung_up += not task.done()
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.running.discard(name)
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

    async def watch(self) -> None:
        began = time.monotonic()
        while not self.stopping:
            await asyncio.sleep(SAMPLE_EVERY_S)
            sample = {
                "s": round(time.monotonic() - began),
                "memory_mb": round(memory_mb(self.pid), 1),
                "streams": self.streams,
                "wrong": self.wrong,
                "migrated": self.outcomes.get("migrated", 0),
            }
            self.samples.append(sample)
            print(sample, flush=True)

    async def blocks_used(self) -> list[int]:
        async with self.http.get(self.url + "/llumnix/v1/instances") as answer:
            return [i["kv_tokens_used"] for i in (await answer.json())["instances"]]


async def main(args: argparse.Namespace) -> None:
    real_time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_shape("tiny", Path(temporary) / "tiny")
        write_weights(folder)
        flags = ["--instances", "2", "--dtype", "float32"]
        flags += ["--max-model-len", "4096", "--kv-cache-memory-bytes", "100000000"]
        server = serve("llumnix", str(folder), "m", flags, Path(temporary) / "server.log")
        try:
            await server.wait_until_up()
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector) as http:
                soak = Soak(http, server.url, server.process.pid)
                for body in soak.bodies:
                    soak.answers.append(await soak.ask(body, uuid.uuid4().hex))
                work = [soak.known() for _ in range(STREAMS)] + [soak.others(), soak.others()]
                work += [soak.move(60 / args.per_minute), soak.watch()]
                tasks = [asyncio.create_task(w) for w in work]
                await asyncio.sleep(args.minutes * 60)
                soak.stopping = True
                await asyncio.gather(*tasks)
                await asyncio.sleep(1)
                left = await soak.blocks_used()
            half = len(soak.samples) // 2
            early = statistics.fmean(s["memory_mb"] for s in soak.samples[half // 2 : half])
            late = statistics.fmean(s["memory_mb"] for s in soak.samples[half + half // 2 :])
            summary = {
                "minutes": args.minutes, "streams": soak.streams, "wrong": soak.wrong,
                "hung_up": soak.hung_up, "outcomes": soak.outcomes, "reasons": soak.reasons,
                "downtime_ms_p50": statistics.median(soak.downtimes),
                "memory_mb_second_quarter": early, "memory_mb_last_quarter": late,
                "kv_tokens_left": left,
            }  # fmt: skip
            print(summary)
            write_result(args.out, soak.samples, summary=summary)
            assert soak.wrong == 0
            assert left == [0, 0]
        except BaseException:
            print(server.log.read_text()[-4000:])
            raise
        finally:
            server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--per-minute", type=float, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/soak.json")
    asyncio.run(main(parser.parse_args()))
