"""What follows when the processes of an engine stand still, or a whole host does."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.cluster.supervision.hosts import LOST_S
from llumnix.core.codes import DeathCode
from llumnix.core.supervision.blame import Death, Fenced
from llumnix.core.supervision.hang import (
    EMPTY_LOOKS,
    HOST_LOST_LOOKS,
    LOOK_EVERY_S,
    Standstill,
)
from llumnix.core.types import EngineIndex, RequestId
from llumnix.errors import LastInstanceError
from support.virtual_time import run

from .fakes import I0, I1, I2, World


class FakeHosts:
    """`silent` hosts do not answer; `killed` engines were to be ended. Once a host has been asked
    for as long as it takes, `late` is how it says that an engine died."""

    def __init__(self) -> None:
        self.silent: set[str] = set()
        self.watched: list[set[EngineIndex]] = []
        self.looked_at: list[EngineIndex] = []
        self.first_look_s = 0.001
        self.killed: list[EngineIndex] = []
        self.worker_crashed = False
        self.late: Death | None = None
        self.waited_for = False
        self.recorded: dict[EngineIndex, frozenset[RequestId]] = {}
        self.closed = False
        self.tail_s = 0.001
        self.killed_before_tail = False

    def watch(self, runs: Any) -> None:
        self.watched.append({run.engine_index for run in runs})

    async def first_look(self, run: Any) -> None:
        self.looked_at.append(run.engine_index)
        await asyncio.wait([run.ended], timeout=self.first_look_s)

    def silent_s(self, host: str) -> float:
        return 60.0 if host in self.silent else 0.0

    async def kill(self, run: Any) -> None:
        self.killed.append(run.engine_index)
        await asyncio.sleep(0.001)
        run.end(Death(why="killed by signal 9"))  # As Ray has it.

    async def examine(self, run: Any, death: Death) -> Death:
        if death.fenced:
            return death
        await asyncio.sleep(0.001)
        if self.waited_for and self.late is not None:
            return self.late
        return replace(death, blamed=death.blamed or self.worker_crashed)

    async def lost(self, run: Any) -> bool:
        self.waited_for = True
        if run.facts is None or run.facts.host not in self.silent:
            return False
        await asyncio.sleep(LOST_S)
        return run.facts.host in self.silent

    async def tail(self, run: Any) -> list[str]:
        await asyncio.sleep(self.tail_s)
        self.killed_before_tail = run.engine_index in self.killed
        return [f"last words of engine {run.engine_index}"]

    async def suspects(self, run: Any) -> frozenset[RequestId] | None:
        await asyncio.sleep(0.001)
        return self.recorded.get(run.engine_index)

    def close(self) -> None:
        self.closed = True


class Hosted(World):
    """Each instance's engine is on a host of its own, `h0` and so on, but for i1 and i2."""

    hosts: FakeHosts

    async def start(self, count: int = 3) -> "Hosted":
        fleet: Any = self.fleet
        self.hosts = FakeHosts()
        fleet._hosts = fleet._supervisor._hosts = fleet._watcher._hosts = self.hosts
        await super().start(count)
        self.place()
        return self

    def place(self) -> None:
        """Says where the engines that have come up are."""
        for number, member in enumerate(self.fleet._members.values()):
            assert member.run is not None
            host = "h0" if number == 0 else "h1"
            pid = 1000 * (1 + member.run.engine_index)
            facts = SimpleNamespace(host=host, node=host, pid=pid, workers=[pid + 1], devices=[])
            member.run.facts = facts  # type: ignore[assignment]

    async def looks(self, times: int, *silent: str) -> None:
        """So many looks find news of all but these instances."""
        for _ in range(times):
            self.sequence = getattr(self, "sequence", 0) + 1
            for instance in ("i0", "i1", "i2"):
                if instance not in silent:
                    self.report(self.sequence, only=instance)
            await asyncio.sleep(LOOK_EVERY_S)


