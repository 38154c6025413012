"""README's six figures, the goals, and the list of raw files."""

import re
import statistics

from llumnix.sim.summary import format_ratio
from raw_tables.moves import at, lengths
from raw_tables.raw import (
    RESULTS,
    SERVED_4,
    SERVED_SHORT,
    Row,
    age,
    load,
    pick,
    raw,
    runs_of,
    table,
)

MOVED = "gpu/migration_h200_now.json"
GAPS = "gpu/migration_h200_vllm033.json"
FRONT_END = "gpu/frontends.json"
OVERHEAD = "overhead.json"
DECISIONS = "scheduler_prefixes.json"
BURSTS = "gpu/priorities.json"
SOAK = "soak.json"
PEERS = "vllm-dp", "vllm-router"
"""Of the runs on four GPUs."""
COUNTS = ("no", "one", "two", "three", "four")


def over(
    source: tuple[str, str], peer: str, *path: str, reference: str = "llumnix"
) -> tuple[list[float], list[float]]:
    """A figure of a peer and of the reference, paired by seed."""
    runs = {(r["policy"], r["seed"]): r["metrics"] for r in runs_of(*source)}
    seeds = sorted(seed for policy, seed in runs if policy == reference)
    return tuple([pick(runs[p, s], *path) for s in seeds] for p in (peer, reference))  # type: ignore[return-value]


def times(source: tuple[str, str], peer: str, *path: str) -> float:
    """How many times the peer's figure is ours: the geometric mean over the seeds."""
    return statistics.geometric_mean(a / b for a, b in zip(*over(source, peer, *path), strict=True))


def behind_ms(peer: str) -> float:
    """By how much the mean of TTFT is above the peer's with memory to spare."""
    theirs, ours = over(SERVED_4[1], peer, "ttft_s", "mean")
    return (statistics.fmean(ours) - statistics.fmean(theirs)) * 1000


def gaps() -> list[Row]:
    """Extra gaps of staged moves beside other streams, by length."""
    found = load(GAPS)
    rows = [at(found, tokens, "staged", beside=True) for tokens in lengths(found)]
    return [row["extra_gap_ms"] for row in rows if row]


def front_ends(said: str) -> list[Row]:
    """The rows of that load, with one, two and four HTTP processes."""
    rows = [row for row in load(FRONT_END)["rows"] if row["load"] == said]
    return sorted(rows, key=lambda r: r["processes"])


def added_ms(row: Row, key: str) -> list[float]:
    """What llumnix adds to bare vLLM's, round by round."""
    return [r["llumnix"][key] - r["bare"][key] for r in row["rounds"]]


def six_figures() -> str:
    """What a reader wants to know first, where llumnix loses included. Links are README's."""
    sooner = [times(SERVED_4[0], peer, "ttft_s", "p99") for peer in PEERS]
    p50, p99 = ([g[p] for g in gaps()] for p in ("p50", "p99"))
    once, drain = load(MOVED)["others"]["once a second"], load(MOVED)["drain"]
    added = [added_ms(row, "ttft_ms_p50") for row in front_ends("100 req/s each")]
    said = [f"{min(rounds):+.1f} to {max(rounds):+.1f}" for rounds in added]
    each = [row["llumnix"]["throughput_ratio"] for row in front_ends("streams")]
    tail = 1 / times(SERVED_4[0], "vllm-router", "tpot_s", "p99")
    late = 1 / times(SERVED_SHORT[1], "vllm-router", "ttft_s", "p99")
    rows = [
        ("How much sooner do the slowest requests start?",
         f"P99 of TTFT is {sooner[0]:.1f} times lower than with vLLM 0.32's own balancing, and "
         f"{sooner[1]:.1f} times lower than behind vllm-router (conversations, four H200s)",
         "[serving](docs/figures.md#serving)"),
        ("How long does a moved stream pause?",
         f"{min(p50):.1f} to {max(p50):.1f} ms more than between other tokens (P50; P99 up to "
         f"{max(p99):.1f} ms), from 256 to 32,000 tokens of KV",
         "[moves](docs/figures.md#moves)"),
        ("What do the other streams pay?",
         f"{(once['ratio_mean'] - 1) * 100:.1f} % more time between tokens at one move a second",
         "[moves](docs/figures.md#moves)"),
        ("How long does it take to empty an instance?",
         f"{drain['seconds']:.1f} s for {drain['streams']} streams, of which the longest had "
         f"{drain['remaining_s_max']:.0f} s still to go",
         "[drain](docs/figures.md#drain)"),
        ("How does the front end change TTFT and throughput?",
         f"With a tiny model and one, two and four HTTP processes P50 of TTFT differs from "
         f"vLLM's by {said[0]}, {said[1]} and {said[2]} ms (two rounds). Throughput is "
         f"{each[0]:.2f}, {each[1]:.2f} and {each[2]:.2f} times vLLM's",
         "[front end](docs/figures.md#front-end)"),
        ("**Where does it lose?**",
         f"With memory to spare, mean TTFT is {behind_ms('vllm-dp'):.0f} ms above vLLM's and "
         f"{behind_ms('vllm-router'):.0f} ms above the router's. On conversations P99 of TPOT is "
         f"{tail:.1f} times the router's. Where short prompts pass long ones, P99 of TTFT was "
         f"{late:.2f} times the router's",
         "[losses](docs/figures.md#where-it-loses)"),
    ]  # fmt: skip
    return table(["question", "answer", "more"], rows)


