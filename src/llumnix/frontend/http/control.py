"""What the routes under /llumnix ask for, and who answers them in a deployment of one frontend."""

import os
from dataclasses import dataclass
from typing import Any, Protocol

from llumnix.core.supervision.frontends import FrontendStatus
from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.supervision.readiness import FleetSeen
from llumnix.core.types import InstanceId
from llumnix.frontend.client import FleetClient
from llumnix.frontend.own_streams import MoveAsked, OwnStreams, quarantine_rows, release
from llumnix.frontend.streams.look import Cursor, Look, joined, new_items
from llumnix.observe.exposition import Exposition
from llumnix.observe.notes import Notes
from llumnix.reload.key_file import KeyRing
from llumnix.reload.reloading import Reloading


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRow:
    """One instance, with how many requests it has of all frontends."""

    status: InstanceStatus
    in_flight: int | None  # None without an engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What all frontends together have of requests, or of migrations, as JSON."""

    rows: list[dict[str, Any]]
    incomplete: list[str]  # frontends that did not say theirs


class InstanceOrders(Protocol):
    """What a user may order of instances."""

    async def add(self) -> InstanceStatus:
        """Begins to start one more. `CapacityError` if nothing can hold it."""
        ...

    async def drain(
        self,
        instance: InstanceId,
        why: str,
        *,
        timeout_s: float | None = None,
        force: bool = False,
        again: bool = False,
    ) -> InstanceStatus:
        """Stops its intake, has its requests moved away, and stops it once it has none; what it
        still holds after `timeout_s` (None: a default), or at once with `force`, goes on at others
        as after a death. With `again` it is started again then, else it is gone. Ordered twice, it
        changes the time-out."""
        ...

    async def undrain(self, instance: InstanceId) -> InstanceStatus:
        """Lets an instance that is being drained serve on."""
        ...


class InstanceControl(InstanceOrders, Protocol):
    """Starts and stops instances."""

    notes: Notes  # what became of them lately
    exposition: Exposition  # the metrics of all processes

    def status(self) -> list[InstanceStatus]:
        """All instances, in order of id."""
        ...

    def seen(self) -> FleetSeen:
        """What a probe's answer follows from."""
        ...


class Control(InstanceOrders, Protocol):
    """All that the routes ask for, over all frontends. What a user can mend is raised as
    `UsageError`."""

    async def instances(self) -> list[InstanceRow]:
        """All instances, in order of id."""
        ...

    async def frontends(self) -> list[FrontendStatus]:
        """The processes that speak HTTP."""
        ...

    async def fleet(self) -> FleetSeen:
        """What a probe's answer follows from."""
        ...

    async def metrics(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        ...

    async def requests(self) -> Rows:
        """Every request that is running or waiting."""
        ...

    async def request(self, name: str) -> dict[str, Any]:
        """One of them, with its life so far."""
        ...

    async def look(self, since: Cursor) -> Look:
        """All open streams, and what happened since the look that gave this cursor. The page's
        feed asks five times a second, while somebody watches."""
        ...

    async def move(self, order: MoveAsked) -> dict[str, Any]:
        """Moves a request; the migration as JSON, when that has ended."""
        ...

    async def migrations(self) -> Rows:
        """The last ones, the oldest first."""
        ...

    async def migration(self, name: str) -> dict[str, Any]:
        """One of them."""
        ...

    async def reload(self) -> dict[str, Any]:
        """Reads keys and the scheduler's settings again; what that changes, and the ids of
        frontends that have not confirmed it, as JSON. A bad file changes nothing."""
        ...

    async def quarantined(self) -> list[dict[str, Any]]:
        """The requests of which instances died, as JSON, the oldest first."""
        ...

    async def release(self, name: str | None) -> int:
        """Refuses requests like this one no longer, or like any if it is None. Returns how many
        that were."""
        ...


class OwnControl:
    """`Control` of the only frontend, which has the fleet in its process."""

    def __init__(
        self, client: FleetClient, fleet: InstanceControl, reloading: Reloading | None = None
    ) -> None:
        self._client = client
        self._fleet = fleet
        self._reloading = reloading or Reloading(KeyRing())
        self._streams = OwnStreams(client)

    async def instances(self) -> list[InstanceRow]:
        """See `Control`, as for all below."""
        return [
            InstanceRow(
                status=status,
                in_flight=None
                if status.engine_index is None
                else self._client.in_flight(status.engine_index),
            )
            for status in self._fleet.status()
        ]

    async def frontends(self) -> list[FrontendStatus]:
        return [FrontendStatus(id="f0", state="serving", pid=os.getpid(), restarts=0, why=None)]

    async def fleet(self) -> FleetSeen:
        return self._fleet.seen()

    async def metrics(self) -> bytes:
        return await self._fleet.exposition.text()

    async def add(self) -> InstanceStatus:
        return await self._fleet.add()

    async def drain(
        self,
        instance: InstanceId,
        why: str,
        *,
        timeout_s: float | None = None,
        force: bool = False,
        again: bool = False,
    ) -> InstanceStatus:
        return await self._fleet.drain(instance, why, timeout_s=timeout_s, force=force, again=again)

    async def undrain(self, instance: InstanceId) -> InstanceStatus:
        return await self._fleet.undrain(instance)

    async def requests(self) -> Rows:
        return Rows(rows=self._streams.rows(), incomplete=[])

    async def request(self, name: str) -> dict[str, Any]:
        return self._streams.row(name)

    async def look(self, since: Cursor) -> Look:
        return joined([self._streams.look(since), fleet_look(self._fleet.notes, since)])

    async def move(self, order: MoveAsked) -> dict[str, Any]:
        return await self._streams.move(order)

    async def migrations(self) -> Rows:
        return Rows(rows=self._client.migrations.recent(), incomplete=[])

    async def migration(self, name: str) -> dict[str, Any]:
        return self._client.migrations.get(name)

    async def reload(self) -> dict[str, Any]:
        async with self._reloading.done() as changes:
            return {**changes, "unconfirmed": []}

    async def quarantined(self) -> list[dict[str, Any]]:
        return quarantine_rows(self._client.quarantine)

    async def release(self, name: str | None) -> int:
        return release(self._client.quarantine, name)


def fleet_look(notes: Notes, since: Cursor) -> Look:
    """What became of instances, as a part of a look."""
    name = "fleet/notes"
    return Look(
        notes=new_items(notes, name, since, first=True), cursor={name: notes.count}, frontends=0
    )
