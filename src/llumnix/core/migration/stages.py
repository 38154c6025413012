"""When the source of a migration copies another stage, announces the handover, and stops.

Rules
- Stages go on while one pays: until what is left fits `rest_blocks_max` blocks, at most
  `stages_max` times. In the middle of a prompt the chunk under way is waited for first.
- The handover is announced one step before the request is taken out of the batch, so that the
  destination's own steps can be over by then. Nobody needs to have heard it. No prompt should be
  computed from then on: a step with one lasts longer than was said. One in flight is let end first,
  but with a long queue prompts go on, and then it is announced all the same.
"""

from dataclasses import dataclass, field

from llumnix.core.limits import MigrationLimits
from llumnix.core.messages import Handover, Migrate, StageDone
from llumnix.core.migration.port import EnginePort, Phase, Progress
from llumnix.core.migration.tables import SourceEvent, SourceMachine


@dataclass(slots=True, kw_only=True)
class Outgoing:
    """One migration away from here. Tokens below `done` are at the destination. `near_at`: settled
    when its handover was announced, which was to be stopped for by `near_until_s`.
    `hushed_until_s`: it is small enough to stop for, but prompts in flight are waited for."""

    order: Migrate
    machine: SourceMachine
    began_s: float
    deadline_s: float
    preemptions: int
    outputs_sent: int
    done: int = 0
    stage: int = 0
    stage_end: int = 0
    stage_began_s: float = 0.0
    hushed_until_s: float | None = None
    near_at: int | None = None
    near_until_s: float = 0.0
    stopped_s: float | None = None
    handover: Handover | None = None
    stages: list[StageDone] = field(default_factory=list)
    why: str = ""


def next_event(
    going: Outgoing, progress: Progress, port: EnginePort, limits: MigrationLimits, now: float
) -> SourceEvent | None:
    """Another stage, the last one, or neither yet?"""
    if going.near_at is not None:
        # An engine that was paused settles nothing more.
        due = progress.settled > going.near_at or now >= going.near_until_s
        return SourceEvent.LAST if due else None
    if progress.phase is Phase.WAITING or going.order.copy != "staged":
        return SourceEvent.LAST
    block = port.block_tokens
    pending = progress.settled // block * block - going.done
    if pending <= limits.rest_blocks_max * block:
        if progress.settled + 1 < progress.tokens:  # In the middle of its prompt.
            return None if progress.in_flight else SourceEvent.LAST
    elif going.stage < limits.stages_max:
        return SourceEvent.MORE
    return _near(going, port, limits, now)


def _near(
    going: Outgoing, port: EnginePort, limits: MigrationLimits, now: float
) -> SourceEvent | None:
    """To be announced, once the next steps are of a length that is known."""
    if not port.prompts_in_flight:
        return SourceEvent.NEAR
    if going.hushed_until_s is None:
        going.hushed_until_s = now + limits.near_s
    return SourceEvent.NEAR if now >= going.hushed_until_s else None
