"""Ends streams of /v1/responses and /v1/messages with a proper error event if their request failed.

vLLM cuts the connection of the first. Before 0.33 it tells the client of the second that a parser
did not understand the error. While no instance serves, both are refused here before the stream
begins, as chat and completions are.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- The application's state has `openai_serving_responses` and `anthropic_serving_messages`, or None.
- `create_responses` and `create_messages` of these take all their requests.
- `OpenAIServingResponses.responses_stream_generator` yields events, which are sent by `type` and
  `model_dump_json`. Whatever it raises cuts the connection. It catches a `GenerationError`, asks
  `_convert_generation_error_to_streaming_response` for its text, and fails to make an event of it.
- `AnthropicServingMessages.message_stream_converter` takes a chat stream, whose errors are items
  that begin as `ERROR_ITEM` does.
"""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec
from openai.types.responses import ResponseErrorEvent
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from llumnix.vllm_seam import ENDS_MESSAGES_ITSELF

logger = logging.getLogger("llumnix.frontend")

Stream = Callable[..., AsyncGenerator[Any, None]]
ERROR_ITEM = 'data: {"error":'


def adapt(state: Any, ensure_served: Callable[[], None]) -> None:
    """Adapts the objects that serve the two routes in a vLLM application with this state.
    `ensure_served` raises while no instance serves."""
    if (responses := getattr(state, "openai_serving_responses", None)) is not None:
        responses._convert_generation_error_to_streaming_response = _raised
        responses.responses_stream_generator = _responses(responses.responses_stream_generator)
        responses.create_responses = _served(responses.create_responses, ensure_served)
    if (messages := getattr(state, "anthropic_serving_messages", None)) is not None:
        if not ENDS_MESSAGES_ITSELF:
            messages.message_stream_converter = _messages(messages.message_stream_converter)
        messages.create_messages = _served(messages.create_messages, ensure_served)


def _served(
    create: Callable[..., Awaitable[Any]], ensure_served: Callable[[], None]
) -> Callable[..., Awaitable[Any]]:
    async def created(*args: Any, **more: Any) -> Any:
        ensure_served()
        return await create(*args, **more)

    return created


def _responses(stream: Stream) -> Stream:
    async def events(*args: Any, **more: Any) -> AsyncGenerator[Any, None]:
        inner = stream(*args, **more)
        sent = 0
        try:
            async for event in inner:
                yield event
                sent += 1
        except Exception as error:  # noqa: BLE001 - only an event can still say so: the head is out
            told = create_error_response(error).error
            logger.error("A stream of /v1/responses ends with an error: %s", told.message)
            yield ResponseErrorEvent(
                type="error",
                code=getattr(error, "code", None) or told.type,
                message=told.message,
                param=told.param,
                sequence_number=sent,
            )
        finally:
            await inner.aclose()

    return events


def _raised(error: Exception) -> None:
    raise error


class _Told(msgspec.Struct):
    message: str
    code: int = 500


class _ErrorItem(msgspec.Struct):
    error: _Told


def _messages(convert: Stream) -> Stream:
    async def events(chat: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        errors: list[str] = []

        async def until_error() -> AsyncGenerator[str, None]:
            async for item in chat:
                if item.startswith(ERROR_ITEM):
                    errors.append(item)
                    return
                yield item

        inner = convert(until_error())
        try:
            async for event in inner:
                yield event
            for item in errors:
                yield _anthropic_error(item)
        finally:
            await inner.aclose()
            await chat.aclose()

    return events


def _anthropic_error(item: str) -> str:
    """An error of a chat stream as an event of Anthropic's."""
    told = msgspec.json.decode(item.removeprefix("data: "), type=_ErrorItem).error
    kind = "api_error" if told.code >= 500 else "invalid_request_error"
    body = {"type": "error", "error": {"type": kind, "message": told.message}}
    return f"event: error\ndata: {msgspec.json.encode(body).decode()}\n\n"
