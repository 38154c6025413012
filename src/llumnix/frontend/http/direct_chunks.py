"""Finds the form of a stream's chunks in those that vLLM has made, for frontend/direct.py.

Streams of chat and of completions are looked at, whose chunks carry nothing but text: no logprobs,
token ids or usage. A stream that a parser reads (tools, reasoning) has chunks of many forms.

vLLM internals relied on here
(tests/house/test_vllm_chunks_contract.py fails when one changes):
- The application's state has `openai_serving_chat` and `openai_serving_completion`, or None, whose
  `chat_completion_stream_generator` and `completion_stream_generator` take the request first and
  yield one event a string.
- Between the first chunk with text of a sequence and the one with its finish reason, chunks differ
  in their text alone: `delta.content` or `text`. With `echo` a chat begins with a chunk of another
  form.
- `parser_cls` is None without parsers; `request_logger` with `enable_log_outputs` logs each chunk.
- Nothing reads a response's body on its way but the middlewares that are not in `PASSING`.
"""

from collections.abc import AsyncGenerator, Callable
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec
from fastapi import FastAPI
from vllm import envs

from llumnix.frontend.context import HttpRequest, current_http_request
from llumnix.frontend.direct import ChunkForm

PASSING = frozenset({
    "AuthenticationMiddleware", "CORSMiddleware", "Gate", "PrometheusInstrumentatorMiddleware",
    "ScalingMiddleware", "WebSocketMetricsMiddleware", "XRequestIdMiddleware",
})  # fmt: skip
"""Middlewares that let a body pass as it is."""
FIXED = frozenset({"id", "object", "created", "model", "choices"})
"""What a chunk has beside its one choice."""
LOOKS_MAX = 8
"""So many chunks of a sequence are looked at for its form, which most show in their second."""

Stream = Callable[..., AsyncGenerator[str, None]]
_EVENT = "data: "


def adapt(app: FastAPI) -> None:
    """From now on the plain streams of vLLM's application take the direct way, if nothing but the
    server reads what they send."""
    state = app.state
    strangers = {_name(m.cls) for m in app.user_middleware} - PASSING
    if strangers or envs.VLLM_DEBUG_LOG_API_SERVER_RESPONSE or state.args.sse_keep_alive_interval:
        return
    if (chat := getattr(state, "openai_serving_chat", None)) is not None:
        logs = chat.enable_log_outputs and chat.request_logger
        if chat.parser_cls is None and not logs:
            stream = chat.chat_completion_stream_generator
            chat.chat_completion_stream_generator = _looked_at(stream)
    if (completion := getattr(state, "openai_serving_completion", None)) is not None:
        stream = completion.completion_stream_generator
        completion.completion_stream_generator = _looked_at(stream)


def _name(middleware: Any) -> str:
    return str(getattr(middleware, "__name__", middleware))


def _looked_at(stream: Stream) -> Stream:
    def events(request: Any, *args: Any, **more: Any) -> AsyncGenerator[str, None]:
        inner = stream(request, *args, **more)
        http = current_http_request.get()
        if http is None or http.write is None or request.echo:
            return inner
        return _events(inner, http, request.n or 1)

    return events


async def _events(
    inner: AsyncGenerator[str, None], http: HttpRequest, sequences: int
) -> AsyncGenerator[str, None]:
    """What `inner` yields. Opens the direct way for each sequence once a chunk of it was sent."""
    unknown, looks = set(range(sequences)), LOOKS_MAX * sequences
    try:
        async for event in inner:
            yield event
            # Several requests behind one stream are of several prompts, or of a beam search.
            if not unknown or not looks or len(http.outputs) != 1 or http.write is None:
                continue
            looks -= 1
            found = form_of(event)
            if found is not None and found[0] in unknown:
                unknown.remove(found[0])
                http.outputs[0].open(http.write, *found)
    finally:
        await inner.aclose()


def form_of(event: str) -> tuple[int, ChunkForm] | None:
    """The sequence that an event is of, and the form of its chunks; None if the event says more
    than a piece of text."""
    if not event.startswith(_EVENT + "{"):
        return None
    chunk = msgspec.json.decode(event[len(_EVENT) :])
    choices = chunk.get("choices")
    if not choices or len(choices) != 1 or _says_more(chunk, but=FIXED):
        return None
    choice: dict[str, Any] = choices[0]
    piece, key = choice, "text"
    if "delta" in choice:
        piece, key = choice["delta"], "content"
    text = piece.get(key)
    if not isinstance(text, str):
        return None
    if _says_more(choice, but={"index", "delta", "text"}) or _says_more(piece, but={"index", key}):
        return None
    name = f'"{key}":'.encode()
    before, _, after = event.encode().partition(name + msgspec.json.encode(text))
    return choice["index"], ChunkForm(before + name, after)


def _says_more(fields: dict[str, Any], *, but: AbstractSet[str]) -> bool:
    return any(fields[name] is not None for name in fields.keys() - but)
