"""The protocol of one migration, as two tables of transitions.

Rules
- A request has one owner at any time. Until the handover that is the source; after it, the one that
  the destination's verdict names. The destination decides once, and remembers.
- The source stops a request only for its last tokens. It resumes it only when it knows that the
  destination will not run it: by the destination's own verdict or, if that engine is dead, by a
  fresh epoch from the frontend, which grants all epochs. Silence is never an answer: a handover
  without a verdict is sent again.
- Before the handover either side may give up on its own, whatever the other believes.
- The source keeps the blocks that its handover names until the verdict, even if the request has
  ended meanwhile. So what the destination reads for it, and enters in its prefix cache, is right.
- Every event that can happen in a state is in the table. Any other is a bug, and raises with the
  story.

No I/O and no clock: core/migration/source.py and destination.py feed the machines (core/machine.py)
and carry out the actions. docs/migration.md is drawn from these tables (scripts/draw_pages.py).
"""

import enum
from collections.abc import Callable

from llumnix.core.machine import Machine
from llumnix.core.types import MigrationId

OnStep = Callable[[str, MigrationId, str, str, str], None]
"""Told of every transition: role, migration, event, new state, action."""


class SourceState(enum.Enum):
    """Where the engine that gives a request away stands."""

    RESERVING = "reserving"
    """The destination was asked for room. The request goes on here."""
    COPYING = "copying"
    """The destination pulls settled blocks. The request goes on here."""
    BETWEEN_STAGES = "between stages"
    """The last stage has ended: does another one pay? The request goes on here."""
    STOPPING = "stopping"
    """The request is out of the batch. Steps that were in flight with it have still to end."""
    DECIDING = "deciding"
    """The request was handed over, and the destination's verdict is awaited. Nobody resumes it
    meanwhile."""
    RELEASING = "releasing"
    """The request has ended here after the handover. Its blocks are kept until the verdict, since
    the destination may still read them."""
    COMMITTED = "committed"
    """The destination owns the request. Nothing is left here."""
    ABORTED = "aborted"
    """The request goes on here, or has ended here."""


class SourceEvent(enum.Enum):
    """What can happen to a source."""

    RESERVED = "reserved"
    STAGED = "staged"
    """The stage's blocks are at the destination."""
    PROGRESS = "progress"
    """The stage's blocks are on their way."""
    MORE = "more"
    """Another stage pays."""
    NEARLY_DONE = "nearly done"
    """What is left is small enough to stop the request for it, after one more step."""
    LAST = "last"
    """It is time to stop the request."""
    STEPS_LANDED = "steps landed"
    """The steps that were in flight with the request have ended."""
    TAKEN = "taken"
    """Verdict: the destination owns it."""
    DECLINED = "declined"
    """Verdict: the destination will never run it (no room, for one)."""
    GRANTED = "granted"
    """The destination is dead and never took over; the frontend gave this engine a fresh epoch."""
    FORFEITED = "forfeited"
    """The destination is dead, but had taken over before."""
    REQUEST_ENDED = "request ended"
    """The request finished, was aborted or was preempted here."""
    TIMED_OUT = "timed out"
    FAILED = "failed"
    """This engine met an error while it dealt with the migration."""


class SourceAction(enum.Enum):
    """What a source does on a transition."""

    NOTHING = "-"
    REST = "see what is left"
    STAGE = "pin settled blocks, have them pulled"
    WAIT = "wait on"
    ANNOUNCE = "say when the handover will be"
    STOP = "take it out of the batch"
    HAND_OVER = "send the rest, ask for the verdict"
    ASK_AGAIN = "send the handover again"
    KEEP_BLOCKS = "tell the destination, keep the blocks"
    FREE_BLOCKS = "free the blocks"
    RELEASE = "free it here"
    RESUME = "put it back into the batch"
    STAY = "let it go on"
    CANCEL = "let it go on, tell the destination"
    TAKE_BACK = "put it back into the batch, tell the destination"


class DestinationState(enum.Enum):
    """Where the engine that takes a request in stands."""

    PREPARING = "preparing"
    """Room is reserved. Something else, a grammar for one, is not ready."""
    READY = "ready"
    """Waits for the source's next message."""
    PULLING = "pulling"
    """Pulls the blocks of a stage."""
    COMMITTING = "committing"
    """Pulls the rest, and decides when that is done."""
    COMMITTED = "committed"
    """Owns the request. Final, and remembered."""
    ABORTED = "aborted"
    """Will never run it. Final, and remembered."""


class DestinationEvent(enum.Enum):
    """What can happen to a destination."""

    PREPARED = "prepared"
    STAGE = "stage"
    PULLED = "pulled"
    FAILED = "failed"
    """No room, or the blocks could not be pulled."""
    ANNOUNCED = "announced"
    """The source has said when its handover will be."""
    HANDOVER = "handover"
    INSTALLED = "installed"
    """The request with all its state is in this engine's queue."""
    CANCELLED = "cancelled"
    CLIENT_GONE = "client gone"
    SOURCE_LOST = "source lost"
    TIMED_OUT = "timed out"


