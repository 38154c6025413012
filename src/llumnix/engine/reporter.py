"""The llumlet's mouth: pushes the engine's load to the controller.

The engine's busy loop leaves its latest numbers here after each step (no lock, no I/O on that
thread); a thread of its own sends them, at most once a step and at least every
`HEARTBEAT_S`. With the controller gone, reports are dropped, not queued: the next one says it all.
"""

import threading
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
    """Reports of one run of one instance's engine. `offer` is for the busy loop's thread only."""

    def __init__(self, *, instance: InstanceId, engine_index: EngineIndex, controller: str) -> None:
        self._instance = instance
        self._engine_index = engine_index
        self._controller = controller
        self._numbers: Numbers | None = None
        self._admitted: list[RequestId] = []
        self._accepting = True
        self._changed = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="llumnix-reporter", daemon=True)

    def start(self) -> None:
        """Begins to report."""
        self._thread.start()

    def close(self) -> None:
        """Ends the reporting."""
        self._closing = True
        self._changed.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def admit(self, request: RequestId) -> None:
        """Notes that a request reached the engine."""
        if len(self._admitted) < ADMITTED_MAX:
            self._admitted.append(request)

    def offer(self, numbers: Numbers) -> None:
        """Leaves the numbers of now, to be sent if anything changed."""
        if numbers != self._numbers or self._admitted:
            self._numbers = numbers
            self._changed.set()

    def accept(self, accepting: bool) -> None:
        """Says whether the instance takes new requests. Any thread."""
        self._accepting = accepting
        self._changed.set()

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            # IMMEDIATE: with no controller connected, sending fails at once instead of queueing.
            socket.setsockopt(zmq.IMMEDIATE, 1)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._controller)
            sequence = 0
            unsent: list[RequestId] = []
            while not self._closing:
                self._changed.wait(HEARTBEAT_S)
                self._changed.clear()
                numbers = self._numbers
                if numbers is None:
                    continue
                admitted, self._admitted = self._admitted, []
                unsent += admitted
                sequence += 1
                report = LoadReport(
                    instance=self._instance,
                    engine_index=self._engine_index,
                    sequence=sequence,
                    kv_tokens_used=numbers.kv_tokens_used,
                    kv_tokens_total=numbers.kv_tokens_total,
                    running=numbers.running,
                    waiting=numbers.waiting,
                    admitted=tuple(unsent),
                    accepting=self._accepting,
                )
                try:
                    socket.send(encode(LoadReported(report=report)), zmq.NOBLOCK)
                    unsent.clear()
                except zmq.Again:
                    del unsent[:-ADMITTED_MAX]
