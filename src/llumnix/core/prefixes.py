"""Which instance keeps which prefix in its cache: what dispatch knows of them.

A prefix is named by the chain of its blocks: the hash of a block covers the hash of the block
before it, so one number stands for all tokens up to there. Frontends hash prompts, llumlets what
their engine computes, both with `chain`; the engines' own hashes, which differ from
process to process, stay at home.
"""

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from llumnix.core.types import InstanceId

BLOCK_TOKENS = 64
"""Tokens in one of our blocks: coarser than most engines', since a short hit is worth little and
every block costs an entry. An engine's block size must divide it or be a multiple of it."""
PREFIX_BLOCKS_MAX = 512
"""Blocks of a prompt that are looked up; what lies beyond them counts as new."""


def root(*keys: str | None) -> int:
    """What a chain starts from: requests that differ in these (LoRA adapter, cache salt) share no
    blocks."""
    return _number("\0".join(k or "" for k in keys).encode())


def extend(parent: int, tokens: Sequence[int]) -> int:
    """The hash of a block that follows `parent`."""
    return _number(parent.to_bytes(8, "little") + array("q", tokens).tobytes())


def chain(start: int, tokens: Sequence[int]) -> tuple[int, ...]:
    """The hashes of all full blocks of `tokens`, at most `PREFIX_BLOCKS_MAX`."""
    found: list[int] = []
    for block in range(min(len(tokens) // BLOCK_TOKENS, PREFIX_BLOCKS_MAX)):
        start = extend(start, tokens[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS])
        found.append(start)
    return tuple(found)


def _number(data: bytes) -> int:
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # Positive in 64 bits.


class PrefixIndex:
    """The blocks that each instance keeps. Searches take them to keep no block without those before
    it, for engines drop the end of a prompt first; where one does, it finds less or nothing."""

    def __init__(self) -> None:
        # Those that came to keep a block last are last.
        self._holders: dict[int, dict[InstanceId, None]] = {}
        self._kept: dict[InstanceId, set[int]] = {}

    def store(self, instance: InstanceId, hashes: Iterable[int]) -> None:
        """It keeps these now."""
        kept = self._kept.setdefault(instance, set())
        for h in hashes:
            kept.add(h)
            self._holders.setdefault(h, {})[instance] = None

    def remove(self, instance: InstanceId, hashes: Iterable[int]) -> None:
        """It ceased to keep these."""
        kept = self._kept.get(instance, set())
        for h in hashes:
            if h in kept:
                kept.discard(h)
                holders = self._holders[h]
                del holders[instance]
                if not holders:
                    del self._holders[h]

    def clear(self, instance: InstanceId) -> None:
        """It keeps nothing."""
        self.remove(instance, list(self._kept.get(instance, ())))
        self._kept.pop(instance, None)

    def hit(self, instance: InstanceId, prefix: Sequence[int]) -> int:
        """How many leading blocks of the prefix an instance keeps."""
        kept = self._kept.get(instance)
        if not kept or not prefix or prefix[0] not in kept:
            return 0
        blocks = _leading(len(prefix), lambda n: prefix[n] in kept)
        return blocks if kept.issuperset(prefix[:blocks]) else 1

    def hits(self, prefix: Sequence[int], most: int, above: int = 0) -> dict[InstanceId, int]:
        """The instances that keep the most leading blocks of the prefix, more than `above` and at
        most `most` of them: the more blocks the earlier, and of as many the later it came to keep
        them."""
        found: dict[InstanceId, int] = {}
        holders = self._holders
        blocks = _leading(len(prefix), lambda n: prefix[n] in holders)
        while blocks > above:
            here = holders[prefix[blocks - 1]]
            for instance in reversed(here):
                if instance not in found and self._kept[instance].issuperset(prefix[:blocks]):
                    found[instance] = blocks
                    if len(found) == most:
                        return found
            count = len(here)
            blocks = _leading(blocks - 1, lambda n: len(holders.get(prefix[n], ())) > count)  # noqa: B023
        return found


def _leading(count: int, holds: Callable[[int], bool]) -> int:
    """How many of the numbers below `count` come before the first for which it does not hold."""
    return bisect_left(range(count), True, key=lambda n: not holds(n))
