"""The frontend's line to the controller: answers, slow ones, and none."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from prometheus_client import REGISTRY

from llumnix.core.events import AddInstances, Dispatch, RequestArrived, ScalingDecision
from llumnix.core.reports import LoadReport
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.frontend.controller_link import DECISIONS_MAX, REPLY_TIMEOUT_S, ControllerLink
from llumnix.wire import Loads, LoadsAsked, Message, Ping, Pong, decode, encode
from support.counted import counted

REPORT = LoadReport(
    instance=InstanceId("i0"), engine_index=EngineIndex(0), sequence=1, kv_tokens_used=1,
    kv_tokens_total=2,
)  # fmt: skip


class FakeController:
    """Answers every request and ping, on a thread of its own. `answering`: while it is not set, it
    takes questions and answers nothing; what came then is answered later."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.answering = threading.Event()
        self.answering.set()
        self.taken: list[Message] = []
        self.also: list[bytes] = []
        self._stop = threading.Event()
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        unanswered: list[tuple[bytes, Message]] = []
        while not self._stop.is_set():
            if self._socket.poll(20):
                sender, payload = self._socket.recv_multipart()
                self.taken.append(decode(payload))
                unanswered.append((sender, self.taken[-1]))
            while unanswered and self.answering.is_set():
                sender, message = unanswered.pop(0)
                for more in self.also:
                    self._socket.send_multipart((sender, more))
                self._socket.send_multipart((sender, encode(_answer(message))))
        self._socket.close()

    def requests(self) -> list[str]:
        return [m.request for m in self.taken if isinstance(m, RequestArrived)]


def _answer(message: Message) -> Message:
    if isinstance(message, Ping):
        return Pong(number=message.number)
    if isinstance(message, LoadsAsked):
        return Loads(number=message.number, reports=[REPORT], log_dropped=3)
    assert isinstance(message, RequestArrived)
    return Dispatch(
        request=message.request,
        instance=InstanceId("i"),
        engine_index=EngineIndex(3),
        why="",
    )


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[FakeController]:
    one = FakeController(f"ipc://{tmp_path}/controller")
    yield one
    one.stop()


def asked(name: str) -> RequestArrived:
    return RequestArrived(request=RequestId(name), prompt_tokens=1, priority=0, prefix=())


async def up(link: ControllerLink) -> None:
    """Connected: the first question may find nobody there yet, and then a ping does."""
    link.start()
    await asyncio.sleep(0.3)
    while await link.place(asked("first")) is None:
        await asyncio.sleep(0.05)


def patient(link: ControllerLink) -> None:
    """However slow this machine is, it does not give up."""
    link._probing.cancel()


def test_many_questions_at_a_time_get_each_its_own_answer(controller: FakeController) -> None:
    async def main() -> list[str]:
        link = ControllerLink(controller.address)
        await up(link)
        patient(link)
        found = []
        for first in range(0, 500, 50):
            asking = [link.place(asked(f"r{n}")) for n in range(first, first + 50)]
            found += [answer.request for answer in await asyncio.gather(*asking)]
        assert link.up
        link.close()
        return found

    assert asyncio.run(asyncio.wait_for(main(), 60)) == [f"r{n}" for n in range(500)]


def test_a_slow_answer_holds_up_nothing_else(controller: FakeController) -> None:
    async def main() -> None:
        link = ControllerLink(controller.address)
        await up(link)
        patient(link)
        controller.answering.clear()
        asking = [asyncio.create_task(link.place(asked(f"r{n}"))) for n in range(5)]
        for _ in range(100):
            await asyncio.sleep(0)
        assert not any(task.done() for task in asking)
        controller.answering.set()
        answers = await asyncio.gather(*asking)
        assert [a.request for a in answers if a] == [f"r{n}" for n in range(5)]
        link.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_without_an_answer_the_frontend_goes_on_alone_until_a_ping_is_answered(
    controller: FakeController,
) -> None:
    async def main() -> None:
        link = ControllerLink(controller.address)
        await up(link)
        controller.answering.clear()
        began = time.monotonic()
        assert await link.place(asked("late")) is None
        assert time.monotonic() - began >= REPLY_TIMEOUT_S
        assert not link.up
        assert await link.place(asked("at once")) is None
        controller.answering.set()
        while not link.up:
            await asyncio.sleep(0.01)
        while await link.place(asked("again")) is None:
            await asyncio.sleep(0.01)
        asked_for = controller.requests()
        assert "late" in asked_for
        assert "at once" not in asked_for, "it is not asked while it does not answer"
        link.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_an_answer_that_came_while_the_event_loop_stood_still_is_not_late(
    controller: FakeController,
) -> None:
    async def main() -> None:
        link = ControllerLink(controller.address)
        await up(link)
        # The loop may come to its timers before it looks at sockets.
        asyncio.get_running_loop().remove_reader(link._readable)
        controller.answering.clear()  # Else the answer may be taken in by the call that sends.
        asking = asyncio.create_task(link.place(asked("r")))
        await asyncio.sleep(0)
        controller.answering.set()
        assert link._socket.poll(60_000)
        time.sleep(2 * REPLY_TIMEOUT_S)
        answer = await asking
        still_up = link.up
        link.close()
        assert isinstance(answer, Dispatch)
        assert still_up

    asyncio.run(asyncio.wait_for(main(), 60))


