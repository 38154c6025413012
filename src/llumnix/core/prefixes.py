"""The names of prefixes, by which dispatch knows what is in the instances' caches.

A prefix is named by the chain of its blocks: the hash of a block covers the hash of the block
before it, so that one number stands for all tokens up to there. Frontends hash prompts with
`chain`, and llumlets hash what their engine computes. An engine's own hashes are of no use here,
since they differ from process to process.
"""

import hashlib
from array import array
from collections.abc import Sequence

BLOCK_TOKENS = 64
"""Tokens in a block that is named. Blocks are larger than most engines', since a short hit is worth
little and every block costs an entry. An engine's block size must divide this or be a multiple."""
PREFIX_BLOCKS_MAX = 512
"""Blocks of a prompt that are looked up; the rest of the prompt counts as new."""


def root(*keys: str | None) -> int:
    """The hash that a chain starts from. `keys`: LoRA adapter, cache salt; requests that differ in
    one share no blocks."""
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
