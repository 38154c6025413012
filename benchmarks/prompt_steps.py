"""What steps with prompts cost those that decode, in the simulator, and what a flag does about it.

A step that computes a prompt lasts several times as long as one that only decodes, and all in the
batch wait for it. Each variant serves the same requests under `llumnix`, with all the KV memory
that a card has. `8192` is what vLLM sets by itself on an H100 or H200 (--max-num-batched-tokens);
the others set the flag lower. With `bound` prompts take no time: no scheduler that keeps prompts
away from those that decode can do better. Ratios are geometric means over pairs by seed, with 95 %
t-intervals. Needs no GPU.

    LLUMNIX_TRACES=TRACES python benchmarks/prompt_steps.py --seeds 40:44
    python benchmarks/prompt_steps.py --loads mixed,sharegpt --variants 8192,bound --seeds 40:41
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from common import ROOT, markdown, seed_range, simulate_all, write_result
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import RequestId
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.cluster import Cluster
from llumnix.sim.model.jobs import Job
from llumnix.sim.model.profile import Profile, load_profile
from llumnix.sim.simulate import Spec, figures_of
from llumnix.sim.summary import format_ratio, quantile
from llumnix.sim.workloads.named_files import named_file

OUT = ROOT / "benchmarks/results/sim/prompt_steps.json"
KV_TOKENS = {"h100-llama-7b": 110_000, "h200-llama-8b": 0}
"""By profile; 0 for the profile's. That of the H100 has the paper's small memory."""
SECONDS = {2: 20.0, 8: 10.0}
"""Of arrivals, by instances."""
WARM_S = 5.0
"""What comes before is in no figure: the scheduler knows nothing yet of answers and steps."""
# Load, trace, requests a second and instance.
TRACES = (
    ("mooncake spread", "mooncake-conversation", 1.0),
    ("mooncake bursts", "mooncake-conversation", 1.0),
    ("azure-code", "azure-code", 3.5),
    ("sharegpt", "sharegpt", 9.0),
    ("M-M", "M-M", 12.0),
    ("L-S", "L-S", 15.0),
)
MADE = ("mixed", "turning")
LOADS = (*(load for load, _, _ in TRACES), *MADE)
FLEETS = {
    ("h200-llama-8b", 2): LOADS,
    ("h200-llama-8b", 8): ("mixed",),
    ("h100-llama-7b", 2): ("mixed",),
}
"""The loads of each profile and number of instances."""
LONG, LONG_ANSWER = 16_384, 64
"""Tokens of a long prompt, and of its answer."""
LONG_SHARE = 0.3
"""Of an instance's time, in steps with long prompts, in `mixed`."""
STREAMS = 24
"""Chats at a time on each instance, if there is nothing else."""
CHAT, CHAT_ANSWER = (200, 500), (150, 400)
"""Tokens of a chat's prompt and of its answer, from and to."""
BUDGETS = (8192, 2048, 1024, 512)
BASE = str(BUDGETS[0])
VARIANTS = (*map(str, BUDGETS), "bound")
# Title, name of the figure.
COLUMNS = (
    ("TPOT mean", "tpot"),
    ("TPOT P99", "tpot99"),
    ("gap P99", "gap99"),
    ("TTFT mean", "ttft"),
    ("TTFT P99", "ttft99"),
    ("e2e mean", "e2e"),
)
CHATS = (("chats' TPOT P99", "chats_tpot99"), ("long prompts' TTFT P99", "long_ttft99"))
"""More of `mixed` and `turning`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run."""

    load: str
    profile: str
    instances: int
    seed: int
    variant: str


def spec(task: Task) -> Spec:
    """What is simulated. Loads of `MADE` have a trace of no name, and requests of their own."""
    profile = load_profile(task.profile)
    trace, rate = next(((t, r) for load, t, r in TRACES if load == task.load), ("", 0.0))
    if task.load == "mooncake bursts":
        trace = str(named_file(trace, None))
    rate *= task.instances
    return Spec(
        scheduler=SchedulerSettings(),
        profile=free_prompts(profile) if task.variant == "bound" else profile,
        engine=EngineOptions(
            kv_tokens=KV_TOKENS[task.profile],
            budget=BUDGETS[0] if task.variant == "bound" else int(task.variant),
        ),
        instances=task.instances,
        start_s=None,
        trace=trace,
        rate_per_s=rate or None,
        requests=round(rate * SECONDS[task.instances]),
        seed=task.seed,
    )


def free_prompts(profile: Profile) -> Profile:
    """The same engine, whose prompts take no time."""
    return replace(profile, prompt_s=0.0, prompt_context_s=0.0, overlap_s=0.0, prompts_least_s=0.0)


