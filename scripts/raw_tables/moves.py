"""What a move costs: the moved stream, the others, a drain."""

import statistics
from pathlib import Path

from raw_tables.raw import Row, load, raw, table

PAPER_MS = {
    256: "13 / 68 / 58",
    1024: "15 / 226 / 220",
    4096: "22 / 909 / 940",
    8192: "26 / 1682 / 1995",
}
"""Llumnix (OSDI 2024), Llama-7B on an A10, downtime: migration / blocking / recompute."""


def at(result: Row, tokens: int, mode: str, *, beside: bool) -> Row | None:
    """The row of one length and way to copy, alone or beside other streams."""
    for r in result["rows"]:
        if (r["prompt_tokens"], r["mode"], bool(r["background"])) == (tokens, mode, beside):
            return dict(r)
    return None


def lengths(result: Row) -> list[int]:
    return sorted({r["prompt_tokens"] for r in result["rows"]})


def gap(row: Row | None) -> str:
    """P50 / P99 of the extra gap, in ms."""
    if row is None:
        return "–"
    both = (row["extra_gap_ms"][p] for p in ("p50", "p99"))
    return " / ".join(f"{v:.1f}" if v < 100 else f"{v:.0f}" for v in both)


def step(row: Row | None) -> str:
    return "–" if row is None else f"{row['step_ms']:.1f}"


def moves(*names: str) -> str:
    """Staged moves, alone and beside other streams, for each raw file."""
    head = ["run", "prompt, tokens", "moves", "step, alone", "extra gap, alone"]
    head += ["step, beside others", "extra gap, beside others"]
    rows = []
    for name in names:
        result = load(name)
        for tokens in lengths(result):
            alone, beside = (at(result, tokens, "staged", beside=b) for b in (False, True))
            count = str((alone or beside or {}).get("moves", "–"))
            label = raw(name, Path(name).stem)
            rows.append(
                [label, f"{tokens:,}", count, step(alone), gap(alone), step(beside), gap(beside)]
            )
    return table(head, rows)


def copies(name: str, *, paper: bool) -> str:
    """All ways to copy, without other streams."""
    result = load(name)
    head = ["prompt, tokens", "step", "staged", "blocking", "recompute"]
    rows = []
    for tokens in lengths(result):
        found = [at(result, tokens, m, beside=False) for m in ("staged", "blocking", "recompute")]
        more = [PAPER_MS.get(tokens, "–")] if paper else []
        rows.append([f"{tokens:,}", step(found[0]), *map(gap, found), *more])
    return table(head + (["paper (A10): migration / blocking / recompute"] if paper else []), rows)


def others(*names: str) -> str:
    """What other streams pay: time between their tokens with and without moves."""
    head = ["run", "moves", "moves/s", "mean, ms", "P50, ms", "P99, ms", "ratio of means"]
    rows = []
    for name in names:
        found = load(name)["others"]
        for pace, said in (
            ("not", "none"),
            ("once a second", "one a second"),
            ("back to back",) * 2,
        ):
            r = found[pace]
            rows.append([
                raw(name, Path(name).stem), said, f"{r['moves_per_s']:.1f}",
                f"{r['itl_mean_ms']:.2f}", f"{r['itl_p50_ms']:.2f}", f"{r['itl_p99_ms']:.1f}",
                f"{r.get('ratio_mean', 1):.3f}",
            ])  # fmt: skip
    return table(head, rows)


def drains(*names: str) -> str:
    """How long it takes to empty an instance."""
    head = ["run", "streams", "emptied after, s", "the longest would have gone on for, s"]
    rows = []
    for name in names:
        d = load(name)["drain"]
        rows.append([
            raw(name, Path(name).stem), str(d["streams"]), f"{d['seconds']:.2f}",
            f"{d['remaining_s_max']:.1f}", str(d["cut_short"]), f"{d['gap_ms_max']:.0f}",
        ])  # fmt: skip
    return table([*head, "streams cut short", "longest gap, ms"], rows)


def steps(name: str) -> str:
    """What each move cost the engines' own steps."""
    rows = []
    for side in ("source", "destination"):
        each = [r[side]["excess_ms"] for r in load(name)["rows"]]
        cells = [f"{statistics.fmean(each):+.1f}", f"{min(each):+.1f}", f"{max(each):+.1f}"]
        rows.append([side, str(len(each)), *cells])
    return table(["engine", "moves", "steps longer in all, ms, mean", "least", "most"], rows)
