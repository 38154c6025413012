"""Instances are killed at random moments, again and again: what do the clients notice?

Two instances on a CPU; on GPUs one each. So many streams with known answers run at a time: greedy,
seeded, with log-probabilities, with a grammar, several sequences, and answers that are not
streamed. The next kill waits until both instances serve again. Each answer is compared with the
undisturbed one. A stream's gap is its longest wait for tokens that begins within a second from the
kill of its instance; what was under way to the client then still arrives. Answers that are not
streamed have none.

    python benchmarks/survival.py [--minutes 30] [--every 60] [--at-once 12] [--out FILE]
        [--model FOLDER or shape] [--tokens 160] [--kinds greedy,seeded] [--loose]
        [-- flags of the server]
    python benchmarks/survival.py --plot FILE.json FILE.png

An instance is killed at a random moment of each `--every` seconds. `--loose`: the answers are not
compared, since the arithmetic depends on the batch. The memory of each process is looked at every
ten seconds (soak.py).
"""

import argparse
import asyncio
import json
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from common import ROOT, Served, markdown, percentile, real_time, serve, write_result
from shapes import SHAPES, write_shape, write_weights
from soak import SAMPLE_EVERY_S, SLOPE_MAX_MB_PER_MIN, memory_mb, plot, slope

KNOWN = 24
IN_FLIGHT_S = 1.0
"""So long after a kill tokens of before it may still arrive."""
GRAMMAR = 'root ::= "go " pair{70} " end"\npair ::= ("ab" | "cd" | "e") (","|";")'
FLAGS = [
    "--dtype", "float32", "--max-num-seqs", "16", "--max-model-len", "4096",
    "--kv-cache-memory-bytes", "100000000",
]  # fmt: skip
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("greedy", {"temperature": 0, "frequency_penalty": 1.2}),
    ("seeded", {"temperature": 0.9}),
    ("log-probabilities", {"temperature": 0.7, "logprobs": 2}),
    ("grammar", {"temperature": 0.9, "structured_outputs": {"grammar": GRAMMAR}}),
    ("two sequences", {"temperature": 0.9, "n": 2}),
    ("not streamed", {"temperature": 0.9, "stream": False}),
)


@dataclass(slots=True, kw_only=True)
class Answer:
    """What a client got."""

    kind: str
    tokens: dict[int, list[int]] = field(default_factory=dict)
    more: list[Any] = field(default_factory=list)  # log-probabilities
    error: str | None = None
    last_s: float = 0.0  # of the last tokens
    killed_s: float | None = None  # its instance, the last time
    gaps_s: list[float] = field(default_factory=list)  # one a kill

    def told(self, now: float) -> None:
        """Tokens have come."""
        if self.killed_s is not None:
            since_s = max(self.last_s, self.killed_s)
            if since_s < self.killed_s + IN_FLIGHT_S:
                self.gaps_s[-1] = max(self.gaps_s[-1], now - since_s)
        self.last_s = now

    def killed(self, now: float) -> None:
        if self.kind == "not streamed":
            return
        self.killed_s = now
        self.gaps_s.append(0.0)


