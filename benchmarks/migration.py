"""What a migration costs: the gap in the moved stream, and the other streams' pace.

One `llumnix serve` with two instances. A request of each prompt length is streamed and moved back
and forth; the extra gap is the time between the source's last token and the destination's first,
as the HTTP client got them, less the median time between tokens. In turns: copied while it goes on
(`staged`), copied after it was stopped (`blocking`), computed again (`recompute`); alone, and with
`--background` other streams on each instance. Then the other streams' time between tokens with
and without one request that is moved all the time, in windows that alternate. Last, one of the
instances is drained while its streams have `--drain-tokens` or half of that to go.

Prefix caching is off: it would leave nothing to copy on the way back. With `--caching` it is on,
and each request is moved once.

    python benchmarks/migration.py [--shape tiny|llama-7b] [--lengths 256,1024] [--hops 8]
                                   [--background 4] [--window-s 2] [--caching] [--out FILE]
                                   [-- FLAGS]
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from common import ROOT, percentile, real_time, serve, write_result
from shapes import SHAPES, write_shape

EVERY_TOKENS = 24
FIRST_MOVE = 16
STILL = "not"
EACH = 4
"""Windows of each pace."""
PACES: dict[str, float | None] = {STILL: None, "once a second": 1.0, "back to back": 0.02}
MODES = ["staged", "blocking", "recompute"]
KEPT = ("extra_gap_ms", "downtime_ms", "total_ms", "stages")


@dataclass(slots=True)
class Watched:
    """One stream: when each token came, by its number."""

    at_s: list[float] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    over: bool = False

    async def until(self, tokens: int) -> bool:
        async with self.changed:
            await self.changed.wait_for(lambda: self.over or len(self.at_s) >= tokens)
        return len(self.at_s) >= tokens


async def watch(
    http: aiohttp.ClientSession, url: str, name: str, prompt: list[int], tokens: int, seen: Watched
) -> None:
    body = {
        "model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    try:
        async with http.post(
            url + "/v1/completions", json=body, headers={"X-Request-Id": name}
        ) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    count = len(json.loads(line[6:])["choices"][0].get("token_ids") or ())
                    async with seen.changed:
                        seen.at_s += [now] * count
                        seen.changed.notify_all()
    finally:
        async with seen.changed:
            seen.over = True
            seen.changed.notify_all()


async def move(http: aiohttp.ClientSession, url: str, name: str, mode: str) -> dict[str, Any]:
    order = {"request_id": name, "copy": mode}
    async with http.post(url + "/llumnix/v1/migrations", json=order) as answer:
        return await answer.json()


async def one_request(
    http: aiohttp.ClientSession, url: str, length: int, mode: str, hops: int, dice: random.Random
) -> tuple[list[dict[str, Any]], list[float]]:
    """Streams one request and moves it `hops` times; returns its moves and times between tokens."""
    name, seen = uuid.uuid4().hex, Watched()
    prompt = [dice.randrange(300, 4000) for _ in range(length)]
    tokens = FIRST_MOVE + EVERY_TOKENS * (hops + 1)
    task = asyncio.create_task(watch(http, url, name, prompt, tokens, seen))
    moves = []
    for hop in range(hops):
        if await seen.until(FIRST_MOVE + EVERY_TOKENS * hop):
            moves.append(await move(http, url, name, mode))
    await task
    # The frontend may have learnt the number of tokens only after it had answered.
    moves = [
        await (await http.get(f"{url}/llumnix/v1/migrations/{m['id']}")).json()
        for m in moves
        if "id" in m
    ]
    gaps = [(b - a) * 1e3 for a, b in zip(seen.at_s, seen.at_s[1:], strict=False)]
    step = statistics.median(gaps)
    rows = []
    for one in moves:
        number = one.get("source_tokens")
        if one.get("outcome") != "migrated" or not number or number >= len(seen.at_s):
            print("  not counted:", one.get("outcome"), one.get("reason") or one)
            continue
        gap = gaps[number - 1]
        rows.append({**one, "extra_gap_ms": gap - step, "step_ms": step})
    return rows, gaps


class Background:
    """Streams that come one after the other, `count` at a time."""

    def __init__(self, http: aiohttp.ClientSession, url: str, count: int, tokens: int) -> None:
        self.http, self.url, self.count, self.tokens = http, url, count, tokens
        self.watched: list[Watched] = []
        self.cut_short = 0
        self.stopping = False

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """Of all streams so far: when a token came, and ms since the one before it."""
        return [
            (b, (b - a) * 1e3)
            for seen in self.watched
            for a, b in zip(seen.at_s, seen.at_s[1:], strict=False)
        ]

    async def __aenter__(self) -> "Background":
        self.tasks = [asyncio.create_task(self.keep(i)) for i in range(self.count)]
        if self.count:
            await asyncio.sleep(3)
        return self

    async def __aexit__(self, *_: Any) -> None:
        self.stopping = True
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def keep(self, number: int) -> None:
        dice = random.Random(number)
        while not self.stopping:
            seen = Watched()
            self.watched.append(seen)
            prompt = [dice.randrange(300, 4000) for _ in range(256)]
            tokens = dice.randrange(self.tokens // 2, self.tokens)
            await watch(self.http, self.url, uuid.uuid4().hex, prompt, tokens, seen)
            self.cut_short += len(seen.at_s) != tokens


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    gaps = [r["extra_gap_ms"] for r in rows]
    return {
        "extra_gap_ms": {
            "p50": percentile(gaps, 0.5), "p99": percentile(gaps, 0.99), "max": max(gaps)
        },
        "step_ms": statistics.median(r["step_ms"] for r in rows),
        "downtime_ms": statistics.median(r["downtime_ms"] for r in rows),
        "total_ms": statistics.median(r["total_ms"] for r in rows),
        "moves": len(rows),
        "stages": rows[-1]["stages"],
        "all": [{k: r[k] for k in KEPT} for r in rows],
    }  # fmt: skip


async def gaps(http: aiohttp.ClientSession, url: str, args: argparse.Namespace) -> list[Any]:
    rows = []
    dice = random.Random(7)
    print(f"{'prompt':>7} {'mode':>10} {'others':>6} {'step':>7} {'extra p50':>9} {'p99':>8} "
          f"{'total':>8} stages (tokens, MB, ms)")  # fmt: skip
    for others in dict.fromkeys((0, args.background)):
        async with Background(http, url, 2 * others, args.background_tokens):
            for length in args.lengths:
                modes = args.modes if not others else ["staged"]
                for mode in modes:
                    hops = args.hops if mode == "staged" else max(3, args.hops // 2)
                    moved = []
                    for once in [1] * hops if args.caching else [hops]:
                        moved += (await one_request(http, url, length, mode, once, dice))[0]
                    if not moved:
                        continue
                    row = {"prompt_tokens": length, "mode": mode, "background": others}
                    row |= summary(moved)
                    rows.append(row)
                    gap = row["extra_gap_ms"]
                    shown = [
                        (s["tokens"], round(s["bytes"] / 1e6, 1), round(s["ms"], 1))
                        for s in row["stages"]
                    ]
                    print(f"{length:7} {mode:>10} {others:6} {row['step_ms']:7.2f} "
                          f"{gap['p50']:9.2f} {gap['p99']:8.2f} {row['total_ms']:8.1f} {shown}",
                          flush=True)  # fmt: skip
    return rows


async def cost(http: aiohttp.ClientSession, url: str, args: argparse.Namespace) -> dict[str, Any]:
    """The other streams' time between tokens, while one request is moved and while it is not."""
    length = min(args.lengths, key=lambda n: abs(n - 4096))
    windows: list[tuple[str, float, float]] = []
    moves = dict.fromkeys(PACES, 0)
    count = 2 * max(1, args.background)
    async with Background(http, url, count, args.cost_background_tokens) as others:
        name, seen = uuid.uuid4().hex, Watched()
        dice = random.Random(9)
        prompt = [dice.randrange(300, 4000) for _ in range(length)]
        task = asyncio.create_task(watch(http, url, name, prompt, args.cost_tokens, seen))
        await seen.until(5)
        moving = [kind for kind in PACES if kind != STILL] * EACH
        # One without moves before and after each: contexts grow, and with them the steps, so what
        # is compared has to lie close together.
        for kind in [STILL, *(k for one in moving for k in (one, STILL))]:
            began = time.perf_counter()
            while time.perf_counter() - began < args.window_s and not seen.over:
                if PACES[kind] is None:
                    await asyncio.sleep(0.1)
                    continue
                result = await move(http, url, name, "staged")
                moves[kind] += result.get("outcome") == "migrated"
                await asyncio.sleep(PACES[kind] or 0)
            if seen.over:
                raise RuntimeError("the moved request ended too soon: give it more --cost-tokens")
            windows.append((kind, began, time.perf_counter()))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gaps_ms = others.gaps
    row: dict[str, Any] = {"prompt_tokens": length, "background": args.background}
    found = [[g for at, g in gaps_ms if a <= at <= b] for _, a, b in windows]
    print(f"others' time between tokens, a request of {length} tokens being moved:")
    for kind in PACES:
        mine = [n for n, window in enumerate(windows) if window[0] == kind]
        seconds = sum(windows[n][2] - windows[n][1] for n in mine)
        gaps = [g for n in mine for g in found[n]]
        row[kind] = {
            "moves_per_s": moves[kind] / seconds, "itl_mean_ms": statistics.fmean(gaps),
            "itl_p50_ms": percentile(gaps, 0.5), "itl_p99_ms": percentile(gaps, 0.99),
            "tokens": len(gaps),
        }  # fmt: skip
        if kind != STILL:
            row[kind] |= {
                "ratios_mean": [beside(found, n, statistics.fmean) for n in mine],
                "ratios_p50": [beside(found, n, statistics.median) for n in mine],
            }
            row[kind]["ratio_mean"] = statistics.fmean(row[kind]["ratios_mean"])
            row[kind]["ratio_p50"] = statistics.fmean(row[kind]["ratios_p50"])
        print(
            f"  {kind:>14}: {moves[kind] / seconds:5.1f} moves/s, "
            f"mean {row[kind]['itl_mean_ms']:.3f} ms, p99 {row[kind]['itl_p99_ms']:.2f} ms, ratios "
            + " ".join(f"{r:.4f}" for r in row[kind].get("ratios_mean", ())),
            flush=True,
        )
    return row


