"""What the scheduler's rules gain where memory is short, in the simulator: pairs of runs by seed.

Each variant serves the same requests. Figures are compared by geometric means of their ratios over
the pairs of trace and seed, with 95 % t-intervals. Besides the usual figures there are W1, the mean
of the worst 1 % of TTFT, and the sum of TTFT and preemption loss, which counts those that wait
before their first token and those that wait after it alike. Needs no GPU.

    python benchmarks/short_memory.py --set equal --seeds 20:24
    python benchmarks/short_memory.py --set paper --seeds 20:23 --processes 4
    python benchmarks/shared_prefixes.py FOLDER
    LLUMNIX_TRACES=TRACES python benchmarks/short_memory.py --set real --shared FOLDER --seeds 20:24

Sets: `equal` has rates at which `infaas++` queues about as the paper published, `paper` the paper's
rates on half of its instances, `real` public and made-up traces on four H200. A run takes up to a
minute; --processes makes so many at a time. What is in the file of --runs is not run again.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import ROOT, VLLMS_QUEUE, markdown, seed_range, simulate_all, write_result
from llumnix.core.settings import MigrationSettings, QueueSettings, SchedulerSettings
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.cluster import Cluster
from llumnix.sim.model.jobs import Job
from llumnix.sim.model.profile import load_profile
from llumnix.sim.simulate import Spec, figures_of
from llumnix.sim.summary import format_ratio

# Trace, and requests a second of the sets `paper` and `equal`.
RATES = (
    ("sharegpt", 3.75, 4.05),
    ("burstgpt", 4.25, 4.887),
    ("S-S", 18.0, 31.0),
    ("M-M", 3.9, 4.4),
    ("L-L", 1.5, 1.52),
    ("S-L", 2.15, 2.15),
    ("L-S", 9.0, 12.5),
)
# Trace, requests a second, requests, KV tokens, scale.
REAL = (
    ("azure-conv", 24.0, 1000, 13616, 1.0),
    ("azure-code", 18.0, 1000, 13616, 1.0),
    ("mooncake-conversation", 19.0, 800, 27232, 0.25),
    ("servegen-m-large", 18.0, 1000, 13616, 1.0),
    ("servegen-deepseek-r1", 2.4, 600, 60000, 1.0),
    ("chats.jsonl", 15.0, 1000, 60000, 1.0),
    ("tools.jsonl", 27.0, 1000, 60000, 1.0),
)
ON = QueueSettings(growth_blocks=1, passers=8)
STAY = MigrationSettings(rescues=0)
VARIANTS = {
    "infaas++": SchedulerSettings(policy="infaas++", queue=VLLMS_QUEUE),
    "infaas++ with the queue's rules": SchedulerSettings(policy="infaas++", queue=ON),
    "llumnix without the rules": SchedulerSettings(queue=VLLMS_QUEUE, migration=STAY),
    "llumnix": SchedulerSettings(),
    # One rule left out:
    "llumnix without room to grow": SchedulerSettings(queue=replace(ON, growth_blocks=0)),
    "llumnix without passing": SchedulerSettings(queue=replace(ON, passers=0)),
    "llumnix without short prompts first": SchedulerSettings(queue=replace(ON, short_first=0.0)),
    "llumnix without rescues": SchedulerSettings(migration=STAY),
}
"""Name and settings."""
MAIN = tuple(VARIANTS)[:4]
# Title, name of the figure.
COLUMNS = (
    ("TTFT mean", "ttft"),
    ("TTFT P50", "p50"),
    ("TTFT P99", "p99"),
    ("W1", "worst1"),
    ("longest", "longest"),
    ("TTFT + loss", "wait"),
    ("TPOT P99", "tpot99"),
    ("e2e mean", "e2e"),
    ("loss", "loss"),
    ("preemptions", "preemptions"),
)
LEAST = {"loss": 1e-3, "preemptions": 3.0}
"""What is added to both sides of a ratio, so that a run without any has one."""


def specs(name: str, shared: Path, seed: int) -> list[Spec]:
    """The runs of a set, each with the default settings."""
    common: dict[str, Any] = {"scheduler": SchedulerSettings(), "start_s": None, "seed": seed}
    if name == "real":
        profile = load_profile("h200-llama-8b")
        return [
            Spec(
                profile=profile,
                engine=EngineOptions(kv_tokens=kv_tokens),
                instances=4,
                rate_per_s=rate,
                requests=requests,
                trace=str(shared / trace) if trace.endswith(".jsonl") else trace,
                scale=scale,
                **common,
            )
            for trace, rate, requests, kv_tokens, scale in REAL
        ]
    return [
        Spec(
            profile=load_profile("a10-llama-7b"),
            engine=EngineOptions(chunked=False, prefix_caching=False, budget=8192),
            instances=8,
            rate_per_s=rates[name == "equal"],
            requests=3000,
            trace=trace,
            **common,
        )
        for trace, *rates in RATES
    ]


def simulated(spec: Spec) -> dict[str, float]:
    """The figures of one run, in seconds but for the counts."""
    jobs, cluster = spec.jobs(), Cluster(spec.setup())
    cluster.run(jobs)
    return {name: round(value, 6) for name, value in figures(jobs, cluster).items()}


def figures(jobs: Sequence[Job], cluster: Cluster) -> dict[str, float]:
    """As they are."""
    known = figures_of(jobs)
    loss = known["preemption_loss_s"]["mean"]
    return {
        "ttft": known["ttft_s"]["mean"],
        "p50": known["ttft_s"]["p50"],
        "p99": known["ttft_s"]["p99"],
        "worst1": known["ttft_s"]["worst1"],
        "longest": known["ttft_s"]["max"],
        "wait": known["ttft_s"]["mean"] + loss,
        "tpot99": known["tpot_s"]["p99"],
        "e2e": known["e2e_s"]["mean"],
        "loss": loss,
        "preemptions": cluster.preemptions,
        "moves": sum(m.outcome == "migrated" for m in cluster.clients.moves),
        "failed": known["requests_failed"],
    }


def run(spec: Spec, variant: str) -> dict[str, Any]:
    """One run of a variant."""
    found = simulated(replace(spec, scheduler=VARIANTS[variant]))
    row = {"trace": Path(spec.trace).name.removesuffix(".jsonl"), "rate": spec.rate_per_s}
    return {**row, "seed": spec.seed, "variant": variant, "figures": found}


def ratios(
    rows: Sequence[dict[str, Any]], variant: str, base: str, trace: str | None = None
) -> list[str]:
    """The ratio of each of `COLUMNS` over all pairs, or those of a trace; the first cell is the
    number of pairs."""
    found = {_key_of(r): r["figures"] for r in rows}
    pairs = [
        (found[t, s, variant], found[t, s, base])
        for t, s, v in found
        if v == variant and (t, s, base) in found and trace in (None, t)
    ]
    cells = [str(len(pairs))]
    for _, name in COLUMNS:
        least = LEAST.get(name, 0.0)
        ours, theirs = ([p[side][name] + least for p in pairs] for side in (0, 1))
        cells.append(format_ratio(ours, theirs))
    return cells


def compared(rows: Sequence[dict[str, Any]], variants: Iterable[str]) -> list[str]:
    """The table over all traces."""
    names = [v for v in variants if v != "infaas++"]
    pairs = [(v, b) for b in ("infaas++", "llumnix without the rules") for v in names if v != b]
    cells = [[f"{v} : {b}", *ratios(rows, v, b)] for v, b in pairs]
    return markdown(["", "pairs", *(title for title, _ in COLUMNS)], cells).split("\n")


def compared_by_trace(rows: Sequence[dict[str, Any]]) -> list[str]:
    """`llumnix` to the two others, trace by trace."""
    bases = ("infaas++", "llumnix without the rules")
    traces = dict.fromkeys(r["trace"] for r in rows)
    cells = [[t, b, *ratios(rows, "llumnix", b, t)] for b in bases for t in traces]
    head = ["trace", "`llumnix` to", "pairs", *(title for title, _ in COLUMNS)]
    return markdown(head, cells).split("\n")


Task = tuple[Spec, str]
"""A run: what it is, with the name of its variant."""


def key(task: Task) -> tuple[str, int, str]:
    """What a run is known by in a file."""
    spec, variant = task
    return Path(spec.trace).name.removesuffix(".jsonl"), spec.seed, variant


def _key_of(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["trace"], row["seed"], row["variant"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--set", choices=("equal", "paper", "real"), default="equal")
    parser.add_argument("--variants", default=",".join(MAIN))
    parser.add_argument("--seeds", type=seed_range, default="20:24", help="N or FIRST:END")
    parser.add_argument("--traces", default="", help="only these")
    parser.add_argument("--shared", type=Path, default=Path(), help="folder of chats and tools")
    parser.add_argument("--processes", "--jobs", type=int, default=1)
    parser.add_argument("--runs", type=Path, help="JSON lines; runs that stand there are kept")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    variants, traces = args.variants.split(","), args.traces.split(",")
    tasks = [
        (spec, variant)
        for seed in args.seeds
        for spec in specs(args.set, args.shared, seed)
        for variant in variants
    ]
    if args.traces:
        tasks = [task for task in tasks if key(task)[0] in traces]
    calls = {key(task): task for task in tasks}
    rows = simulate_all(run, calls, _key_of, args.processes, args.runs)
    table, by_trace = compared(rows, variants), compared_by_trace(rows)
    print("\n".join([*table, "", *by_trace]))
    out = args.out or ROOT / f"benchmarks/results/sim/short_memory_{args.set}.json"
    write_result(out, rows, table=table, traces=by_trace)


if __name__ == "__main__":
    main()
