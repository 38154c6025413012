"""Policies of `llumnix serve`, and its peers, compared on real engines, whose KV memory is made so
small that it is the bottleneck.

`--policies` names policies of llumnix and the peers of benchmarks/systems.py. For every seed each
in turn serves the same arrivals, in an order that changes from seed to seed, each time on a server
of its own: nothing is left of the turn before, and a slow drift of the machine meets all alike.
(`--share-servers` saves the starts: a policy's seeds one after another on one server, for machines
that do not drift. `--together` has all servers up at once, on the same devices if they have the
memory: those whose turn it is not stand still.) `--pace` lets each step take as long as a GPU's, so
that engines that share cores do not slow one another. Arrivals are open-loop: a request is sent at
its time whatever the state. Prompts are random tokens that share a prefix only where the trace says
so, and outputs have exact lengths. Prompts are sent as token ids, or to all systems as text where
`smg` is among them, which takes no ids. The client runs with real-time priority where it may
(benchmarks/overhead.py says why).

Figures of a run (`--json` prints them in the form that the simulator has):

- ttft_s, e2e_s: from the time at which the request was to be sent to its first and its last token;
  tpot_s: between the two, a token. Of requests that ended; `requests_failed` counts the others.
- goodput_per_s: requests a second whose TTFT and TPOT were within `--slo`; tokens_per_s: generated,
  of requests that ended. Both until the last one ended.
- preemptions: growth of `vllm:num_preemptions_total`, all engines; prefix_hits, the share of
  prompts' tokens that were in a prefix cache, of two such counters too.
- preemption_loss_s: an estimate, since HTTP says of no request that it was preempted. Per request
  the sum of what its gaps between tokens exceed the run's median gap by, over gaps longer than
  max(5 medians, median + 0.25 s); 0 in a run without preemptions. A step that others' prompts or
  the machine stretch so much counts too, and so does a migration's downtime: the small
  `--max-num-batched-tokens` keeps steps short. A preempted request that is back sooner is missed.
- fragmentation: the share of all KV memory that is free and would satisfy queues' heads if it were
  in one place (heads in ascending order while they fit), sampled every 0.25 s (a peer: 1 s) from
  the first arrival to the last, mean over time. null where the server does not tell heads' needs.
  Heads that just wait for the step to end are in it; fragmentation_blocked has only those that do
  not fit into what is free on their own instance.
- kv_used: share of all KV memory in use; waiting: requests in queues; instances_mean: instances
  that serve. All three of the same samples, the first 20 s, in which memory fills, included.
- migrations, migrations_aborted: those listed under /llumnix/v1/migrations, counted by id.
- client_late_s_max: how late a request was sent. sample_gap_s_max: the longest time between two
  samples; well above that, the machine stood still and the run says little.

The table (benchmarks/plot_live.py makes it) gives means over the seeds and ratios between policies.

    python benchmarks/live.py [--policies round-robin,infaas++,llumnix] [--trace L-L] [--seeds 3]
        [--rate 3] [--high 0.1] [--json] [--out FILE] [-- further flags of the servers]
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from common import ROOT, as_flags, python_path, real_time, write_result
from plot_live import Run, packed, table
from shapes import SHAPES, write_shape
from systems import PEERS, VARIANTS, System, stop_all
from watch import IDLE_TIMEOUT_S, SAMPLED, PeerWatch, Watch, fragmentation, moments
from workload import PAIRS, Answer, Arrival, Workload, encode, mean, of_requests, send, stalls

PAPER_KV_TOKENS = 13616
"""KV memory of an instance in the paper, whose lengths the pairs are (Llama-7B on an A10)."""
TOKENS_SHARE_MAX = 0.9
"""A request takes no more of an instance's KV memory; in the paper's it was 0.9 too."""
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
CONNECT_TIMEOUT_S = 30.0
LEAD_S = 0.5
STATS_LAG_S = 1.0
TOKENS_END = 30000
WARM_UP_TOKENS = 16
WARM_UP_PROMPTS = (8, 64)

Slo = tuple[float, float]
Turn = tuple[Run, dict[str, Any]]
"""A run in the simulator's form, and its raw figures."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all turns share. `kv_tokens`: of an instance. `tokens_end`: prompts' ids lie below.
    `slo`: limits of TTFT and TPOT, in seconds. `text`: prompts are sent as text."""

    model: str
    instances: int
    kv_tokens: int
    tokens_max: int
    tokens_end: int
    drain_limit_s: float
    slo: Slo
    text: bool
    flags: list[str]


async def one_run(
    system: System, arrivals: list[Arrival], setup: Setup, seed: int
) -> tuple[list[Answer], Watch, dict[str, int]]:
    """One turn of a system that is up: answers, what was seen beside them, counters' growth."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
    # The server closes what stands idle for 5 s; it must not be used at that moment.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    url = system.front.url
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as http:
        watch = Watch(http, system.scraped)
        if system.name in PEERS:
            watch = PeerWatch(http, system.scraped, setup.kv_tokens)
        dice = random.Random(f"{seed} prompts")
        await warm_up(http, watch, setup, dice)
        before = await watch.counters()
        await watch.migrations()
        known = set(watch.outcomes)
        bodies = encode(arrivals, dice, setup.tokens_end, setup.text)
        begin = time.perf_counter() + LEAD_S
        tasks = [
            asyncio.create_task(work)
            for work in (watch.keep_sampling(begin), watch.keep_counting())
        ]
        limit_s = LEAD_S + arrivals[-1].at_s + setup.drain_limit_s
        answers = await send(http, arrivals, bodies, begin, limit_s)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        if broken := [e for e in ended if isinstance(e, Exception)]:
            raise RuntimeError("the samples broke off") from broken[0]
        await asyncio.sleep(STATS_LAG_S)
        await watch.migrations()
        watch.outcomes = {k: v for k, v in watch.outcomes.items() if k not in known}
        grown = {name: n - before[name] for name, n in (await watch.counters()).items()}
        return answers, watch, grown