Script = Callable[[Hosted], Awaitable[None]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], Hosted]:
    def play(script: Script) -> Hosted:
        async def main() -> Hosted:
            world = Hosted(monkeypatch, instances=3)
            await world.start(3)
            world.launcher.ready_s = 5
            await script(world)
            await world.fleet.close()
            assert world.hosts.closed
            return world

        world: Hosted = run(main())
        return world

    return play


@pytest.mark.parametrize("controller", [True, False])
def test_an_engine_whose_process_is_stopped_is_lost_killed_and_started_again(
    play: Callable[[Script], Hosted], controller: bool
) -> None:
    async def script(w: Hosted) -> None:
        w.hold("i1", 2)
        if not controller:
            w.client.link.reports = None
        for _ in range(3):  # Look by look.
            w.fleet._stopped(EngineIndex(1), Standstill(pid=2000, gone=False))
            await asyncio.sleep(0.01)
        assert w.client.held[1] == 0
        assert w.hosts.killed == [1]
        assert w.states["i1"] == "restarting"
        assert w.why["i1"] == "fenced: its process is stopped"
        assert w.client.blamed == {1: False}
        await asyncio.sleep(6)
        assert w.states == {"i0": "serving", "i1": "serving", "i2": "serving"}
        assert w.launcher.ended == [1]
        assert w.hosts.watched[-1] == {0, 2, 3}

    play(script)


def test_an_instance_serves_once_its_host_has_been_looked_into(
    play: Callable[[Script], Hosted],
) -> None:
    async def script(w: Hosted) -> None:
        assert w.hosts.looked_at == [0, 1, 2]
        w.hosts.first_look_s = 3
        w.kill("i1")
        await asyncio.sleep(7)
        assert w.states["i1"] != "serving"
        await asyncio.sleep(3)
        assert w.states["i1"] == "serving"
        assert w.hosts.looked_at == [0, 1, 2, 3]

    play(script)


def test_an_instance_that_dies_before_its_host_has_been_looked_into_never_serves(
    play: Callable[[Script], Hosted], caplog: pytest.LogCaptureFixture
) -> None:
    async def script(w: Hosted) -> None:
        w.hosts.first_look_s = 3
        w.kill("i1")
        while 3 not in w.hosts.looked_at:
            await asyncio.sleep(0.1)
        w.kill("i1")
        while 4 not in w.hosts.looked_at:
            await asyncio.sleep(0.1)
            assert w.states["i1"] != "serving"
        assert not [m for m in caplog.messages if "i1 serves again" in m]
        await asyncio.sleep(4)
        assert [m for m in caplog.messages if "i1 serves again" in m]

    with caplog.at_level(logging.INFO):
        play(script)


@pytest.mark.parametrize("crashed", [True, False])
def test_an_engine_whose_worker_is_gone_is_fenced_and_blamed_for_a_crash(
    play: Callable[[Script], Hosted], crashed: bool
) -> None:
    async def script(w: Hosted) -> None:
        w.hosts.worker_crashed = crashed
        w.hold("i1", 2)
        w.fleet._stopped(EngineIndex(1), Standstill(pid=2001, gone=True))
        await asyncio.sleep(0.01)
        assert w.client.held[1] == 0
        assert w.why["i1"] == "fenced: its worker process 2001 is gone"
        assert w.client.blamed == {1: crashed}

    play(script)


def test_a_stopped_worker_is_named(play: Callable[[Script], Hosted]) -> None:
    async def script(w: Hosted) -> None:
        w.fleet._stopped(EngineIndex(1), Standstill(pid=2001, gone=False))
        await asyncio.sleep(0.01)
        assert w.why["i1"] == "fenced: its worker process 2001 is stopped"

    play(script)


def test_streams_end_before_the_kill_and_though_it_fails(
    play: Callable[[Script], Hosted], caplog: pytest.LogCaptureFixture
) -> None:
    async def script(w: Hosted) -> None:
        held: list[int] = []

        async def kill(run: Any) -> None:
            held.append(w.client.held[1])
            raise RuntimeError("Ray is gone")

        w.hosts.kill = kill  # type: ignore[method-assign]
        w.hold("i1", 2)
        w.fleet._stopped(EngineIndex(1), Standstill(pid=2000, gone=False))
        await asyncio.sleep(6)
        assert held == [0]
        assert w.states["i1"] == "serving"

    with caplog.at_level(logging.ERROR):
        play(script)
    assert "Engine 1 could not be fenced" in caplog.messages


