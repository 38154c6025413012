"""Draws what a migration costs: the figure and the tables of docs/benchmarks.md, section Migration.

Reads the results of benchmarks/migration.py under benchmarks/results/, writes the tables between
their markers in docs/benchmarks.md, and docs/migration_gap.png. A result that is not there leaves
its panel out, and a line in place of its table.

matplotlib is needed for this script only, and is not among the locked packages:

    pip install matplotlib
    python benchmarks/plot_migration.py
"""

import json
from pathlib import Path
from typing import Any

from common import ROOT, markdown

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
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
TIMED = {
    "before": "migration_h100_before",
    "timed": "migration_h100",
    "and no prompts near it (H200)": "migration_h200",
    "and quiet first steps (H200)": "migration_h200_quiet",
    "and tokens packed (H200)": "migration_h200_packed",
}

BLUE, SKY, ORANGE, RED, GREY = "#0b5fa5", "#4fa3dc", "#d97706", "#b42318", "#767676"


def load(name: str) -> Result | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def chosen(result: Result, mode: str, *, loaded: bool) -> list[Row]:
    """The rows of one way to copy, by length."""
    rows = [r for r in result["rows"] if r["mode"] == mode and bool(r["background"]) == loaded]
    return sorted(rows, key=lambda r: r["prompt_tokens"])


def at(result: Result, tokens: int, mode: str, *, loaded: bool) -> Row | None:
    found = [r for r in chosen(result, mode, loaded=loaded) if r["prompt_tokens"] == tokens]
    return found[0] if found else None


def gap(row: Row | None) -> str:
    """P50 / P99, in ms."""
    if row is None:
        return "–"
    p50, p99 = row["extra_gap_ms"]["p50"], row["extra_gap_ms"]["p99"]
    return " / ".join(f"{v:.1f}" if v < 100 else f"{v:.0f}" for v in (p50, p99))


def step(row: Row | None) -> str:
    return "–" if row is None else f"{row['step_ms']:.1f}"


def lengths(result: Result) -> list[int]:
    return sorted({r["prompt_tokens"] for r in result["rows"]})


def alone(result: Result, *, paper: bool) -> str:
    """All ways to copy, without other streams."""
    head = ["prompt, tokens", "step", "staged", "blocking", "recompute", "recompute : staged"]
    rows = []
    for tokens in lengths(result):
        staged, blocking, recompute = (at(result, tokens, m, loaded=False) for m in PAPER_MS)
        ratio = "–"
        if staged and recompute:
            ratio = f"{recompute['extra_gap_ms']['p50'] / staged['extra_gap_ms']['p50']:.0f}"
        line = [f"{tokens:,}", step(staged), gap(staged), gap(blocking), gap(recompute), ratio]
        if paper:
            known = tokens in PAPER_TOKENS
            where = PAPER_TOKENS.index(tokens) if known else 0
            line.append(" / ".join(str(v[where]) for v in PAPER_MS.values()) if known else "–")
        rows.append(line)
    if paper:
        head.append("paper (A10): migration / blocking / recompute")
    return markdown(head, rows)


def loaded(results: dict[str, Result]) -> str:
    """Staged, beside other streams: the step and the gap, for each result."""
    head = ["prompt, tokens"]
    for name in results:
        head += [f"{name}: step", "extra gap"]
    rows = []
    for tokens in sorted({n for result in results.values() for n in lengths(result)}):
        line = [f"{tokens:,}"]
        for result in results.values():
            row = at(result, tokens, "staged", loaded=True)
            line += [step(row), gap(row)]
        rows.append(line)
    return markdown(head, rows)


def cost(results: dict[str, Result]) -> str:
    """The other streams' time between tokens."""
    head = ["run", "moving a request of", "moves/s", "mean, ms", "P50, ms", "P99, ms"]
    head += ["ratio of means", "of P50"]
    rows = []
    for name, result in results.items():
        others = result["others"]
        still = others["not"]
        for pace in ("not", "once a second", "back to back"):
            row = others[pace]
            rows.append(
                [
                    name,
                    f"{others['prompt_tokens']:,} tokens, {pace}" if pace != "not" else "none",
                    f"{row['moves_per_s']:.1f}",
                    f"{row['itl_mean_ms']:.2f}",
                    f"{row['itl_p50_ms']:.2f}",
                    f"{row['itl_p99_ms']:.1f}",
                    f"{row.get('ratio_mean', 1):.3f}",
                    f"{row.get('ratio_p50', row['itl_p50_ms'] / still['itl_p50_ms']):.3f}",
                ]
            )
    return markdown(head, rows)


