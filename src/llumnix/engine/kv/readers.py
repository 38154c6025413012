"""How a worker reads KV blocks of a peer: the other side of engine/kv/transports.py."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec
import numpy as np

from llumnix.engine.kv.blocks import Bytes, KvMemory, Layout
from llumnix.engine.kv.links import (
    LINK_ERRORS,
    WIRE_VERSION,
    Answer,
    Ask,
    Hello,
    Link,
    TransferError,
    Welcome,
    connect,
)
from llumnix.engine.kv.transports import (
    TransferOptions,
    boot_id,
    checksum,
    map_halves,
    open_memory,
)
from llumnix.errors import ProtocolError

GPU_CHUNK_FACTOR = 8
"""A chunk of a mapped GPU is this many staging chunks. It takes GPU memory for a moment only."""
DMA_CHUNK_FACTOR = 32
"""The same where the copy engines do the work, which costs no memory."""

Throttle = Callable[[int], None]
"""Called before each chunk with its size in bytes. Waits for bandwidth, or raises TransferError to
end the pull."""

_answers = msgspec.msgpack.Decoder(Answer)
_welcomes = msgspec.msgpack.Decoder(Welcome)


class PeerReader(Protocol):
    """An open connection to one peer, to read its KV blocks. One thread uses it, and any may call
    `stop`."""

    def pull(self, source: Sequence[int], destination: Sequence[int], throttle: Throttle) -> int:
        """Copies the peer's blocks `source` into ours, `destination`. Returns bytes copied."""

    def ended(self) -> bool:
        """Whether the peer has gone since the last pull."""

    def stop(self) -> None:
        """Ends a pull that runs. Any thread."""

    def close(self) -> None:
        """Gives everything back."""


def chunks(
    source: Sequence[int], destination: Sequence[int], size: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Both lists in pairs of slices of `size` blocks, the last one shorter."""
    for start in range(0, len(source), size):
        yield source[start : start + size], destination[start : start + size]


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
        # The source waits in its send for a chunk to be read, and for CHUNK_TIMEOUT_S at most. So
        # none may be on its way while we wait for bandwidth.
        self._reads_first = self._streamed and options.bandwidth_bytes_per_s is not None
        if self._streamed:
            # One: the second chunk is in the socket's buffers.
            self._halves = [np.empty(chunk_bytes, np.uint8)]
            return
        fd = link.receive_fd()
        try:
            if os.fstat(fd).st_size < 2 * chunk_bytes:
                raise ProtocolError("the peer's shared memory is smaller than it said")
            self._halves = map_halves(fd, chunk_bytes)
        finally:
            os.close(fd)

    def pull(self, source: Sequence[int], destination: Sequence[int], throttle: Throttle) -> int:
        """See `PeerReader`."""
        self._check(source, destination)
        waiting: tuple[Sequence[int], int] | None = None
        turns = len(self._halves)
        block_bytes = self._layout.block_bytes
        for number, (theirs, ours) in enumerate(chunks(source, destination, self._chunk_blocks)):
            if waiting is not None and self._reads_first:
                self._take(*waiting)
                waiting = None
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
        # The memory of a process that died stays mapped, but what is in it may be anything.
        if self._link.ended():
            raise TransferError("the peer went away during the pull")
        return len(source) * self._layout.block_bytes

    def _verify(self, memory: KvMemory, source: Sequence[int], destination: Sequence[int]) -> None:
        for theirs, ours in chunks(source, destination, self._chunk_blocks):
            self._ask(theirs, 0)
            arrived = np.empty(len(ours) * self._layout.block_bytes, np.uint8)
            memory.gather(ours, arrived)
            self._compare(self._answer(), arrived)
