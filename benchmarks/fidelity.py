"""The simulator beside real engines: the same arrivals, policy by policy.

Takes raw files of benchmarks/live.py, simulates each of their runs with a profile of those engines,
and prints means over the seeds side by side. Single runs near the memory's limit differ by chance:
a few milliseconds decide which of two large requests comes first. So each is simulated several
times, the arrivals shifted by up to `JITTER_S`, and the range of the means over the seeds is shown
with their mean. vLLM's own balancing, which counts requests, is simulated as `least-loaded`; a run
of a policy that the simulator does not know is left out.

    python benchmarks/fidelity.py --profile PROFILE.json RAW.json [RAW.json ...] [--out FILE]
"""

import argparse
import itertools
import json
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import ROOT, markdown, write_result
from llumnix.core.scheduling.presets import POLICIES
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import RequestId
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.cluster import Cluster, Setup
from llumnix.sim.model.jobs import Job
from llumnix.sim.model.profile import Profile, load_profile
from llumnix.sim.simulate import figures_of

FIGURES = (
    ("TTFT mean, s", ("ttft_s", "mean"), 1),
    ("TTFT P99, s", ("ttft_s", "p99"), 1),
    ("TPOT mean, ms", ("tpot_s", "mean"), 1e3),
    ("TPOT P99, ms", ("tpot_s", "p99"), 1e3),
    ("e2e mean, s", ("e2e_s", "mean"), 1),
    ("preemptions", ("preemptions",), 1),
    ("migrations", ("migrations",), 1),
)
JITTER_S = 0.005
LIKE = {"vllm-dp": "least-loaded"}


def simulated(
    row: dict[str, Any], flags: dict[str, str], profile: Profile, dice: random.Random
) -> dict[str, Any]:
    """One run of the raw file again, in virtual time."""
    columns = row["requests"]
    at_s, high, prompt, answer = (
        [float(x) for x in columns[name].split()]
        for name in ("at_s", "high", "prompt_tokens", "output_tokens")
    )
    order = sorted((at + dice.random() * JITTER_S, n) for n, at in enumerate(at_s))
    jobs = [
        Job(
            id=RequestId(f"r{n}"),
            arrived_s=at,
            prompt=int(prompt[n]),
            answer=int(answer[n]),
            priority=-100 if high[n] else 0,
        )
        for at, n in order
    ]
    engine = EngineOptions(
        budget=int(flags["max-num-batched-tokens"]), slots=int(flags["max-num-seqs"])
    )
    size = int(flags["block-size"])
    held = int(flags["kv-cache-memory-bytes"]) // profile.kv_token_bytes - size
    setup = Setup(
        scheduler=SchedulerSettings(policy=like(row)),
        profile=replace(profile, kv_tokens=held, block_tokens=size),
        instances=row["instances"],
        engine=engine,
    )
    cluster = Cluster(setup)
    cluster.run(jobs)
    moved = sum(m.outcome == "migrated" for m in cluster.clients.moves)
    return {**figures_of(jobs), "preemptions": cluster.preemptions, "migrations": moved}


def like(row: dict[str, Any]) -> str:
    """The simulator's name for what a run's requests were placed by."""
    return LIKE.get(row["policy"], row["policy"])


def pick(metrics: Any, path: tuple[str, ...]) -> float:
    for key in path:
        metrics = metrics[key]
    return float(metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("raw", type=Path, nargs="+")
    parser.add_argument("--profile", required=True)
    parser.add_argument("--repeats", type=int, default=5, help="of each simulation")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fidelity.json")
    args = parser.parse_args()
    profile = load_profile(args.profile)
    pairs: dict[tuple[Any, ...], list[tuple[list[Any], Any]]] = {}
    for path in args.raw:
        found = json.loads(path.read_text())
        words = found["flags"]
        flags = {w.removeprefix("--"): v for w, v in itertools.pairwise(words)}
        for row in found["rows"]:
            if like(row) not in POLICIES:
                continue
            key = (row["trace"], row["rate"], row["instances"], row["policy"])
            again = [simulated(row, flags, profile, random.Random(n)) for n in range(args.repeats)]
            pairs.setdefault(key, []).append((again, row["metrics"]))
    head = ["trace, req/s", "instances", "policy", "seeds", *(name for name, _, _ in FIGURES)]
    lines, rows = [], []
    for (trace, rate, instances, policy), both in pairs.items():
        cells = [f"{trace} {rate:g}", str(instances), policy, str(len(both))]
        for _, path, factor in FIGURES:
            real = statistics.fmean(pick(m, path) * factor for _, m in both)
            means = [
                statistics.fmean(pick(again[n], path) * factor for again, _ in both)
                for n in range(args.repeats)
            ]
            sim = statistics.fmean(means)
            off = f" ({sim / real - 1:+.0%})" if real else ""
            spread = f" [{min(means):.3g} to {max(means):.3g}]" if max(means) > 0 else ""
            cells.append(f"{sim:.3g}{spread} / {real:.3g}{off}")
        lines.append(cells)
        rows.append(
            {
                "trace": trace,
                "rate": rate,
                "instances": instances,
                "policy": policy,
                "simulated": [again for again, _ in both],
                "real": [real for _, real in both],
            }
        )
    write_result(args.out, rows, profile=args.profile)
    print(markdown(head, lines))


if __name__ == "__main__":
    main()
