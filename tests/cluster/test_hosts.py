"""How engines' processes are watched and ended, with real processes and with a host of our own."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import ray

from llumnix.cluster import ray_runtime
from llumnix.cluster.supervision import hosts as hosts_module
from llumnix.cluster.supervision import processes as processes_module
from llumnix.cluster.supervision.hosts import LOOKED_FOR_S, Hosts, HostWatch, OtherHost
from llumnix.cluster.supervision.processes import (
    MIND_EVERY_S,
    UNASKED_S,
    HostAgent,
    HostLook,
    HostProcesses,
    Process,
    Remains,
)
from llumnix.core.codes import DeathCode
from llumnix.core.supervision.blame import Death, Traces
from llumnix.core.supervision.hang import LOOK_EVERY_S, STANDSTILL_LOOKS, Standstill
from llumnix.core.types import EngineIndex, RequestId
from llumnix.engine.reporting.flight_recorder import Flight, FlightRecorder
from support.endless import sweepers_end

E1, E2 = EngineIndex(1), EngineIndex(2)
SLEEPER = "import time; time.sleep(600)"
LEADER = (
    "import subprocess, sys, time; "
    f"print(subprocess.Popen([sys.executable, '-c', '{SLEEPER}']).pid, flush=True); "
    "time.sleep(600)"
)


def until(true: Callable[[], Any], timeout_s: float = 10.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def ended(pid: int) -> bool:
    process = HostProcesses().look([pid]).processes.get(pid)
    return process is None or process.state in "ZX"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that leads a process group, as a Ray actor's does; it prints its child's id."""
    command = [sys.executable, "-c", LEADER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as process:
        yield process
        process.kill()


def childs_child(child: subprocess.Popen[str]) -> int:
    assert child.stdout is not None
    return int(child.stdout.readline())


# -- processes


def test_a_look_tells_which_processes_are_stopped_and_which_are_gone(
    child: subprocess.Popen[str],
) -> None:
    here = HostProcesses()
    look = here.look([os.getpid(), child.pid])
    assert look.processes[os.getpid()].state in "RS"
    assert look.processes[child.pid].started >= look.processes[os.getpid()].started > 0
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: here.look([child.pid]).processes[child.pid].state == "T")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert here.look([child.pid]).processes == {}


def test_a_stopped_process_is_ended_with_its_group(child: subprocess.Popen[str]) -> None:
    grandchild = childs_child(child)
    for pid in (child.pid, grandchild):
        os.kill(pid, signal.SIGSTOP)
    HostProcesses().kill({child.pid: None})
    assert child.wait(10) == -signal.SIGKILL
    until(lambda: ended(grandchild))


def test_a_process_with_the_same_id_and_another_start_is_left_alone(
    child: subprocess.Popen[str],
) -> None:
    started = HostProcesses().look([child.pid]).processes[child.pid].started
    HostProcesses().kill({child.pid: started + 1})
    time.sleep(0.1)
    assert child.poll() is None
    HostProcesses().kill({child.pid: started})
    assert child.wait(10) == -signal.SIGKILL


@pytest.fixture(autouse=True)
def agents_end() -> Iterator[None]:
    with sweepers_end(processes_module):
        yield


