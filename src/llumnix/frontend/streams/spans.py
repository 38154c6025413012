"""Spans of what happens to requests, in vLLM's own trace (`--otlp-traces-endpoint`).

The gate begins `llumnix.request` under the client's `traceparent`, and puts its own in that one's
place. So vLLM's `llm_request` becomes its child, and beside it stand `llumnix.dispatch`, `.queue`,
`.move` and `.revival`. Their times are this process's clock. Nothing of this exists while tracing
is off; then OpenTelemetry is not imported either.

vLLM internals relied on here (tests/house/test_vllm_traces_contract.py fails when one changes):
with the flag, `AsyncLLM` makes OpenTelemetry's global tracer provider; `OutputProcessor` calls
`do_tracing(output, state, stats)` when a sequence has ended. `output.trace_headers` are those of
its HTTP request, wherever it has moved; `state.stats.queued_ts` and `scheduled_ts` are monotonic
seconds. Both have `provider.shutdown` called at exit; `span_exporter` is an attribute of each of
`provider._active_span_processor._span_processors`.
"""

import atexit
import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llumnix.frontend.streams.migration_records import Migration

logger = logging.getLogger("llumnix.frontend")

FLUSH_TIMEOUT_S = 2.0
_HEADERS = (b"traceparent", b"tracestate")


class Tracing:
    """Makes the spans of one process, whose OutputProcessor tells of the queues."""

    def __init__(self, processor: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._tracer = trace.get_tracer("llumnix")
        self._propagator = TraceContextTextMapPropagator()
        self._processor = processor
        self._vllm_does = processor.do_tracing
        processor.do_tracing = self._do_tracing
        self._away = False  # whether the collector has not answered at the end

    def request(self, scope: Any, client_id: str | None) -> "RequestSpan":
        """The span of an HTTP request, which begins now. `scope` is ASGI's; what comes after the
        gate finds the span's headers there."""
        theirs = {k.decode(): v.decode("latin-1") for k, v in scope["headers"] if k in _HEADERS}
        about = {"http.request.method": scope["method"], "url.path": scope["path"]}
        if client_id is not None:
            about["llumnix.client_id"] = client_id
        span = self._tracer.start_span(
            "llumnix.request",
            self._propagator.extract(theirs),
            kind=self._trace.SpanKind.SERVER,
            attributes=about,
        )
        context, ours = self._trace.set_span_in_context(span), dict[str, str]()
        self._propagator.inject(ours, context)
        others = [(k, v) for k, v in scope["headers"] if k not in _HEADERS]
        scope["headers"] = [*others, *((k.encode(), v.encode()) for k, v in ours.items())]
        return RequestSpan(self, span, context)

    def span(
        self, name: str, context: Any, began_s: float, ended_s: float, about: Mapping[str, Any]
    ) -> None:
        """One span below that of a request. Times are monotonic; what is None is left out."""
        now_ns, now_s = time.time_ns(), time.monotonic()
        began_ns, ended_ns = (now_ns - round((now_s - at) * 1e9) for at in (began_s, ended_s))
        known = {f"llumnix.{k}": v for k, v in about.items() if v is not None}
        self._tracer.start_span(
            f"llumnix.{name}", context, start_time=began_ns, attributes=known
        ).end(ended_ns)

    def _do_tracing(self, output: Any, state: Any, stats: Any) -> None:
        self._vllm_does(output, state, stats)
        times = state.stats
        if output.trace_headers and times.queued_ts and times.scheduled_ts:
            context = self._propagator.extract(dict(output.trace_headers))
            about = {"request": output.request_id}
            self.span("queue", context, times.queued_ts, times.scheduled_ts, about)

    def close(self) -> None:
        """Sends what has not been sent yet, within `FLUSH_TIMEOUT_S`. OpenTelemetry knows no limit:
        with the collector away it tries for half a minute, and once more as the process exits."""
        provider = self._trace.get_tracer_provider()
        if not hasattr(provider, "force_flush") or self._away:
            return
        flushing = threading.Thread(target=provider.force_flush, name="spans", daemon=True)
        flushing.start()
        flushing.join(FLUSH_TIMEOUT_S)
        atexit.unregister(provider.shutdown)
        if flushing.is_alive():
            self._away = True
            logger.warning("The last spans are lost: no trace collector takes them.")
            for exporter in exporters(provider):
                exporter.shutdown()  # Else gRPC would wait for the collector as the process exits.


def exporters(provider: Any) -> list[Any]:
    """What sends a provider's spans."""
    return [each.span_exporter for each in provider._active_span_processor._span_processors]


class RequestSpan:
    """The span of one HTTP request, and what happens to its sequences."""

    def __init__(self, tracing: Tracing, span: Any, context: Any) -> None:
        self._tracing = tracing
        self._span = span
        self._context = context

    def answered(self, status: int) -> None:
        """The head of the answer is sent."""
        self._span.set_attribute("http.response.status_code", status)

    def end(self) -> None:
        """The answer has ended."""
        self._span.end()

    def placed(self, asked_s: float, **about: Any) -> None:
        """A sequence has been placed, which was asked for then."""
        self._tracing.span("dispatch", self._context, asked_s, time.monotonic(), about)

    def moved(self, migration: "Migration") -> None:
        """A migration of a sequence has ended, by whichever outcome."""
        stages = [] if migration.report is None else migration.report.stages
        about = {
            "request": migration.request,
            "migration": migration.id,
            "from": migration.source,
            "to": migration.destination,
            "code": migration.code,
            "why": migration.why,
            "copy": migration.copy,
            "outcome": migration.outcome,
            "reason": migration.reason or None,
            "stages": len(stages),
            "bytes": sum(s.bytes for s in stages),
            "downtime_ms": None if migration.report is None else migration.report.downtime_ms,
        }
        self._tracing.span("move", self._context, migration.began_s, time.monotonic(), about)

    def revived(self, since_s: float, how: str, revival: Mapping[str, Any]) -> None:
        """A sequence whose engine died then has its first token from another."""
        about = {"how": how, **{k: revival[k] for k in ("request", "instance", "tokens", "why")}}
        self._tracing.span("revival", self._context, since_s, time.monotonic(), about)
