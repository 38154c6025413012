"""Links between KV transfer agents: addresses, authentication, and messages with a time limit.

A link is one stream socket (Unix or TCP). Before anything else is read, each end proves that it
holds the key that all agents of a deployment share. A proof is an HMAC over the end's role, both
ends' addresses as the sockets have them, and a fresh random number of either side. So it is good
for one connection in one direction: it can neither be sent back to its maker nor passed on to a
third party. From then on every message carries a tag, made with a key of this one connection, so
that no one in between can add, change, repeat or leave out a message. The bytes of KV blocks have
no tag, and nothing is encrypted. Messages are msgpack of a closed set of classes; nothing is ever
unpickled.

Every wait has a bound, except the wait for the next request on an idle link. That ends when either
side shuts the link down.
"""

import contextlib
import secrets
import select
import socket
import threading
import time
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec

from llumnix.engine.kv.proofs import AuthenticationError, Connection, Tags, check, ends_of
from llumnix.errors import LlumnixError, ProtocolError, UsageError

CONNECT_TIMEOUT_S = 5.0
CHUNK_TIMEOUT_S = 10.0
"""Within this time a whole message, or the bytes of one chunk, must have been sent or received."""
MESSAGE_BYTES_MAX = 16 * 2**20
PROOF_BYTES_MAX = 256
"""The longest message that is read of a peer that has proved nothing yet."""
NONCE_BYTES = 32
BACKLOG = 64
WIRE_VERSION = 2

Buffer: TypeAlias = bytes | bytearray | memoryview
M = TypeVar("M", bound=msgspec.Struct)


class TransferError(LlumnixError):
    """A pull cannot go on: the peer is gone, refuses, or holds other KV blocks than expected."""


LINK_ERRORS = (OSError, EOFError, msgspec.MsgspecError, LlumnixError)
"""What a peer can cause by its death, by silence or by nonsense. Time-outs are OSErrors."""