def test_without_a_controller_there_is_no_waiting(tmp_path: Path) -> None:
    async def main() -> None:
        link = ControllerLink(f"ipc://{tmp_path}/nobody")
        link.start()
        placing = link.place(asked("r"))
        with pytest.raises(StopIteration) as ended:
            placing.send(None)  # The first time that it would wait for anything it came back here.
        assert ended.value.value is None
        link.close()

    asyncio.run(main())


def test_a_ping_is_answered_or_not(controller: FakeController) -> None:
    async def main() -> None:
        link = ControllerLink(controller.address)
        await up(link)
        pong = await link.ping(60)
        assert isinstance(pong, Pong)
        controller.answering.clear()
        assert await link.ping(0.01) is None
        link.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_cancellation_that_comes_together_with_the_answer_is_not_lost(tmp_path: Path) -> None:
    async def main() -> None:
        link = ControllerLink(f"ipc://{tmp_path}/nobody")
        link.start()
        link._send = lambda _: None  # type: ignore[method-assign]
        pinging = asyncio.create_task(link.ping(60))
        while not link._replies:
            await asyncio.sleep(0)
        (number,) = link._replies
        link._heard(Pong(number=number))
        pinging.cancel()
        await asyncio.wait({pinging})
        link.close()
        assert pinging.cancelled()

    asyncio.run(main())


def test_what_the_controller_should_not_say_and_what_fails_harm_no_question(
    controller: FakeController, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: ScalingDecision) -> None:
        raise KeyError("a bug")

    async def main() -> None:
        link = ControllerLink(controller.address)
        link._decided = fails  # type: ignore[method-assign]
        await up(link)
        patient(link)
        controller.also = [
            b"",
            b"nothing of ours",
            encode(Ping(number=1)),
            encode(AddInstances(count=1, total=9, why="")),
        ]
        assert await link.place(asked("r")) is not None
        assert link.up
        link.close()

    asyncio.run(asyncio.wait_for(main(), 60))
    assert "not for a frontend: Ping" in caplog.text
    assert "a bug" in caplog.text


def test_decisions_wait_for_the_fleet_in_order_and_a_bounded_number_of_them(
    controller: FakeController, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        link = ControllerLink(controller.address)
        await up(link)
        patient(link)
        controller.also = [
            encode(AddInstances(count=1, total=9, why=f"load {n}"))
            for n in range(DECISIONS_MAX + 1)
        ]
        assert await link.place(asked("r")) is not None
        waiting = [link.decisions.get_nowait().why for _ in range(link.decisions.qsize())]
        assert waiting == [f"load {n}" for n in range(DECISIONS_MAX)]
        link.close()

    asyncio.run(asyncio.wait_for(main(), 60))
    assert f"A decision of the controller's was dropped: load {DECISIONS_MAX}" in caplog.text


def test_what_the_controller_knows_is_asked_of_it_and_none_is_known_without_one(
    controller: FakeController,
) -> None:
    async def main() -> None:
        link = ControllerLink(controller.address)
        await up(link)
        assert await link.loads() == [REPORT]
        told = await link.told()
        assert told is not None
        assert told.log_dropped == 3
        controller.answering.clear()
        assert await link.loads() is None
        link.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def up_now() -> float | None:
    return REGISTRY.get_sample_value("llumnix_controller_up", {"process": "f7"})


def test_a_frontend_that_places_requests_by_itself_is_counted(controller: FakeController) -> None:
    async def main() -> None:
        link = ControllerLink(controller.address, process="f7")
        looks: list[int] = []
        link.on_look = lambda: looks.append(1)
        await up(link)
        assert up_now() == 1
        with counted(each_request=True) as found:
            await asyncio.sleep(0.2)
        assert 0 < found["loop_lag_seconds_count f7"] <= len(looks)
        controller.answering.clear()
        with counted(each_request=True) as found:
            assert await link.place(asked("late")) is None
        assert up_now() == 0
        assert found["controller_bypasses_total"] == 1
        controller.answering.set()
        with counted(each_request=True) as found:
            while not link.up:
                await asyncio.sleep(0.01)
        assert up_now() == 1
        assert "controller_bypasses_total" not in found
        link.close()

    asyncio.run(asyncio.wait_for(main(), 60))
