"""The frontend's two sockets for engines, on TCP as in a cluster of several hosts."""

from types import SimpleNamespace
from typing import Any

import pytest
import zmq

pytest.importorskip("vllm")

from llumnix.core.priorities import Priorities
from llumnix.core.settings import PrioritySettings
from llumnix.frontend.client import FleetClient
from llumnix.frontend.engines.sockets import ClientPlace
from llumnix.observe.event_log import EventLog
from llumnix.sockets import SocketKeys, connect
from support.server import free_port

WAIT_MS = 10_000


async def test_only_who_has_the_keys_gets_a_word_in() -> None:
    keys = SocketKeys.make()
    ports = [free_port(), free_port()]
    places = [f"tcp://127.0.0.1:{port}" for port in ports]
    cache = SimpleNamespace(enable_prefix_caching=True)
    link: Any = SimpleNamespace()
    client = FleetClient(
        SimpleNamespace(cache_config=cache, lora_config=None),  # type: ignore[arg-type]
        ClientPlace(input_address=places[0], output_address=places[1]),
        link,
        1,
        EventLog(None, who="test"),
        Priorities(PrioritySettings()),
        keys=keys,
    )
    try:
        with zmq.Context() as context:
            context.setsockopt(zmq.LINGER, 0)
            for kind, place, ours in (
                (zmq.DEALER, places[0], client.input_socket),
                (zmq.PUSH, places[1], client.resources.output_socket),
            ):
                assert ours is not None
                for who, theirs in ((b"ENGINE_CORE_DEAD", None), (b"one of us", keys)):
                    speaker = context.socket(kind)
                    connect(speaker, place, theirs)
                    speaker.send(who)
                assert await ours.poll(WAIT_MS)
                assert (await ours.recv_multipart())[-1] == b"one of us"
                assert not await ours.poll(100)
            context.destroy(0)
    finally:
        sockets = client.input_socket, client.resources.output_socket
        client.close()
    assert all(socket is not None and socket.closed for socket in sockets)
