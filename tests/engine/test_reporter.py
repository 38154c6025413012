"""What an engine tells the controller, how often, and how orders reach it."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from llumnix.core.events import LoadReported, MoveOrder
from llumnix.core.limits import HEARTBEAT_S
from llumnix.core.reports import ClassLoad, EngineCounts, LoadReport, MoveCounts
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId
from llumnix.engine.reporting.controller_socket import ControllerSocket
from llumnix.engine.reporting.reporter import REPORT_EVERY_S, LoadReporter
from llumnix.wire import Ping, decode, encode

PATIENCE_MS = 20_000
"""For what must come; nothing waits for it to pass."""


class Clock:
    """The reporter's; it stands still unless told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Controller:
    """A socket that reports arrive at."""

    def __init__(self, address: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(address)
        self.engine = b""

    def send(self, *payloads: bytes) -> None:
        """To the engine that was heard last."""
        for payload in payloads:
            self.socket.send_multipart([self.engine, payload])

    def next(self) -> LoadReport:
        """The next report, which must come."""
        assert self.socket.poll(PATIENCE_MS), "no report came"
        self.engine, payload = self.socket.recv_multipart()
        message = decode(payload)
        assert isinstance(message, LoadReported)
        return message.report


class Pair:
    """A reporter whose clock stands still, connected, and its controller."""

    def __init__(self, address: str) -> None:
        self.clock = Clock()
        self.controller = Controller(address)
        self.orders: list[MoveOrder] = []
        self.socket = ControllerSocket(address)
        self.reporter = LoadReporter(
            instance=InstanceId("i"),
            engine_index=EngineIndex(0),
            controller=self.socket,
            on_order=self.orders.append,
            clock=self.clock,
        )
        self.socket.open()
        self.reporter.start()
        self.reporter.offer(numbers(0), MoveCounts(), ())
        self.heartbeat()  # Tried again until it is connected.

    def offer(
        self,
        used: int,
        moving: MoveCounts | None = None,
        orders: tuple[OrderId, ...] = (),
        *,
        running: int = 0,
        at_once: bool = False,
    ) -> None:
        self.reporter.offer(numbers(used, running), moving or MoveCounts(), orders, at_once=at_once)

    def heartbeat(self) -> LoadReport:
        """What the second thread says after a silence."""
        self.clock.now_s += HEARTBEAT_S + 1e-6
        return self.controller.next()

    def until(self, used: int) -> list[LoadReport]:
        """All reports up to the one with that many tokens used, which is sent now."""
        self.offer(used, at_once=True)
        found = [self.controller.next()]
        while found[-1].kv_tokens_used != used:
            found.append(self.controller.next())
        return found


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    one = Pair(f"ipc://{tmp_path}/controller")
    yield one
    one.reporter.close()
    one.socket.close()
    one.controller.socket.close()


def an_order(number: int, sequence: int = 0) -> MoveOrder:
    return MoveOrder(
        order=OrderId(number), source=InstanceId("i"), source_engine=EngineIndex(0),
        destination=InstanceId("j"), destination_engine=EngineIndex(1), limits=(), why="drawn",
        source_sequence=sequence,
    )  # fmt: skip


def numbers(used: int, running: int = 0) -> EngineCounts:
    return EngineCounts(
        kv_tokens_used=used, kv_tokens_total=1000, prefill_tokens=0, block_tokens=1, slots=8,
        classes=(ClassLoad(running=running),), head_tokens=0, kv_token_bytes=1, preemptions=0,
        finished=0, finished_tokens=0,
    )  # fmt: skip


def test_steps_that_follow_fast_share_a_report_and_the_last_word_is_told(pair: Pair) -> None:
    step_s = REPORT_EVERY_S / 10 + 1e-9
    for used in range(1, 301):
        pair.clock.now_s += step_s
        pair.reporter.stepped(step_s)
        pair.offer(used)
    reports = pair.until(1000)
    assert (reports[-1].kv_tokens_used, reports[-1].steps) == (1000, 300)
    assert len(reports) == 31, "one in ten steps, and the last word"


def test_what_says_something_of_moves_does_not_wait(pair: Pair) -> None:
    pair.offer(1, at_once=True)
    pair.offer(2, MoveCounts(out=1))
    pair.offer(3, MoveCounts(out=1), (OrderId(7),))
    pair.offer(4, MoveCounts(out=1))
    _, moving, order, last = pair.until(9)
    assert (moving.moving_out, moving.kv_tokens_used) == (1, 2)
    assert (order.orders, order.kv_tokens_used) == ((7,), 3)
    assert last.kv_tokens_used == 9


def test_whether_it_takes_requests_is_said_at_once_and_from_then_on(pair: Pair) -> None:
    for accepting in (False, True):
        pair.reporter.accept(accepting)
        assert pair.controller.next().accepting == accepting
        assert pair.heartbeat().accepting == accepting


def test_a_request_is_named_only_with_numbers_that_count_it(pair: Pair) -> None:
    pair.reporter.admit(RequestId("r"))
    # A heartbeat knows the numbers from before it came.
    assert [pair.heartbeat().admitted, pair.heartbeat().admitted] == [(), ()]
    assert [r.admitted for r in pair.until(2)] == [("r",)]
    assert [r.admitted for r in pair.until(3)] == [()]


def test_what_a_lost_report_named_is_named_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.reporter.admit(RequestId("r"))
    with monkeypatch.context() as away:
        away.setattr(pair.socket, "send", lambda message: False)
        pair.offer(1, orders=(OrderId(7),))
    pair.reporter.admit(RequestId("s"))
    pair.offer(2)
    again, last = pair.until(9)
    assert (again.orders, again.admitted, again.kv_tokens_used) == ((7,), ("r", "s"), 2)
    assert (last.orders, last.admitted) == ((), ())


def test_an_engine_that_hangs_in_a_step_says_for_how_long(pair: Pair) -> None:
    pair.reporter.worked()
    pair.offer(1, running=1, at_once=True)
    assert pair.controller.next().stalled_s == 0
    pair.clock.now_s += 0.04
    pair.reporter.stepped(0.04)
    pair.offer(2, running=1)
    assert pair.controller.next().stalled_s == 0
    stalled = [pair.heartbeat().stalled_s for _ in range(30)]
    assert stalled == pytest.approx([(n + 1) * HEARTBEAT_S for n in range(30)], abs=1e-4)
    pair.reporter.stepped(3.0)
    pair.offer(3, running=1, at_once=True)
    assert pair.controller.next().stalled_s == 0


def test_an_engine_that_waits_for_work_does_not_stand_still_whatever_it_holds(pair: Pair) -> None:
    pair.reporter.stepped(0.01)
    pair.reporter.rests()  # It is paused, say, or a session waits for its next input.
    pair.offer(1, running=1, at_once=True)
    assert [pair.controller.next().stalled_s, pair.heartbeat().stalled_s] == [0, 0]


def test_an_engine_without_requests_does_not_stand_still(pair: Pair) -> None:
    pair.reporter.worked()  # It loads an adapter.
    assert pair.heartbeat().stalled_s == 0
    pair.reporter.admit(RequestId("r"))
    assert pair.heartbeat().stalled_s == pytest.approx(2 * HEARTBEAT_S, abs=1e-4)


def test_a_call_is_told_as_it_begins_and_is_no_part_of_a_step(pair: Pair) -> None:
    pair.reporter.stepped(0.01)
    pair.offer(1, running=1, at_once=True)
    assert not pair.controller.next().in_call
    with pair.reporter.call():
        assert pair.controller.next().in_call, "before the second thread comes to it"
        report = pair.heartbeat()
        assert (report.in_call, report.stalled_s > 0) == (True, True)
    assert not pair.heartbeat().in_call
    assert pair.heartbeat().stalled_s == pytest.approx(2 * HEARTBEAT_S, abs=1e-4)


def test_a_call_to_an_engine_without_work_leaves_it_without(pair: Pair) -> None:
    pair.reporter.stepped(0.01)
    pair.offer(1, running=1, at_once=True)
    pair.controller.next()
    pair.reporter.rests()
    with pair.reporter.call():
        pair.controller.next()
    assert pair.heartbeat().stalled_s == 0


def test_an_idle_engine_that_hangs_in_its_first_step_is_not_older_than_that_step(
    pair: Pair,
) -> None:
    pair.reporter.stepped(0.01)
    pair.reporter.rests()
    for _ in range(50):
        pair.heartbeat()
    pair.reporter.worked()
    pair.reporter.admit(RequestId("r"))
    assert pair.heartbeat().stalled_s == pytest.approx(HEARTBEAT_S, abs=1e-4)


# -- orders --------------------------------------------------------------------------------------


def test_orders_are_there_at_the_next_look_and_what_makes_no_sense_is_passed_over(
    tmp_path: Path,
) -> None:
    """No report has to go out first: the busy loop looks before and after every step."""
    address = f"ipc://{tmp_path}/controller"
    controller, engine = Controller(address), ControllerSocket(address)
    engine.open()
    try:
        assert engine.poll() == []
        while not engine.send(Ping(number=0)):
            pass  # It is not connected yet.
        controller.engine = controller.socket.recv_multipart()[0]
        orders = [an_order(1, 4), an_order(2, 5)]
        controller.send(encode(orders[0]), b"nonsense", encode(Ping(number=1)), encode(orders[1]))
        found: list[MoveOrder] = []
        while len(found) < 2:
            assert engine._socket.poll(PATIENCE_MS), "no order came"
            found += engine.poll()
        assert found == orders
        assert engine.poll() == []
    finally:
        engine.close()
        controller.socket.close()


def test_without_a_controller_nothing_is_queued(tmp_path: Path) -> None:
    engine = ControllerSocket(f"ipc://{tmp_path}/nobody")
    engine.open()
    assert not engine.send(Ping(number=0))
    engine.close()


def test_an_engine_that_stands_still_gets_its_orders_from_the_second_thread(pair: Pair) -> None:
    pair.controller.send(encode(an_order(7)))
    end_s = time.monotonic() + PATIENCE_MS / 1e3
    while not pair.orders:
        assert time.monotonic() < end_s, "no order came"
        time.sleep(0.01)
    assert [order.order for order in pair.orders] == [7]