async def warm_up(
    http: aiohttp.ClientSession, watch: Watch, setup: Setup, dice: random.Random
) -> None:
    """A few requests that do not count, to all instances, which have the memory wanted."""
    count = setup.instances
    if watch.tells_of_the_idle:
        await all_there(watch, setup)
    requests = [
        Arrival(at_s=0.0, prompt_tokens=n, output_tokens=WARM_UP_TOKENS, high=False, clipped=False)
        for n in WARM_UP_PROMPTS * count
    ]
    bodies = encode(requests, dice, setup.tokens_end, setup.text)
    answers = await send(http, requests, bodies, time.perf_counter(), IDLE_TIMEOUT_S)
    if failed := [a.error for a in answers if a.error]:
        raise RuntimeError(f"the warm-up failed: {failed[0]}")
    await all_there(watch, setup)
    await watch.until("idle", lambda now: all(s.running == s.waiting == 0 for s in now))
    await asyncio.sleep(STATS_LAG_S)


async def all_there(watch: Watch, setup: Setup) -> None:
    """Waits until all instances are seen, and looks at their memory."""
    count = setup.instances
    await watch.until(f"{count} instances", lambda s: len(s) == count)
    for sample in await watch.instances():
        if sample.total != setup.kv_tokens:
            raise RuntimeError(
                f"{sample.instance} has {sample.total} KV tokens, not {setup.kv_tokens}: the "
                "model's config.json and --dtype do not tell what a token takes"
            )


