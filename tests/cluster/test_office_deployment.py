"""A deployment of several frontends, from its start to its end: its parts are fakes that note what
they are told."""

import asyncio
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.cluster import several
from llumnix.cluster.several import Deployment
from llumnix.cluster.start import Start
from llumnix.engine.launch import EngineLaunch
from llumnix.errors import InstanceFailedError, LlumnixError, UsageError

READY = ["load vLLM's processes", "capacity of 2", "controller", "2 instances", "adapters", "open"]


class World:
    """What a deployment of three frontends and two instances is made of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.did: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.reloading: Any = []
        self.taken: list[Any] = []
        self.hang_up: Any = None
        self.roster = SimpleNamespace(
            serving=0, settled=False, status=lambda: [SimpleNamespace(why="f")]
        )
        self.announced: list[tuple[Any, str]] = []
        self.office = SimpleNamespace(
            roster=self.roster,
            start=self._notes("office"),
            close=self._notes("office closes"),
            open=self._notes("open"),
            engine_client=SimpleNamespace(tasks_if_any=self._tasks),
        )
        self.fleet = SimpleNamespace(
            all_failed=asyncio.Event(),
            check_capacity=lambda count, wait_s, say: self._later(f"capacity of {count}"),
            start_controller=self._notes("controller"),
            take_settings="take settings",
            start=lambda count, say: self._later(f"{count} instances"),
            status=lambda: [SimpleNamespace(restarts=0, state="serving", why="i")],
            exposition=SimpleNamespace(text="text"),
            seen="seen",
            close=lambda: self._later("fleet closes"),
        )
        self.desk = SimpleNamespace(load_all=lambda adapters: self._later("adapters"), reload=1)
        self.processes = SimpleNamespace(
            all_failed=asyncio.Event(),
            admission="admission",
            loads="loads",
            start=self._notes("load vLLM's processes"),
            close=self._notes("frontends close"),
        )
        client = SimpleNamespace(listen=lambda: None, close_sockets=self._notes("client closes"))
        link = SimpleNamespace(start=lambda: None, close=self._notes("link closes"))
        self.given: dict[str, tuple[Any, ...]] = {}
        for name, part in (
            ("EngineClient", client), ("ControllerLink", link), ("Office", self.office),
            ("Fleet", self.fleet), ("Desk", self.desk), ("FrontendProcesses", self.processes),
        ):  # fmt: skip
            monkeypatch.setattr(several, name, self._makes(name, part))
        monkeypatch.setattr(several, "of_command_line", lambda args: [])
        monkeypatch.setattr(several, "LOOK_EVERY_S", 0.005)
        monkeypatch.setattr(several.signals, "pass_hangup_on", self._pass_hangup_on)
        monkeypatch.setattr(several.signals, "ignore", lambda loop: self.did.append("deaf"))
        monkeypatch.setattr(EngineLaunch, "of", lambda *_, **__: "launch")
        monkeypatch.setattr(Deployment, "stop", lambda it: self._later("stop"))
        monkeypatch.setattr(Start, "say", lambda *_: None)
        self.start = Start()
        self.start.announce = lambda args, tasks, how="": self.announced.append((tasks, how))  # type: ignore[method-assign]
        self.start.listener = SimpleNamespace(  # type: ignore[assignment]
            url="http://here",
            socket="socket",
            stop_answering=self._notes("frontends answer"),
            answer=self._notes("the office answers"),
        )
        self.command: Any = SimpleNamespace(
            args=SimpleNamespace(
                api_server_count=3,
                disable_log_stats=False,
                max_num_queued_reqs=None,
            ),
            reloading=lambda take: (self.taken.append(take), self.reloading)[1],
            vllm_config="config",
            deployment=SimpleNamespace(slots=2, instances=2, ray_wait=0.0),
        )
        self.addresses: Any = SimpleNamespace(
            inputs=("in 0", "in 1"),
            outputs=("out 0", "out 1"),
            listeners_of=lambda client: f"listeners {client}",
            controller="controller",
            office="office",
            keys=None,
        )

    def _notes(self, what: str) -> Callable[[], None]:
        return lambda: self.did.append(what)

    async def _later(self, what: str) -> None:
        if what in self.fails:
            raise self.fails[what]
        self.did.append(what)

    async def _tasks(self) -> list[str]:
        return ["generate"]

    def _makes(self, name: str, part: Any) -> Callable[..., Any]:
        def make(*args: Any, **named: Any) -> Any:
            self.given[name] = args
            return part

        return make

    def _pass_hangup_on(self, loop: Any, reload: Any) -> None:
        self.hang_up = reload

    async def run(self, script: Callable[["World"], Any]) -> int:
        """`llumnix serve`, while `script` goes on beside it."""
        running = asyncio.create_task(
            several.run(self.command, self.addresses, self.start)  # type: ignore[arg-type]
        )
        try:
            await script(self)
            return await asyncio.wait_for(running, 5)
        finally:
            running.cancel()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().remove_signal_handler(number)

    async def until(self, what: str, times: int = 1) -> None:
        async with asyncio.timeout(5):
            while self.did.count(what) < times:
                await asyncio.sleep(0.002)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


async def a_signal(w: World) -> None:
    await w.until("open")
    signal.raise_signal(signal.SIGTERM)


async def test_it_starts_in_order_and_a_signal_stops_it_whole(world: World) -> None:
    assert await world.run(a_signal) == 0
    assert world.did == [
        "office", *READY, "stop", "deaf", "frontends close", "fleet closes", "office closes",
        "link closes", "client closes",
    ]  # fmt: skip
    assert world.hang_up is None
    assert world.given["Fleet"] == (
        world.office, "launch", world.addresses, world.command.deployment
    )  # fmt: skip


async def test_with_a_file_a_hang_up_reads_it_again(world: World) -> None:
    world.reloading = ["a file of keys"]
    await world.run(a_signal)
    assert world.hang_up == world.desk.reload
    assert world.given["Desk"] == (world.office, world.fleet, world.reloading)
    assert world.taken == [world.fleet.take_settings]


async def test_frontends_answer_at_the_port_and_while_none_serves_the_office_does(
    world: World,
) -> None:
    async def script(w: World) -> None:
        await w.until("open")
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert "frontends answer" not in w.did, "none serves yet"
        assert "the office answers" not in w.did, "the start still does"
        w.roster.serving = 1
        await w.until("frontends answer")
        assert not w.announced, "others are still starting"
        w.roster.serving = 0
        await w.until("the office answers")
        assert w.start.progress.code != "no_frontend", "they are starting"
        w.roster.serving = 1
        await w.until("frontends answer", w.did.count("frontends answer") + 1)
        w.roster.serving, w.roster.settled = 2, True
        w.office.on_serving()  # type: ignore[attr-defined]
        await w.until("frontends answer", w.did.count("frontends answer") + 2)
        w.roster.serving = 0
        await w.until("the office answers", 2)
        assert w.start.progress.code == "no_frontend"
        w.roster.serving = 2
        await w.until("frontends answer", w.did.count("frontends answer") + 1)
        signal.raise_signal(signal.SIGTERM)

    await world.run(script)
    assert world.announced == [(["generate"], " with 2 frontends")]


async def test_a_frontend_is_made_for_its_number_and_its_place(world: World) -> None:
    await world.run(a_signal)
    (_, count, make) = world.given["FrontendProcesses"]
    assert count == 3
    start = make(2, 1)
    assert (start.beside.slot, start.beside.count, start.beside.admission) == (2, 3, None)
    assert (start.place.index, start.place.count) == (1, 3)
    assert (start.place.input_address, start.place.output_address) == ("in 1", "out 1")
    assert start.place.listeners == "listeners 1"
    assert (start.url, start.socket, start.loads) == ("http://here", "socket", "loads")
    assert (start.office, start.controller) == ("office", "controller")
    world.command.args.max_num_queued_reqs = 5
    assert make(2, 1).beside.admission == "admission"


async def nothing(w: World) -> None:
    pass


@pytest.mark.parametrize(
    ("step", "error", "told"),
    [
        ("adapters", RuntimeError("no such file"), "--lora-modules: no such file"),
        ("2 instances", InstanceFailedError("i0 failed"), "i0 failed"),
        ("capacity of 2", UsageError("no room"), "no room"),
    ],
)
async def test_what_cannot_start_is_taken_apart_and_says_why(
    world: World, step: str, error: Exception, told: str
) -> None:
    world.fails[step] = error
    with pytest.raises(UsageError, match=f"^{told}$"):
        await world.run(nothing)
    assert world.did[-6:] == [
        "deaf", "frontends close", "fleet closes", "office closes", "link closes", "client closes",
    ]  # fmt: skip
    assert "stop" not in world.did
    assert world.start.crashed == isinstance(error, InstanceFailedError)


@pytest.mark.parametrize("kind", ["instance", "frontend"])
async def test_it_ends_with_an_error_once_all_have_failed(world: World, kind: str) -> None:
    """Without instances the open requests are let end; without frontends there are none."""

    async def script(w: World) -> None:
        await w.until("open")
        (w.fleet if kind == "instance" else w.processes).all_failed.set()

    with pytest.raises(LlumnixError, match=f"^every {kind} failed: {kind[0]}$") as raised:
        await world.run(script)
    assert isinstance(raised.value, UsageError) == (kind == "instance")
    assert ("stop" in world.did) == (kind == "instance")
    assert "fleet closes" in world.did


async def test_an_instance_that_dies_while_frontends_come_up_does_not_end_the_start(
    world: World,
) -> None:
    """It is started again, and the server says that it serves once it does."""
    asked: list[int] = []

    async def once_it_is_back() -> list[str] | None:
        asked.append(1)
        return None if len(asked) < 3 else ["generate"]

    async def script(w: World) -> None:
        w.office.engine_client.tasks_if_any = once_it_is_back
        w.roster.serving, w.roster.settled = 1, True
        async with asyncio.timeout(5):
            while not w.announced:
                await asyncio.sleep(0.002)
        signal.raise_signal(signal.SIGTERM)

    assert await world.run(script) == 0
    assert world.announced == [(["generate"], " with 1 frontends")]


async def test_an_error_at_the_port_ends_it(world: World) -> None:
    async def fails() -> list[str]:
        raise RuntimeError("no engine answers")

    async def script(w: World) -> None:
        w.office.engine_client.tasks_if_any = fails
        w.roster.serving, w.roster.settled = 1, True

    with pytest.raises(RuntimeError, match="no engine answers"):
        await world.run(script)
    assert "fleet closes" in world.did
