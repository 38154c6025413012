"""What frontend/direct.py and frontend/http/direct_chunks.py rely on: vLLM's chunks differ in their
text alone, so that those that are made of a form are the bytes that vLLM would have sent."""

import asyncio
import random
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector

from llumnix.frontend.context import HttpRequest, current_http_request
from llumnix.frontend.direct import DirectOutputs
from llumnix.frontend.http import direct_chunks
from llumnix.frontend.http.server import GATE, with_gate
from llumnix.frontend.llm import RequestLostError
from llumnix.vllm_seam import cli_args

WHO = "frontend/direct.py and frontend/http/direct_chunks.py"
PROMPT = [1, 2, 3]
ODD = [
    "", " ", '"', "\\", "\n", "\r\n", "\t", "\b\f", "\x00", "\x1f", "\x7f", "/", "</script>", "é",
    "ß", "漢字", "🦙", "\u2028", "\ufeff", "\ufffd", '","text":"', '{"content":"x"}', "\n\n",
    "data: [DONE]", "%s %d", "{}", "'", "&amp;",
]  # fmt: skip
"""Texts that some encoder would write in another way."""

Put = RequestOutput | Exception


def output(
    text: str, tokens: list[int], index: int = 0, *, last: bool = False, **more: Any
) -> RequestOutput:
    """What the output processor hands on. `last`: of the whole request."""
    one: Any = {"cumulative_logprob": None, "logprobs": None, **more}
    return RequestOutput(
        request_id="r",
        prompt="hi",
        prompt_token_ids=PROMPT,
        prompt_logprobs=None,
        outputs=[CompletionOutput(index=index, text=text, token_ids=tokens, **one)],
        finished=last,
        num_cached_tokens=1,
    )


def plain(texts: list[str], **last: Any) -> list[Put]:
    """A stream of these texts, a token each, and the end."""
    end = {"finish_reason": "stop", **last}
    return [
        *(output(text, [n]) for n, text in enumerate(texts)),
        output("end", [9], last=True, **end),
    ]


class Path:
    """One of vLLM's two stream generators, made without a model."""

    def __init__(self, kind: type, more: dict[str, Any], request: dict[str, Any]) -> None:
        self.serving = serving = kind.__new__(kind)
        self.chat = kind is OpenAIServingChat
        fields: dict[str, Any] = {
            "enable_force_include_usage": False, "enable_prompt_tokens_details": True,
            "enable_per_request_metrics": False, "system_fingerprint": "fp", "request_logger": None,
            "log_error_stack": False, "parser_cls": None, "enable_log_outputs": False,
            "enable_log_deltas": True, "response_role": "assistant",
            "_include_reasoning_tokens_details": False, "enable_auto_tools": False, **more,
        }  # fmt: skip
        for name, value in fields.items():
            setattr(serving, name, value)
        shape = {"messages": [{"role": "user", "content": "hi"}]} if self.chat else {"prompt": "hi"}
        kind_of: Any = ChatCompletionRequest if self.chat else CompletionRequest
        self.request = kind_of(model="m", stream=True, max_tokens=9, **shape, **request)
        self.state = SimpleNamespace(
            args=Namespace(sse_keep_alive_interval=0),
            **{"openai_serving_chat" if self.chat else "openai_serving_completion": serving},
        )

    def adapt(self) -> None:
        direct_chunks.adapt(SimpleNamespace(state=self.state, user_middleware=[]))  # type: ignore[arg-type]

    def events(self, outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[str, None]:
        metadata = RequestResponseMetadata(request_id="r")
        if self.chat:
            return self.serving.chat_completion_stream_generator(
                self.request, outputs, 'chat"cmpl', "m", [{"role": "assistant", "content": "x"}],
                object(), metadata,
            )  # fmt: skip
        return self.serving.completion_stream_generator(
            self.request, [{"prompt": "hi"}], merge_async_iterators(outputs), "cmpl", 7, "m", 1,
            None, metadata,
        )  # fmt: skip


async def streamed(path: Path, puts: list[Put], *, direct: bool, paused: Any = None) -> list[bytes]:
    """The parts of the answer's body. `paused(n)`: whether the connection takes no more then.
    Directly sent parts stand in `path.direct`."""
    parts: list[bytes] = []
    path.direct = []  # type: ignore[attr-defined]

    def write(part: bytes) -> bool:
        if paused is not None and paused(len(parts)):
            return False
        parts.append(part)
        path.direct.append(part)  # type: ignore[attr-defined]
        return True

    collector = RequestOutputCollector(RequestOutputKind.DELTA, "r")
    http = HttpRequest(client_id=None, write=write)
    if direct:
        path.adapt()
        http.outputs.append(DirectOutputs.of(collector))

    async def add_request(*args: Any, **more: Any) -> RequestOutputCollector:
        return collector

    async def abort(*args: Any, **more: Any) -> None:
        return None

    llm: Any = SimpleNamespace(add_request=add_request, abort=abort, log_requests=False)
    token = current_http_request.set(http)
    events = path.events(AsyncLLM.generate(llm, "hi", None, "r"))  # type: ignore[arg-type]
    current_http_request.reset(token)

    async def consume() -> None:
        async for event in events:
            parts.append(event.encode())

    task = asyncio.create_task(consume())
    await settle()
    for put in puts:
        collector.put(put)
        await settle()
    await asyncio.wait_for(task, 5)
    return parts


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


async def both(
    make: Callable[[], Path], puts: Callable[[], list[Put]], **more: Any
) -> tuple[list[bytes], list[bytes], int]:
    """The parts that vLLM sends, those that are sent with the direct way open, and how many of
    these went it."""
    stock, ours = make(), make()
    theirs = await streamed(stock, puts(), direct=False)
    mine = await streamed(ours, puts(), direct=True, **more)
    return theirs, mine, len(ours.direct)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1795917977.5)