def metrics(
    arrivals: list[Arrival], answers: list[Answer], watch: Watch, grown: dict[str, int], slo: Slo
) -> dict[str, Any]:
    losses = stalls(answers) if grown["preemptions"] else [0.0] * len(answers)
    seen = moments(watch.samples, arrivals[-1].at_s)
    every, blocked = ([fragmentation(m, only) for m in seen] for only in (False, True))
    used = [sum(s.used for s in m) / sum(s.total for s in m) for m in seen]
    outcomes = list(watch.outcomes.values())
    times = [m[0].t_s for m in moments(watch.samples)]
    ended_s = [r.at_s + a.e2e_s for r, a in zip(arrivals, answers, strict=True) if a.done]
    wall_s = max(ended_s, default=math.inf) - arrivals[0].at_s
    good = [a for a in answers if a.done and a.ttft_s <= slo[0] and (a.tpot_s or 0.0) <= slo[1]]
    found = {
        **of_requests(answers, losses),
        "goodput_per_s": len(good) / wall_s,
        "tokens_per_s": sum(a.tokens for a in answers if a.done) / wall_s,
        "fragmentation": {"mean": mean(every)},
        "fragmentation_blocked": {"mean": mean(blocked)},
        "kv_used": {"mean": mean(used)},
        "waiting": {"mean": mean([sum(s.waiting for s in m) for m in seen])},
        "instances_mean": mean([len(m) for m in seen]),
        "preemptions": grown["preemptions"],
        "prefix_hits": {"mean": grown["prefix_hits"] / max(1, grown["prefix_queries"])},
        "migrations": outcomes.count("migrated"),
        "migrations_aborted": outcomes.count("aborted"),
        "client_late_s_max": max(a.late_s for a in answers),
        "sample_gap_s_max": max((b - a for a, b in itertools.pairwise(times)), default=None),
    }
    if any(a.high for a in arrivals):
        found["classes"] = {}
        for name, high in (("high", True), ("normal", False)):
            mine = [i for i, r in enumerate(arrivals) if r.high is high]
            figures = of_requests([answers[i] for i in mine], [losses[i] for i in mine])
            found["classes"][name] = figures
    return found


def raw(arrivals: list[Arrival], answers: list[Answer], watch: Watch) -> dict[str, Any]:
    """A line for each column: requests in order of arrival, samples of each instance."""
    requests = {
        "at_s": [r.at_s for r in arrivals],
        "high": [int(r.high) for r in arrivals],
        "prompt_tokens": [r.prompt_tokens for r in arrivals],
        "output_tokens": [r.output_tokens for r in arrivals],
        "instance": [a.instance for a in answers],
        "ttft_s": [a.ttft_s for a in answers],
        "tpot_s": [a.tpot_s for a in answers],
        "e2e_s": [a.e2e_s if a.done else None for a in answers],
        "stalled_s": stalls(answers),
    }
    samples = {}
    for name in sorted({s.instance for s in watch.samples}):
        mine = [s for s in watch.samples if s.instance == name]
        samples[name] = {c: packed([getattr(s, c) for s in mine]) for c in ("t_s", *SAMPLED)}
    share = [(m[0].t_s, fragmentation(m)) for m in moments(watch.samples)]
    return {
        "requests": {name: packed(column) for name, column in requests.items()},
        "samples": samples,
        "fragmentation": {
            "t_s": packed([t for t, _ in share]),
            "share": packed([f for _, f in share]),
        },
        "errors": sorted({a.error for a in answers if a.error}),
    }


@contextlib.asynccontextmanager
async def serving(policies: list[str], setup: Setup) -> AsyncIterator[list[System]]:
    """Systems of these names."""
    began = time.monotonic()
    systems: list[System] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in policies:
                where = Path(folder)
                system = System(name, setup.model, setup.flags, setup.instances, where)
                systems.append(system)
            await asyncio.gather(*(system.wait_until_up() for system in systems))
            say(f"{', '.join(policies)}: up in {time.monotonic() - began:.0f} s")
            yield systems
        except BaseException:
            say("\n".join(system.logs() for system in systems))
            raise
        finally:
            stop_all(systems)