def beside(windows: list[list[float]], n: int, figure: Callable[[list[float]], float]) -> float:
    """A window's figure to that of the windows before and after it."""
    return figure(windows[n]) * 2 / (figure(windows[n - 1]) + figure(windows[n + 1]))


async def drain(http: aiohttp.ClientSession, url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Empties one of the two instances, each of which has streams: how long it takes, and what the
    streams notice. `remaining_s_max`: how long the longest of them went on, which a drain without
    moves would have waited for."""

    async def listed(what: str) -> list[dict[str, Any]]:
        return (await (await http.get(f"{url}/llumnix/v1/{what}")).json())[what]

    count = 2 * max(1, args.background)
    async with Background(http, url, count, args.drain_tokens) as others:
        others.stopping = True  # No new ones.
        leaving = (await listed("instances"))[-1]["id"]
        count = sum(r["instance"] == leaving for r in await listed("requests"))
        began = time.perf_counter()
        (await http.post(f"{url}/llumnix/v1/instances/{leaving}/drain")).raise_for_status()
        # An instance that is stopped already has no such number any more.
        while any(r["id"] == leaving and r.get("in_flight") for r in await listed("instances")):
            await asyncio.sleep(0.01)
        took_s = time.perf_counter() - began
        await asyncio.gather(*others.tasks)
        ended_s = time.perf_counter() - began
        gaps_ms = [g for at, g in others.gaps if began <= at <= began + took_s]
    print(
        f"drain: {count} streams left {leaving} in {took_s:.2f} s, the longest went on for "
        f"{ended_s:.1f} s; cut short: {others.cut_short}; longest gap {max(gaps_ms):.0f} ms"
    )
    return {
        "streams": count, "seconds": took_s, "remaining_s_max": ended_s,
        "cut_short": others.cut_short, "gap_ms_max": max(gaps_ms),
        "itl_ms_p50": percentile(gaps_ms, 0.5), "itl_ms_p99": percentile(gaps_ms, 0.99),
    }  # fmt: skip


async def measure(args: argparse.Namespace) -> None:
    priority = real_time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_shape(args.shape, Path(temporary) / args.shape)
        flags = ["--instances", "2", "--load-format", "dummy"]
        flags += [] if args.caching else ["--no-enable-prefix-caching"]
        flags += ["--max-num-seqs", "64", *args.flags]
        server = serve("llumnix", str(folder), "m", flags, Path(temporary) / "server.log")
        try:
            await server.wait_until_up()
            timeout = aiohttp.ClientTimeout(total=None)
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
                await one_request(http, server.url, 64, "staged", 2, random.Random(1))
                rows = await gaps(http, server.url, args)
                more = {}
                if not args.caching:
                    more["others"] = await cost(http, server.url, args)
                    more["drain"] = await drain(http, server.url, args)
            write_result(args.out, rows, client=priority, shape=args.shape, flags=flags, **more)
        except BaseException:
            print(server.log.read_text()[-6000:])
            raise
        finally:
            server.stop()


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument(
        "--lengths", type=lambda s: [int(n) for n in s.split(",")], default=[256, 512, 1024, 2048]
    )
    parser.add_argument("--modes", type=lambda s: s.split(","), default=MODES, help="alone")
    parser.add_argument("--hops", type=int, default=8)
    parser.add_argument("--background", type=int, default=2)
    parser.add_argument("--background-tokens", type=int, default=600)
    parser.add_argument("--caching", action="store_true", help="only the gaps, of moves there")
    parser.add_argument(
        "--cost-background-tokens", type=int, help="of the streams whose pace is measured"
    )
    parser.add_argument("--window-s", type=float, default=2)
    parser.add_argument("--cost-tokens", type=int, default=8000)
    parser.add_argument("--drain-tokens", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/migration_cpu.json")
    parser.add_argument("flags", nargs="*", help="for `llumnix serve`, after --")
    args = parser.parse_args(given)
    if args.cost_background_tokens is None:
        args.cost_background_tokens = args.background_tokens
    return args


def main(given: list[str] | None = None) -> None:
    asyncio.run(measure(arguments(given)))


if __name__ == "__main__":
    main()