def test_an_engine_that_is_being_ended_is_not_fenced(play: Callable[[Script], Hosted]) -> None:
    """Its workers leave before it does."""

    async def script(w: Hosted) -> None:
        member = w.member("i1")
        assert member.run is not None
        member.run.unwanted = True
        w.fleet._stopped(EngineIndex(1), Standstill(pid=2001, gone=True))
        await asyncio.sleep(0.1)
        assert w.hosts.killed == []
        assert w.states["i1"] == "serving"

    play(script)


def test_a_word_about_an_engine_that_is_gone_changes_nothing(
    play: Callable[[Script], Hosted],
) -> None:
    async def script(w: Hosted) -> None:
        w.kill("i1")
        await asyncio.sleep(6)
        w.fleet._stopped(EngineIndex(1), Standstill(pid=2000, gone=False))
        await asyncio.sleep(0.1)
        assert w.hosts.killed == []
        assert w.states["i1"] == "serving"

    play(script)


def test_all_engines_of_a_host_are_lost_once_neither_it_nor_they_are_heard_of(
    play: Callable[[Script], Hosted],
) -> None:
    async def script(w: Hosted) -> None:
        w.hold("i1", 2)
        w.hold("i2", 1)
        await w.looks(2)
        w.hosts.silent = {"h1"}
        await w.looks(HOST_LOST_LOOKS - 1, "i1", "i2")
        assert (w.client.held[1], w.client.held[2]) == (2, 1)
        await w.looks(2, "i1", "i2")
        assert (w.client.held[1], w.client.held[2]) == (0, 0)
        assert w.states == {"i0": "serving", "i1": "restarting", "i2": "restarting"}
        assert w.why["i1"] == "fenced: its host does not answer"
        assert w.client.blamed == {1: False, 2: False}

    play(script)


@pytest.mark.parametrize("sign", ["its watcher", "a report", "outputs"])
def test_a_host_of_which_anything_is_heard_is_not_lost(
    play: Callable[[Script], Hosted], sign: str
) -> None:
    async def script(w: Hosted) -> None:
        await w.looks(2)
        w.hosts.silent = {"h1"} if sign != "its watcher" else set()
        for number in range(2 * HOST_LOST_LOOKS):
            if sign == "outputs":
                w.client.heard[2] = number
            await w.looks(1, *(["i1", "i2"] if sign != "a report" else ["i1"]))
        assert w.hosts.killed == []

    play(script)


def test_an_engine_that_does_not_know_of_its_requests_is_fenced(
    play: Callable[[Script], Hosted],
) -> None:
    """All engines of this fleet report that they have none."""

    async def script(w: Hosted) -> None:
        w.hold("i1", 2)
        await w.looks(EMPTY_LOOKS - 1)
        assert w.hosts.killed == []
        await w.looks(3)
        assert w.hosts.killed == [1]
        assert (w.client.held[1], w.client.blamed) == (0, {1: False})
        assert w.why["i1"] == "fenced: it does not know of requests that it was given"

    play(script)


def test_a_lost_instance_can_be_drained(play: Callable[[Script], Hosted]) -> None:
    async def script(w: Hosted) -> None:
        w.fleet._stopped(EngineIndex(1), Standstill(pid=2000, gone=False))
        await asyncio.sleep(0.01)
        await w.fleet.drain(I1, "a user's order")
        await asyncio.sleep(0.1)
        assert set(w.states) == {"i0", "i2"}

    play(script)


