"""Sockets between llumlets: one to receive on, and one to each peer to send on.

A message may be lost: its peer may be gone, or a queue full. core/migration/llumlet.py stands that.
Messages are received on a thread, which also gives the clock a beat while the engine stands still.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import get_args

import zmq

from llumnix.core.messages import PeerMessage
from llumnix.errors import ProtocolError
from llumnix.sockets import Listening, SocketKeys, connect
from llumnix.wire import decode, encode

logger = logging.getLogger("llumnix.engine")

BEAT_MS = 50
PEERS_MAX = 4096
"""Sockets of one llumlet. ZMQ's own limit is 1,023."""
QUEUED_MAX = 1000
CLOSE_TIMEOUT_S = 2.0
LOG_EVERY_S = 10.0
"""Lost messages are logged no more often."""
_KINDS = get_args(PeerMessage)


class Peers:
    """One llumlet's sockets. `listen`: a ZMQ address; `tcp://HOST:0` picks a port. `keys`: those by
    which llumlets on TCP know each other. `on_message` and `on_beat` are called on its thread."""

    def __init__(
        self,
        listen: str,
        on_message: Callable[[PeerMessage], None],
        on_beat: Callable[[], None],
        keys: SocketKeys | None = None,
    ) -> None:
        self._listen = listen
        self._keys = keys
        self._on_message = on_message
        self._on_beat = on_beat
        self._outgoing: dict[str, zmq.Socket] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="llumnix-peers", daemon=True)
        self.address = ""
        self._lost_count = 0
        self._log_lost_s = 0.0

    def bind(self) -> None:
        """Takes its address. What is sent there from now on waits."""
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, PEERS_MAX)
        self._listening = Listening(self._context, self._keys)
        self._incoming = self._context.socket(zmq.PULL)
        self._incoming.setsockopt(zmq.RCVHWM, QUEUED_MAX)
        self._listening.bind(self._incoming, self._listen)
        self.address = self._incoming.getsockopt_string(zmq.LAST_ENDPOINT)

    def start(self) -> None:
        """Begins to receive."""
        self._thread.start()

    def close(self) -> None:
        """Closes all sockets."""
        self._closing.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        self._incoming.close(0)
        for socket in self._outgoing.values():
            socket.close(0)
        self._listening.close()
        self._context.term()

    def send(self, address: str, message: PeerMessage) -> None:
        """Sends a message, or loses it: no address, no socket and a full queue end at most a
        migration. The engine's thread only."""
        try:
            self._socket_to(address).send(encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self._lost(type(message).__name__, address, error)

    def _socket_to(self, address: str) -> zmq.Socket:
        socket = self._outgoing.get(address)
        if socket is None:
            socket = self._context.socket(zmq.PUSH)
            try:
                socket.setsockopt(zmq.SNDHWM, QUEUED_MAX)
                socket.setsockopt(zmq.LINGER, 0)
                connect(socket, address, self._keys)
            except zmq.ZMQError:
                socket.close(0)
                raise
            self._outgoing[address] = socket
        return socket

    def _lost(self, kind: str, address: str, error: zmq.ZMQError) -> None:
        now = time.monotonic()
        self._lost_count += 1
        if now < self._log_lost_s:
            return
        self._log_lost_s = now + LOG_EVERY_S
        logger.warning(
            "%s lost on its way to %r (%s); %d messages lost so far",
            kind, address, error, self._lost_count,
        )  # fmt: skip

    def disconnect(self, address: str) -> None:
        """Closes the socket to a peer that is gone for good. The engine's thread only."""
        socket = self._outgoing.pop(address, None)
        if socket is not None:
            socket.close(0)

    def _receive(self) -> None:
        while not self._closing.is_set():
            if not self._incoming.poll(BEAT_MS):
                self._on_beat()
                continue
            try:
                message = decode(self._incoming.recv())
            except ProtocolError as error:
                logger.error("From another llumlet: %s", error)
                continue
            if isinstance(message, _KINDS):
                self._on_message(message)
