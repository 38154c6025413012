"""Figure 16 of Llumnix (OSDI 2024), and beyond: 64 and 1,024 instances. What the whole simulation
takes is measured here, not what a decision takes (benchmarks/scheduler.py does), and the simulated
engines do not wait for decisions.

    python benchmarks/paper/scalability.py [--requests 200000]
"""

import resource
import time

from common_paper import arguments, markdown, save, spec

from llumnix.sim.simulate import run_one

# Instances, and requests a second: 2.25 for each, as S-S at 36 over 16.
SIZES = ((16, 36.0), (64, 144.0), (256, 576.0), (1024, 2304.0))


def main() -> None:
    began = time.monotonic()
    args = arguments(__doc__ or "", "scalability", seeds="1", requests=200_000)
    found, rows = [], []
    for instances, rate in SIZES:
        count = max(10_000, args.requests * instances // SIZES[-1][0])
        one = spec("llumnix", "S-S", rate, count, 0, instances=instances)
        start = time.process_time()
        run = run_one(one)
        cpu_s = time.process_time() - start
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        run["cpu_s"], run["peak_gb"] = cpu_s, peak_gb
        label = f"{instances} instances"
        found.append((label, run))
        metrics = run["metrics"]
        rows.append(
            [
                f"{instances:,}",
                f"{count:,}",
                f"{metrics['virtual_s']:.0f}",
                f"{cpu_s:.1f}",
                f"{cpu_s / count * 1e3:.2f}",
                f"{peak_gb:.2f}",
                f"{metrics['ttft_s']['p99']:.2f}",
                str(metrics["migrations"]),
            ]
        )
        print(rows[-1], flush=True)
    head = ["instances", "requests", "virtual s", "CPU s", "CPU ms a request", "peak memory, GB"]
    save(args, found, markdown([*head, "TTFT P99, s", "migrations"], rows), began)


if __name__ == "__main__":
    main()
