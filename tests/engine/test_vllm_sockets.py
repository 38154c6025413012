"""vLLM's own sockets between engine core and frontends, with our options."""

import contextlib
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

pytest.importorskip("vllm")

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, core

from llumnix.engine.vllm_sockets import RECONNECT_MAX_MS, prepare_sockets
from llumnix.sockets import Listening, SocketKeys

WAIT_MS = 10_000


@pytest.mark.parametrize(
    ("listens", "connects", "more"),
    [(zmq.ROUTER, zmq.DEALER, {"identity": b"\x07\x00", "bind": False}), (zmq.PULL, zmq.PUSH, {})],
)
def test_an_engine_cores_sockets_get_the_deployments_keys(
    listens: int, connects: int, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = SocketKeys.make()
    stock = core.make_zmq_socket
    monkeypatch.setattr(core, "make_zmq_socket", stock)
    prepare_sockets(keys, 1)
    with zmq.Context() as context:
        guard = Listening(context, keys)
        with context.socket(listens) as ours:
            guard.bind(ours, "tcp://127.0.0.1:0")
            address = ours.getsockopt_string(zmq.LAST_ENDPOINT)
            with zmq.Context() as theirs:
                stranger = stock(theirs, address, connects, linger=0, **more)
                stranger.send(b"no key")
                with zmq.Context() as engines:
                    engine = core.make_zmq_socket(engines, address, connects, linger=0, **more)
                    engine.send(b"ready")
                    assert ours.poll(WAIT_MS)
                    assert ours.recv_multipart()[-1] == b"ready"
                    assert not ours.poll(100)
                    engine.close()
                stranger.close()
        guard.close()


@pytest.mark.parametrize(("frontends", "most_ms"), [(1, 0), (2, RECONNECT_MAX_MS)])
def test_an_engine_of_several_frontends_tries_seldom_to_reach_those_that_have_not_come(
    frontends: int, most_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = core.make_zmq_socket
    monkeypatch.setattr(core, "make_zmq_socket", stock)
    prepare_sockets(None, frontends)
    with (
        zmq.Context() as context,
        core.make_zmq_socket(context, "ipc:///nowhere", zmq.PUSH, linger=0) as socket,
    ):
        real = socket if frontends == 1 else socket._socket
        assert real.getsockopt(zmq.RECONNECT_IVL_MAX) == most_ms
    assert (core.make_zmq_socket is stock) == (frontends == 1)


class Relay:
    """Stands between an engine and the frontend that listens at `port`."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                pair = [
                    self._listener.accept()[0],
                    socket.create_connection(("127.0.0.1", self._to)),
                ]
                self._open += pair
                for one, other in (pair, pair[::-1]):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)

    def reset(self) -> None:
        """As a firewall that forgets its connections does."""
        while self._open:
            one = self._open.pop()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        self.reset()
        self._listener.close()


@pytest.mark.parametrize(
    ("listens", "connects", "more"),
    [(zmq.ROUTER, zmq.DEALER, {"identity": b"\x07\x00", "bind": False}), (zmq.PULL, zmq.PUSH, {})],
)
def test_a_connection_that_breaks_and_is_made_again_is_noticed_and_a_late_first_one_is_not(
    listens: int, connects: int, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, again = SocketKeys.make(), list[str]()
    monkeypatch.setattr(core, "make_zmq_socket", core.make_zmq_socket)
    prepare_sockets(keys, 1, on_again=again.append)
    with zmq.Context() as context, zmq.Context() as engines:
        guard = Listening(context, keys)
        ours = context.socket(listens)
        guard.bind(ours, "tcp://127.0.0.1:0")
        port = int(ours.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        relay = Relay(port)
        engine = core.make_zmq_socket(engines, relay.address, connects, linger=0, **more)
        late = core.make_zmq_socket(engines, "tcp://127.0.0.1:9", connects, linger=0, **more)
        engine.send(b"ready")
        assert ours.poll(WAIT_MS)
        assert ours.recv_multipart()[-1] == b"ready"
        time.sleep(0.05)
        assert again == []
        relay.reset()
        within(lambda: again == [relay.address])
        late.close()
        relay.close()
        guard.close()
        ours.close()


ENDING = """
from llumnix.engine import vllm_sockets
vllm_sockets._end_process("tcp://there")
"""


def test_the_engine_that_a_frontend_got_back_ends_and_says_why() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ENDING], capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 1
    assert "The connection to the frontend at tcp://there broke" in ended.stderr


LARGE = 1_000_000
"""Bytes of an output that vLLM sends without copying it."""


class Sending:
    """vLLM's output thread over two frontends, of which the second never comes."""

    def __init__(self, here: str, nowhere: str) -> None:
        self.engine: Any = SimpleNamespace(
            output_queue=queue.Queue(),
            _send_msg_tracking_payload=self.send,
        )
        self.sent: list[tuple[Any, Any]] = []  # sockets and trackers
        self.thread = threading.Thread(
            target=core.EngineCoreProc.process_output_sockets,
            args=(self.engine, [here, nowhere], None, 0),
            daemon=True,
        )
        self.thread.start()

    def send(self, socket: Any, buffers: Any) -> Any:
        tracker = core.EngineCoreProc._send_msg_tracking_payload(socket, buffers)
        self.sent.append((socket, tracker))
        return tracker

    def say(self, client: int, size: int = LARGE) -> Any:
        """The tracker of what is sent."""
        before = len(self.sent)
        output = EngineCoreOutput("r", [], stop_reason="x" * size)
        self.engine.output_queue.put((client, EngineCoreOutputs(outputs=[output])))
        within(lambda: len(self.sent) > before)
        return self.sent[-1][1]

    def end(self) -> None:
        self.engine.output_queue.put(core.EngineCoreProc.ENGINE_CORE_DEAD)
        self.thread.join(WAIT_MS / 1e3)


def within(true: Any) -> None:
    end = time.monotonic() + WAIT_MS / 1e3
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_what_is_said_to_a_frontend_that_is_lost_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "make_zmq_socket", core.make_zmq_socket)
    lost = prepare_sockets(None, 2)
    with zmq.Context() as context, context.socket(zmq.PULL) as frontend:
        frontend.bind(f"ipc://{tmp_path}/0")
        sending = Sending(f"ipc://{tmp_path}/0", f"ipc://{tmp_path}/1")
        kept = [sending.say(1), sending.say(1)]
        time.sleep(0.05)
        assert not any(tracker.done for tracker in kept), "nobody has read it"
        lost.add(1)
        assert sending.say(1, 0).done
        within(lambda: all(tracker.done for tracker in kept))
        assert sending.say(1).done
        arrives = sending.say(0)
        assert frontend.poll(WAIT_MS)
        assert len(frontend.recv()) > LARGE
        within(lambda: arrives.done)
        sending.end()
        assert not sending.thread.is_alive()
        assert all(socket._socket.closed for socket, _ in sending.sent)
