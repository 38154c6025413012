"""The processes of several frontends, forked for real, with nothing of vLLM in them."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.cluster.frontends import processes as module
from llumnix.cluster.frontends.processes import COUNTERS_EACH, NOT_ACCEPTING, FrontendProcesses
from llumnix.core.supervision.frontends import Roster
from llumnix.frontend.office.messages import StopAsked
from support import forked
from support.server import alive


class Office:
    """Keeps the books, and notes what it is told."""

    def __init__(self, count: int) -> None:
        self.roster = Roster(count)
        self.stopping = False
        self.sent: list[Any] = []
        self.ends: list[tuple[int, str]] = []
        self.heard: dict[int, float | None] = {}

    def ended(self, client: int, why: str) -> Any:
        self.ends.append((client, why))
        return self.roster.ended(client, why, 100.0)

    def send_all(self, message: Any) -> None:
        self.sent.append(message)

    def said_s(self, client: int) -> float | None:
        return self.heard.get(client, asyncio.get_running_loop().time())


class World:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.folder, self.ends = folder, None
        self.office = Office(count)
        monkeypatch.setattr(module, "run", forked.run)
        monkeypatch.setattr(module, "PRELOAD", [])
        monkeypatch.setattr(module, "LOOK_EVERY_S", 0.05)
        monkeypatch.setattr(module, "shared_metrics", SimpleNamespace(forget=self._forget))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        self.forgotten: list[int] = []
        self.processes = FrontendProcesses(self.office, count, self._make)  # type: ignore[arg-type]

    def _forget(self, pid: int) -> None:
        self.forgotten.append(pid)

    def _make(self, slot: int, client: int) -> Any:
        return forked.Forked(slot, client, str(self.folder), self.ends)

    async def pid(self, client: int) -> int:
        """Of the process that is this client, once it runs."""
        path = self.folder / str(client)
        async with asyncio.timeout(30):
            while not path.exists() or not path.read_text():
                await asyncio.sleep(0.01)
        return int(path.read_text().split()[0])

    async def until(self, true: Any) -> None:
        async with asyncio.timeout(30):
            while not true():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def world(
    folder: Path, monkeypatch: pytest.MonkeyPatch, count: int = 2
) -> AsyncIterator[World]:
    it = World(folder, monkeypatch, count)
    try:
        yield it
    finally:
        it.processes.close()
        await asyncio.sleep(0.1)


async def test_one_that_is_killed_is_started_again_under_a_new_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, monkeypatch) as w:
        w.processes.start()
        first, second = [await w.pid(client) for client in (1, 2)]
        slot = w.office.roster.slot(2)
        assert slot is not None
        w.processes.loads[slot] = 3
        w.processes.admission[slot * COUNTERS_EACH] = 5
        os.kill(second, signal.SIGKILL)
        again = await w.pid(3)
        assert w.office.ends == [(2, "killed by SIGKILL")]
        assert w.office.roster.slot(3) == slot
        assert w.processes.loads[slot] == NOT_ACCEPTING
        assert w.processes.admission[slot * COUNTERS_EACH] == 0
        assert w.forgotten == [second]
        assert alive(first)
        assert alive(again)


async def test_they_are_not_children_of_this_process_and_get_no_signal_that_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, monkeypatch) as w:
        w.processes.start()
        pid = await w.pid(1)
        assert (tmp_path / "1").read_text() != f"{pid} {os.getpid()}"
        blocked = next(
            line.split()[1]
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("SigBlk")
        )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            assert int(blocked, 16) >> (number - 1) & 1, number


async def test_when_all_crash_at_once_they_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def short(seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.01))

    async with world(tmp_path, monkeypatch) as w:
        monkeypatch.setattr(w.processes, "_pause", short)
        w.ends = 3
        w.processes.start()
        async with asyncio.timeout(30):
            await w.processes.all_failed.wait()
        assert len(w.office.ends) == 10
        # Python says 255 where the process that forked it did not say the status in time.
        whys = {f"its process ended with status {status}" for status in (3, 255)}
        assert {why for _, why in w.office.ends} <= whys


async def test_one_that_cannot_be_started_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, monkeypatch) as w:
        fails = iter([True])

        def start(process: Any) -> None:
            if next(fails, False):
                raise OSError("no memory")
            real(process)

        real = w.processes._start
        monkeypatch.setattr(w.processes, "_start", start)
        w.processes.start()
        await w.pid(3)
        ((client, why),) = w.office.ends
        assert client in (1, 2)
        assert "no memory" in why


async def test_one_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(tmp_path, monkeypatch) as w:
        w.processes.start()
        await w.pid(1)
        monkeypatch.setattr(module, "SILENT_MAX_S", 0.2)
        w.office.heard[1] = 1.0
        await w.pid(3)
        assert w.office.ends == [(1, "killed by SIGKILL")]


async def test_one_that_was_not_heard_while_this_process_stood_still_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all processes do in a container that is paused. Nothing of it is heard for a while."""
    monkeypatch.setattr(module, "SILENT_MAX_S", 0.5)
    async with world(tmp_path, monkeypatch) as w:
        w.processes.start()
        await w.until(lambda: 1 in w.processes._running)
        w.office.heard[1] = asyncio.get_running_loop().time()
        time.sleep(1.0)  # This process stands still.
        await asyncio.sleep(0.2)
        assert w.processes._running[1].exitcode is None
        w.office.heard[1] = asyncio.get_running_loop().time()
        await w.until(lambda: w.office.ends)
        silent_s = asyncio.get_running_loop().time() - w.office.heard[1]
        assert silent_s >= 0.5
        assert w.office.ends == [(1, "killed by SIGKILL")], "it has said nothing since"


