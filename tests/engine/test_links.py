"""What a link's two ends prove to each other, and what somebody without the key makes of it."""

import secrets
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future

import msgspec
import pytest

from llumnix.engine.kv import links
from llumnix.engine.kv.links import LINK_ERRORS, AuthenticationError, Command, Link, connect, listen
from llumnix.errors import ProtocolError

KEY = secrets.token_bytes(32)
WAIT_S = 20.0


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "CHUNK_TIMEOUT_S", 5.0)


def aside(call: Callable[[], object]) -> "Future[object]":
    """The call on a thread of its own."""
    ended: Future[object] = Future()

    def run() -> None:
        try:
            ended.set_result(call())
        except LINK_ERRORS as error:
            ended.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return ended


def proves(sock: socket.socket, *, connecting: bool, key: bytes = KEY) -> "Future[object]":
    """One end of a link that authenticates the other, then takes an order of it."""

    def run() -> object:
        link = Link(sock)
        try:
            link.authenticate(key, connecting=connecting)
            return None if connecting else link.receive(msgspec.msgpack.Decoder(Command))
        finally:
            link.close()

    return aside(run)


def pass_on(one: socket.socket, other: socket.socket) -> None:
    """All that either says goes to the other, until one of them ends."""

    def pump(source: socket.socket, to: socket.socket) -> None:
        try:
            while data := source.recv(4096):
                to.sendall(data)
        except OSError:
            pass
        for sock in (source, to):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    for pair in ((one, other), (other, one)):
        threading.Thread(target=pump, args=pair, daemon=True).start()


@pytest.mark.parametrize("address", ["unix:{}/end", "tcp:127.0.0.1:0", "tcp:[::1]:0"])
def test_two_ends_with_the_same_key_meet(address: str, tmp_path: object) -> None:
    listener, where = listen(address.format(tmp_path))
    serving = aside(lambda: proves(listener.accept()[0], connecting=False).result(WAIT_S))
    connect(where, KEY).send(Command(version=7))
    assert serving.result(WAIT_S) == Command(version=7)
    listener.close()


def test_neither_end_takes_another_key() -> None:
    ours, theirs = socket.socketpair()
    serving = proves(ours, connecting=False)
    connecting = proves(theirs, connecting=True, key=b"another")
    for end in (serving, connecting):
        with pytest.raises(AuthenticationError):
            end.result(WAIT_S)


def test_a_listener_with_another_key_is_not_believed() -> None:
    """It takes whatever proof comes, and makes one of its own."""
    ours, theirs = socket.socketpair()
    connecting, rogue = proves(ours, connecting=True), Link(theirs)
    rogue.send(links.Challenge(nonce=bytes(32)))
    rogue.receive(msgspec.msgpack.Decoder(links.Proof))
    rogue.send(links.Proved(proof=bytes(32)))
    with pytest.raises(AuthenticationError, match="does not hold our key"):
        connecting.result(WAIT_S)


def test_an_ends_own_proof_sent_back_to_it_proves_nothing() -> None:
    ours, theirs = socket.socketpair()
    connecting, mirror = proves(ours, connecting=True), Link(theirs)
    mirror.send(links.Challenge(nonce=bytes(32)))
    proof = mirror.receive(msgspec.msgpack.Decoder(links.Proof))
    mirror.send(links.Proved(proof=proof.proof))
    with pytest.raises(AuthenticationError, match="does not hold our key"):
        connecting.result(WAIT_S)


def test_who_stands_in_between_can_pass_on_but_adds_nothing() -> None:
    """An agent is made to connect to somebody who hands all on to the same agent's other side.
    Where sockets have no addresses the proofs go through, but no order of his does."""
    serving_end, to_serving = socket.socketpair()
    connecting_end, to_connecting = socket.socketpair()
    serving = proves(serving_end, connecting=False)
    connecting = proves(connecting_end, connecting=True)
    client, server = Link(to_serving), Link(to_connecting)
    server.send_bytes(client.recv_bytes())
    client.send_bytes(server.recv_bytes())
    server.send_bytes(client.recv_bytes())
    connecting.result(WAIT_S)
    client.send(Command(version=links.WIRE_VERSION))
    with pytest.raises(AuthenticationError, match="did not send"):
        serving.result(WAIT_S)


def test_a_message_is_taken_once_and_in_its_place() -> None:
    ours, theirs = socket.socketpair()
    between, behind = socket.socketpair()
    one = Link(ours)
    two = Link(behind)
    met = aside(lambda: one.authenticate(KEY, connecting=True))
    pass_on(theirs, between)
    two.authenticate(KEY, connecting=False)
    met.result(WAIT_S)
    orders = msgspec.msgpack.Decoder(Command)
    one.send(Command(version=1))
    assert two.receive(orders).version == 1
    sent = msgspec.msgpack.encode(Command(version=1))
    tag = one._sent.next(sent)
    for _ in range(2):
        between.sendall((len(sent) + len(tag)).to_bytes(4, "big") + sent + tag)
    assert two.receive(orders).version == 1
    with pytest.raises(AuthenticationError, match="did not send"):
        two.receive(orders)


def test_a_proof_passed_on_to_a_third_party_proves_nothing() -> None:
    """An agent that was told to connect to somebody else is no way into another agent."""
    listener, victim = listen("tcp:127.0.0.1:0")
    serving = aside(lambda: proves(listener.accept()[0], connecting=False).result(WAIT_S))
    trap = socket.create_server(("127.0.0.1", 0))
    lured = aside(lambda: connect(f"tcp:127.0.0.1:{trap.getsockname()[1]}", KEY))
    host, _, port = victim.removeprefix("tcp:").rpartition(":")
    pass_on(trap.accept()[0], socket.create_connection((host, int(port))))
    for end in (serving, lured):
        with pytest.raises(AuthenticationError):
            end.result(WAIT_S)
    listener.close()
    trap.close()


def test_of_who_has_proved_nothing_only_short_messages_are_read() -> None:
    ours, theirs = socket.socketpair()
    serving = proves(ours, connecting=False)
    theirs.recv(4096)
    theirs.sendall((links.MESSAGE_BYTES_MAX).to_bytes(4, "big"))
    with pytest.raises(ProtocolError, match="more than 256"):
        serving.result(WAIT_S)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\x00\x00\x00\x01\xc1"])
def test_who_speaks_something_else_is_turned_away(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    serving = proves(ours, connecting=False)
    theirs.sendall(said)
    with pytest.raises(ProtocolError):
        serving.result(WAIT_S)
