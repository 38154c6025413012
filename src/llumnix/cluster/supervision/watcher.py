"""Watches for engines that live and do nothing (core/supervision/hang.py says when).

A hung engine is logged, and gets no requests while another serves. One that is to be fenced is
given to the supervisor. What stops a process is found beside the event loop and without the
controller (cluster/supervision/hosts.py); the rest follows from the reports that the controller
knows.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from llumnix.cluster.frontends.seam import Frontends
from llumnix.cluster.supervision.hosts import Hosts
from llumnix.cluster.supervision.member import Member
from llumnix.cluster.supervision.runs import EngineRun
from llumnix.core.codes import DeathCode
from llumnix.core.supervision.blame import Death, Fenced
from llumnix.core.supervision.hang import HOST_LOST_LOOKS, LOOK_EVERY_S, Health, Standstill
from llumnix.core.types import EngineIndex

logger = logging.getLogger("llumnix.fleet")

HOST_LOST = Fenced(why="its host does not answer", blamed=False, code=DeathCode.NODE)


class Watcher:
    """Looks at every member that has an engine."""

    def __init__(
        self,
        frontends: Frontends,
        members: Callable[[], Iterable[Member]],
        hosts: Hosts,
        *,
        answers: Callable[[EngineRun], Awaitable[bool]],
        fence: Callable[[Member, EngineRun, Fenced], Awaitable[None]],
        on_health: Callable[[Member], None],
    ) -> None:
        """`answers` asks an engine's process whether it is there; `fence` ends a run; `on_health`
        is called when what is known of a member changes."""
        self._frontends = frontends
        self._members = members
        self._hosts = hosts
        self._answers = answers
        self._fence = fence
        self._on_health = on_health
        self._fences: dict[EngineIndex, asyncio.Task[None]] = {}  # under way

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Looks once. Without a controller there are no reports, and nothing is concluded from
        them."""
        self._hosts.watch(run for _, run in self._living())
        loads = await self._frontends.link.loads()
        if loads is None:
            return
        reports = {report.engine_index: report for report in loads}
        for member, run in self._living():
            heard, run.heard_s = run.heard_s, self._frontends.heard_s(run.engine_index)
            health = member.hangs.look(
                reports.get(run.engine_index),
                paused=self._frontends.paused,
                heard=run.heard_s != heard,
                owned=self._frontends.in_flight(run.engine_index),
            )
            self._tell(member, health)
            self._frontends.note_silent(run.engine_index, health.silent)
            if health.fence is not None:
                self._begin_fence(member, run, health.fence, ask=health.silent)
        self._look_at_hosts()

    def stopped(self, engine_index: EngineIndex, standstill: Standstill) -> None:
        """A process of the engine is stopped or gone. On the event loop."""
        for member, run in self._living():
            if run.engine_index == engine_index:
                self._begin_fence(member, run, _fence_for(run, standstill), look=standstill.gone)

    def close(self) -> None:
        """Ends what is under way."""
        for task in self._fences.values():
            task.cancel()
        self._hosts.close()

    def _living(self) -> list[tuple[Member, EngineRun]]:
        members = list(self._members())
        runs = [(m, m.run) for m in members if m.run is not None]
        return [(m, run) for m, run in runs if run.alive and not run.unwanted]

    def _look_at_hosts(self) -> None:
        """A host is lost once neither it nor any engine of it was heard of for long enough."""
        hosts: dict[str, list[tuple[Member, EngineRun]]] = {}
        for member, run in self._living():
            if run.facts is not None:
                hosts.setdefault(run.facts.host, []).append((member, run))
        for host, engines in hosts.items():
            silent = self._hosts.silent_s(host) >= HOST_LOST_LOOKS * LOOK_EVERY_S
            if silent and all(m.hangs.unheard_looks >= HOST_LOST_LOOKS for m, _ in engines):
                for member, run in engines:
                    self._begin_fence(member, run, HOST_LOST)

    def _begin_fence(
        self,
        member: Member,
        run: EngineRun,
        fenced: Fenced,
        *,
        ask: bool = False,
        look: bool = False,
    ) -> None:
        """Beside the looks, since it may take as long as Ray does. `ask`: the engine's process is
        asked first, and left alone if it answers: it may be the controller that does not hear.
        `look`: its host is asked first whether it is to be blamed."""
        if run.engine_index in self._fences:
            return

        async def work() -> None:
            if ask and await self._answers(run):
                return
            seen = fenced
            if look:
                death = await self._hosts.examine(run, Death(why=fenced.why, code=fenced.code))
                seen = replace(fenced, blamed=death.blamed, code=death.code)
            await self._fence(member, run, seen)

        task = asyncio.create_task(work())
        self._fences[run.engine_index] = task
        task.add_done_callback(lambda task: self._fence_ended(run, task))

    def _fence_ended(self, run: EngineRun, task: asyncio.Task[None]) -> None:
        del self._fences[run.engine_index]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("Engine %d could not be fenced", run.engine_index, exc_info=error)

    def _tell(self, member: Member, health: Health) -> None:
        before, member.health = member.health, health
        if (before.hung is None) != (health.hung is None):
            if health.hung is None:
                logger.warning("Instance %s is back: it reports and makes steps.", member.id)
            else:
                logger.warning("Instance %s is hung: %s.", member.id, health.hung)
            self._on_health(member)


def _fence_for(run: EngineRun, standstill: Standstill) -> Fenced:
    own = run.facts is not None and standstill.pid == run.facts.pid
    who = "its process" if own else f"its worker process {standstill.pid}"
    what = "is gone" if standstill.gone else "is stopped"
    code = DeathCode.SIGNAL if standstill.gone else DeathCode.STOPPED
    return Fenced(why=f"{who} {what}", blamed=False, code=code)
