"""Options for the ZMQ sockets over which vLLM's engine core talks to frontends.

Rules
- With keys, both ends prove that they know them. vLLM has no setting for keys.
- An engine has a pair of sockets for every frontend that may ever come, so most of them find nobody
  at first. They try again more and more seldom, every `RECONNECT_MAX_MS` in the end. By default ZMQ
  tries ten times a second, which for 40 sockets takes a hundredth of a core.
- What is said to a frontend that died is dropped. By default ZMQ keeps it until the frontend
  connects, and vLLM keeps every large output to any frontend until ZMQ has sent those before it.

vLLM 0.32 internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`EngineCoreProc.process_input_sockets` and `process_output_sockets`, each on a thread of its own,
make a `zmq.Context`. For every socket they pass it to `make_zmq_socket`, which they look up in
their module. All of these sockets connect. Those for outputs are the ones of type PUSH, made in the
order of client indexes; vLLM calls their `send` and `send_multipart`, and asks a tracker of the
first whether it is `done`.
"""

import itertools
from typing import Any

import zmq
from vllm.v1.engine import core

from llumnix.sockets import SocketKeys, check_secured, connecting_options

RECONNECT_MAX_MS = 1000


class DroppingSocket:
    """A socket to one frontend, which is closed at the first word after the frontend is lost."""

    def __init__(self, socket: Any, client: int, lost: set[int]) -> None:
        self._socket = socket
        self._client = client
        self._lost = lost

    def __enter__(self) -> "DroppingSocket":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: Any, flags: int = 0, **more: Any) -> Any:
        """As the socket does, or drops it, and all that it has not sent so far."""
        if self._client not in self._lost:
            return self._socket.send(data, flags, **more)
        self._socket.close(linger=0)
        return zmq.MessageTracker()  # Of nothing, so it is done.

    def send_multipart(self, parts: Any, **more: Any) -> Any:
        """As the socket does, or nothing."""
        return None if self._socket.closed else self._socket.send_multipart(parts, **more)


def prepare_sockets(keys: SocketKeys | None, frontends: int) -> set[int]:
    """From now on the sockets of this process's engine core have these keys, and suit so many
    frontends. Returns a set for the client indexes of those that are lost: what is said to them
    later is dropped."""
    lost: set[int] = set()
    options: dict[int, Any] = dict(connecting_options(keys))
    if frontends > 1:
        options[zmq.RECONNECT_IVL_MAX] = RECONNECT_MAX_MS
    if not options:
        return lost
    make, client = core.make_zmq_socket, itertools.count()

    def make_prepared(context: Any, path: str, kind: int, **more: Any) -> Any:
        for option, value in options.items():
            context.setsockopt(option, value)
        socket = make(context, path, kind, **more)
        check_secured(socket, keys)
        if frontends > 1 and kind == zmq.PUSH:
            return DroppingSocket(socket, next(client), lost)
        return socket

    core.make_zmq_socket = make_prepared
    return lost
