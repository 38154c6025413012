"""The KV blocks of one simulated engine: how many are held, and what the prefix cache still has.

vLLM reuses blocks in the order in which they were freed. A block that was freed when `free` blocks
were free and `taken` were allocated so far is overwritten by allocation number `taken + free`, so
that one number says whether a cached block is still intact. What is left out: a hit takes a block
out of the middle of vLLM's queue, and those behind it are reused earlier.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llumnix.core.queue_rules import SliceRules
from llumnix.core.slices.lengths import End
from llumnix.core.slices.promises import Slices
from llumnix.core.types import RequestId
from llumnix.sim.model import jobs


@dataclass(slots=True)
class Shared:
    """Blocks of one prefix id: how many requests hold them, and, if none does, the allocation that
    overwrites them."""

    holders: int
    until: int = 0


class Memory:
    """`total`, `free`: blocks. `taken`: blocks allocated so far. `caching`: whether there is a
    prefix cache. `cache_changes`: prefix ids that it began to have (True) or lost since its reader
    cleared it last."""

    def __init__(self, total: int, *, caching: bool) -> None:
        self.total = total
        self.free = total
        self.taken = 0
        self.caching = caching
        self.cache_changes: list[tuple[int, bool]] = []
        self._shared: dict[int, Shared] = {}
        self._fading: list[tuple[int, int]] = []

    def take(self, blocks: int) -> None:
        """Allocates; the caller has looked whether there are so many."""
        assert blocks <= self.free
        self.free -= blocks
        self.taken += blocks
        while self._fading and self._fading[0][0] <= self.taken:
            until, name = heapq.heappop(self._fading)
            shared = self._shared.get(name)
            if shared is not None and not shared.holders and shared.until == until:
                del self._shared[name]
                self.cache_changes.append((name, False))

    def give(self, blocks: int) -> None:
        """Frees blocks whose contents no request will ask for again."""
        self.free += blocks
        assert self.free <= self.total

    @property
    def shares(self) -> bool:
        """Whether requests may hold the same blocks."""
        return bool(self._shared)

    # -- blocks of one request, which it may come back for

    def leave(self, blocks: int) -> tuple[int, int, int]:
        """Frees the blocks of a request that will come back. Returns what `kept` wants to know."""
        ticket = (blocks, self.taken, self.free)
        self.give(blocks)
        return ticket

    def kept(self, ticket: tuple[int, int, int] | None) -> int:
        """How many of its leading blocks are still there: the last of them go first."""
        if ticket is None or not self.caching:
            return 0
        blocks, taken, free = ticket
        return max(0, blocks - max(0, self.taken - taken - free))

    def take_back(self, blocks: int) -> None:
        """Takes blocks that are still there: nothing is overwritten for them."""
        assert blocks <= self.free
        self.free -= blocks

    # -- blocks that requests share

    def hits(self, ids: Sequence[int]) -> int:
        """How many leading ids are cached."""
        if not self.caching:
            return 0
        for count, name in enumerate(ids):
            if name not in self._shared:
                return count
        return len(ids)

    def idle(self, ids: Sequence[int]) -> int:
        """How many of these cached ids no request holds, so that to hold them takes free blocks."""
        return sum(not self._shared[i].holders for i in ids)

    def hold(self, ids: Sequence[int], blocks: int) -> None:
        """One more holder of cached ids, of `blocks` blocks each."""
        for name in ids:
            shared = self._shared[name]
            if not shared.holders:
                self.take_back(blocks)
            shared.holders += 1

    def publish(self, ids: Sequence[int]) -> list[int]:
        """A request has computed the blocks of these ids: from now on others may share them.
        Returns the ids that it holds. Those that another request holds already are not shared."""
        mine = []
        for name in ids:
            shared = self._shared.get(name)
            if self.caching and (shared is None or not shared.holders):
                self._shared[name] = Shared(holders=1)
                self.cache_changes.append((name, True))
                mine.append(name)
        return mine

    def unhold(self, ids: Sequence[int], blocks: int) -> None:
        """One holder less. The last ones are freed first."""
        for name in reversed(ids):
            shared = self._shared[name]
            shared.holders -= 1
            if not shared.holders:
                self.free += blocks
                shared.until = self.taken + self.free
                heapq.heappush(self._fading, (shared.until, name))


class Start(NamedTuple):
    """What it takes to start a request."""

    ids: tuple[int, ...]  # of its prefix, that are cached
    private_blocks: int  # that are cached beside those
    found: int  # tokens that have KV
    held: int  # blocks of these
    wanted: int  # free blocks that it takes


class SequenceBlocks:
    """The blocks of one engine's requests, and those that are promised to them. `kv_tokens`: of
    its memory; `caching`: whether there is a prefix cache."""

    def __init__(
        self,
        kv_tokens: int,
        block_tokens: int,
        *,
        caching: bool,
        slices: SliceRules | None = None,
    ) -> None:
        self.block_tokens = block_tokens
        self.memory = Memory(kv_tokens // block_tokens, caching=caching)
        self.slices = Slices(slices, block_tokens) if slices is not None else None
        self._promised: int | None = None  # as counted in this step; None if that has changed
        self._pinned_blocks: dict[RequestId, int] = {}

    def slice_room(self, seq: jobs.Sequence) -> int:
        """Blocks that its slice takes beyond those it starts with, and all others' promises."""
        assert self.slices is not None
        ahead = self.slices.first("", seq.tokens, seq.outputs, self._answer_max(seq))
        return self.promised() + ahead

    def promised(self) -> int:
        """Blocks that requests which run, hold KV or arrive may still take in their slices."""
        if self.slices is None:
            return 0
        if self._promised is None:
            self._promised = 0
            for seq in self._holders():
                seq.promise, left = self.slices.left(
                    seq.promise,
                    "",
                    seq.tokens,
                    seq.outputs,
                    seq.blocks,
                    self._answer_max(seq),
                    seq.came_with,
                )
                self._promised += left
        return self._promised

    def left(self, seq: jobs.Sequence) -> int:
        """Blocks that one of them may still take, as it was last counted."""
        return 0 if seq.promise is None else max(0, seq.promise.blocks - seq.blocks)

    def _learn(self, seq: jobs.Sequence, end: End) -> None:
        """It leaves."""
        if self.slices is not None:
            self.slices.gone(seq.promise, "", seq.outputs, seq.came_with, end=end)

    def _holders(self) -> Iterable[jobs.Sequence]:
        """Requests that have KV, or will."""
        raise NotImplementedError

    def _answer_max(self, seq: jobs.Sequence) -> int:
        """Tokens of answer that memory has room for, which stands for a model's length."""
        return self.memory.total * self.block_tokens - seq.job.prompt

    def needed(self, seq: jobs.Sequence) -> int:
        """KV tokens of a request, in whole blocks."""
        return self._blocks(seq) * self.block_tokens

    def _blocks(self, seq: jobs.Sequence) -> int:
        return -(-seq.tokens // self.block_tokens)

    def _start(self, seq: jobs.Sequence) -> "Start":
        """What there is of a request that waits without KV, and what it takes to start it."""
        shared, private_blocks = self._hits(seq)
        cached = shared * seq.job.prefix_blocks + private_blocks
        ids = seq.job.prefix[:shared]
        idle = self.memory.idle(ids) * seq.job.prefix_blocks + private_blocks
        held = seq.blocks + cached
        wanted = self._blocks(seq) - held + idle
        return Start(ids, private_blocks, seq.computed + cached * self.block_tokens, held, wanted)

    def _hits(self, seq: jobs.Sequence) -> tuple[int, int]:
        """What the prefix cache has of a request: shared ids, and blocks of its own after them. At
        least one token is left to compute."""
        job, most = seq.job, (seq.tokens - 1) // self.block_tokens
        shared = self.memory.hits(job.prefix) if job.prefix else 0
        while shared and shared * job.prefix_blocks > most:
            shared -= 1
        private_blocks = self.memory.kept(seq.freed_blocks) if seq.freed_blocks is not None else 0
        if shared < len(job.prefix):
            return shared, 0
        return shared, max(0, min(private_blocks, most - shared * job.prefix_blocks))

    def _publish(self, seq: jobs.Sequence) -> None:
        """Its prompt is computed: whole prefix blocks of it can be shared."""
        rest = seq.job.prefix[len(seq.held) :]
        seq.held += self.memory.publish(rest)

    def _free(self, seq: jobs.Sequence, kept: int = 0) -> None:
        """Frees its blocks, but those that are being copied only when that is over."""
        job = seq.job
        private_blocks = seq.blocks - len(seq.held) * job.prefix_blocks
        self.memory.unhold(seq.held, job.prefix_blocks)
        if seq.pinned:
            pinned = min(seq.pinned, private_blocks)
            self._pinned_blocks[job.id] = self._pinned_blocks.get(job.id, 0) + pinned
            private_blocks, kept, seq.pinned = private_blocks - pinned, 0, 0
        mine = max(0, min(private_blocks, kept - len(seq.held) * job.prefix_blocks))
        self.memory.give(private_blocks - mine)
        seq.freed_blocks = self.memory.leave(mine) if mine else None
        seq.held, seq.blocks, seq.computed = [], 0, 0
        if seq.promise is not None:
            seq.promise.until = 0  # It starts again like a new one.
