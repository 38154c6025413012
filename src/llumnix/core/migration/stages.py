"""When the source of a migration copies another stage, announces the handover, and stops.

Rules
- Another stage is copied while more than `rest_blocks_max` blocks are left, at most `stages_max`
  times. In the middle of a prompt, the source first waits for the chunk under way.
- The source announces the handover one step before it takes the request out of the batch, so that
  the destination's own steps can be over by then. The destination may miss this message; the
  migration completes without it.
- After the announcement no step should compute a prompt, since such a step lasts longer than was
  announced. A prompt in flight is waited for, but only for `near_s`: with a long queue there is
  always one, and then the handover is announced all the same.
"""

from dataclasses import dataclass, field

from llumnix.core.codes import AbortCode
from llumnix.core.limits import MigrationLimits
from llumnix.core.messages import Handover, Migrate, MigrationEnded, StageDone
from llumnix.core.migration.port import EnginePort, Phase, Progress
from llumnix.core.migration.tables import SourceEvent, SourceMachine, SourceState

GOING_ON = (SourceState.RESERVING, SourceState.COPYING, SourceState.BETWEEN_STAGES)
"""States in which the request is in its source's batch or queue."""


@dataclass(slots=True, kw_only=True)
class Outgoing:
    """One migration away from here."""

    grant: Migrate
    machine: SourceMachine
    began_s: float
    deadline_s: float  # when it is looked at next, even if no message comes
    preemptions: int  # of the request when the migration began; another one ends it
    outputs_sent: int  # generated tokens that the destination was told of
    done: int = 0  # tokens below this are at the destination
    stage: int = 0  # number of the last stage
    stage_end: int = 0  # the last stage copies tokens below this
    stage_began_s: float = 0.0
    prefill_wait_until_s: float | None = None  # small enough to stop, but prompts are in flight
    announced_at_tokens: int | None = None  # settled tokens when the handover was announced
    announced_until_s: float = 0.0  # by then it stops, even if no further token has settled
    stopped_s: float | None = None  # when it was taken out of the batch
    handover: Handover | None = None  # kept to be sent again
    stages: list[StageDone] = field(default_factory=list)
    why: str = ""  # why it ended
    code: AbortCode = AbortCode.OTHER  # the same, for programs

    def ended(self, *, taken: bool, now: float) -> MigrationEnded:
        """What its frontend is told at its end."""
        down = None if self.stopped_s is None else round((now - self.stopped_s) * 1e3, 3)
        return MigrationEnded(
            migration=self.grant.migration,
            request=self.grant.request,
            taken=taken,
            why=self.why,
            code=self.code,
            stages=self.stages,
            downtime_ms=down,
            total_ms=round((now - self.began_s) * 1e3, 3),
        )


def next_event(
    outgoing: Outgoing, progress: Progress, port: EnginePort, limits: MigrationLimits, now: float
) -> tuple[SourceEvent | None, str]:
    """What has happened to a migration, by the state of its request and the time, or None. With it
    the reason, if it ends the migration or something is overdue, else "". Sets the migration's
    `code`."""
    state = outgoing.machine.state
    if progress.phase is Phase.GONE and state is not SourceState.RELEASING:
        outgoing.code = AbortCode.ENDED
        return SourceEvent.REQUEST_ENDED, "it ended meanwhile"
    if state in GOING_ON and progress.preemptions != outgoing.preemptions:
        outgoing.code = AbortCode.PREEMPTED
        return SourceEvent.REQUEST_ENDED, "it was preempted meanwhile"
    if state is SourceState.STOPPING and not progress.in_flight:
        return SourceEvent.STEPS_LANDED, ""
    if now >= outgoing.deadline_s:
        outgoing.code = AbortCode.SILENT
        silent = f"the destination was silent while {state.value}"
        return SourceEvent.TIMED_OUT, "" if state is SourceState.RELEASING else silent
    if state is SourceState.BETWEEN_STAGES:
        return _next_stage(outgoing, progress, port, limits, now), ""
    return None, ""


def _next_stage(
    outgoing: Outgoing, progress: Progress, port: EnginePort, limits: MigrationLimits, now: float
) -> SourceEvent | None:
    """Another stage, the handover, or neither yet?"""
    if outgoing.announced_at_tokens is not None:
        # The time counts too, since an engine that was paused settles nothing more.
        due = progress.settled > outgoing.announced_at_tokens or now >= outgoing.announced_until_s
        return SourceEvent.LAST if due else None
    if progress.phase is Phase.WAITING or outgoing.grant.copy != "staged":
        return SourceEvent.LAST
    block = port.block_tokens
    pending = progress.settled // block * block - outgoing.done
    if pending <= limits.rest_blocks_max * block:
        if progress.settled + 1 < progress.tokens:  # In the middle of its prompt.
            return None if progress.in_flight else SourceEvent.LAST
    elif outgoing.stage < limits.stages_max:
        return SourceEvent.MORE
    return _nearly_done(outgoing, port, limits, now)


def _nearly_done(
    outgoing: Outgoing, port: EnginePort, limits: MigrationLimits, now: float
) -> SourceEvent | None:
    """Announces the handover once the length of the next steps is known."""
    if not port.prompts_in_flight:
        return SourceEvent.NEARLY_DONE
    if outgoing.prefill_wait_until_s is None:
        outgoing.prefill_wait_until_s = now + limits.near_s
    return SourceEvent.NEARLY_DONE if now >= outgoing.prefill_wait_until_s else None
