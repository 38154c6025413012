"""What a llumlet tells the controller, and how often."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from llumnix.core.events import LoadReported, MoveLoad
from llumnix.core.llumlet import Moving
from llumnix.core.load import ClassLoad, LoadReport
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId
from llumnix.engine.load_reader import Numbers
from llumnix.engine.reporter import HEARTBEAT_S, REPORT_EVERY_S, LoadReporter
from llumnix.observe.wire import decode


class Controller:
    """A socket that reports arrive at."""

    def __init__(self, address: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(address)

    def heard(self, within_s: float) -> list[LoadReport]:
        found, end = [], time.monotonic() + within_s
        while self.socket.poll(max(0, round((end - time.monotonic()) * 1e3))):
            message = decode(self.socket.recv_multipart()[1])
            assert isinstance(message, LoadReported)
            found.append(message.report)
        return found


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[LoadReporter, Controller]]:
    address = f"ipc://{tmp_path}/controller"
    controller = Controller(address)
    orders: list[MoveLoad] = []
    reporter = LoadReporter(
        instance=InstanceId("i"),
        engine_index=EngineIndex(0),
        controller=address,
        on_order=orders.append,
    )
    reporter.start()
    reporter.offer(numbers(0), Moving(), (), at_once=True)
    end = time.monotonic() + 5
    while not controller.heard(0.05):  # Once it is connected, a heartbeat at the latest comes.
        assert time.monotonic() < end
    yield reporter, controller
    reporter.close()
    controller.socket.close()


def numbers(used: int) -> Numbers:
    return Numbers(
        kv_tokens_used=used, kv_tokens_total=1000, prefill_tokens=0, block_tokens=1, slots=8,
        classes=(ClassLoad(),), head_tokens=0, kv_token_bytes=1, preemptions=0, finished=0,
        finished_tokens=0,
    )  # fmt: skip


def test_steps_that_follow_fast_share_a_report_and_the_last_word_is_told(pair) -> None:
    reporter, controller = pair
    began = time.monotonic()
    for used in range(1, 301):
        reporter.stepped(1e-4)
        reporter.offer(numbers(used), Moving(), ())
        time.sleep(1e-4)
    reporter.offer(numbers(1000), Moving(), (), at_once=True)
    took_s = time.monotonic() - began
    reports = controller.heard(0.05)
    assert (reports[-1].kv_tokens_used, reports[-1].steps) == (1000, 300)
    assert 2 <= len(reports) <= took_s / REPORT_EVERY_S + 2


def test_what_says_something_of_moves_does_not_wait(pair) -> None:
    reporter, controller = pair
    reporter.offer(numbers(1), Moving(), (), at_once=True)
    reporter.offer(numbers(2), Moving(out=1), ())
    reporter.offer(numbers(3), Moving(out=1), (OrderId(7),))
    reporter.offer(numbers(4), Moving(out=1), ())
    *_, moving, order = controller.heard(HEARTBEAT_S / 2)
    assert (moving.moving_out, moving.kv_tokens_used) == (1, 2)
    assert (order.orders, order.kv_tokens_used) == ((7,), 3)


def test_a_request_is_named_only_with_numbers_that_count_it(pair) -> None:
    reporter, controller = pair
    reporter.offer(numbers(1), Moving(), (), at_once=True)
    reporter.admit(RequestId("r"))
    named = [r.admitted for r in controller.heard(2.5 * HEARTBEAT_S)]
    # A heartbeat knows the numbers from before it came.
    assert named[:2] == [(), ()]
    assert not any(named)
    reporter.offer(numbers(2), Moving(), (), at_once=True)
    (report,) = controller.heard(HEARTBEAT_S / 2)
    assert (report.admitted, report.kv_tokens_used) == (("r",), 2)
    reporter.offer(numbers(3), Moving(), (), at_once=True)
    assert [r.admitted for r in controller.heard(HEARTBEAT_S / 2)] == [()]
