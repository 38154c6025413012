"""What one look at the streams of a process shows, for the page that shows the deployment.

A look takes what has changed since the one before. `Cursor` says how far that came: of each ring
(observe/notes.py) of each process, how many items had been. Looks at several processes are joined.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from llumnix.core.streams.states import StreamState
from llumnix.core.types import InstanceId, RequestId
from llumnix.observe.notes import Ring

Cursor = Mapping[str, int]
ORPHANED = (StreamState.ASKING, StreamState.ORPHAN, StreamState.REVIVING)


class Placed(NamedTuple):
    """A new request, and the instance that was chosen for it."""

    request: RequestId
    instance: InstanceId
    why: str


class Ended(NamedTuple):
    """A stream that is over."""

    request: RequestId
    how: str  # vLLM's word: stop, length, abort, error, ...
    tokens: int  # that its client got
    first_token_s: float | None  # how long it waited for the first; None if not known


class SeenStream(NamedTuple):
    """A stream that is open."""

    request: RequestId
    client_id: str
    instance: InstanceId  # of its owner, or of its last one if that has died
    orphan: bool  # whether that has died
    priority: int
    prompt_tokens: int
    output_tokens: int
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was seen."""

    streams: list[SeenStream] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)  # `Notes`, the oldest first
    placed: list[Placed] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    cursor: dict[str, int] = field(default_factory=dict)  # for the next look
    frontends: int = 1  # how many processes it shows


def new_items(ring: Ring[Any], name: str, since: Cursor, *, first: bool = False) -> list[Any]:
    """The items of a ring that a look has not had. The first look gets none, or all with
    `first`."""
    return ring.since(since.get(name, 0 if first else ring.count))


def joined(looks: Iterable[Look]) -> Look:
    """Looks at several processes as one."""
    found = list(looks)
    cursor: dict[str, int] = {}
    for look in found:
        cursor |= look.cursor
    return Look(
        streams=[s for look in found for s in look.streams],
        notes=sorted((n for look in found for n in look.notes), key=lambda n: n["t"]),
        placed=[p for look in found for p in look.placed],
        ended=[e for look in found for e in look.ended],
        cursor=cursor,
        frontends=sum(look.frontends for look in found),
    )


def of_instance(look: Look, instance: InstanceId, known: Container[RequestId]) -> Look:
    """What of a look concerns one instance. `known`: the requests that it had before."""
    return replace(
        look,
        streams=[s for s in look.streams if s.instance == instance],
        notes=[n for n in look.notes if _concerns(n, instance, known)],
        placed=[p for p in look.placed if p.instance == instance],
        ended=[e for e in look.ended if e.request in known],
    )


def _concerns(note: dict[str, Any], instance: InstanceId, known: Container[RequestId]) -> bool:
    move, revival = note.get("move", {}), note.get("revival", {})
    places = note["target"], move.get("source"), move.get("destination"), revival.get("instance")
    return instance in places or note["target"] in known
