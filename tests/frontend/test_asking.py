"""Questions to another process: whoever asks is answered, and no question is kept after that."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.errors import UsageError
from llumnix.frontend.office.asking import AskedError, Asking, LineClosedError
from llumnix.frontend.office.messages import Answer, Ask, Failure, HowManyRun


class Line:
    """Keeps what is asked."""

    def __init__(self) -> None:
        self.asked: list[Ask] = []
        send: Any = self.asked.append
        self.asking = Asking(send)

    def answer(self, value: Any = None, failure: Failure | None = None) -> None:
        """To the last question."""
        number = self.asked[-1].number
        self.asking.answered(Answer(number=number, value=value, failure=failure))


ENDS: dict[str, Callable[[Line], None]] = {
    "an answer": lambda line: line.answer(3),
    "a failure": lambda line: line.answer(failure=Failure(kind="UsageError", text="mend it")),
    "the end of the other": lambda line: line.asking.close("it has ended"),
    "too long a wait": lambda line: None,
}


@pytest.mark.parametrize("how", ENDS)
async def test_a_question_is_forgotten_with(how: str) -> None:
    """The office asks every frontend five times a second while somebody watches the page."""
    line = Line()
    for _ in range(3):
        waiting = asyncio.create_task(line.asking.ask(HowManyRun(), 0.05))
        await asyncio.sleep(0)
        ENDS[how](line)
        await asyncio.wait([waiting])
        await asyncio.sleep(0)
        assert waiting.exception() is None or how != "an answer"
        assert line.asking._open == {}
    assert len({ask.number for ask in line.asked}) == 3


async def test_an_answer_that_nobody_waits_for_any_more_is_nobodys() -> None:
    line = Line()
    with pytest.raises(TimeoutError):
        await line.asking.ask(HowManyRun(), 0.01)
    line.answer(1)
    waiting = line.asking.put(HowManyRun())
    line.answer(2)
    assert await waiting == 2


async def test_what_a_user_can_mend_is_the_same_error_here_and_others_are_told() -> None:
    line = Line()
    waiting = line.asking.put(HowManyRun())
    line.answer(failure=Failure(kind="UsageError", text="mend it"))
    with pytest.raises(UsageError, match="mend it"):
        await waiting
    waiting = line.asking.put(HowManyRun())
    line.answer(failure=Failure(kind="KeyError", text="no such", status=404))
    with pytest.raises(AskedError, match="no such"):
        await waiting
    waiting = line.asking.put(HowManyRun())
    line.asking.close("it has ended")
    with pytest.raises(LineClosedError, match="it has ended"):
        await waiting
