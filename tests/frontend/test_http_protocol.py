"""Answers as they leave on the wire: how many packets, and what unknown methods and old clients
get."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.responses import StreamingResponse

pytest.importorskip("vllm")

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from llumnix.frontend.context import current_http_request
from llumnix.frontend.direct import DirectOutputs
from llumnix.frontend.http.access import Access
from llumnix.frontend.http.gate import Gate
from llumnix.frontend.http.protocol import WRITE, BodyWriter, HttpProtocol

Answer = Callable[[Any], Awaitable[None]]
OK = {"type": "http.response.start", "status": 200}


class Wire(asyncio.Transport):
    """Notes each write; a TCP connection of a client otherwise."""

    protocol: HttpProtocol

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.packets: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed, "a write after the close is lost"
        self.packets.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def ask(answer: Answer, *requests: bytes, writes: Any = None) -> Wire:
    """`writes(writer, send)` answers in the place of `answer`, if given."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (writes(scope.pop(WRITE), send) if writes is not None else answer(send))

    wire, server = connected(app)
    for request in requests:
        wire.protocol.data_received(request)
    await until_answered(server)
    wire.protocol.connection_lost(ConnectionResetError())
    return wire


def connected(app: Any) -> tuple[Wire, uvicorn.Server]:
    """A client's connection to an application, and the server of both."""
    config = uvicorn.Config(app, http=HttpProtocol, log_config=None, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    config.load()
    wire = Wire()
    wire.protocol = HttpProtocol(config, server.server_state, {})
    wire.protocol.connection_made(wire)
    return wire, server


async def until_answered(server: uvicorn.Server) -> None:
    while server.server_state.tasks:
        await asyncio.sleep(0)
    await asyncio.sleep(0)


def request(method: str = "GET", version: str = "1.1") -> bytes:
    return f"{method} / HTTP/{version}\r\nhost: x\r\n\r\n".encode()


async def whole(send: Any) -> None:
    await send({**OK, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


async def in_parts(send: Any) -> None:
    await send(OK)
    for part in (b"one", b"two"):
        await asyncio.sleep(0.001)
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body"})


async def headless(send: Any) -> None:
    await send({"type": "http.response.start", "status": 204})
    await send({"type": "http.response.body"})


async def test_head_and_body_of_a_whole_answer_are_one_packet() -> None:
    wire = await ask(whole, request())
    (packet,) = wire.packets
    assert packet.startswith(b"HTTP/1.1 200 OK\r\n")
    assert packet.endswith(b"\r\n\r\nhi")
    assert not wire.closed


async def test_the_head_of_a_stream_does_not_wait_for_its_first_part() -> None:
    head, *parts = (await ask(in_parts, request())).packets
    assert head.endswith(b"\r\n\r\n")
    assert parts == [b"3\r\none\r\n", b"3\r\ntwo\r\n", b"0\r\n\r\n"]


@pytest.mark.parametrize("answer", [whole, in_parts, headless])
async def test_nothing_is_lost_where_the_connection_is_closed_at_once(answer: Answer) -> None:
    to_head = await ask(answer, request("HEAD", version="1.0"))
    assert to_head.closed
    assert b"".join(to_head.packets).endswith(b"\r\n\r\n")
    wire = await ask(answer, request(version="1.0"))
    assert wire.closed
    assert b"".join(wire.packets).startswith(b"HTTP/1.1 20")
    ends = {whole: b"\r\n\r\nhi", in_parts: b"\r\n\r\nonetwo", headless: b"\r\n\r\n"}
    assert b"".join(wire.packets).endswith(ends[answer])


@pytest.mark.parametrize("answer", [whole, headless])
async def test_answers_to_pipelined_requests_keep_their_order(answer: Answer) -> None:
    wire = await ask(answer, request() + request("HEAD") + request())
    assert b"".join(wire.packets).count(b"HTTP/1.1 20") == 3
    if answer is whole:
        assert [packet.endswith(b"hi") for packet in wire.packets] == [True, False, True]


async def test_a_client_that_goes_before_the_head_leaves_is_no_error() -> None:
    wrong: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: wrong.append(what))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(OK)
        wire.close()
        wire.protocol.connection_lost(None)

    wire, server = connected(app)
    wire.protocol.data_received(request())
    await until_answered(server)
    assert (wire.packets, wrong) == ([], [])


async def test_an_unknown_method_is_405_and_rubbish_is_400() -> None:
    (packet,) = (await ask(whole, request("BREW"))).packets
    head, body = packet.split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 405 Method Not Allowed")
    assert b"allow: DELETE, GET" in head
    assert json.loads(body)["error"]["code"] == 405
    wire = await ask(whole, b"GET / HTTP/1.1\r\nno header\r\n\r\n")
    assert wire.closed
    assert wire.packets[0].startswith(b"HTTP/1.1 400")


async def test_parts_that_are_written_directly_are_framed_as_uvicorn_frames_them() -> None:
    said: list[bool] = []

    async def writes(write: BodyWriter, send: Any) -> None:
        said.append(write(b"early"))
        await send(OK)
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        said.append(write(b"two" * 9))
        await send({"type": "http.response.body", "body": b"three", "more_body": True})
        await send({"type": "http.response.body"})
        said.append(write(b"late"))

    wire = await ask(whole, request(), writes=writes)
    body = b"".join(wire.packets).partition(b"\r\n\r\n")[2]
    assert body == b"3\r\none\r\n1b\r\n" + b"two" * 9 + b"\r\n5\r\nthree\r\n0\r\n\r\n"
    assert said == [False, True, False]


async def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    """It would take their sizes for text. nginx and ab speak HTTP/1.0 by default."""
    part = b"a part of sixteen\r\n" * 2

    async def writes(write: BodyWriter, send: Any) -> None:
        await send(OK)
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        assert write(part)
        await send({"type": "http.response.body", "body": b"end"})

    wire = await ask(whole, request(version="1.0"), writes=writes)
    head, _, body = b"".join(wire.packets).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body == b"one" + part + b"end"
    assert wire.closed, "nothing else says where it ends"


async def test_an_empty_part_does_not_end_a_stream_of_http_1_0() -> None:
    async def answer(send: Any) -> None:
        await send(OK)
        for part in (b"one", b"", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    wire = await ask(answer, request(version="1.0"))
    assert b"".join(wire.packets).endswith(b"\r\n\r\nonetwo")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_of_http_1_0_is_not_told_to_go_on(version: str) -> None:
    """It would take that for the answer's head, and what follows for its body."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await in_parts(send)

    wire, server = connected(app)
    expects = b"\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
    wire.protocol.data_received(request("POST", version).rstrip() + expects)
    await asyncio.sleep(0.01)
    assert wire.packets == ([] if version == "1.0" else [b"HTTP/1.1 100 Continue\r\n\r\n"])
    wire.protocol.data_received(b"hi")
    await until_answered(server)
    if version == "1.0":
        assert b"".join(wire.packets).endswith(b"\r\n\r\nonetwo")


async def test_a_body_whose_length_was_announced_is_not_written_directly() -> None:
    said: list[bool] = []

    async def writes(write: BodyWriter, send: Any) -> None:
        await send({**OK, "headers": [(b"content-length", b"2")]})
        said.append(write(b"hi"))
        await send({"type": "http.response.body", "body": b"hi"})

    await ask(whole, request(), writes=writes)
    assert said == [False]


@pytest.mark.parametrize("what", ["slow", "gone"])
async def test_nothing_is_written_directly_to_a_client_that_is_slow_or_gone(what: str) -> None:
    said: list[bool] = []

    async def writes(write: BodyWriter, send: Any) -> None:
        await send(OK)
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        said.append(write(b"two"))
        if what == "slow":
            write._cycle.flow.pause_writing()
        else:
            write._cycle.disconnected = True
        said.append(write(b"three"))
        write._cycle.flow.resume_writing()
        await send({"type": "http.response.body"})

    wire = await ask(whole, request(), writes=writes)
    assert said == [True, False]
    assert b"three" not in b"".join(wire.packets)


# -- a stream through the gate, whose tokens take the direct way


class Serving:
    """As vLLM's, of which only the chunks matter."""

    async def completion_stream_generator(self, request: Any, outputs: Any) -> AsyncIterator[str]:
        async for output in outputs:
            one = output.outputs[0]
            choice = {"index": 0, "text": one.text, "finish_reason": one.finish_reason}
            chunk = json.dumps({"id": "x", "choices": [choice]}, separators=(",", ":"))
            yield f"data: {chunk}\n\n"


def output(text: str, reason: str | None = None) -> RequestOutput:
    one = CompletionOutput(
        index=0, text=text, token_ids=[1], cumulative_logprob=None, logprobs=None,
        finish_reason=reason,
    )  # fmt: skip
    return RequestOutput("r", None, [], None, [one], finished=reason is not None)


def application(outputs: DirectOutputs, passed: list[str]) -> FastAPI:
    """`passed`: what comes through the application."""
    app = FastAPI()
    app.add_middleware(Gate)
    app.state.args = SimpleNamespace(
        access=Access(
            client_digests=frozenset(), admin_digests=frozenset(), clients_administer=True,
            hosts=None, origins=(),
        ),
        max_body_mb=1, sse_keep_alive_interval=0, on_state=lambda state: None,
    )  # fmt: skip
    core = SimpleNamespace(ensure_served=lambda: None)
    app.state.engine_client = SimpleNamespace(
        stopping=False, open_http=0, tracing=None, engine_core=core
    )
    app.state.openai_serving_completion = serving = Serving()

    async def generated() -> AsyncIterator[Any]:
        finished = False
        try:
            while not finished:
                got: Any = await outputs.get()
                finished = got.finished
                passed.append(got.outputs[0].text)
                yield got
        except asyncio.CancelledError:
            passed.append("aborted")
            raise

    @app.post("/v1/completions")
    async def completions() -> StreamingResponse:
        http = current_http_request.get()
        assert http is not None
        http.outputs.append(outputs)
        request: Any = SimpleNamespace(echo=False, n=1)
        events = serving.completion_stream_generator(request, generated())
        return StreamingResponse(events, media_type="text/event-stream")

    return app


async def asked(passed: list[str]) -> tuple[DirectOutputs, Wire, uvicorn.Server]:
    """The outputs of a request that a client has sent, and its connection."""
    outputs = DirectOutputs.of(RequestOutputCollector(RequestOutputKind.DELTA, "r"))
    app = application(outputs, passed)
    states = iter(["startup", "shutdown"])

    async def receive() -> Any:
        return {"type": f"lifespan.{next(states)}"}

    async def send(message: Any) -> None:
        assert "failed" not in message["type"]

    await app({"type": "lifespan", "app": app}, receive, send)
    wire, server = connected(app)
    wire.protocol.data_received(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
    await settle()
    return outputs, wire, server


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


async def test_tokens_of_a_stream_reach_the_wire_without_passing_the_application() -> None:
    passed: list[str] = []
    outputs, wire, server = await asked(passed)
    for one in (output("a"), output("b"), output("c"), output("d", "stop")):
        outputs.put(one)
        await settle()
    await until_answered(server)
    assert passed == ["a", "d"]
    body = b"".join(wire.packets).partition(b"\r\n\r\n")[2]
    said = re.findall(rb'"text":"(.)"', body)
    assert said == [b"a", b"b", b"c", b"d"]
    assert body.endswith(b"0\r\n\r\n")


async def test_a_client_that_hangs_up_while_tokens_go_directly_ends_its_request() -> None:
    passed: list[str] = []
    outputs, wire, server = await asked(passed)
    for one in (output("a"), output("b")):
        outputs.put(one)
        await settle()
    assert b'"text":"b"' in wire.packets[-1]
    sent = len(wire.packets)
    wire.protocol.connection_lost(ConnectionResetError())
    outputs.put(output("c"))
    await until_answered(server)
    assert passed[-1] == "aborted"
    assert len(wire.packets) == sent
