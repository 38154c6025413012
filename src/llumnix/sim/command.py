"""`llumnix simulate`: reads its arguments, runs the simulations, and shows their results."""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from llumnix.config import read_settings, with_survival
from llumnix.core.scheduling.presets import POLICIES
from llumnix.core.settings import SchedulerSettings
from llumnix.core.slices.published import STATIC
from llumnix.errors import UsageError
from llumnix.sim.capacity import parse_bound, smallest_fleet
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.faults import Faults
from llumnix.sim.model.profile import load_profile, profile_names
from llumnix.sim.simulate import Run, Spec, runs
from llumnix.sim.summary import format_mean
from llumnix.sim.workloads.named_files import FOLDER_VARIABLE
from llumnix.sim.workloads.workload import TRACES, repeated, requests_of

POINTS_MAX = 200
"""Rates of a sweep."""
REQUESTS = 1000
"""Requests of a run, by default."""
INSTANCES_MAX = 1024
"""Where `--capacity-for` gives up."""
# Title, path in the metrics, factor to the title's unit.
COLUMNS = (
    ("TTFT mean, s", ("ttft_s", "mean"), 1),
    ("TTFT P99, s", ("ttft_s", "p99"), 1),
    ("TPOT mean, ms", ("tpot_s", "mean"), 1e3),
    ("TPOT P99, ms", ("tpot_s", "p99"), 1e3),
    ("e2e mean, s", ("e2e_s", "mean"), 1),
    ("preemption loss, s", ("preemption_loss_s", "mean"), 1),
    ("fragmentation, %", ("fragmentation_blocked", "mean"), 100),
    ("KV used, %", ("kv_used", "mean"), 100),
    ("instances", ("instances_mean",), 1),
    ("migrations", ("migrations",), 1),
    ("preemptions", ("preemptions",), 1),
    ("failed", ("requests_failed",), 1),
)


def simulate(argv: list[str]) -> int:
    """Runs the command. Returns 0 when all runs have ended; raises UsageError."""
    parser = _parser()
    args = parser.parse_args(argv)
    began = time.monotonic()
    specs = _specs(args)
    if args.report:
        _check_report(args.report)
    if args.capacity_for:
        return _capacity(specs, args, began)
    console = Console(stderr=True)
    done: dict[int, Run] = {}
    with Progress(console=console, disable=args.json or not console.is_terminal) as progress:
        task = progress.add_task("simulating", total=len(specs))
        for number, run in runs(specs, args.processes):
            done[number] = run
            progress.advance(task)
    result = {
        "runs": [done[n] for n in sorted(done)],
        "wall_s": round(time.monotonic() - began, 2),
    }
    _show(result, args)
    return 0


def _check_report(path: Path) -> None:
    """Raises UsageError if the report could not be written. It is called before the runs."""
    from llumnix.sim.report.figures import plotly

    plotly()
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise UsageError(f"--report {path}: name a file in a folder that exists")


def _show(result: dict[str, Any], args: argparse.Namespace) -> None:
    if args.report:
        from llumnix.sim.report.page import write_report

        about = {"profile": args.profile, "command": "llumnix simulate " + shlex.join(sys.argv[2:])}
        write_report({**result, "about": about}, args.report)
    if args.json:
        bare = [{k: v for k, v in r.items() if k != "details"} for r in result["runs"]]
        print(json.dumps({**result, "runs": bare}))
        return
    Console(width=None if sys.stdout.isatty() else 200).print(_table(result["runs"]))
    for line in _survival_lines(result["runs"]):
        print(line)
    print(f"{len(result['runs'])} runs in {result['wall_s']:.1f} s")
    if args.report:
        print(f"report: {args.report}")


def _table(found: list[Run]) -> Table:
    """The table of results: means over the seeds, with 95 % intervals if there are several."""
    table = Table()
    rates = len({r["rate"] for r in found}) > 1
    table.add_column("policy")
    if rates:
        table.add_column("rate", justify="right")
    for name, _, _ in COLUMNS:
        table.add_column(name, justify="right")
    for (rate, policy), rows in _groups(found).items():
        cells = [
            format_mean([_pick(r["metrics"], path) for r in rows], factor, "-")
            for _, path, factor in COLUMNS
        ]
        table.add_row(policy, *([f"{rate:g}"] if rates else []), *cells)
    return table


def _survival_lines(found: list[Run]) -> list[str]:
    """What became of the streams of crashed instances, a line for each policy and rate."""
    lines = []
    for (rate, policy), rows in _groups(found).items():
        each = [r["metrics"]["survival"] for r in rows if "survival" in r["metrics"]]
        if not sum(s["revivals"] + s["streams_ended"] for s in each):
            continue
        name = policy if rate is None else f"{policy} at {rate:g}/s"
        ended = sum(s["streams_ended"] for s in each)
        line = f"{name}: {ended} streams ended with their instance"
        if revived := sum(s["streams_revived"] for s in each):
            pauses = format_mean([s["pause_s"]["mean"] for s in each], nothing="-")
            line = (
                f"{name}: {revived} streams went on at another instance, after {pauses} s on "
                f"average; {ended} ended with their instance"
            )
        if slowed := sum(s["streams_slowed"] for s in each):
            lost = format_mean([s["slowed_s"]["mean"] for s in each], nothing="-")
            most = max(s["slowed_s"]["max"] or 0.0 for s in each)
            line += f". {slowed} others lost {lost} s each by that, {most:.3g} s at most"
        lines.append(line)
    return lines


