"""What the simulator says, and how far it is off."""

import statistics
from typing import Any

from llumnix.sim.summary import format_ratio
from raw_tables.raw import NAMES, Row, load, pick, table


def simulated() -> str:
    """benchmarks/simulated.py: means over the seeds."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for r in load("sim/instances.json")["rows"]:
        key = (r["trace"], r["rate"], r["instances"], r["policy"])
        groups.setdefault(key, []).append(r["metrics"])
    head = ["trace, req/s", "instances", "policy", "TTFT mean, s", "TTFT P99, s", "longest, s"]
    head += ["TPOT P99, ms", "e2e mean, s", "fragmentation, %", "preemptions", "moves"]
    rows = []
    for (trace, rate, instances, policy), found in groups.items():

        def mean(*path: str, factor: float = 1, found: list[Row] = found) -> str:
            return f"{statistics.fmean(pick(m, *path) for m in found) * factor:.3g}"

        rows.append([
            f"{trace} {rate:g}", str(instances), f"`{policy}`", mean("ttft_s", "mean"),
            mean("ttft_s", "p99"), mean("ttft_s", "max"), mean("tpot_s", "p99", factor=1000),
            mean("e2e_s", "mean"), mean("fragmentation", "mean", factor=100), mean("preemptions"),
            mean("migrations"),
        ])  # fmt: skip
    return table(head, rows)


SHORT_MEMORY = "sim/short_memory_{}.json"
SHORT_MEMORY_PAIRS = (
    "infaas++ with the queue's rules : infaas++",
    "llumnix without the rules : infaas++",
    "llumnix : infaas++",
    "llumnix : llumnix without the rules",
)
SHORT_MEMORY_COLUMNS = {
    "TTFT mean, s": ("ttft", 1), "TTFT P99, s": ("p99", 1), "W1, s": ("worst1", 1),
    "longest, s": ("longest", 1), "TTFT + loss, s": ("wait", 1), "TPOT P99, ms": ("tpot99", 1000),
    "e2e mean, s": ("e2e", 1), "preemptions": ("preemptions", 1),
}  # fmt: skip


def short_memory() -> str:
    """benchmarks/short_memory.py: the ratios over all pairs of each set, as it wrote them."""
    rows = []
    for name in ("equal", "paper", "real"):
        head, *found = _cells(load(SHORT_MEMORY.format(name))["table"])
        rows += [[name, *row] for row in found if row[0] in SHORT_MEMORY_PAIRS]
    return table(["set", "", *head[1:]], rows)


def short_memory_ratios() -> str:
    """The same trace by trace, of `llumnix` to `infaas++`."""
    rows = []
    for name in ("equal", "real"):
        head, *found = _cells(load(SHORT_MEMORY.format(name))["traces"])
        rows += [[f"{name}: {row[0]}", *row[2:]] for row in found if row[1] == "infaas++"]
    return table(["trace", *head[2:]], rows)


def _cells(lines: list[str]) -> list[list[str]]:
    """A table's rows, its heading first."""
    return [line.strip("|")[1:-1].split(" | ") for n, line in enumerate(lines) if n != 1]


def short_memory_traces() -> str:
    """The set `equal` trace by trace, in seconds: means over the seeds of three variants."""
    groups: dict[tuple[str, float], dict[str, list[Row]]] = {}
    for r in load(SHORT_MEMORY.format("equal"))["rows"]:
        known = groups.setdefault((r["trace"], r["rate"]), {})
        known.setdefault(r["variant"], []).append(r["figures"])
    shown = ("infaas++", "llumnix without the rules", "llumnix")
    rows = []
    for (trace, rate), found in groups.items():

        def means(name: str, factor: int, found: dict[str, list[Row]] = found) -> str:
            each = (statistics.fmean(f[name] for f in found[v]) * factor for v in shown)
            return " → ".join(f"{value:.3g}" for value in each)

        cells = [means(*column) for column in SHORT_MEMORY_COLUMNS.values()]
        rows.append([f"{trace} {rate:g}", str(len(found["llumnix"])), *cells])
    return table(["trace, req/s", "seeds", *SHORT_MEMORY_COLUMNS], rows)


SLICES_COLUMNS = {
    "TTFT mean, s": ("ttft", 1), "TTFT + loss, s": ("wait", 1), "TPOT P99, ms": ("tpot99", 1000),
    "e2e mean, s": ("e2e", 1), "preemptions": ("preemptions", 1),
}  # fmt: skip


