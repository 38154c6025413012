"""Figures 11 and 12 of Llumnix (OSDI 2024): serving on seven traces, and fragmentation.

Besides the paper's figures there are W1, the mean of the worst 1 % of TTFT, and the sum of TTFT and
preemption loss, which counts waits before the first token and after it alike.

python benchmarks/paper/serving.py [--seeds N or FIRST:END] [--requests 10000] [--processes N]
                                   [--policies round-robin,infaas++,llumnix]
"""

import time
from itertools import zip_longest
from typing import Any

from common_paper import Found, arguments, column, markdown, save, simulate, spec

from llumnix.sim.simulate import idle_bound
from llumnix.sim.summary import format_mean, format_ratio

# Trace, rate; published INFaaS++ -> Llumnix: TTFT P99 and mean, TPOT P99, preemption loss, in s.
PUBLISHED = {
    ("sharegpt", 7.5): ((14.1, 2.55), (0.526, 0.276), (0.089, 0.075), (0.219, 0.011)),
    ("burstgpt", 8.5): ((27.6, 17.9), (4.39, 2.63), (0.116, 0.108), (0.296, 0.246)),
    ("S-S", 36.0): ((71.7, 74.5), (4.65, 4.33), (0.162, 0.143), (0.509, 0.272)),
    ("M-M", 7.8): ((240, 18.1), (5.9, 0.76), (0.152, 0.117), (1.41, 0.33)),
    ("L-L", 3.0): ((41.2, 2.78), (1.44, 0.34), (0.155, 0.121), (1.90, 0.056)),
    ("S-L", 4.3): ((134, 52), (3.54, 1.78), (0.456, 0.297), (8.44, 4.99)),
    ("L-S", 18.0): ((206, 74), (14.9, 7.4), (0.140, 0.140), (0.18, 0.146)),
}
FIGURES = (
    ("TTFT P99, s", lambda m: m["ttft_s"]["p99"]),
    ("TTFT mean, s", lambda m: m["ttft_s"]["mean"]),
    ("TPOT P99, s", lambda m: m["tpot_s"]["p99"]),
    ("preemption loss, s", lambda m: m["preemption_loss_s"]["mean"]),
)
OURS = (
    ("W1, s", lambda m: m["ttft_s"]["worst1"]),
    ("TTFT + loss, s", lambda m: m["ttft_s"]["mean"] + m["preemption_loss_s"]["mean"]),
    ("longest TTFT, s", lambda m: m["ttft_s"]["max"]),
    ("e2e mean, s", lambda m: m["e2e_s"]["mean"]),
)
"""Figures that the paper doesn't have."""
PLACES = {"infaas++": 0, "llumnix": 1}


def figures(found: Found, policies: list[str]) -> str:
    """Means over the seeds, each with what is published."""
    rows = []
    for (trace, rate), published in PUBLISHED.items():
        for policy in policies:
            label = f"{trace} {policy}"
            cells = [f"{trace} {rate:g}", policy]
            for (_, pick), pair in zip(FIGURES, published, strict=True):
                text = format_mean(column(found, label, pick))
                place = PLACES.get(policy)
                cells.append(text if place is None else f"{text} ({pair[place]:g})")
            cells += [format_mean(column(found, label, pick)) for _, pick in OURS]
            cells.append(
                format_mean(column(found, label, lambda m: m["fragmentation_blocked"]["mean"]), 100)
            )
            cells.append(format_mean(column(found, label, lambda m: m["kv_used"]["mean"]), 100))
            cells.append(format_mean(column(found, label, lambda m: m["migrations"])))
            rows.append(cells)
    head = ["trace, req/s", "policy", *(f"{n} (published)" for n, _ in FIGURES)]
    head += [name for name, _ in OURS]
    return markdown([*head, "fragmentation, %", "KV used, %", "migrations"], rows)


def ratios(found: Found, bounds: dict[str, list[Any]]) -> str:
    """How much better llumnix is than infaas++, what is published, and what any policy could be:
    each request alone on an idle instance."""
    rows = []
    for (trace, rate), published in PUBLISHED.items():
        cells = [f"{trace} {rate:g}"]
        for (name, pick), pair in zip_longest((*FIGURES, *OURS), published):
            base = column(found, f"{trace} infaas++", pick)
            ours = format_ratio(base, column(found, f"{trace} llumnix", pick))
            beside = [] if pair is None else [f"{pair[0] / pair[1]:.3g}"]
            if name != "preemption loss, s":
                beside.append(f"≤ {format_ratio(base, [pick(b) for b in bounds[trace]])}")
            cells.append(f"{ours} ({', '.join(beside)})")
        rows.append(cells)
    names = [n.partition(",")[0] for n, _ in (*FIGURES, *OURS)]
    return markdown(["infaas++ : llumnix (published, bound)", *names], rows)


def main() -> None:
    began = time.monotonic()
    args = arguments(__doc__ or "", "serving", policies="infaas++,llumnix")
    policies = args.policies.split(",")
    specs, labels = [], []
    for trace, rate in PUBLISHED:
        for policy in policies:
            specs += [spec(policy, trace, rate, args.requests, s) for s in args.seeds]
            labels += [f"{trace} {policy}"] * len(args.seeds)
    found = simulate(specs, labels, args)
    bounds = {
        t: [idle_bound(spec("llumnix", t, r, args.requests, s)) for s in args.seeds]
        for t, r in PUBLISHED
    }
    save(args, found, f"{figures(found, policies)}\n\n{ratios(found, bounds)}", began, alone=bounds)


if __name__ == "__main__":
    main()