class DestinationAction(enum.Enum):
    """What a destination does on a transition."""

    NOTHING = "-"
    SAY_RESERVED = "tell the source"
    PULL = "pull the stage's blocks"
    SAY_STAGED = "tell the source"
    SAY_PROGRESS = "tell the source that it goes on"
    MAKE_WAY = "be free when it is due"
    PULL_REST = "pull the rest"
    INSTALL = "install it here"
    TAKE_OVER = "tell the frontend, then the source"
    DROP = "free the room, tell the source"
    SAY_VERDICT = "repeat the verdict"


S, SE, SA = SourceState, SourceEvent, SourceAction
D, DE, DA = DestinationState, DestinationEvent, DestinationAction

_TARDY = {
    # What may still arrive when all is over: answers that crossed the end, or came twice.
    event: SA.NOTHING
    for event in (SE.RESERVED, SE.TAKEN, SE.DECLINED, SE.GRANTED, SE.FORFEITED)
}

SOURCE: dict[SourceState, dict[SourceEvent, tuple[SourceState, SourceAction]]] = {
    S.RESERVING: {
        SE.RESERVED: (S.BETWEEN_STAGES, SA.REST),
        SE.DECLINED: (S.ABORTED, SA.STAY),
        SE.GRANTED: (S.ABORTED, SA.STAY),
        SE.FORFEITED: (S.ABORTED, SA.STAY),
        SE.REQUEST_ENDED: (S.ABORTED, SA.CANCEL),
        SE.TIMED_OUT: (S.ABORTED, SA.CANCEL),
        SE.FAILED: (S.ABORTED, SA.CANCEL),
    },
    S.COPYING: {
        SE.RESERVED: (S.COPYING, SA.NOTHING),
        SE.STAGED: (S.BETWEEN_STAGES, SA.REST),
        SE.PROGRESS: (S.COPYING, SA.WAIT),
        SE.DECLINED: (S.ABORTED, SA.STAY),
        SE.GRANTED: (S.ABORTED, SA.STAY),
        SE.FORFEITED: (S.ABORTED, SA.STAY),
        SE.REQUEST_ENDED: (S.ABORTED, SA.CANCEL),
        SE.TIMED_OUT: (S.ABORTED, SA.CANCEL),
        SE.FAILED: (S.ABORTED, SA.CANCEL),
    },
    S.BETWEEN_STAGES: {
        SE.RESERVED: (S.BETWEEN_STAGES, SA.NOTHING),
        SE.MORE: (S.COPYING, SA.STAGE),
        SE.NEARLY_DONE: (S.BETWEEN_STAGES, SA.ANNOUNCE),
        SE.LAST: (S.STOPPING, SA.STOP),
        SE.DECLINED: (S.ABORTED, SA.STAY),
        SE.GRANTED: (S.ABORTED, SA.STAY),
        SE.FORFEITED: (S.ABORTED, SA.STAY),
        SE.REQUEST_ENDED: (S.ABORTED, SA.CANCEL),
        SE.TIMED_OUT: (S.ABORTED, SA.CANCEL),
        SE.FAILED: (S.ABORTED, SA.CANCEL),
    },
    S.STOPPING: {
        SE.RESERVED: (S.STOPPING, SA.NOTHING),
        SE.STEPS_LANDED: (S.DECIDING, SA.HAND_OVER),
        SE.DECLINED: (S.ABORTED, SA.RESUME),
        SE.GRANTED: (S.ABORTED, SA.RESUME),
        SE.FORFEITED: (S.ABORTED, SA.RESUME),  # It cannot have taken over what it never got.
        SE.REQUEST_ENDED: (S.ABORTED, SA.CANCEL),
        SE.TIMED_OUT: (S.STOPPING, SA.REST),  # The engine's own steps always end.
        SE.FAILED: (S.ABORTED, SA.TAKE_BACK),
    },
    S.DECIDING: {
        SE.RESERVED: (S.DECIDING, SA.NOTHING),
        SE.TAKEN: (S.COMMITTED, SA.RELEASE),
        SE.DECLINED: (S.ABORTED, SA.RESUME),
        SE.GRANTED: (S.ABORTED, SA.RESUME),
        SE.FORFEITED: (S.COMMITTED, SA.RELEASE),
        SE.REQUEST_ENDED: (S.RELEASING, SA.KEEP_BLOCKS),
        SE.TIMED_OUT: (S.DECIDING, SA.ASK_AGAIN),
        SE.FAILED: (S.DECIDING, SA.NOTHING),  # The destination decides.
    },
    S.RELEASING: {
        SE.RESERVED: (S.RELEASING, SA.NOTHING),
        SE.TAKEN: (S.ABORTED, SA.FREE_BLOCKS),  # Its frontend has had it aborted there too.
        SE.DECLINED: (S.ABORTED, SA.FREE_BLOCKS),
        SE.GRANTED: (S.ABORTED, SA.FREE_BLOCKS),
        SE.FORFEITED: (S.ABORTED, SA.FREE_BLOCKS),
        SE.TIMED_OUT: (S.RELEASING, SA.ASK_AGAIN),
        SE.FAILED: (S.RELEASING, SA.NOTHING),
    },
    S.COMMITTED: {event: (S.COMMITTED, action) for event, action in _TARDY.items()},
    S.ABORTED: {event: (S.ABORTED, action) for event, action in _TARDY.items()},
}

