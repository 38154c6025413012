"""Watches for engines that live and do nothing (core/supervision/hang.py says when).

A hung engine is logged, and gets no requests while another serves. If it is silent, its streams are
ended. It is left running: to have it replaced, act where `on_health` is called.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

from llumnix.cluster.supervision.member import Member
from llumnix.core.supervision.hang import LOOK_EVERY_S, Health
from llumnix.core.types import EngineIndex
from llumnix.frontend.client import FleetClient

logger = logging.getLogger("llumnix.fleet")

SILENT = "The instance that ran this request does not respond. Please send the request again."


class Watcher:
    """Looks at every member that has an engine. `on_health`: called when what is known of one
    changes."""

    def __init__(
        self,
        client: FleetClient,
        members: Callable[[], Iterable[Member]],
        on_health: Callable[[Member], None],
    ) -> None:
        self._client = client
        self._members = members
        self._on_health = on_health

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Looks once. Without a controller there are no reports, and nothing is concluded."""
        loads = await self._client.link.loads()
        if loads is None:
            return
        reports = {report.engine_index: report for report in loads}
        for member in list(self._members()):
            run = member.run
            if run is None or not run.alive:
                continue
            report = reports.get(run.engine_index)
            health = member.hangs.look(
                report.sequence if report else None,
                # An engine that a user paused stands still on purpose.
                0.0 if report is None or self._client.shared_state.paused else report.stalled_s,
                stopped=_stopped(member),
            )
            self._tell(member, health)
            silent = self._client.shared_state.silent
            (silent.add if health.lost else silent.discard)(run.engine_index)
            if health.lost:
                self._cut_off(member, run.engine_index)

    def _cut_off(self, member: Member, engine_index: EngineIndex) -> None:
        """Ends the engine's streams with an error. The engine may live on, so it is told to abort
        their requests, in case it still listens."""
        mine = self._client.streams.on(engine_index)
        for stream in mine:
            self._client.end(stream.request, SILENT)
        if mine:
            logger.error("Instance %s is silent; %d streams ended.", member.id, len(mine))

    def _tell(self, member: Member, health: Health) -> None:
        before, member.health = member.health, health
        if (before.hung is None) != (health.hung is None):
            if health.hung is None:
                logger.warning("Instance %s is back: it reports and makes steps.", member.id)
            else:
                logger.warning("Instance %s is hung: %s.", member.id, health.hung)
            self._on_health(member)


def _stopped(member: Member) -> bool:
    """Whether the member's process runs on this host and is stopped, as by SIGSTOP."""
    facts = member.run.facts if member.run else None
    if facts is None or not member.hangs.silent_looks or facts.node != socket.gethostname():
        return False
    try:
        status = Path(f"/proc/{facts.pid}/stat").read_text()
    except OSError:
        return False
    # "PID (NAME) STATE ..."; the name may hold anything.
    return status.rpartition(")")[2].split()[:1] == ["T"]
