"""The data of a report: the simulator's results by setting, and their means over seeds.

A setting is a trace, a number of instances and a rate; in it policies are compared. A result is
plain data that JSON can hold, as the TypedDicts below say. What was not measured is null or left
out. Durations are in seconds, shares between 0 and 1.
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
"""Points of one line in a plot. Longer series are averaged down to that many."""


class InstanceSeries(TypedDict):
    """One instance at each sample; null while it does not exist."""

    kv_used: list[float | None]  # share of its KV memory
    running: list[int | None]  # requests
    waiting: list[int | None]  # requests


class MigrationSpan(TypedDict):
    """One migration."""

    t_s: float  # when it began
    ended_s: float | None  # null if it did not end
    request: str
    source: str
    destination: str | None  # null if none was found
    tokens: int | None
    waiting: bool  # the request had not started yet, so no KV was copied
    outcome: str  # migrated or aborted
    why: str


class DecisionLine(TypedDict):
    """One line of the decision log."""

    t_s: float
    kind: str  # dispatch, move, add, drain, undrain or fault
    what: str
    why: str


class Details(TypedDict, total=False):
    """One run over time and by request."""

    t_s: list[float]  # times of the samples
    instances: dict[str, InstanceSeries]  # at each sample
    fragmentation: list[float | None]  # share of all KV memory, at each sample
    serving: list[int | None]  # instances that serve, at each sample
    migrations: list[MigrationSpan]
    decisions: list[DecisionLine]
    ttft_s: list[float | None]  # of each request
    tpot_s: list[float | None]  # of each request


class Run(TypedDict, total=False):
    """One simulated run.

    `metrics` has
    - `ttft_s`, `tpot_s` and `e2e_s`, each `{"mean", "p50", "p99"}`,
    - `preemption_loss_s` and `fragmentation_blocked` (a share), each `{"mean"}`,
    - `instances_mean`, `migrations`, `preemptions`, `requests_done`, `requests_failed`,
    - `classes`, if requests had classes: for each class the first three."""

    policy: str
    trace: str
    rate: float  # requests/s
    seed: int
    instances: int
    metrics: dict[str, Any]
    details: Details  # kept of some runs only


class Result(TypedDict, total=False):
    """What a simulation gives."""

    runs: list[Run]
    wall_s: float  # what it took
    about: dict[str, str]  # what the page says of it, such as profile and command, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half: float | None  # half of its 95 % t-interval; None for a single value
    seeds: int  # values


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The runs of one trace, number of instances and rate."""

    trace: str
    instances: int | None
    rate: float | None  # requests/s
    runs: Mapping[str, Sequence[Run]]  # by policy

    @property
    def workload(self) -> str:
        """The name of trace and number of instances."""
        return self.trace + (f", {count(self.instances, 'instance')}" if self.instances else "")

    def details(self, policy: str) -> Details | None:
        """The details of the policy's first run that has any."""
        return next((d for r in self.runs.get(policy, ()) if (d := r.get("details"))), None)


def settings_of(runs: Iterable[Run]) -> list[Setting]:
    """The settings of the runs, by workload in order of appearance and then by rate."""
    sorted_runs: dict[tuple[str, int | None, float | None], dict[str, list[Run]]] = {}
    workloads: list[tuple[str, int | None]] = []
    for run in runs:
        workload = (str(run.get("trace") or "a trace"), run.get("instances"))
        if workload not in workloads:
            workloads.append(workload)
        by_policy = sorted_runs.setdefault((*workload, finite(run.get("rate"))), {})
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
    """The figure at the end of the path; None if there is none."""
    found: Any = metrics
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return finite(found)


def estimate(runs: Iterable[Run], *path: str) -> Estimate | None:
    """A figure's mean over the runs, with its 95 % t-interval; None if no run has it."""
    values = [v for r in runs if (v := metric(r.get("metrics"), *path)) is not None]
    if not values:
        return None
    return Estimate(mean=fmean(values), half=half_interval(values), seeds=len(values))


def finite(value: Any) -> float | None:
    """The value as a finite number, else None."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    return None


def four_digits(value: Any, scale: float = 1.0) -> float | None:
    """The value times `scale`, with the digits that a plot can show."""
    known = finite(value)
    return None if known is None else float(f"{known * scale:.4g}")


def natural_key(name: str) -> list[tuple[int, str]]:
    """A sort key by which i10 comes after i9."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]


def count(number: int, thing: str) -> str:
    """`3 instances`, `1 instance`."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def samples_per_point(samples: int) -> int:
    """How many samples make one point, so that a line has at most `POINTS_MAX`."""
    return max(1, math.ceil(samples / POINTS_MAX))


def mean_of(values: Sequence[Any]) -> float | None:
    """The mean of those that are numbers; None if none is."""
    known = [v for v in values if finite(v) is not None]
    return fmean(known) if known else None


def last_of(values: Sequence[Any]) -> float | None:
    """The last value, if it is a number."""
    return finite(values[-1])


def downsampled(
    values: Sequence[Any], size: int, reduce: Callable[[Sequence[Any]], float | None] = mean_of
) -> list[float | None]:
    """One value for each `size` values, as `reduce` makes it of them."""
    if size == 1:
        return [finite(v) for v in values]
    return [reduce(values[i : i + size]) for i in range(0, len(values), size)]


def evenly_picked(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the values, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def distribution(values: Iterable[Any]) -> tuple[list[float], list[float]]:
    """A cumulative distribution: values in order, and the share of all in % up to each.

    It has at most `POINTS_MAX` steps. A third of them are in the last 5 %, where a P99 is."""
    known = sorted(v for v in values if finite(v) is not None)
    if not known:
        return [], []
    marks = sorted(
        {0.95 * i / (POINTS_MAX * 2 // 3) for i in range(POINTS_MAX * 2 // 3)}
        | {0.95 + 0.05 * i / (POINTS_MAX // 3 - 1) for i in range(POINTS_MAX // 3)}
    )
    ranks = sorted({round(mark * (len(known) - 1)) for mark in marks})
    return [known[r] for r in ranks], [100 * (r + 1) / len(known) for r in ranks]


def has_waiting(details: Details) -> bool:
    """Whether a request waited at any sample."""
    series = (details.get("instances") or {}).values()
    return any(n for one in series for n in one.get("waiting") or ())


def differ(values: Iterable[Any]) -> bool:
    """Whether any two of the values differ."""
    known = [v for v in values if v is not None]
    return any(a != b for a, b in pairwise(known))