def _groups(found: list[Run]) -> dict[tuple[Any, ...], list[Run]]:
    """The runs by rate and policy."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in found:
        groups.setdefault((run["rate"], run["policy"]), []).append(run)
    return groups


def _pick(metrics: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        metrics = metrics[key]
    return metrics


def _capacity(specs: list[Spec], args: argparse.Namespace, began: float) -> int:
    """Finds the fewest instances with which all seeds keep the bound, for each policy and rate, and
    shows them. Returns 0."""
    rows = []
    for policy in args.policy:
        for rate in dict.fromkeys(s.rate_per_s for s in specs):
            mine = [s for s in specs if s.policy == policy and s.rate_per_s == rate]
            found = [smallest_fleet(spec, args.capacity_for, INSTANCES_MAX) for spec in mine]
            counts = [count for count, _ in found]
            rows.append(
                {
                    "policy": policy,
                    "trace": args.trace,
                    "rate": rate,
                    "bound": args.capacity_for,
                    "instances": max(counts),
                    "instances_by_seed": counts,
                    "runs": [run for _, run in found],
                }
            )
    wall_s = round(time.monotonic() - began, 2)
    if args.json:
        print(json.dumps({"capacity": rows, "wall_s": wall_s}))
        return 0
    table = Table("policy", "rate", f"fewest instances for {args.capacity_for}", "by seed")
    for row in rows:
        rate = "the trace's" if row["rate"] is None else f"{row['rate']:g}"
        by_seed = ", ".join(map(str, row["instances_by_seed"]))
        table.add_row(row["policy"], rate, str(row["instances"]), by_seed)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    print(f"{wall_s:.1f} s")
    return 0


def _specs(args: argparse.Namespace) -> list[Spec]:
    settings = _settings(args)
    profile = load_profile(args.profile)
    engine = EngineOptions(
        kv_tokens=args.kv_tokens or 0,
        budget=args.max_num_batched_tokens,
        slots=args.max_num_seqs,
        chunked=args.chunked_prefill,
        prefix_caching=args.prefix_caching,
        watermark=args.watermark,
    )
    requests: int = args.requests
    if requests is None:
        requests = min(REQUESTS, requests_of(args.trace, args.traces) or REQUESTS)
    faults = Faults.parse(args.faults) if args.faults is not None else None
    if faults is not None and (static := [p for p in args.policy if p in STATIC]):
        raise UsageError(f"--faults: {', '.join(static)} are simulated without any; leave it out")
    rates = _sweep(args.sweep) if args.sweep else [args.rate]
    seeds = range(args.seed, args.seed + args.seeds)
    if args.cv is None and not args.high_share and faults is None:
        _check_seeds(args, seeds, requests)
    if args.capacity_for:
        parse_bound(args.capacity_for)
        if args.report:
            raise UsageError("--report: --capacity-for makes no page; leave one of them out")
    return [
        Spec(
            scheduler=settings if policy in STATIC else replace(settings, policy=policy),
            static=policy if policy in STATIC else None,
            profile=profile,
            engine=engine,
            instances=args.instances,
            start_s=args.startup_s,
            trace=args.trace,
            rate_per_s=rate,
            requests=requests,
            seed=seed,
            cv=args.cv,
            scale=args.scale,
            high_share=args.high_share,
            folder=args.traces,
            faults=faults,
            details=bool(args.report) and seed == args.seed,
        )
        for rate in rates
        for seed in seeds
        for policy in args.policy
    ]


def _check_seeds(args: argparse.Namespace, seeds: range, requests: int) -> None:
    """Raises UsageError if two seeds would be one and the same run, since the trace has too few
    rows. It is called where nothing else is drawn."""
    same = repeated(args.trace, args.traces, seeds, requests)
    if same is not None:
        raise UsageError(
            f"--seeds {args.seeds}: seeds {same[0]} and {same[1]} are the same run, since both "
            f"take the same {requests} of the {requests_of(args.trace, args.traces)} requests of "
            f"{args.trace}: ask for fewer (--requests), or have gaps drawn (--cv 1)"
        )


def _settings(args: argparse.Namespace) -> SchedulerSettings:
    settings = with_survival(read_settings(args.scheduler_config), args.survival)
    if args.autoscale:
        low, _, high = args.autoscale.partition(",")
        if not (low.isdigit() and high.isdigit()):
            raise UsageError(f"--autoscale {args.autoscale!r}: write MIN,MAX, such as 1,16")
        scaling = replace(settings.scaling, instances_min=int(low), instances_max=int(high))
        settings = replace(settings, scaling=scaling)
    return settings


def _sweep(text: str) -> list[float | None]:
    """The rates that `rate=FIRST:LAST:STEP` names, both ends included."""
    name, _, span = text.partition("=")
    try:
        first, last, step = (float(x) for x in span.split(":"))
    except ValueError:
        first, last, step = 1.0, 0.0, 0.0
    if name != "rate" or step <= 0 or last < first or (last - first) / step > POINTS_MAX:
        raise UsageError(
            f"--sweep {text!r}: write rate=FIRST:LAST:STEP, such as rate=2.6:3.2:0.2 (at most "
            f"{POINTS_MAX} points)"
        )
    return [round(first + n * step, 9) for n in range(math.floor((last - first) / step + 1e-9) + 1)]


def _policies(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in POLICIES and name not in STATIC:
            known = ", ".join([*POLICIES, *STATIC])
            raise argparse.ArgumentTypeError(f"no policy {name!r}; there are {known}")
    return names


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number above 0")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a share from 0 to below 1, such as 0.05")
    return share


class _OldName(argparse.Action):
    """An option under its old name. It works with a warning that names the new one."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        hidden = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        super().__init__(option_strings, dest, **kwargs, **hidden)

    def __call__(
        self, _: Any, args: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        new = "--" + self.dest.replace("_", "-")
        print(f"llumnix simulate: {option} is now {new}; write that", file=sys.stderr)
        setattr(args, self.dest, value)


def _parser() -> argparse.ArgumentParser:
    traces = "\n".join(f"  {name:22} {text}" for name, text in TRACES.items())
    parser = argparse.ArgumentParser(
        prog="llumnix simulate",
        description="The scheduler and the migrations of `llumnix serve`, with engines, network "
        "and clients in virtual time.",
        epilog=f"traces:\n{traces}\n  or a csv or jsonl file with input_tokens, output_tokens and, "
        "if it has them, arrival_s,\n  hash_ids and priority; or what `serve --event-log` wrote",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--policy", type=_policies, default=["llumnix"], help="names, by comma")
    add("--trace", default="M-M", help="what the requests are like: see below")
    add("--traces", metavar="DIR", help=f"folder of trace files (default: ${FOLDER_VARIABLE})")
    add("--rate", type=float, help="requests a second (default: the trace's own)")
    add("--sweep", metavar="rate=FIRST:LAST:STEP", help="several rates")
    add("--cv", type=float, help="of the gaps, Gamma; 1 is Poisson (default: the trace's gaps)")
    add("--scale", type=float, default=1.0, help="of all lengths")
    add("--high-share", type=float, default=0.0, metavar="SHARE", help="of urgent requests")
    add("--high", type=float, action=_OldName, dest="high_share")
    add(
        "--requests", type=_count, help=f"in a run (default: {REQUESTS}, or all if there are fewer)"
    )
    add("--seed", type=int, default=0, help="the first seed")
    add("--seeds", type=_count, default=1, help="how many")
    add("--instances", type=_count, default=4, help="at the beginning")
    add("--autoscale", metavar="MIN,MAX", help="let the load decide the number of instances")
    add("--startup-s", type=float, help="how long an instance takes to start")
    add("--start-s", type=float, action=_OldName, dest="startup_s")
    add("--capacity-for", metavar="BOUND", help="find the fewest instances: ttft_p99<2s")
    add("--profile", default="a10-llama-7b", help=f"{', '.join(profile_names())}, or a file")
    add("--kv-tokens", type=_count, help="KV memory of an instance (default: the profile's)")
    add("--max-num-batched-tokens", type=_count, default=2048, help="of a step")
    add("--max-num-seqs", type=_count, default=256, help="requests that run at a time")
    add("--watermark", type=_share, default=0.0, metavar="SHARE", help="vLLM's: memory kept free")
    flag = argparse.BooleanOptionalAction
    add("--chunked-prefill", action=flag, default=True, help="prompts share steps with others")
    add("--prefix-caching", action=flag, default=True, help="as vLLM's")
    add("--scheduler-config", metavar="FILE", help="knobs of the scheduler (docs/scheduling.md)")
    add(
        "--faults",
        metavar="FAULTS",
        help="instance=S,controller=S,client=S,link=SHARE: crashes and clients that hang up, each "
        "so many seconds apart, and messages lost, repeated and late; everything is checked",
    )
    add(
        "--survival",
        choices=["on", "off"],
        help="whether requests go on elsewhere when their instance crashes (default: on)",
    )
    add("--processes", type=_count, default=os.cpu_count() or 1, help="runs at a time")
    add("--json", action="store_true", help="print nothing but JSON")
    add("--report", type=Path, metavar="FILE", help="write a page with plots")
    return parser
