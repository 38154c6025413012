"""What is made of reports and of the fleet at a scrape."""

from dataclasses import replace
from typing import Any

import pytest

from llumnix.core.priorities import Priorities
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.load import derive
from llumnix.core.settings import PrioritySettings
from llumnix.core.supervision.frontends import FrontendStatus
from llumnix.core.supervision.lifecycle import InstanceStatus, LifeState
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.observe import fleet_metrics, metrics
from llumnix.observe.fleet_metrics import FleetAtScrape, FleetMetrics
from llumnix.wire import Loads

PRIORITIES = Priorities(PrioritySettings())
BUILD = {"version": "1", "vllm": "0.32", "ray": "2.60", "policy": "llumnix"}
Found = dict[tuple[str, ...], float]


def instance(n: int, state: str = "serving", **more: Any) -> InstanceStatus:
    given: dict[str, Any] = {
        "id": InstanceId(f"i{n}"), "state": state, "hung": state == "hung",
        "engine_index": EngineIndex(n), "node": "10.0.0.1", "pid": 7, "devices": ["0", "1"],
        "restarts": 0, "why": None,
    }  # fmt: skip
    return InstanceStatus(**(given | more))


def report(n: int, **more: Any) -> LoadReport:
    given: dict[str, Any] = {
        "instance": InstanceId(f"i{n}"), "engine_index": EngineIndex(n), "sequence": 1,
        "kv_tokens_used": 300, "kv_tokens_total": 1000,
        "classes": (ClassLoad(running=1, waiting=2), ClassLoad(running=2)),
    }  # fmt: skip
    return LoadReport(**(given | more))


class World:
    def __init__(self) -> None:
        self.figures = FleetMetrics(PRIORITIES, BUILD)
        self.instances = [instance(0), instance(1)]
        self.loads: Loads | None = Loads(number=1, reports=[report(0), report(1)])

    async def scrape(self) -> Found:
        frontend = FrontendStatus(id="f0", state="serving", pid=1, restarts=2, why=None)
        seen = FleetAtScrape(
            instances=self.instances, frontends=[frontend], controller_starts=3, loads=self.loads
        )
        return {
            (sample.name.removeprefix("llumnix_"), *sample.labels.values()): sample.value
            for family in [f async for f in self.figures.families(seen)]
            for sample in family.samples
            if not sample.name.endswith("_created")
        }


async def test_names_and_labels_are_those_of_the_registry_and_none_is_missing() -> None:
    world = World()
    seen = FleetAtScrape(
        instances=world.instances, frontends=[], controller_starts=1, loads=world.loads
    )
    found = [f async for f in world.figures.families(seen)]
    counted = {m.describe()[0].name for m, _ in metrics._COUNTED}
    made = {n for n in metrics.FAMILIES if n.removesuffix("_total") not in counted}
    assert {f.name + "_total" * (f.type == "counter") for f in found} == made
    for family in found:
        one = metrics.FAMILIES[family.name + "_total" * (family.type == "counter")]
        assert (family.type, family.documentation) == (one.kind, one.help)
        assert family.samples
        assert all(list(s.labels) == list(one.labels) for s in family.samples)


async def test_each_instance_and_the_fleet_as_one_server() -> None:
    found = await World().scrape()
    assert found["build_info", "1", "0.32", "2.60", "llumnix"] == 1
    assert found["instance_info", "0", "i0", "10.0.0.1", "0,1"] == 1
    assert found["instances", "serving"] == 2
    assert found["instances", "failed"] == 0
    assert found["instance_kv_used_tokens", "1"] == 300
    assert found["instance_kv_capacity_tokens", "1"] == 1000
    assert found["instance_requests", "0", "running"] == 3
    assert found["instance_requests", "0", "waiting"] == 2
    assert found["requests_running",] == 6
    assert found["requests_waiting",] == 4
    assert found["kv_usage_ratio",] == 0.3
    assert found["class_requests", "high", "running"] == 2
    assert found["class_requests", "normal", "running"] == 4
    load = derive(report(0), (), 0)
    kept = PRIORITIES.needed(0.3)  # All use 300 of 1,000 tokens.
    spare = load.spare(kept)
    assert kept.headroom_max < PRIORITIES.headroom_max
    assert found["instance_freeness_tokens", "0"] == load.freeness(kept)
    assert found["instance_virtual_usage_tokens", "0"] == 1000 - spare
    assert found["mean_freeness_tokens",] == 2 * spare / 10
    assert found["frontend_processes", "serving"] == 1
    assert found["frontend_restarts_total",] == 2
    assert found["controller_starts_total",] == 3