class Challenge(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message of all, from the end that listens."""

    nonce: bytes


class Proof(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer: `proof` that the connecting end holds the key, and its own challenge."""

    nonce: bytes
    proof: bytes


class Proved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The listening end's proof in turn."""

    proof: bytes


class PieceAt(msgspec.Struct, frozen=True, array_like=True):
    """Where a peer's piece lies (see `blocks.Piece`), in bytes from its storage's start."""

    storage: int
    offset: int
    stride: int
    size: int


class Exported(msgspec.Struct, frozen=True, array_like=True):
    """One storage on a GPU for another process to map: torch's own export, field by field."""

    handle: bytes
    size: int
    offset: int
    counter_handle: bytes
    counter_offset: int
    event_handle: bytes
    event_wanted: bool


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message of an agent that wants to pull from the agent it connected to."""

    version: int
    boot_id: str
    pid: int
    device: str
    """Type of the tensors' device: "cpu" or "cuda"."""
    sizes: list[int]
    """Bytes of one block, piece by piece: both sides' must be equal."""
    shared: bool
    """May memory be shared where both are on one host? If not, bytes go over the link."""
    map_gpu: bool
    """May the peer's GPU memory be mapped? Asked again without where mapping it failed."""


class Command(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message of a client that says what to pull."""

    version: int


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `Hello`."""

    error: str | None = None
    transport: str = ""
    """"memfd": the link's next byte carries its file descriptor; "stream"; "gpu"."""
    blocks: int = 0
    chunk_blocks: int = 0
    pieces: list[PieceAt] = []
    storages: list[Exported] = []


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """Put these blocks into that half of the staging memory (memfd), or send them (stream)."""

    blocks: list[int]
    half: int
    checksum: bool


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The asked blocks are there, or why not. On a stream their bytes follow."""

    error: str | None = None
    checksum: int | None = None


class Pull(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A client's order: copy the peer's blocks `source` into this worker's `destination`."""

    ticket: int
    peer: str
    source: list[int]
    destination: list[int]
    final: bool = False
    """Does a request stand still for it?"""


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A client's order: end this pull of its, whose end is reported all the same."""

    ticket: int


class Forget(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A client's order: drop what is held of these peers."""

    peers: list[str]


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A pull of one rank has ended; `error` is None if all its blocks are there."""

    ticket: int
    bytes: int
    seconds: float
    error: str | None


class Link:
    """One socket. One thread reads and closes it; any may `send` and `stop`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(CHUNK_TIMEOUT_S)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A host that vanished sends no end of file; without this an idle link outlives it.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = sock
        self._sending = threading.Lock()
        self._sent = Tags()
        self._received = Tags()
        self.local = sock.family == socket.AF_UNIX
        self.stopped = False

    def authenticate(self, key: bytes, *, connecting: bool) -> None:
        """Each end proves to the other that it holds the key, the connecting end first.
        AuthenticationError if the keys differ, or if a third party stands in between."""
        ends = ends_of(self._socket, connecting=connecting)
        ours = secrets.token_bytes(NONCE_BYTES)
        if connecting:
            theirs = self._receive_short(_challenges).nonce
            connection = Connection(key, WIRE_VERSION, ends, theirs, ours)
            self.send(Proof(nonce=ours, proof=connection.keyed("connecting")))
            try:
                answer = self._receive_short(_answers).proof
            except (EOFError, ConnectionError) as error:
                raise AuthenticationError("the other end does not take our proof") from error
            check(answer, connection.keyed("listening"))
        else:
            self.send(Challenge(nonce=ours))
            proof = self._receive_short(_proofs)
            connection = Connection(key, WIRE_VERSION, ends, ours, proof.nonce)
            check(proof.proof, connection.keyed("connecting"))
            self.send(Proved(proof=connection.keyed("listening")))
        tags = [Tags(connection.keyed("from connecting")), Tags(connection.keyed("from listening"))]
        self._sent, self._received = tags if connecting else tags[::-1]

    def stop(self) -> None:
        """Ends every wait on this link, on both sides. Any thread."""
        self.stopped = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the socket back. The reading thread only: its number may be reused at once."""
        self.stop()
        with self._sending:
            self._socket.close()

    def wait(self) -> None:
        """Waits without a bound for something to read, be it the end of the link."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.poll()

    def ended(self) -> bool:
        """Whether the peer has gone. For a link on which nothing is to be read now."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return self.stopped or bool(poll.poll(0))

    def send(self, message: msgspec.Struct) -> None:
        """Sends one message. OSError if the link has ended."""
        self.send_bytes(msgspec.msgpack.encode(message))

    def receive(self, decoder: "msgspec.msgpack.Decoder[M]") -> M:
        """The next message; within `CHUNK_TIMEOUT_S` or TimeoutError."""
        return decoder.decode(self.recv_bytes())

    def _receive_short(self, decoder: "msgspec.msgpack.Decoder[M]") -> M:
        try:
            return decoder.decode(self.recv_bytes(PROOF_BYTES_MAX))
        except msgspec.MsgspecError as error:
            raise ProtocolError("the peer does not speak our protocol") from error

    def send_bytes(self, payload: bytes) -> None:
        """Sends one frame: its length in 4 bytes, then itself, the tag at its end."""
        with self._sending:
            frame = payload + self._sent.next(payload)
            self._socket.sendall(len(frame).to_bytes(4, "big") + frame)

    def recv_bytes(self, maxlength: int = MESSAGE_BYTES_MAX) -> bytes:
        """The next frame. ProtocolError if it is longer than `maxlength` bytes."""
        header = bytearray(4)
        self.receive_raw(header)
        length = int.from_bytes(header, "big")
        if length > maxlength:
            raise ProtocolError(f"a message of {length} bytes, more than {maxlength}")
        frame = bytearray(length)
        self.receive_raw(frame)
        return self._received.strip(bytes(frame))

    def send_raw(self, data: Buffer) -> None:
        """Sends bytes as they are."""
        self._socket.sendall(data)

    def receive_raw(self, into: Buffer) -> None:
        """Fills `into` from the link. EOFError if the peer ends it first."""
        view = memoryview(into)
        deadline_s = time.monotonic() + CHUNK_TIMEOUT_S
        while len(view):
            count = self._socket.recv_into(view)
            if count == 0:
                raise EOFError("the peer closed the link")
            view = view[count:]
            if len(view) and time.monotonic() > deadline_s:
                raise TimeoutError(f"the peer took more than {CHUNK_TIMEOUT_S:g} s")

    def send_fd(self, fd: int) -> None:
        """Passes an open file to the peer. Unix links only."""
        socket.send_fds(self._socket, [b"f"], [fd])

    def receive_fd(self) -> int:
        """The file that the peer passed; the caller closes it."""
        _, fds, _, _ = socket.recv_fds(self._socket, 1, 1)
        if len(fds) != 1:
            raise ProtocolError("no file came with the peer's message")
        return fds[0]


_challenges = msgspec.msgpack.Decoder(Challenge)
_proofs = msgspec.msgpack.Decoder(Proof)
_answers = msgspec.msgpack.Decoder(Proved)


def connect(address: str, key: bytes) -> Link:
    """An authenticated link to the listener at `address`; OSError or AuthenticationError if not."""
    kind, where = _parse(address)
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(CONNECT_TIMEOUT_S)
        try:
            sock.connect(where)
        except OSError:
            sock.close()
            raise
    else:
        sock = socket.create_connection(_host_port(where), timeout=CONNECT_TIMEOUT_S)
    link = Link(sock)
    try:
        link.authenticate(key, connecting=True)
    except LINK_ERRORS:
        link.close()
        raise
    return link


def listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket and the address as others must use it. UsageError on a bad address."""
    kind, where = _parse(address)
    if kind == "unix":
        # A killed process leaves its socket's file behind, and binding to it again would fail.
        Path(where).unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.bind(where)
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
        return sock, address
    host, port = _host_port(where)
    if host in ("", "0.0.0.0", "::"):
        raise UsageError(f"{address}: name the one host that peers can reach, not all of them")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, port), family=family, backlog=BACKLOG)
    bound = sock.getsockname()[1]
    return sock, f"tcp:{where.rpartition(':')[0]}:{bound}"


def unlisten(address: str) -> None:
    """Removes what `listen` left in the file system."""
    kind, where = _parse(address)
    if kind == "unix":
        Path(where).unlink(missing_ok=True)


def _parse(address: str) -> tuple[str, str]:
    kind, _, where = address.partition(":")
    if kind not in ("unix", "tcp") or not where:
        raise UsageError(f"{address!r} is no address; write unix:/path or tcp:HOST:PORT")
    return kind, where


def _host_port(where: str) -> tuple[str, int]:
    host, _, port = where.rpartition(":")
    if not port.isdecimal():
        raise UsageError(f"tcp:{where}: the port is missing")
    return host.strip("[]"), int(port)
