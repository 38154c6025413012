"""What a report is made from: the simulator's results, sorted by setting, averaged over seeds.

The result is plain JSON-able data, described by the TypedDicts below; whatever was not measured is
null or left out. Durations are in seconds, shares between 0 and 1. Every run of one trace, number
of instances and rate belongs to one setting, in which policies are compared.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, TypedDict

from llumnix.sim.summary import half_interval

POINTS_MAX = 600
"""Points that are drawn of one line; longer series are averaged down to that."""


class InstanceSeries(TypedDict):
    """One instance at each sample: share of its KV memory in use, requests that run and wait; null
    while it does not exist."""

    kv_used: list[float | None]
    running: list[int | None]
    waiting: list[int | None]


class MigrationSpan(TypedDict):
    """One migration. `ended_s` and `destination` are null where there was none; `waiting`: the
    request had not started yet, so no KV was copied; `outcome`: migrated or aborted."""

    t_s: float
    ended_s: float | None
    request: str
    source: str
    destination: str | None
    tokens: int | None
    waiting: bool
    outcome: str
    why: str


class DecisionLine(TypedDict):
    """One line of the decision log. `kind`: dispatch, move, add, drain, undrain or fault."""

    t_s: float
    kind: str
    what: str
    why: str


class Details(TypedDict, total=False):
    """The inside of one run. `t_s` are the times of the samples, to which `instances`,
    `fragmentation` (a share) and `serving` (instances that serve) belong; `ttft_s` and `tpot_s`
    have one value a request."""

    t_s: list[float]
    instances: dict[str, InstanceSeries]
    fragmentation: list[float | None]
    serving: list[int | None]
    migrations: list[MigrationSpan]
    decisions: list[DecisionLine]
    ttft_s: list[float | None]
    tpot_s: list[float | None]


class Run(TypedDict, total=False):
    """One simulated run.

    `metrics` has `ttft_s`, `tpot_s` and `e2e_s`, each `{"mean", "p50", "p99"}`;
    `preemption_loss_s` and `fragmentation_blocked` (a share), each `{"mean"}`; `instances_mean`,
    `migrations`, `preemptions`, `requests_done`, `requests_failed`; and, if requests had classes,
    `classes`: for each class the first three. `details` are kept of some runs only."""

    policy: str
    trace: str
    rate: float
    seed: int
    instances: int
    metrics: dict[str, Any]
    details: Details


class Result(TypedDict, total=False):
    """What a simulation gives: its runs, the seconds it took, and what the page should tell of it
    (such as profile and command), by name."""

    runs: list[Run]
    wall_s: float
    told: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over `seeds` values, and half its 95 % interval (None for a single value)."""

    mean: float
    half: float | None
    seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The runs of one trace, number of instances and rate, by policy. `workload` names the first
    two."""

    trace: str
    instances: int | None
    rate: float | None
    runs: Mapping[str, Sequence[Run]]

    @property
    def workload(self) -> str:
        return self.trace + (f", {count(self.instances, 'instance')}" if self.instances else "")

    def details(self, policy: str) -> Details | None:
        """Those of the policy's first run that has any."""
        return next((d for r in self.runs.get(policy, ()) if (d := r.get("details"))), None)


def settings_of(runs: Iterable[Run]) -> list[Setting]:
    """The settings, by workload in order of appearance and then by rate."""
    sorted_runs: dict[tuple[str, int | None, float | None], dict[str, list[Run]]] = {}
    workloads: list[tuple[str, int | None]] = []
    for run in runs:
        workload = (str(run.get("trace") or "a trace"), run.get("instances"))
        if workload not in workloads:
            workloads.append(workload)
        by_policy = sorted_runs.setdefault((*workload, number(run.get("rate"))), {})
        by_policy.setdefault(str(run.get("policy", "")), []).append(run)
    settings = [
        Setting(trace=trace, instances=instances, rate=rate, runs=by_policy)
        for (trace, instances, rate), by_policy in sorted_runs.items()
    ]
    return sorted(
        settings,
        key=lambda s: (workloads.index((s.trace, s.instances)), -1.0 if s.rate is None else s.rate),
    )


def metric(metrics: Mapping[str, Any] | None, *path: str) -> float | None:
    """The figure at the end of the path, None if there is none."""
    at: Any = metrics
    for name in path:
        at = at.get(name) if isinstance(at, Mapping) else None
    return number(at)


def estimate(runs: Iterable[Run], *path: str) -> Estimate | None:
    """A figure's mean over the runs, with its 95 % t-interval; None if no run has it."""
    values = [v for r in runs if (v := metric(r.get("metrics"), *path)) is not None]
    if not values:
        return None
    return Estimate(mean=fmean(values), half=half_interval(values), seeds=len(values))


def number(value: Any) -> float | None:
    """The value as a finite number, else None."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    return None


def short(value: Any, scale: float = 1.0) -> float | None:
    """Four digits are what a plot can show."""
    known = number(value)
    return None if known is None else float(f"{known * scale:.4g}")


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts i10 after i9."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]


def count(number: int, thing: str) -> str:
    """`3 instances`, `1 instance`."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def bucket(samples: int) -> int:
    """How many samples go into one point, so that no more than `POINTS_MAX` are drawn."""
    return max(1, math.ceil(samples / POINTS_MAX))


def mean_of(values: Sequence[Any]) -> float | None:
    known = [v for v in values if number(v) is not None]
    return fmean(known) if known else None


def last_of(values: Sequence[Any]) -> float | None:
    return number(values[-1])


def thin(
    values: Sequence[Any], size: int, take: Callable[[Sequence[Any]], float | None] = mean_of
) -> list[float | None]:
    """One value for each `size` values."""
    if size == 1:
        return [number(v) for v in values]
    return [take(values[i : i + size]) for i in range(0, len(values), size)]


def evenly(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly picked, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def distribution(values: Iterable[Any]) -> tuple[list[float], list[float]]:
    """The values in order and the share of all (in %) up to each: at most `POINTS_MAX` steps, a
    third of them in the last twentieth, where a P99 is."""
    known = sorted(v for v in values if number(v) is not None)
    if not known:
        return [], []
    marks = sorted(
        {0.95 * i / (POINTS_MAX * 2 // 3) for i in range(POINTS_MAX * 2 // 3)}
        | {0.95 + 0.05 * i / (POINTS_MAX // 3 - 1) for i in range(POINTS_MAX // 3)}
    )
    ranks = sorted({round(mark * (len(known) - 1)) for mark in marks})
    return [known[r] for r in ranks], [100 * (r + 1) / len(known) for r in ranks]


def waited(details: Details) -> bool:
    """Whether any request was seen waiting."""
    series = (details.get("instances") or {}).values()
    return any(n for one in series for n in one.get("waiting") or ())


def changes(values: Iterable[Any]) -> bool:
    """Whether there are different values among them."""
    known = [v for v in values if v is not None]
    return any(a != b for a, b in pairwise(known))
