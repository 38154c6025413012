"""What users ask about the streams of one frontend, and order for them."""

import functools
import time
from dataclasses import dataclass
from typing import Any

from llumnix.core.streams.quarantine import REFUSED_FOR_S, Quarantine
from llumnix.core.types import RequestId
from llumnix.errors import ConflictError, UnknownInstanceError, UnknownQuarantineError
from llumnix.frontend.client import FleetClient
from llumnix.frontend.engines.directory import EngineTarget
from llumnix.frontend.streams.info import FleetStream, find
from llumnix.frontend.streams.look import ORPHANED, Cursor, Look, SeenStream, new_items

SHOWN_MAX = 128
"""So much of a request's name is shown on the page. Clients choose it, and it may be long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveAsked:
    """A user's order to move a request."""

    request_id: str  # as `GET /llumnix/v1/requests` shows it
    destination: str | None = None  # an instance; None: the one with the most free KV memory
    copy: str = "staged"  # one of `COPIES` in core/messages.py


class OwnStreams:
    """The streams of this process."""

    def __init__(self, client: FleetClient) -> None:
        self._client = client

    def rows(self) -> list[dict[str, Any]]:
        """Every request that is running or waiting, as JSON."""
        return [self._row(s) for s in self._client.streams if s.last_owner is not None]

    def _row(self, stream: FleetStream) -> dict[str, Any]:
        engines, info = self._client.engines, stream.info
        priorities = self._client.priorities
        return {
            "id": info.client_id,
            "request": stream.request,
            "instance": None if stream.owner is None else engines.name(stream.owner),
            "prompt_tokens": info.prompt_tokens,
            "output_tokens": stream.outputs,
            "priority": info.priority,
            "class": priorities.classes[priorities.rank(info.priority)].name,
            "key": None if info.http is None else info.http.key_name,
            "age_s": round(info.age_s, 3),
        }

    def row(self, name: str) -> dict[str, Any]:
        """One of them with its life so far, as JSON; `UnknownRequestError` if there is none."""
        stream = find(self._client.streams, name)
        waited_s, client = self._client.first_token_s(stream.request), self._client
        moves = client.migrations.recent()
        return {
            **self._row(stream),
            "why": stream.info.why_placed,
            "first_token_s": None if waited_s is None else round(waited_s, 4),
            "lives_used": stream.lives_used,
            "migrations": [m for m in moves if m["request"] == stream.request],
        }

    def look(self, since: Cursor) -> Look:
        """All open streams, and what happened since the look that gave this cursor."""
        client, index = self._client, self._client.client_index
        rings = {"notes": client.notes, "placed": client.placements, "ended": client.ends}
        return Look(
            streams=self._seen(),
            notes=new_items(client.notes, f"{index}/notes", since, first=True),
            placed=new_items(client.placements, f"{index}/placed", since),
            ended=new_items(client.ends, f"{index}/ended", since),
            cursor={f"{index}/{name}": ring.count for name, ring in rings.items()},
        )

    def _seen(self) -> list[SeenStream]:
        """All open streams. Some thousands are looked at five times a second, so each costs no call
        that can be done without."""
        now, name = time.monotonic(), functools.cache(self._client.engines.name)
        return [
            SeenStream(
                s.request,
                s.info.client_id[:SHOWN_MAX],
                name(s.last_owner),
                s.machine.state in ORPHANED,
                s.info.priority,
                s.info.prompt_tokens,
                len(s.tokens),
                now - s.info.started_s,
            )
            for s in self._client.streams
            if s.last_owner is not None
        ]

    def named(self, name: str) -> tuple[list[RequestId], bool]:
        """The requests that a user means by a name, and whether it is the id of one."""
        owned = [s for s in self._client.streams if s.owner is not None]
        if any(s.request == name for s in owned):
            return [RequestId(name)], True
        return [s.request for s in owned if s.info.client_id == name], False

    def migrations(self, name: str | None) -> list[tuple[float, dict[str, Any]]]:
        """The last migrations, or the one of that name: when each began, and as JSON."""
        records = self._client.migrations.records()
        return [(m.began_s, m.listed()) for m in records if name in (None, m.id)]

    async def move(self, order: MoveAsked) -> dict[str, Any]:
        """Moves a request, and returns the migration as JSON when that has ended."""
        target = await self._destination(order)
        stream = find(self._client.streams, order.request_id)  # It may have ended meanwhile.
        return (await self._client.migrate(stream, target, order.copy)).shown()

    async def _destination(self, order: MoveAsked) -> EngineTarget:
        client = self._client
        stream, wanted = find(client.streams, order.request_id), order.destination
        targets = client.engines.targets()
        if wanted is not None:
            for target in targets:
                if target.instance == wanted:
                    return target
            names = ", ".join(t.instance for t in targets) or "none"
            raise UnknownInstanceError(f"no instance {wanted} takes requests; there are: {names}")
        others = [t for t in targets if t.engine_index != stream.owner]
        if not others:
            raise ConflictError(
                "there is no other instance to move it to; POST /llumnix/v1/instances first"
            )
        reports = {r.engine_index: r for r in await client.link.loads() or ()}

        def free(target: EngineTarget) -> tuple[int, int]:
            report = reports.get(target.engine_index)
            tokens = report.kv_tokens_total - report.kv_tokens_used if report else 0
            return tokens, -client.in_flight(target.engine_index)

        return max(others, key=free)


def quarantine_rows(quarantine: Quarantine) -> list[dict[str, Any]]:
    """The requests of which instances died, the oldest first, as JSON."""
    now = time.monotonic()
    return [
        {
            "id": one.id,
            "client_id": one.client_id,
            "prompt_tokens": one.prompt_tokens,
            "output_tokens": one.output_tokens,
            "refused": one.refused,
            "seconds_left": round(one.since_s + REFUSED_FOR_S - now, 1),
        }
        for one in quarantine.all(now)
    ]


def release(quarantine: Quarantine, name: str | None) -> int:
    """Refuses requests like this one no longer, or like any if it is None. Returns how many that
    were; `UnknownQuarantineError` if one is named and is none of them."""
    released = quarantine.release(name)
    if name is not None and not released:
        raise UnknownQuarantineError(
            f"no request is quarantined as {name}; GET /llumnix/v1/quarantine lists them"
        )
    return released
