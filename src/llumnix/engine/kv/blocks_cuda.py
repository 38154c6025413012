"""KV blocks on GPUs: through pinned host memory, or straight out of a peer's mapped memory.

A peer on the same host exports its storages once (CUDA IPC); the puller maps them *on its own
device*, whose copy engines (or, without vLLM's operator for that, its kernels) read them over
NVLink or PCIe. So a pull is work on one stream of one device: nothing crosses streams, the peer's
GPU need not be visible here, and no context of ours takes memory on it. Where the GPUs cannot
reach each other, mapping fails and the bytes go through host memory.

vLLM internals relied on here (tests/house/test_vllm_migration_contract.py fails when one
changes): the operator `_C_cache_ops.swap_blocks_batch`.

Every call runs on a stream of its owner's, and returns when its work is done. The thread that
makes one of these objects must be the one that uses it, and is bound to its GPU from then on.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from llumnix.engine.kv.blocks import Bytes, Layout, Piece, Plane, fuse, view
from llumnix.engine.kv.links import Exported, PieceAt, TransferError

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def word(planes: Sequence[Plane]) -> torch.dtype:
    """The widest integer of which all offsets, distances and sizes are multiples.

    A kernel that moves words of 8 bytes reads a peer's memory several times faster than bytes.
    """
    numbers = [
        n for p in planes for n in (p.first.offset, p.first.stride, p.first.size, p.distance)
    ]
    return next(dtype for size, dtype in _WORDS if not any(n % size for n in numbers))


def _bind(layout: Layout) -> None:
    """Makes the layout's GPU the calling thread's.

    A new thread's GPU is number 0 whichever the worker's is, and leaving a stream's context there
    would make a CUDA context on it: half a GiB of a GPU that is another rank's.
    """
    torch.cuda.set_device(layout.device)


class CudaMemory:
    """KV blocks on a GPU, staged through pinned host memory."""

    def __init__(self, layout: Layout) -> None:
        _bind(layout)
        self._layout = layout
        self._stream = torch.cuda.Stream(layout.device)
        self._pinned = torch.empty(0, dtype=torch.uint8)
        planes = fuse(layout.pieces)
        dtype = word(planes)
        self._planes = [
            (p, view(layout.storages[p.first.storage], p, layout.blocks, dtype)) for p in planes
        ]

    def gather(self, blocks: Sequence[int], into: Bytes) -> None:
        """See `blocks.KvMemory`."""
        self._layout.check(blocks)
        total = len(blocks) * self._layout.block_bytes
        pinned = self._room(total)
        start = 0
        with torch.cuda.stream(self._stream):
            index = torch.tensor(blocks, dtype=torch.int64, device=self._layout.device)
            for plane, ours in self._planes:
                end = start + len(blocks) * plane.block_bytes
                packed = ours.index_select(1, index)
                pinned[start:end].copy_(packed.view(-1).view(torch.uint8), non_blocking=True)
                start = end
        self._stream.synchronize()
        np.copyto(into[:total], pinned[:total].numpy())

    def scatter(self, blocks: Sequence[int], source: Bytes) -> None:
        """See `blocks.KvMemory`."""
        self._layout.check(blocks)
        total = len(blocks) * self._layout.block_bytes
        pinned = self._room(total)
        np.copyto(pinned[:total].numpy(), source[:total])
        start = 0
        with torch.cuda.stream(self._stream):
            index = torch.tensor(blocks, dtype=torch.int64, device=self._layout.device)
            for plane, ours in self._planes:
                end = start + len(blocks) * plane.block_bytes
                packed = pinned[start:end].to(self._layout.device, non_blocking=True)
                shape = (plane.count, len(blocks), ours.shape[2])
                ours.index_copy_(1, index, packed.view(ours.dtype).view(shape))
                start = end
        self._stream.synchronize()

    def _room(self, size: int) -> torch.Tensor:
        if self._pinned.numel() < size:
            self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._pinned


def export(layout: Layout) -> list[Exported]:
    """The storages for another process to map. RuntimeError if their allocator cannot share.

    This is what `torch.multiprocessing.reductions.reduce_tensor` sends, once for a storage rather
    than once for a tensor, and as plain values instead of a pickle. torch counts the mappings in
    a small file in /dev/shm, which stays behind if this process is killed.
    """
    _bind(layout)
    exported = []
    for storage in layout.storages:
        _, handle, size, offset, counter, counter_offset, event, event_wanted = (
            storage._share_cuda_()
        )
        exported.append(
            Exported(
                handle=handle,
                size=size,
                offset=offset,
                counter_handle=counter,
                counter_offset=counter_offset,
                event_handle=event,
                event_wanted=event_wanted,
            )
        )
    return exported


class MappedPeer:
    """A peer's KV blocks, read in place by this worker's GPU."""

    def __init__(
        self,
        layout: Layout,
        *,
        storages: Sequence[Exported],
        pieces: Sequence[PieceAt],
        blocks: int,
    ) -> None:
        """Maps the peer's memory. RuntimeError if the GPUs cannot reach each other."""
        _bind(layout)
        self._layout = layout
        self._stream = torch.cuda.Stream(layout.device)
        with torch.cuda.stream(self._stream):
            mapped = [
                torch.UntypedStorage._new_shared_cuda(
                    # Our own device, not the exporter's: see the top of this file.
                    layout.device.index,
                    s.handle,
                    s.size,
                    s.offset,
                    s.counter_handle,
                    s.counter_offset,
                    s.event_handle,
                    s.event_wanted,
                )
                for s in storages
            ]
        theirs = [
            Piece(storage=p.storage, offset=p.offset, stride=p.stride, size=p.size) for p in pieces
        ]
        self._pairs = [
            (
                view(mapped[far.first.storage], far, blocks, dtype),
                view(layout.storages[near.first.storage], near, layout.blocks, dtype),
            )
            for far, near, dtype in pair_up(theirs, layout.pieces)
        ]

        self._dma = copy_engines()

    @property
    def by_dma(self) -> bool:
        """Whether the GPU's copy engines do the work: no kernels, and no memory in between."""
        return self._dma is not None

    def pull(self, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copies the peer's blocks `source` into ours, `destination`."""
        if self._dma is not None:
            froms, tos, sizes = addresses(self._pairs, source, destination)
            with torch.cuda.stream(self._stream):
                self._dma(froms, tos, sizes, True)
        else:
            self._pull_by_kernels(source, destination)
        # CUDA reports a fault of the copies here, as a RuntimeError.
        self._stream.synchronize()

    def _pull_by_kernels(self, source: Sequence[int], destination: Sequence[int]) -> None:
        with torch.cuda.stream(self._stream):
            both = torch.tensor(
                [source, destination], dtype=torch.int64, device=self._layout.device
            )
            theirs, ours = both.unbind(0)
            for far, near in self._pairs:
                near.index_copy_(1, ours, far.index_select(1, theirs))


def copy_engines() -> Callable[..., None] | None:
    """vLLM's batched copy (sources, destinations, sizes, any order), or None if this vLLM has none.

    It hands all copies to the driver in one call, and the copy engines do them: kernels that read
    over NVLink would take multiprocessors from the model for as long as they wait.
    """
    try:
        import vllm._custom_ops  # noqa: F401 - registers the operators
    except ImportError:
        return None
    try:
        copy: Callable[..., None] = torch.ops._C_cache_ops.swap_blocks_batch
    except AttributeError:
        return None
    return copy


def addresses(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    source: Sequence[int],
    destination: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What to copy where: addresses and sizes in bytes, as int64 tensors on the host.

    `pairs` are views (pieces, blocks, words) of the peer's planes and of ours. Blocks that follow
    each other on both sides, in planes where blocks lie end to end, are one copy.
    """
    froms, tos, sizes = [], [], []
    places = np.array([source, destination], dtype=np.int64)
    for far, near in pairs:
        item, words = far.element_size(), far.shape[2]
        dense = far.stride(1) == words == near.stride(1)
        first, length = _joint_runs(places) if dense else _singly(places)
        layers = np.arange(far.shape[0], dtype=np.int64)[:, None]
        for tensor, blocks, into in ((far, places[0, first], froms), (near, places[1, first], tos)):
            at = layers * (tensor.stride(0) * item) + blocks * (tensor.stride(1) * item)
            into.append((tensor.data_ptr() + at).ravel())
        sizes.append(np.tile(length * (words * item), far.shape[0]))
    return tuple(torch.from_numpy(np.concatenate(parts)) for parts in (froms, tos, sizes))  # type: ignore[return-value]


def _joint_runs(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs begin that are consecutive in both rows, and how long they are."""
    breaks = np.flatnonzero((np.diff(places, axis=1) != 1).any(axis=0)) + 1
    first = np.concatenate([[0], breaks])
    return first, np.diff(np.concatenate([first, [places.shape[1]]]))


def _singly(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = places.shape[1]
    return np.arange(count), np.ones(count, dtype=np.int64)


def pair_up(
    theirs: Sequence[Piece], ours: Sequence[Piece]
) -> list[tuple[Plane, Plane, torch.dtype]]:
    """Planes of both sides that hold the same bytes, and the word to copy them in.

    TransferError if the pieces differ in number or size.
    """
    if [p.size for p in theirs] != [p.size for p in ours]:
        raise TransferError("the peer's KV blocks have another layout")
    far, near = fuse(theirs), fuse(ours)
    if [p.count for p in far] != [p.count for p in near]:
        # Equal pieces, laid out at other distances: piece by piece it is.
        far = [Plane(first=p, count=1, distance=0) for p in theirs]
        near = [Plane(first=p, count=1, distance=0) for p in ours]
    return [(f, n, word([f, n])) for f, n in zip(far, near, strict=True)]