def tables(
    long: Result | None, short: Result | None, cpu: Result | None, timed: dict[str, Result]
) -> dict[str, str]:
    """The tables, by the names in the page's markers."""
    gpu = {n: r for n, r in (("short streams", short), ("long streams", long)) if r}
    everything = {**{f"GPU, {n}": r for n, r in gpu.items()}, **({"CPU": cpu} if cpu else {})}
    missing = "Not measured yet (`benchmarks/results/{}` is missing)."
    return {
        "gpu alone": alone(long, paper=True) if long else missing.format("gpu/migration.json"),
        "gpu loaded": loaded(gpu) if gpu else missing.format("gpu/migration.json"),
        "timed": loaded(timed),
        "timed others": cost(timed),
        "others": cost(everything) if everything else missing.format("gpu/migration.json"),
        "cpu alone": alone(cpu, paper=False) if cpu else missing.format("migration_cpu.json"),
        "cpu loaded": loaded({"CPU": cpu}) if cpu else missing.format("migration_cpu.json"),
    }


def drawn(text: str, filled: dict[str, str]) -> str:
    """The page with the tables of today. ValueError if a marker is missing."""
    for name, content in filled.items():
        begin, end = f"<!-- {name}: drawn -->\n", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page lacks the markers {begin.strip()} and {end}")
        text = f"{before}{begin}{content}\n{end}{after}"
    return text


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


def draw(long: Result | None, short: Result | None, cpu: Result | None, target: Path) -> None:
    """The figure: GPU on the left, CPU on the right, each if it is there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [p for p in (long, cpu) if p]
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(12, 5.8), dpi=100, sharey=True, squeeze=False,
        width_ratios=[3, 2][: len(panels)],
    )  # fmt: skip
    for axes, result in zip(grid[0], panels, strict=True):
        background = max(r["background"] for r in result["rows"])
        plot(axes, chosen(result, "recompute", loaded=False), 1.0, fmt="^-", color=RED,
             label="recompute, alone")  # fmt: skip
        plot(axes, chosen(result, "blocking", loaded=False), 1.0, fmt="s-", color=ORANGE,
             label="blocking copy, alone")  # fmt: skip
        if result is long:
            axes.plot(PAPER_TOKENS, PAPER_MS["staged"], "x:", color=GREY, linewidth=1.6,
                      label="paper: migration, alone (A10)")  # fmt: skip
            axes.axhline(GOAL_P50_MS, color=GREY, linewidth=1, linestyle=(0, (6, 4)),
                         label="goal of the P50, beside others (GPU)")  # fmt: skip
            if short:
                plot(axes, chosen(short, "staged", loaded=True), 1.05, fmt="D--", color=SKY,
                     label=f"staged, beside {background} short streams a side")  # fmt: skip
        beside = f"{background} long streams" if result is long else f"{background} streams"
        plot(axes, chosen(result, "staged", loaded=True), 0.95 if result is long else 1.05,
             fmt="o--" if result is long else "P--", color="#17365c" if result is long else SKY,
             label=f"staged, beside {beside} a side")  # fmt: skip
        plot(axes, chosen(result, "staged", loaded=False), 1.0, fmt="o-", color=BLUE,
             label="staged, alone")  # fmt: skip
        title = (
            "Two H200, NVLink, Llama-7B shape" if result is long else "CPU, two cores, tiny shape"
        )
        dress(axes, title, lengths(result))
    grid[0][0].set_ylabel("extra gap in the moved stream, ms\n(P50, whiskers up to P99)")
    found = {}
    for axes in grid[0]:
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
    results = [
        load(name)
        for name in ("gpu/migration.json", "gpu/migration_short_background.json",
                     "migration_cpu.json")
    ]  # fmt: skip
    timed = {name: found for name, file in TIMED.items() if (found := load(f"gpu/{file}.json"))}
    PAGE.write_text(drawn(PAGE.read_text(), tables(*results, timed)))
    draw(*results, FIGURE)


if __name__ == "__main__":
    main()
