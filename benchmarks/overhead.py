"""What llumnix adds over bare `vllm serve`: one instance each, same flags, measured in turns.

Both servers run side by side on this machine; in every round first the one, then the other gets the
same requests, and the order alternates. Each turn begins with requests that do not count, since the
server was idle during the other's turn. The columns `added` are medians over the rounds of the
difference between the two, the throughput ratio is a median over the rounds too.

The client runs with real-time priority where it may: on a machine whose cores are all busy it would
else measure how long the kernel leaves *it* waiting (0.5 s at times).

With `--before FOLDER` an earlier state of llumnix (a checkout's `src`) takes its turns too; with
`--variant FLAGS` llumnix with these flags more, such as "--survival off"; with `--instances N`
there are so many, and bare vLLM has as many data-parallel ranks behind one process.

Latency is measured with one stream, and with Poisson arrivals; throughput with eight streams in a
closed loop (whose latencies say little: whether eight requests arrive within one engine step or two
decides whether a prefill falls between somebody's tokens). The CPU time of the process that speaks
HTTP says how many requests a second one such process can carry.

    python benchmarks/overhead.py [--model FOLDER] [--rounds 8] [--out FILE]
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from common import (
    ROOT,
    Served,
    Streamed,
    kinds,
    median,
    percentile,
    real_time,
    serve,
    stream,
    write_result,
)
from shapes import SHAPES, write_shape

Load = dict[str, Any]
"""`streams` at a time or `rate` a second, so many `requests`."""
Round = dict[str, dict[str, float]]
"""The figures of each server, by its kind."""


def one_stream(requests: int) -> Load:
    return {"load": "one stream", "streams": 1, "rate": None, "requests": requests}


def poisson(rate: float, requests: int) -> Load:
    name = f"{rate:g} req/s, Poisson"
    return {"load": name, "streams": None, "rate": rate, "requests": requests}


def closed(streams: int, requests: int) -> Load:
    return {"load": f"{streams} streams", "streams": streams, "rate": None, "requests": requests}


LOADS = (one_stream(20), poisson(2.0, 30), closed(8, 48))
WARM_UP: Load = {"load": "warm-up", "streams": 2, "rate": None, "requests": 4}
FLAGS = ["--enforce-eager", "--max-model-len", "2048", "--kv-cache-memory-bytes", "536870912"]


async def one_round(
    url: str, name: str, load: Load, tokens: int, seed: int
) -> tuple[list[Streamed], float]:
    """`requests` requests, `streams` at a time or `rate` a second; the results and the seconds
    that it all took."""
    dice = random.Random(f"{load['load']} {seed}")
    prompts = [[dice.randrange(10, 400) for _ in range(64)] for _ in range(load["requests"])]
    queue = iter(prompts)
    results: list[Streamed] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:

        async def one(prompt: list[int]) -> None:
            body = {"model": name, "prompt": prompt, "max_tokens": tokens}
            body |= {"temperature": 0, "ignore_eos": True}
            results.append(await stream(http, url, body))

        async def work() -> None:
            for prompt in queue:
                await one(prompt)

        began = time.perf_counter()
        if load["rate"] is None:
            await asyncio.gather(*(work() for _ in range(load["streams"])))
        else:
            async with asyncio.TaskGroup() as group:
                for prompt in prompts:
                    group.create_task(one(prompt))
                    await asyncio.sleep(dice.expovariate(load["rate"]))
        return results, time.perf_counter() - began


def cpu_s(server: Served) -> float:
    """CPU time of the process that speaks HTTP, so far."""
    times = psutil.Process(server.process.pid).cpu_times()
    return times.user + times.system


def summary(results: list[Streamed], wall_s: float, used_s: float, tokens: int) -> dict[str, float]:
    ttft = [r.ttft_s * 1e3 for r in results]
    gaps = [g * 1e3 for r in results for g in r.gaps_s]
    return {
        "ttft_ms_p50": percentile(ttft, 0.5),
        "ttft_ms_p99": percentile(ttft, 0.99),
        "itl_ms_p50": percentile(gaps, 0.5),
        "itl_ms_p99": percentile(gaps, 0.99),
        "tokens_per_s": len(results) * tokens / wall_s,
        "cpu_ms_per_request": used_s * 1e3 / len(results),
    }


async def measure(
    args: argparse.Namespace,
    servers: list[Served],
    loads: tuple[Load, ...],
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """One row a load; what is there after a round is `keep`'s."""
    await asyncio.gather(*(s.wait_until_up() for s in servers))
    rounds: dict[str, list[Round]] = {load["load"]: [] for load in loads}
    rows: list[dict[str, Any]] = []
    for number in range(args.rounds):
        for load in loads:
            took: Round = {}
            for server in servers if number % 2 == 0 else servers[::-1]:
                await one_round(server.url, "m", WARM_UP, args.tokens, seed=-1)
                used_s = cpu_s(server)
                results, wall_s = await one_round(server.url, "m", load, args.tokens, seed=number)
                used_s = cpu_s(server) - used_s
                took[server.kind] = summary(results, wall_s, used_s, args.tokens)
            rounds[load["load"]].append(took)
        rows = [row_of(load, args.tokens, rounds[load["load"]]) for load in loads]
        keep(rows)
    return rows


