"""What slices gain and cost beside the other ways to keep room for what runs, in the simulator.

Each variant serves the same requests of each load and seed. `vLLM` has the dispatch and the moves
of `llumnix` over vLLM's own admission, which looks at prompts alone; `watermark` adds vLLM's fixed
reserve to it. Ratios are geometric means over pairs by seed. Needs no GPU.

    python benchmarks/slices.py --processes 2
    python benchmarks/slices.py --variants vLLM,scls --loads sharegpt --seeds 1:3
    python benchmarks/slices.py --published --seeds 0:3
    python benchmarks/slices.py --long-answers --seeds 0:5

`--published` serves ShareGPT's lengths within the paper's limits by SCLS as published, by the steps
to it, and by continuous batching. `--long-answers` serves the load of benchmarks/gpu/slices.py.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import ROOT, VLLMS_QUEUE, markdown, seed_range, simulate_all, write_result
from llumnix.core.settings import MigrationSettings, QueueSettings, SchedulerSettings
from llumnix.core.slices.published import STATIC
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.profile import load_profile
from llumnix.sim.simulate import Spec, run_one
from long_answers import KV_TOKENS, MAX_NUM_SEQS, NAME, RATE_PER_S, REQUESTS, write_trace
from short_memory import COLUMNS, ratios, simulated

OUT = ROOT / "benchmarks/results/sim/slices.json"
# Name, trace, requests a second, requests, instances, profile, KV tokens (0: the profile's).
LOADS = (
    ("sharegpt", "sharegpt", 2.6, 500, 4, "a10-llama-7b", 0),
    ("S-L", "S-L", 1.5, 500, 4, "a10-llama-7b", 0),
    ("L-S", "L-S", 4.5, 1000, 4, "a10-llama-7b", 0),
    ("M-M", "M-M", 1.95, 500, 4, "a10-llama-7b", 0),
    ("S-S", "S-S", 9.0, 1000, 4, "a10-llama-7b", 0),
    ("azure-conv", "azure-conv", 5.56, 1000, 4, "h200-llama-8b", 0),
    ("azure-conv short", "azure-conv", 10.0, 1000, 2, "h100-llama-7b", 0),
    ("deepseek-r1", "servegen-deepseek-r1", 2.4, 400, 2, "h200-llama-8b", 60000),
)
PUBLISHED = ("sharegpt-helix", "sharegpt-helix", 24.0, 2400, 8, "a10-llama-7b", 40_000)
PLAIN = SchedulerSettings(queue=VLLMS_QUEUE, migration=MigrationSettings(rescues=0))


def _scls(**queue: Any) -> SchedulerSettings:
    return SchedulerSettings(policy="scls", queue=QueueSettings(**queue))


VARIANTS: dict[str, tuple[SchedulerSettings, float]] = {
    "vLLM": (PLAIN, 0.0),
    "watermark 0.02": (PLAIN, 0.02),
    "watermark 0.05": (PLAIN, 0.05),
    "watermark 0.1": (PLAIN, 0.1),
    "llumnix": (SchedulerSettings(), 0.0),
    "llumnix 2 blocks": (SchedulerSettings(queue=QueueSettings(growth_blocks=2)), 0.0),
    "llumnix 4 blocks": (SchedulerSettings(queue=QueueSettings(growth_blocks=4)), 0.0),
    "llumnix 8 blocks": (SchedulerSettings(queue=QueueSettings(growth_blocks=8)), 0.0),
    "scls": (_scls(), 0.0),
    "scls 64": (_scls(slice_tokens=64), 0.0),
    "scls 128": (_scls(slice_tokens=128), 0.0),
    "scls 256": (_scls(slice_tokens=256), 0.0),
    "scls 512": (_scls(slice_tokens=512), 0.0),
    "scls q 0.5": (_scls(slice_quantile=0.5), 0.0),
    "scls q 0.95": (_scls(slice_quantile=0.95), 0.0),
    "scls no passing": (_scls(passers=0), 0.0),
    "scls and a block": (_scls(growth_blocks=1), 0.0),
    "slices alone": (replace(PLAIN, queue=replace(VLLMS_QUEUE, slices=True)), 0.0),
}
"""Settings, and the watermark."""
MAIN = ("vLLM", "watermark 0.05", "llumnix", "llumnix 4 blocks", "scls")
LONG_ANSWERS = ("vLLM", "watermark 0.02", "watermark 0.05", "watermark 0.1", "scls 128", "scls")


def spec(load: tuple[Any, ...], variant: str, seed: int) -> Spec:
    """One run."""
    _, trace, rate, requests, instances, profile, kv_tokens = load
    settings, watermark = VARIANTS[variant]
    return Spec(
        scheduler=settings,
        profile=load_profile(profile),
        engine=EngineOptions(kv_tokens=kv_tokens, watermark=watermark),
        instances=instances,
        start_s=None,
        trace=trace,
        rate_per_s=rate,
        requests=requests,
        seed=seed,
    )


def run(load: tuple[Any, ...], variant: str, seed: int, **engine: Any) -> dict[str, Any]:
    """Its figures. `engine`: options beside those of the load and the variant."""
    one = spec(load, variant, seed)
    found = simulated(replace(one, engine=replace(one.engine, **engine)))
    row = {"trace": load[0], "rate": load[2], "seed": seed, "variant": variant}
    return {**row, "figures": found}


def compared(rows: Sequence[dict[str, Any]], base: str = "vLLM") -> str:
    """Each variant's ratios to the base, load by load."""
    cells = []
    for load in dict.fromkeys(r["trace"] for r in rows):
        mine = [r for r in rows if r["trace"] == load]
        for variant in dict.fromkeys(r["variant"] for r in mine):
            if variant != base:
                cells.append([load, variant, *ratios(mine, variant, base)])
    return markdown(["load", f"variant : {base}", "pairs", *(c[0] for c in COLUMNS)], cells)


