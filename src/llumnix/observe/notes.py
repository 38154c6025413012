"""Rings of what happened lately, for those who watch a deployment."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

NOTES_KEPT = 1000
"""Moves, revivals and what became of instances: some minutes of a busy deployment."""
SHORT_KEPT = 4096
"""Requests placed or ended: a second of a deployment that is as busy as one process can be."""

Item = TypeVar("Item")


class Ring(Generic[Item]):
    """The last `kept` items. `count` is how many there have been."""

    def __init__(self, kept: int) -> None:
        self.count = 0
        self._kept: deque[Item] = deque(maxlen=kept)

    def add(self, item: Item) -> None:
        """Keeps one more."""
        self.count += 1
        self._kept.append(item)

    def since(self, count: int) -> list[Item]:
        """Those that came after the first `count`, the oldest first, as far as they are kept."""
        new = min(self.count - count, len(self._kept))
        return list(self._kept)[-new:] if new > 0 else []


class Notes(Ring[dict[str, Any]]):
    """Things that happened, as JSON: `t` is the wall clock in seconds, `kind` says what."""

    def __init__(self) -> None:
        super().__init__(NOTES_KEPT)
        self.heard: Callable[[dict[str, Any]], None] | None = None  # is told of each new one

    def note(self, kind: str, target: str, why: str, **more: Any) -> None:
        """`target`: the instance or request that it happened to."""
        one = {"t": round(time.time(), 3), "kind": kind, "target": target, "why": why, **more}
        self.add(one)
        if self.heard is not None:
            self.heard(one)
