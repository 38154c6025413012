"""Who gets a message in where our sockets listen on TCP."""

import contextlib
import socket as plain_socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from llumnix import sockets
from llumnix.errors import LlumnixError, UsageError
from llumnix.sockets import Listening, SocketKeys, check_secured, connect

WAIT_MS = 10_000
QUIET_MS = 300
OURS = SocketKeys.make()


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as context:
        context.setsockopt(zmq.LINGER, 0)
        yield context
        context.destroy(0)


@contextlib.contextmanager
def listening(kind: int, keys: SocketKeys | None, at: str = "127.0.0.1") -> Iterator[Any]:
    """A socket of this kind, and its address."""
    with zmq.Context() as context:
        context.setsockopt(zmq.LINGER, 0)  # A test that fails must not wait here for ever.
        guard = Listening(context, keys)
        try:
            with context.socket(kind) as socket:
                guard.bind(socket, f"tcp://{at}:0")
                yield socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)
        finally:
            guard.close()


def mixed(**changed: bytes) -> SocketKeys:
    """Our keys, as somebody has them who knows only some."""
    return SocketKeys(**{n: getattr(OURS, n) for n in SocketKeys.__slots__} | changed)


STRANGER = SocketKeys.make()
STRANGERS: dict[str, SocketKeys | None] = {
    "without keys": None,
    "with keys of another deployment": STRANGER,
    "who knows our public keys": mixed(
        connecting_public=STRANGER.connecting_public, connecting_secret=STRANGER.connecting_secret
    ),
    "who says our public key is his": mixed(connecting_secret=STRANGER.connecting_secret),
}


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize(("kind", "speaks"), [(zmq.ROUTER, zmq.DEALER), (zmq.PULL, zmq.PUSH)])
def test_a_strangers_message_never_arrives(
    context: zmq.Context, kind: int, speaks: int, stranger: str
) -> None:
    with listening(kind, OURS) as (ours, address):
        his = context.socket(speaks)
        with contextlib.suppress(zmq.ZMQError):  # Keys that do not fit are refused even to him.
            connect(his, address, STRANGERS[stranger])
            his.send(b"let me in", zmq.NOBLOCK)
        member = context.socket(speaks)
        connect(member, address, OURS)
        member.send(b"one of us")
        assert ours.poll(WAIT_MS)
        assert ours.recv_multipart()[-1] == b"one of us"
        assert not ours.poll(QUIET_MS)


def test_without_keys_the_same_stranger_gets_in(context: zmq.Context) -> None:
    """What the test above would see if the keys did nothing."""
    with listening(zmq.PULL, None) as (ours, address):
        his = context.socket(zmq.PUSH)
        connect(his, address, None)
        his.send(b"let me in")
        assert ours.poll(WAIT_MS)


def test_a_member_does_not_speak_to_a_stranger_who_listens(context: zmq.Context) -> None:
    keys = mixed(
        listening_public=STRANGER.listening_public, listening_secret=STRANGER.listening_secret
    )
    with listening(zmq.PULL, keys) as (his, address):
        member = context.socket(zmq.PUSH)
        member.setsockopt(zmq.IMMEDIATE, 1)
        connect(member, address, OURS)
        assert not his.poll(QUIET_MS)
        with pytest.raises(zmq.Again):
            member.send(b"a prompt", zmq.NOBLOCK)


def test_a_strangers_identity_keeps_no_engine_out(context: zmq.Context) -> None:
    """A ROUTER gives an identity to who takes it first."""
    with listening(zmq.ROUTER, OURS) as (ours, address):
        for keys in (None, STRANGERS["who knows our public keys"], OURS):
            engine = context.socket(zmq.DEALER)
            engine.setsockopt(zmq.IDENTITY, b"\x01\x00")
            connect(engine, address, keys)
            # A stranger who was turned away already has nobody to send to, and would wait.
            engine.setsockopt(zmq.SNDTIMEO, WAIT_MS if keys is OURS else QUIET_MS)
            with contextlib.suppress(*[zmq.Again] * (keys is not OURS)):
                engine.send(b"ready")
            time.sleep(0.05)
        assert ours.poll(WAIT_MS)
        assert ours.recv_multipart() == [b"\x01\x00", b"ready"]
        ours.send_multipart([b"\x01\x00", b"a prompt"])
        assert engine.poll(WAIT_MS)


def _greeting(version: int, mechanism: bytes) -> bytes:
    """ZMTP's, as a peer of this version begins."""
    head = b"\xff" + bytes(7) + b"\x01\x7f" + bytes([version, 0])
    return head + mechanism.ljust(20, b"\0") + bytes(32)


@pytest.mark.parametrize(
    "packet",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(1000),
        b"\xff" * 1000,
        b"\x01\x00\x0aENGINE_DEAD",  # ZMTP 1.0
        b"\xff" + bytes(7) + b"\x01\x7f\x01\x07\x00\x00\x00\x03abc",  # 2.0, a PUSH's message
        _greeting(3, b"NULL") + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x04PUSH\x00\x03abc",
        _greeting(3, b"PLAIN") + b"\x04\x08\x05HELLO\0\0",
        _greeting(3, b"CURVE") + b"\x04\xc8\x05HELLO\x01\x00" + bytes(192),
        _greeting(3, b"CURVE") + b"\x06\x7f\xff\xff\xff\xff\xff\xff\xff" + bytes(100),
        _greeting(3, b"CURVE") + b"\x00\x03abc",
    ],
)
def test_no_packet_of_bytes_gets_in_or_ends_the_socket(context: zmq.Context, packet: bytes) -> None:
    with listening(zmq.PULL, OURS) as (ours, address):
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        with plain_socket.create_connection((host, int(port))) as his:
            his.sendall(packet)
            member = context.socket(zmq.PUSH)
            connect(member, address, OURS)
            member.send(b"one of us")
            assert ours.poll(WAIT_MS)
            assert ours.recv() == b"one of us"
            assert not ours.poll(QUIET_MS / 3)


def test_members_meet_on_ipv6(context: zmq.Context) -> None:
    with listening(zmq.PULL, OURS, "[::1]") as (ours, address):
        member = context.socket(zmq.PUSH)
        connect(member, address, OURS)
        member.send(b"one of us")
        assert ours.poll(WAIT_MS)


def test_a_zmq_without_encryption_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sockets.check_encryption()
    monkeypatch.setattr(zmq, "has", lambda what: False)
    with pytest.raises(UsageError, match="leave --ray-address out"):
        sockets.check_encryption()


def test_a_socket_without_its_keys_is_not_used(context: zmq.Context) -> None:
    with pytest.raises(LlumnixError):
        check_secured(context.socket(zmq.PUSH), OURS)


def test_secrets_are_not_shown() -> None:
    for name in ("listening_secret", "connecting_secret"):
        assert getattr(OURS, name).decode() not in repr(OURS)
    assert str(OURS.listening_public) in repr(OURS)