class Killing:
    """The traffic, the kills, and what was seen."""

    def __init__(self, http: aiohttp.ClientSession, url: str, args: argparse.Namespace) -> None:
        self.http, self.url, self.args = http, url, args
        self.dice = random.Random(args.seed)
        self.kinds = [kind for kind in KINDS if not args.kinds or kind[0] in args.kinds]
        self.bodies = [self.body(number) for number in range(KNOWN)]
        self.calm: list[Answer] = []
        self.open: dict[str, Answer] = {}
        self.begun = self.done = self.wrong = self.failed = self.hit = self.kills = 0
        self.samples: list[dict[str, Any]] = []
        self.errors: dict[str, int] = {}
        self.gaps_s: list[float] = []
        self.over = False

    def body(self, number: int) -> dict[str, Any]:
        kind, sampling = self.kinds[number % len(self.kinds)]
        prompt = [self.dice.randrange(300, 4000) for _ in range(self.dice.randrange(20, 300))]
        return {
            "model": "m", "prompt": prompt, "max_tokens": self.args.tokens, "stream": True,
            "ignore_eos": kind != "grammar", "return_token_ids": True, "seed": number, **sampling,
        }  # fmt: skip

    async def ask(self, number: int, name: str) -> Answer:
        body = self.bodies[number]
        answer = self.open[name] = Answer(kind=self.kinds[number % len(self.kinds)][0])
        try:
            async with self.http.post(
                self.url + "/v1/completions", json=body, headers={"X-Request-Id": name}
            ) as response:
                if response.status != 200:
                    answer.error = (await response.text())[:300]
                elif body["stream"]:
                    async for line in response.content:
                        if line.startswith(b"data: {"):
                            self.take(answer, json.loads(line[6:]))
                else:
                    self.take(answer, await response.json())
        except (aiohttp.ClientError, TimeoutError) as error:
            answer.error = repr(error)
        finally:
            del self.open[name]
        return answer

    def take(self, answer: Answer, piece: dict[str, Any]) -> None:
        """A chunk has come."""
        if "error" in piece:
            answer.error = str(piece["error"])[:300]
            return
        now = time.monotonic()
        for choice in piece["choices"]:
            if choice.get("token_ids"):
                answer.tokens.setdefault(choice["index"], []).extend(choice["token_ids"])
                answer.told(now)
            if choice.get("logprobs"):
                answer.more += choice["logprobs"]["token_logprobs"]

    async def client(self) -> None:
        while not self.over:
            number = self.begun % KNOWN
            self.begun += 1
            answer = await self.ask(number, f"s{self.begun}")
            self.done += 1
            if answer.error is not None:
                self.failed += 1
                self.errors[answer.error] = self.errors.get(answer.error, 0) + 1
            elif not self.args.loose:
                calm = self.calm[number]
                if (answer.tokens, answer.more) != (calm.tokens, calm.more):
                    self.wrong += 1
                    print("wrong:", answer.kind, flush=True)
            self.gaps_s += answer.gaps_s

    async def get(self, path: str) -> list[dict[str, Any]]:
        async with self.http.get(self.url + "/llumnix/v1/" + path) as response:
            rows: list[dict[str, Any]] = (await response.json())[path]
        return rows

    async def killer(self) -> None:
        """Kills an instance at a random moment of each period, once both serve."""
        period_ends_s = time.monotonic()
        while not self.over:
            begins_s, period_ends_s = period_ends_s, period_ends_s + self.args.every
            moment_s = begins_s + self.dice.random() * self.args.every
            await asyncio.sleep(max(0.0, moment_s - time.monotonic()))
            while not self.over and not await self.kill_one():
                await asyncio.sleep(0.2)

    async def kill_one(self) -> bool:
        """Kills an instance. False if one does not serve, or the one to be killed has nothing."""
        rows = await self.get("instances")
        victim = self.dice.choice(rows)
        here = {r["id"] for r in await self.get("requests") if r["instance"] == victim["id"]}
        if not here or any(row["state"] != "serving" for row in rows):
            return False
        os.kill(victim["pid"], signal.SIGKILL)
        self.kills += 1
        killed_s = time.monotonic()
        hit = [answer for name, answer in self.open.items() if name in here]
        for answer in hit:
            answer.killed(killed_s)
        self.hit += len(hit)
        print(f"kill {self.kills}: {victim['id']}, {len(hit)} hit; {self.done} done", flush=True)
        return True

    async def watch(self, pid: int) -> None:
        began_s = time.monotonic()
        while not self.over:
            await asyncio.sleep(SAMPLE_EVERY_S)
            sample = {"s": round(time.monotonic() - began_s), "memory_mb": memory_mb(pid)}
            self.samples.append({**sample, "kills": self.kills, "streams": self.done})

    def row(self, minutes: float) -> dict[str, Any]:
        gaps = self.gaps_s or [0.0]
        return {
            "minutes": minutes, "streams": self.done, "kills": self.kills, "hit": self.hit,
            "failed": self.failed, "wrong": None if self.args.loose else self.wrong,
            "errors": self.errors,
            "gap_s_p50": round(percentile(gaps, 0.5), 3),
            "gap_s_p99": round(percentile(gaps, 0.99), 3),
            "gap_s_longest": round(max(gaps), 3),
            "slope_mb_per_min": {
                role: round(slope(self.samples, role), 3) for role in ("frontend", "controller")
            },
        }  # fmt: skip


async def measure(served: Served, args: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """The row of the whole run, and the samples of memory."""
    await served.wait_until_up()
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        killing = Killing(http, served.url, args)
        if not args.loose:
            killing.calm = [await killing.ask(n, f"calm{n}") for n in range(KNOWN)]
            assert not any(calm.error for calm in killing.calm), [c.error for c in killing.calm]
        works = [killing.client() for _ in range(args.at_once)]
        works += [killing.killer(), killing.watch(served.process.pid)]
        tasks = [asyncio.create_task(work) for work in works]
        await asyncio.sleep(args.minutes * 60)
        killing.over = True
        await asyncio.gather(*tasks)
        return killing.row(args.minutes), killing.samples


def run(args: argparse.Namespace) -> None:
    real_time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.model)
        if args.model in SHAPES:
            folder = write_shape(args.model, Path(temporary) / "model")
        flags = ["--instances", "2", *(args.flags or FLAGS)]
        if args.model in SHAPES and args.loose:
            flags += ["--load-format", "dummy"]
        elif args.model in SHAPES:
            write_weights(folder)
        served = serve("llumnix", str(folder), "m", flags, Path(temporary) / "log")
        try:
            row, samples = asyncio.run(measure(served, args))
        except BaseException:
            print(served.log.read_text()[-4000:])
            raise
        finally:
            served.stop()
    write_result(args.out, samples, model=args.model, flags=flags, summary=row)
    names = ["streams", "kills", "hit", "failed", "wrong"]
    names += ["gap_s_p50", "gap_s_p99", "gap_s_longest"]
    print(markdown(names, [[str(row[name]) for name in names]]))
    print(row)
    assert (row["failed"], row["wrong"] or 0) == (0, 0)
    assert max(row["slope_mb_per_min"].values()) < SLOPE_MAX_MB_PER_MIN


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds from kill to kill")
    parser.add_argument("--at-once", type=int, default=12, help="streams")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="tiny", help="a folder or a shape")
    parser.add_argument("--kinds", type=lambda names: names.split(","), help="of streams")
    parser.add_argument("--loose", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/survival.json")
    parser.add_argument("flags", nargs="*", help="of the server, after --")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("RAW", "PICTURE"))
    args = parser.parse_args(given)
    if args.plot:
        plot(*args.plot)
    else:
        run(args)


if __name__ == "__main__":
    main()
