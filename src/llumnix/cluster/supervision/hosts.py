"""Watches the processes of engines, host by host, and ends them where a signal can reach them.

Each host has a thread of ours, beside the event loop, and needs no controller. On the host of the
fleet it looks by itself. Into another host looks a Ray actor there, which the thread asks; a host
that does not answer keeps up nothing but its own thread.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llumnix.cluster import ray_runtime
from llumnix.cluster.ray_calls import off_loop, ray_call
from llumnix.cluster.supervision.processes import (
    HostAgent,
    HostLook,
    HostProcesses,
    Remains,
)
from llumnix.cluster.supervision.runs import EngineRun
from llumnix.core.codes import DeathCode
from llumnix.core.supervision.blame import Death, Traces, code_of, is_blamed
from llumnix.core.supervision.hang import GONE, LOOK_EVERY_S, Standstill, StopPolicy
from llumnix.core.types import EngineIndex, RequestId
from llumnix.engine.reporting.flight_recorder import Flight

logger = logging.getLogger("llumnix.fleet")

ANSWER_S = 0.5
"""A watcher on another host answers sooner; its first answer takes as long as its start."""
AGAIN_S = 2.0
"""Between two attempts to start it."""
EXAMINED_S = 0.5
"""An end is looked into for no longer, as its streams wait."""
LOST_S = 3.0
"""A host that says nothing of an engine's end for so long is lost. A busy one says it sooner."""
ASKED_AGAIN_S = 0.25
"""After a question that failed at once."""
LOOKED_FOR_S = 0.05
FIRST_LOOK_S = 20.0
"""A host that cannot be looked into keeps an instance from serving for no longer."""
NOTHING = Remains(Traces(), 0, [])
"""The answer of a host that is there and cannot tell."""
MEMORY_LOOKS = 8
"""How far back the kernel's kills for want of memory are compared."""

OnStopped = Callable[[EngineIndex, Standstill], None]


class Host(Protocol):
    """Looks at the processes of one host, and ends them. Every call may raise."""

    def look(self, pids: Iterable[int]) -> HostLook: ...

    def kill(self, processes: Mapping[int, int | None]) -> None: ...

    def examine(self, pid: int) -> Remains: ...

    def take_flight(self, path: str) -> Flight | None: ...


class OtherHost:
    """Another host of the cluster, through a Ray actor of ours there. One thread looks."""

    def __init__(self, host: str) -> None:
        self._node = host.partition(" ")[0]  # Ray's id
        self._actor: Any = None
        self._asked: Any = None  # a look that is not answered yet
        self._making = threading.Lock()

    def look(self, pids: Iterable[int]) -> HostLook:
        """`TimeoutError` if it does not answer in time; then the next call waits for that answer
        on."""
        try:
            if self._asked is None:
                self._asked = self._there().look.remote(list(pids))
            answer: HostLook = ray.get(self._asked, timeout=ANSWER_S)
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError from error
        except ray.exceptions.RayError:
            self._actor = self._asked = None  # It died.
            raise
        self._asked = None
        return answer

    def kill(self, processes: Mapping[int, int | None]) -> None:
        self._there().kill.remote(dict(processes))

    def examine(self, pid: int) -> Remains:
        remains: Remains = ray.get(self._there().examine.remote(pid), timeout=LOST_S)
        return remains

    def take_flight(self, path: str) -> Flight | None:
        flight: Flight | None = ray.get(self._there().take_flight.remote(path), timeout=EXAMINED_S)
        return flight

    def close(self) -> None:
        """Ends the actor."""
        if self._actor is not None:
            ray.kill(self._actor)

    def _there(self) -> Any:
        with self._making:
            if self._actor is None:
                place = NodeAffinitySchedulingStrategy(self._node, soft=False)
                self._actor = (
                    ray.remote(HostAgent)
                    .options(**ray_runtime.actor_options(), scheduling_strategy=place)
                    .remote()
                )
            return self._actor