# -- goals


def where(name: str) -> str:
    """On what machine a file was measured, and when."""
    machine, date = load(name)["machine"], load(name)["date"]
    if gpus := machine.get("gpus"):
        return f"{COUNTS[len(gpus)]} {gpus[0].removeprefix('NVIDIA ')}s, {date}"
    return f"{COUNTS[machine['cores']]} CPU cores, {date}"


def verdict(*met: bool) -> str:
    """Yes, no, or at how many."""
    return ("yes" if all(met) else "no") if len(set(met)) == 1 else f"{sum(met)} of {len(met)}"


def interval(text: str) -> tuple[float, float]:
    """Of a ratio with its interval."""
    low, high = re.search(r"\((.*) to (.*)\)", text).groups()  # type: ignore[union-attr]
    return float(low), float(high)


def goals() -> str:
    """What was to be reached, and what was."""
    rows = [*serving_goals(), *move_goals(), *front_end_goals()]
    placed = max(load(DECISIONS)["rows"], key=lambda r: r["instances"])
    dispatch, pairing = placed["dispatch_us"]["p99"], placed["pairing_ms"]["p99"]
    rows.append((
        "a dispatch ≤ 50 µs, a pairing round ≤ 5 ms, P99, 1,024 instances",
        f"{dispatch:.0f} µs, {pairing:.1f} ms", verdict(dispatch <= 50, pairing <= 5), DECISIONS,
    ))  # fmt: skip
    bursts = {(r["policy"], r["seed"]): r["metrics"]["classes"] for r in load(BURSTS)["rows"]}
    seeds = sorted({seed for _, seed in bursts})
    ends = [
        [bursts[p, s]["normal"]["e2e_s"]["mean"] for s in seeds]
        for p in ("llumnix", "llumnix-base")
    ]
    low, high = interval(format_ratio(*ends))
    rows.append((
        "urgent requests make ordinary ones end ≤ 4.5 % later",
        f"{format_ratio(*ends)} of the time",
        "cannot be told" if low <= 1.045 < high else verdict(high <= 1.045), BURSTS,
    ))  # fmt: skip
    soak = load(SOAK)["summary"]
    rows.append((
        f"{soak['minutes']:g} minutes of moves and kills: no wrong stream",
        f"{soak['wrong']} of {soak['streams']:,}", verdict(soak["wrong"] == 0), SOAK,
    ))  # fmt: skip
    found = [(goal, result, met, where(name)) for goal, result, met, name in rows]
    return table(["goal", "result", "met", "measured on"], found)


def serving_goals() -> list[tuple[str, str, str, str]]:
    """On four GPUs, beside vLLM's own balancing and a router."""
    name = SERVED_4[0][0]
    ratios = {
        what: [format_ratio(*over(SERVED_4[0], peer, *path)) for peer in PEERS]
        for what, path in (("TTFT", ("ttft_s", "p99")), ("TPOT", ("tpot_s", "p99")))
    }
    lower = {what: [interval(text)[0] > 1 for text in texts] for what, texts in ratios.items()}
    said = "; ".join(f"{what} {' and '.join(texts)}" for what, texts in ratios.items())
    behind = [behind_ms(peer) for peer in PEERS]
    return [
        ("P99 of TTFT and TPOT lower than with vLLM's balancing and a router, beyond chance",
         f"times lower on conversations: {said}",
         f"TTFT {verdict(*lower['TTFT'])}, TPOT {verdict(*lower['TPOT'])}", name),
        ("no load on which it is worse",
         f"mean TTFT {behind[0]:+.0f} and {behind[1]:+.0f} ms with memory to spare",
         verdict(*(b <= 0 for b in behind)), name),
    ]  # fmt: skip


