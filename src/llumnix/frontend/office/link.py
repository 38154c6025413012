"""A frontend's line to the office."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

import zmq
import zmq.asyncio

from llumnix.core.supervision.frontends import Held
from llumnix.frontend.office.asking import Asking, answer_to
from llumnix.frontend.office.messages import (
    AdaptersAre,
    Answer,
    Ask,
    EngineDied,
    Hello,
    Holding,
    KeysAre,
    Message,
    QuarantineIs,
    Question,
    WhoIsAccused,
    messages,
    questions,
)

logger = logging.getLogger("llumnix.office")

LOOK_EVERY_S = 0.05
"""So often it is looked whether what this frontend holds has changed."""
SAY_EVERY_S = 1.0
"""So often it is said though it has not changed."""
LINGER_MS = 1000
IN_ORDER = (AdaptersAre, EngineDied, KeysAre, QuarantineIs, WhoIsAccused)
"""Questions that are answered before the next message is read; none of them takes time."""


class OfficeLink:
    """The line of the frontend's process that is client number `client`. `held` says what it
    holds."""

    def __init__(self, address: str, client: int, held: Callable[[], Held]) -> None:
        self._address = address
        self._client = client
        self._held = held
        self._said: tuple[Held, float] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking = Asking(self.send)
        self.ask = self._asking.ask

    def start(
        self,
        on_message: Callable[[Message], Awaitable[None]],
        on_question: Callable[[Question], Awaitable[Any]],
    ) -> None:
        """Connects and says hello; call it with the event loop running. Messages are handed on in
        order, each once the one before has been dealt with."""
        self._on_message, self._on_question = on_message, on_question
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(self._address)
        self.send(Hello(client=self._client, pid=os.getpid()))
        self._begin(self._listen())
        self._begin(self._say_what_is_held())

    def close(self) -> None:
        """Disconnects. What was sent goes out."""
        for task in self._tasks:
            task.cancel()
        self._asking.close("this frontend ends")
        self._socket.close()

    def send(self, message: Message) -> None:
        """Sends a message. Nothing is waited for: the office reads, or is dead."""
        self._socket.send(messages.encode(message))

    def say_now(self) -> None:
        """Says what is held."""
        held = self._held()
        self._said = held, asyncio.get_running_loop().time()
        self.send(Holding(held=held))

    async def _say_what_is_held(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            held, now_s = self._held(), asyncio.get_running_loop().time()
            if self._said is not None and now_s - self._said[1] < SAY_EVERY_S:
                said = self._said[0]
                if held.in_flight == said.in_flight and held.suspects == said.suspects:
                    continue
            self.say_now()

    async def _listen(self) -> None:
        while True:
            payload = await self._socket.recv()
            try:
                await self._take(messages.decode(payload))
            except Exception:
                logger.exception("A message of the office's could not be handled")

    async def _take(self, message: Message) -> None:
        match message:
            case Answer():
                self._asking.answered(message)
            case Ask():
                if isinstance(questions.decode(message.question), IN_ORDER):
                    await self._answer(message)
                else:
                    self._begin(self._answer(message))
            case _:
                await self._on_message(message)

    async def _answer(self, ask: Ask) -> None:
        self.send(await answer_to(ask, self._on_question))

    def _begin(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
