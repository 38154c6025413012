"""The processes of several frontends: each is started, watched, and started again when it ends.

They are forked from one process that has imported all of vLLM (frontend/office/preload.py) and has
one thread. So a new one is there in a second or two, and shares the memory of what was imported.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from typing import Any

from llumnix.cluster import signals
from llumnix.cluster.frontends.office import Office
from llumnix.cluster.ray_calls import off_loop
from llumnix.core.supervision.restart import GiveUp
from llumnix.frontend.office.messages import StopAsked
from llumnix.frontend.office.process import FrontendStart, run
from llumnix.observe import shared_metrics
from llumnix.observe.lines import about

logger = logging.getLogger("llumnix.office")

Process = multiprocessing.context.ForkServerProcess
PRELOAD = ["llumnix.frontend.office.preload"]
NOT_ACCEPTING = 2**31 - 1
"""What vLLM's array of open connections says of a process that accepts none."""
COUNTERS_EACH = 8
"""How many of vLLM's counters of requests a process has."""
SILENT_MAX_S = 30.0
"""A frontend that says nothing for so long hangs. Each says something every second."""
SILENT_AT_FIRST_MAX_S = 300.0
"""So long it may take to say something at all: it loads tokenizers and plugins before."""
LOOK_EVERY_S = 1.0


@dataclass(slots=True)
class _Silence:
    """That of one frontend."""

    said_s: float | None = None  # when it said something last; None if it never did
    looks: int = 0  # so many in a row found nothing new


class FrontendProcesses:
    """All of one deployment. `make` is given slot and client number of one that is to be
    started."""

    def __init__(
        self, office: Office, count: int, make: Callable[[int, int], FrontendStart]
    ) -> None:
        self._office = office
        self._make = make
        self._context = multiprocessing.get_context("forkserver")
        self.loads: Any = self._context.RawArray("i", [NOT_ACCEPTING] * count)
        self.admission: Any = self._context.RawArray("q", COUNTERS_EACH * count)
        self._running: dict[int, Process] = {}  # by client
        self._silences: dict[int, _Silence] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._count = count
        self._closed = threading.Event()
        self._stopping = asyncio.Event()
        self.all_failed = asyncio.Event()

    def start(self) -> None:
        """Starts them, and each again when it ends."""
        self._context.set_forkserver_preload(PRELOAD)
        # Of several threads only the one that forks would go on in the new process.
        os.environ["OMP_NUM_THREADS"] = "1"
        _forked(forkserver.ensure_running)
        self._tasks = [asyncio.create_task(self._keep(slot)) for slot in range(self._count)]
        self._tasks.append(asyncio.create_task(self._look_for_hung()))

    async def _keep(self, slot: int) -> None:
        roster = self._office.roster
        while not self._office.stopping:
            client = roster.begin(slot)
            if client is None:
                logger.error("Frontend f%d is not started again: no number is left for it.", slot)
                break
            why = await self._run_one(slot, client)
            decided = self._office.ended(client, why)
            if self._office.stopping or decided is None:
                return
            extra = about("frontend_death", frontend=f"f{slot}", why=why)
            if isinstance(decided, GiveUp):
                given_up = "Frontend f%d is given up (%s): %s"
                logger.error(given_up, slot, why, decided.why, extra=extra)
                break
            logger.error("Frontend f%d died (%s); it is started again.", slot, why, extra=extra)
            await self._pause(decided.delay_s)
        if roster.all_failed:
            self.all_failed.set()

    async def _pause(self, delay_s: float) -> None:
        """Until so long has passed, or a stop begins."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()

    async def _run_one(self, slot: int, client: int) -> str:
        """Starts a process, and returns once it has ended, with why."""
        start = self._make(slot, client)
        process = self._context.Process(target=run, args=(start,), name=f"Frontend_{slot}")
        try:
            await off_loop(self._start, process)
        except Exception as error:
            logger.exception("Frontend f%d could not be started", slot)
            return f"it could not be started: {error!r}"
        self._running[client] = process
        self._silences[client] = _Silence()
        if self._office.stopping:
            process.kill()
        try:
            await _ended(process)
        finally:
            self._clear(slot, client, process)
        return _why(process)

    def _start(self, process: Process) -> None:
        """Forks the process. On a thread, since the first waits for the imports."""
        _forked(process.start)
        if self._closed.is_set():
            process.kill()

    def _clear(self, slot: int, client: int, process: Process) -> None:
        """Removes what is left of a process. It may live on if what forked it has died."""
        pid = process.pid
        del self._running[client], self._silences[client]
        self.loads[slot] = NOT_ACCEPTING
        self.admission[slot * COUNTERS_EACH] = 0
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            shared_metrics.forget(pid)

    async def _look_for_hung(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for client, process in list(self._running.items()):
                if self._hangs(client):
                    logger.error("Frontend %s hangs.", self._office.roster.name(client))
                    process.kill()

    def _hangs(self, client: int) -> bool:
        """Takes in one look. Silence is counted in looks, not in seconds: while this process stands
        still it hears nobody, and in a container that is paused nobody speaks."""
        said_s, silence = self._office.said_s(client), self._silences[client]
        silence.looks = silence.looks + 1 if said_s == silence.said_s else 0
        silence.said_s = said_s
        most_s = SILENT_AT_FIRST_MAX_S if said_s is None else SILENT_MAX_S
        return silence.looks * LOOK_EVERY_S > most_s

    # -- stop

    async def stop(self, timeout_s: float) -> None:
        """Has all let their requests end, within so long. Returns once all have ended."""
        self._office.stopping = True
        self._stopping.set()
        self._office.send_all(StopAsked())
        there = set(self._office.roster.greeted_clients())
        for client, process in self._running.items():
            if client not in there:
                process.kill()
        keeping = self._tasks[: self._count]
        if keeping:
            await asyncio.wait(keeping, timeout=timeout_s)

    def hurry(self, limit_s: float) -> None:
        """Has them end at once, though requests run. One that has not ended after `limit_s` is
        killed."""
        self._office.send_all(StopAsked())
        asyncio.get_running_loop().call_later(limit_s, self._kill_all)

    def close(self) -> None:
        """Ends what is left, and what is still being started."""
        self._closed.set()
        self._kill_all()
        for task in self._tasks:
            task.cancel()

    def _kill_all(self) -> None:
        for process in self._running.values():
            process.kill()


async def _ended(process: Process) -> None:
    """Returns once the process has ended."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(process.sentinel, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process.sentinel)


def _why(process: Process) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"its process ended with status {code}"


def _forked(start: Callable[[], None]) -> None:
    """Calls this, which may start the process that forks. Signals that stop a service are blocked
    there, and so in those that it forks: a service manager sends them to every process."""
    # Its start would unblock them again in this thread.
    resource_tracker.ensure_running()
    with signals.kept_from_children():
        start()
