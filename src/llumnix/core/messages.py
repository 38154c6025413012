"""What frontends and llumlets say to each other about migrations.

All may be lost, come late or come twice between llumlets; core/migration/llumlet.py stands it.
Between a frontend and an engine the order holds and nothing is lost while both live. Token counts
in tokens, sizes in bytes, times in seconds.
"""

from dataclasses import dataclass, field

from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId

ABSENT = -1
"""In place of a block that the source does not keep any more (outside a sliding window)."""
Blocks = list[list[int]]
"""Ids of KV blocks for a range of tokens, one list for each group of layers. May hold `ABSENT`."""

IN_BAND = "llumnix"
"""Key under which an output of an engine carries a message to its frontend, in the
`kv_transfer_params`."""
COPIES = ("staged", "blocking", "recompute")
"""How a request's KV gets to its destination: copied while the request goes on; copied after it was
stopped; not at all, but computed again from its tokens. The latter two are what others do, and what
benchmarks compare with."""


# -- frontend to the source's llumlet


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrate:
    """Move this request to that engine, under this epoch. `address`: where its llumlet listens.
    `copy`: one of `COPIES`. `wanted`: the source's llumlet asked for it (`MigrationRequested`), and
    not a user."""

    migration: MigrationId
    request: RequestId
    destination: EngineIndex
    address: str
    epoch: Epoch
    copy: str = "staged"
    wanted: bool = False


# -- source to destination


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Have room for this request. `body`: the request as the engine's binding wrote it; `outputs`:
    what it has generated so far; `tokens`: slots wanted now; `agents`: where the source's workers
    let their blocks be read, one for each rank."""

    migration: MigrationId
    request: RequestId
    source: EngineIndex
    address: str
    epoch: Epoch
    body: bytes
    outputs: list[int]
    tokens: int
    agents: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Pull the blocks of tokens [start, end), and have slots for `tokens`. `outputs` are those
    generated since the source's last word, the first of them number `first_output`."""

    migration: MigrationId
    stage: int
    start: int
    end: int
    blocks: Blocks
    first_output: int
    outputs: list[int]
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverAnnounced:
    """The handover follows in about `in_s`: so long the request's last steps here will take. Said
    while there is one more to come, and again, if steps are in flight, when it was taken out."""

    migration: MigrationId
    in_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """The rest: tokens [start, end), where `end` is all that was computed. `state`: what else the
    binding needs. Answered with a verdict, and sent again until it is. `request`, `source`,
    `address`: as in `Reserve`, for a destination that has forgotten it."""

    migration: MigrationId
    request: RequestId
    source: EngineIndex
    address: str
    start: int
    end: int
    blocks: Blocks
    first_output: int
    outputs: list[int]
    state: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelMigration:
    """The source will not go on with it."""

    migration: MigrationId
    why: str


# -- destination to source


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """There is room. `hit`: tokens that need not be copied, for they are here already."""

    migration: MigrationId
    hit: int


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
    """`taken`: the destination owns the request, else it never will. Once said, never changed.
    `bytes`, `seconds`: of the last pull."""

    migration: MigrationId
    taken: bool
    why: str
    bytes: int = 0
    seconds: float = 0.0


FromSource = Reserve | Stage | HandoverAnnounced | Handover | CancelMigration
FromDestination = Reserved | Staged | StageProgress | Verdict
PeerMessage = FromSource | FromDestination


# -- llumlets to the frontend


@dataclass(frozen=True, slots=True, kw_only=True)
class TookOver:
    """From the destination, before its first token of the request: it owns it now, and goes on
    after `outputs` generated tokens, the last few of which are `tail`."""

    migration: MigrationId
    request: RequestId
    epoch: Epoch
    outputs: int
    tail: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDone:
    """What one stage moved and how long that took."""

    tokens: int
    bytes: int
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationEnded:
    """From the source: how it ended. `downtime_ms`: from out of the source's batch to ready in the
    destination's queue, as the source saw it."""

    migration: MigrationId
    request: RequestId
    taken: bool
    why: str
    stages: list[StageDone] = field(default_factory=list)
    downtime_ms: float | None = None
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRequested:
    """From the source: the scheduler ordered it to give load away, and this request should go
    there. The frontend decides whether it does, and orders that."""

    request: RequestId
    destination: EngineIndex
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainRequested:
    """From an engine whose process was told to end: it should be emptied and stopped. `request`:
    empty; every message in band has one."""

    request: RequestId
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

    message: FrontendMessage


Out = ToPeer | ToFrontend
