"""What dispatch gains and what moves gain: the two differences between `infaas++` and `llumnix`.

Each policy with moves and without, on the three traces whose memory is full for a while.

python benchmarks/paper/ablation.py [--seeds N or FIRST:END] [--requests 10000] [--processes N]
"""

import time
from dataclasses import replace

from common_paper import SETTINGS, arguments, column, markdown, save, simulate, spec

from llumnix.sim.summary import format_mean

LOADS = {"S-L": 4.3, "M-M": 7.8, "L-L": 3.0}
KINDS = {
    "freest, no moves (`infaas++`)": ("infaas++", False),
    "soonest, no moves (`cache-aware`)": ("cache-aware", False),
    "freest and moves": ("infaas++", True),
    "soonest and moves (`llumnix`)": ("llumnix", True),
}
FIGURES = (
    ("TTFT P99, s", lambda m: m["ttft_s"]["p99"], 1),
    ("TTFT mean, s", lambda m: m["ttft_s"]["mean"], 1),
    ("longest, s", lambda m: m["ttft_s"]["max"], 1),
    ("TPOT P99, ms", lambda m: m["tpot_s"]["p99"], 1000),
    ("preemption loss, s", lambda m: m["preemption_loss_s"]["mean"], 1),
    ("e2e mean, s", lambda m: m["e2e_s"]["mean"], 1),
    ("preemptions", lambda m: m["preemptions"], 1),
    ("moves", lambda m: m["migrations"], 1),
)


def main() -> None:
    began = time.monotonic()
    args = arguments(__doc__ or "", "ablation")
    specs, labels = [], []
    for trace, rate in LOADS.items():
        for name, (policy, moves) in KINDS.items():
            scheduler = replace(SETTINGS, migration=replace(SETTINGS.migration, balance=moves))
            specs += [
                spec(policy, trace, rate, args.requests, s, scheduler=scheduler) for s in args.seeds
            ]
            labels += [f"{trace} {name}"] * len(args.seeds)
    found = simulate(specs, labels, args)
    rows = [
        [
            f"{trace} {rate:g}",
            name,
            *(
                format_mean(column(found, f"{trace} {name}", pick), factor)
                for _, pick, factor in FIGURES
            ),
        ]
        for trace, rate in LOADS.items()
        for name in KINDS
    ]
    head = ["trace, req/s", "dispatch", *(name for name, _, _ in FIGURES)]
    save(args, found, markdown(head, rows), began)


if __name__ == "__main__":
    main()
