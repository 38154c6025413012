"""Between hosts the controller, the llumlets and who speaks to them let in nobody without keys."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from llumnix.cluster.controller import Controller
from llumnix.core.messages import CancelMigration
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import MigrationId
from llumnix.engine.migration.peers import Peers
from llumnix.engine.reporting.controller_socket import ControllerSocket
from llumnix.frontend.controller_link import ControllerLink
from llumnix.sockets import Listening, SocketKeys, connect
from llumnix.wire import Ping, Pong, decode, encode
from support.server import free_port

WAIT_MS = 10_000
QUIET_MS = 300
KEYS = SocketKeys.make()
STRANGER = SocketKeys.make()


def address() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


@pytest.fixture
def speaker() -> Iterator[Callable[..., Any]]:
    """Connects a socket of this kind to an address with these keys."""
    with zmq.Context() as context:
        context.setsockopt(zmq.LINGER, 0)

        def made(kind: int, where: str, keys: SocketKeys | None) -> Any:
            socket = context.socket(kind)
            connect(socket, where, keys)
            return socket

        yield made
        context.destroy(0)


def test_the_controller_answers_members_alone(speaker: Callable[..., Any]) -> None:
    where = address()
    controller = Controller([where], SchedulerSettings(), keys=KEYS)
    thread = threading.Thread(target=controller.run, daemon=True)
    thread.start()
    try:
        strangers = [speaker(zmq.DEALER, where, keys) for keys in (None, STRANGER)]
        for number, socket in enumerate([*strangers, member := speaker(zmq.DEALER, where, KEYS)]):
            socket.send(encode(Ping(number=number)))
        assert member.poll(WAIT_MS)
        assert decode(member.recv()) == Pong(number=2)
        assert not any(socket.poll(QUIET_MS) for socket in strangers)
    finally:
        controller.stop()
        thread.join(WAIT_MS / 1e3)
    assert not thread.is_alive()


def test_a_llumlet_hears_members_alone(speaker: Callable[..., Any]) -> None:
    heard: list[Any] = []
    came = threading.Event()

    def on_message(message: Any) -> None:
        heard.append(message)
        came.set()

    hearing = Peers("tcp://127.0.0.1:0", on_message, lambda: None, KEYS)
    saying = Peers("tcp://127.0.0.1:0", lambda message: None, lambda: None, KEYS)
    with contextlib.ExitStack() as stack:
        for peers in (hearing, saying):
            peers.bind()
            peers.start()
            stack.callback(peers.close)
        forged = encode(CancelMigration(migration=MigrationId("forged"), why=""))
        for keys in (None, STRANGER):
            speaker(zmq.PUSH, hearing.address, keys).send(forged, zmq.NOBLOCK)
        ours = CancelMigration(migration=MigrationId("ours"), why="")
        saying.send(hearing.address, ours)
        assert came.wait(WAIT_MS / 1e3)
        assert not threading.Event().wait(QUIET_MS / 1e3)
    assert heard == [ours]


async def test_frontend_and_engine_reach_a_controller_that_wants_keys() -> None:
    with zmq.Context() as context:
        guard = Listening(context, KEYS)
        with context.socket(zmq.ROUTER) as controller:
            guard.bind(controller, "tcp://127.0.0.1:0")
            where = controller.getsockopt_string(zmq.LAST_ENDPOINT)
            link = ControllerLink(where, KEYS)
            link.start()
            engine = ControllerSocket(where, KEYS)
            engine.open()
            try:
                for socket in (link._socket, engine._socket):
                    assert socket.poll(WAIT_MS, zmq.POLLOUT), "the line never came up"
            finally:
                engine.close()
                link.close()
        guard.close()
