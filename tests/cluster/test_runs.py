"""What a run does with Ray, on a fake Ray: beside the event loop, and nothing is left behind."""

import asyncio
import concurrent.futures
import operator
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import ray

from llumnix.cluster import ray_calls
from llumnix.cluster.supervision import places, runs
from llumnix.cluster.supervision.places import Places
from llumnix.cluster.supervision.runs import EngineLauncher, EngineRun
from llumnix.config import DeploymentConfig
from llumnix.core.settings import (
    MigrationSettings,
    PrioritySettings,
    QueueSettings,
    SchedulerSettings,
)
from llumnix.core.supervision.blame import Death
from llumnix.core.types import ENGINE_INDEX_MAX, EngineIndex, InstanceId
from llumnix.errors import LlumnixError

I0 = InstanceId("i0")


async def until(true: Callable[[], Any]) -> None:
    while not true():
        await asyncio.sleep(0.001)


class Method:
    """A method of an actor: `remote()` gives a reference to `answer`; a call of `ends` makes that
    of another method resolve."""

    def __init__(
        self, world: "FakeRay", name: str, answer: Any = None, ends: "Method | None" = None
    ) -> None:
        self.world, self.name, self.answer, self.ends = world, name, answer, ends
        self.done: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def remote(self, *args: Any) -> Any:
        self.world.call(self.name, *args)
        if isinstance(self.answer, BaseException):
            self.done.set_exception(self.answer)
        elif self.answer is not None and not self.done.done():
            self.done.set_result(self.answer)
        if self.ends is not None:
            self.ends.done.set_result("stopped")
        return Reference(self.done)


class Reference:
    def __init__(self, done: concurrent.futures.Future[Any]) -> None:
        self._done = done

    def future(self) -> concurrent.futures.Future[Any]:
        return self._done

    def __await__(self) -> Any:
        return asyncio.wrap_future(self._done).__await__()