class HostWatch:
    """Watches one host on a thread of its own. `on_stopped` is called there, in every look that
    finds that an engine cannot go on."""

    def __init__(
        self, host: Host, on_stopped: OnStopped, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._host = host
        self._on_stopped = on_stopped
        self._clock = clock
        self._watched: dict[EngineIndex, tuple[int, ...]] = {}  # replaced as a whole
        self._policies: dict[EngineIndex, StopPolicy] = {}
        self._started: dict[EngineIndex, dict[int, int]] = {}  # their processes, with their starts
        self._memory_kills: deque[int] = deque(maxlen=MEMORY_LOOKS)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llumnix-host-watch", daemon=True)
        self.answered_s: float | None = None  # when the host answered last

    @property
    def silent_s(self) -> float:
        """For how long the host has not answered; 0 if it never did."""
        return 0.0 if self.answered_s is None else self._clock() - self.answered_s

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def close(self) -> None:
        """Ends the looking. Waits for nothing."""
        self._closing.set()

    def watch(self, engines: dict[EngineIndex, tuple[int, ...]]) -> None:
        """These engines of the host, with their processes, are watched from now on, and no
        others."""
        self._watched = engines

    def watch_too(self, engine: EngineIndex, pids: tuple[int, ...]) -> None:
        """Watches one more of the host."""
        self._watched = {**self._watched, engine: pids}

    def has_seen(self, engine: EngineIndex) -> bool:
        """Whether a look has found the engine's processes, so that its host minds them too."""
        return bool(self._started.get(engine))

    def _run(self) -> None:
        pause_s, said = LOOK_EVERY_S, False
        while not self._closing.wait(pause_s):
            if not self._watched:
                self._take_leave()
                continue
            try:
                self.look()
                pause_s, said = LOOK_EVERY_S, False
            except TimeoutError:
                pause_s = LOOK_EVERY_S
            except Exception as error:  # noqa: BLE001 - Ray's, of any kind; it is tried again
                pause_s = AGAIN_S
                if not said:
                    said = True
                    what = str(error).partition("\n")[0]
                    logger.warning("A host's processes cannot be watched: %s", what)

    def _take_leave(self) -> None:
        """Says once that no engine there is ours any more; the host may be gone for good."""
        if self.answered_s is not None:
            self.answered_s = None
            with contextlib.suppress(Exception):
                self._host.look([])

    def look(self) -> None:
        """Looks once. On the thread."""
        watched = self._watched
        seen = self._host.look([pid for pids in watched.values() for pid in pids])
        self.answered_s = now_s = self._clock()
        self._memory_kills.append(seen.memory_kills)
        for known in (self._policies, self._started):
            for engine in known.keys() - watched.keys():
                known.pop(engine, None)
        for engine, pids in watched.items():
            here = {pid: seen.processes[pid] for pid in pids if pid in seen.processes}
            started = self._started.setdefault(engine, {})
            for pid, process in here.items():
                started.setdefault(pid, process.started)
            # An id whose process has ended may be another's by now.
            states = {p: s.state for p, s in here.items() if s.started == started[p]}
            policy = self._policies.setdefault(engine, StopPolicy())
            standstill = policy.look(now_s, {pid: states.get(pid, GONE) for pid in started})
            if standstill is not None:
                self._on_stopped(engine, standstill)

    # -- on any thread but the event loop's

    def kill(self, engine: EngineIndex, pids: tuple[int, ...]) -> None:
        """Ends the engine's processes at once."""
        self._host.kill({**dict.fromkeys(pids), **self._started.get(engine, {})})

    def remains(self, pid: int) -> Remains:
        """What the end of an engine left on the host; `pid` was its process."""
        before = min(self._memory_kills, default=None)
        found = self._host.examine(pid)
        out_of_memory = before is not None and found.memory_kills > before
        return found._replace(traces=replace(found.traces, out_of_memory=out_of_memory))

    def take_flight(self, path: str) -> Flight | None:
        """What an engine's flight recorder says, which is removed."""
        return self._host.take_flight(path)


class Hosts:
    """All hosts that have engines. On the event loop."""

    def __init__(self, on_stopped: OnStopped, here: Callable[[], str] | None = None) -> None:
        """`on_stopped` is called on a thread. `here` names our own host."""
        self._on_stopped = on_stopped
        self._here = here or ray_runtime.host_name
        self._watches: dict[str, HostWatch] = {}
        self._others: dict[str, OtherHost] = {}

    def watch(self, runs: Iterable[EngineRun]) -> None:
        """The engines of these runs are watched from now on, and no others."""
        engines: dict[str, dict[EngineIndex, tuple[int, ...]]] = {n: {} for n in self._watches}
        for run in runs:
            if run.facts is not None:
                engines.setdefault(run.facts.host, {})[run.engine_index] = _pids(run)
        for host, mine in engines.items():
            self._watch_on(host).watch(mine)

    def _watch_on(self, host: str) -> HostWatch:
        if host not in self._watches:
            self._watches[host] = HostWatch(self._host(host), self._on_stopped)
            self._watches[host].start()
        return self._watches[host]

    def _host(self, host: str) -> Host:
        if host == self._here():
            return HostProcesses()
        self._others[host] = OtherHost(host)
        return self._others[host]

    def silent_s(self, host: str) -> float:
        """For how long another host has not answered; 0 for our own."""
        return self._watches[host].silent_s if host in self._others else 0.0

    async def first_look(self, run: EngineRun) -> None:
        """Watches a run that is about to serve, and waits until its host, if it is another one, has
        told of its processes: from then on it ends them if it is cut off, and its silence counts.
        For `FIRST_LOOK_S` at most, and while the run lives."""
        if run.facts is None or run.facts.host == self._here():
            return
        watch = self._watch_on(run.facts.host)
        watch.watch_too(run.engine_index, _pids(run))
        try:
            async with asyncio.timeout(FIRST_LOOK_S):
                while run.alive and not watch.has_seen(run.engine_index):
                    await asyncio.sleep(LOOKED_FOR_S)
        except TimeoutError:
            logger.warning(
                "Engine %d serves on a host that has not answered for %.0f s. If that host is cut "
                "off, the engine will not end by itself.",
                run.engine_index,
                FIRST_LOOK_S,
            )

    async def kill(self, run: EngineRun) -> None:
        """Ends the processes of a run at once, if they can be reached."""
        watch = self._watch_of(run)
        if watch is None:
            return
        try:
            await ray_call(watch.kill, run.engine_index, _pids(run))
        except Exception as error:  # noqa: BLE001 - Ray's, of any kind; its end is tried through Ray
            logger.warning("Engine %d could not be killed: %s", run.engine_index, error)

    async def examine(self, run: EngineRun, death: Death) -> Death:
        """The same death, blamed or not as its host's traces have it, if the host tells in
        `EXAMINED_S`."""
        found = None if death.fenced else await self._told(run)
        if found is None or found is NOTHING:
            return death
        traces = replace(found.traces, raised=found.traces.raised or death.blamed)
        code = DeathCode.OOM if death.code is DeathCode.OOM else code_of(traces)
        return replace(death, blamed=is_blamed(traces), code=code)

    async def lost(self, run: EngineRun) -> bool:
        """Whether the engine's host is another one that says nothing of its end, in `LOST_S`."""
        asked = self._ask(run) if self._elsewhere(run) else None
        return asked is not None and await asyncio.shield(asked) is None

    async def tail(self, run: EngineRun) -> list[str]:
        """The end of what a run has logged; empty if its host does not tell in `EXAMINED_S`."""
        if self._watch_of(run) is None:
            return run.last_words
        found = await self._told(run)
        return [] if found is None else found.tail

    async def _told(self, run: EngineRun) -> Remains | None:
        asked = self._ask(run)
        if asked is None:
            return None
        await asyncio.wait({asked}, timeout=EXAMINED_S)
        return asked.result() if asked.done() else None

    def _ask(self, run: EngineRun) -> asyncio.Task[Remains | None] | None:
        """The question what a run has left, which its host is asked once. None if nobody can ask.
        The answer is None if the host is silent for `LOST_S`, and `NOTHING` if it cannot tell."""
        watch = self._watch_of(run)
        if run.remains is None and watch is not None:
            run.remains = asyncio.create_task(self._answer(run, watch))
        return run.remains

    async def _answer(self, run: EngineRun, watch: HostWatch) -> Remains | None:
        try:
            async with asyncio.timeout(LOST_S):
                while True:
                    try:
                        return await off_loop(watch.remains, _pids(run)[0])
                    except Exception as error:  # noqa: BLE001 - Ray's, of any kind
                        logger.debug("engine %d left no traces: %r", run.engine_index, error)
                        failed_there = isinstance(error, ray.exceptions.RayTaskError)
                        if failed_there or not self._elsewhere(run):
                            return NOTHING
                    await asyncio.sleep(ASKED_AGAIN_S)
        except TimeoutError:
            return None

    async def suspects(self, run: EngineRun) -> frozenset[RequestId] | None:
        """The requests of which a run may have died; None if its host does not tell."""
        watch = self._watch_of(run)
        if watch is None or run.facts is None:
            return None
        try:
            async with asyncio.timeout(EXAMINED_S):
                flight = await off_loop(watch.take_flight, run.facts.flight)
        except Exception as error:  # noqa: BLE001 - Ray's, of any kind
            what = "Engine %d left no flight recorder, so all its requests are suspects: %r"
            logger.warning(what, run.engine_index, error)
            return None
        return None if flight is None else flight.suspects

    def _elsewhere(self, run: EngineRun) -> bool:
        return run.facts is not None and run.facts.host in self._others

    def _watch_of(self, run: EngineRun) -> HostWatch | None:
        return None if run.facts is None else self._watches.get(run.facts.host)

    def close(self) -> None:
        """Ends the watching. What Ray has to end is ended with our process at the latest."""
        for watch in self._watches.values():
            watch.close()
        for other in self._others.values():
            other.close()


def _pids(run: EngineRun) -> tuple[int, ...]:
    """The engine's own process, then its workers'."""
    assert run.facts is not None
    return run.facts.pid, *run.facts.workers
