"""Which instance has which blocks of prompts in its prefix cache, as far as dispatch knows."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from llumnix.core.types import InstanceId


class PrefixIndex:
    """The blocks that each instance keeps.

    Engines drop the end of a prompt first. So a search assumes that an instance that keeps a block
    also keeps those before it. If one does not, a search finds less of the prompt, or nothing. A
    search is a bisection over the blocks of the prompt."""

    def __init__(self) -> None:
        # Of each block, in the order in which they stored it.
        self._holders: dict[int, dict[InstanceId, None]] = {}
        self._kept: dict[InstanceId, set[int]] = {}

    def store(self, instance: InstanceId, hashes: Iterable[int]) -> None:
        """The instance keeps these blocks now."""
        kept = self._kept.setdefault(instance, set())
        for h in hashes:
            kept.add(h)
            self._holders.setdefault(h, {})[instance] = None

    def remove(self, instance: InstanceId, hashes: Iterable[int]) -> None:
        """The instance no longer keeps these blocks."""
        kept = self._kept.get(instance, set())
        for h in hashes:
            if h in kept:
                kept.discard(h)
                holders = self._holders[h]
                del holders[instance]
                if not holders:
                    del self._holders[h]

    def clear(self, instance: InstanceId) -> None:
        """The instance keeps no block any more."""
        self.remove(instance, list(self._kept.get(instance, ())))
        self._kept.pop(instance, None)

    def hit(self, instance: InstanceId, prefix: Sequence[int]) -> int:
        """How many leading blocks of the prefix an instance keeps."""
        kept = self._kept.get(instance)
        if not kept or not prefix or prefix[0] not in kept:
            return 0
        blocks = bisect_left(prefix, True, key=lambda block: block not in kept)
        return blocks if kept.issuperset(prefix[:blocks]) else 1

    def hits(self, prefix: Sequence[int], most: int, above: int = 0) -> dict[InstanceId, int]:
        """The instances that keep the most leading blocks of the prefix, and how many blocks. At
        most `most` instances, each with more than `above` blocks. The longest hit comes first; on a
        tie the instance that stored it last does."""
        found: dict[InstanceId, int] = {}
        holders = self._holders
        blocks = bisect_left(prefix, True, key=lambda block: block not in holders)
        while blocks > above:
            here = holders[prefix[blocks - 1]]
            for instance in reversed(here):
                if instance not in found and self._kept[instance].issuperset(prefix[:blocks]):
                    found[instance] = blocks
                    if len(found) == most:
                        return found
            count = len(here)
            blocks = bisect_left(
                prefix,
                True,
                hi=blocks - 1,
                key=lambda block: len(holders.get(block, ())) <= count,
            )
        return found
