"""The names of prefixes, by which dispatch knows what is in the instances' caches.

A prefix is named by the chain of its blocks: the hash of a block covers the hash of the block
before it, so one number stands for all tokens up to there. Frontends hash prompts, llumlets what
their engine computes, both with `chain`; the engines' own hashes, which differ from
process to process, stay at home.
"""

import hashlib
from array import array
from collections.abc import Sequence

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
