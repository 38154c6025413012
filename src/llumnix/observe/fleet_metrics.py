"""The metrics of the fleet, made whenever somebody asks: instances, their load, the controller.

Without a controller all that comes from reports is absent. An old value would look like a new one.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llumnix.core.priorities import Priorities
from llumnix.core.reports import LoadReport
from llumnix.core.scheduling.headroom import kept_now
from llumnix.core.scheduling.load import Load, derive
from llumnix.core.supervision.frontends import FrontendStatus
from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.observe import metrics
from llumnix.observe.metrics import Family
from llumnix.wire import Loads

AT_ONCE = 100
"""Instances between two turns of the event loop."""
WITH_ENGINE = ("serving", "hung", "draining")
Values = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetAtScrape:
    """What the fleet and the controller say of themselves at one moment."""

    instances: list[InstanceStatus]
    frontends: list[FrontendStatus]
    controller_starts: int
    loads: Loads | None  # None: there is no controller to ask


class Rising:
    """Running totals of several sources, added up. What a source that was started anew counts is
    added to what the one before had."""

    def __init__(self) -> None:
        self._last: dict[object, float] = {}
        self.total = 0.0

    def add(self, source: object, value: float) -> float:
        """The source's newest value; returns by how much the total rises."""
        last = self._last.get(source, 0.0)
        rise = value - last if value >= last else value
        self.total += rise
        self._last[source] = value
        return rise


