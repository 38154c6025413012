"""What the commands beside this file share: the paper's set-up in the simulator, and its figures.

The set-up is that of Llumnix (OSDI 2024): 16 instances of LLaMA-7B on an A10 each, prompts computed
alone and whole, no prefix cache, 10,000 requests a run.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import ROOT, seed_range, write_result
from common import markdown as markdown
from llumnix.core.settings import SchedulerSettings
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.profile import load_profile
from llumnix.sim.simulate import Run, Spec, runs

PROFILE = load_profile("a10-llama-7b")
ENGINE = EngineOptions(chunked=False, prefix_caching=False, budget=8192)
INSTANCES = 16
SETTINGS = SchedulerSettings()

Found = list[tuple[str, Run]]
"""Runs, each with its label."""


def spec(
    policy: str,
    trace: str,
    rate: float,
    requests: int,
    seed: int,
    *,
    scheduler: SchedulerSettings = SETTINGS,
    instances: int = INSTANCES,
    **more: Any,
) -> Spec:
    """One run in the paper's set-up."""
    return Spec(
        scheduler=replace(scheduler, policy=policy),
        profile=PROFILE,
        engine=ENGINE,
        instances=instances,
        start_s=None,
        trace=trace,
        rate_per_s=rate,
        requests=requests,
        seed=seed,
        **more,
    )


def arguments(
    text: str, name: str, seeds: str = "3", requests: int = 10_000, **more: str
) -> argparse.Namespace:
    """The flags of all, and a command's own with their defaults."""
    parser = argparse.ArgumentParser(description=text.split("\n\n")[0])
    parser.add_argument("--seeds", type=seed_range, default=seeds, help="N or FIRST:END")
    parser.add_argument("--requests", type=int, default=requests, help="of a run")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/paper/{name}.json")
    for flag, default in more.items():
        parser.add_argument(f"--{flag}", default=default)
    return parser.parse_args()


def simulate(specs: Sequence[Spec], labels: Sequence[str], args: argparse.Namespace) -> Found:
    """Runs them, and says so as they end. Each with its label, in their order, so that seeds
    pair."""
    began, placed = time.monotonic(), {}
    for place, run in runs(specs, args.processes):
        placed[place] = (labels[place], run)
        print(
            f"{len(placed)}/{len(specs)} {labels[place]} seed {run['seed']}: "
            f"TTFT P99 {run['metrics']['ttft_s']['p99']:.2f} s "
            f"[{time.monotonic() - began:.0f} s]",
            file=sys.stderr,
            flush=True,
        )
    return [placed[place] for place in sorted(placed)]


def column(found: Found, label: str, pick: Callable[[Any], Any]) -> list[Any]:
    """A figure of all runs with that label."""
    return [pick(run["metrics"]) for name, run in found if name == label]


def save(args: argparse.Namespace, found: Found, text: str, began: float, **more: Any) -> None:
    """Raw figures and the table."""
    rows = [{"label": label, **run} for label, run in found]
    wall_s = round(time.monotonic() - began, 1)
    write_result(args.out, rows, table=text.split("\n"), wall_s=wall_s, **more)
    print(text)
