"""What requests got: by system, by policy, urgent or not, and over half an hour."""

import statistics
from collections.abc import Iterable, Sequence

from llumnix.sim.summary import format_ratio
from raw_tables.raw import (
    NAMES,
    RATIOS,
    Row,
    load,
    pick,
    raw,
    runs_of,
    table,
    three,
    tpot,
)


def serving(name: str, trace: str) -> str:
    """A row for each seed and system."""
    head = ["seed", "system", "TTFT mean / P50 / P99 / longest, s", "TPOT mean / P99, ms"]
    head += ["e2e mean, s", "goodput, req/s", "preemptions", "moves", "prefix hits, %"]
    rows = []
    for run in sorted(runs_of(name, trace), key=lambda r: (r["seed"], r["policy"])):
        m = run["metrics"]
        hits = pick(m, "prefix_hits", "mean")
        rows.append([
            str(run["seed"]), NAMES.get(run["policy"], f"`{run['policy']}`"),
            three(m, "mean", "p50", "p99", "max"), tpot(m), f"{m['e2e_s']['mean']:.2f}",
            f"{m['goodput_per_s']:.1f}" if "goodput_per_s" in m else "–", str(m["preemptions"]),
            str(m["migrations"]), f"{hits * 100:.0f}" if hits is not None else "–",
        ])  # fmt: skip
    return table(head, rows)


def ratios(
    sources: Iterable[tuple[str, str]], reference: str = "llumnix", peers: Sequence[str] = ()
) -> str:
    """Each peer over the reference, paired by seed: above 1 where the reference is better."""
    rows = []
    for name, trace in sources:
        runs = runs_of(name, trace)
        groups = sorted({(r["rate"], r["instances"]) for r in runs}, key=lambda g: (g[1], g[0]))
        for rate, instances in groups:
            mine = [r for r in runs if (r["rate"], r["instances"]) == (rate, instances)]
            found: dict[str, dict[int, Row]] = {}
            for run in mine:
                found.setdefault(run["policy"], {})[run["seed"]] = run["metrics"]
            for peer in peers or [p for p in found if p != reference]:
                both = sorted(found[peer].keys() & found[reference].keys())
                cells = [
                    format_ratio(
                        [pick(found[peer][s], *path) for s in both],
                        [pick(found[reference][s], *path) for s in both],
                    )
                    for path in RATIOS.values()
                ]
                what = f"{raw(name, trace.removesuffix('.jsonl'))} {rate:g}, {instances}"
                rows.append([what, NAMES.get(peer, f"`{peer}`"), str(len(both)), *cells])
    return table(["load, req/s, instances", "peer", "seeds", *RATIOS], rows)


LONG_ANSWERS = {
    "vLLM": ("vLLM's admission", "slices llumnix-own-queue"),
    "watermark 0.02": ("`--watermark 0.02`", "slices watermark-0.02"),
    "watermark 0.05": ("`--watermark 0.05`", "slices watermark-0.05"),
    "watermark 0.1": ("`--watermark 0.1`", None),
    "scls 128": ("`scls`, slices of 128 tokens", "slices scls"),
    "scls": ("`scls`", "slices_learnt scls"),
}
"""Simulated variants: their names in the table, and the raw file and policy of what was measured of
them. The first run of `scls` had slices of 128 tokens throughout, as it learnt nothing from answers
that reach their limit."""


