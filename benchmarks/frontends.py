"""What several HTTP processes carry: llumnix and bare `vllm serve` with the same
`--api-server-count` and as many engines (vLLM's data parallelism), in turns.

The engines have to be faster than the processes, so that these and not it are what there is to see:
a small shape on a GPU. Several client processes share each load, because one would be the limit.

- *streams*: a closed loop of `--streams` streams; the row has its throughput.
- *arrivals*: each of `--rates` requests a second for each HTTP process, Poisson; rows have TTFT.

With the first of the counts an earlier state of llumnix (`--before FOLDER`, a checkout's `src`)
takes its turns too, and llumnix with further flags (`--variant "--survival off"`).

    python benchmarks/frontends.py [--counts 1,2,4] [--instances 2] [--rounds 2] [--model slim]
        [--rates 100] [--before FOLDER] [--variant FLAGS] [--out FILE] [-- flags of the servers]
"""

import argparse
import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from common import (
    ROOT,
    Kind,
    Served,
    Streamed,
    commit,
    kinds,
    markdown,
    median,
    percentile,
    serve,
    write_result,
)
from overhead import Load, one_round
from shapes import SHAPES, write_shape

KINDS = ("bare", "llumnix", "before", "variant")
SPEAKS_HTTP = ("APIServer", "llumnix: frontend")
"""In the titles of HTTP processes beside the first one."""
FLAGS = ["--max-model-len", "2048", "--kv-cache-memory-bytes", "4294967296"]
FLAGS += ["--gpu-memory-utilization", "0.1"]


def processes(server: Served) -> list[psutil.Process]:
    """Those that speak HTTP, and the one that was started."""
    first = psutil.Process(server.process.pid)
    below = first.children(recursive=True)
    return [first, *(p for p in below if any(w in " ".join(p.cmdline()) for w in SPEAKS_HTTP))]


def cpu_s(server: Served) -> float:
    """CPU time of these processes so far."""
    times = [p.cpu_times() for p in processes(server)]
    return sum(t.user + t.system for t in times)


def client(url: str, load: Load, tokens: int, seed: int) -> tuple[list[Streamed], float]:
    """One client process's part of a load."""
    return asyncio.run(one_round(url, "m", load, tokens, seed))


