"""How KV blocks get from one worker to another: the source's side and the reader's.

The reader connects and says hello; the source answers with one of three transports.

- memfd: both map one anonymous file of two halves. The reader asks for a chunk of blocks in one
  half; while it empties that half, the source already fills the other. The kernel frees the file
  with the last process that maps it, so that nothing stays behind, even after SIGKILL.
- stream: the same questions, and the bytes follow the answer on the link.
- gpu: the source exports its GPU memory once, and is not asked again (see `blocks_cuda`).

A block is copied while the worker's model runs. It is the caller who sees to it that no step in
flight writes to the source's blocks, or touches the destination's.
"""

import contextlib
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from llumnix.engine.kv.blocks import Bytes, HostMemory, KvMemory, Layout
from llumnix.engine.kv.links import (
    LINK_ERRORS,
    WIRE_VERSION,
    Answer,
    Ask,
    Exported,
    Hello,
    Link,
    PieceAt,
    TransferError,
    Welcome,
    connect,
)
from llumnix.errors import ProtocolError, UsageError

CHUNK_BLOCKS_MAX = 4096
"""Blocks named in one question. The question must fit the socket's buffer: on a stream the reader
asks while the source still sends, and neither may wait for the other."""
GPU_CHUNK_FACTOR = 8
"""A chunk of a mapped GPU is this many staging chunks: it costs GPU memory for a moment only."""
DMA_CHUNK_FACTOR = 32
"""The same where the copy engines do it, which costs none."""
SAME_HOST = ("auto", "tcp")

Throttle = Callable[[int], None]
"""Called before each chunk with its bytes: waits for bandwidth, raises TransferError to end it."""

