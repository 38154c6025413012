"""An urgent request in a full queue: steps until its first token, and what the others lose.

Ordinary requests, in a closed loop, keep every instance full and a queue waiting. Beside them one
request comes every `--every` seconds: in one phase as `high`, in the next as an ordinary one, so
that two phases of one server differ in nothing but its class. Three ways of being full:

- slots: all running slots are taken (`--max-num-seqs`)
- memory: KV memory is, by running requests
- prompts: every step's tokens are, by long prompts that are computed in chunks

and three kinds of server: `priority` (the default), `no-preempt` (`priorities.preempt: false`) and
`fcfs` (`--scheduling-policy fcfs`: engines do not look at priorities).

Figures of a phase: `ttft_steps`, the TTFT of those requests over the median gap between tokens of
the ordinary ones, P50 and P99; of the ordinary ones generated tokens a second, and mean TTFT, mean
end-to-end time and P99 of TPOT of those that ended in the phase. What the others lose: ratios of
the phases with `high` to those without, on one server. A step on a CPU host lasts as long as
`--pace` says (benchmarks/paced_worker.py).

    python benchmarks/priorities.py [--full slots,memory,prompts] [--kinds priority,no-preempt,fcfs]
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from common import (
    ROOT,
    Served,
    as_flags,
    markdown,
    median,
    percentile,
    python_path,
    real_time,
    serve,
    write_result,
)  # fmt: skip
from shapes import SHAPES, write_shape
from workload import Answer, Arrival, ask, encode

KINDS = {
    "priority": [],
    "no-preempt": ["--scheduler-config", "{folder}/no-preempt.yaml"],
    "fcfs": ["--scheduling-policy", "fcfs"],
}
SETTLE_S = 8.0
"""Until the queue is as long as it will be."""
TOKENS_END = 4000
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """A way of being full. `kv_tokens`, `slots`, `budget`: of an instance; `clients`: so many
    ordinary requests an instance at all times, of `prompt` and `answer` tokens on average."""

    kv_tokens: int
    slots: int
    budget: int
    clients: int
    prompt: int
    answer: int
    urgent_prompt: int = 64
    urgent_answer: int = 16


Row = dict[str, Any]
PACED = {
    "slots": Full(kv_tokens=16384, slots=8, budget=512, clients=14, prompt=64, answer=150),
    "memory": Full(kv_tokens=4096, slots=64, budget=512, clients=18, prompt=250, answer=150),
    "prompts": Full(kv_tokens=32768, slots=32, budget=256, clients=16, prompt=1200, answer=30),
}
GPU = {
    "slots": Full(kv_tokens=65536, slots=64, budget=2048, clients=96, prompt=256, answer=200),
    "memory": Full(kv_tokens=13616, slots=256, budget=2048, clients=48, prompt=250, answer=200),
    "prompts": Full(kv_tokens=131072, slots=64, budget=2048, clients=24, prompt=4000, answer=40),
}
"""For steps that last as long as `--pace` says, and for an H100 with the shape of Llama-3.1-8B."""


class Load:
    """Ordinary requests in a closed loop, and the one beside them."""

    def __init__(self, http: aiohttp.ClientSession, full: Full, instances: int) -> None:
        self._http = http
        self._full = full
        self._dice = random.Random(3)
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended: list[tuple[float, Answer]] = []
        self._clients = full.clients * instances

    def start(self) -> None:
        for _ in range(self._clients):
            self._spawn(self._client())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def phase(self, seconds: float, every_s: float, *, high: bool) -> dict[str, Any]:
        """One phase's figures."""
        began = time.perf_counter()
        asked: list[Answer] = []
        tasks = []
        while time.perf_counter() - began < seconds:
            await asyncio.sleep(every_s * self._dice.uniform(0.5, 1.5))
            answer = Answer()
            asked.append(answer)
            tasks.append(asyncio.create_task(self._one(answer, high=high, beside=True)))
        until = time.perf_counter()
        others = [a for at, a in self.ended if began <= at < until]
        await asyncio.gather(*tasks)
        failed = [a.error for a in asked + others if a.error]
        if failed:
            raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
        step_s = median([g for a in others for g in a.gaps_s])
        ttft = [a.ttft_s for a in asked if a.ttft_s is not None]
        tpot = [a.tpot_s for a in others if a.tpot_s is not None]
        return {
            "high": high,
            "asked": len(asked),
            "step_ms": step_s * 1e3,
            "ttft_ms": {"p50": median(ttft) * 1e3, "p99": percentile(ttft, 0.99) * 1e3},
            "ttft_steps": {"p50": median(ttft) / step_s, "p99": percentile(ttft, 0.99) / step_s},
            "others": {
                "ended": len(others),
                "tokens_per_s": sum(a.tokens for a in others) / (until - began),
                "ttft_mean_s": statistics.fmean(a.ttft_s or 0.0 for a in others),
                "e2e_mean_s": statistics.fmean(a.e2e_s or 0.0 for a in others),
                "tpot_p99_ms": percentile(tpot, 0.99) * 1e3,
            },
        }

    async def _client(self) -> None:
        while True:
            answer = Answer()
            await self._one(answer, high=False, beside=False)
            self.ended.append((time.perf_counter(), answer))

    async def _one(self, answer: Answer, *, high: bool, beside: bool) -> None:
        full = self._full
        prompt, tokens = full.urgent_prompt, full.urgent_answer
        if not beside:
            prompt = int(full.prompt * self._dice.uniform(0.5, 1.5))
            tokens = int(full.answer * self._dice.uniform(0.5, 1.5))
        arrival = Arrival(
            at_s=0.0, prompt_tokens=prompt, output_tokens=tokens, high=high, clipped=False
        )
        (body,) = encode([arrival], self._dice, TOKENS_END)
        await ask(self._http, arrival, body, time.perf_counter(), answer)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def start(name: str, kind: str, args: argparse.Namespace, model: Path) -> Served:
    """A server of that kind that can be filled in that way."""
    full = args.sizes[name]
    shape = SHAPES[args.model]
    each = shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * 2
    folder = model.parent
    (folder / "no-preempt.yaml").write_text("priorities: {preempt: false}\n")
    settings = {
        "instances": args.instances,
        "dtype": shape["torch_dtype"],
        "block-size": args.block_size,
        "kv-cache-memory-bytes": (full.kv_tokens + args.block_size)
        * each
        * DTYPE_BYTES[shape["torch_dtype"]],
        "max-model-len": min(8192, full.kv_tokens),
        "max-num-seqs": full.slots,
        "max-num-batched-tokens": full.budget,
    }
    flags = [*as_flags(settings), "--load-format", "dummy", *args.flags]
    flags += [flag.format(folder=folder) for flag in KINDS[kind]]
    if args.pace:
        flags += ["--worker-cls", "paced_worker.PacedWorker"]
    return serve("llumnix", str(model), "m", flags, folder / f"{name}-{kind}.log")


