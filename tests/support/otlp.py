"""An OTLP collector over HTTP that keeps the spans it is sent."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class Span(NamedTuple):
    """One span, with hexadecimal ids. `parent` is empty for the first of a trace."""

    name: str
    trace: str
    id: str
    parent: str
    began_ns: int
    ended_ns: int
    attributes: dict[str, Any]


class Collector:
    """Listens on loopback until it is closed. All spans so far are in `spans`."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = ExportTraceServiceRequest()
                sent.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
                collector.spans += _spans(sent)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def of_trace(self, trace: str) -> list[Span]:
        """The spans of one trace, in the order in which they began."""
        return sorted((s for s in self.spans if s.trace == trace), key=lambda s: s.began_ns)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _spans(sent: Any) -> list[Span]:
    return [
        Span(
            name=s.name,
            trace=s.trace_id.hex(),
            id=s.span_id.hex(),
            parent=s.parent_span_id.hex(),
            began_ns=s.start_time_unix_nano,
            ended_ns=s.end_time_unix_nano,
            attributes={a.key: getattr(a.value, a.value.WhichOneof("value")) for a in s.attributes},
        )
        for resource in sent.resource_spans
        for scope in resource.scope_spans
        for s in scope.spans
    ]
