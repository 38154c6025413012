"""What follows from an event, as values: the table (core/streams/table.py) answers with them, and
the frontend carries them out in order."""

from dataclasses import dataclass
from typing import Literal

from llumnix.core.codes import AbortCode
from llumnix.core.types import EngineIndex, MigrationId, RequestId

Outcome = Literal["migrated", "aborted", "lost"]
"""How a migration ended: the destination has the request; the source kept it; no engine has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Have the engine abort the request."""

    engine: EngineIndex
    request: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class TellLost:
    """Tell the engine that another one, `lost`, died."""

    engine: EngineIndex
    lost: EngineIndex
    granted: tuple[MigrationId, ...]  # migrations to `lost` for which it has a fresh epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class AskFate:
    """Ask the engine what it decided (`Llumlet.fate`), until it has."""

    engine: EngineIndex
    migration: MigrationId


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """The stream has a new owner. `missing`, then `held` are due to the client."""

    request: RequestId
    owner: EngineIndex
    missing: tuple[int, ...] = ()  # tokens that the old owner generated and never sent
    held: tuple[object, ...] = ()  # outputs of the new owner that came before its turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphaned:
    """No engine runs the request any more. The stream stays in the table: another engine may be
    granted it (`StreamTable.revive`), or it is closed."""

    request: RequestId
    why: str
    declined: AbortCode | None = None  # why an engine that was to go on with it does not
    warm: EngineIndex | None = None  # living engine that may have a part of its KV in its cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Revived:
    """An orphan has an owner again."""

    request: RequestId
    owner: EngineIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantEnded:
    """The migration is over, as far as its stream is concerned."""

    migration: MigrationId
    outcome: Outcome
    why: str = ""  # empty if nothing went wrong
    code: AbortCode = AbortCode.OTHER  # why it was aborted, if it was


Effect = Abort | TellLost | AskFate | Moved | Orphaned | Revived | GrantEnded