KINDS = [OpenAIServingChat, OpenAIServingCompletion]
USAGE = {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("request_of", [{}, USAGE, {"stop": ["x"]}], ids=str)
async def test_chunks_of_a_form_are_the_bytes_that_vllm_sends(
    kind: type, request_of: dict[str, Any]
) -> None:
    end = {"finish_reason": "stop", "stop_reason": "x"}
    theirs, mine, direct = await both(lambda: Path(kind, {}, request_of), lambda: plain(ODD, **end))
    assert mine == theirs, f"vLLM makes chunks of another form; look at {WHO}"
    # The first chunk and the last one go vLLM's way.
    assert direct == len(ODD) - 1, f"nothing went the direct way; look at {WHO}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(10))
async def test_whatever_takes_which_way_the_client_reads_the_same(kind: type, seed: int) -> None:
    """Random streams of two answers, over a connection that now and then takes no more."""
    dice = random.Random(seed)
    puts: list[tuple[str, list[int], int, dict[str, Any]]] = []
    for _ in range(40):
        text = "".join(dice.choices(ODD, k=dice.randrange(3)))
        puts.append((text, [7] * dice.randrange(3), dice.randrange(2), {}))
    for index in (0, 1):
        reason = {"finish_reason": dice.choice(["stop", "length"])}
        puts.append((dice.choice(ODD), [1], index, {**reason, "last": index == 1}))
    full = [dice.random() < 0.3 for _ in range(500)]
    theirs, mine, direct = await both(
        lambda: Path(kind, {}, {"n": 2, **USAGE}),
        lambda: [output(text, list(ids), index, **more) for text, ids, index, more in puts],
        paused=lambda n: full[n],
    )
    assert mine == theirs
    assert direct > 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error", [RequestLostError("gone", "engine_died"), ValueError("odd")], ids=repr
)
async def test_an_error_in_the_middle_comes_after_the_tokens_before_it(
    kind: type, error: Exception
) -> None:
    puts = plain(["a", "b", "c"])[:-1]
    theirs, mine, direct = await both(lambda: Path(kind, {}, USAGE), lambda: [*puts, error])
    assert mine == theirs
    assert mine[-1] == b"data: [DONE]\n\n"
    assert b'"error"' in mine[-2]
    assert direct == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_an_engine_s_error_is_told_as_vllm_tells_it(kind: type) -> None:
    theirs, mine, _ = await both(
        lambda: Path(kind, {}, {}), lambda: plain(["a", "b"], finish_reason="error")
    )
    assert mine == theirs
    assert b"Internal server error" in mine[-2]


CONTINUOUS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


def with_logprobs() -> list[Put]:
    more = {"logprobs": [{5: Logprob(-0.5, 1, "a")}]}
    return [output("a", [5], **more), output("a", [5], **more),
            output("a", [5], last=True, finish_reason="stop", **more)]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "request_of",
    [CONTINUOUS, {"return_token_ids": True}, {"echo": True}, {"logprobs": 1}],
    ids=str,
)
async def test_a_stream_whose_chunks_say_more_than_text_goes_vllm_s_way(
    kind: type, request_of: dict[str, Any]
) -> None:
    if "logprobs" in request_of and kind is OpenAIServingChat:
        request_of = {"logprobs": True, "top_logprobs": 1}
    puts = with_logprobs if "logprobs" in request_of else lambda: plain(["a", "b", "c"])
    theirs, mine, direct = await both(lambda: Path(kind, {}, request_of), puts)
    assert mine == theirs
    assert not direct, f"a chunk was made of a form that has more than text; look at {WHO}"


async def test_a_stream_without_a_form_is_not_looked_at_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = []
    monkeypatch.setattr(direct_chunks, "form_of", looks.append)
    path = Path(OpenAIServingChat, {}, CONTINUOUS)
    await streamed(path, plain(["a"] * 30), direct=True)
    assert 0 < len(looks) <= direct_chunks.LOOKS_MAX


@pytest.mark.parametrize(
    "more",
    [{"parser_cls": object}, {"enable_log_outputs": True, "request_logger": object()}],
    ids=["parser", "logger"],
)
def test_a_server_that_reads_each_chunk_is_left_alone(more: dict[str, Any]) -> None:
    path = Path(OpenAIServingChat, more, {})
    path.adapt()
    assert "chat_completion_stream_generator" not in vars(path.serving)


def test_the_middlewares_of_vllm_s_application_let_a_body_pass() -> None:
    parser = cli_args().make_arg_parser(FlexibleArgumentParser())
    given = parser.parse_args(["--enable-request-id-headers", "--api-key", "x"])
    args = with_gate(given, None, None)  # type: ignore[arg-type]
    assert args.middleware == [GATE]
    assert args.sse_keep_alive_interval == 0
    app = build_app(args, ("generate",))
    app.state.openai_serving_completion = path = Path(OpenAIServingCompletion, {}, {}).serving
    direct_chunks.adapt(app)
    assert "completion_stream_generator" in vars(path), (
        "vLLM has a middleware that PASSING does not know; see whether it reads bodies and look at "
        f"{WHO}: {[m.cls for m in app.user_middleware]}"
    )
