"""When the engine's load is reported to the controller, and what a report says.

Rules
- The busy loop hands its counts over between steps, and reports go out there and then, on its own
  thread. A second thread would contend for the interpreter's lock and delay steps.
- A report goes out if something has changed, but no more often than every `REPORT_EVERY_S`: where
  steps are that short, the busy loop has no time to spare. What says something of moves goes out at
  once, and so does the last change before an engine stands still.
- A second thread, which mostly sleeps, repeats the last report when nothing was sent for
  `HEARTBEAT_S`. It also says how long the engine has stood still with requests, so that an engine
  that hangs can be told from one that has no news, and whether it carries out a call.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llumnix.core.events import LoadReported, MoveOrder
from llumnix.core.limits import HEARTBEAT_S
from llumnix.core.reports import EngineCounts, MoveCounts, compose_report
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId
from llumnix.engine.reporting.controller_socket import ControllerSocket

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
    """Reports of one run of one instance's engine."""

    def __init__(
        self,
        *,
        instance: InstanceId,
        engine_index: EngineIndex,
        controller: ControllerSocket,
        on_order: Callable[[MoveOrder], None],
        clock: Callable[[], float] = time.monotonic,
        log_dropped: Callable[[], int] = lambda: 0,
    ) -> None:
        """`on_order` is given the orders that came while the engine stood still, on the second
        thread. `clock`: monotonic, in seconds. `log_dropped`: lines that the event log has lost."""
        self._on_order = on_order
        self._clock = clock
        self._log_dropped = log_dropped
        self._instance = instance
        self._engine_index = engine_index
        self._controller = controller
        # Guards all that follows but admitted requests, steps and progress, to which the busy loop
        # alone adds.
        self._lock = threading.Lock()
        self._counts: EngineCounts | None = None
        self._moving = MoveCounts()
        self._orders: list[OrderId] = []
        self._steps = _Steps()
        # When the engine last ended a step or a call, or began to work; None while it waits for
        # work.
        self._progress_s: float | None = None
        self._in_call = False
        self._sent: tuple[EngineCounts | None, MoveCounts] = None, MoveCounts()
        self._admitted: list[RequestId] = []
        # So many of them are in the counts.
        self._covered = 0
        self._accepting = True
        self._sequence = 0
        self._sent_s = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="llumnix-heartbeat", daemon=True)

    def start(self) -> None:
        """Begins to report."""
        self._thread.start()

    def close(self) -> None:
        """Ends the reporting."""
        self._closing.set()
        self._thread.join(CLOSE_TIMEOUT_S)

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

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """While it lasts, the engine carries out a call. That is told at once, because a call may
        keep the second thread from running. The busy loop's thread only."""
        self._in_call = True
        with self._lock:
            self._send()
        try:
            yield
        finally:
            self._in_call = False
            if self._progress_s is not None:
                self._progress_s = self._clock()

    def rests(self) -> None:
        """Notes that the engine waits for work. The busy loop's thread only."""
        self._progress_s = None

    def due(self) -> bool:
        """Whether a report may go out again."""
        return self._clock() - self._sent_s >= REPORT_EVERY_S

    def offer(
        self,
        counts: EngineCounts,
        moving: MoveCounts,
        orders: tuple[OrderId, ...],
        *,
        at_once: bool = False,
    ) -> int:
        """Reports the counts of now if anything changed, and a report is due, wanted `at_once`, or
        says something of moves. Returns the number of the last report. The busy loop's thread
        only."""
        with self._lock:
            self._counts, self._moving, self._covered = counts, moving, len(self._admitted)
            self._orders += orders
            before, moving_before = self._sent
            of_moves = self._orders or moving != moving_before
            changed = counts != before or self._covered
            if of_moves or (changed and (at_once or self.due())):
                self._send()
            return self._sequence

    def accept(self, accepting: bool) -> None:
        """Says whether the instance takes new requests. Any thread."""
        with self._lock:
            self._accepting = accepting
            self._send()

    def _beat(self) -> None:
        while not self._closing.wait(HEARTBEAT_S):
            with self._lock:
                if self._clock() - self._sent_s >= HEARTBEAT_S:
                    self._send()
            for order in self._controller.poll():
                self._on_order(order)

    def _send(self) -> None:
        if self._counts is None:
            return
        now = self._clock()
        self._sequence += 1
        admitted, moving = self._admitted[: self._covered], self._moving
        self._sent = self._counts, moving
        report = compose_report(
            self._counts,
            moving,
            instance=self._instance,
            engine_index=self._engine_index,
            sequence=self._sequence,
            admitted=admitted,
            accepting=self._accepting,
            orders=self._orders,
            steps=self._steps.count,
            steps_s=self._steps.seconds,
            stalled_s=self._stalled_s(self._counts, now),
            in_call=self._in_call,
            log_dropped=self._log_dropped(),
        )
        if not self._controller.send(LoadReported(report=report)):
            return
        self._sent_s = now
        # Named once. The busy loop may add to the list in the meantime; what it added stays.
        del self._admitted[: self._covered]
        self._covered = 0
        self._orders.clear()

    def _stalled_s(self, counts: EngineCounts, now: float) -> float:
        since_s = self._progress_s
        there = bool(self._admitted) or any(c.running or c.waiting for c in counts.classes)
        return now - since_s if there and since_s is not None else 0.0
