"""What the kernel says of an engine's processes on this host, and their end.

A process is named by its id and the moment of its start, since ids are used again.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes): the
lines that it logs when a worker of the multiprocess executor has ended, and when an exception ends
an engine's busy loop. Without them a death counts as a kill.
"""

import contextlib
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from llumnix.cluster import ray_runtime
from llumnix.core.supervision.blame import Traces
from llumnix.engine.folders import sweep_memory
from llumnix.engine.reporting.flight_recorder import Flight, forget_flight, read_flight
from llumnix.observe.lines import tail_of

logger = logging.getLogger("llumnix.fleet")

UNASKED_S = 10.0
"""A host that is not asked about its engines for so long ends them. By then the fleet has long lost
them and their streams go on elsewhere, or there is no fleet any more."""
MIND_EVERY_S = 1.0
_PROC = Path("/proc")
_STATE, _STARTED = 0, 19  # among the fields of /proc/PID/stat after the name
CRASHED = re.compile(r"^(Fatal Python error: |!!!!!!! Segfault encountered !!!!!!!)")
"""What an engine or a worker logs when a signal of its own making ends it: Python, as
engine_actor.py has it do, or tvm_ffi, which vLLM loads and which puts its own handler in place of
Python's."""
RAISED = re.compile(r"EngineCore encountered a fatal error\.")
WORKER_EXIT = re.compile(r"Worker proc .* died unexpectedly \(exit code: (-?\d+)\)")
"""What vLLM logs."""


class Process(NamedTuple):
    """One process, as the kernel shows it."""

    state: str  # a letter
    started: int  # in ticks since the host was started


class HostLook(NamedTuple):
    """One look at a host."""

    processes: dict[int, Process]  # those that are there
    memory_kills: int  # processes that the kernel has ended so far for want of memory


class Remains(NamedTuple):
    """What is left of an engine's process, or what it says at its end."""

    traces: Traces
    memory_kills: int  # as in `HostLook`, after its end
    tail: list[str]  # of its log


class HostProcesses:
    """Of the host on which it is."""

    def look(self, pids: Iterable[int]) -> HostLook:
        """What there is of these processes."""
        found = {pid: process for pid in pids if (process := _process(pid)) is not None}
        return HostLook(found, _memory_kills())

    def kill(self, processes: Mapping[int, int | None]) -> None:
        """Ends these processes at once. Each is given with its start, if that is known. One that
        leads a process group takes it along; ours is left alone."""
        for pid, started in processes.items():
            process = _process(pid)
            if process is None or pid == os.getpid():
                continue
            if started is not None and process.started != started:
                continue
            with contextlib.suppress(OSError):
                if os.getpgid(pid) == pid != os.getpgrp():
                    os.killpg(pid, signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)

    def examine(self, pid: int) -> Remains:
        """What is left of an engine that ran in this process, by its log."""
        lines = ray_runtime.log_tail(pid)
        exits = [int(match[1]) for line in lines if (match := WORKER_EXIT.search(line))]
        traces = Traces(
            raised=any(map(RAISED.search, lines)),
            crashed=any(map(CRASHED.search, lines)),
            worker_exit=exits[0] if exits else None,
        )
        ends = (n for n, line in enumerate(lines) if RAISED.search(line) or CRASHED.search(line))
        return Remains(traces, _memory_kills(), tail_of(lines, next(ends, None)))

    def take_flight(self, path: str) -> Flight | None:
        """What an engine's flight recorder says, which is removed."""
        flight = read_flight(path)
        forget_flight(path)
        return flight


class HostAgent(HostProcesses):
    """On another host than the fleet's, as a Ray actor. It ends the engines there once the fleet
    has not asked for `UNASKED_S`: cut off from it, they would compute for nobody, and keep their
    devices from those that are to come. It sweeps the shared memory of those that died."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked_s = self._minded_s = clock()
        self._known: dict[int, int | None] = {}  # as of the last look, with their starts
        threading.Thread(target=self._run, name="llumnix-host-agent", daemon=True).start()

    def look(self, pids: Iterable[int]) -> HostLook:
        """What there is of these processes; it minds these from now on, and no others."""
        seen = super().look(pids)
        self._known = {pid: process.started for pid, process in seen.processes.items()}
        self._asked_s = self._clock()
        return seen

    def mind(self) -> None:
        """Ends the engines if the fleet has not asked for too long. Every `MIND_EVERY_S`; if it
        comes later, this host itself stood still, and the fleet gets its time again."""
        now_s = self._clock()
        late = now_s - self._minded_s > 3 * MIND_EVERY_S
        self._minded_s = now_s
        if late:
            self._asked_s = now_s
        elif self._known and now_s - self._asked_s > UNASKED_S:
            known, self._known = self._known, {}
            logger.error("Nobody has asked for %d s: this host's engines are ended.", UNASKED_S)
            self.kill(known)

    def _run(self) -> None:
        while True:
            time.sleep(MIND_EVERY_S)
            self.mind()
            sweep_memory()


def _process(pid: int) -> Process | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # "PID (NAME) STATE ..."; the name may hold anything.
    fields = text.rpartition(")")[2].split()
    return Process(fields[_STATE], int(fields[_STARTED]))


def _memory_kills() -> int:
    with contextlib.suppress(OSError):
        for line in (_PROC / "vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
