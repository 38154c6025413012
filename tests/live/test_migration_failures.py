"""What goes wrong while requests are moved: clients, engines and the controller go away, requests
end, there is no room. Every stream is the undisturbed one's, and nothing is left of it."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.server import Server, eventually, real_time
from support.streaming import (
    Recorded,
    all_at_once,
    first_difference,
    migrate,
    rows,
    stream,
)

from .conftest import FLAGS

pytestmark = [pytest.mark.live, pytest.mark.slow]

COMPLETIONS = "/v1/completions"
TEXT = "All of this has to be there. "
# As in test_migration.py: cold enough for every token to hang on all of the KV before it.
SEEDED = {"temperature": 0.1, "ignore_eos": True, "return_token_ids": True}
STREAMS = 6
BACK_TIMEOUT_S = 120


@pytest.fixture(scope="module")
def shared_pair(tiny_model: Path, logs: Path) -> Iterator[Server]:
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS,
        "--kv-cache-memory-bytes", "16777216", "--block-size", "32", "--policy", "least-loaded",
        log=logs / "hurt.log",
    )  # fmt: skip
    yield server.wait_until_serving()
    server.stop()
    print(server.log[-6000:])


@pytest.fixture
def pair(shared_pair: Server) -> Iterator[Server]:
    """Two instances with room for 4000 tokens each. After every test both serve, hold no block,
    and answer."""
    server = shared_pair
    yield server
    eventually(
        lambda: all(i["state"] == "serving" for i in server.instances().values()),
        BACK_TIMEOUT_S,
        "both serve",
    )
    eventually(lambda: server.requests() == [], 10, "no stream is left")
    eventually(lambda: held(server) == {"i0": (0, 0, 0), "i1": (0, 0, 0)}, 20, "no block is left")
    answers = all_at_once([lambda i=i: server.complete(f"fresh {i}") for i in range(8)])
    assert [a.status_code for a in answers] == [200] * 8
    assert {a.headers["x-llumnix-instance"] for a in answers} == {"i0", "i1"}


def held(server: Server) -> dict[str, tuple[Any, ...]]:
    """What each instance holds: requests running and waiting, and tokens in KV blocks."""
    return {
        name: (row["running"], row["waiting"], row["kv_tokens_used"])
        for name, row in server.instances().items()
    }


def body(number: int, **more: Any) -> dict[str, Any]:
    wanted = {"prompt": f"{number} {TEXT * 2}", "max_tokens": 250, "seed": number, **SEEDED}
    return {**wanted, **more}


class Movers:
    """Threads that move requests to and fro until the block ends; keeps every answer."""

    def __init__(self, server: Server, prefix: str, threads: int = 2, seed: int = 1) -> None:
        self.answers: list[dict[str, Any]] = []
        self._server, self._prefix, self._dice = server, prefix, random.Random(seed)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        real_time()
        while not self._stop.is_set():
            ours = [r for r in self._server.requests() if r["id"].startswith(self._prefix)]
            if ours:
                answer = migrate(self._server, self._dice.choice(ours)["request"])
                self.answers.append({"status": answer.status_code, **answer.json()})
            else:
                time.sleep(0.005)

    def outcomes(self) -> list[str]:
        return [a.get("outcome", str(a["status"])) for a in self.answers]

    def __enter__(self) -> "Movers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_clients_that_hang_up_leave_nothing(pair: Server) -> None:
    dice = random.Random(5)
    seen: list[Recorded] = []

    def client(number: int) -> None:
        for turn in range(7):
            last = dice.randrange(1, 90)
            wanted = body(number, seed=turn, max_tokens=900, prompt=TEXT * dice.randrange(1, 20))
            name = f"gone-{number}-{turn}"
            seen.append(
                stream(pair, COMPLETIONS, wanted, name=name, on_chunk=lambda n, last=last: n < last)
            )

    with Movers(pair, "gone", threads=3) as movers:
        all_at_once([lambda i=i: client(i) for i in range(3)])
    assert len(seen) == 21
    assert [s.broke for s in seen] == [None] * 21
    assert not [s.name for s in seen if any("error" in p for p in s.pieces)]
    assert movers.outcomes().count("migrated") >= 20, movers.outcomes()


def test_requests_that_end_while_they_are_moved(pair: Server) -> None:
    calm = stream(pair, COMPLETIONS, body(1, max_tokens=60))
    outcomes, reasons = [], []
    for ahead in [*range(12)] * 3:
        name = f"ending-{len(outcomes)}"
        due = threading.Event()

        def on_chunk(count: int, due: threading.Event = due, ahead: int = ahead) -> None:
            if count >= 60 - ahead:
                due.set()

        def move(name: str = name, due: threading.Event = due) -> dict[str, Any]:
            due.wait(30)
            answer = migrate(pair, name)
            return {"status": answer.status_code, **answer.json()}

        moved, answer = all_at_once(
            [
                lambda name=name, on_chunk=on_chunk: stream(
                    pair, COMPLETIONS, body(1, max_tokens=60), name=name, on_chunk=on_chunk
                ),
                move,
            ]
        )
        assert first_difference(calm, moved) is None
        outcomes.append(answer.get("outcome", answer["status"]))
        reasons.append(answer.get("reason"))
    assert set(outcomes) <= {"migrated", "aborted", 404}
    assert "migrated" in outcomes
    assert "it ended meanwhile" in reasons, reasons


def test_a_destination_without_room(pair: Server) -> None:
    target = body(3, prompt=TEXT * 30, max_tokens=60)
    calm = stream(pair, COMPLETIONS, target)

    def filler(name: str) -> Recorded:
        return stream(
            pair, COMPLETIONS, body(4, prompt=f"{name} " + TEXT * 62, max_tokens=150), name=name
        )

    def direct() -> tuple[Recorded, list[dict[str, Any]]]:
        eventually(lambda: len(rows(pair, "full-0") + rows(pair, "full-1")) == 2, 10)
        full = rows(pair, "full-0")[0]["instance"]
        if rows(pair, "full-1")[0]["instance"] != full:
            assert migrate(pair, "full-1", destination=full).json()["outcome"] == "migrated"
        answers = []

        def move() -> None:
            eventually(lambda: rows(pair, "homeless"), 10)
            assert rows(pair, "homeless")[0]["instance"] != full
            while rows(pair, "full-0") and rows(pair, "full-1") and rows(pair, "homeless"):
                answer = migrate(pair, "homeless", destination=full)
                if rows(pair, "full-0") and rows(pair, "full-1") and answer.status_code == 200:
                    answers.append(answer.json())

        moved, _ = all_at_once([lambda: stream(pair, COMPLETIONS, target, name="homeless"), move])
        return moved, answers

    *full, (moved, answers) = all_at_once(
        [lambda: filler("full-0"), lambda: filler("full-1"), direct]
    )
    assert [f.error for f in full] == [None, None]
    assert first_difference(calm, moved) is None
    refused = [a for a in answers if a["outcome"] == "aborted" and "no room" in a["reason"]]
    assert refused, answers
    assert "tokens are needed there" in refused[0]["reason"]
    assert "migrated" not in [a["outcome"] for a in answers], answers


@pytest.mark.parametrize("victim", ["destination", "source"])
def test_an_engine_killed_while_requests_are_on_their_way(pair: Server, victim: str) -> None:
    """All go from i0 to i1 at once, and one of the two is killed a moment later."""
    more = [{}, {"logprobs": 1}]
    bodies = [body(i, max_tokens=500, **more[i % 2]) for i in range(STREAMS)]
    calm = [stream(pair, COMPLETIONS, b) for b in bodies]
    dead, alive = {"destination": ("i1", "i0"), "source": ("i0", "i1")}[victim]
    for turn, moment_s in enumerate((0.015, 0.045)):
        names = [f"{victim}-{turn}-{i}" for i in range(STREAMS)]
        streams = [
            lambda b=b, name=name: stream(pair, COMPLETIONS, b, name=name)
            for b, name in zip(bodies, names, strict=True)
        ]

        def direct(
            names: list[str] = names, moment_s: float = moment_s
        ) -> tuple[list[str], list[Any]]:
            eventually(lambda: {r["id"] for r in pair.requests()} == set(names), 10)
            elsewhere = [r["request"] for r in pair.requests() if r["instance"] != "i0"]
            all_at_once([lambda r=r: migrate(pair, r, destination="i0") for r in elsewhere])
            for place in ("i1", "i0"):  # The engines get to know each other, which takes longest.
                migrate(pair, names[0], destination=place)
            pid = pair.instances()[dead]["pid"]

            def kill() -> None:
                time.sleep(moment_s)
                os.kill(pid, signal.SIGKILL)

            *answers, _ = all_at_once(
                [lambda name=name: migrate(pair, name, destination="i1") for name in names] + [kill]
            )
            eventually(lambda: pair.instances()[dead]["state"] != "serving", 5)
            safe = [r["id"] for r in pair.requests() if r["instance"] == alive]
            return safe, [a.json() for a in answers]

        *seen, (safe, answers) = all_at_once([*streams, direct])
        told = [(a.get("outcome"), a.get("reason"), a.get("error")) for a in answers]
        print(victim, turn, told, [s.error and "error" for s in seen])
        assert [s.error for s in seen] == [None] * STREAMS, (answers, safe)
        for one, whole in zip(seen, calm, strict=True):
            assert first_difference(whole, one) is None, one.name
        eventually(
            lambda: held(pair)[alive] == (0, 0, 0), 20, f"nothing is left on {alive}: {held(pair)}"
        )
        eventually(lambda: pair.instances()[dead]["state"] == "serving", BACK_TIMEOUT_S)


def test_a_killed_controller_stops_no_migration(pair: Server) -> None:
    bodies = [body(i, max_tokens=500) for i in range(4)]
    calm = [stream(pair, COMPLETIONS, b) for b in bodies]
    (pid,) = pair.controllers()

    def kill() -> int:
        eventually(lambda: len(movers.answers) >= 4, 20)
        os.kill(pid, signal.SIGKILL)
        return len(movers.answers)

    with Movers(pair, "uncontrolled") as movers:
        *seen, before = all_at_once(
            [
                lambda b=b, i=i: stream(pair, COMPLETIONS, b, name=f"uncontrolled-{i}")
                for i, b in enumerate(bodies)
            ]
            + [kill]
        )
    assert [first_difference(a, b) for a, b in zip(calm, seen, strict=True)] == [None] * 4
    assert movers.outcomes()[before:].count("migrated") >= 4, movers.outcomes()
    eventually(lambda: pair.controllers() not in ([], [pid]), 60, "Ray starts it again")
    eventually(lambda: pair.http.get("/llumnix/v1/instances").json()["controller"] == "up", 60)
