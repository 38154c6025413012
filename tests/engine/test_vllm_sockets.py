"""vLLM's own sockets between engine core and frontend, with keys."""

from typing import Any

import pytest
import zmq

pytest.importorskip("vllm")

from vllm.v1.engine import core

from llumnix.engine.vllm_sockets import secure
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
    secure(keys)
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
