"""The controller is kept running: ends, crash loops and hangs, on fakes and in virtual time."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from llumnix.cluster import controller_process
from llumnix.cluster.controller_process import (
    FIRST_ANSWER_S,
    PING_EVERY_S,
    TOLD_EVERY_S,
    UNANSWERED_MAX,
    ControllerProcess,
)
from llumnix.tasks import PAUSE_MAX_S
from llumnix.wire import Pong
from support.virtual_time import run


class Actor:
    """As a handle of Ray's: a method answers with a future. It ends when it is told to."""

    def __init__(self, number: int) -> None:
        self.ended: Future[None] = Future()
        self.stops = 0
        pid: Future[int] = Future()
        pid.set_result(1000 + number)
        self.run = _method(self.ended)
        self.pid = _method(pid)
        self.stop = SimpleNamespace(remote=self._stop)

    def _stop(self) -> None:
        self.stops += 1
        self.ended.set_result(None)


def _method(future: "Future[Any]") -> Any:
    return SimpleNamespace(remote=lambda: SimpleNamespace(future=lambda: future))


async def _at_once(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class World:
    """Makes actors, answers pings as `answers` says, and notes who is killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.actors: list[Actor] = []
        self.made_s: list[float] = []
        self.killed: list[Actor] = []
        self.signals: list[tuple[int, int]] = []
        self.answers: Callable[[], Pong | None] = lambda: Pong(number=1)
        self.on_create: Callable[[Actor], None] = lambda _: None
        self.process = ControllerProcess(
            self._create,
            SimpleNamespace(ping=self._ping),  # type: ignore[arg-type]
            self.killed.append,
        )
        # Threads take real time, of which the virtual clock knows nothing.
        monkeypatch.setattr(controller_process, "off_loop", _at_once)
        monkeypatch.setattr(controller_process, "ray_call", _at_once)
        monkeypatch.setattr(os, "kill", lambda *given: self.signals.append(given))

    def _create(self) -> Actor:
        actor = Actor(len(self.actors))
        self.actors.append(actor)
        self.made_s.append(self.loop.time())
        self.on_create(actor)
        return actor

    async def _ping(self, timeout_s: float) -> Pong | None:
        answer = self.answers()
        if answer is None:
            await asyncio.sleep(timeout_s)
        return answer

    async def begin(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.process.start()

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            assert self.loop.time() < 3600, "an hour of virtual time"
            await asyncio.sleep(0.25)


def test_a_controller_that_ends_is_started_again_after_growing_pauses_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        w = World(monkeypatch)
        w.on_create = lambda actor: actor.ended.set_exception(KeyError("a bug"))
        await w.begin()
        await w.until(lambda: len(w.actors) == 10)
        await w.process.close()
        assert w.killed[:9] == w.actors[:9], "what is left of it is cleared away"
        assert w.made_s[-1] - w.made_s[-2] >= PAUSE_MAX_S

    with caplog.at_level(logging.ERROR):
        run(main())
    told = [r for r in caplog.records if "The controller failed" in r.message]
    assert "a bug" in told[0].message
    pauses = [int(r.message.split()[-2]) for r in told]
    assert pauses[:7] == [1, 2, 4, 8, 16, 30, 30]


def test_one_that_hangs_is_killed_by_its_pid_and_another_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        w = World(monkeypatch)
        await w.begin()
        await w.until(lambda: w.loop.time() > 5)
        assert len(w.actors) == 1
        stopped_s = w.loop.time()
        w.answers = lambda: None
        await w.until(lambda: bool(w.signals))
        assert w.loop.time() - stopped_s >= (UNANSWERED_MAX - 1) * PING_EVERY_S
        assert w.signals == [(1000, signal.SIGKILL)]
        assert w.actors[0].stops == 0, "it would not hear it"
        w.answers = lambda: Pong(number=1)
        await w.until(lambda: len(w.actors) == 2)
        assert w.killed == w.actors[:1]
        await w.process.close()

    run(main())


def test_a_few_pings_that_are_not_answered_are_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        w = World(monkeypatch)
        await w.begin()
        asked = 0

        def seldom() -> Pong | None:
            nonlocal asked
            asked += 1
            return Pong(number=1) if asked % UNANSWERED_MAX == 0 else None

        await w.until(lambda: w.loop.time() > 2)
        w.answers = seldom
        await w.until(lambda: asked > 10 * UNANSWERED_MAX)
        assert len(w.actors) == 1
        await w.process.close()

    run(main())


def test_one_that_is_being_started_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        w = World(monkeypatch)
        w.answers = lambda: None
        await w.begin()
        await w.until(lambda: w.loop.time() > FIRST_ANSWER_S - 2)
        assert len(w.actors) == 1
        await w.until(lambda: len(w.actors) == 2)
        await w.process.close()

    run(main())


def test_close_lets_it_stop_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        w = World(monkeypatch)
        await w.begin()
        await w.until(lambda: len(w.actors) == 1)
        await w.process.close()
        assert (w.actors[0].stops, w.signals, w.killed) == (1, [], w.actors)

    run(main())


def test_what_it_could_not_handle_is_told_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        w = World(monkeypatch)
        await w.begin()
        w.answers = lambda: Pong(number=1, failed=3, story="KeyError: 'a bug'")
        await w.until(lambda: w.loop.time() > 30)
        w.answers = lambda: Pong(number=1, failed=int(w.loop.time()), story="more")
        await w.until(lambda: w.loop.time() > 30 + 5.5 * TOLD_EVERY_S)
        await w.process.close()

    with caplog.at_level(logging.ERROR, controller_process.logger.name):
        run(main())
    told = [r.message for r in caplog.records if "could not handle" in r.message]
    assert [m for m in told if "could not handle 3 messages" in m] == told[:1]
    assert "KeyError: 'a bug'" in told[0]
    assert 5 <= len(told) <= 7
