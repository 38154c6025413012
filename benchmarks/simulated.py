"""What moves gain on four and eight simulated GPUs, policy by policy.

`cache-aware` places requests as `llumnix` does and lets them stay, and the rules of the engines'
queues are off, so that the two differ by moves alone: short_memory.py has the rules. The engines
have the measured profile of an H100 with a 7B model. Needs no GPU.

    python benchmarks/simulated.py [--seeds 6] [--processes 1]
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from common import ROOT, VLLMS_QUEUE, seed_range, write_result
from llumnix.core.settings import SchedulerSettings
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.profile import load_profile
from llumnix.sim.simulate import Spec, runs

POLICIES = ("round-robin", "infaas++", "cache-aware", "llumnix")
PROFILE = "h100-llama-7b"
# Trace, requests a second, requests, instances.
LOADS = (
    ("M-M", 14.0, 700, 4),
    ("M-M", 28.0, 1400, 8),
    ("L-L", 5.0, 600, 4),
    ("sharegpt", 14.0, 700, 4),
)


def spec(
    policy: str, load: tuple[str, float, int, int], seed: int, *, details: bool = False
) -> Spec:
    """One run."""
    trace, rate, requests, instances = load
    return Spec(
        scheduler=replace(SchedulerSettings(), policy=policy, queue=VLLMS_QUEUE),
        profile=load_profile(PROFILE),
        engine=EngineOptions(),
        instances=instances,
        start_s=None,
        trace=trace,
        rate_per_s=rate,
        requests=requests,
        seed=seed,
        details=details,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=seed_range, default="6", help="N or FIRST:END")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sim/instances.json")
    args = parser.parse_args()
    began = time.monotonic()
    specs = [spec(p, load, s) for load in LOADS for p in POLICIES for s in args.seeds]
    found = dict(runs(specs, args.processes))
    rows = [found[place] for place in range(len(specs))]
    write_result(args.out, rows, profile=PROFILE, wall_s=round(time.monotonic() - began, 1))


if __name__ == "__main__":
    main()
