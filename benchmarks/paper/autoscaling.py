"""Figures 14 and 15 of Llumnix (OSDI 2024): 1 to 16 instances, from 8, on L-L.

python benchmarks/paper/autoscaling.py [--seeds 2] [--requests 10000] [--processes N]
"""

import time

from common_paper import arguments, column, save, simulate, spec, table

from llumnix.core.settings import PAPER_BLOCK_TOKENS, ScalingSettings, SchedulerSettings
from llumnix.sim.summary import told

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
SETTINGS = SchedulerSettings(
    scaling=ScalingSettings(
        instances_min=1,
        instances_max=16,
        low=10.0 * PAPER_BLOCK_TOKENS,
        high=60.0 * PAPER_BLOCK_TOKENS,
        down_after_s=10.0,
    )
)


def main() -> None:
    began = time.monotonic()
    args = arguments(__doc__ or "", "autoscaling", seeds=2)
    runs = [(p, r, s) for r in PUBLISHED for s in range(args.seeds) for p in POLICIES]
    specs = [
        spec(p, "L-L", r, args.requests, s, instances=8, scheduler=SETTINGS) for p, r, s in runs
    ]
    found = simulate(specs, [f"{r:g} {p}" for p, r, _ in runs], args)
    rows = []
    for rate, published in PUBLISHED.items():
        for place, policy in enumerate(POLICIES):
            label = f"{rate:g} {policy}"
            mean = column(found, label, lambda m: m["instances_mean"])
            first = column(found, label, lambda m: m["ttft_s"]["p99"])
            loss = column(found, label, lambda m: m["preemption_loss_s"]["mean"])
            rows.append(
                [
                    f"{rate:g}",
                    policy,
                    f"{told(mean)} ({published[place]:g})",
                    told(first),
                    told(loss),
                ]
            )
    head = ["req/s", "policy", "instances, mean (published)", "TTFT P99, s", "preemption loss, s"]
    save(args, found, table(head, rows), began)


if __name__ == "__main__":
    main()