class _Steps:
    """Since when each engine makes no step. One that sends no report is followed here."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, float]] = {}  # sequence of its newest report, seen when

    def age_s(self, report: LoadReport, now: float) -> float:
        """Since its last step; 0 without requests, and while it stands still on purpose."""
        sequence, since_s = self._seen.get(report.engine_index, (-1, now))
        if sequence != report.sequence:
            since_s = now
            self._seen[report.engine_index] = (report.sequence, now)
        if report.in_call or not (report.running or report.waiting):
            return 0.0
        return report.stalled_s + now - since_s

    def forget(self, living: set[int]) -> None:
        self._seen = {engine: seen for engine, seen in self._seen.items() if engine in living}


class FleetMetrics:
    """Those of one deployment. `build`: versions and policy in use, by label."""

    def __init__(self, priorities: Priorities, build: Mapping[str, str]) -> None:
        self._priorities = priorities
        self._names = [c.name for c in priorities.classes]
        self._build = tuple(build[label] for label in metrics.BUILD_INFO.labels)
        self._steps = _Steps()
        self._preemptions = {name: Rising() for name in self._names}
        self._busy_s = Rising()
        self._dropped = Rising()
        self._facts = {fact: Rising() for fact in metrics.CONTROLLER_FACTS.labels["fact"]}

    def engines(self, seen: FleetAtScrape) -> set[str]:
        """The slots in which engines serve."""
        return {slot(one) for one in seen.instances if _has_engine(one)}

    async def families(self, seen: FleetAtScrape) -> AsyncIterator[Metric]:
        """All of them."""
        for family in self._fleet(seen):
            yield family
        if seen.loads is not None:
            async for family in self._load(seen.loads, seen.instances):
                yield family
        yield _made(
            metrics.PREEMPTIONS, (((name,), one.total) for name, one in self._preemptions.items())
        )
        yield _made(metrics.CONTROLLER_BUSY_S, [((), self._busy_s.total)])
        yield _made(
            metrics.CONTROLLER_FACTS, (((fact,), one.total) for fact, one in self._facts.items())
        )

    def _fleet(self, seen: FleetAtScrape) -> Iterable[Metric]:
        states = dict.fromkeys(metrics.INSTANCES.labels["state"], 0)
        for one in seen.instances:
            states["serving" if one.state == "hung" else one.state] += 1
        processes = dict.fromkeys(metrics.FRONTENDS.labels["state"], 0)
        for each in seen.frontends:
            processes[each.state] += 1
        yield _made(metrics.BUILD_INFO, [(self._build, 1)])
        yield _made(metrics.INSTANCES, (((state,), n) for state, n in states.items()))
        yield _made(
            metrics.INSTANCE_INFO,
            (
                ((slot(one), one.id, one.node or "", ",".join(one.devices)), 1)
                for one in seen.instances
                if _has_engine(one)
            ),
        )
        yield _made(metrics.FRONTENDS, (((state,), n) for state, n in processes.items()))
        yield _made(metrics.FRONTEND_RESTARTS, [((), sum(f.restarts for f in seen.frontends))])
        yield _made(metrics.CONTROLLER_STARTS, [((), seen.controller_starts)])

    async def _load(self, loads: Loads, instances: list[InstanceStatus]) -> AsyncIterator[Metric]:
        known = {(r.instance, r.engine_index): r for r in loads.reports}
        self._busy_s.add("", loads.busy_s)
        self._note_dropped("controller", "", loads.log_dropped)
        for fact, total in self._facts.items():
            total.add("", loads.facts.get(fact, 0))
        now = time.monotonic()
        rows: list[tuple[str, InstanceStatus, LoadReport, Load]] = []
        for number, one in enumerate(instances):
            if number % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
            report = None
            if one.engine_index is not None and _has_engine(one):
                report = known.get((one.id, one.engine_index))
            if report is not None:
                rows.append((slot(one), one, report, derive(report, (), 0)))
                self._note_dropped("engine", report.engine_index, report.log_dropped)
                for name, load in zip(self._names, report.classes, strict=False):
                    self._preemptions[name].add(report.engine_index, load.preempted)
        self._steps.forget({report.engine_index for _, _, report, _ in rows})
        kept = kept_now(self._priorities, (load for _, _, _, load in rows))
        for family in self._instances(rows, now, kept):
            yield family
            await asyncio.sleep(0)
        for family in self._sums(rows, kept):
            yield family

    def _note_dropped(self, writer: str, source: object, lines: int) -> None:
        """Counts lines that an event log lost whose process has no registry."""
        if rise := self._dropped.add((writer, source), lines):
            metrics.EVENT_LOG_DROPPED.labels(writer).inc(rise)

    def _instances(
        self, rows: list[tuple[str, InstanceStatus, LoadReport, Load]], now: float, kept: Priorities
    ) -> Iterable[Metric]:
        placed = [r for r in rows if r[2].accepting and not r[1].hung]
        yield _made(metrics.KV_USED, (((s,), r.kv_tokens_used) for s, _, r, _ in rows))
        yield _made(metrics.KV_CAPACITY, (((s,), r.kv_tokens_total) for s, _, r, _ in rows))
        yield _made(
            metrics.INSTANCE_REQUESTS,
            (
                ((s, phase), r.running if phase == "running" else r.waiting)
                for s, _, r, _ in rows
                for phase in metrics.PHASES
            ),
        )
        yield _made(metrics.STEP_AGE_S, (((s,), self._steps.age_s(r, now)) for s, _, r, _ in rows))
        yield _made(metrics.FREENESS, (((s,), load.freeness(kept)) for s, _, _, load in placed))
        yield _made(
            metrics.VIRTUAL_USAGE,
            (((s,), load.total - load.spare(kept)) for s, _, _, load in placed),
        )

    def _sums(
        self, rows: list[tuple[str, InstanceStatus, LoadReport, Load]], kept: Priorities
    ) -> Iterable[Metric]:
        reports = [report for _, _, report, _ in rows]
        used = sum(r.kv_tokens_used for r in reports)
        total = sum(r.kv_tokens_total for r in reports)
        yield _made(metrics.RUNNING, [((), sum(r.running for r in reports))])
        yield _made(metrics.WAITING, [((), sum(r.waiting for r in reports))])
        yield _made(metrics.KV_USAGE, [((), used / total)] if total else [])
        stay = [load for _, _, report, load in rows if report.accepting]
        requests = sum(load.batch + load.waiting for load in stay)
        spare = sum(load.spare(kept) for load in stay)
        yield _made(metrics.MEAN_FREENESS, [((), spare / max(1, requests))] if stay else [])
        yield _made(
            metrics.CLASS_REQUESTS,
            (
                ((name, phase), sum(getattr(r.classes[rank], phase) for r in reports if r.classes))
                for rank, name in enumerate(self._names)
                for phase in metrics.PHASES
            ),
        )


def slot(one: InstanceStatus) -> str:
    """The label `engine`, as vLLM's metrics have it. An instance is named after its slot
    (`Fleet._register`)."""
    return one.id.removeprefix("i")


def _has_engine(one: InstanceStatus) -> bool:
    return one.engine_index is not None and one.state in WITH_ENGINE


def _made(family: Family, values: Values) -> Metric:
    """A family of the registry with these values, each after the values of its labels."""
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    name = family.name.removesuffix("_total") if family.kind == "counter" else family.name
    metric: Metric = kind(name, family.help, labels=tuple(family.labels))
    for labels, value in values:
        metric.add_metric(labels, value)  # type: ignore[attr-defined]
    return metric
