"""A request twice: as its client sees it (`Job`), and as one engine does (`Sequence`)."""

from dataclasses import dataclass, field

from llumnix.core.events import RequestArrived
from llumnix.core.priorities import QueueKey
from llumnix.core.queue_rules import Wait
from llumnix.core.slices.promises import Promise
from llumnix.core.types import RequestId

Token = tuple[RequestId, bool]
"""One more token of a request, and whether it is the last."""


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request and what became of it. Lengths in tokens, times in virtual seconds."""

    id: RequestId
    arrived_s: float
    prompt: int
    answer: int
    priority: int = 0
    high: bool = False  # whether it counts as urgent in the figures
    prefix: tuple[int, ...] = ()  # ids of leading blocks that others may share
    prefix_blocks: int = 0  # the engine's blocks for each of these ids
    first_s: float | None = None
    ended_s: float | None = None
    lost_s: float = 0.0  # what preemptions cost it
    preempted_s: float | None = None  # since when it waits for its next token; None if it does not
    preemptions: int = 0
    moves: int = 0
    revivals: int = 0  # engines that went on with it after one that died
    slowed_s: float = 0.0  # of steps that were longer since they computed revived requests again
    got: int = 0  # tokens that its client has
    error: str = ""  # why its stream was closed early, or why it was refused

    def arrival(self, *, again: bool) -> RequestArrived:
        """What the scheduler is told of it; `again`: an engine had it, and died."""
        tokens = self.prompt + self.got
        return RequestArrived(
            request=self.id,
            prompt_tokens=tokens,
            priority=self.priority,
            prefix=self.prefix,
            again=again,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request on one engine."""

    job: Job
    turn: QueueKey  # class and arrival: the highest of those that run is preempted first
    queued_s: float
    outputs: int = 0  # tokens generated
    came_with: int = 0  # of these, when its move here began
    computed: int = 0  # leading tokens that have KV
    blocks: int = 0  # KV blocks that it has, shared ones included
    held: list[int] = field(default_factory=list)  # prefix ids that it shares
    freed_blocks: tuple[int, int, int] | None = None  # `Memory.leave` of its own, once preempted
    running: bool = False
    stopped: bool = False  # taken out for a handover
    preemptions: int = 0
    pinned: int = 0  # leading blocks that are being copied
    again: int = 0  # leading tokens that a dead engine had computed before
    wait: Wait | None = None  # as a head that does not fit
    promise: Promise | None = None  # of the slice that it runs
    later_s: float = 0.0  # so much later than its turn it is queued
    found: tuple[int, int] | None = None  # cached tokens when it began to wait; those others held

    @property
    def tokens(self) -> int:
        """Prompt and output."""
        return self.job.prompt + self.outputs

    @property
    def queued(self) -> QueueKey:
        """Its place in the queue."""
        return QueueKey(self.turn.priority, self.turn.arrived_s + self.later_s)


@dataclass(slots=True, kw_only=True)
class Batch:
    """One step, and how long it takes."""

    scheduled: list[tuple[Sequence, int]]  # requests, each with the tokens to compute
    prompt_tokens: int  # of these, those of prompts
    seconds: float