_asks = msgspec.msgpack.Decoder(Ask)
_answers = msgspec.msgpack.Decoder(Answer)
_welcomes = msgspec.msgpack.Decoder(Welcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOptions:
    """How a worker's agent transfers KV blocks; UsageError on a bad value."""

    staging_bytes: int = 8 * 2**20
    """Bytes of one staging chunk, of which a connection has two at most. Never under a block."""
    bandwidth_bytes_per_s: float | None = None
    """Limit on what one worker pulls, over all its peers."""
    checksums: bool = False
    """Compare each chunk's CRC-32 on both sides. A pull that fails it fails."""
    same_host: str = "auto"
    """"auto" shares memory on one host; "tcp" always sends bytes, even there."""

    def __post_init__(self) -> None:
        if self.staging_bytes < 1:
            raise UsageError(f"staging_bytes must be 1 or more, not {self.staging_bytes}")
        if self.bandwidth_bytes_per_s is not None and not self.bandwidth_bytes_per_s > 0:
            raise UsageError(f"bandwidth must be above 0 B/s, not {self.bandwidth_bytes_per_s}")
        if self.same_host not in SAME_HOST:
            raise UsageError(f"same_host must be one of {SAME_HOST}, not {self.same_host!r}")


class PeerReader(Protocol):
    """An open connection to one peer, to read its KV blocks. One thread; `stop` by any."""

    def pull(self, source: Sequence[int], destination: Sequence[int], throttle: Throttle) -> int:
        """Copies the peer's blocks `source` into ours, `destination`. Returns bytes copied."""

    def ended(self) -> bool:
        """Has the peer gone since the last pull?"""

    def stop(self) -> None:
        """Ends a pull that runs. Any thread."""

    def close(self) -> None:
        """Gives everything back."""


@cache
def boot_id() -> str:
    """The same for all processes of one running kernel, in all its containers."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def checksum(data: Bytes) -> int:
    """CRC-32 of the bytes."""
    return zlib.crc32(data)


def open_memory(layout: Layout) -> KvMemory:
    """The blocks of a layout, for the use of one thread."""
    if layout.device.type == "cpu":
        return HostMemory(layout)
    # Imported where it is used: most of its functions exist only in torch's CUDA builds.
    from llumnix.engine.kv.blocks_cuda import CudaMemory

    return CudaMemory(layout)


def chunks(
    source: Sequence[int], destination: Sequence[int], size: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Both lists in pairs of slices of `size` blocks, the last one shorter."""
    for start in range(0, len(source), size):
        yield source[start : start + size], destination[start : start + size]


# ---------------------------------------------------------------- the source


class ReadGate:
    """Readers of this worker's KV memory pass it; while it is held none does."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held = False
        self._inside = 0

    def hold(self, *, held: bool) -> None:
        """Holds it, and waits until nobody is inside; or lets all in again."""
        with self._changed:
            self._held = held
            self._changed.wait_for(lambda: not (self._held and self._inside))

    @contextlib.contextmanager
    def passed(self) -> Iterator[None]:
        """Inside. TransferError while it is held."""
        with self._changed:
            if self._held:
                raise TransferError("its KV memory is not there just now")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()


def serve_peer(
    link: Link, hello: Hello, layout: Layout, options: TransferOptions, gate: ReadGate
) -> None:
    """Answers one reader until the link ends, with EOFError or another of LINK_ERRORS."""
    chunk_blocks = max(
        1, min(options.staging_bytes // layout.block_bytes, CHUNK_BLOCKS_MAX, layout.blocks)
    )
    if hello.version != WIRE_VERSION or hello.sizes != layout.sizes:
        link.send(Welcome(error="the peer's version or layout of KV blocks differs from ours"))
        return
    transport, exported = _choose(link, hello, layout, options)
    link.send(
        Welcome(
            transport=transport,
            blocks=layout.blocks,
            chunk_blocks=chunk_blocks,
            pieces=[
                PieceAt(storage=p.storage, offset=p.offset, stride=p.stride, size=p.size)
                for p in layout.pieces
            ]
            if transport == "gpu"
            else [],
            storages=exported,
        )
    )
    chunk_bytes = chunk_blocks * layout.block_bytes
    if transport == "memfd":
        halves = _share(link, chunk_bytes)
    else:
        halves = [np.empty(chunk_bytes, np.uint8)]
    memory = open_memory(layout)
    while True:
        link.wait()
        ask = link.receive(_asks)
        size = len(ask.blocks) * layout.block_bytes
        if size > chunk_bytes or not 0 <= ask.half < len(halves):
            raise ProtocolError(f"asked for {len(ask.blocks)} blocks in half {ask.half}")
        chunk = halves[ask.half][:size]
        try:
            with gate.passed():
                memory.gather(ask.blocks, chunk)
        except (IndexError, TransferError) as error:
            link.send(Answer(error=str(error)))
            continue
        link.send(Answer(checksum=checksum(chunk) if ask.checksum else None))
        if transport == "stream":
            link.send_raw(memoryview(chunk))


def _choose(
    link: Link, hello: Hello, layout: Layout, options: TransferOptions
) -> tuple[str, list[Exported]]:
    """The best transport that both sides can use."""
    shared = hello.shared and options.same_host == "auto" and hello.boot_id == boot_id()
    gpus = hello.device == layout.device.type == "cuda"
    # A process cannot map what it exported itself.
    if shared and gpus and hello.map_gpu and hello.pid != os.getpid():
        from llumnix.engine.kv.blocks_cuda import export

        # Some allocators of GPU memory cannot share it.
        with contextlib.suppress(RuntimeError):
            return "gpu", export(layout)
    # Only a Unix socket can carry the file.
    return ("memfd" if shared and link.local else "stream"), []


def _share(link: Link, chunk_bytes: int) -> list[Bytes]:
    """Both halves of a new memfd, which the peer gets too."""
    fd = os.memfd_create("llumnix-kv", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 2 * chunk_bytes)
        link.send_fd(fd)
        return _map(fd, chunk_bytes)
    finally:
        os.close(fd)


def _map(fd: int, chunk_bytes: int) -> list[Bytes]:
    # Populated now, so that no page fault slows the first pull. It is unmapped with its last view.
    mapped = mmap.mmap(fd, 2 * chunk_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    both = np.frombuffer(mapped, np.uint8)
    return [both[:chunk_bytes], both[chunk_bytes:]]


# ---------------------------------------------------------------- the reader


def open_peer(
    address: str, key: bytes, layout: Layout, options: TransferOptions, *, map_gpu: bool = True
) -> PeerReader:
    """Connects to a peer's agent. One of LINK_ERRORS if that fails."""
    link = connect(address, key)
    try:
        link.send(
            Hello(
                version=WIRE_VERSION,
                boot_id=boot_id(),
                pid=os.getpid(),
                device=layout.device.type,
                sizes=layout.sizes,
                shared=options.same_host == "auto",
                map_gpu=map_gpu,
            )
        )
        welcome = link.receive(_welcomes)
        if welcome.error is not None:
            raise TransferError(welcome.error)
        if welcome.chunk_blocks < 1:
            raise ProtocolError(f"the peer offers chunks of {welcome.chunk_blocks} blocks")
        if welcome.transport != "gpu":
            return StagedReader(link, layout, welcome, options)
        with contextlib.suppress(RuntimeError):
            return MappedReader(link, layout, welcome, options)
    except (*LINK_ERRORS, RuntimeError):
        link.close()
        raise
    # The two GPUs cannot reach each other: once more, by way of host memory.
    link.close()
    return open_peer(address, key, layout, options, map_gpu=False)


class _LinkedReader:
    """What the readers share: a link, and questions to the source."""

    def __init__(
        self, link: Link, layout: Layout, welcome: Welcome, options: TransferOptions
    ) -> None:
        self._link = link
        self._layout = layout
        self._theirs = welcome.blocks
        self._chunk_blocks = welcome.chunk_blocks
        self._checksums = options.checksums

    def ended(self) -> bool:
        """See `PeerReader`."""
        return self._link.ended()

    def stop(self) -> None:
        """See `PeerReader`."""
        self._link.stop()

    def close(self) -> None:
        """See `PeerReader`."""
        self._link.close()

    def _check(self, source: Sequence[int], destination: Sequence[int]) -> None:
        if len(source) != len(destination):
            raise TransferError(f"{len(source)} blocks into {len(destination)}")
        self._layout.check(destination)
        if source and not 0 <= min(source) <= max(source) < self._theirs:
            raise TransferError(
                f"the peer has no blocks {min(source)}..{max(source)}, but 0..{self._theirs - 1}"
            )

    def _ask(self, blocks: Sequence[int], half: int) -> None:
        self._link.send(Ask(blocks=list(blocks), half=half, checksum=self._checksums))

    def _answer(self) -> Answer:
        answer = self._link.receive(_answers)
        if answer.error is not None:
            raise TransferError(f"the peer refused: {answer.error}")
        return answer

    def _compare(self, answer: Answer, data: Bytes) -> None:
        if self._checksums and checksum(data) != answer.checksum:
            raise TransferError(f"the checksum of a chunk of {len(data)} bytes is wrong")


class StagedReader(_LinkedReader):
    """Reads by way of host memory: memfd and stream."""

    def __init__(
        self, link: Link, layout: Layout, welcome: Welcome, options: TransferOptions
    ) -> None:
        super().__init__(link, layout, welcome, options)
        chunk_bytes = welcome.chunk_blocks * layout.block_bytes
        self._memory = open_memory(layout)
        self._streamed = welcome.transport != "memfd"
        if self._streamed:
            # One: the second chunk is in the socket's buffers.
            self._halves = [np.empty(chunk_bytes, np.uint8)]
            return
        fd = link.receive_fd()
        try:
            if os.fstat(fd).st_size < 2 * chunk_bytes:
                raise ProtocolError("the peer's shared memory is smaller than it said")
            self._halves = _map(fd, chunk_bytes)
        finally:
            os.close(fd)

    def pull(self, source: Sequence[int], destination: Sequence[int], throttle: Throttle) -> int:
        """See `PeerReader`."""
        self._check(source, destination)
        waiting: tuple[Sequence[int], int] | None = None
        turns = len(self._halves)
        block_bytes = self._layout.block_bytes
        for number, (theirs, ours) in enumerate(chunks(source, destination, self._chunk_blocks)):
            throttle(len(ours) * block_bytes)
            self._ask(theirs, number % turns)
            if waiting is not None:
                self._take(*waiting)
            waiting = ours, number % turns
        if waiting is not None:
            self._take(*waiting)
        return len(source) * block_bytes

    def _take(self, blocks: Sequence[int], half: int) -> None:
        answer = self._answer()
        chunk = self._halves[half][: len(blocks) * self._layout.block_bytes]
        if self._streamed:
            self._link.receive_raw(memoryview(chunk))
        self._compare(answer, chunk)
        self._memory.scatter(blocks, chunk)


class MappedReader(_LinkedReader):
    """Reads a peer's GPU memory in place."""

    def __init__(
        self, link: Link, layout: Layout, welcome: Welcome, options: TransferOptions
    ) -> None:
        from llumnix.engine.kv.blocks_cuda import MappedPeer

        super().__init__(link, layout, welcome, options)
        self._mapped = MappedPeer(
            layout,
            storages=welcome.storages,
            pieces=welcome.pieces,
            blocks=welcome.blocks,
        )
        factor = DMA_CHUNK_FACTOR if self._mapped.by_dma else GPU_CHUNK_FACTOR
        self._gpu_chunk = max(1, factor * options.staging_bytes // layout.block_bytes)
        self._memory = open_memory(layout) if options.checksums else None

    def pull(self, source: Sequence[int], destination: Sequence[int], throttle: Throttle) -> int:
        """See `PeerReader`."""
        self._check(source, destination)
        for theirs, ours in chunks(source, destination, self._gpu_chunk):
            throttle(len(ours) * self._layout.block_bytes)
            self._mapped.pull(theirs, ours)
        if self._memory is not None:
            self._verify(self._memory, source, destination)
        # The memory of a process that died stays mapped, but nobody vouches for what is in it.
        if self._link.ended():
            raise TransferError("the peer went away during the pull")
        return len(source) * self._layout.block_bytes

    def _verify(self, memory: KvMemory, source: Sequence[int], destination: Sequence[int]) -> None:
        for theirs, ours in chunks(source, destination, self._chunk_blocks):
            self._ask(theirs, 0)
            arrived = np.empty(len(ours) * self._layout.block_bytes, np.uint8)
            memory.gather(ours, arrived)
            self._compare(self._answer(), arrived)
