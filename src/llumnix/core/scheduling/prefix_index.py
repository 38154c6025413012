"""Which instance keeps which prefix in its cache: what dispatch knows of them."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from llumnix.core.types import InstanceId


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