class FakeRay:
    """`calls`: what was asked of Ray, with whether it was on the event loop's thread. `broken`
    names the calls that raise, `placed` says whether devices are to be had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: str | None = "GPU") -> None:
        self.calls: list[str] = []
        self.on_loop: set[str] = set()
        self.broken: set[str] = set()
        self.placed = threading.Event()
        self.placed.set()
        self.holds = threading.Event()  # Lets actors be made.
        self.holds.set()
        facts = SimpleNamespace(node="n", pid=1, devices=[], address="a", no_log=None)
        self.facts = facts
        run = Method(self, "run")
        self.actor = SimpleNamespace(
            describe=Method(self, "describe", facts),
            run=run,
            stop=Method(self, "stop", True, ends=run),
            accept=Method(self, "accept", True),
        )
        group = SimpleNamespace(wait=self._wait)

        def make(*_: Any) -> Any:
            self.holds.wait(10)
            self.call("actor")
            return self.actor

        remote = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))
        monkeypatch.setattr(runs, "placement_group", lambda _: self.call("group") or group)
        monkeypatch.setattr(runs, "remove_placement_group", lambda _: self.call("remove"))
        monkeypatch.setattr(runs, "PlacementGroupSchedulingStrategy", lambda **_: None)
        monkeypatch.setattr(runs, "pack", lambda *_: b"")
        monkeypatch.setattr(ray, "remote", lambda _: remote)
        monkeypatch.setattr(ray, "kill", lambda _: self.call("kill"))
        monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "ab", "Alive": True}])
        self.accepting: list[bool] = []
        frontends: Any = SimpleNamespace(
            expect=lambda *_: self.accepting.append(False),
            locate=lambda *_: None,
            accept=lambda _, accepting: self.accepting.append(accepting),
            ready=self._connected,
        )
        launch: Any = SimpleNamespace(
            device=device,
            devices_per_instance=1,
            environment={},
            environment_before={},
            vllm_config=None,
            addresses=None,
            executor_class=None,
            log_stats=False,
        )
        addresses: Any = SimpleNamespace(controller="", peers="", agents="", keys=None)
        self.launcher = EngineLauncher(frontends, launch, addresses, DeploymentConfig())

    def _wait(self, seconds: int) -> bool:
        operator.index(seconds)  # Ray refuses a float.
        return self.placed.wait(0.01)

    async def _connected(self, _: int) -> None:
        await asyncio.sleep(0)

    def call(self, name: str, *args: Any) -> None:
        self.calls.append(" ".join([name, *map(str, args)]))
        if threading.current_thread() is threading.main_thread():
            self.on_loop.add(name)
        if name in self.broken:
            raise RuntimeError(f"{name} failed")

    async def ready(self) -> EngineRun:
        run = self.launcher.create(I0, 0)
        assert await self.launcher.until_ready(run) is None
        await until(lambda: "run" in self.calls)
        return run


async def test_engines_that_start_later_go_by_new_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = FakeRay(monkeypatch)
    given = world.launcher._llumlet
    settings = SchedulerSettings(
        priorities=PrioritySettings(aging_s=7.0),
        queue=QueueSettings(passers=3),
        migration=MigrationSettings(min_stay=4.0),
    )
    world.launcher.take_settings(settings)
    now = world.launcher._llumlet
    assert (now.priorities.aging_s, now.queue_rules.passers, now.min_stay) == (7.0, 3, 4.0)
    assert (now.key, now.peers, now.limits) == (given.key, given.peers, given.limits)


async def test_no_call_of_rays_is_made_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    world = FakeRay(monkeypatch)
    run = await world.ready()
    world.launcher.accept(run, True)
    world.launcher.accept(run, False)
    assert run.telling is not None
    await run.telling
    await world.launcher.end(run)
    assert world.calls == [
        "group", "actor", "describe", "run", "accept False", "stop", "kill", "remove",
    ]  # fmt: skip
    assert world.on_loop == set()
    assert world.accepting == [False, True, False]


async def test_the_user_hears_that_an_engine_keeps_no_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = FakeRay(monkeypatch)
    world.facts.no_log = "--log-dir /away on h: Read-only file system"
    await world.launcher.end(await world.ready())
    assert [r.getMessage() for r in caplog.records] == [
        "Engine 0 keeps no log: --log-dir /away on h: Read-only file system"
    ]


async def test_an_engine_is_told_the_newest_word_though_an_older_one_is_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = FakeRay(monkeypatch)
    run = await world.ready()
    world.launcher.accept(run, False)
    await asyncio.sleep(0)
    world.launcher.accept(run, True)
    assert run.telling is not None
    await run.telling
    assert [call for call in world.calls if call.startswith("accept")] == [
        "accept False", "accept True",
    ]  # fmt: skip
    await world.launcher.end(run)


@pytest.mark.parametrize("call", ["group", "actor", "describe"])
async def test_what_fails_while_it_starts_is_raised_and_can_be_cleared_away(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    world = FakeRay(monkeypatch)
    world.broken = {call}
    run = world.launcher.create(I0, 0)
    with pytest.raises(RuntimeError, match=f"{call} failed"):
        await world.launcher.until_ready(run)
    await world.launcher.end(run)
    assert ("remove" in world.calls) == (call != "group")
    assert ("kill" in world.calls) == (call == "describe")


async def test_an_engine_of_which_nothing_can_be_heard_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = FakeRay(monkeypatch)
    world.actor.run.answer = ValueError("Ray lost it")
    run = world.launcher.create(I0, 0)
    why = await world.launcher.until_ready(run)
    if why is None:  # It connected first.
        assert run.ended is not None
        why = (await run.ended).why
    assert why == "Ray lost it"


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (ray.exceptions.RayTaskError("run", "the trace", KeyError("a bug")), True),
        (ray.exceptions.OutOfMemoryError("the node runs out of memory"), True),
        (ray.exceptions.ActorDiedError(), False),
        (ray.exceptions.NodeDiedError("the host is gone"), False),
        (None, False),
    ],
)
async def test_an_engine_is_blamed_for_what_came_out_of_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, blamed: bool
) -> None:
    world = FakeRay(monkeypatch)
    run = await world.ready()
    if error is None:
        world.actor.run.done.set_result(None)
    else:
        world.actor.run.done.set_exception(error)
    assert run.ended is not None
    assert (await run.ended).blamed is blamed


async def test_a_run_that_was_fenced_has_ended_whatever_ray_says_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = FakeRay(monkeypatch)
    run = await world.ready()
    run.end(Death(why="fenced: its host does not answer", fenced=True))
    assert not run.alive
    world.actor.run.done.set_exception(ValueError("the actor died"))
    await asyncio.sleep(0.05)
    assert run.ended is not None
    assert run.ended.result().fenced
    await world.launcher.end(run)
    assert world.calls[-2:] == ["kill", "remove"]
    assert "stop" not in world.calls, "it would not listen"


async def test_an_engine_answers_within_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ANSWER_TIMEOUT_S", 0.05)
    world = FakeRay(monkeypatch)
    run = await world.ready()
    assert await world.launcher.answers(run)
    world.actor.describe = Method(world, "describe")  # It does not answer.
    assert not await world.launcher.answers(run)
    world.broken = {"describe"}
    assert not await world.launcher.answers(run)


@pytest.mark.parametrize("call", ["stop", "kill", "remove"])
async def test_each_step_of_an_end_is_tried_and_what_failed_is_raised(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    world = FakeRay(monkeypatch)
    run = await world.ready()
    world.broken = {call}
    with pytest.raises(RuntimeError, match=f"{call} failed"):
        await world.launcher.end(run)
    assert world.calls[-2:] == ["kill", "remove"]
    world.broken = set()
    await world.launcher.end(run)


async def test_an_actor_that_is_made_after_its_end_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "STOP_TIMEOUT_S", 0.01)
    world = FakeRay(monkeypatch)
    world.holds.clear()
    run = world.launcher.create(I0, 0)
    await until(lambda: run.placed)
    await world.launcher.end(run)
    assert "kill" not in world.calls
    world.holds.set()
    await asyncio.wait({run.made})
    assert world.calls[-3:] == ["actor", "kill", "remove"]


async def test_a_run_that_waits_for_devices_ends_without_an_actor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = FakeRay(monkeypatch)
    world.placed.clear()
    run = world.launcher.create(I0, 0)
    await until(lambda: run.group is not None)
    await world.launcher.end(run)
    assert not run.placed
    assert "actor" not in world.calls
    assert "remove" in world.calls


async def test_devices_that_others_hold_are_named_as_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = FakeRay(monkeypatch)
    world.placed.clear()
    monkeypatch.setattr(runs, "PLACING_SAID_AFTER_S", 0.0)
    run = world.launcher.create(I0, 0)
    waiting = asyncio.create_task(world.launcher.until_ready(run))
    await until(lambda: caplog.messages)
    monkeypatch.setattr(runs, "READY_TIMEOUT_S", 0.0)
    assert "no GPU within 0 s: all are held by others" in str(await waiting)
    said = [m for m in caplog.messages if "i0 waits for 1 free GPU(s) on one host" in m]
    assert len(said) == 1


async def test_an_engine_that_does_not_announce_itself_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeRay, "_connected", lambda self, index: asyncio.sleep(3600))
    monkeypatch.setattr(runs, "READY_TIMEOUT_S", 0.5)
    world = FakeRay(monkeypatch)
    run = world.launcher.create(I0, 0)
    assert await world.launcher.until_ready(run) == runs.NOT_READY
    assert run.facts is not None
    await world.launcher.end(run)


async def test_a_call_that_never_returns_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_calls, "RAY_CALL_TIMEOUT_S", 0.01)
    for_ever = threading.Event()
    with pytest.raises(TimeoutError):
        await ray_calls.ray_call(for_ever.wait)
    for_ever.set()


class Hosts:
    """A cluster's hosts, and which of them runs were put on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, alive: dict[str, bool]) -> None:
        self.alive = alive
        nodes = lambda: [{"NodeID": n, "Alive": up} for n, up in self.alive.items()]  # noqa: E731
        monkeypatch.setattr(ray, "nodes", nodes)
        monkeypatch.setattr(
            places, "NodeAffinitySchedulingStrategy", lambda node, soft: (node, soft)
        )
        self._places = Places()

    def take(self) -> tuple[EngineRun, str]:
        run = EngineRun(engine_index=EngineIndex(0))
        host, soft = self._places.take(run)
        assert not soft, "Ray takes a mere wish lightly"
        return run, host