def slices() -> str:
    """benchmarks/slices.py: means over the seeds, load by load."""
    groups: dict[tuple[str, float], dict[str, list[Row]]] = {}
    for r in load("sim/slices.json")["rows"]:
        known = groups.setdefault((r["trace"], r["rate"]), {})
        known.setdefault(r["variant"], []).append(r["figures"])
    shown = ("vLLM", "watermark 0.05", "llumnix", "scls")
    rows = []
    for (trace, rate), found in groups.items():

        def means(name: str, factor: int, found: dict[str, list[Row]] = found) -> str:
            each = (statistics.fmean(f[name] for f in found[v]) * factor for v in shown)
            return " → ".join(f"{value:.3g}" for value in each)

        rows.append([f"{trace} {rate:g}", *(means(*c) for c in SLICES_COLUMNS.values())])
    return table(["trace, req/s", *SLICES_COLUMNS], rows)


PROMPT_STEPS = "sim/prompt_steps.json"
PROMPT_STEPS_COLUMNS = {
    "TPOT mean": "tpot", "TPOT P99": "tpot99", "gap P99": "gap99", "TTFT mean": "ttft",
    "TTFT P99": "ttft99", "e2e mean": "e2e", "chats' TPOT P99": "chats_tpot99",
    "long prompts' TTFT P99": "long_ttft99",
}  # fmt: skip


def prompt_steps() -> str:
    """benchmarks/prompt_steps.py: what the flag does, load by load, to 8192."""
    return _prompt_steps(load(PROMPT_STEPS)["rows"], "8192", ("2048", "1024", "512"))


def apart() -> str:
    """The same for prompts that take no time, and for a rule that was tried, to 2048."""
    rows = [*load(PROMPT_STEPS)["rows"], *load("sim/prompt_steps_apart.json")["rows"]]
    return _prompt_steps(rows, "2048", ("bound", "apart 2048", "apart hard 2048"))


def _prompt_steps(rows: list[Row], base: str, variants: tuple[str, ...]) -> str:
    """Geometric means of ratios over pairs by seed, for each load and fleet."""
    found: dict[str, dict[tuple[str, int], Row]] = {}
    for r in rows:
        name = f"{r['load']}, {r['instances']} × {r['profile'].split('-')[0].upper()}"
        found.setdefault(name, {})[r["variant"], r["seed"]] = r["figures"]
    cells = []
    for name, runs in found.items():
        seeds = [seed for variant, seed in runs if variant == variants[-1]]
        cells.append([name])
        for figure in PROMPT_STEPS_COLUMNS.values():
            of = [[runs[v, s].get(figure) for s in seeds] for v in (base, *variants)]
            ratios = [format_ratio(values, of[0], "–").split(" ")[0] for values in of[1:]]
            cells[-1].append(", ".join(ratios) if any(r != "–" for r in ratios) else "–")
    return table(["load", *PROMPT_STEPS_COLUMNS], cells)


def published_slices() -> str:
    """benchmarks/slices.py --published: means over the seeds."""
    groups: dict[str, list[Row]] = {}
    for r in load("sim/slices_published.json")["rows"]:
        groups.setdefault(r["variant"], []).append(r["figures"])
    rows = []
    for policy, found in groups.items():
        done_s, e2e, wasted = (
            statistics.fmean(f[name] for f in found) for name in ("done_s", "e2e", "wasted")
        )
        rows.append([f"`{policy}`", f"{done_s:.1f}", f"{e2e:.0f}", f"{wasted:.0%}"])
    return table(
        ["policy", "req/s", "e2e mean, s", "steps of ended requests over steps of running ones"],
        rows,
    )


def admission() -> str:
    """benchmarks/admission.py: microseconds of an engine's thread in a step."""
    rows = [
        [f"`{r['rules']}`", *(f"{r[f'step_us_{name}']:g}" for name in ("p50", "p90", "mean"))]
        for r in load("admission.json")["rows"]
    ]
    return table(["rules", "P50, µs", "P90, µs", "mean, µs"], rows)


FIDELITY = {
    "TTFT mean, s": ("ttft_s", "mean"), "TTFT P99, s": ("ttft_s", "p99"),
    "TPOT mean, ms": ("tpot_s", "mean"), "TPOT P99, ms": ("tpot_s", "p99"),
    "e2e mean, s": ("e2e_s", "mean"), "preemptions": ("preemptions",), "moves": ("migrations",),
}  # fmt: skip


def off(row: Row, path: tuple[str, ...]) -> tuple[float, float]:
    """Simulated and real, means over the seeds and repeats."""
    sim = statistics.fmean(pick(m, *path) for again in row["simulated"] for m in again)
    return sim, statistics.fmean(pick(m, *path) for m in row["real"])


