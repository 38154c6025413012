"""Options for the ZMQ sockets over which vLLM's engine core talks to frontends.

Rules
- With keys, both ends prove that they know them. vLLM has no setting for keys.
- An engine has a pair of sockets for every frontend that may ever come, so most of them find nobody
  at first. They try again more and more seldom, every `RECONNECT_MAX_MS` in the end. By default ZMQ
  tries ten times a second, which for 40 sockets takes a hundredth of a core.
- What is said to a frontend that died is dropped. By default ZMQ keeps it until the frontend
  connects, and vLLM keeps every large output to any frontend until ZMQ has sent those before it.
- A connection between hosts may be reset. ZMQ makes it anew, and does not say that what was on its
  way is lost: a request, or tokens in the middle of an answer. So an engine that a frontend gets
  back ends at once, and its streams go on elsewhere from what has arrived. A frontend that died
  comes back with another address.

vLLM 0.32 internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`EngineCoreProc.process_input_sockets` and `process_output_sockets`, each on a thread of its own,
make a `zmq.Context`. For every socket they pass it to `make_zmq_socket`, which they look up in
their module. All of these sockets connect. Those for outputs are the ones of type PUSH, made in the
order of client indexes; vLLM calls their `send` and `send_multipart`, and asks a tracker of the
first whether it is `done`.
"""

import itertools
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import zmq
from vllm.v1.engine import core
from zmq.utils.monitor import recv_monitor_message

from llumnix.sockets import SocketKeys, check_secured, connecting_options

logger = logging.getLogger("llumnix.engine")

RECONNECT_MAX_MS = 1000
_NEW_ONES_MS = 1000


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


class Reconnections:
    """Calls `on_again` with the address of a watched socket that was connected, and is again. A
    thread waits for that."""

    def __init__(self, on_again: Callable[[str], object]) -> None:
        self._on_again = on_again
        self._new: queue.SimpleQueue[tuple[Any, str]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="llumnix-reconnections", daemon=True).start()

    def watch(self, context: Any, socket: Any, address: str) -> None:
        """Watches a socket of this context, which it was told to connect to that address."""
        told = f"inproc://told-{id(socket)}"
        socket.monitor(told, zmq.EVENT_HANDSHAKE_SUCCEEDED)
        # Of a shadow, since the context closes its own sockets on the thread that ends it.
        monitor = zmq.Context.shadow(context.underlying).socket(zmq.PAIR)
        monitor.connect(told)
        self._new.put((monitor, address))

    def _run(self) -> None:
        addresses: dict[Any, str] = {}
        handshakes: Counter[str] = Counter()
        poller = zmq.Poller()
        try:
            while True:
                while not self._new.empty():
                    monitor, addresses[monitor] = self._new.get()
                    poller.register(monitor, zmq.POLLIN)
                for monitor, _ in poller.poll(_NEW_ONES_MS):
                    if recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                        handshakes[addresses[monitor]] += 1
                        if handshakes[addresses[monitor]] > 1:
                            self._on_again(addresses[monitor])
        except zmq.ContextTerminated:  # The engine ends.
            for monitor in addresses:
                monitor.close(linger=0)


def _end_process(address: str) -> NoReturn:
    logger.critical("The connection to the frontend at %s broke: this engine ends.", address)
    os._exit(1)


def prepare_sockets(
    keys: SocketKeys | None, frontends: int, on_again: Callable[[str], object] = _end_process
) -> set[int]:
    """From now on the sockets of this process's engine core have these keys, and suit so many
    frontends. Returns a set for the client indexes of those that are lost: what is said to them
    later is dropped. `on_again` gets the address of a frontend on TCP whose connection broke and
    is there again."""
    lost: set[int] = set()
    options: dict[int, Any] = dict(connecting_options(keys))
    if frontends > 1:
        options[zmq.RECONNECT_IVL_MAX] = RECONNECT_MAX_MS
    if not options:
        return lost
    make, client = core.make_zmq_socket, itertools.count()
    reconnections = None if keys is None else Reconnections(on_again)

    def make_prepared(context: Any, path: str, kind: int, **more: Any) -> Any:
        for option, value in options.items():
            context.setsockopt(option, value)
        socket = make(context, path, kind, **more)
        check_secured(socket, keys)
        if reconnections is not None:
            reconnections.watch(context, socket, path)
        if frontends > 1 and kind == zmq.PUSH:
            return DroppingSocket(socket, next(client), lost)
        return socket

    core.make_zmq_socket = make_prepared
    return lost
