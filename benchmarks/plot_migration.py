"""Draws what a migration costs: docs/migration_gap.png, from results of benchmarks/migration.py.

The tables of the same results are drawn by scripts/draw_pages.py. matplotlib is needed for this
script only, and is not among the locked packages:

    pip install matplotlib
    python benchmarks/plot_migration.py
"""

import json
from pathlib import Path
from typing import Any

from common import ROOT

RESULTS = ROOT / "benchmarks" / "results"
FIGURE = ROOT / "docs" / "migration_gap.png"

Row = dict[str, Any]
Result = dict[str, Any]

# Llumnix, OSDI 2024: Llama-7B on A10, downtime in ms, read off the published figure.
PAPER_TOKENS = (256, 512, 1024, 2048, 4096, 8192)
PAPER_MS = {
    "staged": (13, 12, 15, 16, 22, 26),
    "blocking": (68, 129, 226, 451, 909, 1682),
    "recompute": (58, 110, 220, 436, 940, 1995),
}
GOAL_P50_MS = 6.0
BLUE, SKY, ORANGE, RED, GREY = "#0b5fa5", "#4fa3dc", "#d97706", "#b42318", "#767676"


def load(name: str) -> Result:
    found: Result = json.loads((RESULTS / name).read_text())
    return found


def chosen(result: Result, mode: str, *, loaded: bool) -> list[Row]:
    """The rows of one way to copy, by length."""
    rows = [r for r in result["rows"] if r["mode"] == mode and bool(r["background"]) == loaded]
    return sorted(rows, key=lambda r: r["prompt_tokens"])


def lengths(result: Result) -> list[int]:
    return sorted({r["prompt_tokens"] for r in result["rows"]})


def plot(axes: Any, rows: list[Row], shift: float, **style: Any) -> None:
    """One line, with whiskers up to P99. `shift`: sideways, so that whiskers stay apart."""
    if not rows:
        return
    p50 = [r["extra_gap_ms"]["p50"] for r in rows]
    up = [r["extra_gap_ms"]["p99"] - r["extra_gap_ms"]["p50"] for r in rows]
    axes.errorbar(
        [r["prompt_tokens"] * shift for r in rows], p50, yerr=[[0] * len(up), up],
        capsize=3, elinewidth=1, linewidth=1.8, markersize=5.5, **style,
    )  # fmt: skip


def dress(axes: Any, title: str, ticks: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    def plain(value: float, _: Any) -> str:
        return f"{value:,.0f}"

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title, fontsize=11.5, loc="left")
    axes.set_xlabel("prompt, tokens")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_locator(FixedLocator([2, 5, 10, 20, 50, 100, 200, 500, 1000]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axes.grid(True, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw(now: Result, older: Result, cpu: Result, target: Path) -> None:
    """The figure: GPU on the left, CPU on the right. Staged moves on GPUs are those of `now`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        1, 2, figsize=(12, 5.8), dpi=100, sharey=True, width_ratios=[3, 2]
    )
    for axes, others, staged in zip(grid, (older, cpu), (now, cpu), strict=True):
        background = max(r["background"] for r in staged["rows"])
        plot(axes, chosen(others, "recompute", loaded=False), 1.0, fmt="^-", color=RED,
             label="recompute, alone")  # fmt: skip
        plot(axes, chosen(others, "blocking", loaded=False), 1.0, fmt="s-", color=ORANGE,
             label="blocking copy, alone")  # fmt: skip
        if staged is now:
            axes.plot(PAPER_TOKENS, PAPER_MS["staged"], "x:", color=GREY, linewidth=1.6,
                      label="paper: migration, alone (A10)")  # fmt: skip
            axes.axhline(GOAL_P50_MS, color=GREY, linewidth=1, linestyle=(0, (6, 4)),
                         label="goal of the P50, beside others (GPU)")  # fmt: skip
        plot(axes, chosen(staged, "staged", loaded=True), 1.05, fmt="D--", color=SKY,
             label=f"staged, beside {background} streams a side")  # fmt: skip
        plot(axes, chosen(staged, "staged", loaded=False), 1.0, fmt="o-", color=BLUE,
             label="staged, alone")  # fmt: skip
        title = (
            "Two H200, NVLink, Llama-7B shape" if staged is now else "CPU, two cores, tiny shape"
        )
        dress(axes, title, lengths(others))
    grid[0].set_ylabel("extra gap in the moved stream, ms\n(P50, whiskers up to P99)")
    found = {}
    for axes in grid:
        handles, labels = axes.get_legend_handles_labels()
        found |= {n: h for h, n in zip(handles, labels, strict=True) if n not in found}
    order = sorted(
        found, key=lambda n: (not n.startswith("staged"), n.startswith(("paper", "goal")))
    )
    figure.legend([found[n] for n in order], order, loc="lower center", ncols=4, frameon=False,
                  fontsize=9.5)  # fmt: skip
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(target)


def main() -> None:
    names = ("gpu/migration_h200_now.json", "gpu/migration.json", "migration_cpu.json")
    draw(*map(load, names), FIGURE)


if __name__ == "__main__":
    main()
