"""The llumlet's line to the controller: pushes the engine's load, takes orders to move it.

The engine's busy loop hands its numbers over between steps, and what changed is sent there and
then, on that thread, but not more often than every `REPORT_EVERY_S`: where steps are so short, that
thread has no time to spare. (A thread of its own would have to wait for the
interpreter's lock, which the busy loop holds while it polls for its workers' answer, and make the
loop wait in turn.) An engine that is about to stand still says so at once. A second thread only
repeats the last report when nothing was sent for `HEARTBEAT_S`. With the controller gone, reports
are dropped, not queued: the next one says it all. What the controller has sent is taken in whenever
a report goes out.

The second thread also says how long the engine has stood still with requests, so that an engine
that hangs is told apart from one that has no news.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from llumnix.core.events import LoadReported, MoveLoad, PrefixesChanged
from llumnix.core.limits import HEARTBEAT_S
from llumnix.core.reports import EngineCounts, MoveCounts, compose_report
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId
from llumnix.errors import ProtocolError
from llumnix.sockets import SocketKeys, connect
from llumnix.wire import Message, decode, encode

logger = logging.getLogger("llumnix.engine")

REPORT_EVERY_S = 0.02
CLOSE_TIMEOUT_S = 2.0
ADMITTED_MAX = 10_000
"""Requests named in one report at the most; the bookings of the rest lapse by themselves."""


@dataclass(slots=True, kw_only=True)
class _Steps:
    """Running totals of an engine's steps, and the seconds that they took."""

    count: int = 0
    seconds: float = 0.0


class LoadReporter:
    """Reports of one run of one instance's engine. `on_order` is given what the controller orders,
    on any thread. `clock`: monotonic, in seconds."""

    def __init__(
        self,
        *,
        instance: InstanceId,
        engine_index: EngineIndex,
        controller: str,
        on_order: Callable[[MoveLoad], None],
        keys: SocketKeys | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_order = on_order
        self._clock = clock
        self._instance = instance
        self._engine_index = engine_index
        self._controller = controller
        self._keys = keys
        self._numbers: EngineCounts | None = None
        self._moving = MoveCounts()
        self._orders: list[OrderId] = []
        self._steps = _Steps()
        # When the engine last ended a step or began to work; None while it waits for work.
        self._progress_s: float | None = None
        self._sent: tuple[EngineCounts | None, MoveCounts] = None, MoveCounts()
        self._admitted: list[RequestId] = []
        # So many of them are in the numbers.
        self._covered = 0
        self._accepting = True
        self._sequence = 0
        self._sent_s = 0.0
        self._closing = threading.Event()
        # A ZMQ socket may be used by one thread at a time only.
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="llumnix-heartbeat", daemon=True)

    def start(self) -> None:
        """Connects and begins to report."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # IMMEDIATE: with no controller connected, sending fails at once instead of queueing.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        connect(self._socket, self._controller, self._keys)
        self._thread.start()

    def close(self) -> None:
        """Ends the reporting."""
        self._closing.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        self._socket.close()
        self._context.term()

    def admit(self, request: RequestId) -> None:
        """Notes that a request reached the engine. The busy loop's thread only."""
        if len(self._admitted) < ADMITTED_MAX:
            self._admitted.append(request)

    def worked(self) -> None:
        """Notes that the engine was handed something. The busy loop's thread only."""
        if self._progress_s is None:
            self._progress_s = self._clock()

    def stepped(self, seconds: float | None) -> None:
        """Notes that a step has ended, and how long it took; None if it ran no model. The busy
        loop's thread only."""
        self._progress_s = self._clock()
        if seconds is not None:
            self._steps.count += 1
            self._steps.seconds += seconds

    def rests(self) -> None:
        """Notes that the engine waits for work. The busy loop's thread only."""
        self._progress_s = None

    def due(self) -> bool:
        """Whether a report may go out again."""
        return self._clock() - self._sent_s >= REPORT_EVERY_S

    def offer(
        self,
        numbers: EngineCounts,
        moving: MoveCounts,
        orders: tuple[OrderId, ...],
        *,
        at_once: bool = False,
    ) -> int:
        """Reports the numbers of now if anything changed, and a report is due, wanted `at_once`, or
        says something of moves. Returns the number of the last report. The busy loop's thread
        only."""
        with self._sending:
            self._numbers, self._moving, self._covered = numbers, moving, len(self._admitted)
            self._orders += orders
            before, moving_before = self._sent
            of_moves = self._orders or moving != moving_before
            changed = numbers != before or self._covered
            if of_moves or (changed and (at_once or self.due())):
                self._send()
            return self._sequence

    def tell(self, fact: PrefixesChanged) -> None:
        """Passes on what changed in the prefix cache. The busy loop's thread only."""
        with self._sending:
            self._push(fact)

    def accept(self, accepting: bool) -> None:
        """Says whether the instance takes new requests. Any thread."""
        with self._sending:
            self._accepting = accepting
            self._send()

    def _beat(self) -> None:
        while not self._closing.wait(HEARTBEAT_S):
            with self._sending:
                if self._clock() - self._sent_s >= HEARTBEAT_S:
                    self._send()

    def _send(self) -> None:
        if self._numbers is None:
            return
        now = self._clock()
        self._sequence += 1
        admitted, orders, moving = self._admitted[: self._covered], self._orders, self._moving
        self._sent = self._numbers, moving
        report = compose_report(
            self._numbers,
            moving,
            instance=self._instance,
            engine_index=self._engine_index,
            sequence=self._sequence,
            admitted=admitted,
            accepting=self._accepting,
            orders=orders,
            steps=self._steps.count,
            steps_s=self._steps.seconds,
            stalled_s=self._stalled_s(self._numbers, now),
        )
        self._take_orders()
        if not self._push(LoadReported(report=report)):
            return
        self._sent_s = now
        # Named once. The busy loop may add to the list in the meantime; what it added stays.
        del self._admitted[: self._covered]
        self._covered = 0
        orders.clear()

    def _stalled_s(self, numbers: EngineCounts, now: float) -> float:
        since_s = self._progress_s
        there = bool(self._admitted) or any(c.running or c.waiting for c in numbers.classes)
        return now - since_s if there and since_s is not None else 0.0

    def _push(self, message: Message) -> bool:
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _take_orders(self) -> None:
        # To ask is cheaper than an exception.
        while int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            try:
                message = decode(self._socket.recv(zmq.NOBLOCK))
            except ProtocolError as error:
                logger.error("From the controller: %s", error)
                continue
            if isinstance(message, MoveLoad):
                self._on_order(message)