class CutOff:
    """An agent whose clock the test sets, which was asked about the child."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.now_s = 0.0
        self.agent = HostAgent(clock=lambda: self.now_s)
        self.agent.look([child.pid])

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / MIND_EVERY_S)):
            self.now_s += MIND_EVERY_S
            self.agent.mind()


def test_a_host_that_the_fleet_does_not_ask_any_more_ends_its_engines(
    child: subprocess.Popen[str],
) -> None:
    grandchild = childs_child(child)
    alone = CutOff(child)
    alone.wait(UNASKED_S)
    alone.agent.look([child.pid])
    alone.wait(UNASKED_S)
    assert child.poll() is None
    alone.wait(MIND_EVERY_S)
    assert child.wait(10) == -signal.SIGKILL
    until(lambda: ended(grandchild))


def test_an_agent_minds_only_the_engines_it_was_asked_for_last(
    child: subprocess.Popen[str],
) -> None:
    alone = CutOff(child)
    alone.agent.look([])
    alone.wait(3 * UNASKED_S)
    time.sleep(0.1)
    assert child.poll() is None


def test_a_host_that_stood_still_gives_the_fleet_its_time_again(
    child: subprocess.Popen[str],
) -> None:
    alone = CutOff(child)
    alone.now_s += 100
    alone.agent.mind()
    alone.wait(UNASKED_S)
    time.sleep(0.1)
    assert child.poll() is None
    alone.wait(MIND_EVERY_S)
    assert child.wait(10) == -signal.SIGKILL


def test_an_agent_minds_by_itself(
    child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes_module, "MIND_EVERY_S", 0.02)
    monkeypatch.setattr(processes_module, "UNASKED_S", 0.1)
    HostAgent().look([child.pid])
    assert child.wait(10) == -signal.SIGKILL


def test_an_agent_sweeps_the_shared_memory_of_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    swept = threading.Event()
    monkeypatch.setattr(processes_module, "MIND_EVERY_S", 0.02)
    monkeypatch.setattr(processes_module, "sweep_memory", swept.set)
    HostAgent()
    assert swept.wait(10)


def test_a_process_that_leads_no_group_is_ended_alone(child: subprocess.Popen[str]) -> None:
    """Its group may be ours."""
    grandchild = childs_child(child)
    HostProcesses().kill({grandchild: None})
    until(lambda: ended(grandchild))
    assert child.poll() is None


@pytest.mark.parametrize(
    ("line", "traces"),
    [
        ("all is well", Traces()),
        ("Fatal Python error: Segmentation fault", Traces(crashed=True)),
        ("Fatal Python error: Aborted", Traces(crashed=True)),
        ("!!!!!!! Segfault encountered !!!!!!!", Traces(crashed=True)),
        ("ERROR [core.py:9] EngineCore encountered a fatal error.", Traces(raised=True)),
        (
            "(EngineCore pid=7) ERROR Worker proc VllmWorker-1 died unexpectedly (exit code: -9), "
            "shutting down executor.",
            Traces(worker_exit=-9),
        ),
        (  # vLLM looked before the kernel had its status.
            "ERROR Worker proc VllmWorker-1 died unexpectedly (exit code: None), shutting down",
            Traces(),
        ),
    ],
)
def test_a_log_tells_how_an_engine_ended(
    monkeypatch: pytest.MonkeyPatch, line: str, traces: Traces
) -> None:
    logs = {7: ["began", line, "", "Worker proc b died unexpectedly (exit code: 0)"][:3]}
    monkeypatch.setattr(ray_runtime, "log_tail", logs.__getitem__)
    assert HostProcesses().examine(7).traces == traces


# -- the watch of one host


class FakeHost:
    """Processes in states that the test sets."""

    def __init__(self) -> None:
        self.states: dict[int, str] = {}
        self.started: dict[int, int] = {}
        self.killed: dict[int, int | None] = {}
        self.memory_kills = 0
        self.traces = Traces()
        self.flights: dict[str, Flight] = {}
        self.fails: Exception | None = None
        self.asked: list[list[int]] = []

    def look(self, pids: Iterable[int]) -> HostLook:
        self.asked.append(list(pids))
        if self.fails is not None:
            raise self.fails
        there = {
            p: Process(self.states[p], self.started.get(p, 5))
            for p in self.asked[-1]
            if p in self.states
        }
        return HostLook(there, self.memory_kills)

    def kill(self, processes: Mapping[int, int | None]) -> None:
        self.killed.update(processes)

    def examine(self, pid: int) -> Remains:
        return Remains(self.traces, self.memory_kills, ["its last line"])

    def take_flight(self, path: str) -> Flight | None:
        return self.flights.pop(path, None)


class Watched:
    """Two engines on one host, the first with a worker; the clock goes on from look to look."""

    def __init__(self) -> None:
        self.host = FakeHost()
        self.host.states = {10: "S", 11: "R", 20: "S"}
        self.now_s = 0.0
        self.told: list[tuple[int, Standstill]] = []
        self.watch = HostWatch(
            self.host, lambda *what: self.told.append(what), clock=lambda: self.now_s
        )
        self.watch.watch({E1: (10, 11), E2: (20,)})
        self.look()

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.now_s += LOOK_EVERY_S
            self.watch.look()


def test_an_engine_is_told_of_whose_worker_is_stopped() -> None:
    w = Watched()
    w.host.states[11] = "T"
    w.look(STANDSTILL_LOOKS - 1)
    assert w.told == []
    w.look()
    assert w.told == [(E1, Standstill(pid=11, gone=False))]


def test_an_engine_is_told_of_whose_process_is_gone_or_another_by_now() -> None:
    w = Watched()
    del w.host.states[11]
    w.host.started[20] = 99
    w.look(STANDSTILL_LOOKS)
    assert sorted(w.told) == [
        (E1, Standstill(pid=11, gone=True)),
        (E2, Standstill(pid=20, gone=True)),
    ]


def test_one_that_was_never_seen_is_not_missed() -> None:
    w = Watched()
    w.watch.watch({EngineIndex(3): (10, 99)})
    w.look(10)
    assert w.told == []


def test_an_engine_that_is_watched_no_more_is_forgotten() -> None:
    w = Watched()
    w.host.states[20] = "T"
    w.look(STANDSTILL_LOOKS - 1)
    w.watch.watch({})
    w.look(10)
    w.watch.watch({E2: (20,)})
    w.look(STANDSTILL_LOOKS - 1)
    assert w.told == []


def test_a_kill_names_the_processes_that_were_seen() -> None:
    w = Watched()
    w.watch.kill(E1, (10, 11))
    w.watch.kill(EngineIndex(3), (30,))
    assert w.host.killed == {10: 5, 11: 5, 30: None}


def test_a_kill_for_want_of_memory_is_told_by_the_kernels_count() -> None:
    w = Watched()
    w.host.memory_kills = 1
    assert w.watch.remains(10).traces.out_of_memory
    w.look(100)
    assert not w.watch.remains(10).traces.out_of_memory, "that was before"


def test_a_host_that_does_not_answer_is_silent_since_its_last_answer() -> None:
    w = Watched()
    w.host.fails = TimeoutError()
    w.now_s += 3.0
    with pytest.raises(TimeoutError):
        w.watch.look()
    assert w.watch.silent_s == 3.0
    assert HostWatch(w.host, lambda *_: None).silent_s == 0.0, "it has not answered yet"


def test_a_host_without_engines_of_ours_is_told_so_once() -> None:
    """Its agent would end those that stop by themselves."""
    w = Watched()
    w.watch.watch({})
    w.watch.start()
    until(lambda: len(w.host.asked) > 1)
    time.sleep(2 * LOOK_EVERY_S)
    w.watch.close()
    assert w.host.asked[1:] == [[]]
    assert w.watch.silent_s == 0.0


def test_the_thread_looks_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts_module, "AGAIN_S", 0.01)
    w = Watched()
    w.host.fails = RuntimeError("the raylet is gone")
    w.watch.start()
    time.sleep(LOOK_EVERY_S + 0.1)
    w.host.fails = None
    before = len(w.watch._memory_kills)
    until(lambda: len(w.watch._memory_kills) > before)
    w.watch.close()


def test_a_host_without_engines_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    w = Watched()
    w.watch.watch({})
    w.watch.start()
    until(lambda: w.watch.answered_s is None)
    looks = len(w.watch._memory_kills)
    time.sleep(2 * LOOK_EVERY_S)
    assert len(w.watch._memory_kills) == looks
    w.watch.watch({E1: (10, 11)})
    until(lambda: w.watch.answered_s is not None)
    w.watch.close()


# -- all hosts


def watched_on(host: str) -> tuple[Hosts, Watched]:
    """Hosts of which one is watched; it is our own if it is "ours"."""
    hosts, w = Hosts(lambda *_: None, here=lambda: "ours"), Watched()
    hosts._watches[host] = w.watch
    if host != "ours":
        hosts._others[host] = OtherHost(host)
    return hosts, w


def run_on(host: str, index: EngineIndex, *pids: int) -> Any:
    facts = SimpleNamespace(host=host, pid=pids[0], workers=list(pids[1:]), flight=f"f{index}")
    return SimpleNamespace(engine_index=index, facts=facts, remains=None)


@pytest.mark.parametrize("host", ["ours", "theirs"])
async def test_an_engine_elsewhere_serves_once_its_host_has_told_of_its_processes(
    host: str,
) -> None:
    hosts, w = watched_on(host)
    run = run_on(host, EngineIndex(3), 30, 31)
    run.alive = True
    w.host.states = {10: "S", 20: "S"}  # An answer to the question before, which came late.
    waiting = asyncio.create_task(hosts.first_look(run))
    await asyncio.sleep(3 * LOOKED_FOR_S)
    w.look()
    await asyncio.sleep(3 * LOOKED_FOR_S)
    assert waiting.done() is (host == "ours")
    w.host.states = {30: "R", 31: "S"}
    w.look()
    async with asyncio.timeout(5):
        await waiting
    if host == "theirs":
        assert w.host.asked[-1] == [10, 11, 20, 30, 31], "it is watched beside the others"


async def test_an_engine_that_dies_or_whose_host_is_silent_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hosts, _ = watched_on("theirs")
    run = run_on("theirs", EngineIndex(3), 30)
    run.alive = True
    waiting = asyncio.create_task(hosts.first_look(run))
    await asyncio.sleep(LOOKED_FOR_S)
    run.alive = False
    async with asyncio.timeout(5):
        await waiting
    assert not caplog.messages
    run.alive = True
    monkeypatch.setattr(hosts_module, "FIRST_LOOK_S", 3 * LOOKED_FOR_S)
    async with asyncio.timeout(5):
        await hosts.first_look(run)
    assert "Engine 3 serves on a host that has not answered" in caplog.text


async def test_a_stopped_process_is_noticed_though_the_event_loop_stands_still(
    child: subprocess.Popen[str],
) -> None:
    told: list[Any] = []
    hosts = Hosts(lambda *what: told.append(what), here=lambda: "ours")
    grandchild = childs_child(child)
    run = run_on("ours", E1, grandchild, child.pid)
    hosts.watch([run])
    time.sleep(2 * LOOK_EVERY_S)
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: told, 2.0)
    assert told[0] == (E1, Standstill(pid=child.pid, gone=False))
    assert hosts.silent_s("ours") == 0.0
    await hosts.kill(run)
    assert child.wait(10) == -signal.SIGKILL
    until(lambda: ended(grandchild))
    hosts.close()


@pytest.mark.parametrize(
    ("traces", "before", "after", "code"),
    [
        (Traces(crashed=True), False, True, DeathCode.SIGNAL),
        (Traces(worker_exit=-9), True, False, DeathCode.SIGNAL),
        (Traces(worker_exit=1), True, True, DeathCode.EXIT),
        (Traces(raised=True), False, True, DeathCode.EXIT),
        (Traces(), True, True, DeathCode.EXIT),
        (Traces(), False, False, DeathCode.SIGNAL),
    ],
)
async def test_a_death_is_blamed_by_what_its_host_knows(
    monkeypatch: pytest.MonkeyPatch, traces: Traces, before: bool, after: bool, code: DeathCode
) -> None:
    monkeypatch.setattr(hosts_module, "EXAMINED_S", 10)  # This machine may be busy.
    hosts, w = watched_on("ours")
    w.host.traces = traces
    run = run_on("ours", E1, 10)
    fenced = Death(why="fenced", blamed=before, fenced=True)
    assert await hosts.examine(run, fenced) == fenced
    assert run.remains is None, "nobody is asked of a fenced one"
    death = await hosts.examine(run, Death(why="it died", blamed=before))
    assert death == Death(why="it died", blamed=after, code=code)
    by_memory = await hosts.examine(run, Death(why="it died", blamed=True, code=DeathCode.OOM))
    assert by_memory.code is DeathCode.OOM, "Ray's word goes before the log's"
    assert await hosts.tail(run) == ["its last line"]
    elsewhere, new = Death(why="it died", blamed=before), run_on("new", E2, 1)
    assert await hosts.examine(new, elsewhere) == elsewhere
    new.last_words = ["what its start said"]
    assert await hosts.tail(new) == ["what its start said"]


async def test_a_host_that_does_not_say_how_an_engine_died_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosts_module, "EXAMINED_S", 0.05)
    hosts = Hosts(lambda *_: None, here=lambda: "ours")
    w = Watched()
    w.host.examine = lambda pid: time.sleep(0.5)  # type: ignore[assignment, method-assign, return-value]
    hosts._watches = {"ours": w.watch, "theirs": w.watch}
    hosts._others["theirs"] = OtherHost("theirs")
    death = Death(why="it died")
    for host in hosts._watches:  # It may be busy, and is not lost for that.
        async with asyncio.timeout(0.4):
            assert await hosts.examine(run_on(host, E1, 10), death) == death


def unavailable(pid: int) -> Remains:
    raise ConnectionError("the actor is unavailable")


@pytest.mark.parametrize("host", ["ours", "theirs"])
async def test_another_host_that_says_nothing_of_an_end_for_long_enough_is_lost(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(hosts_module, "LOST_S", 0.6)
    monkeypatch.setattr(hosts_module, "ASKED_AGAIN_S", 0.05)
    monkeypatch.setattr(hosts_module, "EXAMINED_S", 0.05)
    hosts, w = watched_on(host)
    tells = w.host.examine

    async def lost() -> bool:
        return await hosts.lost(run_on(host, E1, 10, 11))

    def slow(pid: int) -> Remains:
        time.sleep(0.2)
        return tells(pid)

    def silent(pid: int) -> Remains:
        time.sleep(1.0)
        return tells(pid)

    def fails(pid: int) -> Remains:
        raise ray.exceptions.RayTaskError("examine", "", PermissionError("its log"))

    for examine, is_lost in (
        (tells, False),
        (slow, False),
        (fails, False),
        (silent, True),
        (unavailable, True),
    ):
        w.host.examine = examine  # type: ignore[method-assign]
        assert await lost() == (is_lost and host == "theirs")
    asked: list[int] = []

    def refuses(pid: int) -> Remains:
        asked.append(pid)
        return unavailable(pid)

    w.host.examine = refuses  # type: ignore[method-assign]
    assert await lost() == (host == "theirs")
    assert len(asked) <= 0.6 / 0.05 + 1, "it is asked with pauses"
    asked.clear()

    def back(pid: int) -> Remains:
        asked.append(pid)
        return tells(pid) if len(asked) > 2 else unavailable(pid)

    w.host.examine = back  # type: ignore[method-assign]
    assert not await lost()
    assert asked == ([10] * 3 if host == "theirs" else [])
    assert not await hosts.lost(run_on("new", E1, 10))


@pytest.mark.parametrize("host", ["ours", "theirs"])
async def test_a_host_is_asked_once_how_an_engine_ended_and_its_late_word_counts(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(hosts_module, "EXAMINED_S", 0.05)
    hosts, w = watched_on(host)
    tells, asked = w.host.examine, list[int]()
    w.host.traces = Traces(crashed=True)

    def slow(pid: int) -> Remains:
        asked.append(pid)
        time.sleep(0.3)
        return tells(pid)

    w.host.examine = slow  # type: ignore[method-assign]
    run, death = run_on(host, E1, 10, 11), Death(why="it died", code=DeathCode.EXIT)
    assert await hosts.examine(run, death) == death, "its streams do not wait for it"
    assert await hosts.tail(run) == []
    waiting = asyncio.create_task(hosts.lost(run))
    await asyncio.sleep(0)
    waiting.cancel()  # An order.
    assert not await hosts.lost(run)
    await run.remains
    assert (await hosts.examine(run, death)).code is DeathCode.SIGNAL
    assert await hosts.tail(run) == ["its last line"]
    assert asked == [10]


@pytest.mark.parametrize("host", ["ours", "theirs"])
async def test_a_host_that_cannot_read_a_log_is_not_asked_again(host: str) -> None:
    (hosts, w), asked = watched_on(host), list[int]()

    def fails(pid: int) -> Remains:
        asked.append(pid)
        error = PermissionError("its log")
        raise error if host == "ours" else ray.exceptions.RayTaskError("examine", "", error)

    w.host.examine = fails  # type: ignore[method-assign]
    run, death = run_on(host, E1, 10), Death(why="its engine stopped", code=DeathCode.EXIT)
    async with asyncio.timeout(hosts_module.EXAMINED_S):
        assert await hosts.examine(run, death) == death
        assert await hosts.tail(run) == []
        assert not await hosts.lost(run)
    assert asked == [10]


async def test_what_an_engine_computed_is_read_where_it_ran(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hosts_module, "EXAMINED_S", 0.05)
    hosts, w = watched_on("ours")
    a, b = RequestId("a"), RequestId("b")
    w.host.flights["f1"] = Flight(starting=frozenset({a}), running=frozenset({a, b}))
    w.host.flights["f2"] = Flight(starting=frozenset(), running=frozenset({a, b}))
    assert await hosts.suspects(run_on("ours", EngineIndex(1), 10)) == {a}
    assert await hosts.suspects(run_on("ours", EngineIndex(2), 10)) == {a, b}
    assert await hosts.suspects(run_on("ours", EngineIndex(2), 10)) is None
    assert await hosts.suspects(run_on("new", EngineIndex(2), 10)) is None
    w.host.take_flight = lambda path: time.sleep(0.5)  # type: ignore[assignment, method-assign, return-value]
    async with asyncio.timeout(0.4):
        assert await hosts.suspects(run_on("ours", EngineIndex(1), 10)) is None
    told = "Engine 1 left no flight recorder, so all its requests are suspects: TimeoutError()"
    assert caplog.messages == [told]


def test_the_file_of_a_flight_recorder_goes_once_it_was_read(tmp_path: Path) -> None:
    core: Any = SimpleNamespace(
        model_executor=SimpleNamespace(execute_model=None), scheduler=None, batch_queue=None
    )
    path = FlightRecorder(tmp_path, core).path
    host = HostProcesses()
    assert host.take_flight(str(path)) == Flight(starting=frozenset(), running=frozenset())
    assert not path.exists()
    assert host.take_flight(str(path)) is None


# -- another host


class FakeActor:
    """Answers looks when the test lets it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.look = SimpleNamespace(remote=lambda pids: self.asked.append(pids) or len(self.asked))


