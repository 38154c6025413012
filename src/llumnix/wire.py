"""Messages between our processes as bytes: typed msgpack, with nothing unpickled.

A message is the pair [name of its class, its fields]. Both sides know the same closed set of
classes. Anything else raises a `ProtocolError` that shows the bytes.
"""

from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec

from llumnix.core.events import (
    AddInstances,
    Dispatch,
    DrainInstance,
    FleetReported,
    InstanceLost,
    LoadReported,
    MoveOrder,
    NoInstance,
    PrefixesChanged,
    RequestArrived,
    UndrainInstance,
)
from llumnix.core.messages import (
    CancelMigration,
    DrainRequested,
    Handover,
    HandoverAnnounced,
    Migrate,
    MigrationEnded,
    MigrationRequested,
    Reserve,
    Reserved,
    Revive,
    Stage,
    Staged,
    StageProgress,
    TookOver,
    Verdict,
)
from llumnix.core.reports import LoadReport
from llumnix.errors import ProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Asks the controller whether it is there. It answers with a `Pong` of the same number."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """The answer to a `Ping`, with what has gone wrong since the controller was started."""

    number: int
    refused: int = 0  # messages that made no sense
    failed: int = 0  # messages that could not be handled, which is a bug
    story: str = ""  # of the last that failed


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadsAsked:
    """A frontend asks for the last report of every instance."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """The last report of every instance that the controller knows."""

    number: int
    reports: list[LoadReport] = field(default_factory=list)


Message = (
    RequestArrived
    | LoadReported
    | PrefixesChanged
    | InstanceLost
    | FleetReported
    | Dispatch
    | NoInstance
    | MoveOrder
    | AddInstances
    | DrainInstance
    | UndrainInstance
    | Ping
    | Pong
    | LoadsAsked
    | Loads
    | Migrate
    | Revive
    | Reserve
    | Stage
    | HandoverAnnounced
    | Handover
    | CancelMigration
    | Reserved
    | Staged
    | StageProgress
    | Verdict
    | TookOver
    | MigrationEnded
    | MigrationRequested
    | DrainRequested
)
_CLASSES: dict[str, type] = {c.__name__: c for c in get_args(Message)}
_encoder = msgspec.msgpack.Encoder()
_envelope = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    name: msgspec.msgpack.Decoder(c) for name, c in _CLASSES.items()
}


def encode(message: Message) -> bytes:
    """The message as bytes."""
    return _encoder.encode((type(message).__name__, message))


def decode(payload: bytes) -> Message:
    """The message that `encode` made; `ProtocolError` on anything else."""
    try:
        name, body = _envelope.decode(payload)
        return _decoders[name].decode(body)  # type: ignore[no-any-return]
    except (msgspec.DecodeError, KeyError) as error:
        raise ProtocolError(f"not a message of ours ({error}): {payload[:80]!r}") from error
