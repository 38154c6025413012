"""How KV blocks get from one worker to another: what both sides share, and the source's side.

The reader (engine/kv/readers.py) connects and says hello. The source answers with one of three
transports.

- memfd: both map one anonymous file of two halves. The reader asks for a chunk of blocks in one
  half; while it empties that half, the source already fills the other. The kernel frees the file
  with the last process that maps it, so that nothing stays behind, even after SIGKILL.
- stream: the same questions, and the bytes follow the answer on the link.
- gpu: the source exports its GPU memory once, and is not asked again (engine/kv/blocks_cuda.py).

A block is copied while the worker's model runs. The caller makes sure that no step in flight writes
to the source's blocks or touches the destination's.
"""

import contextlib
import mmap
import os
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec
import numpy as np

from llumnix.engine.kv.blocks import Bytes, HostMemory, KvMemory, Layout
from llumnix.engine.kv.links import (
    WIRE_VERSION,
    Answer,
    Ask,
    Exported,
    Hello,
    Link,
    PieceAt,
    TransferError,
    Welcome,
)
from llumnix.errors import ProtocolError, UsageError

CHUNK_BLOCKS_MAX = 4096
"""Blocks named in one question. The question must fit the socket's buffer: on a stream the reader
asks while the source still sends, and neither may wait for the other."""
SAME_HOST = ("auto", "tcp")

_asks = msgspec.msgpack.Decoder(Ask)


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


class ReadGate:
    """Readers of this worker's KV memory pass through it. While it is held none does."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held = False
        self._inside = 0

    def hold(self, *, held: bool) -> None:
        """Holds it and waits until no reader is inside, or lets readers in again."""
        with self._changed:
            self._held = held
            self._changed.wait_for(lambda: not (self._held and self._inside))

    @contextlib.contextmanager
    def passed(self) -> Iterator[None]:
        """The reader is inside. TransferError while the gate is held."""
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
        return map_halves(fd, chunk_bytes)
    finally:
        os.close(fd)


def map_halves(fd: int, chunk_bytes: int) -> list[Bytes]:
    """Both halves of a memfd, in this process's memory."""
    # Populated now, so that no page fault slows the first pull. It is unmapped with its last view.
    mapped = mmap.mmap(fd, 2 * chunk_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    both = np.frombuffer(mapped, np.uint8)
    return [both[:chunk_bytes], both[chunk_bytes:]]
