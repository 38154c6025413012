"""What frontends and llumlets say to each other about migrations.

Between llumlets every message may be lost, come late or come twice; core/migration/llumlet.py
copes with that. Between a frontend and an engine messages stay in order, and none is lost while
both live.

Token counts are in tokens, sizes in bytes, times in seconds.
"""

from dataclasses import dataclass, field

from llumnix.core.codes import AbortCode, MoveCode
from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId

ABSENT = -1
"""In place of a block that the source does not keep any more (outside a sliding window)."""
Blocks = list[list[int]]
"""Ids of KV blocks for a range of tokens, one list for each group of layers. May hold `ABSENT`."""

IN_BAND = "llumnix"
"""Key under which an output of an engine carries a message to its frontend, in the
`kv_transfer_params`."""
REVIVE = "llumnix_revive"
"""Key under which a request that is sent again carries its `Revive`, encoded, to its new engine."""
OFFICE = 0
"""Client index of the office, to which an engine says what concerns no request. An engine knows
each frontend by its client index. If there is one frontend, it is the office as well."""
COPIES = ("staged", "blocking", "recompute")
"""How a request's KV gets to its destination: copied while the request goes on; copied after the
request was stopped; not copied but computed again from its tokens. The latter two are what others
do, and what benchmarks compare with."""


# -- frontend to the source's llumlet


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrate:
    """Move this request to that engine."""

    migration: MigrationId
    request: RequestId
    destination: EngineIndex
    address: str  # where the destination's llumlet listens
    epoch: Epoch  # under which the destination will own it
    copy: str = "staged"  # one of `COPIES`
    wanted: bool = False  # the source's llumlet asked for it (`MigrationRequested`), not a user
    client: int = OFFICE  # index of the frontend that has the stream


# -- frontend to the llumlet of an engine that goes on with a request


@dataclass(frozen=True, slots=True, kw_only=True)
class Revive:
    """Go on with this request, whose engine died. It comes inside the request, which is sent again
    as its client sent it. The answer is `TookOver`, or `MigrationEnded` that says it was not
    taken."""

    migration: MigrationId  # numbered with the migrations
    request: RequestId
    destination: EngineIndex  # the engine that is asked
    epoch: Epoch
    outputs: list[int]  # the tokens that its client has
    client: int = OFFICE  # index of the frontend that has the stream


Grant = Migrate | Revive
"""Leave to own a request, under an epoch that nobody else has."""


# -- source to destination


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Have room for this request."""

    migration: MigrationId
    request: RequestId
    source: EngineIndex
    address: str  # where the source's llumlet listens
    epoch: Epoch
    body: bytes  # the request, as the engine's port wrote it
    outputs: list[int]  # tokens generated so far
    tokens: int  # slots wanted now; 0 if no KV will come
    agents: list[str]  # where the source's workers let their blocks be read, one for each rank
    client: int = OFFICE  # index of the frontend that has the stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Pull the blocks of tokens [start, end)."""

    migration: MigrationId
    stage: int  # 1 for the first
    start: int
    end: int
    blocks: Blocks
    first_output: int  # number of the first of `outputs`
    outputs: list[int]  # tokens generated since the source's last message
    tokens: int  # slots to have


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverAnnounced:
    """The handover will follow soon. Sent one step before the request is taken out of its batch,
    and once more then if steps with it are still in flight."""

    migration: MigrationId
    in_s: float  # how long the request's last steps at the source will take


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """Pull the rest, tokens [start, end), and own the request. Sent again until a verdict comes."""

    migration: MigrationId
    request: (
        RequestId  # this and the next two as in `Reserve`, for a destination that has forgotten it
    )
    source: EngineIndex
    address: str
    start: int
    end: int  # all that was computed
    blocks: Blocks
    first_output: int  # number of the first of `outputs`
    outputs: list[int]
    state: bytes  # what else the engine's port needs


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelMigration:
    """The source gives the migration up."""

    migration: MigrationId
    why: str


# -- destination to source


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """There is room."""

    migration: MigrationId
    hit: int  # tokens whose KV is here already and need not be copied


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """This stage's blocks are here."""

    migration: MigrationId
    stage: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgress:
    """This stage's blocks are still being pulled."""

    migration: MigrationId
    stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the destination has decided. It never changes."""

    migration: MigrationId
    taken: bool  # the destination owns the request; else it never will
    why: str
    code: AbortCode = AbortCode.OTHER  # if it was not taken
    bytes: int = 0  # of the last pull
    seconds: float = 0.0


FromSource = Reserve | Stage | HandoverAnnounced | Handover | CancelMigration
FromDestination = Reserved | Staged | StageProgress | Verdict
PeerMessage = FromSource | FromDestination


# -- llumlets to the frontend


@dataclass(frozen=True, slots=True, kw_only=True)
class TookOver:
    """From the destination of a migration or a revival, before its first token of the request: the
    destination owns it now."""

    migration: MigrationId
    request: RequestId
    epoch: Epoch
    outputs: int  # tokens generated before; the destination goes on after them
    tail: list[int]  # the last few of them


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDone:
    """What one stage moved, and how long that took."""

    tokens: int
    bytes: int
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationEnded:
    """From the source: how the migration ended. From an engine that was asked to revive a request:
    that it does not."""

    migration: MigrationId
    request: RequestId
    taken: bool
    why: str
    code: AbortCode = AbortCode.OTHER  # if it was not taken
    stages: list[StageDone] = field(default_factory=list)
    downtime_ms: float | None = None  # from out of the source's batch to the verdict, seen there
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRequested:
    """From the source: the scheduler ordered it to give load away, and this request should go. The
    frontend decides, and answers with `Migrate`."""

    request: RequestId
    destination: EngineIndex
    why: str
    code: MoveCode = MoveCode.BALANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainRequested:
    """From an engine whose process was told to end: it should be emptied and stopped."""

    request: RequestId  # empty; every message in band has one
    why: str


FrontendMessage = TookOver | MigrationEnded | MigrationRequested | DrainRequested


@dataclass(frozen=True, slots=True, kw_only=True)
class ToPeer:
    """Send this to the llumlet of that engine."""

    engine: EngineIndex
    address: str
    message: PeerMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class ToFrontend:
    """Send this to the frontend that the request belongs to."""

    client: int  # that frontend's index
    message: FrontendMessage


Out = ToPeer | ToFrontend


def not_taken(grant: Grant, why: str, code: AbortCode = AbortCode.OTHER) -> ToFrontend:
    """Tells the frontend that granted it that nothing comes of this grant."""
    ended = MigrationEnded(
        migration=grant.migration, request=grant.request, taken=False, why=why, code=code
    )
    return ToFrontend(client=grant.client, message=ended)