def means(rows: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, load by load."""
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for r in rows:
        groups.setdefault((r["trace"], r["variant"]), []).append(r["figures"])
    names = ["ttft", "p99", "longest", "wait", "tpot99", "e2e", "loss", "preemptions", "moves"]
    cells = [
        [*key, *(f"{statistics.fmean(f[n] for f in found):.4g}" for n in [*names, "failed"])]
        for key, found in groups.items()
    ]
    return markdown(["load", "variant", *names, "failed"], cells)


def run_published(policy: str, seed: int) -> dict[str, Any]:
    """A run of `--published`. Continuous batching is that of `infaas++`."""
    one = spec(PUBLISHED, "vLLM", seed)
    static = policy if policy in STATIC else None
    scheduler = SchedulerSettings(policy="infaas++" if static else policy)
    metrics = run_one(replace(one, scheduler=scheduler, static=static))["metrics"]
    found = {
        "done_s": metrics["requests_done"] / metrics["virtual_s"],
        "e2e": metrics["e2e_s"]["mean"],
        "ttft": metrics["ttft_s"]["mean"],
        "wasted": metrics.get("slots_wasted", 0.0),
    }
    return {"trace": PUBLISHED[0], "seed": seed, "variant": policy, "figures": found}


def published(rows: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds."""
    cells = []
    for policy in dict.fromkeys(r["variant"] for r in rows):
        mine = [r["figures"] for r in rows if r["variant"] == policy]
        done_s, e2e, ttft, wasted = (
            statistics.fmean(f[name] for f in mine) for name in ("done_s", "e2e", "ttft", "wasted")
        )
        cells.append([policy, f"{done_s:.2f}", f"{e2e:.3g}", f"{ttft:.3g}", f"{wasted:.0%}"])
    return markdown(["policy", "req/s", "e2e mean, s", "TTFT mean, s", "wasted"], cells)


def long_answers(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The runs of `--long-answers`."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / NAME
        write_trace(trace)
        load = ("long answers", str(trace), RATE_PER_S, REQUESTS, 1, "h200-llama-8b", KV_TOKENS)
        return [
            run(load, variant, seed, slots=MAX_NUM_SEQS, prefix_caching=False)
            for seed in seeds
            for variant in LONG_ANSWERS
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--loads", default=",".join(load[0] for load in LOADS))
    parser.add_argument("--variants", default=",".join(MAIN))
    parser.add_argument("--seeds", type=seed_range, default="1:6", help="N or FIRST:END")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--long-answers", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.published:
        policies = [*STATIC, "infaas++"]
        rows = [run_published(p, s) for s in args.seeds for p in policies]
        print(published(rows))
        write_result(args.out or OUT.with_stem("slices_published"), rows)
        return
    if args.long_answers:
        rows = long_answers(args.seeds)
        print(means(rows))
        write_result(args.out or OUT.with_stem("slices_long"), rows)
        return
    variants = args.variants.split(",")
    loads = [load for load in LOADS if load[0] in args.loads.split(",")]
    calls = {(load[0], v, s): (load, v, s) for load in loads for s in args.seeds for v in variants}
    rows = simulate_all(run, calls, lambda r: (r["trace"], r["variant"], r["seed"]), args.processes)
    print(means(rows))
    print(compared(rows))
    write_result(args.out or OUT, rows, table=compared(rows).split("\n"))


if __name__ == "__main__":
    main()