async def one_turn(system: System, seed: int, workload: Workload, setup: Setup) -> Turn:
    """Serves one seed's arrivals. The run, and its raw figures."""
    began = time.monotonic()
    arrivals = workload.draw(seed)
    answers, watch, grown = await one_run(system, arrivals, setup, seed)
    run = {
        "policy": system.name,
        "trace": workload.trace if workload.trace in PAIRS else Path(workload.trace).name,
        "rate": workload.rate_per_s,
        "seed": seed,
        "instances": setup.instances,
        "metrics": metrics(arrivals, answers, watch, grown, setup.slo),
    }
    figures = run["metrics"]
    say(
        f"{run['trace']} seed {seed} {system.name}: {time.monotonic() - began:.0f} s, "
        f"{sum(a.clipped for a in arrivals)} requests clipped; "
        f"{figures['requests_done']} of {len(answers)} done, "
        f"{figures['preemptions']} preemptions, {figures['migrations']} migrations, "
        f"TTFT P99 {figures['ttft_s']['p99']:.2f} s, "
        f"KV used {figures['kv_used']['mean']:.0%}, waiting {figures['waiting']['mean']:.1f}, "
        f"longest gap between samples {figures['sample_gap_s_max']:.2f} s"
    )
    return run, raw(arrivals, answers, watch)


def save(turns: list[Turn], args: argparse.Namespace, setup: Setup, **more: Any) -> None:
    rows = [{**run, **figures} for run, figures in turns]
    more |= {"flags": setup.flags}
    told = {name: getattr(args, name) for name in ("scale", "cv", "high", "load", "slo")}
    told["model"] = Path(args.model).name
    write_result(args.out, rows, **told, **more)


def workloads(args: argparse.Namespace, setup: Setup) -> list[Workload]:
    """What each system is to serve, one after the other."""
    loads = [load.split(":") for load in args.load]
    return [
        Workload(
            trace=trace,
            requests=int(requests),
            rate_per_s=None if rate == "own" else float(rate),
            cv=args.cv,
            scale=float(scale),
            tokens_max=setup.tokens_max,
            high_share=args.high,
        )
        for trace, rate, requests, scale in loads
        or [(args.trace, args.rate, args.requests, args.scale)]
    ]


async def measure(args: argparse.Namespace, setup: Setup, client: str) -> list[Turn]:
    """All turns; what there is of them is saved after each."""
    turns: list[Turn] = []

    async def take_turns(systems: list[System], seeds: Iterable[int]) -> None:
        for workload in workloads(args, setup):
            for seed in seeds:
                for system in in_turns(systems, seed):
                    turns.append(await one_turn(system, seed, workload, setup))
                    save(turns, args, setup, client=client)

    seeds = range(args.seeds)
    if args.together:
        async with serving(args.policies, setup) as systems:
            await take_turns(systems, seeds)
        return turns
    # A server for each seed and policy, or one for all seeds of a policy.
    for number, those in enumerate([seeds] if args.share_servers else [[s] for s in seeds]):
        for policy in in_turns(args.policies, number):
            async with serving([policy], setup) as systems:
                await take_turns(systems, those)
    return turns


def in_turns(those: list[Any], number: int) -> list[Any]:
    """Each round begins with another one."""
    first = number % len(those)
    return those[first:] + those[:first]


