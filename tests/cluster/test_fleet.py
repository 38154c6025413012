"""The fleet's states, without Ray and engines, in virtual time."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.cluster import fleet as fleet_module
from llumnix.core.events import (
    AddInstances,
    DrainInstance,
    FleetReported,
    SettingsChanged,
    UndrainInstance,
)
from llumnix.core.limits import FLEET_REPORT_EVERY_S
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.settings import PrioritySettings, ScalingSettings, SchedulerSettings
from llumnix.core.supervision.hang import LOOK_EVERY_S, LOST_LOOKS, SILENT_LOOKS, STALL_S
from llumnix.core.supervision.lifecycle import DRAIN_TIMEOUT_S
from llumnix.core.types import InstanceId
from llumnix.errors import CapacityError, ConflictError, InstanceFailedError, LastInstanceError
from llumnix.observe.log_files import lines_of
from support.counted import counted
from support.virtual_time import run

from .fakes import I0, I1, I2, World

Script = Callable[[World], Awaitable[None]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    """Plays a script on a fleet of two (or `count`) that serve, and closes it."""

    def play(script: Script, count: int = 2, **config: Any) -> World:
        async def main() -> World:
            world = World(monkeypatch, instances=count, **config)
            await world.start(count)
            await script(world)
            await world.fleet.close()
            return world

        world: World = run(main())
        return world

    return play


def test_what_becomes_of_instances_is_in_the_event_log(
    play: Callable[..., World], tmp_path: Path
) -> None:
    async def script(w: World) -> None:
        await w.fleet.drain(I0, "a user's order")
        await asyncio.sleep(5)

    path = tmp_path / "events.jsonl"
    play(script, event_log=str(path))
    noted = [line["body"] for line in lines_of(path) if line["kind"] == "instance"]
    assert [(n["kind"], n["target"], n["why"]) for n in noted] == [
        ("up", "i0", ""), ("up", "i1", ""), ("drain", "i0", "draining: a user's order"),
        ("removed", "i0", "draining: a user's order"),
    ]  # fmt: skip


# -- start and restart


def test_instances_start_and_are_told_of_one_by_one(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        assert w.states == {"i0": "serving", "i1": "serving"}
        assert w.accepting("i0")
        assert w.accepting("i1")

    world = play(script)
    assert world.said[0] == "starting instance 1/2 (i0)"
    assert world.said[-1] == "instance 2/2 (i1) is up"
    assert sorted(world.launcher.ended) == [0, 1]


def test_a_first_instance_that_does_not_come_up_ends_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        world = World(monkeypatch)
        world.launcher.why_not = "no kernel for this card"
        with pytest.raises(InstanceFailedError, match="i0 could not be started: no kernel"):
            await world.start()
        await world.fleet.close()
        assert sorted(world.launcher.ended) == [0, 1]

        world = World(monkeypatch)
        world.launcher.broken = {"until_ready"}
        with pytest.raises(InstanceFailedError, match="RuntimeError: until_ready: the control"):
            await world.start()
        await world.fleet.close()
        assert sorted(world.launcher.ended) == [0, 1]

    run(main())


def test_an_instance_that_dies_loses_its_streams_and_is_started_again(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 3)
        w.launcher.ready_s = 5
        w.kill("i1")
        await asyncio.sleep(0.1)
        assert w.states == {"i0": "serving", "i1": "restarting"}
        assert w.why["i1"] == "killed"
        assert w.client.ended[1] == 3
        await asyncio.sleep(6)
        assert w.states["i1"] == "serving"
        assert w.why["i1"] is None
        status = w.fleet.status()[1]
        assert (status.restarts, status.engine_index) == (1, 2)
        assert w.launcher.ended == [1]

    play(script)


def test_an_instance_that_cannot_be_added_is_not_listed(play: Callable[..., World]) -> None:
    def fails(_: int) -> None:
        raise RuntimeError("a plugin for metrics failed")

    async def script(w: World) -> None:
        w.client.grow_metrics = fails  # type: ignore[method-assign]
        with pytest.raises(RuntimeError):
            await w.fleet.add()
        assert w.states == {"i0": "serving", "i1": "serving"}

    play(script)


def test_pauses_grow_with_each_crash_and_the_fifth_in_a_row_is_the_last(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.launcher.why_not = "still no memory"
        w.kill("i1")
        await asyncio.sleep(0.1)  # Crash 1, started again at once: crash 2.
        for pause_s, made in ((1, 4), (2, 5), (4, 6)):
            await asyncio.sleep(pause_s - 0.2)
            assert len(w.launcher.made) == made - 1
            await asyncio.sleep(0.2)
            assert len(w.launcher.made) == made
        assert w.states == {"i0": "serving", "i1": "failed"}
        assert w.why["i1"] is not None
        assert w.why["i1"].startswith("given up: crashed 5 times")
        await asyncio.sleep(600)
        assert len(w.launcher.made) == 6
        assert w.client.link.told[-1].given_up == 1
        assert not w.fleet.all_failed.is_set()

    play(script)


def test_crashes_far_apart_are_no_row(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        for _ in range(8):
            await asyncio.sleep(61)
            w.kill("i1")
        await asyncio.sleep(0.1)
        assert w.states["i1"] == "serving"

    play(script)


def test_hosts_that_are_lost_again_and_again_have_no_instance_given_up(
    play: Callable[..., World],
) -> None:
    cut_off: list[Any] = []

    async def lost(run: Any) -> bool:
        return run in cut_off

    async def script(w: World) -> None:
        w.fleet._supervisor._hosts.lost = lost  # type: ignore[method-assign]
        for _ in range(8):
            await asyncio.sleep(10)
            w.launcher.why_not = "the actor died"  # Ray has not noticed yet, and starts it there.
            cut_off.append(w.launcher.made[-1])
            w.kill("i1")
            await asyncio.sleep(5)
            assert w.states["i1"] == "restarting"
            w.launcher.why_not = None
            await asyncio.sleep(2)
            assert w.states["i1"] == "serving"

    play(script)


def test_when_all_are_given_up_the_server_ends(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        w.launcher.why_not = "broken"
        w.kill("i0")
        w.kill("i1")
        await asyncio.wait_for(w.fleet.all_failed.wait(), 60)
        assert w.states == {"i0": "failed", "i1": "failed"}

    play(script)


def test_an_engine_that_cannot_be_brought_into_the_state_of_the_others_does_not_serve(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.client.not_brought_up = "pause_scheduler failed"
        w.kill("i1")
        await asyncio.sleep(0.5)
        assert w.states["i1"] == "restarting"
        assert w.why["i1"] == "pause_scheduler failed"
        w.client.not_brought_up = None
        await asyncio.sleep(5)
        assert w.states["i1"] == "serving"

    play(script)


# -- Ray fails


@pytest.mark.parametrize("call", ["create", "until_ready", "end"])
def test_a_failing_call_of_rays_is_logged_with_the_instance_and_tried_again(
    play: Callable[..., World], call: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(w: World) -> None:
        w.launcher.broken = {call}
        w.kill("i1")
        await asyncio.sleep(20)
        assert w.states == {"i0": "serving", "i1": "restarting"}
        w.launcher.broken = set()
        await asyncio.sleep(60)
        assert w.states == {"i0": "serving", "i1": "serving"}
        assert w.launcher.ended[0] == 1
        assert w.member("i1").life.restarts == 1

    play(script)
    assert any("instance i1" in m and f"RuntimeError: {call}: the" in m for m in caplog.messages)


@pytest.mark.parametrize("call", ["create", "until_ready", "end"])
def test_if_ray_stays_broken_the_instance_is_given_up_and_says_why(
    play: Callable[..., World], call: str
) -> None:
    async def script(w: World) -> None:
        w.launcher.broken = {call}
        w.kill("i1")
        await asyncio.sleep(1000)
        assert w.states == {"i0": "serving", "i1": "failed"}
        assert w.why["i1"] is not None
        assert w.why["i1"].startswith("given up: RuntimeError")
        w.launcher.broken = set()
        await w.fleet.drain(I1, "a user's order")
        await asyncio.sleep(1)
        assert w.states == {"i0": "serving"}
        assert all(not r.alive for r in w.launcher.made[1:])

    play(script)


def test_a_drain_ends_though_the_engine_cannot_be_ended(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        w.launcher.broken = {"end"}
        await w.fleet.drain(I1, "a user's order")
        await asyncio.sleep(1000)
        assert w.states == {"i0": "serving"}

    play(script)


def test_what_fails_at_the_end_is_logged_and_the_rest_is_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        world = World(monkeypatch)
        await world.start()
        end = world.launcher.end

        async def fails_for_i0(r: Any) -> None:
            if r.engine_index == 0:
                raise RuntimeError("ray.kill failed")
            await end(r)

        monkeypatch.setattr(world.launcher, "end", fails_for_i0)
        await world.fleet.close()
        assert world.launcher.ended == [1]

    run(main())
    assert "instance i0 could not be ended: RuntimeError: ray.kill failed" in caplog.messages


def test_a_report_that_fails_is_logged_and_the_next_are_sent(
    play: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    async def script(w: World) -> None:
        def fails(fact: FleetReported) -> None:
            w.client.link.on_tell = lambda fact: None
            raise OSError("no buffer")

        w.client.link.on_tell = fails
        await asyncio.sleep(5)
        assert len(w.client.link.told) > 5

    play(script)
    assert any("Reporting the fleet failed unexpectedly" in m for m in caplog.messages)


# -- drain


def test_a_drained_instance_takes_nothing_more_and_is_stopped_once_it_is_empty(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 2)
        status = await w.fleet.drain(I1, "a user's order")
        assert (status.state, status.why) == ("draining", "draining: a user's order")
        await asyncio.sleep(100)
        assert w.states["i1"] == "draining"
        assert not w.accepting("i1")
        w.client.held.clear()
        await asyncio.sleep(0.1)
        assert w.states == {"i0": "serving"}
        assert w.launcher.ended == [1]

    play(script)


def test_what_a_drained_instance_still_holds_after_the_timeout_is_cut_off(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 2)
        await w.fleet.drain(I1, "a user's order")
        await asyncio.sleep(DRAIN_TIMEOUT_S - 1)
        assert w.states["i1"] == "draining"
        await asyncio.sleep(1.2)
        assert w.states == {"i0": "serving"}
        assert w.client.ended[1] == 2

    play(script)


def test_the_timeout_is_the_users_and_can_be_changed(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 1)
        await w.fleet.drain(I1, "a user's order", timeout_s=1000)
        await asyncio.sleep(DRAIN_TIMEOUT_S + 1)
        await w.fleet.drain(I1, "a user's order")  # Changes nothing.
        assert w.states["i1"] == "draining"
        await w.fleet.drain(I1, "a user's order", timeout_s=2)
        await asyncio.sleep(1)
        assert w.states["i1"] == "draining"
        await asyncio.sleep(1.2)
        assert w.states == {"i0": "serving"}

    play(script)


@pytest.mark.parametrize("first", [False, True])
def test_force_cuts_off_at_once(play: Callable[..., World], first: bool) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 2)
        if not first:
            await w.fleet.drain(I1, "a user's order")
            await asyncio.sleep(1)
        await w.fleet.drain(I1, "a user's order", force=True)
        await asyncio.sleep(0.1)
        assert w.states == {"i0": "serving"}
        assert w.client.ended[1] == 2

    play(script)


def test_an_instance_is_emptied_and_started_again_under_its_name(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 1)
        w.launcher.ready_s = 5.0
        await w.fleet.drain(I1, "a user's order to restart it", again=True)
        await asyncio.sleep(100)
        assert w.states["i1"] == "draining"
        assert w.client.link.told[-1].starting == 1  # So that scaling adds none in its place.
        w.client.held.clear()
        await asyncio.sleep(1)
        assert w.states == {"i0": "serving", "i1": "restarting"}
        assert w.launcher.ended == [1]
        await asyncio.sleep(5)
        assert w.states == {"i0": "serving", "i1": "serving"}
        again = w.fleet.status()[1]
        assert (again.engine_index, again.restarts, again.why) == (2, 0, None)
        assert w.accepting("i1")
        w.kill("i1")
        await asyncio.sleep(10)
        assert w.fleet.status()[1].engine_index == 3  # It is supervised as before.

    play(script)


def test_a_restart_may_be_taken_back_or_made_a_removal(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 1)
        await w.fleet.drain(I1, "a restart", again=True)
        await w.fleet.undrain(I1)
        assert w.states == {"i0": "serving", "i1": "serving"}
        await w.fleet.drain(I1, "a restart", again=True)
        await w.fleet.drain(I1, "a removal")
        with pytest.raises(ConflictError, match="to be removed: undrain it first"):
            await w.fleet.drain(I1, "a restart", again=True)
        w.client.held.clear()
        await asyncio.sleep(1)
        assert w.states == {"i0": "serving"}

    play(script)


def test_the_only_instance_is_restarted_by_force_alone(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        w.hold("i0", 2)
        with pytest.raises(LastInstanceError, match="or give `force`"):
            await w.fleet.drain(I0, "a restart", again=True)
        await w.fleet.drain(I0, "a restart", again=True, force=True)
        await asyncio.sleep(1)
        assert w.states == {"i0": "serving"}
        assert w.fleet.status()[0].engine_index == 1

    play(script, count=1)


def test_a_restart_of_the_only_instance_is_not_made_a_removal(play: Callable[..., World]) -> None:
    """Nothing would serve any more, and the server would end."""

    async def script(w: World) -> None:
        w.launcher.ready_s = 5.0
        await w.fleet.drain(I0, "a restart", again=True, force=True)
        for state in ("draining", "restarting"):
            assert w.states == {"i0": state}
            with pytest.raises(LastInstanceError):
                await w.fleet.drain(I0, "a removal")
            await asyncio.sleep(1)
        await asyncio.sleep(10)
        assert w.states == {"i0": "serving"}

    play(script, count=1)


def test_a_forced_restart_leaves_the_drain_of_another_as_it_is(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 1)
        w.launcher.ready_s = 5.0
        await w.fleet.drain(I1, "a removal")
        await w.fleet.drain(I0, "a restart", again=True, force=True)
        await asyncio.sleep(1)
        assert w.states == {"i0": "restarting", "i1": "draining"}
        await asyncio.sleep(10)
        assert w.states == {"i0": "serving", "i1": "draining"}
        assert "renew" in [n["kind"] for n in w.fleet.notes.since(0) if n["target"] == "i0"]

    play(script)


def test_an_instance_that_was_given_up_is_started_again_by_a_restart(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.launcher.why_not = "no memory"
        w.kill("i1")
        await asyncio.sleep(100)
        assert w.states["i1"] == "failed"
        w.launcher.why_not = None
        await w.fleet.drain(I1, "a restart", again=True)
        await asyncio.sleep(1)
        assert w.states == {"i0": "serving", "i1": "serving"}

    play(script)


def test_one_that_is_restarted_counts_among_the_most(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 1)
        await w.fleet.drain(I1, "a restart", again=True)
        with pytest.raises(CapacityError, match="--max-instances is 2"):
            await w.fleet.add()

    play(script, min_instances=1, max_instances=2)


def test_new_settings_reach_the_scheduler_the_engines_and_the_orders_of_users(
    play: Callable[..., World],
) -> None:
    capped = PrioritySettings(key_caps={"a secret": "normal"})
    given = SchedulerSettings(scaling=ScalingSettings(instances_max=3), priorities=capped)
    kept = given.without_keys()

    async def script(w: World) -> None:
        with pytest.raises(CapacityError, match="--max-instances is 2"):
            await w.fleet.add()
        told = w.client.link.told
        assert not any(isinstance(fact, SettingsChanged) for fact in told)
        told.clear()
        w.fleet.take_settings(given)
        await asyncio.sleep(0.01)
        assert told[0] == SettingsChanged(settings=kept), "told at once, and before the fleet"
        await w.fleet.add()
        told.clear()
        await asyncio.sleep(2.5 * FLEET_REPORT_EVERY_S)
        again = [fact for fact in told if isinstance(fact, SettingsChanged)]
        assert len(again) >= 2, "a controller may have missed it"
        assert set(map(repr, again)) == {repr(SettingsChanged(settings=kept))}
        assert w.launcher.settings == [kept]
        assert w.fleet._settings == kept, "the next controller starts with them"

    play(script, min_instances=1, max_instances=2)


def test_what_was_cut_off_is_told_while_the_instance_stops(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        seen: list[str | None] = []

        async def end(_: Any) -> None:
            seen.append(w.why["i1"])

        w.launcher.end = end  # type: ignore[method-assign]
        w.hold("i1", 2)
        await w.fleet.drain(I1, "a user's order", timeout_s=3)
        await asyncio.sleep(4)
        assert seen == ["a user's order; 2 of its requests were cut off after 3.0 s"]

    play(script)


def test_an_instance_that_dies_while_it_is_drained_is_gone(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 2)
        await w.fleet.drain(I1, "a user's order")
        await asyncio.sleep(1)
        w.kill("i1")
        await asyncio.sleep(0.1)
        assert w.states == {"i0": "serving"}
        assert w.client.ended[1] == 2

    play(script)


def test_after_the_close_nothing_is_started_or_drained_any_more(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        await w.fleet.close()
        w.decide(AddInstances(count=1, total=9, why="load"))
        w.ask_for_drain(I1)
        await asyncio.sleep(10)
        assert len(w.launcher.made) == 2
        assert w.states["i1"] not in ("draining", "stopping")

    play(script)


def test_while_requests_end_nothing_is_started_or_drained_any_more(
    play: Callable[..., World],
) -> None:
    """A SIGTERM to every process: each instance asks for its drain, as the frontend stops."""

    async def script(w: World) -> None:
        w.client.leaving = True
        w.decide(AddInstances(count=1, total=9, why="load"))
        w.ask_for_drain(I0)
        w.ask_for_drain(I1)
        await asyncio.sleep(10)
        assert w.states == {"i0": "serving", "i1": "serving"}

    play(script)


@pytest.mark.parametrize("state", ["starting", "restarting", "failed"])
def test_what_does_not_serve_is_drained_at_once(play: Callable[..., World], state: str) -> None:
    async def script(w: World) -> None:
        if state == "failed":
            w.launcher.why_not = "broken"
        else:
            w.launcher.ready_s = 1e6
        if state == "restarting":
            w.kill("i1")
        else:
            await w.fleet.add()
        await asyncio.sleep(1)
        name = I1 if state == "restarting" else I2
        assert w.states[name] == state
        await w.fleet.drain(name, "a user's order")
        await asyncio.sleep(0.1)
        assert name not in w.states
        assert not any(r.alive for r in w.launcher.made[2:])

    play(script)


def test_an_undrained_instance_serves_on_under_supervision(
    play: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 2)
        await w.fleet.drain(I1, "a user's order")
        await asyncio.sleep(1)
        with caplog.at_level(logging.INFO):
            assert (await w.fleet.undrain(I1)).state == "serving"
        told = [getattr(record, "llumnix", {}) for record in caplog.records]
        assert {"event": "undrain", "instance": "i1"} in told
        assert w.accepting("i1")
        await asyncio.sleep(DRAIN_TIMEOUT_S)
        w.kill("i1")
        await asyncio.sleep(0.1)
        assert (w.states["i1"], w.member("i1").life.restarts) == ("serving", 1)
        with pytest.raises(ConflictError, match="i1 is serving"):
            await w.fleet.undrain(I1)

    play(script)


@pytest.mark.parametrize("asked", [False, True])
def test_one_that_is_drained_before_it_has_all_that_the_others_have_never_serves(
    play: Callable[..., World], asked: bool
) -> None:
    """Its engine runs, but adapters are still being loaded there."""

    async def script(w: World) -> None:
        w.client.bring_up_s = 60.0
        added = await w.fleet.add()
        await asyncio.sleep(1)
        await w.fleet.drain(added.id, "a user's order")
        if asked:
            with pytest.raises(ConflictError, match=f"{added.id} is .*that has served"):
                await w.fleet.undrain(added.id)
        else:
            w.kill("i0")
        await asyncio.sleep(0.1)
        assert w.client.accepting.get(1) is not True
        await asyncio.sleep(2)
        assert added.id not in w.states

    play(script, count=1)


def test_the_only_one_that_serves_is_not_drained(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        with pytest.raises(LastInstanceError, match="i0 is the only instance that serves; POST"):
            await w.fleet.drain(I0, "a user's order", force=True)

    play(script, count=1)


def test_the_last_two_are_not_both_drained_while_they_start_again(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.launcher.ready_s = 30
        w.kill("i0")
        w.kill("i1")
        await asyncio.sleep(0.1)
        await w.fleet.drain(I0, "a user's order")
        with pytest.raises(LastInstanceError):
            await w.fleet.drain(I1, "a user's order")
        await asyncio.sleep(60)
        assert w.states == {"i1": "serving"}

    play(script)


def test_an_instance_under_drain_takes_requests_while_no_other_serves(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 1)
        await w.fleet.drain(I1, "a user's order")
        await asyncio.sleep(1)
        w.launcher.ready_s = 30
        w.kill("i0")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert w.states == {"i0": "restarting", "i1": "draining"}
        assert w.accepting("i1")
        w.client.held.clear()
        await asyncio.sleep(20)
        assert w.states["i1"] == "draining"
        w.hold("i1", 1)
        await asyncio.sleep(15)
        assert w.states == {"i0": "serving", "i1": "draining"}
        assert not w.accepting("i1")
        w.client.held.clear()
        await asyncio.sleep(1)
        assert w.states == {"i0": "serving"}

    play(script)


def test_a_drain_is_taken_back_when_the_only_other_one_is_given_up(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 1)
        await w.fleet.drain(I1, "a user's order")
        w.launcher.why_not = "broken"
        w.kill("i0")
        await asyncio.sleep(60)
        assert w.states == {"i0": "failed", "i1": "serving"}
        assert w.accepting("i1")
        assert not w.fleet.all_failed.is_set()

    play(script)


def test_a_drain_is_taken_back_when_no_other_serves_within_its_timeout(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 1)
        w.launcher.ready_s = 1e6
        await w.fleet.drain(I1, "a user's order", timeout_s=10)
        w.kill("i0")
        await asyncio.sleep(11)
        assert w.states == {"i0": "restarting", "i1": "serving"}

    play(script)


# -- who asked


def test_the_scheduler_is_told_at_once_who_asked_for_each_drain(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        for instance in ("i1", "i2", "i3"):
            w.hold(instance, 1)
        await asyncio.sleep(FLEET_REPORT_EVERY_S / 2)
        before = len(w.client.link.told)
        await w.fleet.drain(I1, "a user's order")
        w.ask_for_drain(I2)
        w.decide(DrainInstance(instance=w.member("i3").id, why="idle"))
        await asyncio.sleep(0.01)
        told = w.client.link.told[-1]
        assert len(w.client.link.told) > before
        assert told.serving == ("i0",)
        assert told.drained_by == {"i1": "user", "i2": "signal", "i3": "scheduler"}

    play(script, count=4)


def test_the_scheduler_takes_back_no_drain_but_its_own(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        for instance in ("i1", "i2"):
            w.hold(instance, 1)
        await w.fleet.drain(I1, "a user's order")
        w.decide(DrainInstance(instance=I2, why="idle"))
        await asyncio.sleep(1)
        for instance in (I1, I2):
            w.decide(UndrainInstance(instance=instance, why="load"))
        await asyncio.sleep(1)
        assert w.states == {"i0": "serving", "i1": "draining", "i2": "serving"}

    play(script, count=3)


def test_a_drain_of_the_schedulers_that_a_user_asks_for_too_is_the_users(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 1)
        w.decide(DrainInstance(instance=I1, why="idle"))
        await asyncio.sleep(1)
        await w.fleet.drain(I1, "a user's order")
        w.decide(UndrainInstance(instance=I1, why="load"))
        await asyncio.sleep(1)
        assert w.states["i1"] == "draining"
        assert w.client.link.told[-1].drained_by == {"i1": "user"}

    play(script)


def test_a_drain_of_the_schedulers_own_cuts_nothing_off(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 1)
        w.decide(DrainInstance(instance=I1, why="idle"))
        await asyncio.sleep(DRAIN_TIMEOUT_S + 1)
        assert w.states["i1"] == "serving"
        assert w.accepting("i1")
        assert w.client.ended == {}

    play(script)


# -- further instances


def test_an_added_instance_starts_in_the_lowest_free_slot(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        before = {status.serial for status in w.fleet.status()}
        await w.fleet.drain(I0, "a user's order")
        await asyncio.sleep(1)
        w.launcher.ready_s = 5
        added = await w.fleet.add()
        assert (added.id, added.state) == ("i0", "starting")
        assert added.serial not in before
        await asyncio.sleep(0.1)
        assert w.client.link.told[-1].starting == 1
        await asyncio.sleep(6)
        assert w.states == {"i0": "serving", "i1": "serving"}
        assert w.member("i0").life.restarts == 0

    assert play(script).grown == [1]


def test_no_more_are_added_than_there_is_room_for_or_the_user_allows(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.launcher.ready_s = 100
        answers = await asyncio.gather(*(w.fleet.add() for _ in range(5)), return_exceptions=True)
        refused = [str(a) for a in answers if isinstance(a, CapacityError)]
        assert len(refused) == 4
        assert all("there are 3 instances, and --max-instances is 3" in r for r in refused)

    play(script, max_instances=3)

    async def crowded(w: World) -> None:
        w.room = 3
        await w.fleet.add()
        with pytest.raises(CapacityError, match="no room"):
            await w.fleet.add()

    play(crowded)


def test_one_that_cannot_be_started_says_why_and_its_slot_is_used_again(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.launcher.why_not = "disk full"
        for _ in range(4):
            assert (await w.fleet.add()).id == "i2"
            await asyncio.sleep(1)
            assert w.states["i2"] == "failed"
            assert w.why["i2"] == "could not be started: disk full"
        w.launcher.why_not = None
        await w.fleet.add()
        await asyncio.sleep(1)
        assert w.states == {"i0": "serving", "i1": "serving", "i2": "serving"}

    assert set(play(script).grown) == {3}


def test_a_storm_of_failing_starts_slows_down_and_leaves_nothing_behind(
    play: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    """An hour in which no instance can be started, with a scheduler that wants two."""

    async def script(w: World) -> None:
        scheduler = Scheduler(w.fleet._settings)
        now = asyncio.get_running_loop().time

        def tell(fact: FleetReported) -> None:
            for decision in scheduler.handle(fact, now()):
                w.decide(decision)

        w.client.link.on_tell = tell
        w.launcher.why_not = "uncorrectable ECC error"
        w.kill("i1")
        await asyncio.sleep(3600)
        assert w.states == {"i0": "serving", "i1": "failed"}
        assert len(w.launcher.made) < 25

        w.launcher.why_not = None
        await w.fleet.add()  # The user has mended the cause.
        await asyncio.sleep(1)
        assert w.states == {"i0": "serving", "i1": "serving"}
        w.kill("i1")
        await asyncio.sleep(1)
        assert w.states == {"i0": "serving", "i1": "serving"}

    with caplog.at_level(logging.WARNING):
        world = play(script, min_instances=2, max_instances=3)
    assert set(world.grown) == {2}
    assert sum("Not done" in m for m in caplog.messages) < 12


def test_what_the_scheduler_wants_and_cannot_have_is_said_once(
    play: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    async def script(w: World) -> None:
        w.room = 0
        for _ in range(100):
            w.decide(AddInstances(count=1, total=9, why="load"))
            await asyncio.sleep(1)

    play(script)
    assert sum("Not done (load): no room" in m for m in caplog.messages) == 1


def test_each_decision_is_counted_with_what_became_of_it(
    play: Callable[..., World], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And one over which an error is raised is logged, and keeps no other from being done."""

    async def script(w: World) -> None:
        with counted() as found:
            w.decide(AddInstances(count=2, total=9, why="load"))
            await asyncio.sleep(1)
            w.decide(DrainInstance(instance=I2, why="no load"))
            await asyncio.sleep(0.1)
            w.decide(UndrainInstance(instance=InstanceId("i9"), why="load"))
            w.ask_for_drain(InstanceId("i8"))  # No decision of the scheduler's.
            await asyncio.sleep(0.1)
        assert {k: v for k, v in found.items() if k.startswith("scaling")} == {
            "scaling_decisions_total add done": 1,
            "scaling_decisions_total drain done": 1,
            "scaling_decisions_total undrain refused": 1,
        }
        assert "no instance i9; there are: i0, i1, i" in caplog.text
        monkeypatch.setattr(w.fleet, "drain", None)  # As a mistake of ours would.
        w.decide(DrainInstance(instance=I1, why="a mistake"))
        w.decide(AddInstances(count=1, total=9, why="load"))
        await asyncio.sleep(1)
        assert "Not done (a mistake)" in caplog.text
        assert "i4" in w.states or "i2" in w.states

    play(script)