async def test_one_that_never_says_anything_is_killed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, monkeypatch) as w:
        w.office.heard[1] = None
        monkeypatch.setattr(module, "SILENT_AT_FIRST_MAX_S", 60.0)
        w.processes.start()
        pid = await w.pid(1)
        await asyncio.sleep(0.3)
        assert alive(pid)
        monkeypatch.setattr(module, "SILENT_AT_FIRST_MAX_S", 0.0)
        await w.pid(3)
        assert w.office.ends == [(1, "killed by SIGKILL")]


async def test_a_second_signal_ends_one_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, monkeypatch) as w:
        w.processes.start()
        pids = [await w.pid(client) for client in (1, 2)]
        for client, pid in zip((1, 2), pids, strict=True):
            w.office.roster.greeted(client, pid)
        stopping = asyncio.create_task(w.processes.stop(20))
        await asyncio.sleep(0)
        assert w.office.sent == [StopAsked()]
        w.processes.hurry(0.1)
        assert w.office.sent == [StopAsked()] * 2, "again means: at once"
        async with asyncio.timeout(5):
            await stopping
        assert not any(map(alive, pids))


async def test_a_stop_does_not_wait_for_one_that_was_to_be_started_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, monkeypatch) as w:
        begun = asyncio.Event()
        real = w.processes._pause

        async def long(seconds: float) -> None:
            begun.set()
            await real(30.0)

        monkeypatch.setattr(w.processes, "_pause", long)
        w.processes.start()
        os.kill(await w.pid(1), signal.SIGKILL)
        await begun.wait()
        async with asyncio.timeout(5):
            await w.processes.stop(20)
        assert not (tmp_path / "3").exists()


async def test_a_stop_waits_for_those_that_are_there_and_starts_none_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, monkeypatch) as w:
        w.processes.start()
        pids = [await w.pid(client) for client in (1, 2)]
        w.office.roster.greeted(1, pids[0])
        stopping = asyncio.create_task(w.processes.stop(20))
        await w.until(lambda: not alive(pids[1]))  # It could not be told.
        await asyncio.sleep(0.1)
        assert not stopping.done()
        assert w.office.sent == [StopAsked()]
        os.kill(pids[0], signal.SIGKILL)
        await stopping
        await asyncio.sleep(0.1)
        assert not (tmp_path / "3").exists()


async def test_one_that_is_still_being_started_when_all_end_is_ended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, monkeypatch) as w:
        began, goes_on = threading.Event(), threading.Event()
        started: list[int] = []
        real = module._forked

        def late(start: Any) -> None:
            began.set()
            goes_on.wait(20)
            real(start)
            started.append(start.__self__.pid)

        w.processes.start()
        pids = [await w.pid(client) for client in (1, 2)]
        monkeypatch.setattr(module, "_forked", late)
        os.kill(pids[0], signal.SIGKILL)
        await w.until(began.is_set)
        w.processes.close()
        goes_on.set()
        await w.until(lambda: started and not alive(started[0]))
