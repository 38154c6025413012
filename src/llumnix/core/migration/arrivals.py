"""When an engine makes way for a request that comes: it computes no prompts, or begins no step.

Rules
- The engine times its steps for a handover that was announced. It no longer waits for a handover
  that is overdue by `near_s`.
- The next step is expected to take the median of the last few. Steps that are known to have
  computed prompts do not count, since near a handover none are computed.
- One more step is begun if it would end no later than `LATE_MAX` of a step after the handover.
  Otherwise the engine stands still until then, for less than the rest of a step.
- Steps should compute no prompts while a prompt would make a moving request wait: between a stage
  and the source's next message, and until the first step of the request here has ended. The step
  after that one is begun before the end of the first is looked at, so it counts too.
- Prompts wait for `DEFER_PREFILLS_MAX_S` at most, since the source may hang, and a request that
  came may have to wait for a slot. They are deferred in `DEFER_PREFILLS_STEPS_MAX` steps in a row
  at most, and in no more than half of many steps.
"""

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from llumnix.core.codes import AbortCode
from llumnix.core.limits import MigrationLimits
from llumnix.core.messages import Handover, Reserve, Stage
from llumnix.core.migration.port import EnginePort, Phase, Refusal, busy
from llumnix.core.migration.tables import DestinationMachine, DestinationState
from llumnix.core.types import RequestId

RECENT_STEPS = 9
LATE_MAX = 0.5
"""In steps. With a half, the step ends nearer to the handover than it would begin. With less, the
request that moves would wait less, and all that run at its destination longer."""
DEFER_PREFILLS_MAX_S = 0.1
DEFER_PREFILLS_STEPS_MAX = 8
_AWAITED = (DestinationState.READY, DestinationState.COMMITTING)


@dataclass(slots=True, kw_only=True)
class Incoming:
    """One migration to here."""

    reservation: Reserve
    machine: DestinationMachine
    began_s: float
    deadline_s: float  # when it is looked at next, even if no message comes
    hit: int = 0  # tokens that were here already
    stage: int = 0  # number of the last stage
    outputs: int = 0  # generated tokens that are known here
    tail: list[int] = field(default_factory=list)  # the last few of them
    ticket: int | None = None  # of the pull that is under way
    last: Stage | Handover | None = None  # the last message that named blocks
    staged_s: float | None = None  # when the last stage was here
    due_s: float | None = None  # when the source said that its handover would be
    bytes: int = 0  # of the last pull
    seconds: float = 0.0
    why: str = ""  # why it was declined
    code: AbortCode = AbortCode.OTHER  # the same, for programs


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentArrival:
    """A request that was taken over."""

    at_s: float
    took_s: float  # how long its move took


def source_silent(incoming: Incoming) -> Refusal:
    """The reason of a migration that ends because its source is silent."""
    why = f"the source was silent while {incoming.machine.state.value}"
    return Refusal(why=why, code=AbortCode.SILENT)


def takes_none(why: str) -> Refusal:
    """The reason of a migration that is declined because the engine takes none, for `why`."""
    return busy(f"the destination takes none: {why}")


def error_here(why: str) -> Refusal:
    """The reason of a migration that ends because of an exception here."""
    return Refusal(why=f"an error at its destination: {why}")


class StepTimer:
    """The steps of one engine."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.step_s = 0.0  # of a step without prompts; 0 before the first

    def record_step(self, seconds: float, *, prompts: bool = False) -> None:
        """A step has ended. `prompts`: it is known to have computed some."""
        if not prompts:
            self._recent.append(seconds)
            self.step_s = statistics.median(self._recent)


class Deferrals:
    """The steps of one engine that may still leave prompts out."""

    def __init__(self) -> None:
        self._left = DEFER_PREFILLS_STEPS_MAX

    def rest(self) -> None:
        """A step that need not leave any out."""
        self._left = min(DEFER_PREFILLS_STEPS_MAX, self._left + 1)

    def take(self) -> bool:
        """Whether a step that should leave prompts out does so."""
        deferred = self._left > 0
        self._left += -1 if deferred else 1
        return deferred


class FirstSteps:
    """Requests that came with all of their KV, and whose first step here has not ended."""

    def __init__(self, port: EnginePort) -> None:
        self._port = port
        # Tokens that were settled when it came, and since when it is here.
        self._new: dict[RequestId, tuple[int, float]] = {}

    def came(self, request: RequestId, now: float) -> None:
        """A request was taken over, with its KV or without."""
        progress = self._port.progress(request)
        if progress.settled and progress.settled + 1 >= progress.tokens:
            self._new[request] = progress.settled, now

    def awaited(self, now: float) -> bool:
        """Whether there are any."""
        for request, (settled, since_s) in list(self._new.items()):
            progress = self._port.progress(request)
            ended = progress.settled != settled or progress.phase is Phase.GONE
            if ended or now > since_s + DEFER_PREFILLS_MAX_S:
                del self._new[request]
        return bool(self._new)


def message_awaited(incoming: Incoming, now: float) -> bool:
    """Whether its source is about to say more, so that a prompt would keep the request waiting."""
    return incoming.staged_s is not None and now <= incoming.staged_s + DEFER_PREFILLS_MAX_S


def one_more_fits(free_s: float, step_s: float, due_s: float) -> bool:
    """Whether an engine that will be free at `free_s` should begin a step of `step_s` then, ahead
    of a handover that is due at `due_s`."""
    return free_s + (1 - LATE_MAX) * step_s <= due_s


def hold_s(
    all_incoming: Iterable[Incoming],
    free_s: float,
    step_s: float,
    limits: MigrationLimits,
    now: float,
) -> float:
    """How long to begin no step, since one of `step_s` that is begun at `free_s` would keep the
    next handover waiting. 0 if none was announced, or one more step fits in."""
    due = [
        incoming.due_s
        for incoming in all_incoming
        if incoming.due_s is not None
        and incoming.machine.state in _AWAITED
        and now < incoming.due_s + limits.near_s
    ]
    if not due or one_more_fits(free_s, step_s, min(due)):
        return 0.0
    return min(due) + limits.near_s - now
