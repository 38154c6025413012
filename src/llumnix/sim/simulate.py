"""Runs of the simulator and their figures: what `llumnix simulate` does.

Figures of a run (times in seconds). benchmarks/live.py has the same for real engines, but it
estimates `preemption_loss_s` from gaps between tokens, and does not count instances that start in
`instances_mean`.
- ttft_s, e2e_s: from a request's arrival to its first and its last token at the client; tpot_s:
  between the two, a token. Of requests that ended. worst1: the mean of the worst 1 %.
- preemption_loss_s: the time from a preemption to the next token, over requests that ended.
- fragmentation_blocked: the share of all KV memory that is free and would satisfy heads of queues
  that do not fit where they are, if it were in one place (heads in ascending order while they fit).
- kv_used, waiting: share of KV memory in use, requests in queues; like fragmentation_blocked
  sampled over the time of arrivals.
- instances_mean: over the whole run, those that start included.
- requests_failed: those that did not end, but for those whose client hung up.
- survival, with faults: streams that other engines went on with after theirs died, and how often;
  streams that ended with their engine; pause_s: from the death to the next token, of each revival;
  slowed_s: what steps took longer since they computed such requests again, of each other request
  that was in such a step.
"""

import itertools
import operator
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llumnix.core.events import Decision, Dispatch, Fact, MoveOrder, NoInstance
from llumnix.core.prefixes import BLOCK_TOKENS
from llumnix.core.scheduling.presets import priorities_of
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import InstanceId, RequestId
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.checks import check_view, come_to_rest
from llumnix.sim.model.clients import ENGINE_DIED, HUNG_UP
from llumnix.sim.model.clock import TICKS
from llumnix.sim.model.cluster import Cluster, Setup
from llumnix.sim.model.faults import FaultInjector, Faults
from llumnix.sim.model.jobs import Job
from llumnix.sim.model.profile import Profile
from llumnix.sim.static_batches import serve_static
from llumnix.sim.summary import satisfied, spread, spread_and_tail
from llumnix.sim.workloads.workload import Workload

SAMPLES = 400
"""Looks at the instances during the time of arrivals, evenly."""
DECISIONS_MAX = 1000
"""Decisions of each kind that a run's details keep: the last ones."""
DISPATCHES_MAX = 250
"""Dispatches that they keep: the first ones."""

T = TypeVar("T")
Run = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One run. `scheduler.policy` is its policy; `rate_per_s` None for the trace's own."""

    scheduler: SchedulerSettings
    profile: Profile
    engine: EngineOptions
    instances: int
    start_s: float | None
    trace: str
    rate_per_s: float | None
    requests: int
    seed: int
    cv: float | None = None
    scale: float = 1.0
    high_share: float = 0.0
    folder: str | Path | None = None
    faults: Faults | None = None
    details: bool = False
    static: str | None = None  # a published policy (static_batches.py), not the scheduler's

    @property
    def policy(self) -> str:
        """The name of its policy."""
        return self.static or self.scheduler.policy

    def setup(self) -> Setup:
        """What the cluster is."""
        return Setup(
            scheduler=self.scheduler,
            profile=self.profile,
            engine=self.engine,
            instances=self.instances,
            start_s=self.start_s,
        )

    def jobs(self) -> list[Job]:
        """The requests, in order of arrival."""
        block = self.profile.block_tokens
        tokens = (self.engine.kv_tokens or self.profile.kv_tokens) // block * block
        workload = Workload(
            trace=self.trace,
            requests=self.requests,
            rate_per_s=self.rate_per_s,
            cv=self.cv,
            scale=self.scale,
            # Some room for what grows beside it, and for a migration's reserve.
            tokens_max=int(tokens * 0.95),
            high_share=self.high_share,
            folder=self.folder,
        )
        classes = priorities_of(self.scheduler)
        urgent = classes.resolve(0, classes.classes[0].name)
        shared = max(BLOCK_TOKENS, block)
        return [
            Job(
                id=RequestId(f"r{number}"),
                arrived_s=a.at_s,
                prompt=a.prompt_tokens,
                answer=a.output_tokens,
                high=a.high,
                priority=urgent if a.high else 0,
                prefix=a.blocks(shared) if a.prefix else (),
                prefix_blocks=shared // block if a.prefix else 0,
            )
            for number, a in enumerate(workload.draw(self.seed))
        ]


