"""How vLLM's HTTP server is run: what it is given, and how a stop goes on."""

import asyncio
import signal
import time
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from vllm.v1.engine import async_llm

from llumnix.errors import LlumnixError
from llumnix.frontend.http import server
from llumnix.frontend.http.server import GATE, say_stopping, stop_begins, with_gate
from llumnix.frontend.llm import FleetLLM, injected_client


def test_vllm_gets_the_gate_as_its_outermost_middleware_and_our_application_beside_it() -> None:
    args = Namespace(middleware=["a.B"], port=1)
    ours, probes = FastAPI(), FastAPI()
    given = with_gate(args, ours, probes)
    assert given.middleware == ["a.B", GATE]
    assert given.control_app is ours
    assert given.probes is probes
    assert given.port == 1
    assert vars(args) == {"middleware": ["a.B"], "port": 1}


def test_vllm_gets_our_client_only_while_it_is_made() -> None:
    """vLLM's own class is back even if that fails."""
    stock = async_llm.EngineCoreClient
    client: Any = SimpleNamespace()
    with injected_client(client):
        assert async_llm.EngineCoreClient.make_async_mp_client() is client  # type: ignore[call-arg]
    with pytest.raises(LlumnixError), injected_client(client):
        raise LlumnixError
    assert async_llm.EngineCoreClient is stock


async def test_a_second_signal_stops_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    loop = asyncio.get_running_loop()
    stops: list[str] = []
    llm: Any = SimpleNamespace(
        engine_core=SimpleNamespace(loop=loop),
        vllm_config=SimpleNamespace(shutdown_timeout=7),
        running=lambda: 3,
        lame_duck_s=0.0,
        stop_now=lambda: stops.append("now"),
    )
    # Without a handler the signal would end the tests.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        await asyncio.to_thread(stop_begins, llm)
        await asyncio.sleep(0)
        signal.raise_signal(signal.SIGTERM)
        for _ in range(100):
            await asyncio.sleep(0.01)
            if stops:
                break
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        signal.signal(signal.SIGTERM, before)
    assert stops == ["now"]
    said = capsys.readouterr()
    assert "stopping; 3 running requests have 7 s to end" in said.out + said.err


@pytest.mark.parametrize("on_thread", [True, False])
async def test_only_a_stop_by_signal_is_announced(
    monkeypatch: pytest.MonkeyPatch, on_thread: bool
) -> None:
    """vLLM stops on a thread after a signal. What takes a failed start apart does it on the event
    loop."""
    begun: list[FleetLLM] = []
    monkeypatch.setattr(FleetLLM.__base__, "shutdown", lambda self, timeout: None)
    monkeypatch.setattr(FleetLLM, "_let_streams_end", lambda self, timeout_s: None)
    llm = FleetLLM.__new__(FleetLLM)
    llm.leaving = llm.stopping = False
    llm.lame_duck_s, llm._on_stopping = 0.0, begun.append
    for _ in range(2):
        await asyncio.to_thread(llm.shutdown, 1) if on_thread else llm.shutdown(1)
    assert llm.stopping
    assert begun == [llm] * on_thread


async def lame_duck(
    monkeypatch: pytest.MonkeyPatch, *, seconds: float, serving: bool = True, hurry: bool = False
) -> tuple[list[tuple[bool, bool]], float]:
    """How a stop with a lame duck of so many seconds goes: whether it leaves and whether it lets
    nothing in any more, as often as that is asked meanwhile, and how long it took."""
    monkeypatch.setattr(FleetLLM.__base__, "shutdown", lambda self, timeout: None)
    monkeypatch.setattr(FleetLLM, "_let_streams_end", lambda self, timeout_s: None)
    llm: Any = FleetLLM.__new__(FleetLLM)
    llm.leaving = llm.stopping = llm._stop_now = False
    llm.lame_duck_s, llm._on_stopping = seconds, lambda _: None
    llm.engine_core = SimpleNamespace(serving=serving)
    seen: list[tuple[bool, bool]] = []
    began_s = time.monotonic()
    stopping = asyncio.create_task(asyncio.to_thread(llm.shutdown, 1))
    while not stopping.done():
        await asyncio.sleep(0.01)
        seen.append((llm.leaving, llm.stopping))
        if hurry:
            llm.stop_now()
    await stopping
    assert llm.stopping
    return seen, time.monotonic() - began_s


async def test_a_lame_duck_lets_requests_in_though_it_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, took_s = await lame_duck(monkeypatch, seconds=0.3)
    assert seen.count((True, False)) > 3
    assert 0.3 <= took_s < 5


