"""The record of one stream."""

import enum
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from llumnix.core.messages import Grant, TookOver
from llumnix.core.streams.states import GRANTED, UNOWNED, StreamMachine, StreamState
from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId

Info = TypeVar("Info")
Output = TypeVar("Output")
FIRST_EPOCH = Epoch(0)


class Refusal(enum.Enum):
    """Why a request is not moved. The value completes "request … "."""

    NOT_RUNNING = "is on no engine"
    THERE = "is there already"
    MOVING = "is being moved already"
    LEAVING = "has not quite left there"
    ENGINE_DEAD = "cannot be moved to an engine that has died"
    NO_ORPHAN = "has an engine, or is getting one"


@dataclass(slots=True, kw_only=True, eq=False)
class Stream(Generic[Info, Output]):
    """One stream. `StreamTable` alone writes its fields, all but what `info` holds."""

    request: RequestId
    info: Info  # what the frontend knows of it; opaque here
    machine: StreamMachine
    detailed: bool = False  # each token comes with more, such as log-probabilities
    owner: EngineIndex | None = None  # None in the states `UNOWNED`, and once it is closed
    last_owner: EngineIndex | None = None  # the engine that ran it last; None while placing
    epoch: Epoch = FIRST_EPOCH  # the owner's
    last_epoch: Epoch = FIRST_EPOCH  # the highest that was ever granted
    void_epoch: Epoch | None = None  # the highest before it became an orphan
    leaving: set[EngineIndex] = field(default_factory=set)  # had to abort it then, may not have yet
    tokens: list[int] = field(default_factory=list)  # passed on to the client
    grant: Grant | None = None  # in the states `GRANTED`
    takeover: TookOver | None = None  # while holding
    held: list[tuple[Sequence[int], Output]] = field(default_factory=list)  # tokens, output
    revoked: set[MigrationId] = field(default_factory=set)  # whose source may still say "taken"
    lives_used: int = 0  # engines that went on with it, or died before they could

    @property
    def state(self) -> StreamState:
        """Where it stands."""
        return self.machine.state

    @property
    def outputs(self) -> int:
        """How many tokens were passed on to the client."""
        return len(self.tokens)

    def next_epoch(self) -> Epoch:
        """Grants an epoch that was never granted before."""
        self.last_epoch = Epoch(self.last_epoch + 1)
        return self.last_epoch

    def may_be_on(self, engine: EngineIndex) -> bool:
        """Whether the engine owns the request, or may have begun to go on with it."""
        going = None if self.state is StreamState.GRANTED else self.grant
        return self.owner == engine or (going is not None and going.destination == engine)

    def check(self, dead: AbstractSet[EngineIndex]) -> None:
        """What must hold between two events; AssertionError. `dead`: engines that died."""
        state, grant, takeover = self.state, self.grant, self.takeover
        holding = state is StreamState.HOLDING
        assert (self.owner is None) == (state in UNOWNED), f"owner {self.owner}"
        assert (grant is not None) == (state in GRANTED), f"grant {grant}"
        assert (takeover is not None) == holding, f"take-over {takeover}"
        assert holding or not self.held, f"{len(self.held)} outputs are held"
        assert state not in UNOWNED or not self.revoked, f"revoked {self.revoked}"
        if takeover is not None:
            counts = f"{self.outputs} of {takeover.outputs} tokens"
            assert self.outputs < takeover.outputs, f"{counts} were passed on, and none is awaited"
        if self.owner is not None:
            assert self.owner == self.last_owner, f"owner {self.owner}, last {self.last_owner}"
            died = self.owner in dead
            assert died == (state is StreamState.ASKING), f"owner {self.owner} died: {died}"
        if grant is not None:
            assert grant.destination != self.owner, f"it moves to its owner {self.owner}"
            assert grant.destination not in dead, f"destination {grant.destination} died"
            assert self.epoch < grant.epoch, f"epochs: grant {grant.epoch}, owner {self.epoch}"
        assert self.epoch <= self.last_epoch, f"epochs: {self.epoch}, last {self.last_epoch}"