def long_answers() -> str:
    """benchmarks/gpu/slices.py beside benchmarks/slices.py --long-answers."""
    measured = {
        f"{name} {r['policy']}": r["metrics"]
        for name in ("slices", "slices_learnt")
        for r in load(f"gpu/{name}.json")["rows"]
    }
    simulated: dict[str, list[float]] = {}
    for r in load("sim/slices_long.json")["rows"]:
        simulated.setdefault(r["variant"], []).append(r["figures"]["preemptions"])
    rows = []
    for variant, (name, policy) in LONG_ANSWERS.items():
        cells = ["–"] * 5
        if policy is not None:
            m = measured[policy]
            cells = [
                str(m["preemptions"]), f"{m['tokens_per_s']:,.0f}", tpot(m),
                f"{m['e2e_s']['mean']:.0f}", f"{m['ttft_s']['mean']:.0f}",
            ]  # fmt: skip
        mean = statistics.fmean(simulated[variant])
        rows.append([name, f"{mean:.0f}", *cells])
    head = ["who starts", "preemptions, simulated", "preemptions", "tokens/s"]
    head += ["TPOT mean / P99, ms", "e2e mean, s", "TTFT mean, s"]
    return table(head, rows)


def paced() -> str:
    """Paced engines on CPU cores: `infaas++` over `llumnix`."""
    files = [f"live/paced_{n}.json" for n in ("sharegpt_2", "L-L_2", "M-M_3")]
    files += ["live/paced_sharegpt_3_infaas.json", "live/paced_sharegpt_3_llumnix.json"]
    runs = [r for f in files for r in load(f)["rows"]]
    rows = []
    for trace, rate, instances in sorted({(r["trace"], r["rate"], r["instances"]) for r in runs}):
        found: dict[str, dict[int, Row]] = {"infaas++": {}, "llumnix": {}}
        for r in runs:
            if (r["trace"], r["rate"], r["instances"]) == (trace, rate, instances):
                found.setdefault(r["policy"], {})[r["seed"]] = r["metrics"]
        both = sorted(found["infaas++"].keys() & found["llumnix"].keys())
        cells = [
            format_ratio(
                *([pick(found[p][s], *path) for s in both] for p in ("infaas++", "llumnix"))
            )
            for path in RATIOS.values()
        ]
        moves = statistics.fmean(found["llumnix"][s]["migrations"] for s in both)
        rows.append([f"{trace} {rate:g}", str(instances), str(len(both)), *cells, f"{moves:.0f}"])
    return table(["trace, req/s", "instances", "seeds", *RATIOS, "moves"], rows)


# -- front end


def front_end(name: str) -> str:
    """Added TTFT and throughput by load: medians over the rounds of the differences."""
    head = ["load", "bare vLLM: TTFT P50 / P99, ms", "added: P50 / P99, ms"]
    head += ["throughput: llumnix over bare", "the same, lowest and highest round"]
    rows = []
    for row in load(name)["rows"]:
        bare, added = row["bare"], row["added_ms"]
        ratio = each = ttft = more = "–"
        if row["rate"] is None:
            ratio = f"{row['throughput_ratio']:.3f}"
            of = [r["llumnix"]["tokens_per_s"] / r["bare"]["tokens_per_s"] for r in row["rounds"]]
            each = f"{min(of):.2f}, {max(of):.2f}"
        if row["streams"] in (None, 1):
            ttft = f"{bare['ttft_ms_p50']:.1f} / {bare['ttft_ms_p99']:.1f}"
            more = f"{added['ttft_ms_p50']:+.1f} / {added['ttft_ms_p99']:+.1f}"
        rows.append([row["load"], ttft, more, ratio, each])
    return table(head, rows)


def frontends() -> str:
    """What several HTTP processes carry beside bare vLLM with as many: medians over the rounds, and
    the ratios of throughput round by round."""
    head = ["HTTP processes", "load", "tokens/s: vLLM, llumnix", "ratio, by round"]
    head += ["TTFT P50 / P99 of vLLM, ms", "added, by round: P50 / P99, ms"]
    head += ["CPU ms a request: vLLM, llumnix"]
    rows, found = [], load("gpu/frontends.json")
    for row in found["rows"]:
        bare, ours, cells = row["bare"], row["llumnix"], ["–", "–"]
        ttft = f"{bare['ttft_ms_p50']:.1f} / {bare['ttft_ms_p99']:.1f}"
        more = " / ".join(
            ", ".join(f"{r['llumnix'][q] - r['bare'][q]:+.1f}" for r in row["rounds"])
            for q in ("ttft_ms_p50", "ttft_ms_p99")
        )
        if row["load"] == "streams":
            of = [r["llumnix"]["tokens_per_s"] / r["bare"]["tokens_per_s"] for r in row["rounds"]]
            each = ", ".join(f"{ratio:.2f}" for ratio in of)
            cells = [f"{bare['tokens_per_s']:,.0f}, {ours['tokens_per_s']:,.0f}", each]
            ttft = more = "–"
        cpu = f"{bare['cpu_ms_per_request']:.1f}, {ours['cpu_ms_per_request']:.1f}"
        shown = row["load"].replace("streams", f"{found['streams']} streams")
        rows.append(
            [str(row["processes"]), shown.replace(" each", " for each"), *cells, ttft, more, cpu]
        )
    return table(head, rows)


