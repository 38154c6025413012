"""What the raw figures of benchmarks/live.py say: a table, and a picture.

The table has means over the seeds with 95 % t-intervals, and ratios to the reference policy
(llumnix if it is there, else the last), paired by seed: the geometric mean over the seeds, with the
t-interval of the log ratio. Requests of one run hang together, so seeds, not requests, are the
sample: with three seeds the intervals are wide, with one there are none.

The picture has the distributions of TTFT and TPOT of all seeds, and of one seed the KV memory in
use and the fragmentation over time. matplotlib is needed for it only, and is not among the locked
packages:

    pip install matplotlib
    python benchmarks/plot_live.py RAW.json [RAW.json ...] OUT.png [--seed 0] [--trace M-M]

Several files are for policies that were run apart, on the same seeds.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from common import markdown
from llumnix.sim.summary import format_mean, format_ratio

Run = dict[str, Any]

# By their path in a run's metrics: name and factor. First those that each class has too.
REQUEST_FIGURES = {
    "ttft_s/mean": ("TTFT mean, s", 1),
    "ttft_s/p99": ("TTFT P99, s", 1),
    "tpot_s/p99": ("TPOT P99, ms", 1000),
    "e2e_s/mean": ("e2e mean, s", 1),
    "preemption_loss_s/mean": ("preemption loss, s", 1),
    "requests_failed": ("failed", 1),
}
RUN_FIGURES = {
    "goodput_per_s": ("goodput, req/s", 1),
    "tokens_per_s": ("tokens/s", 1),
    "preemptions": ("preemptions", 1),
    "migrations": ("migrations", 1),
    "prefix_hits/mean": ("prefix hits, %", 100),
    "fragmentation/mean": ("fragmentation, %", 100),
    "kv_used/mean": ("KV used, %", 100),
    "waiting/mean": ("waiting", 1),
}
COLORS = ("#b42318", "#d97706", "#0b5fa5", "#4fa3dc", "#767676", "#17365c")
RATIOS = ("ttft_s/p99", "ttft_s/mean", "tpot_s/p99", "e2e_s/mean", "preemption_loss_s/mean")

SMOOTHED_S = 4.0


def pick(found: dict[str, Any], path: str) -> Any:
    """None where a run was made before there was that figure."""
    for key in path.split("/"):
        found = (found or {}).get(key)
    return found


def table(runs: list[Run], policies: list[str]) -> str:
    """Means over the seeds, by class if there are classes, then ratios to the reference policy."""
    groups = {"": REQUEST_FIGURES | RUN_FIGURES}
    if "classes" in runs[0]["metrics"]:
        groups |= {f"classes/{name}/": REQUEST_FIGURES for name in ("high", "normal")}
    reference = "llumnix" if "llumnix" in policies else policies[-1]
    parts = []
    for group, figures in groups.items():
        found = {
            policy: {
                path: [pick(r["metrics"], group + path) for r in runs if r["policy"] == policy]
                for path in figures
            }
            for policy in policies
        }
        names = [name for name, _ in figures.values()]
        rows = [
            [p, *(format_mean(found[p][path], factor) for path, (_, factor) in figures.items())]
            for p in policies
        ]
        title = group.removeprefix("classes/").removesuffix("/") or "all requests"
        parts.append(markdown([title, *names], rows))
        rows = [
            [
                f"{p} / {reference}",
                *(format_ratio(found[p][x], found[reference][x]) for x in RATIOS),
            ]
            for p in policies
            if p != reference
        ]
        parts.append(markdown([title, *(figures[path][0] for path in RATIOS)], rows))
    return "\n\n".join(parts)


def packed(values: list[Any]) -> str:
    """Values as one line, so that the raw file stays readable."""

    def text(value: Any) -> str:
        if value is None or value == "":
            return "-"
        return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)

    return " ".join(map(text, values))


def unpacked(line: str) -> list[float | None]:
    """Numbers back from `packed`."""
    return [None if x == "-" else float(x) for x in line.split()]


def columns(row: Run, *path: str) -> list[float | None]:
    """One packed line of the raw figures."""
    return unpacked(pick(row, "/".join(path)))


def distribution(axes: Any, values: list[float], **style: Any) -> None:
    """The share of requests that took no longer."""
    ordered = sorted(values)
    shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
    axes.step(ordered, shares, where="post", linewidth=1.8, **style)


def dress(axes: Any, title: str, across: str, up: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(True, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def distributions(left: Any, right: Any, rows: list[Run], colors: dict[str, str]) -> None:
    """TTFT and TPOT of all seeds."""
    for policy, color in colors.items():
        mine = [r for r in rows if r["policy"] == policy]
        for axes, name, factor in ((left, "ttft_s", 1), (right, "tpot_s", 1000)):
            found = [
                v * factor for r in mine for v in columns(r, "requests", name) if v is not None
            ]
            if found:
                distribution(axes, found, color=color, label=policy)
    left.set_xscale("log")
    right.set_xscale("log")
    dress(left, "Time to first token, all seeds", "s", "share of requests")
    dress(right, "Time per output token, all seeds", "ms", "share of requests")
    left.legend(frameon=False, fontsize=9, loc="lower right")


def memory(axes: Any, row: Run, color: str) -> None:
    """KV memory in use on each instance, and the requests that wait, over time."""
    styles = ("-", "--", ":", "-.")
    for number, name in enumerate(sorted(row["samples"])):
        sampled = [columns(row, "samples", name, c) for c in ("t_s", "used", "total")]
        shares = [used / total * 100 for used, total in zip(*sampled[1:], strict=True)]
        axes.plot(
            sampled[0], shares, styles[number % 4], color=color, linewidth=1.3,
            alpha=1 - 0.4 * (number % 2), label=name,
        )  # fmt: skip
    axes.set_ylim(0, 122)  # Above 100 % there is room for the names.
    axes.set_yticks(range(0, 101, 20))
    axes.axvline(columns(row, "requests", "at_s")[-1], color="#767676", linewidth=1, linestyle=":")
    title = f"KV memory in use, {row['policy']} (dotted: the last arrival)"
    dress(axes, title, "s", "% of an instance's")
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=4)


def fragments(axes: Any, rows: list[Run], colors: dict[str, str]) -> None:
    """Free memory that would satisfy queues' heads, over time, as means of `SMOOTHED_S`."""
    unknown = []
    for row in rows:
        windows: dict[int, list[float]] = {}
        times, shares = (columns(row, "fragmentation", name) for name in ("t_s", "share"))
        if None in shares:
            unknown.append(row["policy"])
            continue
        for t_s, share in zip(times, shares, strict=True):
            windows.setdefault(int(t_s // SMOOTHED_S), []).append(share * 100)
        axes.plot(
            [(number + 0.5) * SMOOTHED_S for number in windows],
            [statistics.fmean(found) for found in windows.values()],
            "-", color=colors[row["policy"]], linewidth=1.5, alpha=1, label=row["policy"],
        )  # fmt: skip
    if unknown:
        axes.text(0.02, 0.93, f"not told by {' and '.join(unknown)}",
                  transform=axes.transAxes, fontsize=9, color="#767676")  # fmt: skip
    axes.set_ylim(0, axes.get_ylim()[1] * 1.15)
    title = f"Fragmentation (free, and would satisfy heads), means of {SMOOTHED_S:g} s"
    dress(axes, title, "s", "% of all KV memory")
    axes.legend(frameon=False, fontsize=9, loc="upper right")


def draw(rows: list[Run], seed: int, target: Path) -> None:
    """Four kinds of panels: both distributions, each policy's memory, fragmentation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    policies = list(dict.fromkeys(r["policy"] for r in rows))
    colors = {p: COLORS[i % len(COLORS)] for i, p in enumerate(policies)}
    chosen = sorted(
        (r for r in rows if r["seed"] == seed), key=lambda r: policies.index(r["policy"])
    )
    high = 1 + math.ceil((len(chosen) + 1) / 2)
    figure, grid = pyplot.subplots(high, 2, figsize=(12, 3.3 * high), dpi=100, squeeze=False)
    panels = [axes for line in grid for axes in line]
    distributions(panels[0], panels[1], rows, colors)
    for axes, row in zip(panels[2:], chosen, strict=False):
        memory(axes, row, colors[row["policy"]])
    fragments(panels[2 + len(chosen)], chosen, colors)
    for axes in panels[3 + len(chosen) :]:
        axes.set_visible(False)
    end_s = max(axes.get_xlim()[1] for axes in panels[2 : 3 + len(chosen)])
    for axes in panels[2 : 3 + len(chosen)]:
        axes.set_xlim(0, end_s)
    first = rows[0]
    figure.suptitle(
        f"{first['trace']}, {first['rate']:g} requests/s, {first['instances']} instances; "
        f"over time: seed {seed}",
        x=0.01, ha="left", fontsize=11.5,
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("raw", type=Path, nargs="+", help="what benchmarks/live.py wrote")
    parser.add_argument("out", type=Path, help="the picture, PNG")
    parser.add_argument("--seed", type=int, default=0, help="whose course over time is drawn")
    parser.add_argument("--trace", help="if the files have several")
    args = parser.parse_args()
    rows = [row for path in args.raw for row in json.loads(path.read_text())["rows"]]
    rows = [row for row in rows if args.trace in (None, row["trace"])]
    print(table(rows, list(dict.fromkeys(r["policy"] for r in rows))))
    draw(rows, args.seed, args.out)


if __name__ == "__main__":
    main()
