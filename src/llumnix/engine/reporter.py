"""The llumlet's mouth: pushes the engine's load to the controller.

The engine's busy loop hands its numbers over after each step, and what changed is sent there and
then, on that thread. (A thread of its own would have to wait for the
interpreter's lock, which the busy loop holds while it polls for its workers' answer, and make the
loop wait in turn.) A second thread only repeats the last report when nothing was sent for
`HEARTBEAT_S`. With the controller gone, reports are dropped, not queued: the next one says it all.
"""

import threading
import time
from dataclasses import dataclass

import zmq

from llumnix.core.events import LoadReported
from llumnix.core.load import LoadReport
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.observe.wire import encode

HEARTBEAT_S = 0.1
CLOSE_TIMEOUT_S = 2.0
ADMITTED_MAX = 10_000
"""Requests named in one report at the most; the bookings of the rest lapse by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What the busy loop counts: tokens in whole blocks, requests."""

    kv_tokens_used: int
    kv_tokens_total: int
    running: int
    waiting: int


class LoadReporter:
    """Reports of one run of one instance's engine."""

    def __init__(self, *, instance: InstanceId, engine_index: EngineIndex, controller: str) -> None:
        self._instance = instance
        self._engine_index = engine_index
        self._controller = controller
        self._numbers: Numbers | None = None
        self._admitted: list[RequestId] = []
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
        self._socket.connect(self._controller)
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

    def offer(self, numbers: Numbers) -> None:
        """Reports the numbers of now if anything changed. The busy loop's thread only."""
        if numbers != self._numbers or self._admitted:
            with self._sending:
                self._numbers = numbers
                self._send()

    def accept(self, accepting: bool) -> None:
        """Says whether the instance takes new requests. Any thread."""
        with self._sending:
            self._accepting = accepting
            self._send()

    def _beat(self) -> None:
        while not self._closing.wait(HEARTBEAT_S):
            with self._sending:
                if time.monotonic() - self._sent_s >= HEARTBEAT_S:
                    self._send()

    def _send(self) -> None:
        if self._numbers is None:
            return
        self._sequence += 1
        admitted = self._admitted
        report = LoadReport(
            instance=self._instance,
            engine_index=self._engine_index,
            sequence=self._sequence,
            kv_tokens_used=self._numbers.kv_tokens_used,
            kv_tokens_total=self._numbers.kv_tokens_total,
            running=self._numbers.running,
            waiting=self._numbers.waiting,
            admitted=tuple(admitted),
            accepting=self._accepting,
        )
        try:
            self._socket.send(encode(LoadReported(report=report)), zmq.NOBLOCK)
        except zmq.Again:
            return
        self._sent_s = time.monotonic()
        # Named once. The busy loop may add to the list in the meantime; what it added stays.
        del admitted[: len(report.admitted)]
