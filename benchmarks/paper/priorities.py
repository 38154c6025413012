"""Figure 13 of Llumnix (OSDI 2024): one request in ten is urgent, arrivals come in bursts.

Headroom of the paper's size; headroom by need, as it is by default; and what each urgent request
would take alone on an idle instance, which none can beat.

python benchmarks/paper/priorities.py [--seeds N or FIRST:END] [--cvs 2,4,6,8]
    [--requests 10000] [--processes N]
"""

import time
from typing import Any

from common_paper import Found, arguments, column, markdown, save, simulate, spec

from llumnix.core.settings import (
    HIGH,
    NORMAL,
    PriorityClass,
    PrioritySettings,
    SchedulerSettings,
)
from llumnix.sim.simulate import Spec, idle_bound
from llumnix.sim.summary import format_mean, format_ratio

# CV of the gaps; published, urgent class, base -> Llumnix: e2e mean, TTFT P99, TPOT mean, in s.
PUBLISHED = {
    2: ((6.64, 5.73), (2.40, 0.66), (0.053, 0.045)),
    4: ((7.31, 5.75), (5.18, 0.59), (0.059, 0.045)),
    6: ((8.25, 5.84), (7.60, 0.67), (0.066, 0.046)),
    8: ((8.54, 5.68), (8.90, 0.90), (0.070, 0.046)),
}
FIGURES = (("e2e_s", "mean"), ("ttft_s", "p99"), ("tpot_s", "mean"))
BASE = "llumnix-base"
NEED = PrioritySettings().headroom_need


def run(
    policy: str, headroom: float, need: float | None, cv: int, requests: int, seed: int
) -> Spec:
    high = PriorityClass(name=HIGH.name, priority=HIGH.priority, headroom=headroom)
    priorities = PrioritySettings(classes=(high, NORMAL), headroom_need=need)
    scheduler = SchedulerSettings(priorities=priorities)
    return spec(
        policy, "S-S", 26.0, requests, seed, cv=float(cv), high_share=0.1, scheduler=scheduler
    )


def _mean(found: Found, label: str, name: str) -> list[Any]:
    return column(found, label, lambda m: m["classes"][name]["e2e_s"]["mean"])


def main() -> None:
    began = time.monotonic()
    args = arguments(__doc__ or "", "priorities", cvs=",".join(map(str, PUBLISHED)))
    cvs = [int(cv) for cv in args.cvs.split(",")]
    kinds = [
        (BASE, BASE, 0.0, None),
        (f"headroom {HIGH.headroom:g}", "llumnix", HIGH.headroom, None),
        (f"by need, {NEED:g}", "llumnix", HIGH.headroom, NEED),
    ]
    specs, labels = [], []
    for cv in cvs:
        for name, policy, headroom, need in kinds:
            specs += [run(policy, headroom, need, cv, args.requests, s) for s in args.seeds]
            labels += [f"CV {cv} {name}"] * len(args.seeds)
    found = simulate(specs, labels, args)
    idle = [run(BASE, 0.0, None, 2, args.requests, seed) for seed in args.seeds]
    bounds = [idle_bound(one)["classes"] for one in idle]
    rows = []
    for cv, published in ((cv, PUBLISHED[cv]) for cv in cvs):
        base = f"CV {cv} {BASE}"
        for name, policy, headroom, need in kinds:
            label = f"CV {cv} {name}"
            cells = [str(cv), name]
            for (figure, part), pair in zip(FIGURES, published, strict=True):
                text = format_mean(
                    column(found, label, lambda m, f=figure, p=part: m["classes"]["high"][f][p])
                )
                paper = {0.0: pair[0], HIGH.headroom: pair[1]}.get(headroom)
                paper = paper if need is None else None
                cells.append(text if paper is None else f"{text} ({paper:g})")
            gain = loss = ""  # Of the base to itself.
            if policy != BASE:
                gain = format_ratio(_mean(found, base, "high"), _mean(found, label, "high"))
                loss = format_ratio(_mean(found, label, "normal"), _mean(found, base, "normal"))
            rows.append([*cells, gain, format_mean(_mean(found, label, "normal")), loss])
        cells = [str(cv), "each alone"]
        cells += [
            format_mean([b["high"][figure][part] for b in bounds]) for figure, part in FIGURES
        ]
        cells.append(
            format_ratio(_mean(found, base, "high"), [b["high"]["e2e_s"]["mean"] for b in bounds])
        )
        cells.append(format_mean([b["normal"]["e2e_s"]["mean"] for b in bounds]))
        rows.append([*cells, ""])
    head = ["CV", "", "urgent: e2e mean, s (published)", "TTFT P99, s (published)"]
    head += ["TPOT mean, s (published)", "urgent e2e, base : this", "normal: e2e mean, s"]
    head += ["normal e2e, this : base"]
    save(args, found, markdown(head, rows), began, alone=bounds)


if __name__ == "__main__":
    main()