DESTINATION: dict[
    DestinationState, dict[DestinationEvent, tuple[DestinationState, DestinationAction]]
] = {
    D.PREPARING: {
        DE.PREPARED: (D.READY, DA.SAY_RESERVED),
        DE.FAILED: (D.ABORTED, DA.DROP),
        DE.CANCELLED: (D.ABORTED, DA.DROP),
        DE.CLIENT_GONE: (D.ABORTED, DA.DROP),
        DE.SOURCE_LOST: (D.ABORTED, DA.DROP),
        DE.TIMED_OUT: (D.ABORTED, DA.DROP),
    },
    D.READY: {
        DE.STAGE: (D.PULLING, DA.PULL),
        DE.ANNOUNCED: (D.READY, DA.MAKE_WAY),
        DE.HANDOVER: (D.COMMITTING, DA.PULL_REST),
        DE.FAILED: (D.ABORTED, DA.DROP),
        DE.CANCELLED: (D.ABORTED, DA.DROP),
        DE.CLIENT_GONE: (D.ABORTED, DA.DROP),
        DE.SOURCE_LOST: (D.ABORTED, DA.DROP),
        DE.TIMED_OUT: (D.ABORTED, DA.DROP),
    },
    D.PULLING: {
        DE.PULLED: (D.READY, DA.SAY_STAGED),
        DE.FAILED: (D.ABORTED, DA.DROP),
        DE.CANCELLED: (D.ABORTED, DA.DROP),
        DE.CLIENT_GONE: (D.ABORTED, DA.DROP),
        DE.SOURCE_LOST: (D.ABORTED, DA.DROP),
        DE.TIMED_OUT: (D.PULLING, DA.SAY_PROGRESS),  # Each pull ends, one way or another.
    },
    D.COMMITTING: {
        DE.HANDOVER: (D.COMMITTING, DA.NOTHING),  # Asked again; the verdict is on its way.
        DE.PULLED: (D.COMMITTING, DA.INSTALL),
        DE.INSTALLED: (D.COMMITTED, DA.TAKE_OVER),
        DE.FAILED: (D.ABORTED, DA.DROP),
        DE.CANCELLED: (D.ABORTED, DA.DROP),
        DE.CLIENT_GONE: (D.ABORTED, DA.DROP),
        DE.SOURCE_LOST: (D.COMMITTING, DA.NOTHING),  # What was asked for may still arrive.
        DE.TIMED_OUT: (D.COMMITTING, DA.NOTHING),
    },
    D.COMMITTED: {
        DE.HANDOVER: (D.COMMITTED, DA.SAY_VERDICT),
        DE.CANCELLED: (D.COMMITTED, DA.NOTHING),  # Only its client can have gone.
        DE.CLIENT_GONE: (D.COMMITTED, DA.NOTHING),  # The engine's own abort sees to it.
        DE.SOURCE_LOST: (D.COMMITTED, DA.NOTHING),
    },
    D.ABORTED: {
        DE.STAGE: (D.ABORTED, DA.SAY_VERDICT),
        DE.PULLED: (D.ABORTED, DA.NOTHING),
        DE.FAILED: (D.ABORTED, DA.NOTHING),
        DE.HANDOVER: (D.ABORTED, DA.SAY_VERDICT),
        DE.CANCELLED: (D.ABORTED, DA.NOTHING),
        DE.CLIENT_GONE: (D.ABORTED, DA.NOTHING),
        DE.SOURCE_LOST: (D.ABORTED, DA.NOTHING),
    },
}

SourceMachine = Machine[SourceState, SourceEvent, SourceAction]
DestinationMachine = Machine[DestinationState, DestinationEvent, DestinationAction]


def source_machine(migration: str) -> SourceMachine:
    """A source that has just asked for room."""
    name = f"migration {migration} (source)"
    return Machine(name, SOURCE, S.RESERVING, (S.COMMITTED, S.ABORTED))


def destination_machine(migration: str) -> DestinationMachine:
    """A destination that has just reserved room."""
    name = f"migration {migration} (destination)"
    return Machine(name, DESTINATION, D.PREPARING, (D.COMMITTED, D.ABORTED))