def executors(name: str) -> str:
    """Each load and system of a run with one seed."""
    head = ["load, req/s", "system", "TTFT mean / P50 / P99, ms", "TPOT mean / P99, ms"]
    head += ["e2e mean, s", "moves"]
    rows = []
    for run in load(name)["rows"]:
        m, system = run["metrics"], NAMES.get(run["policy"], f"`{run['policy']}`")
        ttft = " / ".join(f"{m['ttft_s'][p] * 1000:.0f}" for p in ("mean", "p50", "p99"))
        end, what = f"{m['e2e_s']['mean']:.2f}", f"{run['trace']} {run['rate']:g}"
        rows.append([what, system, ttft, tpot(m), end, str(m["migrations"])])
    return table(head, rows)


def token_cost() -> str:
    """CPU time of the HTTP process for a token and for a request beside its tokens."""
    head = ["request", "a token before, µs", "now, µs", "a request before, µs", "now, µs"]
    rows: dict[str, list[str]] = {}
    for row in (r for r in load("front_end_cost.json")["rows"] if r["part"] == "cost"):
        rows.setdefault(row["kind"], []).extend(
            [f"{row['token_us']:.1f}", f"{row['request_us']:.0f}"]
        )
    return table(head, [[kind, a, c, b, d] for kind, (a, b, c, d) in rows.items()])


def observed() -> str:
    """What a scrape costs, and what is counted for a request."""
    head = ["what", "CPU, ms", "longest stall, ms", "kB"]
    rows = [
        [r["what"], f"{r['cpu_ms']:.1f}", f"{r['stall_ms']:.1f}", f"{r['kB']:.0f}"]
        if r["part"] == "metrics"
        else [r["what"], f"{r['us'] / 1e3:.4f}", "", ""]
        for r in load("observe.json")["rows"]
    ]
    return table(head, rows)


def fed() -> str:
    """What the page's feed costs, by how many watch."""
    head = ["instances", "requests", "pages open", "% of a core", "kB/s to each"]
    rows = [
        [str(r["instances"]), str(r["requests"]), str(r["watchers"]),
         f"{100 * r['feed_share']:.1f}", f"{r['bytes_s'] / 1e3:.0f}"]
        for r in load("observe_feed.json")["rows"]
        if r["watchers"]
    ]  # fmt: skip
    return table(head, rows)


def carried() -> str:
    """The most requests a second that each variant of the HTTP process carried in bounds."""
    head = ["variant", "req/s in bounds", "of a core", "added TTFT there: P50 / P99, ms"]
    head += ["tokens late: P50 / P99, ms"]
    best: dict[str, Row] = {}
    for row in (r for r in load("front_end_cost.json")["rows"] if r["part"] == "capacity"):
        if row["in_bounds"]:
            best[row["server"]] = row
    return table(head, [
        [
            name, f"{r['rate']:.0f}", f"{r['cpu_share'] * 100:.0f} %",
            f"{r['added_ttft_p50_ms']:.1f} / {r['added_ttft_p99_ms']:.1f}",
            f"{r['late_p50_ms']:.1f} / {r['late_p99_ms']:.1f}",
        ]
        for name, r in best.items()
    ])  # fmt: skip