def made(task: Task) -> list[Job]:
    """Chats and long prompts together (`mixed`), or long ones, twice as many, for the first half of
    the time and chats for the other (`turning`)."""
    profile, dice = load_profile(task.profile), random.Random(f"{task.seed} {task.load}")
    end_s, turning = SECONDS[task.instances], task.load == "turning"
    context = (sum(CHAT) + sum(CHAT_ANSWER) / 2) / 2
    # A chat takes its decode steps, and each chat of the batch waits for the prompts of the others.
    each_s = sum(CHAT_ANSWER) / 2 * profile.decode(STREAMS, STREAMS * context)
    each_s += STREAMS * (profile.prefill(sum(CHAT) // 2) - profile.step_s)
    chats = task.instances * STREAMS / each_s
    longs = task.instances * LONG_SHARE / profile.prefill(LONG)
    drawn = []
    for at_s in _poisson(dice, chats, end_s / 2 if turning else 0.0, end_s):
        drawn.append((at_s, dice.randint(*CHAT), dice.randint(*CHAT_ANSWER)))
    for at_s in _poisson(dice, longs * (1 + turning), 0.0, end_s / (1 + turning)):
        drawn.append((at_s, LONG, LONG_ANSWER))
    return [
        Job(id=RequestId(f"r{number}"), arrived_s=at_s, prompt=prompt, answer=answer)
        for number, (at_s, prompt, answer) in enumerate(sorted(drawn))
    ]


def _poisson(dice: random.Random, rate: float, begin_s: float, end_s: float) -> list[float]:
    times = [begin_s + dice.expovariate(rate)]
    while times[-1] < end_s:
        times.append(times[-1] + dice.expovariate(rate))
    return times[:-1]


def run(task: Task) -> dict[str, Any]:
    """Its figures, in seconds but for the counts."""
    one = spec(task)
    jobs = made(task) if task.load in MADE else one.jobs()
    cluster, gaps, last_s = Cluster(one.setup()), [], {}
    receive = cluster.clients.receive

    def timed(engine: Any, tokens: Any, now: float) -> Any:
        for request, _ in tokens:
            if request in last_s and now >= WARM_S:
                gaps.append(now - last_s[request])
            last_s[request] = now
        return receive(engine, tokens, now)

    cluster.clients.receive = timed  # type: ignore[method-assign]
    cluster.run(jobs)
    jobs = [job for job in jobs if job.arrived_s >= WARM_S]
    found = figures_of(jobs)
    figures = {
        "tpot": found["tpot_s"]["mean"],
        "tpot99": found["tpot_s"]["p99"],
        "gap99": quantile(gaps, 0.99),
        "ttft": found["ttft_s"]["mean"],
        "ttft99": found["ttft_s"]["p99"],
        "e2e": found["e2e_s"]["mean"],
        "preemptions": cluster.preemptions,
        "moves": sum(m.outcome == "migrated" for m in cluster.clients.moves),
        "failed": found["requests_failed"],
    }
    if task.load in MADE:
        chats = figures_of([job for job in jobs if job.prompt != LONG])
        longs = figures_of([job for job in jobs if job.prompt == LONG])
        figures["chats_tpot99"] = chats["tpot_s"]["p99"]
        figures["long_ttft99"] = longs["ttft_s"]["p99"]
    known = {"load": task.load, "profile": task.profile, "instances": task.instances}
    rounded = {name: round(value, 6) for name, value in figures.items()}
    return {**known, "seed": task.seed, "variant": task.variant, "figures": rounded}


def compared(rows: Sequence[dict[str, Any]]) -> str:
    """Each variant's ratios to vLLM's own budget, load by load, over profiles, instances and
    seeds."""
    columns = (*COLUMNS, *CHATS)
    found = {_pair(r, r["variant"]): r["figures"] for r in rows}
    cells = []
    for load in dict.fromkeys(r["load"] for r in rows):
        for variant in dict.fromkeys(r["variant"] for r in rows):
            pairs = [
                (r["figures"], found[_pair(r, BASE)])
                for r in rows
                if r["load"] == load and r["variant"] == variant and _pair(r, BASE) in found
            ]
            if variant != BASE and pairs:
                ratios = (
                    format_ratio(*([p[side].get(name) for p in pairs] for side in (0, 1)))
                    for _, name in columns
                )
                cells.append([load, variant, str(len(pairs)), *ratios])
    head = ["load", f"variant : {BASE}", "pairs", *(title for title, _ in columns)]
    return markdown(head, cells)


def _pair(row: dict[str, Any], variant: str) -> tuple[Any, ...]:
    return row["load"], row["profile"], row["instances"], row["seed"], variant


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", type=seed_range, default="40:44", help="N or FIRST:END")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--runs", type=Path, help="JSON lines; runs that stand there are kept")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    tasks = [
        Task(load=load, profile=profile, instances=instances, seed=seed, variant=variant)
        for seed in args.seeds
        for (profile, instances), loads in FLEETS.items()
        for load in loads
        if load in args.loads.split(",")
        for variant in args.variants.split(",")
    ]
    calls = {astuple(task): (task,) for task in tasks}
    rows = simulate_all(run, calls, lambda r: _pair(r, r["variant"]), args.processes, args.runs)
    table = compared(rows)
    print(table)
    write_result(args.out, rows, table=table.split("\n"))


if __name__ == "__main__":
    main()