async def test_one_that_is_drained_or_hung_has_no_freeness_and_a_dead_one_nothing() -> None:
    world = World()
    world.instances = [
        instance(0, "draining"), instance(1, "hung"), instance(2, "restarting"),
    ]  # fmt: skip
    world.loads = Loads(
        number=1, reports=[report(0, accepting=False), report(1), report(2)]
    )  # fmt: skip
    found = await world.scrape()
    assert {k[1] for k in found if k[0] == "instance_freeness_tokens"} == set()
    assert {k[1] for k in found if k[0] == "instance_kv_used_tokens"} == {"0", "1"}
    assert found["instances", "serving"] == 1
    assert found["instances", "draining"] == 1
    assert found["instances", "restarting"] == 1


async def test_without_a_controller_what_comes_from_reports_is_absent_and_totals_stay() -> None:
    world = World()
    lost = (ClassLoad(running=1, preempted=4), ClassLoad())
    world.loads = Loads(
        number=1, reports=[report(0, classes=lost)], busy_s=1.5, facts={"Tick": 9}
    )  # fmt: skip
    await world.scrape()
    world.loads = None
    found = await world.scrape()
    assert not [k for k in found if k[0].startswith(("instance_kv", "instance_req", "requests_"))]
    assert found["instances", "serving"] == 2
    assert found["preemptions_total", "high"] == 4
    assert found["controller_busy_seconds_total",] == 1.5
    assert found["controller_facts_total", "Tick"] == 9


async def test_totals_never_fall_when_a_controller_or_an_engine_is_started_anew() -> None:
    world = World()

    def lost(n: int) -> tuple[ClassLoad, ...]:
        return (ClassLoad(preempted=n), ClassLoad())

    world.loads = Loads(number=1, reports=[report(0, classes=lost(4))], facts={"Tick": 9})
    await world.scrape()
    again = replace(report(0, classes=lost(1)), engine_index=EngineIndex(5))
    world.instances = [instance(0, engine_index=EngineIndex(5))]
    world.loads = Loads(number=2, reports=[again], facts={"Tick": 2})
    found = await world.scrape()
    assert found["preemptions_total", "high"] == 5
    assert found["controller_facts_total", "Tick"] == 11


async def test_lines_that_event_logs_lost_are_counted_by_their_writer() -> None:
    def lost(writer: str) -> float:
        return metrics.EVENT_LOG_DROPPED.labels(writer)._value.get()

    world, before = World(), (lost("controller"), lost("engine"))
    for lines in (3, 5):
        reports = [report(0, log_dropped=lines), report(1, log_dropped=1)]
        world.loads = Loads(number=1, reports=reports, log_dropped=2 * lines)
        await world.scrape()
    assert (lost("controller") - before[0], lost("engine") - before[1]) == (10, 6)


async def test_the_age_of_the_last_step_grows_though_no_report_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(fleet_metrics.time, "monotonic", lambda: now)
    world = World()
    idle = report(1, classes=(ClassLoad(), ClassLoad()))
    world.loads = Loads(number=1, reports=[report(0, stalled_s=0.5), idle])
    found = await world.scrape()
    assert found["instance_last_step_age_seconds", "0"] == 0.5
    now = 107.0
    found = await world.scrape()
    assert found["instance_last_step_age_seconds", "0"] == 7.5
    assert found["instance_last_step_age_seconds", "1"] == 0
    world.loads = Loads(number=2, reports=[report(0, sequence=2, stalled_s=0.1)])
    age_s = (await world.scrape())["instance_last_step_age_seconds", "0"]
    assert age_s == pytest.approx(0.1)


def test_every_state_of_an_instance_is_counted_as_one() -> None:
    shown = {*metrics.INSTANCES.labels["state"]}
    assert {s.value for s in LifeState} - {"gone"} == shown