@pytest.mark.parametrize("ray_s", [0.0005, 0.05])
def test_no_more_instances_are_added_than_are_missing_while_the_first_are_being_added(
    play: Callable[..., World], monkeypatch: pytest.MonkeyPatch, ray_s: float
) -> None:
    """The scheduler hears of each of them, and decides anew before the fleet has added the last.
    Ray takes `ray_s` to say whether there is room, and each message a millisecond."""

    def settings(least: int) -> SchedulerSettings:
        return SchedulerSettings(scaling=ScalingSettings(instances_min=least, instances_max=32))

    async def script(w: World) -> None:
        loop, decided = asyncio.get_running_loop(), list[int]()
        scheduler = Scheduler(settings(2))

        async def ask(check: Callable[[], None]) -> None:
            await asyncio.sleep(ray_s)
            check()

        def hears(fact: Any) -> None:
            for decision in scheduler.handle(fact, loop.time()):
                assert isinstance(decision, AddInstances)
                decided.append(decision.count)
                loop.call_later(0.001, w.decide, decision)

        def tell(fact: Any) -> None:
            if isinstance(fact, FleetReported | SettingsChanged):
                loop.call_later(0.001, hears, fact)

        monkeypatch.setattr(fleet_module, "ask_ray", ask)
        w.client.link.on_tell = tell
        w.launcher.ready_s = 60.0
        w.fleet.take_settings(settings(8))
        await asyncio.sleep(5)
        assert len(w.states) == 8
        assert decided[0] == 6

    play(script)


