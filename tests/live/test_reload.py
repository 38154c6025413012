"""A running server reads its settings again: what may change does, and no stream notices."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.server import Server, eventually
from support.streaming import Background, Recorded, first_difference, stream

from .conftest import FLAGS
from .test_rolling import BODIES, COMPLETIONS, calm, command
from .test_scheduler import llumnix

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]

STREAMS = 2
AT_START = "scheduler: {queue: {passers: 8}}\nmax-instances: 2\nmin-instances: 1\n"
AFTER = (
    "scheduler: {queue: {passers: 3}, survival: {wait_s: 5}}\n"
    "instances: 3\nmax-instances: 3\nmin-instances: 3\n"
)
"""One instance more than there are, so that the scheduler has to start it."""


class World:
    def __init__(self, server: Server, config: Path, log: Path) -> None:
        self.server, self.config, self.log = server, config, log

    def settings(self) -> list[dict[str, Any]]:
        """Those that schedulers were started with or told of since, by the event log."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [
            line["settings"] if line["kind"] == "started" else line["body"]["settings"]
            for line in lines
            if line["kind"] == "started" or line.get("name") == "SettingsChanged"
        ]

    def reload(self) -> tuple[int, Any]:
        done = command(self.server, "reload", "--json")
        return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


@pytest.fixture(scope="module", params=[1, 2], ids=["one frontend", "two frontends"])
def world(
    request: pytest.FixtureRequest, tiny_model: Path, logs: Path, tmp_path_factory: Any
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("reload")
    config, log = folder / "llumnix.yaml", folder / "events.jsonl"
    config.write_text(AT_START)
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS, "--config", str(config),
        "--api-server-count", str(request.param), "--event-log", str(log),
        log=logs / f"reload{request.param}.log",
    )  # fmt: skip
    yield World(server.wait_until_serving(), config, log)
    assert server.stop() == 0
    print(server.log[-3000:])
    replayed = llumnix("replay", str(log))
    assert replayed.returncode == 0, replayed.stdout


def test_settings_change_under_streams(world: World) -> None:
    server, wanted = world.server, calm(world.server)

    def one(thread: int, number: int) -> Recorded:
        return stream(server, COMPLETIONS, BODIES[thread], name=f"{thread}-{number}")

    with Background(STREAMS, one).running() as load:
        world.config.write_text("scheduler: {queue: {passers: many}}\n")
        status, said = world.reload()
        assert status == 2
        assert "queue.passers" in said
        assert len(world.settings()) == 1, "a bad file changes nothing"
        world.config.write_text(AFTER)
        status, body = world.reload()
        assert status == 0
        assert body["settings"] == {
            "now": ["scaling.instances_min", "scaling.instances_max"],
            "engines": ["queue.passers"],
            "start": ["survival.wait_s", "instances"],
        }
        eventually(lambda: len(world.settings()) == 2, 10, "the scheduler is told")
        eventually(lambda: "i2" in server.instances(), 30, "the scheduler adds an instance")
        eventually(lambda: server.instances()["i2"]["state"] == "serving", 200, "it serves")
    assert load.done
    assert [s.error for s in load.done if s.error] == []
    assert [d for s in load.done if (d := first_difference(wanted[int(s.name[0])], s))] == []


def test_a_controller_that_comes_later_starts_with_them(world: World) -> None:
    (pid,) = world.server.controllers()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(world.settings()) == 3, 90, "another controller")
    changed, started = world.settings()[1:]
    assert started == changed
    assert started["queue"]["passers"] == 3
    assert started["survival"]["wait_s"] == 60, "it counts from the next start"
    assert world.server.complete().status_code == 200