def test_a_busy_host_may_take_longer_to_tell_of_an_end_than_its_streams_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remains, took_s = Remains(Traces(), 0, []), 4 * hosts_module.EXAMINED_S

    def get(reference: Any, timeout: float) -> Any:
        if timeout < took_s:
            raise ray.exceptions.GetTimeoutError("late")
        return remains

    monkeypatch.setattr(ray, "get", get)
    host = OtherHost("node pid:[1]")
    host._actor = SimpleNamespace(examine=SimpleNamespace(remote=lambda pid: pid))
    assert host.examine(10) == remains


def test_a_look_that_is_late_is_waited_for_and_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[FakeActor] = []

    def make() -> FakeActor:
        made.append(FakeActor())
        return made[-1]

    answers: list[Any] = []

    def get(reference: Any, timeout: float) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    options = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))
    monkeypatch.setattr(ray, "remote", lambda _: options)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(hosts_module, "NodeAffinitySchedulingStrategy", lambda *_, **__: None)
    host, look = OtherHost("node pid:[1]"), HostLook({}, 0)
    late = ray.exceptions.GetTimeoutError("late")
    answers[:] = [late, late, look, look]
    for _ in range(2):
        with pytest.raises(TimeoutError):
            host.look([1])
    assert host.look([1]) == look
    assert len(made[0].asked) == 1
    assert host.look([1]) == look
    assert len(made[0].asked) == 2
    answers[:] = [ray.exceptions.RayActorError(), look]
    with pytest.raises(ray.exceptions.RayActorError):
        host.look([1])
    assert host.look([1]) == look
    assert len(made) == 2, "a new one, as the first has died"
