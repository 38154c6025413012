"""The engine's socket to the controller: facts go out, orders to move load come in.

With the controller gone nothing is queued: what is sent is lost, and the next report says it all.
"""

import logging
import threading

import zmq

from llumnix.core.events import MoveOrder
from llumnix.errors import ProtocolError
from llumnix.sockets import SocketKeys, connect
from llumnix.wire import Message, decode, encode

logger = logging.getLogger("llumnix.engine")


class ControllerSocket:
    """One engine's. Any thread may call it; a lock lets one at a time use the socket."""

    def __init__(self, address: str, keys: SocketKeys | None = None) -> None:
        self._address = address
        self._keys = keys
        self._lock = threading.Lock()

    def open(self) -> None:
        """Connects, in the background."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # IMMEDIATE: with no controller connected, sending fails at once instead of queueing.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        connect(self._socket, self._address, self._keys)

    def close(self) -> None:
        """Closes it for good."""
        self._socket.close()
        self._context.term()

    def send(self, message: Message) -> bool:
        """Sends it; False if it is lost."""
        with self._lock:
            try:
                self._socket.send(encode(message), zmq.NOBLOCK)
            except zmq.Again:
                return False
            return True

    def poll(self) -> list[MoveOrder]:
        """The orders that have come since the last call."""
        orders: list[MoveOrder] = []
        with self._lock:
            # To ask is cheaper than an exception: this is called before and after every step.
            while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                try:
                    message = decode(self._socket.recv(zmq.NOBLOCK))
                except ProtocolError as error:
                    logger.error("From the controller: %s", error)
                    continue
                if isinstance(message, MoveOrder):
                    orders.append(message)
        return orders
