"""Bounds that several rooms share, or live code and the simulator, each declared once."""

from dataclasses import dataclass

REMEMBERED_MAX = 4096
"""Ended migrations that a llumlet remembers on each side, since their messages may come again."""
TAIL_MAX = 512
"""Last generated tokens that a take-over repeats, for a frontend whose source died before it had
sent them all."""
HEARTBEAT_S = 0.1
"""An engine reports its load at least as often, though nothing has changed."""
STALLED_AFTER_S = 1.0
"""An engine that has requests and completes no step for longer stands still: it counts as hung, and
the scheduler leaves it alone."""
FLEET_REPORT_EVERY_S = 0.5
"""The fleet tells the scheduler what there is at least as often, though nothing has changed."""
DRAIN_POLL_S = 0.05
"""How soon it is looked again whether an instance that is being emptied is empty."""
WAITING_SHOWN_MAX = 8
"""Waiting requests of an engine that may be chosen to move; to find more takes a sort of its
queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationLimits:
    """Of every migration: times in seconds, counts in migrations, stages and blocks.

    `stage_timeout_s`: how long a source waits for a destination's next word about a stage, which
    says every `progress_every_s` that it is still pulling. A pull itself has no bound but that
    each of its chunks has one (engine/kv/links.py): it ends for certain, and long requests move
    over slow links too. `near_s`: how long a destination stands still for a handover that is
    overdue, and a source waits for prompts in flight before it announces one."""

    reserve_timeout_s: float = 5.0
    stage_timeout_s: float = 30.0
    progress_every_s: float = 5.0
    verdict_again_s: float = 0.25
    silence_timeout_s: float = 60.0
    near_s: float = 0.02
    outgoing_max: int = 4
    incoming_max: int = 4
    stages_max: int = 8
    rest_blocks_max: int = 2

    def ahead_tokens(self, block_tokens: int) -> int:
        """Slots that a destination has in reserve, so that the handover needs no new ones."""
        return (self.rest_blocks_max + 1) * block_tokens