async def measure(name: str, kinds: list[str], args: argparse.Namespace, model: Path) -> list[Row]:
    """Servers of these kinds, up at once, one after the other full in that way."""
    servers = [start(name, kind, args, model) for kind in kinds]
    try:
        await asyncio.gather(*(server.wait_until_up() for server in servers))
        return [
            {"full": name, "kind": kind, **await one_server(server.url, args.sizes[name], args)}
            for kind, server in zip(kinds, servers, strict=True)
        ]
    except BaseException:
        print("\n".join(server.log.read_text()[-4000:] for server in servers))
        raise
    finally:
        for server in servers:
            server.ask_to_stop()
        for server in servers:
            server.stop()


async def one_server(url: str, full: Full, args: argparse.Namespace) -> Row:
    """All phases of a server that is up."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as http:
        load = Load(http, full, args.instances)
        load.start()
        try:
            await asyncio.sleep(SETTLE_S)
            waiting = await queue(http, full.kv_tokens)
            phases = [
                await load.phase(args.seconds, args.every, high=high)
                for _ in range(args.rounds)
                for high in (True, False)
            ]
        finally:
            await load.close()
    return {"waiting": waiting, "phases": phases}


async def queue(http: aiohttp.ClientSession, kv_tokens: int) -> int:
    """Requests that wait, over all instances, which have that much KV memory each."""
    async with http.get("/llumnix/v1/instances") as answer:
        rows = (await answer.json())["instances"]
    if any(row["kv_tokens_total"] != kv_tokens for row in rows):
        raise RuntimeError(f"the instances have not {kv_tokens} KV tokens: {rows}")
    return sum(row["waiting"] or 0 for row in rows)


def summary(row: Row) -> list[str]:
    """A row's line in the table: medians over its phases."""
    high, same = ([p for p in row["phases"] if p["high"] is h] for h in (True, False))

    def of(phases: list[dict[str, Any]], *path: str) -> float:
        found = []
        for phase in phases:
            value: Any = phase
            for key in path:
                value = value[key]
            found.append(value)
        return median(found)

    def ratio(figure: str) -> str:
        return f"{of(high, 'others', figure) / of(same, 'others', figure):.2f}"

    return [
        row["full"], row["kind"], str(row["waiting"]), f"{of(high, 'step_ms'):.1f}",
        f"{of(high, 'ttft_steps', 'p50'):.1f} / {of(high, 'ttft_steps', 'p99'):.1f}",
        f"{of(same, 'ttft_steps', 'p50'):.1f} / {of(same, 'ttft_steps', 'p99'):.1f}",
        ratio("tokens_per_s"), ratio("ttft_mean_s"), ratio("e2e_mean_s"), ratio("tpot_p99_ms"),
    ]  # fmt: skip


