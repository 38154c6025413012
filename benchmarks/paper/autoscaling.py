"""Figures 14 and 15 of Llumnix (OSDI 2024): 1 to 16 instances, from 8, on L-L.

First by rate, with the paper's thresholds; then at one rate with lower and higher thresholds, and
from these how many instances the two policies need for the same TTFT P99.

python benchmarks/paper/autoscaling.py [--seeds N or FIRST:END] [--requests 10000] [--processes N]
"""

import itertools
import math
import statistics
import time
from typing import Any

from common_paper import Found, arguments, column, markdown, save, simulate, spec

from llumnix.core.settings import PAPER_BLOCK_TOKENS, ScalingSettings, SchedulerSettings
from llumnix.sim.simulate import Spec
from llumnix.sim.summary import format_mean

POLICIES = ("infaas++", "llumnix")
# Poisson rate: published mean instances, INFaaS++ -> Llumnix.
PUBLISHED = {
    2.0: (11.63, 10.54),
    2.2: (13.44, 11.57),
    2.4: (13.77, 12.53),
    2.6: (14.39, 13.62),
    2.8: (15.05, 14.57),
    3.0: (15.46, 14.97),
}
LOW = 10
"""The paper's lower threshold, in blocks a request; the upper one is 50 more."""
SWEEP_RATE = 2.0
SWEEP = (1, 3, 6, LOW, 18, 30, 50)
FIGURES = (
    ("instances, mean", lambda m: m["instances_mean"]),
    ("TTFT mean, s", lambda m: m["ttft_s"]["mean"]),
    ("TTFT P99, s", lambda m: m["ttft_s"]["p99"]),
    ("TPOT P99, s", lambda m: m["tpot_s"]["p99"]),
    ("preemption loss, s", lambda m: m["preemption_loss_s"]["mean"]),
)


def run(policy: str, rate: float, low: int, requests: int, seed: int) -> Spec:
    scaling = ScalingSettings(
        instances_min=1,
        instances_max=16,
        freeness_low=float(low * PAPER_BLOCK_TOKENS),
        freeness_high=float((low + 50) * PAPER_BLOCK_TOKENS),
        down_after_s=10.0,
    )
    settings = SchedulerSettings(scaling=scaling)
    return spec(policy, "L-L", rate, requests, seed, instances=8, scheduler=settings)


def label(policy: str, rate: float, low: int) -> str:
    return f"{rate:g} from {low} {policy}"


def rows(found: Found, points: list[tuple[float, int]], first: Any) -> list[list[str]]:
    """A row for each point and policy."""
    made = []
    for rate, low in points:
        for place, policy in enumerate(POLICIES):
            name = label(policy, rate, low)
            cells = [format_mean(column(found, name, pick)) for _, pick in FIGURES]
            if low == LOW:
                cells[0] += f" ({PUBLISHED[rate][place]:g})"
            made.append([first(rate, low), policy, *cells])
    return made


def needed(found: Found, policy: str, goal_s: float) -> float:
    """Instances for that TTFT P99, from the points of the sweep: between two of them along a line
    in the logarithm of the TTFT."""
    names = [label(policy, SWEEP_RATE, low) for low in SWEEP]
    points = sorted(
        (
            math.log(statistics.fmean(column(found, name, lambda m: m["ttft_s"]["p99"]))),
            statistics.fmean(column(found, name, lambda m: m["instances_mean"])),
        )
        for name in names
    )
    goal = math.log(goal_s)
    for (x, n), (next_x, next_n) in itertools.pairwise(points):
        if x <= goal <= next_x:
            return n + (next_n - n) * (goal - x) / (next_x - x)
    return math.nan


def main() -> None:
    began = time.monotonic()
    args = arguments(__doc__ or "", "autoscaling", seeds="2")
    by_rate = [(rate, LOW) for rate in PUBLISHED]
    by_threshold = [(SWEEP_RATE, low) for low in SWEEP]
    specs, labels = [], []
    for rate, low in dict.fromkeys(by_rate + by_threshold):
        for policy in POLICIES:
            specs += [run(policy, rate, low, args.requests, s) for s in args.seeds]
            labels += [label(policy, rate, low)] * len(args.seeds)
    found = simulate(specs, labels, args)
    head = ["policy", "instances, mean (published)", *(name for name, _ in FIGURES[1:])]
    text = markdown(["req/s", *head], rows(found, by_rate, lambda rate, _: f"{rate:g}"))
    text += f"\n\nAt {SWEEP_RATE:g} req/s, by the lower threshold:\n\n"
    text += markdown(
        ["blocks a request", *head], rows(found, by_threshold, lambda _, low: str(low))
    )
    saved = []
    for goal_s in (0.5, 1, 2, 3, 4, 6, 8, 12, 16):
        counts = [needed(found, policy, goal_s) for policy in POLICIES]
        if not any(map(math.isnan, counts)):
            saved.append(
                [f"{goal_s:g}", *(f"{n:.2f}" for n in counts), f"{1 - counts[1] / counts[0]:.0%}"]
            )
    text += "\n\nInstances for the same TTFT P99, between the points above:\n\n"
    text += markdown(["TTFT P99, s", *POLICIES, "fewer"], saved)
    save(args, found, text, began)


if __name__ == "__main__":
    main()
