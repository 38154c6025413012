"""Which ZMQ peers may talk to each other: CURVE keys for all sockets of a deployment on TCP.

On one host our sockets are Unix sockets in a folder that only its user can open. They need no keys.
Between hosts every socket is encrypted, and both ends prove who they are. The listening end proves
that it holds the deployment's listening key, which the connecting end knows beforehand. It lets in
only peers that hold the connecting key. ZMQ drops all others during the handshake, before a message
is read.
"""

from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from llumnix.errors import LlumnixError, UsageError

MESSAGE_BYTES_MAX = 2**30
"""The longest frame that is taken on TCP: a request with its images and sounds fits."""
_DOMAIN = "llumnix"


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketKeys:
    """The two CURVE key pairs of one deployment, made at its start. All its processes hold both,
    since they listen and connect. Two pairs, so that neither end can pose as the other."""

    listening_public: bytes
    listening_secret: bytes = field(repr=False)
    connecting_public: bytes
    connecting_secret: bytes = field(repr=False)

    @classmethod
    def make(cls) -> "SocketKeys":
        """New ones."""
        listening, connecting = zmq.curve_keypair(), zmq.curve_keypair()
        return cls(
            listening_public=listening[0],
            listening_secret=listening[1],
            connecting_public=connecting[0],
            connecting_secret=connecting[1],
        )


def check_encryption() -> None:
    """Raises `UsageError` where ZMQ cannot encrypt."""
    if not zmq.has("curve"):
        raise UsageError(
            "--ray-address needs encryption between hosts, which this build of pyzmq lacks: "
            "install pyzmq from its wheel (`pip install --force-reinstall --only-binary :all: "
            "pyzmq`), or leave --ray-address out"
        )


def connect(socket: zmq.Socket[bytes], address: str, keys: SocketKeys | None) -> None:
    """Connects the socket to this ZMQ address."""
    for option, value in connecting_options(keys).items():
        socket.setsockopt(option, value)
    socket.setsockopt(zmq.IPV6, int("[" in address))
    socket.connect(address)


def connecting_options(keys: SocketKeys | None) -> dict[int, bytes]:
    """ZMQ options of a socket that connects; without keys none."""
    if keys is None:
        return {}
    return {
        zmq.CURVE_SERVERKEY: keys.listening_public,
        zmq.CURVE_PUBLICKEY: keys.connecting_public,
        zmq.CURVE_SECRETKEY: keys.connecting_secret,
    }


def check_secured(socket: Any, keys: SocketKeys | None) -> None:
    """Raises unless the socket has its keys. ZMQ does not say when a context's default fails."""
    if keys is not None and socket.getsockopt(zmq.MECHANISM) != zmq.CURVE:
        raise LlumnixError("a ZMQ socket did not take its keys")


class Listening:
    """The listening sockets of one ZMQ context. pyzmq asks it, on a thread of its own, which peers
    to let in."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: SocketKeys | None) -> None:
        self._keys = keys
        self._authenticator: ThreadAuthenticator | None = None
        if keys is not None:
            self._authenticator = ThreadAuthenticator(context)
            self._authenticator.configure_curve_callback(_DOMAIN, self)
            self._authenticator.start()

    def callback(self, domain: str, key: bytes) -> bool:
        """pyzmq's question: whether the client with this public key is one of ours."""
        return self._keys is not None and key == self._keys.connecting_public

    def options(self) -> dict[int, Any]:
        """ZMQ options of a socket that binds, for callers that bind it themselves; without keys
        none."""
        if self._keys is None:
            return {}
        return {
            zmq.CURVE_SERVER: 1,
            zmq.CURVE_SECRETKEY: self._keys.listening_secret,
            zmq.ZAP_DOMAIN: _DOMAIN.encode(),
            zmq.MAXMSGSIZE: MESSAGE_BYTES_MAX,
        }

    def bind(self, socket: zmq.Socket[bytes], address: str) -> None:
        """Binds the socket to this ZMQ address."""
        for option, value in self.options().items():
            socket.setsockopt(option, value)
        socket.setsockopt(zmq.IPV6, int("[" in address))
        socket.bind(address)

    def close(self) -> None:
        """Ends it; call it before its context ends."""
        if self._authenticator is not None:
            self._authenticator.stop()