class Clients:
    """Client processes that share each load."""

    def __init__(self, count: int) -> None:
        self.count = count
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(count, mp_context=context)

    def run(self, server: Served, load: Load, tokens: int, seed: int) -> dict[str, float]:
        """The whole load on one server; its figures."""
        part = {**load, "requests": max(1, load["requests"] // self.count)}
        part["rate"] = load["rate"] and load["rate"] / self.count
        part["streams"] = load["streams"] and max(1, load["streams"] // self.count)
        used_s, began = cpu_s(server), time.perf_counter()
        told = [
            self.pool.submit(client, server.url, part, tokens, seed * self.count + n)
            for n in range(self.count)
        ]
        results = [streamed for one in told for streamed in one.result()[0]]
        wall_s, used_s = time.perf_counter() - began, cpu_s(server) - used_s
        ttft = [r.ttft_s * 1e3 for r in results]
        return {
            "requests": len(results),
            "tokens_per_s": len(results) * tokens / wall_s,
            "ttft_ms_p50": percentile(ttft, 0.5),
            "ttft_ms_p99": percentile(ttft, 0.99),
            "cpu_ms_per_request": used_s * 1e3 / len(results),
        }


def loads(args: argparse.Namespace, count: int) -> list[Load]:
    arrivals = [
        {"load": f"{each:g} req/s each", "streams": None, "rate": each * count,
         "requests": int(each * count * args.seconds)}
        for each in args.rates
    ]  # fmt: skip
    requests = args.streams * args.each * count
    return [
        {"load": "streams", "streams": args.streams, "rate": None, "requests": requests},
        *arrivals,
    ]


def measure(
    args: argparse.Namespace,
    servers: dict[str, Served],
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """A row for each count and load; what is there after each load is `keep`'s."""
    asyncio.run(_up(servers.values()))
    clients = Clients(args.clients)
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    warm: Load = {"load": "warm-up", "streams": args.streams, "rate": None,
                  "requests": args.streams}  # fmt: skip
    for number in range(args.rounds):
        for count in args.counts:
            for load in loads(args, count):
                took = {}
                there = [kind for kind in KINDS if f"{kind} {count}" in servers]
                for kind in there if number % 2 == 0 else there[::-1]:
                    server = servers[f"{kind} {count}"]
                    clients.run(server, warm, args.tokens, 1000)
                    took[kind] = clients.run(server, load, args.tokens, number)
                found.setdefault((count, load["load"]), []).append(took)
                rows = [row_of(count, load, rounds) for (count, load), rounds in found.items()]
                keep(rows)
                print(table(rows[-1:]), flush=True)
    print(table(rows))
    return rows


async def _up(servers: Any) -> None:
    await asyncio.gather(*(server.wait_until_up() for server in servers))


def row_of(count: int, load: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and of each kind's differences to bare vLLM."""
    row: dict[str, Any] = {"processes": count, "load": load, "rounds": rounds}
    for kind in rounds[0]:
        row[kind] = {k: median([r[kind][k] for r in rounds]) for k in rounds[0][kind]}
        row[kind]["throughput_ratio"] = median(
            [r[kind]["tokens_per_s"] / r["bare"]["tokens_per_s"] for r in rounds]
        )
        for key in ("ttft_ms_p50", "ttft_ms_p99"):
            row[kind][f"added_{key}"] = median([r[kind][key] - r["bare"][key] for r in rounds])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        for kind in (kind for kind in KINDS if kind in row):
            one = row[kind]
            shown = [f"{one['tokens_per_s']:,.0f}", f"{one['throughput_ratio']:.3f}", "–", "–"]
            if row["load"] != "streams":
                ttft = f"{one['ttft_ms_p50']:.1f}, {one['ttft_ms_p99']:.1f}"
                added = f"{one['added_ttft_ms_p50']:+.1f}, {one['added_ttft_ms_p99']:+.1f}"
                shown = ["–", "–", ttft, added]
            cpu = f"{one['cpu_ms_per_request']:.2f}"
            lines.append([str(row["processes"]), row["load"], kind, *shown, cpu])
    head = ["HTTP processes", "load", "", "tokens/s", "to bare", "TTFT P50, P99, ms", "added"]
    return markdown([*head, "CPU ms a request"], lines)


def kinds_with(args: argparse.Namespace, count: int) -> list[Kind]:
    """The servers with so many HTTP processes."""
    several = ["--api-server-count", str(count)]
    ours = [*several, "--instances", str(args.instances)]
    # An earlier state may be from before there was the flag.
    earlier = ours if count > 1 else ours[2:]
    found = kinds(args, [*several, "--data-parallel-size", str(args.instances)], ours, earlier)
    return found if count == args.counts[0] else found[:2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--counts", type=lambda s: [int(n) for n in s.split(",")], default=[1, 2, 4]
    )
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    parser.add_argument("--model", default="slim", help="a folder or a shape")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of a request")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--each", type=int, default=4, help="requests of a stream, for a process")
    parser.add_argument(
        "--rates", type=lambda s: [float(n) for n in s.split(",")], default=[100.0],
        help="a second, for each process",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=4.0, help="of arrivals")
    parser.add_argument("--before", type=Path, help="`src` of an earlier state, to compare")
    parser.add_argument("--variant", help="flags of llumnix beside itself, in quotes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu/frontends.json")
    parser.add_argument("flags", nargs="*", default=FLAGS, help="of the servers, after --")
    args = parser.parse_args()
    flags, servers = args.flags, {}
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model
        if model in SHAPES:
            model = str(write_shape(args.model, Path(temporary) / args.model))
            flags = [*flags, "--load-format", "dummy"]
        try:
            for count in args.counts:
                for kind, flags_of, env in kinds_with(args, count):
                    log = Path(temporary) / f"{kind}{count}.log"
                    servers[f"{kind} {count}"] = serve(kind, model, "m", flags + flags_of, log, env)
            more = {"model": args.model, "flags": flags, "instances": args.instances}
            more |= {"before": str(args.before or ""), "variant": args.variant or ""}
            more |= {"streams": args.streams, "tokens": args.tokens}
            if args.before:
                more["before_commit"] = commit(args.before)
            measure(args, servers, lambda rows: write_result(args.out, rows, **more))
        except BaseException:
            for name, server in servers.items():
                print(f"--- {name}\n{server.log.read_text()[-1500:]}")
            raise
        finally:
            for server in servers.values():
                server.ask_to_stop()
            for server in servers.values():
                server.stop()


if __name__ == "__main__":
    main()
