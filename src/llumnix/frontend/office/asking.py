"""Questions over a line between two processes, and their answers.

Whoever asks gets the answer, the other end's error as its own class, or a `TimeoutError`. When the
line is closed, nobody waits on.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from llumnix import errors
from llumnix.errors import LlumnixError, ProtocolError, UsageError
from llumnix.frontend.office.messages import Answer, Ask, Failure, Message, Question, questions

logger = logging.getLogger("llumnix.office")

SOON_S = 1.0
"""For what a process answers at once unless it hangs."""


class LineClosedError(LlumnixError):
    """The other process has ended."""


class AskedError(LlumnixError):
    """What was asked of another process failed there, with an error that is not ours."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


class Asking:
    """One end of a line: what was asked there and is not answered yet."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send
        self._number = 0
        self._open: dict[int, asyncio.Future[Any]] = {}

    async def ask(self, question: Question, timeout_s: float | None = SOON_S) -> Any:
        """The other end's answer."""
        async with asyncio.timeout(timeout_s):
            return await self.put(question)

    def put(self, question: Question) -> asyncio.Future[Any]:
        """Sends a question at once. Returns what will be its answer; cancel that to give it up."""
        self._number += 1
        number = self._number
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[number] = answer
        answer.add_done_callback(lambda _: self._open.pop(number, None))
        self._send(Ask(number=number, question=questions.encode(question)))
        return answer

    def answered(self, answer: Answer) -> None:
        """An answer has come."""
        waiting = self._open.get(answer.number)
        if waiting is None or waiting.done():
            return  # Whoever asked has given up.
        if answer.failure is None:
            waiting.set_result(answer.value)
        else:
            waiting.set_exception(_error(answer.failure))

    def close(self, why: str) -> None:
        """There will be no more answers."""
        for waiting in list(self._open.values()):
            if not waiting.done():
                waiting.set_exception(LineClosedError(why))


async def answer_to(ask: Ask, handle: Callable[[Question], Awaitable[Any]]) -> Answer:
    """What `handle` makes of a question, or its failure."""
    try:
        value = await handle(questions.decode(ask.question))
    except Exception as error:
        # Errors that a user can mend, and those of other libraries, are whoever asked's to tell.
        if isinstance(error, ProtocolError):
            logger.exception("A question could not be answered")
        status = getattr(error, "http_status", None)
        text = str(error) or type(error).__name__
        return Answer(
            number=ask.number,
            failure=Failure(
                kind=type(error).__name__, text=text, status=None if status is None else int(status)
            ),
        )
    return Answer(number=ask.number, value=msgspec.to_builtins(value))


def why_failed(error: BaseException) -> str:
    """In one line, with the class that the error had at the other end."""
    kind = error.failure.kind if isinstance(error, AskedError) else type(error).__name__
    return f"{kind}: {error}"


def _error(failure: Failure) -> Exception:
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, UsageError):
        return kind(failure.text)
    return AskedError(failure)
