"""The frontend's line to the controller: answers, slow ones, and none."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from llumnix.core.events import Dispatch, RequestArrived
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.frontend.controller_link import REPLY_TIMEOUT_S, ControllerLink
from llumnix.observe.wire import Ping, Pong, decode, encode


class FakeController:
    """Answers every request after `delay_s`, on a thread of its own."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.delay_s = 0.0
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
        while not self._stop.is_set():
            if not self._socket.poll(20):
                continue
            sender, payload = self._socket.recv_multipart()
            message = decode(payload)
            if isinstance(message, Ping):
                answer: Pong | Dispatch = Pong(number=message.number)
            else:
                time.sleep(self.delay_s)
                answer = Dispatch(
                    request=message.request,
                    instance=InstanceId("i"),
                    engine_index=EngineIndex(3),
                    why="",
                )
            self._socket.send_multipart((sender, encode(answer)))
        self._socket.close()


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


def test_many_questions_at_a_time_get_each_its_own_answer(controller: FakeController) -> None:
    async def main() -> list[str]:
        link = ControllerLink(controller.address)
        await up(link)
        found = []
        for first in range(0, 500, 50):
            asking = [link.place(asked(f"r{n}")) for n in range(first, first + 50)]
            found += [answer.request for answer in await asyncio.gather(*asking)]
        assert link.up
        link.close()
        return found

    assert asyncio.run(asyncio.wait_for(main(), 20)) == [f"r{n}" for n in range(500)]


def test_a_slow_answer_holds_up_nothing_else(controller: FakeController) -> None:
    async def main() -> tuple[list[Dispatch], int]:
        link = ControllerLink(controller.address)
        await up(link)
        controller.delay_s = 0.02
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                await asyncio.sleep(0.001)
                beats += 1

        beating = asyncio.create_task(beat())
        answers = await asyncio.gather(*(link.place(asked(f"r{n}")) for n in range(5)))
        beating.cancel()
        link.close()
        return answers, beats

    answers, beats = asyncio.run(main())
    assert [a.request for a in answers] == [f"r{n}" for n in range(5)]
    assert beats > 20


def test_without_an_answer_the_frontend_goes_on_alone_until_a_ping_is_answered(
    controller: FakeController,
) -> None:
    async def main() -> tuple[float, bool, bool]:
        link = ControllerLink(controller.address)
        await up(link)
        controller.delay_s = 2 * REPLY_TIMEOUT_S
        began = time.monotonic()
        assert await link.place(asked("late")) is None
        took_s, down = time.monotonic() - began, not link.up
        assert await link.place(asked("at once")) is None
        controller.delay_s = 0.0
        while not link.up:
            await asyncio.sleep(0.05)
        back = await link.place(asked("again")) is not None
        link.close()
        return took_s, down, back

    took_s, down, back = asyncio.run(asyncio.wait_for(main(), 20))
    assert REPLY_TIMEOUT_S <= took_s < 1.8 * REPLY_TIMEOUT_S
    assert (down, back) == (True, True)


def test_without_a_controller_there_is_no_waiting(tmp_path: Path) -> None:
    async def main() -> float:
        link = ControllerLink(f"ipc://{tmp_path}/nobody")
        link.start()
        began = time.monotonic()
        assert await link.place(asked("r")) is None
        link.close()
        return time.monotonic() - began

    assert asyncio.run(main()) < REPLY_TIMEOUT_S / 2
