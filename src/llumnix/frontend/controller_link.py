"""The frontend's line to the controller: asks where to put a request.

The event loop watches the raw socket, so that a decision needs no task and no timer.

A request must not wait for a controller that is gone. A send to nobody fails at once. A request
that stays undecided for `REPLY_TIMEOUT_S` closes the line. The frontend then places requests by
itself, until the controller answers a ping.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import zmq

from llumnix.core.events import (
    Dispatch,
    FleetReported,
    InstanceLost,
    NoInstance,
    RequestArrived,
    ScalingDecision,
    SettingsChanged,
)
from llumnix.core.reports import LoadReport
from llumnix.core.types import RequestId
from llumnix.errors import ProtocolError
from llumnix.observe import metrics
from llumnix.observe.lines import about
from llumnix.sockets import SocketKeys, connect
from llumnix.wire import Loads, LoadsAsked, Message, Ping, Pong, decode, encode

logger = logging.getLogger("llumnix.frontend")

REPLY_TIMEOUT_S = 0.25
LOOK_EVERY_S = 0.05
PROBE_EVERY_S = 0.2
DECISIONS_MAX = 64
"""So many decisions to scale wait for the fleet, which takes each at once."""


Decision = asyncio.Future[Dispatch | NoInstance | None]


class PendingDispatch(NamedTuple):
    """A request that the controller was asked to place."""

    decision: Decision
    asked_s: float  # monotonic


class ControllerLink:
    """One frontend's connection to the controller at a ZMQ address. `process` is its name among the
    metrics; the office, which places nothing, has none."""

    def __init__(
        self, address: str, keys: SocketKeys | None = None, process: str | None = None
    ) -> None:
        self._address = address
        self._keys = keys
        self._up = True
        self._process = process
        self.on_look: Callable[[], None] = lambda: None
        self._number = 0
        self._pending: dict[RequestId, PendingDispatch] = {}
        self._replies: dict[int, asyncio.Future[Message]] = {}
        self.decisions: asyncio.Queue[ScalingDecision] = asyncio.Queue(DECISIONS_MAX)

    @property
    def up(self) -> bool:
        """Whether the controller answered last time."""
        return self._up

    def start(self) -> None:
        """Connects; call it with the event loop running."""
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        connect(self._socket, self._address, self._keys)
        self._readable = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._readable, self._take_in)
        self._probing = asyncio.create_task(self._probe(), name="llumnix-controller-probe")

    def close(self) -> None:
        """Disconnects."""
        self._probing.cancel()
        self._loop.remove_reader(self._readable)
        self._socket.close(0)
        self._context.term()

    async def place(self, request: RequestArrived) -> Dispatch | NoInstance | None:
        """The controller's decision, or None if there is no controller to ask."""
        if not self._up:
            return None
        decision: Decision = self._loop.create_future()
        self._pending[request.request] = PendingDispatch(decision, time.monotonic())
        try:
            self._send(request)
            return await decision
        except zmq.Again:
            self._lost()
            return None
        finally:
            del self._pending[request.request]

    async def loads(self) -> list[LoadReport] | None:
        """The last report of every instance, or None if there is no controller to ask."""
        told = await self.told()
        return None if told is None else told.reports

    async def told(self) -> Loads | None:
        """The same, with what the controller says of itself."""
        self._number += 1
        reply = await self._ask(LoadsAsked(number=self._number), self._number)
        return reply if isinstance(reply, Loads) else None

    async def ping(self, timeout_s: float = REPLY_TIMEOUT_S) -> Pong | None:
        """What the controller says of itself, or None if it does not answer in time."""
        self._number += 1
        reply = await self._ask(Ping(number=self._number), self._number, timeout_s)
        return reply if isinstance(reply, Pong) else None

    def tell(self, fact: InstanceLost | FleetReported | SettingsChanged) -> None:
        """Passes on a fact. It is lost if the controller is gone: a new controller never heard of
        that instance, and is soon told of the fleet again. The decisions that follow from facts
        wait in `decisions`."""
        try:
            self._send(fact)
        except zmq.Again:
            self._lost()

    def _send(self, message: Message) -> None:
        self._socket.send(encode(message), zmq.NOBLOCK)
        # The descriptor signals each change once. A send may consume the signal of what arrived.
        self._take_in()

    async def _ask(
        self, message: Message, number: int, timeout_s: float = REPLY_TIMEOUT_S
    ) -> Message | None:
        self._replies[number] = reply = self._loop.create_future()
        try:
            self._send(message)
            # `wait_for` would lose a cancellation that comes together with the answer.
            async with asyncio.timeout(timeout_s):
                return await reply
        except (zmq.Again, TimeoutError):
            return None
        finally:
            del self._replies[number]

    def _take_in(self) -> None:
        """All that has arrived."""
        # Asking first is cheaper than the exception of an empty socket.
        while int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            try:
                self._heard(decode(self._socket.recv(zmq.NOBLOCK)))
            except ProtocolError as error:
                logger.error("From the controller: %s", error)
            except Exception:
                # Not raised: the caller may be a request that only sends something.
                logger.exception("A message of the controller's could not be handled")

    def _heard(self, message: Message) -> None:
        if isinstance(message, ScalingDecision):
            self._decided(message)
            return
        waiting: asyncio.Future[Any] | None = None
        if isinstance(message, Dispatch | NoInstance):
            pending = self._pending.get(message.request)
            waiting = pending and pending.decision
        elif isinstance(message, Pong | Loads):
            waiting = self._replies.get(message.number)
        else:
            raise ProtocolError(f"not for a frontend: {type(message).__name__}")
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    def _decided(self, decision: ScalingDecision) -> None:
        if self.decisions.full():  # Nobody carries them out. The controller will decide again.
            logger.error("A decision of the controller's was dropped: %s", decision.why)
        else:
            self.decisions.put_nowait(decision)

    async def _probe(self) -> None:
        """Sees that no request waits for the controller too long, and notices when it is back."""
        lag = None if self._process is None else metrics.LOOP_LAG_S.labels(self._process)
        self._note_up(True)
        while True:
            pause_s = LOOK_EVERY_S if self._up else PROBE_EVERY_S
            due_s = self._loop.time() + pause_s
            await asyncio.sleep(pause_s)
            self.on_look()
            if lag is not None:
                lag.observe(max(0.0, self._loop.time() - due_s))
            if self._up:
                # What came while the event loop stood still is not late.
                self._take_in()
                late_s = time.monotonic() - REPLY_TIMEOUT_S
                waiting = [p for p in self._pending.values() if not p.decision.done()]
                if any(p.asked_s < late_s for p in waiting):
                    self._lost()
                continue
            if await self.ping() is not None:
                self._note_up(True)
                logger.warning(
                    "The controller is back: it places requests again.", extra=about("back")
                )

    def _note_up(self, up: bool) -> None:
        self._up = up
        if self._process is not None:
            metrics.CONTROLLER_UP.labels(self._process).set(up)
            if not up:
                metrics.CONTROLLER_BYPASSES.inc()

    def _lost(self) -> None:
        for pending in self._pending.values():
            if not pending.decision.done():
                pending.decision.set_result(None)
        if self._up:
            self._note_up(False)
            logger.warning(
                "The controller does not answer: this frontend places requests by itself "
                "(fewest of its own first) until it is back.",
                extra=about("bypass"),
            )