def prepare(args: argparse.Namespace) -> Setup:
    """What follows from the arguments and the model's config.json."""
    config = json.loads((Path(args.model) / "config.json").read_text())
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token_bytes = config["num_hidden_layers"] * heads * size * 2 * DTYPE_BYTES[args.dtype]
    kv_tokens = math.ceil(args.kv_tokens / args.block_size) * args.block_size
    tokens_max = min(config["max_position_embeddings"], int(kv_tokens * TOKENS_SHARE_MAX))
    flags = {
        "dtype": args.dtype,
        "block-size": args.block_size,
        # vLLM keeps one block for itself.
        "kv-cache-memory-bytes": (kv_tokens + args.block_size) * token_bytes,
        "max-model-len": tokens_max,
        "max-num-seqs": args.max_num_seqs,
        "max-num-batched-tokens": args.max_num_batched_tokens,
    }
    return Setup(
        model=args.model,
        instances=args.instances,
        kv_tokens=kv_tokens,
        tokens_max=tokens_max,
        tokens_end=min(TOKENS_END, config["vocab_size"]),
        drain_limit_s=args.drain_limit_s,
        slo=args.slo,
        text="smg" in args.policies,
        flags=as_flags(flags) + args.flags,
    )


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--policies", default="round-robin,infaas++,llumnix",
        help=f"by comma: llumnix's policies, and {', '.join((*VARIANTS, *PEERS))}")  # fmt: skip
    add("--instances", type=int, default=2)
    add("--seeds", type=int, default=3, help="so many draws of the arrivals")
    add("--share-servers", action="store_true", help="one server serves all seeds of a policy")
    add("--together", action="store_true", help="all servers are up at once")
    add("--requests", type=int, default=160, help="of a run")
    add("--load", action="append", default=[], metavar="TRACE:RATE:REQUESTS:SCALE",
        help="in the place of these four; may be repeated; RATE may be `own`")  # fmt: skip
    add("--rate", type=float, default=3.0, help="requests a second")
    add("--trace", default="L-L", help=f"a file, or one of {', '.join(PAIRS)}")
    add("--scale", type=float, help="of lengths (default: KV tokens / 13,616, the paper's memory)")
    add("--cv", type=float, help="of gaps, Gamma (default: the trace's gaps, or 1: Poisson)")
    add("--high", type=float, default=0.0, metavar="SHARE", help="of requests that are urgent")
    add("--model", help="a folder, or a shape of benchmarks/shapes.py (default: the demo model)")
    add(
        "--pace",
        metavar="MS,MS,MS,MS",
        help="a step takes at least so long: of itself, and more for each request, each token of "
        "a prompt and each token of context in it (benchmarks/paced_worker.py)",
    )
    add("--dtype", default="bfloat16", choices=DTYPE_BYTES)
    add("--kv-tokens", type=int, default=2048, help="KV memory of an instance, in tokens")
    add("--block-size", type=int, default=32, help="tokens; the CPU's attention wants 32 n")
    add("--max-num-seqs", type=int, default=64)
    add("--max-num-batched-tokens", type=int, default=96, help="bounds how long a step takes")
    add("--drain-limit-s", type=float, default=180.0, help="after the last arrival, then give up")
    add("--slo", default="0.5,0.025", metavar="TTFT_S,TPOT_S", help="what goodput counts")
    add("--json", action="store_true", help="print nothing but JSON")
    add("--out", type=Path, default=ROOT / "benchmarks/results/live.json", help="raw figures")
    add("flags", nargs="*", help="further flags of the servers, after --")
    args = parser.parse_args(given)
    args.policies = args.policies.split(",")
    args.slo = tuple(float(limit) for limit in args.slo.split(","))
    if "smg" in args.policies and args.model not in SHAPES:
        parser.error(
            f"smg takes no token ids, and a letter is a token for {', '.join(SHAPES)} alone"
        )
    if args.scale is None:
        args.scale = args.kv_tokens / PAPER_KV_TOKENS
    if args.model is None:
        from llumnix.demo import prepare_demo_model

        args.model = str(prepare_demo_model(say))
    if args.pace:
        os.environ["LLUMNIX_PACE"] = args.pace
        os.environ["PYTHONPATH"] = python_path(ROOT / "benchmarks")
        args.flags += ["--worker-cls", "paced_worker.PacedWorker"]
    return args


def main(given: list[str] | None = None) -> None:
    began = time.monotonic()
    args = arguments(given)
    with tempfile.TemporaryDirectory() as folder:
        if args.model in SHAPES:
            args.model = str(write_shape(args.model, Path(folder) / args.model))
            args.flags += ["--load-format", "dummy"]
        compare(args, began)


def compare(args: argparse.Namespace, began: float) -> None:
    setup = prepare(args)
    client = real_time()
    # So that the server is stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    turns = asyncio.run(measure(args, setup, client))
    runs, wall_s = [run for run, _ in turns], round(time.monotonic() - began, 1)
    save(turns, args, setup, client=client, wall_s=wall_s)
    if args.json:
        print(json.dumps({"runs": runs, "wall_s": wall_s}))
        return
    for trace in dict.fromkeys(run["trace"] for run in runs):
        print(f"{trace}:\n\n{table([r for r in runs if r['trace'] == trace], args.policies)}\n")


if __name__ == "__main__":
    main()
