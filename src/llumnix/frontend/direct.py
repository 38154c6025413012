"""Tokens that go from vLLM's output processor straight into the client's connection.

For each token of a stream vLLM wakes a task, which makes pydantic objects of it and hands their
text through five generators and six `send`s: most of what a token costs this process. Between its
first chunk and its last, a plain stream's chunks differ in their text alone. So the first chunk of
vLLM's own is kept as a form, and the next ones are made of it and written where the output
processor puts the tokens.

Whatever is out of the ordinary takes vLLM's way: the first and the last chunk, errors, and
tokens that come while the client's connection takes no more, or while the task still has others in
hand. So order is kept. vLLM counts the tokens of a stream as they pass; those that did not pass are
given to it with the next output that does.

vLLM internals relied on here
(tests/house/test_vllm_chunks_contract.py fails when one changes):
- `AsyncLLM.add_request` returns the `RequestOutputCollector` of the request. The output processor
  calls its `put`, for tokens and errors alike. `generate` alone awaits its `get`, once it has
  passed on all that it got before; `output` is what waits in it.
- Of a `CompletionOutput`'s `token_ids` a plain stream needs the number alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec
from vllm.outputs import CompletionOutput, PoolingRequestOutput, RequestOutput
from vllm.v1.engine.output_processor import RequestOutputCollector

WriteBody = Callable[[bytes], bool]
"""Writes a part of an answer's body. False if it must go the usual way."""
_encode = msgspec.json.Encoder().encode


class ChunkForm(NamedTuple):
    """A stream's chunk without its text."""

    before: bytes
    after: bytes

    def filled(self, text: str) -> bytes:
        """The chunk with this text. `UnicodeEncodeError` on half a surrogate pair."""
        return self.before + _encode(text) + self.after


class DirectOutputs(RequestOutputCollector):
    """vLLM's collector of a request's outputs, with the direct way beside it."""

    _forms: dict[int, ChunkForm]
    _passed: dict[int, list[int]]
    _write: WriteBody | None
    _waiting: bool  # whether its task has passed on all that it had, and waits for more

    @classmethod
    def of(cls, collector: RequestOutputCollector) -> "DirectOutputs":
        """The same object, from now on of this class. It sends nothing directly yet."""
        collector.__class__ = cls
        assert isinstance(collector, cls)
        collector._forms, collector._passed = {}, {}
        collector._write, collector._waiting = None, False
        return collector

    def open(self, write: WriteBody, index: int, form: ChunkForm) -> None:
        """The sequence's next chunks have this form. Call it from the task that has sent one."""
        self._write = write
        self._forms[index] = form

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        if isinstance(output, RequestOutput):
            direct = self._waiting and self.output is None and not output.finished
            if direct and self._sent(output.outputs):
                return
            if self._passed:
                self._count(output.outputs)
        super().put(output)

    async def get(self) -> RequestOutput | PoolingRequestOutput:
        self._waiting = True
        try:
            return await super().get()
        finally:
            self._waiting = False

    def _sent(self, outputs: list[CompletionOutput]) -> bool:
        """Sends the outputs, unless one is out of the ordinary."""
        forms, chunks = self._forms, b""
        if self._write is None:
            return False
        for one in outputs:
            form = forms.get(one.index)
            if form is None or one.finish_reason is not None or not (one.text or one.token_ids):
                return False
            try:
                chunks += form.filled(one.text)
            except UnicodeEncodeError:
                return False  # vLLM says what is wrong with it.
        if not self._write(chunks):
            return False
        for one in outputs:
            self._passed.setdefault(one.index, []).extend(one.token_ids)
        return True

    def _count(self, outputs: list[CompletionOutput]) -> None:
        """Gives outputs the tokens before them that went the direct way."""
        for one in outputs:
            passed = self._passed.pop(one.index, None)
            if passed is not None:
                one.token_ids = [*passed, *one.token_ids]
