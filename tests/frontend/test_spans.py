"""Spans of requests, as a collector gets them."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llumnix.core.codes import MoveCode
from llumnix.core.messages import Migrate, MigrationEnded, StageDone
from llumnix.core.streams.effects import GrantEnded, Outcome
from llumnix.core.types import EngineIndex, Epoch, InstanceId, MigrationId, RequestId
from llumnix.frontend.streams.migration_records import MigrationRecords
from llumnix.frontend.streams.spans import FLUSH_TIMEOUT_S, Tracing
from llumnix.observe.event_log import EventLog

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class World:
    """Tracing, and what it has sent."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self.vllm_saw: list[Any] = []
        self.processor = SimpleNamespace(do_tracing=lambda *what: self.vllm_saw.append(what))
        self.exporter = exporter
        self.tracing = Tracing(self.processor)

    def request(self, *headers: tuple[bytes, bytes]) -> tuple[Any, dict[str, str]]:
        scope = {"method": "POST", "path": "/v1/completions", "headers": list(headers)}
        span = self.tracing.request(scope, "theirs")
        return span, {k.decode(): v.decode() for k, v in scope["headers"]}  # type: ignore[attr-defined]

    def sent(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield World(exporter)
    provider.shutdown()


def traceparent(flags: str = "01") -> tuple[bytes, bytes]:
    return b"traceparent", f"00-{TRACE}-{PARENT}-{flags}".encode()


def test_a_requests_span_stands_between_its_clients_and_vllms(world: World) -> None:
    span, headers = world.request((b"host", b"here"), traceparent(), (b"tracestate", b"a=b"))
    span.answered(200)
    span.end()
    (sent,) = world.sent().values()
    assert sent.name == "llumnix.request"
    assert sent.parent is not None
    assert f"{sent.parent.span_id:016x}" == PARENT
    assert f"{sent.context.trace_id:032x}" == TRACE
    assert sent.attributes == {
        "http.request.method": "POST", "url.path": "/v1/completions",
        "llumnix.client_id": "theirs", "http.response.status_code": 200,
    }  # fmt: skip
    mine = f"{sent.context.span_id:016x}"
    assert headers == {
        "host": "here", "traceparent": f"00-{TRACE}-{mine}-01", "tracestate": "a=b",
    }  # fmt: skip


def test_a_request_without_a_trace_begins_one(world: World) -> None:
    span, headers = world.request()
    span.end()
    (sent,) = world.sent().values()
    assert sent.parent is None
    assert headers["traceparent"].split("-")[1] == f"{sent.context.trace_id:032x}"


def test_what_its_client_does_not_want_traced_is_not(world: World) -> None:
    span, headers = world.request(traceparent("00"))
    span.placed(time.monotonic(), instance="i0")
    span.end()
    assert headers["traceparent"].endswith("-00")
    assert world.sent() == {}


def test_dispatch_and_revival_are_below_it_with_their_times(world: World) -> None:
    span, _ = world.request(traceparent())
    began = time.time_ns()
    span.placed(time.monotonic() - 0.5, request="r", instance="i1", code="freest", why=None)
    revival = {"request": "r", "instance": "i0", "tokens": 7, "why": "it died", "gap_s": 2.0}
    span.revived(time.monotonic() - 2.0, "revived", revival)
    span.end()
    sent = world.sent()
    for name, lasted_s in (("dispatch", 0.5), ("revival", 2.0)):
        one = sent[f"llumnix.{name}"]
        assert one.parent == sent["llumnix.request"].context
        assert one.start_time is not None
        assert one.end_time is not None
        assert abs(one.end_time - began) < 1e9
        assert abs(one.end_time - one.start_time - lasted_s * 1e9) < 50e6
    assert sent["llumnix.dispatch"].attributes == {
        "llumnix.request": "r", "llumnix.instance": "i1", "llumnix.code": "freest",
    }  # fmt: skip
    assert sent["llumnix.revival"].attributes == {
        "llumnix.request": "r", "llumnix.instance": "i0", "llumnix.tokens": 7,
        "llumnix.why": "it died", "llumnix.how": "revived",
    }  # fmt: skip


def test_a_queue_is_told_by_vllm_and_stands_below_the_request(world: World) -> None:
    span, headers = world.request()
    now = time.monotonic()
    output = SimpleNamespace(request_id="r-1", trace_headers=headers)
    times = SimpleNamespace(stats=SimpleNamespace(queued_ts=now - 1.0, scheduled_ts=now - 0.75))
    world.processor.do_tracing(output, times, "stats")
    assert world.vllm_saw == [(output, times, "stats")], "vLLM's own comes first"
    never_ran = SimpleNamespace(stats=SimpleNamespace(queued_ts=now, scheduled_ts=0.0))
    world.processor.do_tracing(output, never_ran, "stats")
    world.processor.do_tracing(SimpleNamespace(trace_headers=None), times, "stats")
    span.end()
    queue, request = world.exporter.get_finished_spans()
    assert queue.parent is not None
    assert queue.parent.span_id == request.context.span_id
    assert queue.attributes == {"llumnix.request": "r-1"}
    assert queue.start_time is not None
    assert queue.end_time is not None
    assert abs(queue.end_time - queue.start_time - 0.25e9) < 1e6


def moved(world: World, outcome: Outcome) -> ReadableSpan:
    records = MigrationRecords(EventLog(None, who="test"))
    span, _ = world.request()
    order = Migrate(
        migration=MigrationId("m0"), request=RequestId("r"), epoch=Epoch(1),
        destination=EngineIndex(1), address="x",
    )  # fmt: skip
    records.began(
        order, request_id="theirs", source=InstanceId("i0"), source_engine=EngineIndex(0),
        destination=InstanceId("i1"), why="it has room", code=MoveCode.BALANCE, span=span,
    )  # fmt: skip
    span.end()  # The answer may end before the source has spoken.
    if outcome == "migrated":
        stages = [StageDone(tokens=32, bytes=1000, ms=1.0), StageDone(tokens=5, bytes=50, ms=0.2)]
        records.source_ended(
            MigrationEnded(
                migration=MigrationId("m0"), request=RequestId("r"), taken=True, why="",
                stages=stages, downtime_ms=2.5,
            )
        )  # fmt: skip
    records.grant_ended(GrantEnded(migration=MigrationId("m0"), outcome=outcome, why="no room"))
    return world.sent()["llumnix.move"]


def test_a_move_tells_what_was_moved_and_why(world: World) -> None:
    move = moved(world, "migrated")
    assert move.parent == world.sent()["llumnix.request"].context
    found = dict(move.attributes or {})
    assert found == {
        "llumnix.request": "r", "llumnix.migration": "m0", "llumnix.from": "i0",
        "llumnix.to": "i1", "llumnix.code": "balance", "llumnix.why": "it has room",
        "llumnix.copy": "staged", "llumnix.outcome": "migrated", "llumnix.reason": "no room",
        "llumnix.stages": 2, "llumnix.bytes": 1050, "llumnix.downtime_ms": 2.5,
    }  # fmt: skip


def test_a_move_that_was_called_off_is_told_too(world: World) -> None:
    found = dict(moved(world, "aborted").attributes or {})
    assert (found["llumnix.outcome"], found["llumnix.reason"]) == ("aborted", "no room")
    assert "llumnix.downtime_ms" not in found


AWAY = """
import sys, time
from types import SimpleNamespace
from opentelemetry import trace
from vllm.tracing.otel import init_otel_tracer
from llumnix.frontend.streams.spans import Tracing
init_otel_tracer("vllm", sys.argv[1])
tracing = Tracing(SimpleNamespace(do_tracing=None))
trace.get_tracer("x").start_span("one").end()
began_s = time.monotonic()
tracing.close()
tracing.close()
print(time.monotonic() - began_s, flush=True)
"""


def test_a_stop_does_not_wait_for_a_collector_that_is_away() -> None:
    """At this port somebody listens and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = [sys.executable, "-c", AWAY, address]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
            try:
                assert run.stdout is not None
                closed_s, ended_s = float(run.stdout.readline()), time.monotonic()
                run.wait(60)
            finally:
                run.kill()
    assert run.returncode == 0
    assert closed_s < FLUSH_TIMEOUT_S + 1
    assert time.monotonic() - ended_s < 15  # Python takes some seconds to end vLLM.
