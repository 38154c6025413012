"""The protocol of one stream at its frontend, as a table of transitions.

Rules
- A stream takes tokens from its owner alone. What a destination says before the owner's last tokens
  have arrived is held back, and follows them. What any other engine says is dropped.
- A destination becomes the owner by `TookOver` under the epoch that it was granted, and in no other
  way.
- A destination that died before it took over loses its grant for good, and the owner gets a fresh
  epoch. An owner that died during a migration does not make the stream an orphan until the
  destination has said what it decided.
- An orphan is revived by an engine that is granted a fresh epoch, and that goes on after exactly
  the tokens that were passed on. What was computed and not passed on is computed again.
- Every event in every state is in the table. What is not there is a bug, and raises with the story.

core/streams/table.py feeds the events and carries out the actions. A stream may be closed in any
state; then it is no longer in the table of streams, and nothing that is heard of it counts.
docs/migration.md is drawn from this table by scripts/draw_pages.py.
"""

import enum

from llumnix.core.machine import Machine
from llumnix.core.types import RequestId


class StreamState(enum.Enum):
    """Which engine has the stream's request."""

    PLACING = "placing"
    """None yet; one is being chosen."""
    OWNED = "owned"
    """Its owner runs it."""
    GRANTED = "granted"
    """Its owner was ordered to move it, and a destination may take it over."""
    RELEASED = "released"
    """Its owner has let go of it; the destination's word is not here yet."""
    HOLDING = "holding"
    """The destination took it over. The owner's last tokens are awaited, the destination's held."""
    ASKING = "asking"
    """Its owner died during the migration; the destination is asked what it decided."""
    ORPHAN = "orphan"
    """None any more; another is being chosen."""
    REVIVING = "reviving"
    """An engine was asked to go on with it, and has not answered."""


class StreamEvent(enum.Enum):
    """What can happen to a stream."""

    PLACED = "placed"
    GRANT = "grant"
    KEPT = "source kept it"
    LET_GO = "source let go"
    TOOK_OVER = "took over"
    CAUGHT_UP = "caught up"
    """All tokens that the destination goes on after have been passed on."""
    GAP = "gap"
    """The owner died, and tokens are missing that the take-over does not repeat."""
    REVIVE = "revive"
    """An engine was chosen to go on with it."""
    DECLINED = "declined"
    """The destination will never run it, or does not say what it decided."""
    OWNER_LOST = "owner lost"
    DESTINATION_LOST = "destination lost"
    REVOKED_BUT_TAKEN = "revoked but taken"
    """The source says that a destination had taken over, though its grant was revoked."""


class StreamAction(enum.Enum):
    """What the table of streams does on a transition."""

    NOTHING = "-"
    OWN = "pass the engine's tokens on"
    ORDER = "grant an epoch, order the source"
    DROP_GRANT = "forget the grant"
    REVOKE = "revoke the grant, fresh epoch"
    HOLD = "hold the destination's tokens"
    FLIP = "pass the new owner's tokens on"
    FILL = "fill up from the take-over's tail"
    ASK = "ask the destination"
    ORPHAN = "find another engine, or end it"
    REVIVE = "grant an epoch, send the request"


S, E, A = StreamState, StreamEvent, StreamAction

STREAM: dict[StreamState, dict[StreamEvent, tuple[StreamState, StreamAction]]] = {
    S.PLACING: {
        E.PLACED: (S.OWNED, A.OWN),
    },
    S.OWNED: {
        E.GRANT: (S.GRANTED, A.ORDER),
        E.OWNER_LOST: (S.ORPHAN, A.ORPHAN),
        E.REVOKED_BUT_TAKEN: (S.ORPHAN, A.ORPHAN),  # The request died with that destination.
    },
    S.GRANTED: {
        E.KEPT: (S.OWNED, A.DROP_GRANT),
        E.LET_GO: (S.RELEASED, A.NOTHING),  # Only the destination's own word moves the stream.
        E.TOOK_OVER: (S.HOLDING, A.HOLD),
        E.OWNER_LOST: (S.ASKING, A.ASK),
        E.DESTINATION_LOST: (S.OWNED, A.REVOKE),
        E.REVOKED_BUT_TAKEN: (S.ORPHAN, A.ORPHAN),  # It was an earlier grant's destination.
    },
    S.RELEASED: {
        E.TOOK_OVER: (S.HOLDING, A.HOLD),
        E.OWNER_LOST: (S.ASKING, A.ASK),
        E.DESTINATION_LOST: (S.ORPHAN, A.ORPHAN),  # It took over, and died with the request.
    },
    S.HOLDING: {
        E.CAUGHT_UP: (S.OWNED, A.FLIP),
        E.OWNER_LOST: (S.HOLDING, A.FILL),  # Followed at once by one of the next two.
        E.GAP: (S.ORPHAN, A.ORPHAN),
        E.DESTINATION_LOST: (S.ORPHAN, A.ORPHAN),
    },
    S.ASKING: {
        E.TOOK_OVER: (S.HOLDING, A.FILL),
        E.DECLINED: (S.ORPHAN, A.ORPHAN),
        E.DESTINATION_LOST: (S.ORPHAN, A.ORPHAN),
    },
    S.ORPHAN: {
        E.REVIVE: (S.REVIVING, A.REVIVE),
    },
    S.REVIVING: {
        E.TOOK_OVER: (S.OWNED, A.OWN),
        E.DECLINED: (S.ORPHAN, A.ORPHAN),
        E.DESTINATION_LOST: (S.ORPHAN, A.ORPHAN),
    },
}

UNOWNED = frozenset({S.PLACING, S.ORPHAN, S.REVIVING})
"""States without an owner."""
GRANTED = frozenset({S.GRANTED, S.RELEASED, S.HOLDING, S.ASKING, S.REVIVING})
"""States with a grant."""

StreamMachine = Machine[StreamState, StreamEvent, StreamAction]


def stream_machine(request: RequestId) -> StreamMachine:
    """A stream that no engine has yet."""
    return Machine(f"stream {request}", STREAM, S.PLACING, ())
