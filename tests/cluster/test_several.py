"""How a deployment of several frontends stops, and what both kinds of deployments note at their
end."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.cluster import fleet as fleets
from llumnix.cluster import serve, several
from llumnix.cluster.frontends import own
from llumnix.cluster.several import END_TIMEOUT_S, Deployment
from llumnix.cluster.start import Start
from llumnix.engine.launch import EngineLaunch
from llumnix.errors import UsageError

TIMEOUT_S = 7.0


class Stopping:
    """A deployment without engines and frontends, of which only the stop is run. `told`: what its
    frontends were told."""

    def __init__(self, lame_duck_s: float) -> None:
        self.told: list[tuple[str, float]] = []
        self.let_in: list[bool] = []  # whether it was leaving when frontends were told
        self.it = it = object.__new__(Deployment)
        it.hurried = asyncio.Event()
        it.fleet = self.part(all_failed=asyncio.Event())
        it.processes = self.part(
            all_failed=asyncio.Event(),
            stop=self._stop,
            hurry=lambda seconds: self.told.append(("hurry", seconds)),
        )
        it.office = self.part(leaving=False, ask_all=self._ask_all)
        it._command = self.part(
            vllm_config=SimpleNamespace(shutdown_timeout=TIMEOUT_S),
            deployment=SimpleNamespace(lame_duck=lame_duck_s),
        )

    @staticmethod
    def part(**what: Any) -> Any:
        return SimpleNamespace(**what)

    async def _stop(self, seconds: float) -> None:
        self.told.append(("stop", seconds))

    async def _ask_all(self, question: Any) -> Any:
        self.let_in.append(self.it.office.leaving)
        return SimpleNamespace(answers={1: 2, 2: 3})

    async def run(self, then: Callable[[Deployment], None] = lambda it: None) -> float:
        """How long the stop took; `then` happens while it goes on."""
        began_s = time.monotonic()
        try:
            stopping = asyncio.create_task(self.it.stop())
            await asyncio.sleep(0.05)
            then(self.it)
            await asyncio.wait_for(stopping, 20)
        finally:
            for number in several.signals.STOP_SIGNALS:
                asyncio.get_running_loop().remove_signal_handler(number)
        return time.monotonic() - began_s


async def test_a_lame_duck_lets_requests_in_for_so_long() -> None:
    stop = Stopping(lame_duck_s=0.4)
    assert await stop.run() >= 0.4
    assert stop.let_in == [True]
    assert stop.told == [("stop", TIMEOUT_S + END_TIMEOUT_S)]


ENDS: dict[str, Callable[[Deployment], None]] = {
    "a second signal": lambda it: it._second(),
    "no instance is left": lambda it: it.fleet.all_failed.set(),
    "no frontend is left": lambda it: it.processes.all_failed.set(),
}


@pytest.mark.parametrize("why", ENDS)
async def test_a_lame_duck_ends_with(why: str) -> None:
    stop = Stopping(lame_duck_s=60)
    assert await stop.run(ENDS[why]) < 10
    hurried = [("hurry", END_TIMEOUT_S)] if why == "a second signal" else []
    assert stop.told == [*hurried, ("stop", TIMEOUT_S + END_TIMEOUT_S)]


class EndedFleet:
    """A fleet that could not start, with one instance."""

    exposition = SimpleNamespace(text=None)
    seen = None

    def __init__(self, restarts: int, state: str) -> None:
        self.all_failed = asyncio.Event()
        self.closed = False
        self._status = SimpleNamespace(restarts=restarts, state=state, why=None)

    async def check_capacity(self, *_: Any) -> None:
        raise UsageError("no room")

    def status(self) -> list[Any]:
        return [self._status]

    async def close(self) -> None:
        self.closed = True


def of_one_frontend(fleet: EndedFleet, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(fleets, "Fleet", lambda *_: fleet)
    monkeypatch.setattr(own, "OwnFrontend", lambda llm: None)
    monkeypatch.setattr(serve, "_client", lambda *_: None)
    command: Any = SimpleNamespace(
        args=SimpleNamespace(disable_log_stats=True),
        deployment=SimpleNamespace(instances=1, ray_wait=0.0),
        vllm_config=None,
    )
    addresses: Any = SimpleNamespace(inputs=(), outputs=())
    log: Any = SimpleNamespace(close=lambda: None)
    return serve._run(command, log, addresses, Start())


def of_several(fleet: EndedFleet, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(
        several,
        "Deployment",
        lambda *_: SimpleNamespace(
            fleet=fleet, run=fleet.check_capacity, stop_asked=asyncio.Event(), close=fleet.close
        ),
    )
    command: Any = SimpleNamespace(args=SimpleNamespace(disable_log_stats=True), vllm_config=None)
    addresses: Any = SimpleNamespace(inputs=(), outputs=())
    return several.run(command, addresses, Start())


@pytest.mark.parametrize(
    ("restarts", "state", "kept"),
    [(0, "serving", False), (1, "serving", True), (0, "failed", True)],
)
@pytest.mark.parametrize("run", [of_one_frontend, of_several], ids=lambda run: run.__name__)
async def test_the_logs_are_kept_if_an_instance_was_lost_even_if_it_came_back(
    monkeypatch: pytest.MonkeyPatch, run: Any, restarts: int, state: str, kept: bool
) -> None:
    starts: list[Start] = []
    monkeypatch.setattr(Start, "serve_metrics", lambda self, *_: starts.append(self))
    monkeypatch.setattr(EngineLaunch, "of", lambda *_, **__: None)
    monkeypatch.setattr(serve.signals, "ignore", lambda *_: None)
    fleet = EndedFleet(restarts, state)
    with contextlib.suppress(UsageError):
        await run(fleet, monkeypatch)
    assert fleet.closed
    (start,) = starts
    assert start.crashed == kept
