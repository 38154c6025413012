"""Which instance keeps which prefix in its cache: what cache-aware dispatch knows.

A prefix is named by the chain of its blocks: the hash of a block covers the hash of the block
before it, so one number stands for all tokens up to there. Frontends hash prompts, llumlets hash
what their engine's cache events name, both with `chain`; the engines' own hashes, which differ from
process to process, stay at home.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence

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
    """The blocks that each instance keeps."""

    def __init__(self) -> None:
        self._holders: dict[int, set[InstanceId]] = {}
        self._kept: dict[InstanceId, set[int]] = {}

    def store(self, instance: InstanceId, hashes: Iterable[int]) -> None:
        """It keeps these now."""
        kept = self._kept.setdefault(instance, set())
        for h in hashes:
            kept.add(h)
            self._holders.setdefault(h, set()).add(instance)

    def remove(self, instance: InstanceId, hashes: Iterable[int]) -> None:
        """It ceased to keep these."""
        kept = self._kept.get(instance, set())
        for h in hashes:
            if h in kept:
                kept.discard(h)
                holders = self._holders[h]
                holders.discard(instance)
                if not holders:
                    del self._holders[h]

    def clear(self, instance: InstanceId) -> None:
        """It keeps nothing."""
        self.remove(instance, list(self._kept.get(instance, ())))
        self._kept.pop(instance, None)

    def hits(self, prefix: Sequence[int]) -> dict[InstanceId, int]:
        """How many leading blocks of the prefix each instance keeps, in order of their ids; those
        with none left out."""
        found: dict[InstanceId, int] = {}
        for instance in sorted(self._holders.get(prefix[0], ())) if prefix else ():
            kept = self._kept[instance]
            missing = (blocks for blocks, h in enumerate(prefix) if h not in kept)
            found[instance] = next(missing, len(prefix))
        return found
