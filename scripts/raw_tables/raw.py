"""Raw figures, and what all tables are made with."""

import json
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {"vllm-dp": "vLLM data parallel", "vllm-router": "vllm-router", "smg": "SMG"}
RATIOS = {
    "TTFT P99": ("ttft_s", "p99"),
    "TTFT mean": ("ttft_s", "mean"),
    "TPOT P99": ("tpot_s", "p99"),
    "e2e mean": ("e2e_s", "mean"),
}
SERVED_4 = ("gpu/serving_4.json", "mooncake-conversation"), ("gpu/serving_4.json", "sharegpt")
SERVED_SHORT = (
    ("gpu/serving_2_sharegpt.json", "sharegpt"),
    ("gpu/serving_2_azure.json", "azure-conv"),
)
SERVED_2 = (
    ("gpu/serving_2_vllm033.json", "mooncake-conversation"),
    ("gpu/serving_2_vllm033.json", "sharegpt"),
)
SHARED = (
    ("gpu/shared_prefixes_4.json", "chats.jsonl"),
    ("gpu/shared_prefixes_4.json", "tools.jsonl"),
)
RULES = "gpu/serving_rules.json", "sharegpt"
Row = dict[str, Any]


OLD_COMMITS = 30
"""A table of a file that is older than the newest one by more commits of core/ says so."""
READ: list[str] = []
"""The files that were read for a table, since the table was begun."""


def load(name: str) -> Row:
    """A raw file, by its path under benchmarks/results/."""
    READ.append(name)
    found: Row = json.loads((RESULTS / name).read_text())
    return found


@cache
def core_commits(commit: str) -> int:
    """How often core/ had been changed at this commit. ValueError where the history lacks it."""
    done = subprocess.run(
        ["git", "rev-list", "--count", commit, "--", "src/llumnix/core"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"the history of this checkout lacks the commit {commit}")
    return int(done.stdout)


@cache
def commits() -> dict[str, str]:
    """The commit of each raw file that names one."""
    named = {}
    for path in sorted(RESULTS.rglob("*.json")):
        if commit := json.loads(path.read_text()).get("commit"):
            named[str(path.relative_to(RESULTS))] = commit
    return named


def age(name: str) -> int:
    """By how many commits of core/ a file is older than the newest."""
    return max(map(core_commits, commits().values())) - core_commits(commits()[name])


def with_age(draw: Callable[[], str]) -> str:
    """A table, and beneath it which of its files are old."""
    READ.clear()
    text = draw()
    old = [n for n in dict.fromkeys(READ) if n in commits() and age(n) > OLD_COMMITS]
    if not old:
        return text
    said = ", ".join(f"`{name}` {age(name)}" for name in old)
    return (
        f"{text}\n\n*From older code. Commits to `core/` between each run and the newest: {said}.*"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def raw(name: str, text: str = "raw") -> str:
    """A link to a raw file."""
    return f"[{text}](../benchmarks/results/{name})"


def pick(metrics: Any, *path: str) -> Any:
    """A figure of a run; None where it was not measured."""
    for key in path:
        metrics = (metrics or {}).get(key)
    return metrics


def seconds(value: float) -> str:
    """Seconds with three digits, or two decimals from 10 s on."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def three(metrics: Row, *parts: str) -> str:
    """Several figures of TTFT, in seconds."""
    return " / ".join(seconds(metrics["ttft_s"][p]) for p in parts)


def tpot(metrics: Row) -> str:
    """Mean and P99 of TPOT, in ms."""
    return " / ".join(f"{metrics['tpot_s'][p] * 1000:.1f}" for p in ("mean", "p99"))


def runs_of(name: str, trace: str) -> list[Row]:
    return [r for r in load(name)["rows"] if r["trace"] == trace]