def decisions() -> str:
    """What the controller's decisions take."""
    head = ["instances", "dispatch, µs P50 / P99", "pairing round, ms P50 / P99", "facts/s"]
    rows = []
    for r in load("scheduler_prefixes.json")["rows"]:
        pair, place = r["pairing_ms"], r["dispatch_us"]
        rows.append([
            f"{r['instances']:,}", f"{place['p50']:.0f} / {place['p99']:.0f}",
            f"{pair['p50']:.1f} / {pair['p99']:.1f}", f"{r['facts_a_second']:,}",
        ])  # fmt: skip
    return table(head, rows)


# -- urgent requests, soak


def full_queue(*names: str) -> str:
    """An urgent request in a full queue: medians over the phases."""
    head = ["full of", "server", "step, ms", "TTFT of `high`, ms P50 / P99"]
    head += ["the same requests as ordinary, ms", "others: tokens/s", "e2e mean", "TPOT P99"]
    rows = []
    for name in names:
        for row in load(name)["rows"]:
            high, same = ([p for p in row["phases"] if p["high"] is h] for h in (True, False))

            def of(phases: list[Row], *path: str) -> float:
                return statistics.median(pick(p, *path) for p in phases)

            cells = [
                " / ".join(f"{of(found, 'ttft_ms', p):.0f}" for p in ("p50", "p99"))
                for found in (high, same)
            ]
            ratio = [
                f"{of(high, 'others', f) / of(same, 'others', f):.2f}"
                for f in ("tokens_per_s", "e2e_mean_s", "tpot_p99_ms")
            ]
            label = f"{raw(name, row['full'])}"
            rows.append([label, f"`{row['kind']}`", f"{of(high, 'step_ms'):.1f}", *cells, *ratio])
    asked = sum(
        len(found["settings"]["full"].split(",")) * len(found["settings"]["kinds"].split(","))
        for found in map(load, names)
    )
    cut_off = f"\n\n*The run was ended after {len(rows)} of its {asked} servers.*"
    return table(head, rows) + (cut_off if len(rows) < asked else "")


def bursts() -> str:
    """Urgent requests in bursts, seed by seed."""
    head = ["seed", "policy", "urgent: TTFT mean / P99, s", "TPOT P99, ms", "e2e mean, s"]
    head += ["others: TTFT mean / P99, s", "TPOT P99, ms", "e2e mean, s", "preemptions"]
    rows = []
    for run in sorted(load("gpu/priorities.json")["rows"], key=lambda r: r["seed"]):
        m = run["metrics"]
        cells = []
        for name in ("high", "normal"):
            c = m["classes"][name]
            cells += [three(c, "mean", "p99"), f"{c['tpot_s']['p99'] * 1000:.1f}"]
            cells.append(f"{c['e2e_s']['mean']:.2f}")
        rows.append([str(run["seed"]), f"`{run['policy']}`", *cells, str(m["preemptions"])])
    return table(head, rows)


def burst_ratios() -> str:
    """All requests alike over classes, by class: above 1 where classes are better."""
    runs = load("gpu/priorities.json")["rows"]
    found = {(r["policy"], r["seed"]): r["metrics"]["classes"] for r in runs}
    seeds = sorted({r["seed"] for r in runs})
    rows = []
    for name, said in (("high", "urgent"), ("normal", "others")):
        cells = [
            format_ratio(
                [pick(found["llumnix-base", s][name], *path) for s in seeds],
                [pick(found["llumnix", s][name], *path) for s in seeds],
            )
            for path in RATIOS.values()
        ]
        rows.append([said, *cells])
    return table(["requests", *RATIOS], rows)


