"""Tokens go straight to the connection where nothing speaks against it, and never out of order."""

import asyncio
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.outputs import STREAM_FINISHED, CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from llumnix.frontend.direct import ChunkForm, DirectOutputs

FORM = ChunkForm(b"<", b">")


def output(text: str, *tokens: int, index: int = 0, reason: str | None = None) -> RequestOutput:
    one = CompletionOutput(
        index=index, text=text, token_ids=list(tokens), cumulative_logprob=None, logprobs=None,
        finish_reason=reason,
    )  # fmt: skip
    return RequestOutput("r", None, [], None, [one], finished=reason is not None)


class Stream:
    """A request's outputs and the task that has them; `seen` is what its client reads."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.counted = 0  # tokens that passed the task
        self.takes = True  # whether the connection does
        self.busy = asyncio.Event()  # whether the task is not kept from sending
        self.busy.set()
        stock = RequestOutputCollector(RequestOutputKind.DELTA, "r")
        self.outputs = DirectOutputs.of(stock)
        assert self.outputs is stock
        self.task = asyncio.create_task(self._run())

    def open(self, *indexes: int) -> None:
        for index in indexes or (0,):
            self.outputs.open(self._write, index, FORM)

    def _write(self, part: bytes) -> bool:
        if self.takes:
            self.seen.append(part.decode())
        return self.takes

    async def _run(self) -> None:
        finished = False
        while not finished:
            got: Any = self.outputs.get_nowait() or await self.outputs.get()
            finished = got.finished
            for one in got.outputs:
                self.counted += len(one.token_ids)
                await self.busy.wait()
                self.seen.append(one.text)

    async def put(self, *outputs: RequestOutput) -> None:
        for one in outputs:
            self.outputs.put(one)
        for _ in range(5):
            await asyncio.sleep(0)


async def test_tokens_take_vllms_way_until_the_form_of_their_chunks_is_known() -> None:
    stream = Stream()
    await stream.put(output("a", 1))
    stream.open()
    await stream.put(output("b", 2), output('"', 3))
    await stream.put(output("d", 4, reason="stop"))
    assert stream.seen == ["a", '<"b">', '<"\\"">', "d"]
    assert stream.task.done()


async def test_tokens_that_went_directly_are_counted_with_the_next_that_do_not() -> None:
    stream = Stream()
    await stream.put(output("a", 1))
    stream.open()
    await stream.put(output("b", 2, 3), output("c", 4))
    assert stream.counted == 1
    await stream.put(output("d", 5, reason="length"))
    assert stream.counted == 5


async def test_a_task_that_has_tokens_in_hand_is_not_overtaken() -> None:
    stream = Stream()
    stream.open()
    stream.takes = False
    stream.busy.clear()
    await stream.put(output("a", 1))
    stream.takes = True
    await stream.put(output("b", 2))
    stream.busy.set()
    await stream.put()
    assert stream.seen == ["a", "b"]
    await stream.put(output("c", 3))
    assert stream.seen == ["a", "b", '<"c">']
    stream.task.cancel()


async def test_tokens_behind_others_that_wait_wait_too() -> None:
    """Both come within one turn of the event loop, before the task has run."""
    stream = Stream()
    await stream.put()
    stream.open()
    stream.takes = False
    stream.outputs.put(output("a", 1))
    stream.takes = True
    await stream.put(output("b", 2))
    assert "".join(stream.seen) == "ab"
    stream.task.cancel()


async def test_nothing_is_sent_directly_before_the_task_has_come_for_it() -> None:
    stream = Stream()
    stream.open()
    stream.outputs.put(output("a", 1))  # The task has not begun yet.
    await stream.put()
    assert stream.seen == ["a"]
    stream.task.cancel()


async def test_sequences_of_one_request_are_counted_apart() -> None:
    stream = Stream()
    await stream.put()
    stream.open(0, 1)
    await stream.put(output("a", 1), output("b", 2, index=1), output("c", 3, index=2))
    assert stream.seen == ['<"a">', '<"b">', "c"]
    assert stream.counted == 1
    last = output("d", 4, index=1, reason="stop")
    last.finished = False  # The other sequences go on.
    await stream.put(last)
    assert (stream.seen[-1], stream.counted) == ("d", 3)
    await stream.put(output("e", 5, reason="stop"))
    assert (stream.seen[-1], stream.counted) == ("e", 5)


async def test_an_error_ends_the_task_after_the_tokens_before_it() -> None:
    stream = Stream()
    await stream.put()
    stream.open()
    stream.outputs.put(output("a", 1))
    stream.outputs.put(ValueError("odd"))
    with pytest.raises(ValueError, match="odd"):
        await stream.task
    assert stream.seen == ['<"a">']


async def test_text_that_is_no_unicode_takes_vllms_way() -> None:
    stream = Stream()
    await stream.put()
    stream.open()
    await stream.put(output("\ud800", 1))
    assert stream.seen == ["\ud800"]
    stream.task.cancel()


async def test_an_output_without_a_token_takes_vllms_way() -> None:
    """vLLM decides whether it is worth a chunk. An empty part would end the whole answer."""
    stream = Stream()
    await stream.put()
    stream.open()
    await stream.put(output(""))
    await stream.put(STREAM_FINISHED)
    assert stream.seen == [""]
    assert stream.task.done()
