"""Proofs that the two ends of a connection hold the same key, and tags of the messages that follow.

All are HMAC-SHA256. engine/kv/links.py says when they are made.
"""

import hmac
import socket
from typing import Any, NamedTuple

import msgspec

from llumnix.errors import LlumnixError

TAG_BYTES = 16


class AuthenticationError(LlumnixError):
    """The other end of a link did not prove that it holds our key, or did not send this message."""


class Connection(NamedTuple):
    """What both ends know of one connection once each has sent its random number."""

    key: bytes
    version: int
    ends: list[str]
    challenge: bytes
    answer: bytes

    def keyed(self, purpose: str) -> bytes:
        """A proof or a key of this connection, which only a holder of the key can make."""
        signed = ("llumnix KV agents", purpose, *self[1:])
        return hmac.digest(self.key, msgspec.msgpack.encode(signed), "sha256")


class Tags:
    """The tags of one direction's messages, in order. Without a key, as before the proofs: none."""

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key
        self._count = 0

    def next(self, payload: bytes) -> bytes:
        """The tag of the next message."""
        if self._key is None:
            return b""
        self._count += 1
        signed = self._count.to_bytes(8, "big") + payload
        return hmac.digest(self._key, signed, "sha256")[:TAG_BYTES]

    def strip(self, frame: bytes) -> bytes:
        """The next message without its tag; AuthenticationError if it has another."""
        if self._key is None:
            return frame
        payload, tag = frame[:-TAG_BYTES], frame[-TAG_BYTES:]
        if not hmac.compare_digest(tag, self.next(payload)):
            raise AuthenticationError("a message that the other end did not send")
        return payload


def check(proof: bytes, expected: bytes) -> None:
    """AuthenticationError if the proof is another than expected."""
    if not hmac.compare_digest(proof, expected):
        raise AuthenticationError("the other end does not hold our key")


def ends_of(sock: socket.socket, *, connecting: bool) -> list[str]:
    """The addresses of the connecting and of the listening end, the same seen from either."""
    ends = [_name(sock.getsockname()), _name(sock.getpeername())]
    return ends if connecting else ends[::-1]


def _name(address: Any) -> str:
    if isinstance(address, tuple):  # TCP. An IPv6 scope ("%eth0") is each host's own.
        host, port = address[:2]
        return f"{host.partition('%')[0]} {port}"
    return address.decode() if isinstance(address, bytes) else str(address)