def test_the_frontend_is_told_of_which_requests_an_engine_may_have_died(
    play: Callable[..., Hosted],
) -> None:
    async def script(w: Hosted) -> None:
        found = frozenset({RequestId("a")})
        w.hosts.recorded = dict.fromkeys(map(EngineIndex, range(3)), found)
        w.kill("i0", "KeyError: a bug", blamed=True)
        w.kill("i1")
        member = w.member("i2")
        assert member.run is not None
        fenced = Fenced(why="it makes no step", blamed=True)
        await w.fleet._supervisor.fence(member, member.run, fenced)
        await asyncio.sleep(0.2)
        assert w.client.suspects == {0: found, 1: None, 2: found}, "a kill is nobody's fault"

    play(script)


def test_a_fence_names_the_suspects_before_the_instance_is_started_again(
    play: Callable[..., Hosted],
) -> None:
    async def script(w: Hosted) -> None:
        found = frozenset({RequestId("a")})
        w.hosts.recorded, w.hosts.worker_crashed = {EngineIndex(1): found}, True
        w.fleet._stopped(EngineIndex(1), Standstill(pid=2001, gone=True))
        await asyncio.sleep(0.1)
        assert w.states["i1"] == "restarting"
        assert w.client.suspects == {1: found}
        assert w.client.blamed == {1: True}

    play(script)


def test_a_death_is_one_line_with_its_cause_and_the_end_of_the_engines_log(
    play: Callable[[Script], Hosted], caplog: pytest.LogCaptureFixture
) -> None:
    async def script(w: Hosted) -> None:
        w.kill("i0", "it ran out of luck", blamed=True)
        await asyncio.sleep(6)
        w.fleet._stopped(EngineIndex(1), Standstill(pid=2000, gone=False))
        await asyncio.sleep(6)

    with caplog.at_level(logging.INFO):
        play(script)
    told = [r for r in caplog.records if getattr(r, "llumnix", {}).get("event") == "death"]
    first, second = [(r.getMessage(), getattr(r, "llumnix")) for r in told]  # noqa: B009
    assert first[0] == (
        "Instance i0 died (it ran out of luck); 0 of its streams ended; a request may have caused "
        "that."
    )
    assert (first[1]["instance"], first[1]["blamed"]) == ("i0", True)
    assert first[1]["tail"] == ["last words of engine 0"]
    assert second[0].startswith("Instance i1 is fenced (its process is stopped)")
    assert (second[1]["cause"], second[1]["tail"]) == ("stopped", ["last words of engine 1"])
    events = [r.llumnix["event"] for r in caplog.records if hasattr(r, "llumnix")]
    assert events == ["death", "restart", "ready"] * 2


@pytest.mark.parametrize(
    ("silent", "code", "told"),
    [
        (True, DeathCode.EXIT, "node"),
        (False, DeathCode.EXIT, "exit"),
        (True, DeathCode.OOM, "oom"),
    ],
)
def test_an_end_whose_host_is_silent_is_the_loss_of_that_host(
    play: Callable[[Script], Hosted],
    caplog: pytest.LogCaptureFixture,
    silent: bool,
    code: DeathCode,
    told: str,
) -> None:
    async def script(w: Hosted) -> None:
        dying = w.member("i0").run
        assert dying is not None
        assert dying.ended is not None
        if silent:
            w.hosts.silent.add("h0")
        dying.ended.set_result(Death(why="it is gone", code=code))
        await asyncio.sleep(6)

    with caplog.at_level(logging.INFO):
        play(script)
    causes = [r.llumnix["cause"] for r in caplog.records if "cause" in getattr(r, "llumnix", {})]
    assert causes == [told]


def test_the_cause_is_told_that_a_busy_host_names_late(
    play: Callable[[Script], Hosted], caplog: pytest.LogCaptureFixture
) -> None:
    async def script(w: Hosted) -> None:
        w.hosts.late = Death(why="it is gone", blamed=True, code=DeathCode.OOM)
        w.kill("i0")
        await asyncio.sleep(6)

    with caplog.at_level(logging.INFO):
        play(script)
    deaths = [r.llumnix for r in caplog.records if "cause" in getattr(r, "llumnix", {})]
    assert [(d["cause"], d["blamed"]) for d in deaths] == [("oom", False)], (
        "its streams were told that no request is suspected"
    )