# -- what a probe is told


def taking(w: World) -> list[str]:
    return [each.id for each in w.fleet.seen().instances if each.takes_requests]


def test_an_instance_counts_for_a_probe_from_its_start_to_its_death(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        assert taking(w) == ["i0", "i1"]
        assert [s.step for s in w.fleet.seen().instances] == ["up", "up"]
        w.launcher.ready_s = 5
        w.kill("i1")
        # At once, though the member's task has not run yet.
        assert (w.states["i1"], taking(w)) == ("restarting", ["i0"])
        await asyncio.sleep(3)
        assert (w.states["i1"], taking(w)) == ("restarting", ["i0"])
        await asyncio.sleep(3)
        assert taking(w) == ["i0", "i1"]
        await w.fleet.drain(I1, "a user's order")
        assert taking(w) == ["i0"]
        assert not w.fleet.seen().stopping
        w.client.leaving = True
        assert w.fleet.seen().stopping

    play(script)


# -- hung engines


def test_an_engine_that_makes_no_step_is_called_hung_and_keeps_its_streams(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 2)
        for sequence in range(40):
            w.report(sequence)
            w.report(sequence, stalled_s=sequence * LOOK_EVERY_S, only="i1")
            await asyncio.sleep(LOOK_EVERY_S)
        assert w.states == {"i0": "serving", "i1": "hung"}
        assert w.why["i1"] is not None
        assert w.why["i1"].startswith("hung: no step for")
        assert w.client.held[1] == 2
        w.report(41)
        await asyncio.sleep(1.5 * LOOK_EVERY_S)
        assert w.states == {"i0": "serving", "i1": "serving"}
        assert w.why["i1"] is None

    play(script)


async def silence(w: World, looks: int, began: int = 1) -> None:
    """So many looks find news of i0 alone."""
    for sequence in range(began, began + looks):
        w.report(sequence, only="i0")
        await asyncio.sleep(LOOK_EVERY_S)


def test_an_engine_that_falls_silent_is_called_hung_and_then_fenced(
    play: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 2)
        w.report(0)
        await asyncio.sleep(LOOK_EVERY_S)
        await silence(w, SILENT_LOOKS + 1)
        assert w.states == {"i0": "serving", "i1": "hung"}
        assert w.client.held[1] == 2
        assert w.client.shared_state.silent == {1}
        w.launcher.ready_s = 5
        await silence(w, LOST_LOOKS - SILENT_LOOKS, SILENT_LOOKS + 2)
        assert w.client.held[1] == 0
        assert w.states == {"i0": "serving", "i1": "restarting"}
        assert w.why["i1"] == "fenced: its process reports nothing"
        assert w.client.blamed == {1: False}
        assert w.client.shared_state.silent == set()
        await silence(w, 24, 100)
        assert w.states["i1"] == "serving"
        assert w.member("i1").life.restarts == 1
        assert w.launcher.ended == [1]

    play(script)
    assert (
        caplog.messages.count(
            "Instance i1 is fenced (its process reports nothing); 2 of its streams ended."
        )
        == 1
    )
    assert not any("i1 died" in m for m in caplog.messages)


@pytest.mark.parametrize("sign", ["outputs", "an answer"])
def test_one_that_only_the_controller_does_not_hear_is_left_alone(
    play: Callable[..., World], sign: str
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 2)
        w.report(0)
        await asyncio.sleep(LOOK_EVERY_S)
        if sign == "an answer":
            w.launcher.answering = {1}
        for sequence in range(1, 5 * LOST_LOOKS):
            if sign == "outputs":
                w.client.heard[1] = sequence
            await silence(w, 1, sequence)
        assert w.states == {"i0": "serving", "i1": "hung"}
        assert w.client.held[1] == 2
        w.report(1000)
        await asyncio.sleep(1.5 * LOOK_EVERY_S)
        assert w.states["i1"] == "serving"

    play(script)


@pytest.mark.parametrize("stall_s", [None, 3.0])
def test_an_engine_that_stands_still_for_too_long_is_fenced_and_blamed(
    play: Callable[..., World], stall_s: float | None, tmp_path: Path
) -> None:
    most_s = STALL_S if stall_s is None else stall_s
    knobs = tmp_path / "scheduler.yaml"
    knobs.write_text(f"survival:\n  stall_s: {'null' if stall_s is None else stall_s}\n")

    async def script(w: World) -> None:
        for index in (1, 2):  # The first of the instance, and the next.
            w.hold("i1", 2)
            for look in range(int(most_s / LOOK_EVERY_S) + 2):
                w.report(100 * index + look)
                w.report(100 * index + look, stalled_s=look * LOOK_EVERY_S, only="i1", steps=1)
                await asyncio.sleep(LOOK_EVERY_S)
                if look * LOOK_EVERY_S < most_s:
                    assert w.client.held[index] == 2
            await asyncio.sleep(0.01)
            assert w.client.held[index] == 0
            assert w.client.blamed[index]
            assert w.member("i1").life.restarts == index
            await asyncio.sleep(2)

    with counted() as found:
        play(script, scheduler_config=str(knobs))
    assert found == {
        "engine_deaths_total fenced true": 2,
        "restarts_total 1 stall": 2,
        "instance_start_seconds_count": 4,
    }


def test_an_engine_that_is_drained_is_fenced_too_and_is_gone(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 2)
        w.report(0)
        await asyncio.sleep(LOOK_EVERY_S)
        await w.fleet.drain(I1, "a user's order")
        await silence(w, LOST_LOOKS + 2)
        assert w.states == {"i0": "serving"}
        assert w.client.held[1] == 0

    with counted() as found:
        play(script)
    assert found == {
        "engine_deaths_total fenced false": 1,
        "drains_total user died": 1,
        "drain_seconds_count died": 1,
        "instance_start_seconds_count": 2,
    }


def test_a_death_that_its_engine_is_to_blame_for_is_told_so(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        w.kill("i0", "KeyError: a bug", blamed=True)
        w.kill("i1")
        await asyncio.sleep(0.1)
        assert w.client.blamed == {0: True, 1: False}

    with counted() as found:
        play(script)
    assert found == {
        "engine_deaths_total ended true": 1,
        "engine_deaths_total ended false": 1,
        "restarts_total 0 exit": 1,
        "restarts_total 1 exit": 1,
        "instance_start_seconds_count": 4,
    }


@pytest.mark.parametrize("blamed", [True, False])
def test_a_death_in_a_drain_is_blamed_as_any_other(
    play: Callable[..., World], blamed: bool
) -> None:
    async def script(w: World) -> None:
        w.hold("i1", 2)
        await w.fleet.drain(I1, "a user's order")
        await asyncio.sleep(0.1)
        w.kill("i1", "KeyError: a bug", blamed=blamed)
        await asyncio.sleep(1)
        assert w.states == {"i0": "serving"}
        assert w.client.blamed == {1: blamed}

    with counted() as found:
        play(script)
    assert found == {
        f"engine_deaths_total ended {str(blamed).lower()}": 1,
        "drains_total user died": 1,
        "drain_seconds_count died": 1,
        "instance_start_seconds_count": 2,
    }


def test_a_death_is_counted_once_though_a_drain_comes_while_its_streams_are_ended(
    play: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(w: World) -> None:
        lose = w.client.lose

        async def slowly(*args: Any, **more: Any) -> int:
            await asyncio.sleep(1)
            return await lose(*args, **more)

        monkeypatch.setattr(w.client, "lose", slowly)
        w.kill("i1")
        await asyncio.sleep(0.1)
        await w.fleet.drain(I1, "a user's order")
        await asyncio.sleep(5)
        assert w.states == {"i0": "serving"}

    with counted() as found:
        play(script)
    assert found == {
        "engine_deaths_total ended false": 1,
        "drains_total user died": 1,
        "drain_seconds_count died": 1,
        "instance_start_seconds_count": 2,
    }


def test_a_new_run_is_not_called_silent_for_the_silence_of_the_one_before(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.report(0)
        await asyncio.sleep(LOOK_EVERY_S)
        await silence(w, SILENT_LOOKS + 1)
        assert w.states["i1"] == "hung"
        w.kill("i1")
        await asyncio.sleep(1.5 * LOOK_EVERY_S)
        assert w.states["i1"] == "serving"
        w.hold("i1", 2)
        w.client.link.reports = [r for r in w.client.link.reports or [] if r.instance == "i0"]
        await asyncio.sleep(SILENT_LOOKS * LOOK_EVERY_S)
        assert w.states["i1"] == "serving"
        (held,) = (n for engine, n in w.client.held.items() if engine > 1)
        assert held == 2

    play(script)


def test_nothing_is_concluded_without_a_controller_or_while_engines_are_paused(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.report(0)
        await asyncio.sleep(1)
        w.client.link.reports = None
        await asyncio.sleep(100)
        w.client.link.reports = []
        state = w.client.shared_state
        state.end(state.begin("pause_scheduler", ("keep", True)), [None])
        for sequence in range(1, 40):
            w.report(sequence, stalled_s=sequence)
            await asyncio.sleep(LOOK_EVERY_S)
            assert w.states == {"i0": "serving", "i1": "serving"}

    play(script)


def test_a_drain_goes_on_once_the_only_other_instance_hangs_no_more(
    play: Callable[..., World],
) -> None:
    async def script(w: World) -> None:
        w.hold("i0", 1)
        await w.fleet.drain(I0, "a user's order")
        for sequence in range(20):
            w.report(sequence)
            w.report(sequence, stalled_s=sequence * LOOK_EVERY_S, only="i1", steps=1)
            await asyncio.sleep(LOOK_EVERY_S)
        assert w.states == {"i0": "draining", "i1": "hung"}
        assert w.accepting("i0")
        assert taking(w) == ["i0"]
        w.report(20)
        await asyncio.sleep(1.5 * LOOK_EVERY_S)
        assert w.states == {"i0": "draining", "i1": "serving"}
        assert not w.accepting("i0")
        assert taking(w) == ["i1"]
        w.client.held.clear()
        await asyncio.sleep(LOOK_EVERY_S)
        assert w.states == {"i1": "serving"}

    play(script)


def test_a_hung_instance_stands_in_for_nobody(play: Callable[..., World]) -> None:
    async def script(w: World) -> None:
        w.hold("i0", 1)
        w.hold("i1", 1)

        async def reports(numbers: range) -> None:
            for sequence in numbers:
                w.report(sequence)
                w.report(sequence, stalled_s=sequence, only="i1")
                await asyncio.sleep(LOOK_EVERY_S)

        await reports(range(20))
        await w.fleet.drain(I0, "a user's order", timeout_s=1)
        assert w.accepting("i0")
        await reports(range(20, 30))
        assert w.states == {"i0": "serving", "i1": "hung"}
        status = await w.fleet.drain(I1, "a user's order", timeout_s=1)
        assert (status.state, status.hung) == ("draining", True)
        await reports(range(30, 40))
        assert w.states == {"i0": "serving"}

    play(script)
