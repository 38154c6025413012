"""The seam between migrations and an engine: what core/migration/llumlet.py asks of it.

All calls come on the engine's own thread, between two of its steps, and return at once. The real
engine implements it in engine/migration/vllm_port.py, a fake one in tests/support/fake_engine.py.
One suite of scenarios holds both to the same behaviour (tests/conformance).
"""

import enum
from dataclasses import dataclass
from typing import Protocol

from llumnix.core.codes import AbortCode
from llumnix.core.messages import Blocks
from llumnix.core.types import EngineIndex, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A call that cannot be carried out."""

    why: str
    code: AbortCode = AbortCode.OTHER
    for_ever: bool = False  # it will never be possible for that request


def busy(why: str) -> Refusal:
    """The engine moves as many requests as it may, or takes none just now."""
    return Refusal(why=why, code=AbortCode.BUSY)


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
    """How far a request is, in tokens."""

    phase: Phase
    settled: int = 0  # computed by steps that are over
    in_flight: bool = False  # a step with it is under way
    tokens: int = 0  # prompt and output
    outputs: int = 0  # generated
    preemptions: int = 0  # how often it lost its KV


@dataclass(frozen=True, slots=True, kw_only=True)
class Movable:
    """A request that could leave its engine."""

    request: RequestId
    priority: int  # vLLM's number, as its client has it
    tokens: int  # of KV, in whole blocks, that it holds or, if it waits, needs to start
    waiting: bool
    busy: bool = False  # better not moved just now: it is in the middle of its prompt, for one


class EnginePort(Protocol):
    """One engine, seen from its migrations."""

    block_tokens: int  # size of a block, of the largest group of layers if they differ

    @property
    def step_s(self) -> float:
        """How long a step without prompts has taken lately."""
        ...

    @property
    def prompts_in_flight(self) -> bool:
        """Whether a step that computes prompts is under way."""
        ...

    def client(self, request: RequestId) -> int:
        """The client index of the frontend whose request it is; the office's if it is gone."""
        ...

    # -- source

    def movable(self) -> list[Movable]:
        """The requests that could be moved: the first few of those that wait, in the order in which
        they will be served, and all that run."""
        ...

    def describe(self, request: RequestId) -> bytes | Refusal:
        """The request as its destination needs it, or why it cannot be moved."""
        ...

    def agents(self) -> list[str]:
        """Where this engine's workers let their blocks be read, one for each rank."""
        ...

    def progress(self, request: RequestId) -> Progress:
        """How far the request is."""
        ...

    def outputs(self, request: RequestId, first: int) -> list[int]:
        """The tokens that it has generated, from number `first` on."""
        ...

    def pin(self, request: RequestId, start: int, end: int) -> Blocks:
        """Keeps the blocks of tokens [start, end) as they are until `unpin`, whatever becomes of
        the request. Several calls add up."""
        ...

    def unpin(self, request: RequestId) -> None:
        """Undoes all `pin`s of the request."""
        ...

    def stop(self, request: RequestId) -> None:
        """Takes the request out of the batch or the queue. It keeps its blocks."""
        ...

    def handover_state(self, request: RequestId, start: int) -> tuple[int, Blocks, bytes]:
        """Of a stopped request with nothing in flight: the number of computed tokens, the blocks
        from token `start` on, and what else the destination needs."""
        ...

    def resume(self, request: RequestId) -> None:
        """Puts a stopped request back, with its KV. Does nothing if it has ended."""
        ...

    def release(self, request: RequestId) -> None:
        """Frees a stopped request and tells its client nothing. Does nothing if it has ended."""
        ...

    # -- destination

    def reserve(
        self, request: RequestId, body: bytes, outputs: list[int], tokens: int, agents: list[str]
    ) -> int | Refusal:
        """Makes room for the request, with slots for `tokens`; 0 if no KV will come. `agents`:
        where its blocks will be read. Returns how many of its tokens are here already."""
        ...

    def admit(self, request: RequestId, made: object, outputs: list[int]) -> Refusal | None:
        """Takes in a request whose engine died, without room for it. `made`: the engine's own
        object, made of what the client sent; `outputs`: the tokens that the client has."""
        ...

    def ready(self, request: RequestId) -> bool | Refusal:
        """Whether everything but its KV is here, and its source's blocks can be read."""
        ...

    def reach(self, request: RequestId, tokens: int, outputs: list[int]) -> Refusal | None:
        """Gets slots for `tokens`, and appends newly generated tokens."""
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
        final: bool,
    ) -> None:
        """Begins to copy the blocks of tokens [start, end) to here; `final`: while the request
        stands still. The host reports the end to `Llumlet.pulled`, once for each ticket."""
        ...

    def cancel(self, ticket: int) -> None:
        """Soon ends a pull that is no longer wanted. Its end is reported all the same, once nothing
        is written any more."""
        ...

    def cache(self, request: RequestId, tokens: int) -> None:
        """The KV of its first `tokens` tokens is known to be right, so that other requests may find
        it."""
        ...

    def commit(self, request: RequestId, computed: int, state: bytes) -> Refusal | None:
        """Queues the request with `computed` tokens of KV, first in line. `state`: what the source
        handed over; empty after `admit`."""
        ...

    def drop(self, request: RequestId) -> None:
        """Frees all that `reserve` or `admit` and later calls took. Not called while a pull is
        under way."""
        ...
