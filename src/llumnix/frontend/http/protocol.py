"""HTTP as uvicorn speaks it, with four differences.

An answer's head travels with the beginning of its body where both are there at once: one packet,
and one wakeup of the client, instead of two. A method that HTTP does not know is answered with 405
as an error in OpenAI's form; uvicorn calls it an invalid request. A client of HTTP/1.0 gets a
stream without chunks, which it does not know; uvicorn sends them. And who has a part of a body and
cannot wait may write it past the application (`BodyWriter`).

uvicorn 0.54 internals relied on here (tests/frontend/test_http_protocol.py fails when one changes):
`HttpToolsProtocol.on_headers_complete` makes `self.cycle`, which writes the head and each part of
the body, with its chunk's size before it, with one `transport.write` each and uses no more of its
transport than `write`, `close` and `is_closing`; what the parser cannot read is answered by
`send_400_response`. A cycle knows of its answer `response_complete`, `chunked_encoding`,
`disconnected` and `flow.write_paused`, and gets its `scope` before the application does. It sends
100 Continue before it reads a body if `waiting_for_100_continue` is set.
"""

import asyncio
import json
import sys

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

WRITE = "llumnix.write"
"""Where an ASGI scope has the `BodyWriter` of its answer. Who takes it is to take it out, for the
two refer to each other."""
METHODS = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"


class HttpProtocol(HttpToolsProtocol):
    """One connection of a client."""

    def on_headers_complete(self) -> None:
        earlier = self.cycle
        super().on_headers_complete()
        if self.cycle is not earlier:
            old = self.cycle.scope["http_version"] == "1.0"
            if old:
                self.cycle.waiting_for_100_continue = False  # It knows no such answer.
            transport = _WithoutChunks if old else _HeadWithBody
            self.cycle.transport = transport(self.transport)  # type: ignore[assignment]
            self.cycle.scope[WRITE] = BodyWriter(self.cycle)  # type: ignore[typeddict-unknown-key]

    def send_400_response(self, msg: str) -> None:
        if not isinstance(sys.exception(), httptools.HttpParserInvalidMethodError):
            super().send_400_response(msg)
            return
        message = f"Unknown HTTP method: use one of {METHODS}."
        kind = "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": 405}
        body = json.dumps({"error": error}).encode()
        head = (
            f"allow: {METHODS}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[405] + head.encode() + body)
        self.transport.close()


class _HeadWithBody:
    """The transport of one answer. Its first write waits for the second, but not beyond the present
    turn of the event loop: a stream's head reaches the client before its first token."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._head: bytes | None = None
        self._begun = False

    def write(self, data: bytes) -> None:
        if self._begun:
            head, self._head = self._head, None
            self._transport.write(head + data if head else data)
        else:
            self._begun, self._head = True, data
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, None
            if not self._transport.is_closing():  # The client may have gone in the same turn.
                self._transport.write(head)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class _WithoutChunks(_HeadWithBody):
    """The transport of one answer to a client of HTTP/1.0. The close of the connection ends it."""

    _chunked = False

    def write(self, data: bytes) -> None:
        if not self._begun:
            head, data = data, data.replace(b"transfer-encoding: chunked\r\n", b"")
            self._chunked = data != head
        elif self._chunked and data:  # An empty part has no size before it.
            size, _, rest = data.partition(b"\r\n")
            data = rest[: int(size, 16)]
        super().write(data)


class BodyWriter:
    """Writes parts of an answer's body past all middlewares, in no more than a call."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def __call__(self, part: bytes) -> bool:
        """Writes a part that is not empty. False if it must take the usual way: because the head
        has not been sent, the answer is over, its length was announced, the client is gone, or it
        reads too slowly."""
        cycle = self._cycle
        if (
            cycle.flow.write_paused
            or cycle.disconnected
            or cycle.response_complete
            or not cycle.chunked_encoding  # None before the head
        ):
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        return True
