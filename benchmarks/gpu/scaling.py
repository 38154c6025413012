"""More instances when the load grows, and fewer again when it falls: what requests notice.

The shape of Llama-3.1-8B with dummy weights on two GPUs and then four, twice the paper's KV memory;
M-M at a rate for two instances, then for four, then for two. `--phases` are SECONDS:RATE.

    python benchmarks/gpu/scaling.py [--instances 2] [--most 4] [--phases 20:6,110:12,60:4]
        [flags of live.py]
"""

import argparse
import csv
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from serving import for_live

import live
from common import ROOT
from plot_live import columns

OURS = {
    "policies": "llumnix",
    "seeds": "1",
    "out": str(ROOT / "benchmarks/results/gpu/scaling.json"),
}
PHASES = "20:6,110:12,60:4"


def write_trace(path: Path, phases: list[tuple[float, float]], scale: float) -> int:
    """Poisson arrivals at the phases' rates, with M-M's lengths; returns how many."""
    dice, times, begin = random.Random("scaling"), [], 0.0
    for seconds, rate in phases:
        at = begin + dice.expovariate(rate)
        while at < begin + seconds:
            times.append(at)
            at += dice.expovariate(rate)
        begin += seconds
    lengths = live.Workload(trace="M-M", requests=len(times), rate_per_s=1.0, scale=scale).draw(0)
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["arrival_s", "input_tokens", "output_tokens"])
        for at, one in zip(times, lengths, strict=True):
            lines.writerow([f"{at:.4f}", one.prompt_tokens, one.output_tokens])
    return len(times)


def changes(path: Path) -> str:
    """When an instance came or went, from the samples."""
    row = json.loads(path.read_text())["rows"][-1]
    seen = {name: columns(row, "samples", name, "t_s") for name in row["samples"]}
    return "; ".join(f"{name} from {t[0]:.0f} s to {t[-1]:.0f} s" for name, t in seen.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--phases", default=PHASES)
    parser.add_argument("--scale", type=float, default=1.0, help="of lengths")
    parser.add_argument("--instances", default="2", help="at the beginning, and at least")
    parser.add_argument("--most", default="4", help="instances")
    ours, given = parser.parse_known_args()
    phases = [tuple(map(float, phase.split(":"))) for phase in ours.phases.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "phases.csv"
        count = write_trace(trace, phases, ours.scale)
        own = OURS | {"instances": ours.instances}
        limits = ["--min-instances", ours.instances, "--max-instances", ours.most]
        wanted = [*for_live(own, (f"{trace}:own:{count}:1",), given), *limits]
        live.main(wanted)
        print("instances:", changes(live.arguments(wanted).out))


if __name__ == "__main__":
    main()
