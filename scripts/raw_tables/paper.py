"""The paper's evaluation, and what the paper published."""

import ast
import re
from collections.abc import Callable
from typing import Any

from llumnix.sim.summary import format_mean, format_ratio
from raw_tables.raw import ROOT, load, pick, table


def published(script: str) -> Any:
    """The paper's figures, as benchmarks/paper/<script>.py has them."""
    tree = ast.parse((ROOT / "benchmarks" / "paper" / f"{script}.py").read_text())
    for line in tree.body:
        if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") == "PUBLISHED":
            return ast.literal_eval(line.value)
    raise ValueError(f"benchmarks/paper/{script}.py has no PUBLISHED")


PAPER = {
    "TTFT P99, s": ("ttft_s", "p99"), "TTFT mean, s": ("ttft_s", "mean"),
    "TPOT P99, s": ("tpot_s", "p99"), "preemption loss, s": ("preemption_loss_s", "mean"),
}  # fmt: skip
LEAST_LOSS_S = 1e-3
"""What is added to losses, so that a run without any has a ratio."""
GAINS: dict[str, Callable[[Any], float]] = {
    "TTFT P99": lambda m: m["ttft_s"]["p99"],
    "TTFT mean": lambda m: m["ttft_s"]["mean"],
    "preemption loss": lambda m: m["preemption_loss_s"]["mean"] + LEAST_LOSS_S,
    "W1": lambda m: m["ttft_s"]["worst1"],
    "TTFT + loss": lambda m: m["ttft_s"]["mean"] + m["preemption_loss_s"]["mean"],
}
"""The paper doesn't have the last two."""


def paper_gains() -> str:
    """`infaas++` over `llumnix`: here, in the paper, and what no policy can exceed. P99 of TPOT
    is left to the table in seconds."""
    found = load("paper/serving.json")
    rows = []
    for (trace, rate), figures in published("serving").items():
        by = {
            p: [r["metrics"] for r in found["rows"] if (r["trace"], r["policy"]) == (trace, p)]
            for p in ("infaas++", "llumnix")
        }
        names = (name.partition(",")[0] for name in PAPER)
        paper = {n: f"{a / b:.3g}" for n, (a, b) in zip(names, figures, strict=True)}
        for what, one in GAINS.items():
            base = [one(m) for m in by["infaas++"]]
            ours = format_ratio(base, [one(m) for m in by["llumnix"]])
            bound = "–"
            if what != "preemption loss":
                bound = format_ratio(base, [one(m) for m in found["alone"][trace]])
            rows.append([f"{trace} {rate:g}", what, ours, paper.get(what, "–"), bound])
    return table(["trace, req/s", "figure", "here", "paper", "bound"], rows)


def paper_seconds() -> str:
    """Means over the seeds in seconds, and the paper's."""
    found = load("paper/serving.json")["rows"]
    rows = []
    for (trace, rate), figures in published("serving").items():
        for place, policy in enumerate(("infaas++", "llumnix")):
            by = [r["metrics"] for r in found if (r["trace"], r["policy"]) == (trace, policy)]
            cells = []
            for path, pair in zip(PAPER.values(), figures, strict=True):
                cells += [format_mean([pick(m, *path) for m in by]), f"{pair[place]:g}"]
            cells.append(format_mean([m["ttft_s"]["max"] for m in by]))
            cells.append(format_mean([m["fragmentation"]["mean"] for m in by], 100))
            rows.append([f"{trace} {rate:g}", f"`{policy}`", *cells])
    head = ["trace, req/s", "policy"]
    for name in PAPER:
        head += [name, "paper"]
    return table([*head, "longest TTFT, s", "fragmentation, %"], rows)


def paper_table(name: str, number: int, columns: dict[str, str] | None = None) -> str:
    """One of the tables that a script of benchmarks/paper/ wrote into its raw file."""
    lines = load(f"paper/{name}.json")["table"]
    parts = [p for p in re.split(r"\n\n(?:[^|].*\n\n)?", "\n".join(lines)) if p.startswith("|")]
    text = parts[number]
    for old, new in (columns or {}).items():
        text = text.replace(old, new)
    return text


def paper_urgent() -> str:
    """The table of priorities at the lowest and the highest burstiness, without seconds."""
    lines = load("paper/priorities.json")["table"]
    kept = [line for line in lines[2:] if line.split("|")[1].strip() in ("2", "8")]
    rows = []
    for line in kept:
        cells = [c.strip() for c in line.strip("|").split("|")]
        if cells[1] != "llumnix-base":
            rows.append([cells[0], cells[1], cells[5], cells[7] or "–"])
    return table(["CV", "", "urgent end sooner, times", "others end later, times"], rows)
