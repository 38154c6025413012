"""Token ids that cross to an engine's worker processes fast.

vLLM's scheduler sends a request's prompt and all its tokens with its first step, pickled. One that
has moved in stands still meanwhile, and of 32,000 tokens two plain lists take some milliseconds.

vLLM 0.32 internals relied on here (tests/house/test_vllm_migration_contract.py fails when one
changes): `Request` takes the list of its prompt as it is, and begins the list of all its tokens
with a `copy()` of it, which it only appends to.
"""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np


class Prompt(list[int]):
    """A prompt, of token ids below 2**31, that must not change. Pickles packed, into a list."""

    def __init__(self, ids: Iterable[int]) -> None:
        super().__init__(ids)
        self._packed = np.array(self, dtype=np.int32).tobytes()

    def copy(self) -> "Grown":
        """A list of the same, to be appended to."""
        return Grown(self)

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return _unpacked, (self._packed,)


class Grown(list[int]):
    """A prompt and what was appended to it. Pickled with its prompt, it costs what was appended."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__(prompt)
        self._prompt = prompt

    def copy(self) -> Self:
        """Another one."""
        other = type(self)(self._prompt)
        other.extend(self[len(self._prompt) :])
        return other

    def __reduce__(self) -> tuple[Any, tuple[Prompt, list[int]]]:
        return _joined, (self._prompt, self[len(self._prompt) :])


def _unpacked(packed: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(packed, dtype=np.int32).tolist()
    return ids


def _joined(prompt: list[int], more: list[int]) -> list[int]:
    return prompt + more
