"""Instances are restarted one after the other under load, and stopped ones are removed by force: no
client notices, and each answer is the undisturbed one's."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.server import Server, eventually, real_time
from support.streaming import Background, Recorded, all_at_once, first_difference, stream

from .conftest import FLAGS
from .test_migration import COMPLETIONS, LONG, WHOLE

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]

STREAMS = 4
COMMAND_S = 600
"""The longest one restarts three engines one after the other. On two cores that the load keeps busy
one engine took 88 s to start."""
BODIES = [
    {"prompt": f"{n} of them. " + LONG, "max_tokens": 300, "temperature": 0.2, "seed": n, **WHOLE}
    for n in range(STREAMS)
]


@pytest.fixture(scope="module", params=[(3, 1), (2, 2)], ids=["one frontend", "two frontends"])
def fleet(request: pytest.FixtureRequest, tiny_model: Path, logs: Path) -> Iterator[Server]:
    """Three instances behind one frontend, or two behind two."""
    instances, frontends = request.param
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS, "--instances", str(instances),
        "--api-server-count", str(frontends), log=logs / f"rolling{frontends}.log",
    )  # fmt: skip
    yield server.wait_until_serving()
    assert server.stop() == 0
    print(server.log[-3000:])


def command(server: Server, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llumnix", *words, "--url", server.url],
        capture_output=True, text=True, timeout=COMMAND_S, check=False,
    )  # fmt: skip


def calm(server: Server) -> list[Recorded]:
    """The undisturbed answers."""
    return all_at_once([lambda b=b: stream(server, COMPLETIONS, b) for b in BODIES])


def engines(server: Server) -> dict[str, int]:
    return {name: row["engine_index"] for name, row in server.instances().items()}


def test_a_rolling_restart_under_load_costs_no_stream(fleet: Server) -> None:
    wanted, before = calm(fleet), engines(fleet)

    def one(thread: int, number: int) -> Recorded:
        return stream(fleet, COMPLETIONS, BODIES[thread], name=f"{thread}-{number}")

    with Background(STREAMS, one).running() as load:
        eventually(lambda: len(fleet.requests()) == STREAMS, 30, "the load")
        done = command(fleet, "restart", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["instances"]
    assert [(row["id"], row["state"], row["restarts"]) for row in rows] == [
        (name, "serving", 0) for name in before
    ]
    after = engines(fleet)
    assert all(after[name] > index for name, index in before.items())
    assert len(load.done) > STREAMS
    assert [s.error for s in load.done if s.error] == []
    different = [first_difference(wanted[int(s.name[0])], s) for s in load.done]
    assert [d for d in different if d] == []


def test_a_stopped_engine_that_is_removed_by_force_costs_no_stream(fleet: Server) -> None:
    """The engine is stopped first, so that nobody can move anything away from it."""
    wanted, before = calm(fleet), engines(fleet)
    row: dict[str, Any] = {}

    def remove() -> None:
        real_time()

        def running() -> Any:
            there = fleet.requests()
            return len(there) == STREAMS and all(r["output_tokens"] > 5 for r in there) and there

        there = eventually(running, 60, "all run")
        names = list(fleet.instances())
        most = max(names, key=lambda name: sum(r["instance"] == name for r in there))
        row.update(fleet.instances()[most])
        os.kill(row["pid"], signal.SIGSTOP)
        done = command(fleet, "remove", most, "--force")
        row["said"], row["status"] = done.stdout + done.stderr, done.returncode

    *seen, _ = all_at_once([*(lambda b=b: stream(fleet, COMPLETIONS, b) for b in BODIES), remove])
    assert row["status"] == 0, row["said"]
    assert row["id"] not in fleet.instances()
    assert [s.error for s in seen] == [None] * STREAMS
    assert [first_difference(a, b) for a, b in zip(wanted, seen, strict=True)] == [None] * STREAMS
    eventually(lambda: not Path(f"/proc/{row['pid']}").exists(), 30, "its process is gone")
    assert command(fleet, "add", "--wait").returncode == 0
    assert set(fleet.instances()) == set(before)


def test_the_commands_list_what_happened(fleet: Server) -> None:
    """The stream lasts until they have been given, however slowly they start."""
    body, looked = {**BODIES[0], "max_tokens": 1900}, threading.Event()

    def look() -> None:
        eventually(lambda: fleet.requests(), 30, "it runs")
        listed = command(fleet, "requests", "--class", "normal", "--json")
        (mine,) = json.loads(listed.stdout)["requests"]
        assert (mine["id"], mine["class"]) == ("seen", "normal")
        other = next(i for i in fleet.instances() if i != mine["instance"])
        assert command(fleet, "migrate", "seen", "--to", other).returncode == 0
        looked.set()

    def watch() -> Recorded:
        return stream(fleet, COMPLETIONS, body, name="seen", on_chunk=lambda _: not looked.is_set())

    all_at_once([watch, look])
    moved = json.loads(command(fleet, "migrations", "--reason", "user", "--json").stdout)
    assert moved["migrations"][-1]["request_id"] == "seen"
    assert all(a["ago_s"] >= b["ago_s"] for a, b in itertools.pairwise(moved["migrations"]))
