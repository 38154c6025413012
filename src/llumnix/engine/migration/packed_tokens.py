"""Token ids of requests that move in, packed, so that nothing on their way looks at each of them.

With a request's first step vLLM's scheduler gives its prompt and all its tokens to the workers, as
lists of numbers. For worker processes they are pickled, and runner V2 turns the latter into an
array. With 32,000 tokens each of these takes one to three milliseconds, and a request that has
moved in waits for all of them. So they cross as bytes, and a worker whose runner V2 takes bytes
makes no lists of them.

vLLM internals relied on here (tests/house/test_vllm_migration_contract.py fails when one
changes): `Request` takes the list of its prompt as it is, and begins the list of all its tokens
with a `copy()` of it, to which it only appends. Runner V2 reads them in `add_requests` alone: of a
prompt its length, and of all tokens what `req_states` and `model_state` read. The first's
`all_token_ids` collects the tokens of a step's new requests in `_staged_write_contents`, by
`extend`. It gives all of that to `write_contents`, which assigns it to an int32 array, and clears
it. If `write_contents` is None it goes another way, which is left as it is.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self, overload

import numpy as np


class Prompt(list[int]):
    """A prompt of token ids below 2**31, which must not change. `packed`: the same as int32."""

    def __init__(self, ids: Iterable[int], packed: bytes | None = None) -> None:
        super().__init__(ids)
        self.packed = _pack(self) if packed is None else packed

    def copy(self) -> "Grown":
        """A list of the same tokens, to be appended to."""
        return Grown(self)

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return _prompt, (self.packed,)


class Grown(list[int]):
    """A prompt, and what was appended to it. Pickled beside its prompt, it costs only what was
    appended."""

    def __init__(self, prompt: Prompt, more: Iterable[int] = ()) -> None:
        super().__init__(prompt)
        self.extend(more)
        self._prompt = prompt

    @property
    def packed(self) -> bytes:
        """All its tokens as int32."""
        return self._prompt.packed + _pack(self._more())

    def copy(self) -> Self:
        """A list of the same tokens."""
        return type(self)(self._prompt, self._more())

    def __reduce__(self) -> tuple[Any, tuple[Prompt, list[int]]]:
        return _grown, (self._prompt, self._more())

    def _more(self) -> list[int]:
        return self[len(self._prompt) :]


class Packed(Sequence[int]):
    """Tokens as they arrive in a worker whose runner takes them packed. Read only. Each other use
    makes the numbers anew."""

    def __init__(self, packed: bytes) -> None:
        """`packed`: as int32."""
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed) // 4

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> list[int]: ...
    def __getitem__(self, at: int | slice) -> int | list[int]:
        found: int | list[int] = self.__array__()[at].tolist()
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self[:] == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(np.frombuffer(self.packed, np.int32), dtype, copy=copy)


class Gathered(array):  # type: ignore[type-arg]
    """Tokens on their way to runner V2's memory. It stands in for a list there, and is packed."""

    def __new__(cls) -> Self:
        return super().__new__(cls, "i")

    def extend(self, ids: Iterable[int]) -> None:
        """Appends tokens, packed ones as they are."""
        if isinstance(ids, Prompt | Grown | Packed):
            self.frombytes(ids.packed)
        elif isinstance(ids, list):
            self.fromlist(ids)
        else:
            super().extend(ids)

    def clear(self) -> None:
        """Drops all tokens."""
        del self[:]


def take_packed(runner: Any) -> None:
    """Makes a worker's model runner take packed tokens as they are, if it can."""
    global _stay_packed
    tokens = getattr(getattr(runner, "req_states", None), "all_token_ids", None)
    if tokens is not None and tokens.write_contents is not None:
        tokens._staged_write_contents = Gathered()
        _stay_packed = True


_stay_packed = False
"""Whether this process is a worker with such a runner, in which packed tokens stay so."""


def _pack(ids: list[int]) -> bytes:
    return np.array(ids, dtype=np.int32).tobytes()


def _prompt(packed: bytes) -> Prompt | Packed:
    if _stay_packed:
        return Packed(packed)
    return Prompt(np.frombuffer(packed, dtype=np.int32).tolist(), packed)


def _grown(prompt: Prompt | Packed, more: list[int]) -> Grown | Packed:
    if isinstance(prompt, Packed):
        return Packed(prompt.packed + _pack(more))
    return Grown(prompt, more)
