"""Messages between our processes as bytes: typed msgpack, with nothing unpickled.

A message is the pair [name of its class, its fields]. Both sides know the same closed set of
classes. Anything else raises a `ProtocolError` that shows the bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, get_args

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
    SettingsChanged,
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
from llumnix.errors import ProtocolError, UsageError


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
    """The last report of every instance that the controller knows, and what it did so far."""

    number: int
    reports: list[LoadReport] = field(default_factory=list)
    busy_s: float = 0.0  # time that its scheduler took
    facts: dict[str, int] = field(default_factory=dict)  # that it was told, by kind
    log_dropped: int = 0  # lines that its event log could not write


Message = (
    RequestArrived
    | LoadReported
    | PrefixesChanged
    | InstanceLost
    | FleetReported
    | SettingsChanged
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
M = TypeVar("M")


class Codec(Generic[M]):
    """A closed set of messages, which both ends of a line know: dataclasses with names of their
    own."""

    def __init__(self, classes: Iterable[type]) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._envelope = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
        self._decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
            c.__name__: msgspec.msgpack.Decoder(c) for c in classes
        }

    def encode(self, message: M) -> bytes:
        """The message as bytes."""
        return self._encoder.encode((type(message).__name__, message))

    def decode(self, payload: bytes) -> M:
        """The message that `encode` made; `ProtocolError` on anything else."""
        try:
            name, body = self._envelope.decode(payload)
            return self._decoders[name].decode(body)  # type: ignore[no-any-return]
        except (msgspec.DecodeError, KeyError, UsageError) as error:
            raise ProtocolError(f"not a message of ours ({error}): {payload[:80]!r}") from error


_codec: Codec[Message] = Codec(get_args(Message))
encode = _codec.encode
decode = _codec.decode
