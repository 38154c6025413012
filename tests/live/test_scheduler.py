"""The Llumnix scheduler on real engines: load moves by itself, instances drain, urgent requests get
room, and no client can tell from its stream."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llumnix.cli import main
from support.server import Server, all_migrations, eventually
from support.streaming import Recorded, all_at_once, first_difference, rows, stream

from .conftest import FLAGS

pytestmark = pytest.mark.live

# 2,048 tokens of KV an instance, so that a few requests fill it.
NARROW = (
    *FLAGS, "--kv-cache-memory-bytes", "8388608", "--max-model-len", "1024", "--block-size", "32",
)  # fmt: skip
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def fleet(tiny_model: Path, logs: Path) -> Iterator[Server]:
    """Two instances under the default policy. Tests leave two that serve, and nothing running."""
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *NARROW,
        "--event-log", str(logs / "events.jsonl"), log=logs / "scheduler.log",
    )  # fmt: skip
    yield server.wait_until_serving()
    assert server.stop() == 0
    print(server.log[-4000:])
    replayed = llumnix("replay", str(logs / "events.jsonl"))
    assert replayed.returncode == 0, replayed.stdout
    # Its requests are a trace for the simulator.
    lines = map(json.loads, (logs / "events.jsonl").read_text().splitlines())
    ended = [line["body"] for line in lines if line["kind"] == "request"]
    again = llumnix("simulate", "--trace", str(logs / "events.jsonl"), "--instances", "2", "--json")
    assert again.returncode == 0, again.stderr
    (run,) = json.loads(again.stdout)["runs"]
    assert run["metrics"]["requests_done"] == sum(
        r["output_tokens"] > 0 and r["finish_reason"] != "error" for r in ended
    )
    assert ended


def llumnix(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llumnix", *words],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def body(prompt_tokens: int, max_tokens: int, seed: int, **more: Any) -> dict[str, Any]:
    """Random-looking token ids: no two requests share a prefix."""
    ids = [3 + (seed * 7919 + i * i * 31 + i) % 500 for i in range(prompt_tokens)]
    return {
        "prompt": ids, "max_tokens": max_tokens, "temperature": 0.2, "seed": seed,
        "ignore_eos": True, "return_token_ids": True, **more,
    }  # fmt: skip


def migrations(server: Server) -> list[dict[str, Any]]:
    return [m for m in all_migrations(server.http.get) if m["outcome"] == "migrated"]


def started(server: Server, names: list[str]) -> bool:
    """Whether each of them has got its first token."""
    known = {row["id"]: row["output_tokens"] for row in server.requests()}
    return all(known.get(name, 0) > 0 for name in names)


class Load:
    """Streams under way, in threads; `undisturbed` are what they must come to."""

    def __init__(self, server: Server, bodies: list[dict[str, Any]], tag: str) -> None:
        self.server = server
        self.bodies = bodies
        self.names = [f"{tag}-{n}" for n in range(len(bodies))]
        self.streams: list[Recorded] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        works = [
            lambda b=b, n=n: stream(self.server, PATH, b, name=n)
            for b, n in zip(self.bodies, self.names, strict=True)
        ]
        self.streams = all_at_once(works)

    def begin(self) -> "Load":
        self._thread.start()
        eventually(lambda: started(self.server, self.names), 60, "all of them run")
        return self

    def end(self) -> list[Recorded]:
        self._thread.join(180)
        assert [s.error for s in self.streams] == [None] * len(self.bodies)
        return self.streams

    def assert_undisturbed(self, among: Sequence[str] | None = None) -> None:
        """Each is whole. Each of those `among` (None: of all) is what the same request gives when
        nothing else runs."""
        for name, given, seen in zip(self.names, self.bodies, self.end(), strict=True):
            assert len(seen.tokens()) == given["max_tokens"]
            if among is None or name in among:
                alone = stream(self.server, PATH, given)
                assert alone.tokens() == seen.tokens(), first_difference(alone, seen)


def on(server: Server, instance: str) -> list[str]:
    return [row["id"] for row in server.requests() if row["instance"] == instance]


def both_serve(server: Server) -> bool:
    """And the controller has heard of both, so that both get requests."""
    found = server.instances().values()
    return [(i["state"], i["running"] is None) for i in found] == [("serving", False)] * 2


def test_a_class_is_asked_for_by_header_tier_or_number(fleet: Server) -> None:
    asked: list[tuple[dict[str, str], dict[str, Any], int]] = [
        ({"x-llumnix-priority": "high"}, {}, -100),
        ({}, {"service_tier": "priority"}, -100),
        ({}, {"service_tier": "default"}, 0),
        ({}, {"priority": -7}, -7),
        ({"X-Vllm-Priority": "-8"}, {}, -8),
        ({}, {}, 0),
    ]
    for headers, more, number in asked:
        given = {
            "messages": [{"role": "user", "content": "hello"}], "max_tokens": 100, "model": "tiny",
            "ignore_eos": True, "stream": True, **more,
        }  # fmt: skip
        headers = {**headers, "X-Request-Id": "asked"}
        with fleet.http.stream(
            "POST", "/v1/chat/completions", json=given, headers=headers
        ) as answer:
            assert answer.status_code == 200
            assert [row["priority"] for row in rows(fleet, "asked")] == [number], (headers, more)
        eventually(lambda: not rows(fleet, "asked"), 10)


def test_a_class_that_does_not_exist_is_named(fleet: Server) -> None:
    answer = fleet.http.post(
        PATH, json={"prompt": "a", "model": "tiny"}, headers={"x-llumnix-priority": "urgent"}
    )
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message == ("x-llumnix-priority: no priority class 'urgent'; there are: high, normal")


@pytest.mark.slow
def test_a_queue_that_is_blocked_makes_its_instance_give_requests_away(fleet: Server) -> None:
    """De-fragmentation: what is free on both instances would hold the long prompt, what is free on
    either of them would not. With one request less its instance has room for the prompt, and for
    all there to grow by a block."""
    before = len(migrations(fleet))
    load = Load(fleet, [body(250, 380, seed) for seed in range(8)], "frag").begin()

    def so_full() -> bool:
        free = [i["kv_tokens_total"] - i["kv_tokens_used"] for i in fleet.instances().values()]
        return max(free) < 928 + 5 * 32 < sum(free)

    # A report may come a step later than the first tokens.
    eventually(so_full, 10, "the prompt fits on both together, and on neither")
    still: list[int] = []
    long = stream(
        fleet, PATH, body(900, 20, 99),
        on_chunk=lambda n: still.append(len(fleet.requests()) - 1) if n == 1 else None,
    )  # fmt: skip
    assert long.error is None
    assert still == [8], "it did not have to wait for anybody's end"
    # Before the engine has reported that it waits, the request on its way is what makes it full.
    why = [m["why"] for m in migrations(fleet)[before:]]
    assert any(words.startswith("freeness ") and " is below " in words for words in why), why
    load.assert_undisturbed()


def test_an_urgent_request_gets_its_instance_to_itself(fleet: Server) -> None:
    load = Load(fleet, [body(60, 330, seed) for seed in range(6)], "normal").begin()
    urgent = Load(fleet, [body(40, 330, 50, priority=-100)], "urgent").begin()
    where = fleet.requests()
    mine = next(r["instance"] for r in where if r["id"] == "urgent-0")
    moved = [r["id"] for r in where if r["instance"] == mine]
    eventually(lambda: on(fleet, mine) == ["urgent-0"], 10, "the others are moved away")
    urgent.assert_undisturbed()
    load.assert_undisturbed(moved)


@pytest.mark.slow
def test_a_drain_that_is_taken_back_leaves_two_that_serve(fleet: Server) -> None:
    load = Load(fleet, [body(100, 200, seed) for seed in range(6)], "undrain").begin()
    assert fleet.http.post("/llumnix/v1/instances/i1/drain").status_code == 202
    answer = fleet.http.post("/llumnix/v1/instances/i1/undrain")
    assert (answer.status_code, answer.json()["state"]) == (200, "serving")
    load.assert_undisturbed()
    assert both_serve(fleet)
    answers = all_at_once([lambda: fleet.complete(max_tokens=16)] * 6)
    assert {a.headers["x-llumnix-instance"] for a in answers} == {"i0", "i1"}
    again = fleet.http.post("/llumnix/v1/instances/i1/undrain")
    assert again.status_code == 409
    assert "only an instance that is draining" in again.json()["error"]["message"]


def test_a_sigterm_of_an_instance_moves_its_requests_away_and_stops_it(fleet: Server) -> None:
    load = Load(fleet, [body(100, 300, seed) for seed in range(6)], "term").begin()
    held = on(fleet, "i1")
    assert held
    pid = fleet.instances()["i1"]["pid"]
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    eventually(
        lambda: fleet.instances().get("i1", {}).get("state") not in ("serving", "draining"), 15
    )
    took_s = time.monotonic() - began
    assert len(load.names) == len([n for n in load.names if rows(fleet, n)]), "nobody had ended"
    assert took_s < 10
    print(f"drained {len(held)} requests in {took_s:.2f} s")
    load.assert_undisturbed(held)
    eventually(lambda: "i1" not in fleet.instances(), 15, "it is gone")
    assert "its process got a SIGTERM" in fleet.log


def test_the_last_instance_is_not_drained(fleet: Server) -> None:
    assert list(fleet.instances()) == ["i0"]
    os.kill(fleet.instances()["i0"]["pid"], signal.SIGTERM)
    eventually(lambda: "Not done (its process got a SIGTERM)" in fleet.log, 10)
    refused = llumnix("drain", "i0", "--url", fleet.url)
    assert refused.returncode == 2
    assert "i0 is the only instance that serves" in refused.stderr
    assert fleet.complete().status_code == 200


@pytest.mark.slow
def test_the_command_drains_an_instance_and_says_so(
    fleet: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    if "i1" not in fleet.instances():
        fleet.http.post("/llumnix/v1/instances")
    eventually(lambda: both_serve(fleet), 120, "a second one serves again")
    load = Load(fleet, [body(40, 800, seed) for seed in range(2)], "command").begin()
    assert on(fleet, "i1")
    before = len(migrations(fleet))
    # In this process: on two busy cores a new one may take longer to start than the streams last.
    assert main(["drain", "i1", "--url", fleet.url]) == 0
    assert capsys.readouterr().out.startswith("i1 is empty and stopped after ")
    assert {m["why"] for m in migrations(fleet)[before:]} == {"i1 is being emptied"}
    load.assert_undisturbed()
    nobody = llumnix("drain", "i7", "--url", fleet.url)
    assert nobody.returncode == 2
    assert "no instance i7; there are: i0" in nobody.stderr
