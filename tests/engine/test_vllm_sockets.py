"""vLLM's own sockets between engine core and frontends, with our options."""

from typing import Any

import pytest
import zmq

pytest.importorskip("vllm")

from vllm.v1.engine import core

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
        assert socket.getsockopt(zmq.RECONNECT_IVL_MAX) == most_ms
    assert (core.make_zmq_socket is stock) == (frontends == 1)