def test_an_instance_whose_host_may_be_lost_stands_in_for_no_other(
    play: Callable[[Script], Hosted],
) -> None:
    async def script(w: Hosted) -> None:
        w.hosts.silent.add("h1")
        for dead in ("i1", "i2"):
            w.kill(dead)
            await asyncio.sleep(LOST_S / 3)
            assert w.states[dead] == "restarting"
            seen = [(s.takes_requests, s.restarts) for s in w.fleet.status() if s.id == dead]
            assert seen == [(False, 0)], "its host is still asked how it died"
        with pytest.raises(LastInstanceError):
            await w.fleet.drain(I0, "a user's order")
        await w.fleet.drain(I1, "a user's order")
        await asyncio.sleep(LOST_S / 3)
        assert set(w.states) == {"i0", "i2"}

    play(script)


def test_a_drained_instance_takes_requests_at_once_though_the_others_host_may_not_be_lost(
    play: Callable[[Script], Hosted],
) -> None:
    async def script(w: Hosted) -> None:
        w.hosts.silent.add("h1")
        w.hold("i0", 1)
        w.hold("i2", 2)
        await w.fleet.drain(I0, "a user's order")
        w.kill("i1")
        await asyncio.sleep(0.1)
        assert not w.accepting("i0")
        w.kill("i2")
        await asyncio.sleep(0.1)
        assert w.accepting("i0")
        assert w.client.held[2] == 0, "its streams do not wait for what is found out of its host"
        assert w.states == {"i0": "draining", "i1": "restarting", "i2": "restarting"}
        await asyncio.sleep(15)
        assert w.states == {"i1": "serving", "i2": "serving", "i0": "draining"}
        assert not w.accepting("i0")

    play(script)


@pytest.mark.parametrize("again", [True, False])
def test_a_death_is_told_though_an_order_comes_before_its_host_is_known_to_be_lost(
    play: Callable[[Script], Hosted], caplog: pytest.LogCaptureFixture, again: bool
) -> None:
    async def script(w: Hosted) -> None:
        w.hosts.silent.add("h1")
        w.hold("i1", 3)
        w.kill("i1")
        w.kill("i2")
        await asyncio.sleep(1)
        await w.fleet.drain(I1, "a user's order", again=again)
        await asyncio.sleep(1)
        assert w.fleet.status()[-1].id == I2
        # i2's is told as the fleet is closed.

    with caplog.at_level(logging.ERROR):
        play(script)
    assert caplog.messages == [
        "Instance i1 died (killed); 3 of its streams ended.",
        "Instance i2 died (killed); 0 of its streams ended.",
    ]


def test_what_is_fenced_counts_as_dead_though_the_log_is_slow(
    play: Callable[[Script], Hosted],
) -> None:
    async def script(w: Hosted) -> None:
        w.hosts.tail_s = 0.4
        w.hold("i0", 1)
        await w.fleet.drain(I0, "a user's order")
        w.kill("i1")
        await asyncio.sleep(0.1)
        assert not w.accepting("i0")
        w.fleet._stopped(EngineIndex(2), Standstill(pid=3000, gone=False))
        await asyncio.sleep(0.1)
        assert w.fleet.status()[2].takes_requests is False
        assert w.states["i2"] == "restarting"
        assert w.accepting("i0")

    play(script)


def test_a_fence_kills_though_the_log_is_slow_and_its_word_of_the_death_stands(
    play: Callable[[Script], Hosted], caplog: pytest.LogCaptureFixture
) -> None:
    async def script(w: Hosted) -> None:
        w.hosts.tail_s = 0.4
        w.fleet._stopped(EngineIndex(1), Standstill(pid=2000, gone=False))
        await asyncio.sleep(7)
        assert w.hosts.killed_before_tail

    with caplog.at_level(logging.INFO):
        play(script)
    told = [r for r in caplog.records if hasattr(r, "llumnix")]
    assert [r.llumnix["event"] for r in told] == ["death", "restart", "ready"]
    assert told[0].getMessage().startswith("Instance i1 is fenced (its process is stopped)")
    assert getattr(told[0], "llumnix")["tail"] == ["last words of engine 1"]  # noqa: B009
