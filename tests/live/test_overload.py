"""More requests than one instance takes under --queue-max: those that are let in get all of their
tokens, and the others are told when to come again."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.server import Server, eventually, real_time
from support.streaming import Recorded, all_at_once, first_difference, stream

from .conftest import FLAGS

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]

SLOTS, QUEUE_MAX = 2, 2
FLOOD = 40
COMPLETIONS = "/v1/completions"
LONG = {"prompt": "x", "max_tokens": 1000, "temperature": 0, "ignore_eos": True}
SHORT = {**LONG, "max_tokens": 120}
RETRY_AFTER_S = range(1, 73)  # From 1 to 60 s, a fifth more or less.


@pytest.fixture(scope="module")
def server(tiny_model: Path, logs: Path) -> Iterator[Server]:
    started = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS, "--instances", "1",
        "--max-num-seqs", str(SLOTS), "--queue-max", str(QUEUE_MAX), log=logs / "overload.log",
    )  # fmt: skip
    yield started.wait_until_serving()
    assert started.stop() == 0
    print(started.log[-3000:])
    assert "Traceback" not in started.log


def queue(server: Server) -> tuple[int, int]:
    """How many requests run, and how many wait."""
    (row,) = server.instances().values()
    return row["running"], row["waiting"]


def refusals(server: Server) -> float:
    """What the metric has counted."""
    wanted = 'llumnix_gate_refusals_total{code="overloaded"} '
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted))


def told_to_come_again(answer: httpx.Response) -> bool:
    """As docs/answers.md says it."""
    assert answer.status_code == 429, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["retryable"]) == ("overloaded", True)
    assert answer.headers["x-llumnix-reason"] == "overloaded"
    assert int(answer.headers["retry-after"]) in RETRY_AFTER_S
    return True


def test_two_run_two_wait_and_the_fifth_is_told_to_come_again(server: Server) -> None:
    calm = stream(server, COMPLETIONS, LONG)
    before = refusals(server)
    with ThreadPoolExecutor(SLOTS + QUEUE_MAX) as pool:
        streams: list[Future[Recorded]] = [
            pool.submit(stream, server, COMPLETIONS, LONG) for _ in range(SLOTS + QUEUE_MAX)
        ]
        eventually(lambda: queue(server) == (SLOTS, QUEUE_MAX), 30, "two run, two wait")
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
        for path, body in (
            (COMPLETIONS, SHORT), (COMPLETIONS, {**SHORT, "stream": True}),
            ("/v1/chat/completions", chat), ("/v1/chat/completions", {**chat, "stream": True}),
        ):  # fmt: skip
            assert told_to_come_again(server.http.post(path, json={"model": "tiny", **body}))
        # The head of these has left before the request is placed.
        body = {"model": "tiny", "input": "x", "stream": True}
        answer = server.http.post("/v1/responses", json=body)
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        assert answer.status_code == 200
        last = json.loads(events[-1])
        assert (last["type"], last["code"]) == ("error", "overloaded")
        assert queue(server) == (SLOTS, QUEUE_MAX), "none has ended in the meantime"
        assert server.http.get("/ready").status_code == 200
        seen = [one.result() for one in streams]
    assert [first_difference(calm, one) for one in seen] == [None] * len(seen)
    assert refusals(server) - before == 5
    eventually(lambda: queue(server) == (0, 0), 20, "none is left")
    assert server.complete(model="tiny").status_code == 200


def test_of_a_flood_those_that_are_let_in_end_right_and_all_others_are_told(
    server: Server,
) -> None:
    eventually(lambda: queue(server) == (0, 0), 120, "none is left of the test before")
    calm = stream(server, COMPLETIONS, SHORT)
    before = refusals(server)

    def ask(number: int) -> httpx.Response:
        body: dict[str, Any] = {**SHORT, "model": "tiny", "stream": True}
        body["stream_options"] = {"include_usage": True}
        real_time()
        return httpx.post(server.url + COMPLETIONS, json=body, timeout=120)

    answers = all_at_once([lambda n=n: ask(n) for n in range(FLOOD)])
    taken = [one for one in answers if one.status_code == 200]
    print(f"{len(taken)} of {FLOOD} were let in")
    turned_away = [one for one in answers if one.status_code != 200]
    assert all(map(told_to_come_again, turned_away))
    for one in taken:
        seen = Recorded(name="taken", status=200, lines=one.text.splitlines())
        assert seen.error is None
        assert first_difference(calm, seen) is None
    assert refusals(server) - before == len(turned_away)
    # All come within a second, in which few of those end that are let in.
    assert SLOTS + QUEUE_MAX <= len(taken) < FLOOD / 2
    assert server.complete(model="tiny").status_code == 200
