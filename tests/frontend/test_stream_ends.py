"""Streams of /v1/responses and /v1/messages end with an event that says what happened."""

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
from vllm.entrypoints.openai.responses.api_router import _convert_stream_to_sse_events
from vllm.entrypoints.openai.responses.protocol import StreamingResponsesResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GracefulHTTPError

from llumnix.frontend.http.stream_ends import ERROR_ITEM, adapt
from llumnix.frontend.llm import RequestLostError
from llumnix.vllm_seam import ENDS_MESSAGES_ITSELF
from support.versions import by_version

LOST = "The instance that ran this request died. Please send the request again."


def served() -> None:
    pass


class Responses:
    """As vLLM's, of which only the end matters: it fails in making an event of the error."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    async def create_responses(self) -> AsyncGenerator[Any, None]:
        return self.responses_stream_generator()

    async def responses_stream_generator(self) -> AsyncGenerator[Any, None]:
        for number in range(2):
            yield SimpleNamespace(
                type="delta", model_dump_json=lambda n=number, **_: f'{{"n": {n}}}'
            )
        try:
            if self._error is not None:
                raise self._error
        except RequestLostError as error:
            body = self._convert_generation_error_to_streaming_response(error)
            TypeAdapter(StreamingResponsesResponse).validate_json(body)

    def _convert_generation_error_to_streaming_response(self, error: Exception) -> str:
        return json.dumps({"error": {"message": str(error)}})


async def sent_by(error: Exception | None) -> list[str]:
    responses = Responses(error)
    adapt(SimpleNamespace(openai_serving_responses=responses), served)
    stream = await responses.create_responses()
    return [event async for event in _convert_stream_to_sse_events(stream)]


@pytest.mark.parametrize(
    ("error", "message"),
    [(RequestLostError(LOST), LOST), (RuntimeError("odd"), "odd"), (ValueError("bad"), "bad")],
)
async def test_a_responses_stream_that_fails_ends_with_an_error_event(
    error: Exception, message: str
) -> None:
    events = await sent_by(error)
    assert len(events) == 3
    name, data = events[-1].strip().split("\n")
    assert name == "event: error"
    told = json.loads(data.removeprefix("data: "))
    assert told["type"] == "error"
    assert told["message"] == message
    assert told["sequence_number"] == 2


async def test_a_responses_stream_that_does_not_fail_is_as_it_was() -> None:
    assert await sent_by(None) == [f'event: delta\ndata: {{"n": {n}}}\n\n' for n in range(2)]


def chunk(text: str) -> str:
    delta = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
    body = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return f"data: {json.dumps(body | {'choices': [delta]})}\n\n"


class Chat:
    """A chat stream, and whether it was closed. Since vLLM 0.33 its items are objects."""

    def __init__(self, *items: str) -> None:
        self.items = by_version(items, tuple(map(as_object, items)))
        self.closed = False

    async def stream(self) -> AsyncGenerator[Any, None]:
        try:
            for item in self.items:
                yield item
        finally:
            self.closed = True


def as_object(item: str) -> ChatCompletionStreamResponse | ErrorResponse:
    data = item.removeprefix("data: ")
    kind = ErrorResponse if item.startswith(ERROR_ITEM) else ChatCompletionStreamResponse
    return kind.model_validate_json(data)


def messages() -> Any:
    one: Any = object.__new__(AnthropicServingMessages)
    adapt(SimpleNamespace(anthropic_serving_messages=one), served)
    return one


async def test_a_messages_stream_that_fails_says_what_happened() -> None:
    error = {"error": {"message": LOST, "type": "InternalServerError", "param": None, "code": 500}}
    chat = Chat(chunk(""), chunk("a"), chunk("b"), f"data: {json.dumps(error)}\n\n")
    events = [e async for e in messages().message_stream_converter(chat.stream())]
    names = [e.split("\n")[0].removeprefix("event: ") for e in events]
    assert names[0] == "message_start"
    assert names.count("content_block_delta") == 2
    assert names[-1] == "error"
    assert names.count("error") == 1
    assert json.loads(events[-1].split("data: ")[1]) == {
        "type": "error",
        "error": {"type": "api_error", "message": LOST},
    }
    assert chat.closed or ENDS_MESSAGES_ITSELF


async def test_a_client_that_leaves_a_messages_stream_closes_the_chat_stream() -> None:
    chat = Chat(*[chunk("a")] * 5)
    stream = messages().message_stream_converter(chat.stream())
    await anext(stream)
    await stream.aclose()
    for _ in range(9):  # vLLM leaves it to the event loop.
        await asyncio.sleep(0)
    assert chat.closed


@pytest.mark.parametrize("name", ["openai_serving_responses", "anthropic_serving_messages"])
async def test_without_an_instance_no_stream_begins(name: str) -> None:
    def nobody() -> None:
        raise GracefulHTTPError("none serves", 503)  # type: ignore[arg-type]

    async def create(*_: Any) -> None:
        raise AssertionError

    one = SimpleNamespace(
        create_responses=create, create_messages=create, responses_stream_generator=None,
        message_stream_converter=None,
    )  # fmt: skip
    adapt(SimpleNamespace(**{name: one}), nobody)
    with pytest.raises(GracefulHTTPError, match="none serves"):
        await (one.create_responses if "responses" in name else one.create_messages)("request")