@dataclass(slots=True)
class Sampler:
    """What is seen of a cluster over time."""

    cluster: Cluster
    every_s: float
    until_s: float
    t_s: list[float] = field(default_factory=list)
    instances: dict[InstanceId, dict[str, list[Any]]] = field(default_factory=dict)
    fragmentation: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    serving: list[int] = field(default_factory=list)

    def sample(self) -> None:
        """Takes a sample, and comes back."""
        there = list(self.cluster.instances.values())
        total = free = waiting = 0
        heads: list[int] = []
        for instance in there:
            engine = instance.engine
            block, memory = engine.block_tokens, engine.memory
            total += memory.total * block
            free += memory.free * block
            waiting += engine.waiting()
            head = engine.head_tokens()
            if head > memory.free * block:
                heads.append(head)
            seen = self.instances.setdefault(
                instance.id, {"kv_used": [], "running": [], "waiting": []}
            )
            for column in seen.values():
                column += [None] * (len(self.t_s) - len(column))
            seen["kv_used"].append(round(1 - memory.free / memory.total, 4))
            seen["running"].append(len(engine.running))
            seen["waiting"].append(engine.waiting())
        self.t_s.append(round(self.cluster.now, 3))
        self.fragmentation.append(satisfied(heads, free) / max(1, total))
        self.used.append(1 - free / max(1, total))
        self.waiting.append(waiting)
        self.serving.append(len(there))
        if self.cluster.now + self.every_s <= self.until_s:
            self.cluster.clock.at(self.cluster.now + self.every_s, TICKS, self.sample)

    def columns(self) -> dict[str, dict[str, list[Any]]]:
        """By instance; None where there was none."""
        for seen in self.instances.values():
            for column in seen.values():
                column += [None] * (len(self.t_s) - len(column))
        return {str(name): seen for name, seen in self.instances.items()}