async def test_engines_without_devices_are_spread_over_the_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = Hosts(monkeypatch, {"a": True, "b": True, "lost": False})
    taken = [hosts.take() for _ in range(4)]
    assert sorted(host for _, host in taken) == ["a", "a", "b", "b"]
    for run, host in taken:
        if host == "b":
            run.ended = asyncio.get_running_loop().create_future()
            run.end(Death(why="killed"))
    assert [hosts.take()[1] for _ in range(2)] == ["b", "b"]


async def test_a_run_that_is_not_wanted_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Hosts(monkeypatch, {"a": True, "b": True})
    run, host = hosts.take()
    run.unwanted = True
    assert hosts.take()[1] == host == "a"


@pytest.mark.parametrize("device", ["GPU", None])
async def test_an_engine_is_started_with_what_the_deployment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str | None
) -> None:
    world = FakeRay(monkeypatch, device)
    expected: list[tuple[Any, ...]] = []
    packed: list[Any] = []
    asked: list[dict[str, Any]] = []
    started: list[tuple[Any, ...]] = []

    def options(**given: Any) -> Any:
        asked.append(given)
        return SimpleNamespace(remote=lambda *what: started.append(what) or world.actor)

    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    monkeypatch.setattr(runs, "pack", lambda *what: packed.append(what) or b"packed")
    monkeypatch.setattr(ray, "remote", lambda _: SimpleNamespace(options=options))
    monkeypatch.setattr(Places, "take", lambda places, run: "a host")
    frontends: Any = SimpleNamespace(expect=lambda *what: expected.append(what))
    launch: Any = SimpleNamespace(
        device=device, devices_per_instance=2, environment={"A": "1"},
        environment_before={"B": "2"}, vllm_config="config", addresses="addresses",
        executor_class="executor", log_stats=True,
    )  # fmt: skip
    addresses: Any = SimpleNamespace(
        controller="ipc:///controller", peers="ipc:///peers", agents="unix:/agents", keys="keys"
    )
    config = DeploymentConfig(
        instances=2, log_dir=str(tmp_path), log_format="json", migration_bandwidth=50.0,
        event_log="events.jsonl",
    )  # fmt: skip
    launcher = EngineLauncher(frontends, launch, addresses, config)
    for slot in (0, 7):
        run = launcher.create(InstanceId(f"i{slot}"), slot)
        assert run.made is not None
        await run.made
        assert (run.step, run.placed) == ("loading", device is not None)
    assert expected == [("i0", 0, 0), ("i7", 1, 7)]
    for (given, *engine), slot, index in zip(packed, (0, 7), (0, 1), strict=True):
        assert engine == ["config", "addresses", "executor", True]
        assert (given.instance, given.engine_index, given.slot) == (f"i{slot}", index, slot)
        assert given.slots == max(config.slots, slot + 1)
        assert (given.controller, given.keys) == ("ipc:///controller", "keys")
        assert (given.event_log, given.log_format) == (config.log_place, "json")
        llumlet = given.llumlet
        assert (llumlet.peers, llumlet.agents) == ("ipc:///peers", "unix:/agents")
        assert llumlet.transfer.bandwidth_bytes_per_s == 50e6
        assert llumlet.min_stay == config.scheduler.migration.min_stay
        assert llumlet.looks_at_caches
        assert len(llumlet.key) == 32
    assert packed[0][0].llumlet.key == packed[1][0].llumlet.key
    assert started == [({"A": "1"}, b"packed", (str(tmp_path), f"i{n}")) for n in (0, 7)]
    for each in asked:
        assert (each["num_cpus"], each["max_concurrency"], each["max_restarts"]) == (0, 2, 0)
        assert each["runtime_env"]["env_vars"] == {"RAY_worker_niceness": "0", "B": "2"}
        assert each.get("num_gpus") == (None if device is None else 2)
        assert each["scheduling_strategy"] == (None if device else "a host")  # None is a fake's.


async def test_no_engine_is_started_under_a_number_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = FakeRay(monkeypatch)
    world.launcher._started = ENGINE_INDEX_MAX
    run = world.launcher.create(I0, 0)
    assert run.engine_index == ENGINE_INDEX_MAX
    with pytest.raises(LlumnixError, match="65,536 engines were started"):
        world.launcher.create(I0, 0)
    await world.launcher.end(run)
