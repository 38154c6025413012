"""The seam between migrations and an engine: what core/migration/llumlet.py asks of it.

All calls come on the engine's own thread, between two of its steps, and return at once. The real
engine implements it in engine/migration/vllm_port.py, a fake one in tests/support/fake_engine.py,
and one suite of scenarios holds both to the same behaviour (tests/conformance).
"""

import enum
from dataclasses import dataclass
from typing import Protocol

from llumnix.core.messages import Blocks
from llumnix.core.types import EngineIndex, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """It cannot be done, and why."""

    why: str
    for_ever: bool = False  # it never will be possible for that request


class Phase(enum.Enum):
    """What a request does on its engine."""

    WAITING = "waiting"
    """Queued; holds no KV blocks."""
    RUNNING = "running"
    STOPPED = "stopped"
    """Taken out for a migration."""
    GONE = "gone"
    """Finished, aborted or never seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a request is, in tokens. `settled`: computed by steps that are over; `in_flight`:
    whether a step with it is under way; `tokens`: prompt and output; `outputs`: generated;
    `preemptions`: how often it lost its KV."""

    phase: Phase
    settled: int = 0
    in_flight: bool = False
    tokens: int = 0
    outputs: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Movable:
    """A request that could leave its engine. `priority`: vLLM's number, as its client has it;
    `tokens`: of KV, in whole blocks, that it holds or, if it is `waiting`, needs to start. `busy`:
    it cannot be moved well just now (in the middle of its prompt, for one)."""

    request: RequestId
    priority: int
    tokens: int
    waiting: bool
    busy: bool = False


class EnginePort(Protocol):
    """One engine, seen from its migrations. `block_tokens`: size of a block, of the largest group
    of layers if they differ."""

    block_tokens: int

    @property
    def step_s(self) -> float:
        """How long a step without prompts takes, of late."""
        ...

    @property
    def prompts_in_flight(self) -> bool:
        """Whether a step that computes prompts is under way."""
        ...

    # -- source

    def movable(self) -> list[Movable]:
        """The requests that could be moved: a few of those that wait, in the order in which they
        will be served, and all that run."""
        ...

    def describe(self, request: RequestId) -> bytes | Refusal:
        """The request as its destination needs it, or why it cannot be moved."""
        ...

    def agents(self) -> list[str]:
        """Where this engine's workers let their blocks be read, one for each rank."""
        ...

    def progress(self, request: RequestId) -> Progress:
        """How far it is."""
        ...

    def outputs(self, request: RequestId, first: int) -> list[int]:
        """The tokens it has generated, from number `first` on."""
        ...

    def pin(self, request: RequestId, start: int, end: int) -> Blocks:
        """Keeps the blocks of tokens [start, end) as they are until `unpin`, whatever becomes of
        the request. May be called several times."""
        ...

    def unpin(self, request: RequestId) -> None:
        """Undoes all `pin`s of the request."""
        ...

    def stop(self, request: RequestId) -> None:
        """Takes it out of the batch or the queue; it keeps its blocks."""
        ...

    def handover_state(self, request: RequestId, start: int) -> tuple[int, Blocks, bytes]:
        """Of a stopped request with nothing in flight: the tokens computed, the blocks from token
        `start` on, and what else the destination needs."""
        ...

    def resume(self, request: RequestId) -> None:
        """Puts a stopped request back, KV and all; nothing if it has ended."""
        ...

    def release(self, request: RequestId) -> None:
        """Frees a stopped request without a word to its client; nothing if it has ended."""
        ...

    # -- destination

    def reserve(
        self, request: RequestId, body: bytes, outputs: list[int], tokens: int, agents: list[str]
    ) -> int | Refusal:
        """Takes in the request and has slots for `tokens` (none for a request that waits: 0).
        `agents`: where its blocks will be read. Returns how many of its tokens are here already."""
        ...

    def ready(self, request: RequestId) -> bool | Refusal:
        """Whether everything but KV is there to run it, and the way to its blocks is open."""
        ...

    def reach(self, request: RequestId, tokens: int, outputs: list[int]) -> Refusal | None:
        """Has slots for `tokens`, and appends newly generated tokens."""
        ...

    def pull(
        self,
        request: RequestId,
        ticket: int,
        source: EngineIndex,
        agents: list[str],
        start: int,
        end: int,
        blocks: Blocks,
    ) -> None:
        """Begins to copy the blocks of tokens [start, end) here. The host reports the end of it to
        `Llumlet.pulled`, once for each ticket."""
        ...

    def cancel(self, ticket: int) -> None:
        """Nobody wants this pull any more: ends it soon. Its end is reported all the same, once
        nothing is written any more."""
        ...

    def cache(self, request: RequestId, tokens: int) -> None:
        """The KV of its first `tokens` tokens is known to be right: others may find it here."""
        ...

    def commit(self, request: RequestId, computed: int, state: bytes) -> Refusal | None:
        """Queues it, first in line, with `computed` tokens of KV."""
        ...

    def drop(self, request: RequestId) -> None:
        """Frees all that `reserve` and what followed took. Not called while a pull is under way."""
        ...