class DecisionRecorder:
    """Keeps the decisions for the report: the last moves and changes, and the first dispatches."""

    def __init__(self) -> None:
        self._dispatches: list[dict[str, Any]] = []
        self._others: dict[str, deque[dict[str, Any]]] = {}  # by kind

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What is kept, in order of time."""
        kept = itertools.chain(self._dispatches, *self._others.values())
        return sorted(kept, key=operator.itemgetter("t_s"))

    def record(self, now: float, what: Fact | Decision) -> None:
        """Called with every fact and decision."""
        why = getattr(what, "why", None)
        if why is None or isinstance(what, NoInstance):
            return
        if isinstance(what, Dispatch):
            if len(self._dispatches) < DISPATCHES_MAX:
                text = f"{what.request} to {what.instance}"
                self._dispatches.append(_row_of(now, "dispatch", text, why))
            return
        if isinstance(what, MoveOrder):
            kind, text = "move", f"{what.source} to {what.destination}"
        else:
            kind = type(what).__name__.removesuffix("Instances").removesuffix("Instance").lower()
            text = str(getattr(what, "instance", None) or f"{getattr(what, 'count', '')} more")
        kept = self._others.setdefault(kind, deque(maxlen=DECISIONS_MAX))
        kept.append(_row_of(now, kind, text, why))


def _row_of(now: float, kind: str, what: str, why: str) -> dict[str, Any]:
    return {"t_s": round(now, 3), "kind": kind, "what": what, "why": why}


def run_one(spec: Spec) -> Run:
    """Simulates one run."""
    jobs = spec.jobs()
    if spec.static is not None:
        more = serve_static(spec.static, jobs, spec.profile, spec.engine, spec.instances)
        return _row(spec, figures_of(jobs) | more)
    decisions = DecisionRecorder()
    injector = FaultInjector(spec.faults, spec.seed) if spec.faults is not None else None
    cluster = Cluster(
        spec.setup(),
        record=decisions.record if spec.details else None,
        wire=injector.wire if injector is not None else None,
        check=check_view if injector is not None else None,
    )
    last_s = jobs[-1].arrived_s
    if injector is not None:
        injector.begin(cluster, last_s)
    sampler = Sampler(cluster, max(0.05, last_s / SAMPLES), last_s)
    cluster.clock.at(0.0, TICKS, sampler.sample)
    cluster.run(jobs)
    run_s = cluster.now
    figures = figures_of(jobs)
    moves = cluster.clients.moves
    fragmentation = {"mean": _mean(sampler.fragmentation)}
    figures |= {
        "fragmentation_blocked": fragmentation,
        "fragmentation": fragmentation,  # its name until the next release
        "kv_used": {"mean": _mean(sampler.used)},
        "waiting": {"mean": _mean(sampler.waiting)},
        "instances_mean": cluster.instance_s / run_s if run_s else spec.instances,
        "preemptions": cluster.preemptions,
        "migrations": sum(m.outcome == "migrated" for m in moves),
        "migrations_aborted": sum(m.outcome != "migrated" for m in moves),
        "virtual_s": run_s,
    }
    if injector is not None:
        come_to_rest(cluster)
        figures["faults"] = {
            "instances_crashed": injector.crashes,
            "controllers_crashed": injector.controller_crashes,
            "clients_hung_up": injector.hung_up,
        }
        figures["survival"] = survival_of(jobs, cluster.clients.pauses_s)
    figures |= _classes(jobs)
    run = _row(spec, figures)
    if spec.details:
        run["details"] = _details(sampler, cluster, decisions, jobs)
    return run


def _row(spec: Spec, figures: dict[str, Any]) -> Run:
    return {
        "policy": spec.policy,
        "trace": spec.trace if not Path(spec.trace).is_file() else Path(spec.trace).name,
        "rate": spec.rate_per_s,
        "cv": spec.cv,
        "seed": spec.seed,
        "instances": spec.instances,
        "metrics": figures,
    }


def runs(specs: Sequence[Spec], processes: int) -> Iterator[tuple[int, Run]]:
    """All of them on so many processes, in the order in which they end: each with its place."""
    return spread_over(run_one, [(spec,) for spec in specs], processes)


def spread_over(
    work: Callable[..., T], calls: Sequence[tuple[Any, ...]], processes: int
) -> Iterator[tuple[int, T]]:
    """What `work` returns for each call's arguments, on so many processes: in the order in which
    they end, each with its place. All of it has to go through pickle."""
    if processes <= 1 or len(calls) == 1:
        yield from enumerate(work(*call) for call in calls)
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    with ProcessPoolExecutor(min(processes, len(calls)), get_context("spawn")) as pool:
        places = {pool.submit(work, *call): place for place, call in enumerate(calls)}
        for future in as_completed(places):
            yield places[future], future.result()


def idle_bound(spec: Spec) -> dict[str, Any]:
    """The figures of the same requests if each had an idle instance of its own, with an empty
    prefix cache, and messages took no time: no policy serves requests that share no prefixes faster
    on such engines. With `classes` if any are urgent."""
    profile, options, jobs = spec.profile, spec.engine, spec.jobs()
    for job in jobs:
        now, computed = job.arrived_s, 0
        while computed < job.prompt:
            new = job.prompt - computed
            if options.chunked:
                new = min(new, options.budget)
            now += profile.prefill(new, computed)
            computed += new
        job.first_s = now
        # Contexts grow by one a step, so the mean step is that of the mean context.
        job.ended_s = now + (job.answer - 1) * profile.decode(1, job.prompt + job.answer / 2)
    return figures_of(jobs) | _classes(jobs)


def figures_of(jobs: Sequence[Job]) -> dict[str, Any]:
    """The figures that each class of requests has too."""
    done = [j for j in jobs if j.ended_s is not None]
    first = [j.first_s - j.arrived_s for j in done if j.first_s is not None]
    return {
        "ttft_s": spread_and_tail(first),
        "tpot_s": spread([t for j in done if (t := _tpot(j)) is not None]),
        "e2e_s": spread([j.ended_s - j.arrived_s for j in done if j.ended_s is not None]),
        "preemption_loss_s": {"mean": _mean([j.lost_s for j in done])},
        "requests_done": len(done),
        "requests_failed": sum(j.ended_s is None and j.error != HUNG_UP for j in jobs),
    }


def survival_of(jobs: Sequence[Job], pauses_s: Sequence[float]) -> dict[str, Any]:
    """What became of the streams of dead engines, and what that cost the others."""
    slowed = [job.slowed_s for job in jobs if job.slowed_s]
    return {
        "streams_revived": sum(job.revivals > 0 for job in jobs),
        "revivals": len(pauses_s),
        "streams_ended": sum(job.error == ENGINE_DIED for job in jobs),
        "pause_s": spread(pauses_s),
        "streams_slowed": len(slowed),
        "slowed_s": spread(slowed),
    }


def _classes(jobs: Sequence[Job]) -> dict[str, Any]:
    if not any(job.high for job in jobs):
        return {}
    kinds = (("high", True), ("normal", False))
    return {"classes": {name: figures_of([j for j in jobs if j.high is h]) for name, h in kinds}}


def _tpot(job: Job) -> float | None:
    if job.ended_s is None or job.first_s is None or job.answer < 2:
        return None
    return (job.ended_s - job.first_s) / (job.answer - 1)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _details(
    sampler: Sampler, cluster: Cluster, decisions: DecisionRecorder, jobs: Sequence[Job]
) -> dict[str, Any]:
    return {
        "t_s": sampler.t_s,
        "instances": sampler.columns(),
        "fragmentation": sampler.fragmentation,
        "serving": sampler.serving,
        "migrations": [
            {
                "t_s": round(m.t_s, 4),
                "ended_s": round(m.ended_s, 4),
                "request": m.request,
                "source": m.source,
                "destination": m.destination,
                "tokens": m.tokens,
                "waiting": m.waiting,
                "outcome": m.outcome,
                "why": m.why,
            }
            for m in cluster.clients.moves
        ],
        "decisions": decisions.rows,
        "ttft_s": [round(j.first_s - j.arrived_s, 4) for j in jobs if j.first_s is not None],
        "tpot_s": [round(t, 5) for j in jobs if (t := _tpot(j)) is not None],
    }