def row_of(load: Load, tokens: int, rounds: list[Round]) -> dict[str, Any]:
    """Medians over the rounds, and of the differences to bare vLLM: of llumnix under the names
    alone, of its earlier state and its variant, if there are, in `before` and `variant`."""
    row: dict[str, Any] = {**load, "output_tokens": tokens, "rounds": rounds}
    for kind in rounds[0]:
        row[kind] = {k: median([r[kind][k] for r in rounds]) for k in rounds[0][kind]}
    for kind in rounds[0].keys() - {"bare"}:
        found: dict[str, Any] = {
            "added_ms": {
                k: median([r[kind][k] - r["bare"][k] for r in rounds])
                for k in row["bare"]
                if k.endswith(("p50", "p99"))
            },
            "throughput_ratio": median(
                [r[kind]["tokens_per_s"] / r["bare"]["tokens_per_s"] for r in rounds]
            ),
        }
        (row if kind == "llumnix" else row[kind]).update(found)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Of all rows; llumnix's earlier state and its variant have lines of their own beneath each, if
    they were there."""
    lines = [
        "| load | figure | bare vLLM | llumnix | added |",
        "|---|---|---|---|---|",
    ]
    names = {
        "ttft_ms_p50": "TTFT P50, ms",
        "ttft_ms_p99": "TTFT P99, ms",
        "itl_ms_p50": "inter-token P50, ms",
        "itl_ms_p99": "inter-token P99, ms",
    }
    for row in rows:
        bare = row["bare"]
        figures = [(row["llumnix"], row, "")]
        others = [name for name in ("before", "variant") if name in row]
        figures += [(row[name], row[name], f" ({name})") for name in others]
        for ours, diff, note in figures:
            load = row["load"] + note
            key = "cpu_ms_per_request"
            lines.append(
                f"| {load} | CPU of the HTTP process, ms a request | {bare[key]:.2f} | "
                f"{ours[key]:.2f} | ratio {ours[key] / bare[key]:.2f} |"
            )
            # Of several streams in a closed loop only the throughput says anything.
            for key, name in names.items() if row["streams"] in (None, 1) else ():
                lines.append(
                    f"| {load} | {name} | {bare[key]:.2f} | {ours[key]:.2f} | "
                    f"{diff['added_ms'][key]:+.2f} |"
                )
            if row["rate"] is None:
                key = "tokens_per_s"
                lines.append(
                    f"| {load} | throughput, tokens/s | {bare[key]:.0f} | {ours[key]:.0f} | "
                    f"ratio {diff['throughput_ratio']:.3f} |"
                )
    return "\n".join(lines)


def main(given: list[str] | None = None, loads: tuple[Load, ...] = LOADS) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder or a shape (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--share", type=float, default=1.0, help="of a load's requests: a dry run")
    parser.add_argument("--tokens", type=int, default=32, help="output tokens of a request")
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--before", type=Path, help="`src` of an earlier state, to compare")
    parser.add_argument("--variant", help="flags of llumnix beside itself, in quotes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/overhead.json")
    parser.add_argument("flags", nargs="*", default=FLAGS, help="of the servers, after --")
    args = parser.parse_args(given)
    if args.model is None:
        from llumnix.demo import prepare_demo_model

        args.model = str(prepare_demo_model(print))
    flags = args.flags
    priority = real_time()
    with tempfile.TemporaryDirectory() as logs:
        if args.model in SHAPES:
            args.model = str(write_shape(args.model, Path(logs) / args.model))
            flags = [*flags, "--load-format", "dummy"]
        servers: list[Served] = []
        ours = ["--instances", str(args.instances)]
        peer = []
        if args.instances > 1:
            # One process speaks HTTP, as in llumnix.
            peer = ["--data-parallel-size", str(args.instances), "--api-server-count", "1"]

        def keep(rows: list[dict[str, Any]]) -> None:
            more = {"instances": args.instances, "before": str(args.before or "")}
            more["variant"] = args.variant or ""
            write_result(
                args.out, rows, model=Path(args.model).name, flags=flags, client=priority, **more
            )

        try:
            for kind, more, env in kinds(args, peer, ours):
                log = Path(logs) / f"{kind}.log"
                servers.append(serve(kind, args.model, "m", flags + more, log, env))
            loads = tuple({**x, "requests": max(4, int(args.share * x["requests"]))} for x in loads)
            rows = asyncio.run(measure(args, servers, loads, keep))
        finally:
            for server in servers:
                server.stop()
    print(table(rows))


if __name__ == "__main__":
    main()
