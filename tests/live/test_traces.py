"""A request is one trace, from its client's span down to vLLM's, wherever it moves."""

import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.otlp import Collector, Span
from support.server import Server, eventually
from support.streaming import migrate

from .conftest import FLAGS

pytestmark = [pytest.mark.live, pytest.mark.slow]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    it = Collector()
    yield it
    it.close()


@pytest.fixture(scope="module")
def server(tiny_model: Path, logs: Path, collector: Collector) -> Iterator[Server]:
    """Two instances, and spans are sent soon."""
    started = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS, "--policy", "least-loaded",
        "--otlp-traces-endpoint", collector.endpoint, "--log-dir", str(logs / "kept"),
        log=logs / "traces.log",
        OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="http/protobuf", OTEL_BSP_SCHEDULE_DELAY="200",
    )  # fmt: skip
    yield started.wait_until_serving()
    assert started.stop() == 0
    print(started.log[-3000:])


def streamed(
    server: Server,
    name: str,
    traceparent: str | None,
    at_chunk: Callable[[str], None] = lambda instance: None,
) -> str:
    """Streams one request; at its 15th chunk `at_chunk(instance)` is called. Returns where it was
    sent first."""
    body = {
        "model": "tiny", "prompt": "a long story", "max_tokens": 200, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    headers = {"X-Request-Id": name} | ({"traceparent": traceparent} if traceparent else {})
    chunks = 0
    with httpx.stream(
        "POST", server.url + "/v1/completions", json=body, headers=headers, timeout=120
    ) as answer:
        assert answer.status_code == 200
        instance = answer.headers["x-llumnix-instance"]
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                assert "error" not in json.loads(line[6:])
                chunks += 1
                if chunks == 15:
                    at_chunk(instance)
    return str(instance)


def complete(collector: Collector, trace: str, *names: str) -> dict[str, Span]:
    """The spans of a trace by name, once these and no others are there."""

    def all_there() -> bool:
        return {s.name for s in collector.of_trace(trace)} >= set(names)

    eventually(all_there, 20, f"{names} of {trace}: {collector.spans[-20:]}")
    found = collector.of_trace(trace)
    assert sorted(s.name for s in found) == sorted(names)
    return {s.name: s for s in found}


def test_a_moved_request_is_one_trace(server: Server, collector: Collector) -> None:
    trace, parent = secrets.token_hex(16), secrets.token_hex(8)
    moves: list[dict[str, Any]] = []
    began_ns = time.time_ns()

    def move(instance: str) -> None:
        other = "i1" if instance == "i0" else "i0"
        moves.append(migrate(server, "moved", destination=other).json())

    first = streamed(server, "moved", f"00-{trace}-{parent}-01", move)
    (moved,) = moves
    assert moved["outcome"] == "migrated", moved
    names = ("llumnix.request", "llm_request", "llumnix.dispatch", "llumnix.queue", "llumnix.move")
    spans = complete(collector, trace, *names)
    request = spans.pop("llumnix.request")
    assert request.parent == parent
    assert {s.parent for s in spans.values()} == {request.id}
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["llumnix.client_id"] == "moved"
    row = {"llumnix.instance": first, "llumnix.code": "least_loaded", "llumnix.via": "controller"}
    assert row.items() <= spans["llumnix.dispatch"].attributes.items()
    assert spans["llm_request"].attributes["gen_ai.usage.completion_tokens"] == 200
    assert {
        "llumnix.from": moved["source"],
        "llumnix.to": moved["destination"],
        "llumnix.migration": moved["id"],
        "llumnix.code": "user",
        "llumnix.outcome": "migrated",
        "llumnix.stages": len(moved["stages"]),
        "llumnix.bytes": sum(s["bytes"] for s in moved["stages"]),
        "llumnix.downtime_ms": moved["downtime_ms"],
    }.items() <= spans["llumnix.move"].attributes.items()
    # They lie within the request's, in order.
    assert began_ns <= request.began_ns
    order = [spans[f"llumnix.{n}"].began_ns for n in ("dispatch", "queue", "move")]
    assert order == sorted(order)
    assert all(s.ended_ns <= request.ended_ns + 5e6 for s in spans.values())
    assert request.ended_ns <= time.time_ns()


def test_a_request_without_a_trace_begins_one(server: Server, collector: Collector) -> None:
    streamed(server, "alone", None)

    def sent() -> list[Span]:
        return [s for s in collector.spans if s.attributes.get("llumnix.client_id") == "alone"]

    (request,) = eventually(sent, 20, "its span")
    assert request.parent == ""
    names = ("llumnix.request", "llm_request", "llumnix.dispatch", "llumnix.queue")
    complete(collector, request.trace, *names)


def test_what_is_not_to_be_traced_is_not(server: Server, collector: Collector) -> None:
    trace = secrets.token_hex(16)
    streamed(server, "unsampled", f"00-{trace}-{secrets.token_hex(8)}-00")
    time.sleep(1.0)
    assert collector.of_trace(trace) == []


def test_a_revived_request_is_one_trace(server: Server, collector: Collector) -> None:
    trace, parent = secrets.token_hex(16), secrets.token_hex(8)

    def kill(instance: str) -> None:
        os.kill(server.instances()[instance]["pid"], signal.SIGKILL)

    first = streamed(server, "revived", f"00-{trace}-{parent}-01", kill)

    def all_there() -> bool:
        names = [s.name for s in collector.of_trace(trace)]
        some = {"llumnix.request", "llumnix.revival", "llm_request"} <= set(names)
        return some and names.count("llumnix.dispatch") == 2

    eventually(all_there, 20, f"its spans: {collector.spans[-20:]}")
    spans = collector.of_trace(trace)
    (request,) = [s for s in spans if s.name == "llumnix.request"]
    assert {s.parent for s in spans if s is not request} == {request.id}
    (revival,) = [s for s in spans if s.name == "llumnix.revival"]
    assert revival.attributes["llumnix.how"] == "revived"
    assert revival.attributes["llumnix.instance"] != first
    dispatches = [s for s in spans if s.name == "llumnix.dispatch"]
    assert [s.attributes["llumnix.code"] for s in dispatches] == ["least_loaded", "revived"]
    eventually(lambda: server.instances()[first]["state"] == "serving", 60, "it is back")


def test_the_logs_of_all_runs_are_kept_and_the_death_shows_their_end(
    server: Server, logs: Path
) -> None:
    """The one before has killed an engine."""
    names = [path.name.partition("-")[0] for path in (logs / "kept").glob("*.log")]
    assert sorted(set(names)) == ["controller", "i0", "i1"]
    assert len(names) == 4, "two runs of the instance that was killed"
    (died,) = [n for n in ("i0", "i1") if names.count(n) == 2]
    first = min((logs / "kept").glob(f"{died}-*.log"))
    kept = first.read_text().splitlines()
    _, _, told = server.log.partition(f"Instance {died} died (")
    # Its children may have said more since.
    assert any(f"    | {line[:400]}" in told.splitlines() for line in kept[-20:])
