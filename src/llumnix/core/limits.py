"""Bounds that several rooms of the core share, or live code and the simulator. Each is declared
here once."""

from dataclasses import dataclass

REMEMBERED_MAX = 4096
"""Ended migrations that a llumlet remembers on each side, since their messages may come again."""
TAIL_MAX = 512
"""Last generated tokens that a take-over repeats, for a frontend whose source died before it had
sent them all."""
HEARTBEAT_S = 0.1
"""An engine reports its load at least once in this time, even if nothing has changed."""
STALLED_AFTER_S = 1.0
"""An engine that has requests and completes no step for longer stands still: it counts as hung, and
the scheduler leaves it alone."""
FLEET_REPORT_EVERY_S = 0.5
"""The fleet tells the scheduler what instances there are at least once in this time, even if
nothing has changed."""
DRAIN_POLL_S = 0.05
"""How often the fleet looks whether an instance that is being emptied is empty."""
WAITING_SHOWN_MAX = 8
"""Waiting requests of an engine that may be chosen to move; to find more takes a sort of its
queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationLimits:
    """The limits of every migration. A pull has a time limit for each chunk only
    (engine/kv/links.py). So it ends for certain, and long requests move over slow links too."""

    reserve_timeout_s: float = 5.0  # how long a source waits for room
    stage_timeout_s: float = 30.0  # how long it waits for the next message about a stage
    progress_every_s: float = 5.0  # a destination that still pulls says so this often
    verdict_again_s: float = 0.25  # a handover without a verdict is sent again after this time
    silence_timeout_s: float = 60.0  # how long a destination waits for its source
    near_s: float = 0.02
    """How long a destination stands still for a handover that is overdue, and how long a source
    waits for prompts in flight before it announces one."""
    outgoing_max: int = 4  # migrations from one engine at a time
    incoming_max: int = 4  # and to one
    stages_max: int = 8  # of one migration
    rest_blocks_max: int = 2  # so few blocks are left for the handover

    def ahead_tokens(self, block_tokens: int) -> int:
        """Slots that a destination has in reserve, so that a handover needs no new blocks."""
        return (self.rest_blocks_max + 1) * block_tokens