HEAD = [
    "full of", "server", "waiting", "step, ms", "`high`: TTFT in steps, P50 / P99",
    "as ordinary: the same", "others: tokens/s", "TTFT mean", "e2e mean", "TPOT P99",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--full", default="slots,memory,prompts", help=f"by comma, of {', '.join(PACED)}")
    add("--kinds", default="priority,no-preempt,fcfs", help=f"by comma, of {', '.join(KINDS)}")
    add("--instances", type=int, default=2)
    add("--rounds", type=int, default=3, help="of two phases each")
    add("--seconds", type=float, default=20.0, help="of a phase")
    add("--every", type=float, default=0.7, help="seconds between the requests beside the others")
    add("--model", default="mini", choices=SHAPES)
    add("--block-size", type=int, default=32)
    add("--pace", default="30,0.2,0.05,0", help="of a step, in ms (not with --gpu)")
    add("--gpu", action="store_true", help="the sizes for a GPU, at its own pace")
    add("--together", action="store_true", help="servers of all kinds are up at once")
    add("--out", type=Path, default=ROOT / "benchmarks/results/priorities.json")
    add("flags", nargs="*", help="further flags of the servers, after --")
    args = parser.parse_args()
    if args.gpu:
        args.pace = ""
    args.sizes = GPU if args.gpu else PACED
    client = real_time()
    if args.pace:
        os.environ["LLUMNIX_PACE"] = args.pace
        os.environ["PYTHONPATH"] = python_path(ROOT / "benchmarks")
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(args.model, Path(folder) / args.model)
        for name in args.full.split(","):
            kinds = args.kinds.split(",")
            for those in [kinds] if args.together else [[kind] for kind in kinds]:
                rows += asyncio.run(measure(name, those, args, model))
                wall_s = round(time.monotonic() - began, 1)
                told = {k: str(v) for k, v in vars(args).items()}
                write_result(args.out, rows, client=client, settings=told, wall_s=wall_s)
                print("\n".join(" | ".join(summary(r)) for r in rows[-len(those) :]), flush=True)
    print(markdown(HEAD, [summary(row) for row in rows]))


if __name__ == "__main__":
    main()
