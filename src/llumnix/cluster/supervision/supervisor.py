"""Supervises single instances: starts one, watches it, starts it again, empties and ends it.

Every member has one task at a time, `supervise` or `drain`. Both go on from whatever state the
member is in, so that an order, or a failure of Ray's, may end one at any point and the next takes
over: `Member.run` is forgotten only once all of it is gone.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from llumnix.cluster.supervision.member import Member
from llumnix.cluster.supervision.runs import Runs
from llumnix.core.limits import DRAIN_POLL_S
from llumnix.core.supervision.hang import HangPolicy, Health
from llumnix.core.supervision.restart import GiveUp, RestartAfter
from llumnix.core.types import InstanceId
from llumnix.frontend.client import FleetClient
from llumnix.tasks import keep_running

logger = logging.getLogger("llumnix.fleet")

FAILURES_MAX = 10
"""Unexpected failures in a row, with pauses between of three minutes in all."""


class Supervisor:
    """What happens to each of the `members`. `on_change` is called after every change of state."""

    def __init__(
        self,
        client: FleetClient,
        runs: Runs,
        members: dict[InstanceId, Member],
        on_change: Callable[[], None],
    ) -> None:
        self._client = client
        self.runs = runs
        self._members = members
        self._on_change = on_change
        self.given_up = 0

    def supervise(self, member: Member) -> None:
        """Has it started and kept up from now on, in place of what is being done with it."""

        async def work() -> None:
            await self._guarded(member, "Supervising", lambda: self._supervise(member))

        self._replace_task(member, work())

    def drain(self, member: Member) -> None:
        """Has it emptied, ended and removed, in place of what is being done with it."""

        async def work() -> None:
            await self._guarded(member, "Draining", lambda: self._drain(member))
            if self._members.get(member.id) is member and member.state == "stopping":
                del self._members[member.id]
            self._on_change()

        self._replace_task(member, work())

    def _replace_task(self, member: Member, work: Awaitable[None]) -> None:
        if member.task is not None:
            member.task.cancel()
        member.task = asyncio.ensure_future(work)

    async def _guarded(
        self, member: Member, what: str, work: Callable[[], Awaitable[None]]
    ) -> None:
        name = f"{what} instance {member.id}"
        try:
            await keep_running(name, work, logger, failures_max=FAILURES_MAX)
        except Exception as error:
            logger.exception("%s failed %d times in a row", name, FAILURES_MAX)
            if member.state == "draining":
                member.state = "stopping"
            if member.state != "stopping":
                self._give_up(member, f"given up: {type(error).__name__}: {error}")

    # -- kept up

    async def _supervise(self, member: Member) -> None:
        while member.state != "failed":
            why = await (self._watch(member) if member.state == "serving" else self._start(member))
            if why is not None:
                await self._died(member, why)
        await self.end(member)

    async def _watch(self, member: Member) -> str:
        assert member.run is not None
        assert member.run.ended is not None
        return await asyncio.shield(member.run.ended)

    async def _start(self, member: Member) -> str | None:
        """A new run of the member; returns None once it serves, or why it ended before."""
        await self.end(member)  # The last one, or what an attempt that was cut short has left.
        pause_s = member.start_at_s - asyncio.get_running_loop().time()
        if pause_s > 0:
            await asyncio.sleep(pause_s)
        return await self.start_run(member)

    async def start_run(self, member: Member) -> str | None:
        """Creates a run and brings it up; returns None once it serves, or why it ended before."""
        if member.run is None:
            member.hangs, member.health = HangPolicy(), Health()
            member.run = self.runs.create(member.id, member.slot)
        why = await self.runs.until_ready(member.run)
        if why is None:
            why = await self._client.bring_up(member.run.engine_index)
        if why is None:
            self._serve(member)
        return why

    def _serve(self, member: Member) -> None:
        assert member.run is not None
        self.runs.accept(member.run, True)
        if member.ever_served:
            logger.warning("Instance %s serves again.", member.id)
        member.state, member.why, member.ever_served = "serving", None, True
        member.serving_since_s = asyncio.get_running_loop().time()
        self._on_change()

    async def _died(self, member: Member, why: str) -> None:
        """Ends the streams of a dead run, and decides whether there is to be another."""
        now = asyncio.get_running_loop().time()
        served_s = now - member.serving_since_s if member.state == "serving" else 0.0
        if member.run is not None:
            streams = await self._client.lose(member.run.engine_index)
            logger.error("Instance %s died (%s); %d streams ended.", member.id, why, streams)
        if not member.ever_served:
            self._give_up(member, f"could not be started: {why}")
            return
        member.state, member.why, member.health = "restarting", why, Health()
        match member.history.crashed(served_s):
            case GiveUp() as verdict:
                self._give_up(member, f"given up: {verdict.why}; the last time: {why}")
            case RestartAfter(delay_s=delay_s) as verdict:
                member.start_at_s = now + delay_s
                member.restarts += 1
                logger.warning(
                    "Instance %s is started again in %.0f s (%s).", member.id, delay_s, verdict.why
                )
        self._on_change()

    def _give_up(self, member: Member, why: str) -> None:
        member.state, member.why = "failed", why
        self.given_up += 1
        logger.error(
            "Instance %s is %s. Mend the cause, then POST /llumnix/v1/instances.", member.id, why
        )
        self._on_change()

    # -- emptied

    def settle_drains(self) -> None:
        """An instance that is being emptied takes requests all the same while no other serves, and
        its drain is taken back if none will."""
        for member in self._members.values():
            if member.state != "draining" or member.run is None or not member.run.alive:
                continue
            assert member.drain is not None
            others = [m for m in self._members.values() if m is not member]
            alone = not member.drain.force and not any(m.serves for m in others)
            if alone and not any(m.coming or m.health.hung for m in others):
                logger.warning("Instance %s serves on: there is no other.", member.id)
                self.undrain(member)
            elif alone != member.drain.held:
                member.drain.held = alone
                self.runs.accept(member.run, alone)
                if alone:
                    logger.warning("Instance %s takes requests until another does.", member.id)

    def undrain(self, member: Member) -> None:
        """Lets an instance that is being emptied serve on."""
        assert member.run is not None
        member.state, member.why, member.drain = "serving", None, None
        self.runs.accept(member.run, True)
        self.supervise(member)
        self._on_change()

    async def _drain(self, member: Member) -> None:
        drain, run = member.drain, member.run
        assert drain is not None
        if member.state == "draining" and run is not None and run.alive:
            self.runs.accept(run, drain.held)
            while run.alive and (drain.held or self._client.in_flight(run.engine_index)):
                if asyncio.get_running_loop().time() >= drain.deadline_s:
                    # What nobody but the scheduler wanted costs no stream.
                    unforced = drain.by == "scheduler" and member.health.hung is None
                    if drain.held or unforced:
                        logger.warning("Instance %s could not be emptied: it serves on.", member.id)
                        self.undrain(member)
                        return
                    break
                await asyncio.sleep(DRAIN_POLL_S)
        took_s = asyncio.get_running_loop().time() - drain.began_s
        member.state = "stopping"
        self._on_change()
        if run is not None:
            how = "were cut off" if run.alive else "ended with its engine"
            ended = await self._client.lose(run.engine_index)
            if ended:
                member.why = f"{drain.why}; {ended} of its requests {how} after {took_s:.1f} s"
                logger.warning("Instance %s: %s.", member.id, member.why)
            else:
                logger.info("Instance %s is empty after %.1f s.", member.id, took_s)
        await self.end(member)
        logger.info("Instance %s is stopped.", member.id)

    # -- ended

    async def end(self, member: Member) -> None:
        """Ends the member's run, if it has one; what fails is raised, and the run not forgotten."""
        if member.run is not None:
            await self._client.lose(member.run.engine_index)
            await self.runs.end(member.run)
            member.run = None
