"""A worker's KV memory by block id: where a block's bytes lie, how to gather and scatter them.

A block is spread over many tensors. Each tensor is cut into *pieces*: one piece holds one run of
bytes of every block, at a constant distance from block to block. Consecutive pieces of one shape
at equal distances (vLLM's layers in one backing allocation) are fused into one *plane*, so that
one strided copy serves all of them.

The order of bytes in transit is: piece by piece, in each the blocks in the order asked for. Fusing
does not change it, so two workers whose planes differ still understand each other.

Everything is bytes: element types such as fp8 mean nothing to a copy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from llumnix.errors import UsageError

PIECES_MAX = 16_384
"""More runs of bytes than this make a block too scattered to copy."""

Bytes = np.ndarray
"""A one-dimensional array of uint8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`size` bytes of every block: block b's at `offset + b * stride` of storage `storage`."""

    storage: int
    offset: int
    stride: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """`count` pieces of one shape, each `distance` bytes after the one before."""

    first: Piece
    count: int
    distance: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in this plane."""
        return self.count * self.first.size


class KvMemory(Protocol):
    """One worker's KV blocks in host terms; used by one thread at a time."""

    def gather(self, blocks: Sequence[int], into: Bytes) -> None:
        """Copies the blocks' bytes, in the order of transit, to the start of `into`."""

    def scatter(self, blocks: Sequence[int], source: Bytes) -> None:
        """The inverse: fills the blocks from the start of `source`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the bytes of `blocks` blocks lie in `storages`."""

    blocks: int
    storages: tuple[torch.UntypedStorage, ...]
    pieces: tuple[Piece, ...]
    device: torch.device

    @property
    def sizes(self) -> list[int]:
        """Bytes of one block, piece by piece: what two workers must have in common."""
        return [p.size for p in self.pieces]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all tensors."""
        return sum(self.sizes)

    def check(self, blocks: Sequence[int]) -> None:
        """IndexError, with the story, if a block is not one of ours."""
        if blocks and not 0 <= min(blocks) <= max(blocks) < self.blocks:
            raise IndexError(f"blocks {min(blocks)}..{max(blocks)}, of 0..{self.blocks - 1}")


def lay_out(tensors: Sequence[torch.Tensor], blocks: int) -> Layout:
    """The layout of KV tensors whose dimension 0 is `blocks` times a whole number of rows.

    Tensors may lie over each other. Pieces that begin at one place count once, with the bytes of
    the longest: vLLM lays its groups of layers over each other, each with pages of its own size.
    UsageError if a tensor has another number of rows, if they lie on several devices, or if a
    block's bytes are too scattered.
    """
    devices = {t.device for t in tensors}
    if len(devices) != 1:
        raise UsageError(f"the KV tensors must lie on one device, not on {len(devices)}")
    storages: dict[int, torch.UntypedStorage] = {}
    numbers: dict[int, int] = {}
    pieces: dict[tuple[int, int, int], Piece] = {}  # by storage, offset and stride
    for tensor in tensors:
        rows = tensor.shape[0]
        if blocks < 1 or rows == 0 or rows % blocks:
            raise UsageError(f"a KV tensor of {rows} rows cannot hold {blocks} blocks")
        storage = tensor.untyped_storage()
        number = numbers.setdefault(storage.data_ptr(), len(numbers))
        storages.setdefault(number, storage)
        offset = tensor.storage_offset() * tensor.element_size()
        for piece in _cut(tensor, number, offset, rows // blocks):
            begins = (piece.storage, piece.offset, piece.stride)
            if begins not in pieces and len(pieces) == PIECES_MAX:
                raise UsageError(f"a block lies in more than {PIECES_MAX} pieces of memory")
            if begins not in pieces or piece.size > pieces[begins].size:
                pieces[begins] = piece
    return Layout(
        blocks=blocks,
        storages=tuple(storages.values()),
        pieces=tuple(pieces.values()),
        device=devices.pop(),
    )


def _cut(tensor: torch.Tensor, storage: int, offset: int, rows_per_block: int) -> Iterator[Piece]:
    """The pieces of one tensor, from the bytes of its rows and the rows of a block."""
    item = tensor.element_size()
    row_stride = tensor.stride(0) * item
    # From the innermost dimension outwards: what joins on densely belongs to one run of bytes.
    run = item
    outer: list[tuple[int, int]] = []
    inner = sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True))
    for stride, length in inner:
        if length == 1:
            continue
        if stride * item == run and not outer:
            run *= length
        else:
            outer.append((stride * item, length))
    if row_stride == run and not outer:
        # Rows that follow each other densely: a block is one run.
        yield Piece(
            storage=storage,
            offset=offset,
            stride=row_stride * rows_per_block,
            size=run * rows_per_block,
        )
        return
    starts = [offset]
    for stride, length in reversed(outer):
        starts = [start + i * stride for start in starts for i in range(length)]
    for start in starts:
        for row in range(rows_per_block):
            yield Piece(
                storage=storage,
                offset=start + row * row_stride,
                stride=row_stride * rows_per_block,
                size=run,
            )


def fuse(pieces: Sequence[Piece]) -> list[Plane]:
    """The fewest planes that hold the pieces in their order."""
    planes: list[Plane] = []
    for piece in pieces:
        if planes:
            last = planes[-1]
            first = last.first
            distance = piece.offset - (first.offset + (last.count - 1) * last.distance)
            alike = (first.storage, first.stride, first.size) == (
                piece.storage,
                piece.stride,
                piece.size,
            )
            # The second piece of a plane sets its distance.
            if alike and distance > 0 and last.count == 1:
                planes[-1] = Plane(first=first, count=2, distance=distance)
                continue
            if alike and distance == last.distance:
                planes[-1] = Plane(first=first, count=last.count + 1, distance=distance)
                continue
        planes.append(Plane(first=piece, count=1, distance=0))
    return planes


def view(
    storage: torch.UntypedStorage, plane: Plane, blocks: int, dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    """The plane as a tensor (pieces, blocks, elements of `dtype`) over its storage's memory."""
    item = dtype.itemsize
    first = plane.first
    return torch.empty(0, dtype=dtype, device=storage.device).set_(
        storage,
        first.offset // item,
        (plane.count, blocks, first.size // item),
        (plane.distance // item, first.stride // item, 1),
    )


def runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Consecutive ids as (place in the list, first block, length)."""
    place = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:
            yield place, blocks[place], i - place
            place = i


class HostMemory:
    """KV blocks in host memory.

    The copies are numpy's: torch's would spread over the OpenMP threads on which the model runs,
    and make both slower.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._planes = [
            (plane, view(layout.storages[plane.first.storage], plane, layout.blocks).numpy())
            for plane in fuse(layout.pieces)
        ]

    def gather(self, blocks: Sequence[int], into: Bytes) -> None:
        """See `KvMemory`."""
        for packed, ours in self._pairs(blocks, into):
            np.copyto(packed, ours)

    def scatter(self, blocks: Sequence[int], source: Bytes) -> None:
        """See `KvMemory`."""
        for packed, ours in self._pairs(blocks, source):
            np.copyto(ours, packed)

    def _pairs(self, blocks: Sequence[int], packed: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
        self._layout.check(blocks)
        found = list(runs(blocks))
        start = 0
        for plane, ours in self._planes:
            end = start + len(blocks) * plane.block_bytes
            part = packed[start:end].reshape(plane.count, len(blocks), plane.first.size)
            for place, block, length in found:
                yield part[:, place : place + length], ours[:, block : block + length]
            start = end
