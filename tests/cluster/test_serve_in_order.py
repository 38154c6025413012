"""`llumnix serve` from its first line to its last: its parts are fakes that note what they are
told, so that their order can be held."""

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.cluster import fleet as fleets
from llumnix.cluster import serve as serving
from llumnix.cluster import several
from llumnix.cluster.frontends import own
from llumnix.cluster.start import Start
from llumnix.core.settings import SchedulerSettings
from llumnix.engine.launch import EngineLaunch
from llumnix.errors import InstanceFailedError, UsageError
from llumnix.frontend.http import control
from llumnix.frontend.http import server as http_server


class Fleet:
    """One with two instances."""

    exposition = SimpleNamespace(text="text")
    seen = "seen"
    take_settings = "take settings"

    def __init__(self, world: "World") -> None:
        self.world, self.all_failed = world, asyncio.Event()

    async def check_capacity(self, count: int, wait_s: float, say: Any) -> None:
        self.world.note(f"capacity of {count} within {wait_s:g} s")

    def start_controller(self) -> None:
        self.world.note("controller")

    async def start(self, count: int, say: Any) -> None:
        self.world.note(f"{count} instances")

    def status(self) -> list[Any]:
        return [SimpleNamespace(restarts=0, state="serving", why=f"why {n}") for n in (0, 1)]

    async def close(self) -> None:
        self.world.note("fleet closes")