def move_goals() -> list[tuple[str, str, str, str]]:
    """Of moved streams and of the others."""
    by = {p: [g[p] for g in gaps()] for p in ("p50", "p99")}
    said = {p: ", ".join(f"{v:.1f}" for v in found) + " ms" for p, found in by.items()}
    ends = [lengths(load(GAPS))[i] for i in (0, -1)]
    slow = [at(load(GAPS), tokens, "staged", beside=True)["step_ms"] for tokens in ends]  # type: ignore[index]
    first, last = by["p50"][0], by["p50"][-1]
    once = load(MOVED)["others"]["once a second"]
    share = (once["ratio_mean"] - 1) * 100
    apart = (max(once["ratios_mean"]) - min(once["ratios_mean"])) * 100
    return [
        ("extra gap of a move ≤ 6 ms P50 beside 16 streams", said["p50"],
         verdict(*(v <= 6 for v in by["p50"])), GAPS),
        ("≤ 10 ms P99", said["p99"], verdict(*(v <= 10 for v in by["p99"])), GAPS),
        ("the gap grows from 256 to 32,000 tokens no more than the step does",
         f"{first:.1f} and {last:.1f} ms, with steps of {slow[0]:.1f} and {slow[1]:.1f}",
         verdict(last - first <= slow[1] - slow[0]), GAPS),
        ("other streams slower by ≤ 1 % at one move a second",
         f"{share:+.1f} %, on windows that differ by {apart:.0f} %", verdict(share <= 1), MOVED),
    ]  # fmt: skip


def front_end_goals() -> list[tuple[str, str, str, str]]:
    """What a stream pays for being served through llumnix."""
    added = [
        (a, b)
        for row in front_ends("100 req/s each")
        for a, b in zip(added_ms(row, "ttft_ms_p50"), added_ms(row, "ttft_ms_p99"), strict=True)
    ]
    each = [row["llumnix"]["throughput_ratio"] for row in front_ends("streams")]
    alone = [
        r["added_ms"]["ttft_ms_p50"] for r in load(OVERHEAD)["rows"] if r["streams"] in (None, 1)
    ]
    return [
        ("added TTFT ≤ 1 ms P50, ≤ 3 ms P99 at 100 requests a second for each of 1, 2, 4 processes",
         "by round " + ", ".join(f"{a:+.1f} / {b:+.1f}" for a, b in added) + " ms",
         verdict(*(a <= 1 and b <= 3 for a, b in added)), FRONT_END),
        ("throughput of 1, 2, 4 HTTP processes ≥ 0.99 of vLLM's",
         ", ".join(f"{ratio:.2f}" for ratio in each), verdict(*(e >= 0.99 for e in each)),
         FRONT_END),
        ("added TTFT on a CPU ≤ 3 ms P50", f"{min(alone):+.1f} to {max(alone):+.1f} ms",
         verdict(*(a <= 3 for a in alone)), OVERHEAD),
    ]  # fmt: skip


# -- all of them


def index() -> str:
    """Each raw file with where it comes from."""
    head = [
        "raw file",
        "command",
        "commit, date",
        "commits of `core/` since",
        "machine",
        "versions",
    ]
    rows = []
    for path in sorted(RESULTS.rglob("*.json")):
        name = str(path.relative_to(RESULTS))
        found = load(name)
        if "commit" not in found:
            continue
        command = re.sub(r" --out \S+", "", found["command"]).replace("|", "\\|").strip()
        gpus = found["machine"].get("gpus") or []
        cpu = f"{found['machine']['cores']} cores, {found['machine']['cpu']}"
        machine = f"{len(gpus)} × {gpus[0]}, {cpu}" if gpus else cpu
        known = found["versions"].items()
        versions = ", ".join(f"{k} {v}" for k, v in known if k != "llumnix")
        versions += f", Python {found['machine']['python']}"
        made = f"{found['commit']}, {found['date']}", str(age(name))
        rows.append([raw(name, name), f"`{command}`", *made, machine, versions])
    return table(head, rows)
