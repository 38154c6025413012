"""The frontend's line to the controller: asks where to put a request.

With the controller gone an answer must not be waited for: a send to nobody fails at once, a
question that stays unanswered for `REPLY_TIMEOUT_S` closes the line, and until a ping is answered
again the frontend dispatches by itself.
"""

import asyncio
import logging
from collections.abc import Callable

import zmq
import zmq.asyncio

from llumnix.core.events import (
    Dispatch,
    FleetReported,
    InstanceLost,
    NoInstance,
    RequestArrived,
    ScalingDecision,
)
from llumnix.core.load import LoadReport
from llumnix.core.types import RequestId
from llumnix.errors import ProtocolError
from llumnix.observe.wire import Loads, LoadsAsked, Message, Ping, Pong, decode, encode

logger = logging.getLogger("llumnix.frontend")

REPLY_TIMEOUT_S = 0.25
PROBE_EVERY_S = 0.2


class ControllerLink:
    """One frontend's connection to the controller at a ZMQ address."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._up = True
        self._number = 0
        self._answers: dict[RequestId, asyncio.Future[Dispatch | NoInstance]] = {}
        self._replies: dict[int, asyncio.Future[Message]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.on_scaling: Callable[[ScalingDecision], None] = lambda _: None

    @property
    def up(self) -> bool:
        """Whether the controller answered last time."""
        return self._up

    def start(self) -> None:
        """Connects; call it with the event loop running."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(self._address)
        self._tasks = [
            asyncio.create_task(self._receive(), name="llumnix-controller-answers"),
            asyncio.create_task(self._probe(), name="llumnix-controller-probe"),
        ]

    def close(self) -> None:
        """Disconnects."""
        for task in self._tasks:
            task.cancel()
        self._socket.close(0)
        self._context.term()

    async def place(self, request: RequestArrived) -> Dispatch | NoInstance | None:
        """The controller's decision, or None if there is no controller to ask."""
        if not self._up:
            return None
        answer: asyncio.Future[Dispatch | NoInstance] = asyncio.get_running_loop().create_future()
        self._answers[request.request] = answer
        try:
            await self._send(request)
            return await asyncio.wait_for(answer, REPLY_TIMEOUT_S)
        except (zmq.Again, TimeoutError):
            self._lost()
            return None
        finally:
            del self._answers[request.request]

    async def loads(self) -> list[LoadReport] | None:
        """The last report of every instance, or None if there is no controller to ask."""
        self._number += 1
        reply = await self._ask(LoadsAsked(number=self._number), self._number)
        return reply.reports if isinstance(reply, Loads) else None

    async def tell(self, fact: InstanceLost | FleetReported) -> None:
        """Passes on a fact. Lost with the controller: a new one never heard of that instance, and
        is soon told of the fleet again. Decisions that follow go to `on_scaling`."""
        try:
            await self._send(fact)
        except zmq.Again:
            self._lost()

    async def _send(self, message: Message) -> None:
        await self._socket.send(encode(message), zmq.NOBLOCK)

    async def _ask(self, message: Message, number: int) -> Message | None:
        self._replies[number] = reply = asyncio.get_running_loop().create_future()
        try:
            await self._send(message)
            return await asyncio.wait_for(reply, REPLY_TIMEOUT_S)
        except (zmq.Again, TimeoutError):
            return None
        finally:
            del self._replies[number]

    async def _receive(self) -> None:
        while True:
            try:
                message = decode(await self._socket.recv())
            except ProtocolError as error:
                logger.error("From the controller: %s", error)
                continue
            if isinstance(message, ScalingDecision):
                self.on_scaling(message)
                continue
            waiting: asyncio.Future | None = None
            if isinstance(message, Dispatch | NoInstance):
                waiting = self._answers.get(message.request)
            elif isinstance(message, Pong | Loads):
                waiting = self._replies.get(message.number)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_EVERY_S)
            if self._up:
                continue
            self._number += 1
            if await self._ask(Ping(number=self._number), self._number) is not None:
                self._up = True
                logger.warning("The controller is back: it places requests again.")

    def _lost(self) -> None:
        if self._up:
            self._up = False
            logger.warning(
                "The controller does not answer: this frontend places requests by itself "
                "(fewest of its own first) until it is back."
            )