class World:
    """All that `llumnix serve` touches. What is in `fails` raises where it is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch = monkeypatch
        self.did: list[str] = []
        self.fails: dict[str, BaseException] = {}
        self.reload: Any = None
        self.announced: list[Any] = []
        self.followed: list[Any] = []  # vLLM's list of adapters
        self.core = SimpleNamespace(shared_state=SimpleNamespace(follow=self.followed.append))
        self.starts: list[Start] = []
        self.fleet: Any = None
        self.reloading: Any = []
        self.addresses = SimpleNamespace(
            folder=SimpleNamespace(path=folder),
            inputs=("in",),
            outputs=("out",),
            remove=lambda: self.note("folder is removed"),
        )
        self.asked_for: list[Any] = []
        self.command: Any = SimpleNamespace(
            args=SimpleNamespace(
                api_server_count=1,
                port=0,
                disable_log_stats=False,
            ),
            vllm_config="config",
            reloading=lambda take: [take, *self.reloading] if self.reloading else [],
            deployment=SimpleNamespace(
                ray_address=None,
                insecure=False,
                instances=2,
                ray_wait=3.0,
                ready_min=2,
                event_log=None,
                log_place="place",
                scheduler=SchedulerSettings(),
            ),
        )
        monkeypatch.setattr(os, "environ", dict(os.environ))
        self.replace(serving.signals, interrupt="interruptible", ignore="deaf")
        self.replace(serving.ray_runtime, stop="Ray stops", hide_arguments="arguments are hidden")
        monkeypatch.setattr(
            serving.ray_runtime, "settle", lambda *, local: self.note(f"Ray's variables, {local=}")
        )
        monkeypatch.setattr(
            serving.ray_runtime, "start_local", lambda folder, *, logs: self.note(f"Ray, {logs=}")
        )
        monkeypatch.setattr(
            serving.ray_runtime, "join", lambda address, *, logs: self.note(f"joins {address}")
        )
        monkeypatch.setattr(serving.ray_runtime, "node_address", lambda: "10.0.0.1")
        monkeypatch.setattr(
            serving.ray_runtime, "warning_without_token", lambda address: f"{address} is open"
        )
        self.replace(
            serving, sweep="swept", keep_memory_swept="memory swept", leave_memory="memory left",
            name_shared_memory="memory named", check_encryption="encryption",
            settle_variables="variables", log_to_stderr="log",
        )  # fmt: skip
        monkeypatch.setattr(serving, "refuse_strangers", lambda *_, **__: self.note("strangers"))
        monkeypatch.setattr(serving, "parse", lambda argv, say: self.parsed())
        monkeypatch.setattr(serving, "say", lambda text, **_: self.note(f"said: {text}"))
        monkeypatch.setattr(serving, "_keep_logs", lambda folder: self.note(f"keeps {folder.name}"))
        monkeypatch.setattr(
            serving, "EventLog", lambda *_, **__: (
                self.note("event log"), SimpleNamespace(close=lambda: self.note("log closes")),
            )[1],
        )  # fmt: skip
        monkeypatch.setattr(
            serving.Addresses, "make",
            lambda host, count=1: (self.asked_for.append((host, count)), self.addresses)[1],
        )  # fmt: skip
        monkeypatch.setattr(Start, "listen", lambda start, args: self.listen(start, args))
        monkeypatch.setattr(Start, "say", lambda start, text: self.note(f"says: {text}"))
        monkeypatch.setattr(
            Start, "announce", lambda start, args, tasks: self.announced.append(tasks)
        )
        monkeypatch.setattr(
            Start, "take_metrics_port", lambda start, args: self.note("metrics port")
        )
        monkeypatch.setattr(
            Start, "serve_metrics", lambda start, text, seen: self.note(f"metrics: {text}, {seen}")
        )
        monkeypatch.setattr(Start, "close", lambda start: self.note("port closes"))
        monkeypatch.setattr(EngineLaunch, "of", lambda *_, **__: "launch")
        monkeypatch.setattr(own, "OwnFrontend", lambda llm: llm)
        monkeypatch.setattr(fleets, "Fleet", self.make_fleet)
        monkeypatch.setattr(
            control, "OwnControl",
            lambda core, fleet, reloading: SimpleNamespace(reload=(core, fleet, reloading)),
        )  # fmt: skip
        monkeypatch.setattr(
            serving.signals, "pass_hangup_on", lambda loop, reload: setattr(self, "reload", reload)
        )
        monkeypatch.setattr(serving, "_client", self.client)
        monkeypatch.setattr(http_server, "serve", self.serve_http)

    def note(self, what: str) -> None:
        self.did.append(what)
        if what in self.fails:
            raise self.fails[what]

    def replace(self, where: Any, **what: str) -> None:
        for name, told in what.items():
            self.monkeypatch.setattr(where, name, lambda *_, told=told, **__: self.note(told))

    def parsed(self) -> Any:
        self.note("parsed")
        return self.command

    def listen(self, start: Start, args: Any) -> None:
        self.note("listens")
        self.starts.append(start)
        start.listener = SimpleNamespace(port=8123)  # type: ignore[assignment]

    def make_fleet(self, *parts: Any) -> Fleet:
        self.fleet = Fleet(self)
        return self.fleet

    def client(self, command: Any, log: Any, addresses: Any, undo: Any) -> Any:
        undo.callback(lambda: self.note("client closes"))

        async def tasks() -> list[str]:
            return ["generate"]

        return SimpleNamespace(engine_core=self.core, get_supported_tasks=tasks)

    async def serve_http(
        self, llm: Any, control: Any, listener: Any, args: Any, announce: Any, *, on_state: Any
    ) -> None:
        assert listener.port == args.port == 8123
        on_state(SimpleNamespace(openai_serving_models="models"))
        assert self.followed == ["models"], "new engines load no adapter that is unloaded"
        await announce()
        self.note("serves")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    return World(monkeypatch, tmp_path)


BEFORE = [
    "interruptible", "variables", "log", "strangers", "listens", "Ray's variables, local=True",
    "arguments are hidden", "says: loading vLLM", "parsed", "listens", "metrics port", "event log",
    "swept", "swept", "memory swept",
]  # fmt: skip
RUN = [
    "metrics: text, seen", "capacity of 2 within 3 s", "controller", "2 instances", "serves",
    "deaf", "fleet closes", "client closes", "log closes",
]  # fmt: skip
AFTER = ["deaf", "Ray stops", "folder is removed", "memory left", "deaf", "port closes"]


def test_the_parts_start_in_order_and_stop_in_the_reverse_order(world: World) -> None:
    os.environ.pop("VLLM_LOGGING_LEVEL", None)
    assert serving.serve(["serve"]) == 0
    ray = ["says: starting Ray on this machine", "Ray, logs=False", "interruptible", "memory named"]
    assert world.did == [*BEFORE, *ray, *RUN, "said: stopped", *AFTER]
    assert world.asked_for == [(None, 1)]
    assert world.announced == [["generate"]]
    assert world.starts[0].progress.ready_min == 2
    assert world.starts[0].progress.instances == world.fleet.status
    assert os.environ["VLLM_LOGGING_LEVEL"] == "WARNING"
    assert os.environ["VLLM_RPC_BASE_PATH"] == str(world.addresses.folder.path)
    assert world.reload is None


def test_a_user_who_wants_vllms_lines_gets_rays_too(world: World) -> None:
    os.environ["VLLM_LOGGING_LEVEL"] = "DEBUG"
    serving.serve(["serve"])
    assert "Ray, logs=True" in world.did
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_a_file_is_read_again_at_a_hang_up(world: World) -> None:
    world.reloading = ["a file of keys"]
    serving.serve(["serve"])
    assert world.reload == (world.core, world.fleet, ["take settings", "a file of keys"])


@pytest.mark.parametrize("insecure", [False, True])
def test_a_cluster_is_joined_at_its_own_address(world: World, insecure: bool) -> None:
    world.command.deployment.ray_address = "head:6379"
    world.command.deployment.insecure = insecure
    assert serving.serve(["serve", "--ray-address", "head:6379"]) == 0
    assert "Ray's variables, local=False" in world.did
    at = world.did.index("encryption")
    said = [] if insecure else ["says: head:6379 is open"]
    assert world.did[at : at + 4 + len(said)] == [
        "encryption", "says: joining Ray at head:6379", "joins head:6379", *said, "interruptible",
    ]  # fmt: skip
    assert world.asked_for == [("10.0.0.1", 1)]
    assert not any(what.startswith("Ray, ") for what in world.did)


def test_several_frontends_share_their_metrics_and_have_event_logs_of_their_own(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(*given: Any) -> int:
        world.note("the office")
        assert given[:2] == (world.command, world.addresses)
        return 7

    monkeypatch.setattr(
        serving.shared_metrics, "share", lambda folder: world.note(f"share in {folder.name}")
    )
    monkeypatch.setattr(several, "run", run)
    world.command.args.api_server_count = 3
    assert serving.serve(["serve"]) == 7
    assert world.did[-9:] == ["share in metrics", "log closes", "the office", *AFTER]
    assert world.asked_for == [(None, serving.clients(3))]


@pytest.mark.parametrize("at", ["parsed", "2 instances", "serves"])
def test_an_interrupted_start_leaves_nothing(world: World, at: str) -> None:
    world.fails[at] = KeyboardInterrupt()
    assert serving.serve(["serve"]) == 130
    assert world.did[-2:] == ["deaf", "port closes"]
    assert "said: stopped before it served" in world.did
    assert ("fleet closes" in world.did) == (at != "parsed")
    assert ("folder is removed" in world.did) == (at != "parsed")


def test_an_instance_that_cannot_be_started_is_told_and_its_logs_are_kept(world: World) -> None:
    world.fails["2 instances"] = InstanceFailedError("instance i0 could not be started: no memory")
    with pytest.raises(UsageError, match="no memory"):
        serving.serve(["serve"])
    assert world.did[-7:] == [*AFTER[:2], "keeps ray", *AFTER[2:]]
    assert "fleet closes" in world.did


def test_the_logs_of_a_cluster_that_was_joined_are_its_own(world: World) -> None:
    world.command.deployment.ray_address = "head:6379"
    world.fails["2 instances"] = InstanceFailedError("no")
    with pytest.raises(UsageError):
        serving.serve(["serve", "--ray-address", "head:6379"])
    assert "keeps ray" not in world.did


def test_when_every_instance_has_failed_it_says_why(world: World) -> None:
    async def serve_http(*_: Any, **__: Any) -> None:
        world.fleet.all_failed.set()
        async with asyncio.timeout(5):
            while "signal" not in world.did:
                await asyncio.sleep(0.001)

    def kill(pid: int, number: int) -> None:
        assert (pid, number) == (os.getpid(), 15)
        world.note("signal")

    world.monkeypatch.setattr(http_server, "serve", serve_http)
    world.monkeypatch.setattr(serving.os, "kill", kill)
    with pytest.raises(UsageError, match=r"^every instance failed: why 0; why 1$"):
        serving.serve(["serve"])
    assert "fleet closes" in world.did


def test_an_event_log_that_cannot_be_written_is_a_mistake_of_the_users(world: World) -> None:
    world.command.deployment.event_log = "/full/log"
    world.fails["event log"] = OSError(28, "No space left on device")
    with pytest.raises(UsageError, match=r"--event-log /full/log .*\(No space left on device\)"):
        serving.serve(["serve"])
    assert world.did[-2:] == ["deaf", "port closes"]


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_starts_nothing(world: World, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serving.serve(["serve", word]) == 0
    assert "--instances" in capsys.readouterr().out
    assert world.did == []