def soak() -> str:
    """The figures of the long run."""
    found = load("soak.json")
    s, rows = found["summary"], found["rows"]
    late = min(rows, key=lambda r: abs(r["s"] - 300))
    out = s["outcomes"]
    memory = [
        (f"memory of the {role}, MB at 5 and {s['minutes']:g} min; slope, MB a minute",
         f"{late['memory_mb'][role]:.1f}, {rows[-1]['memory_mb'][role]:.1f}; "
         f"{s['slope_mb_per_min'][role]:.2f}")
        for role in ("frontend", "controller")
    ]  # fmt: skip
    return table(["", ""], [
        ("streams compared with their undisturbed answer", f"{s['streams']:,}"),
        ("of these wrong", str(s["wrong"])),
        ("requests that failed; requests that a kill cut off",
         f"{s['failed']}; {s.get('cut_by_kills', 0)}"),
        ("urgent requests; clients that hung up; instances killed",
         f"{s['urgent']:,}; {s['hung_up']:,}; {s['kills']}"),
        ("moves: migrated; aborted", f"{out['migrated']}; {out['aborted']}"),
        *memory,
        ("left at the end: requests; KV tokens by instance; files in shared memory; processes",
         f"{s['left']['requests']}; {', '.join(map(str, s['left']['kv_tokens']))}; "
         f"{len(s['left']['shared_memory'])}; {s['left']['processes']}"),
    ])  # fmt: skip


def deaths() -> str:
    """What clients saw of instances that were killed."""
    found, gpu = load("survival.json"), load("gpu/survival.json")["summary"]
    s, rows = found["summary"], found["rows"]
    late = min(rows, key=lambda r: abs(r["s"] - 300))
    memory = [
        (f"memory of the {role}, MB at 5 and {s['minutes']:g} min; slope, MB a minute",
         f"{late['memory_mb'][role]:.1f}, {rows[-1]['memory_mb'][role]:.1f}; "
         f"{s['slope_mb_per_min'][role]:.2f}", "–")
        for role in ("frontend", "controller")
    ]  # fmt: skip
    return table(["", "two CPU cores", "one H200"], [
        ("answers compared with their undisturbed one; of these wrong",
         f"{s['streams']:,}; {s['wrong']}", "–"),
        ("instances killed; answers that lost theirs; answers that failed",
         *(f"{x['kills']}; {x['hit']}; {x['failed']}" for x in (s, gpu))),
        ("pause of a stream, s: P50, P99, longest",
         *(f"{x['gap_s_p50']:.2f}, {x['gap_s_p99']:.1f}, {x['gap_s_longest']:.1f}"
           for x in (s, gpu))),
        *memory,
    ])  # fmt: skip


# -- instances that come and go


FULL = 0.95


def scaling() -> str:
    """One run whose load doubles and falls again."""
    run = load("gpu/scaling_4.json")["rows"][0]
    m, seen = run["metrics"], {}
    for name, samples in run["samples"].items():
        seen[name] = {k: [float(v) for v in samples[k].split()] for k in ("t_s", "used", "total")}
    first = [seen[f"i{n}"] for n in range(run["instances"])]
    used, total = (
        list(map(sum, zip(*(f[k] for f in first), strict=False))) for k in ("used", "total")
    )
    full = next(at for at, u, t in zip(first[0]["t_s"], used, total, strict=False) if u >= FULL * t)
    third = min(seen[f"i{run['instances']}"]["t_s"])
    last = max(max(f["t_s"]) for f in seen.values())
    gone = [max(f["t_s"]) for f in seen.values() if max(f["t_s"]) < last - 1]
    return table(["", ""], [
        (f"memory {FULL:.0%} full after".replace("%", " %"), f"{full:.0f} s"),
        ("third instance serves after", f"{third:.0f} s"),
        ("one of three emptied and stopped after", ", ".join(f"{g:.0f} s" for g in gone)),
        ("TTFT mean, P99", f"{m['ttft_s']['mean']:.2f} s, {m['ttft_s']['p99']:.0f} s"),
        ("moves, preemptions", f"{m['migrations']}, {m['preemptions']}"),
        ("requests that ended, that had not at the run's limit",
         f"{m['requests_done']:,}, {m['requests_failed']}"),
    ])  # fmt: skip