@pytest.mark.parametrize("why", ["a second signal", "no instance serves"])
async def test_a_lame_duck_ends_with(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    hurry = why == "a second signal"
    _, took_s = await lame_duck(monkeypatch, seconds=60, serving=hurry, hurry=hurry)
    assert took_s < 10


def test_what_is_said_at_a_stop_names_what_is_waited_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say_stopping(3, 30)
    assert "stopping; 3 running requests have 30 s to end" in capsys.readouterr().out
    say_stopping(3, 30, 7.5)
    assert "let in for 7.5 s more" in capsys.readouterr().out


class Serving:
    """vLLM's server in name: it calls `meanwhile` once it is there, and its connections take
    `open_s` to close. `told`: what happened around it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, open_s: float = 0.01) -> None:
        self.told: list[Any] = []
        self.given: dict[str, Any] = {}
        self.stopping, self.open_s = True, open_s

        class Pace:
            def __init__(pace, processor: Any, interval_max: int) -> None:
                self.told.append((processor, interval_max))

            async def run(pace) -> None:
                self.told.append("runs")
                try:
                    await asyncio.Event().wait()
                finally:
                    self.told.append("ends")

        monkeypatch.setattr(server, "StreamPace", Pace)
        monkeypatch.setattr(server, "build_and_serve", self._build)
        for name in ("control_app", "enable_envs_cache"):
            monkeypatch.setattr(server, name, lambda *_, **__: None)
        monkeypatch.setattr(server.gc, "set_threshold", lambda _: None)

    async def _build(self, *args: Any, callback_notify: Any, **more: Any) -> Any:
        self.given = more
        for _ in range(3):
            await callback_notify()
        await asyncio.sleep(0.01)
        self.told.append("serves")
        return asyncio.sleep(self.open_s)

    async def _announce(self) -> None:
        self.told.append("announced")

    async def run(self) -> None:
        args = Namespace(
            middleware=[],
            no_ui=True,
            disable_fastapi_docs=True,
            max_stream_interval=4,
            ready_min=1,
            settings=[],
        )
        llm: Any = SimpleNamespace(
            output_processor="p", engine_core=SimpleNamespace(streams=[]), stopping=self.stopping
        )
        listener: Any = SimpleNamespace(
            url="",
            socket=None,
            close=lambda: self.told.append("closed"),
            stop_answering=lambda: self.told.append("the start answers no more"),
        )
        control: Any = SimpleNamespace(fleet=None)
        loads = ([0, 0], 1)
        await server.serve(llm, control, listener, args, self._announce, peer_loads=loads)
        assert self.given["peer_loads"] == loads


async def test_the_event_loop_is_followed_for_as_long_as_it_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    it = Serving(monkeypatch)
    await it.run()
    assert [what for what in it.told if what != "runs"] == [
        ("p", 4), "the start answers no more", "announced", "serves", "ends", "closed",
    ]  # fmt: skip
    assert it.told.index("runs") < it.told.index("serves")


async def test_connections_that_stay_open_end_with_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "HTTP_CLOSE_TIMEOUT_S", 0.02)
    it = Serving(monkeypatch, open_s=60)
    await it.run()
    assert "Some connections were still open" in caplog.text
    assert it.told[-1] == "closed"


async def test_a_server_that_ends_by_itself_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Serving(monkeypatch)
    it.stopping = False
    with pytest.raises(LlumnixError, match="ended by itself"):
        await it.run()
    assert it.told[-1] == "closed"


class Ending(FleetLLM):
    """One with requests that run, of which only the stop is run."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, open_http: int, unfinished: int) -> None:
        self.open_http, self.unfinished = open_http, unfinished
        self._stop_now = False
        self.did: list[str] = []

        async def abort_all() -> None:
            self.did.append(f"aborted {self.running()}")
            self.unfinished = 0

        self.engine_core: Any = SimpleNamespace(loop=loop, abort_all=abort_all)

    def __del__(self) -> None:
        pass

    def get_num_unfinished_requests(self) -> int:
        return self.unfinished


@pytest.mark.parametrize(("open_http", "unfinished"), [(1, 0), (0, 1)])
async def test_a_stop_waits_for_what_is_open_and_then_ends_what_is_left(
    open_http: int, unfinished: int
) -> None:
    """Whether HTTP waits for its end, or it runs on in the background."""
    llm = Ending(asyncio.get_running_loop(), open_http=open_http, unfinished=unfinished)
    assert llm.running() == 1
    stopping = asyncio.create_task(asyncio.to_thread(llm._let_streams_end, 30))
    await asyncio.sleep(0.15)
    assert not llm.did
    assert not stopping.done()
    llm.open_http = llm.unfinished = 0
    await asyncio.wait_for(stopping, 5)
    await asyncio.sleep(0)
    assert llm.did == ["aborted 0"]


@pytest.mark.parametrize("why", ["its time is over", "a second signal"])
async def test_a_stop_ends_requests_that_do_not_end(why: str) -> None:
    llm = Ending(asyncio.get_running_loop(), open_http=0, unfinished=2)
    if why == "a second signal":
        llm.stop_now()
    began_s = time.monotonic()
    await asyncio.to_thread(llm._let_streams_end, 0.1 if why == "its time is over" else 30)
    assert time.monotonic() - began_s < 5
    assert llm.did == ["aborted 2"]
