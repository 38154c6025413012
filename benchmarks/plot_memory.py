"""Draws README's picture: KV memory of four simulated instances, without moves and with them.

Both runs have the same requests, the same dispatch (`cache-aware` and `llumnix`) and vLLM's queue,
so that moves are the only difference. Of the six seeds of simulated.py it is one that fills all
memory for a while; README says what the others show. Writes the raw figures and the picture.
matplotlib is needed for the picture only, and is not among the locked packages:

    pip install matplotlib
    python benchmarks/plot_memory.py [--seed 3]
"""

import argparse
import time
from pathlib import Path
from typing import Any

from common import ROOT, write_result
from llumnix.sim.simulate import run_one
from simulated import LOADS, PROFILE, spec

POLICIES = {"cache-aware": "Without moves", "llumnix": "With moves"}
COLORS = ("#0b5fa5", "#d97706", "#1b7f4d", "#8e44ad")
GREY, RED = "#5c5c5c", "#b42318"
MEMORY_PERCENT = 100


def simulated(seed: int) -> list[dict[str, Any]]:
    """A run of each policy, with what was seen over time."""
    rows = []
    for policy in POLICIES:
        run = run_one(spec(policy, LOADS[0], seed, details=True))
        seen = run.pop("details")
        run["t_s"] = packed(seen["t_s"])
        run["samples"] = {
            name: {of: packed(found[of]) for of in ("kv_used", "waiting")}
            for name, found in seen["instances"].items()
        }
        run["moves"] = [m for m in seen["migrations"] if m["outcome"] == "migrated"]
        rows.append(run)
    return rows


def packed(values: list[float | None]) -> str:
    """A column of the raw file, as those of benchmarks/live.py: numbers with spaces between."""
    return " ".join(f"{value or 0:.4g}" for value in values)


def column(text: str) -> list[float]:
    return [float(value) for value in text.split()]


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Two panels, one beneath the other, over the same time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        4, 1, figsize=(9, 6.6), sharex=True, layout="constrained", height_ratios=[3, 1, 3, 1]
    )
    most = max(sum(w) for r in rows for w in zip(*waiting(r), strict=True))
    for row, memory, queue in zip(rows, grid[::2], grid[1::2], strict=True):
        for color, (name, seen) in zip(COLORS, sorted(row["samples"].items()), strict=True):
            share = [MEMORY_PERCENT * used for used in column(seen["kv_used"])]
            memory.plot(column(row["t_s"]), share, color=color, linewidth=1.4, label=name)
        for number, move in enumerate(row["moves"]):
            memory.axvline(
                move["ended_s"], ymin=0.965, color=GREY, linewidth=1,
                label=None if number else "a request moves",
            )  # fmt: skip
        queue.fill_between(
            column(row["t_s"]), [sum(w) for w in zip(*waiting(row), strict=True)], color=RED,
            alpha=0.75, linewidth=0, step="mid",
        )  # fmt: skip
        ttft, moves = row["metrics"]["ttft_s"], len(row["moves"])
        said = f"{POLICIES[row['policy']]}: longest wait for a first token {ttft['max']:.1f} s"
        said += f", P99 {ttft['p99']:.2f} s" + (f", {moves} moves" if moves else "")
        memory.set_title(said, loc="left", fontsize=12)
        memory.set(ylabel="KV memory\nin use, %", ylim=(0, 106), yticks=(0, 50, 100))
        queue.set(ylabel="requests\nwaiting", ylim=(0, most + 1))
        for axes in (memory, queue):
            axes.grid(True, color="#e3e3e3", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    grid[-1].set(xlabel="time, s (simulated)", xlim=(0, column(rows[0]["t_s"])[-1]))
    handles, labels = grid[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(picture, dpi=100, facecolor="white")


def waiting(row: dict[str, Any]) -> list[list[float]]:
    """Requests in the queue of each instance, over time."""
    return [column(seen["waiting"]) for seen in row["samples"].values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sim/memory.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/memory.png")
    args = parser.parse_args()
    began = time.monotonic()
    rows = simulated(args.seed)
    write_result(args.out, rows, profile=PROFILE, wall_s=round(time.monotonic() - began, 1))
    draw(rows, args.picture)


if __name__ == "__main__":
    main()
