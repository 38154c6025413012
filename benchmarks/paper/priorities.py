"""Figure 13 of Llumnix (OSDI 2024): one request in ten is urgent, arrivals come in bursts.

python benchmarks/paper/priorities.py [--seeds 3] [--requests 10000] [--processes N]
"""

import time
from typing import Any

from common_paper import arguments, column, save, simulate, spec, table

from llumnix.sim.summary import told

POLICIES = ("llumnix-base", "llumnix")
# CV of the gaps; published, urgent class, base -> Llumnix: e2e mean, TTFT P99, TPOT mean, in s.
PUBLISHED = {
    2: ((6.64, 5.73), (2.40, 0.66), (0.053, 0.045)),
    4: ((7.31, 5.75), (5.18, 0.59), (0.059, 0.045)),
    6: ((8.25, 5.84), (7.60, 0.67), (0.066, 0.046)),
    8: ((8.54, 5.68), (8.90, 0.90), (0.070, 0.046)),
}
FIGURES = (("e2e_s", "mean"), ("ttft_s", "p99"), ("tpot_s", "mean"))


def _urgent(figure: str, part: str) -> Any:
    return lambda metrics: metrics["classes"]["high"][figure][part]


def main() -> None:
    began = time.monotonic()
    args = arguments(__doc__ or "", "priorities")
    runs = [(p, cv, s) for cv in PUBLISHED for s in range(args.seeds) for p in POLICIES]
    specs = [
        spec(p, "S-S", 26.0, args.requests, s, cv=float(cv), high_share=0.1) for p, cv, s in runs
    ]
    found = simulate(specs, [f"CV {cv} {p}" for p, cv, _ in runs], args)
    rows = []
    for cv, published in PUBLISHED.items():
        for place, policy in enumerate(POLICIES):
            label = f"CV {cv} {policy}"
            cells = [str(cv), policy]
            for (figure, part), pair in zip(FIGURES, published, strict=True):
                values = column(
                    found, label, lambda m, f=figure, p=part: m["classes"]["high"][f][p]
                )
                cells.append(f"{told(values)} ({pair[place]:g})")
            normal = column(found, label, lambda m: m["classes"]["normal"]["e2e_s"]["mean"])
            rows.append([*cells, told(normal)])
        high, normal = (
            [
                sum(column(found, f"CV {cv} {p}", lambda m, c=c: m["classes"][c]["e2e_s"]["mean"]))
                for p in POLICIES
            ]
            for c in ("high", "normal")
        )
        rows.append(
            [
                "",
                "base : llumnix",
                f"{high[0] / high[1]:.2f} x",
                "",
                "",
                f"{normal[1] / normal[0] - 1:+.1%}",
            ]
        )
    head = ["CV", "policy", "urgent: e2e mean, s (published)", "TTFT P99, s (published)"]
    head += ["TPOT mean, s (published)", "normal: e2e mean, s"]
    save(args, found, table(head, rows), began)


if __name__ == "__main__":
    main()