def fidelity(name: str) -> str:
    """Simulated / real and the error, by load and policy."""
    rows = []
    for row in load(name)["rows"]:
        cells = []
        for path in FIDELITY.values():
            sim, real = off(row, path)
            factor = 1000 if path[0] == "tpot_s" else 1
            error = f" ({sim / real - 1:+.0%})" if real else ""
            cells.append(f"{sim * factor:.3g} / {real * factor:.3g}{error}")
        seeds = len(row["real"])
        what = f"{row['trace']} {row['rate']:g}, {row['instances']}"
        rows.append([what, NAMES.get(row["policy"], f"`{row['policy']}`"), str(seeds), *cells])
    return table(["trace, req/s, instances", "policy", "seeds", *FIDELITY], rows)


SITUATIONS = {
    "memory short for moments at most, on GPUs": [
        ("fidelity_h200.json", "mooncake-conversation", 8.0),
        ("fidelity_h200.json", "sharegpt", 14.0),
    ],
    "memory full for a while, on GPUs": [
        ("fidelity_h200.json", "sharegpt", 11.0),
        ("fidelity_h200.json", "azure-conv", 13.0),
        ("fidelity_h100.json", "M-M", 7.0),
    ],
    "memory full for a while, on paced CPU engines": [
        ("fidelity.json", "L-L", 2.6),
        ("fidelity.json", "sharegpt", 6.5),
        ("fidelity.json", "sharegpt", 10.0),
        ("fidelity.json", "M-M", 9.0),
    ],
}


FIDELITY_FILES = ("fidelity_h200.json", "fidelity_h100.json", "fidelity.json")


def beside_llumnix(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Each policy's row, behind that of `llumnix` on the same load."""
    ours = {(r["trace"], r["rate"]): r for r in rows if r["policy"] == "llumnix"}
    return [(ours[r["trace"], r["rate"]], r) for r in rows if r["policy"] != "llumnix"]


def errors() -> str:
    """The error of the simulator by situation: the lowest and the highest over loads, policies."""
    rows = []
    for said, loads in SITUATIONS.items():
        found = [
            row
            for name, *what in loads
            for row in load(name)["rows"]
            if [row["trace"], row["rate"]] == what
        ]
        cells = []
        for path in list(FIDELITY.values())[:5]:
            each = [sim / real - 1 for sim, real in (off(row, path) for row in found)]
            cells.append(f"{min(each):+.0%} to {max(each):+.0%}")
        rows.append([said, *cells])
    pairs = [pair for name in FIDELITY_FILES for pair in beside_llumnix(load(name)["rows"])]
    cells = []
    for path in list(FIDELITY.values())[:5]:
        each = []
        for ours, theirs in pairs:
            (sim, real), (sim_theirs, real_theirs) = off(ours, path), off(theirs, path)
            each.append((sim_theirs / sim) / (real_theirs / real) - 1)
        cells.append(f"{min(each):+.0%} to {max(each):+.0%}")
    rows.append([f"ratio of another policy to `llumnix`, all {len(pairs)} pairs", *cells])
    heads = [n.partition(",")[0] for n in list(FIDELITY)[:5]]
    return table(["simulated against real", *heads], rows)


# -- README's picture


def memory() -> str:
    """What README's picture shows, and what its other seeds would."""
    shown = {r["policy"]: r for r in load("sim/memory.json")["rows"]}
    group, seed = ("M-M", 14.0, 4), shown["llumnix"]["seed"]
    longest: dict[str, list[float]] = {"cache-aware": [], "llumnix": []}
    for r in load("sim/instances.json")["rows"]:
        if (r["trace"], r["rate"], r["instances"]) == group and r["policy"] in longest:
            longest[r["policy"]].append(r["metrics"]["ttft_s"]["max"])
    waits = {p: shown[p]["metrics"]["ttft_s"]["max"] for p in longest}
    ranges = {p: f"{min(w):.1f} to {max(w):.0f} s" for p, w in longest.items()}
    lower = sum(a > b for a, b in zip(*longest.values(), strict=True))
    return (
        "*Simulated, not measured: the same 700 requests on four instances, dispatched by the same "
        f"rule. Without moves a request waits for up to {waits['cache-aware']:.0f} s: there is "
        "enough free memory for it, but spread over four instances. With moves none waits for more "
        f"than {waits['llumnix']:.1f} s. Moves shorten the longest wait in {lower} of "
        f"{len(longest['llumnix'])} seeds; the picture shows seed {seed}. Over the seeds it is "
        f"{ranges['cache-aware']} without moves, {ranges['llumnix']} with them ([the means, and "
        "more traces](docs/laboratory.md#simulated-instances); "
        "`python benchmarks/plot_memory.py`).*"
    )
