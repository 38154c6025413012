"""Supervises single instances: starts one, watches it, starts it again, empties and ends it.

What happens to an instance is decided by its life (core/supervision/lifecycle.py); the supervisor
tells the life what it sees, and carries out the actions that come back.

Every member has one task at a time, `supervise` or `drain`. Both go on from whatever state the
member is in. So an order, or a failure of Ray's, may end a task at any point, and the next one
takes over. `Member.run` is forgotten only once nothing of the run is left.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from llumnix.cluster.frontends.seam import Frontends
from llumnix.cluster.supervision.hosts import Hosts
from llumnix.cluster.supervision.member import Member
from llumnix.cluster.supervision.runs import EngineLauncher, EngineRun
from llumnix.core.codes import DeathCode
from llumnix.core.events import DrainedBy
from llumnix.core.limits import DRAIN_POLL_S
from llumnix.core.supervision.blame import Death, Fenced
from llumnix.core.supervision.hang import HangPolicy, Health
from llumnix.core.supervision.lifecycle import Drain, LifeAction, LifeState
from llumnix.core.types import InstanceId
from llumnix.observe import metrics
from llumnix.observe.lines import about
from llumnix.observe.notes import Notes
from llumnix.tasks import keep_running

logger = logging.getLogger("llumnix.fleet")

FENCED = "fenced: "
FAILURES_MAX = 10
"""Unexpected failures in a row, with pauses between of three minutes in all."""

NOTED = {
    LifeAction.SERVE: "up",
    LifeAction.RESTART: "death",
    LifeAction.GIVE_UP: "give_up",
    LifeAction.DRAIN: "drain",
    LifeAction.SERVE_ON: "undrain",
    LifeAction.FORGET: "removed",
    LifeAction.RENEW: "renew",
}
"""What is noted of an instance, by the action that its life decides."""


class Supervisor:
    """What happens to each of the `members`. `on_change` is called after every change of state;
    `stall_s` is the knob `survival.stall_s`. What happened lately is in `notes`."""

    def __init__(
        self,
        frontends: Frontends,
        launcher: EngineLauncher,
        members: dict[InstanceId, Member],
        hosts: Hosts,
        on_change: Callable[[], None],
        stall_s: float | None = None,
    ) -> None:
        self._frontends = frontends
        self._launcher = launcher
        self._members = members
        self._hosts = hosts
        self._stall_s = stall_s
        self._on_change = on_change
        self.given_up = 0  # instances so far
        self.notes = Notes()

    # -- what is asked of it

    def supervise(self, member: Member) -> None:
        """Has the member started and kept up from now on, in place of what is being done with
        it."""

        async def work() -> None:
            await self._guarded(member, "Supervising", lambda: self._supervise(member))

        self._replace_task(member, work())

    def drain(
        self,
        member: Member,
        by: DrainedBy,
        why: str,
        *,
        timeout_s: float | None = None,
        force: bool = False,
        again: bool = False,
    ) -> None:
        """Has the member emptied, ended and removed, or started `again`, in place of what is being
        done with it."""
        now_s = asyncio.get_running_loop().time()
        action = member.life.order_drain(
            by, why, now_s, timeout_s=timeout_s, force=force, again=again
        )
        self._perform(member, action)

    def undrain(self, member: Member) -> None:
        """Lets a member that is being drained serve on."""
        drain = member.life.drain
        self._perform(member, member.life.undrain(), drain)

    def settle_drains(self) -> None:
        """While no other instance serves, one that is being drained takes requests all the same. If
        no other ever will, its drain is taken back."""
        for member in self._members.values():
            run, drain = member.run, member.life.drain
            if run is None or drain is None or not member.may_serve_on:
                continue
            others = [m for m in self._members.values() if m is not member]
            alone = not drain.force and not any(m.serves for m in others)
            if alone and not any(m.life.counts or m.life.renewed for m in others):
                extra = about("undrain", instance=member.id)
                logger.warning("Instance %s serves on: there is no other.", member.id, extra=extra)
                self.undrain(member)
            elif alone != drain.held:
                drain.held = alone
                self._launcher.accept(run, alone)
                if alone:
                    logger.warning("Instance %s takes requests until another does.", member.id)

    # -- actions

    def _perform(self, member: Member, action: LifeAction, drain: Drain | None = None) -> None:
        """Carries out what the member's life decided. `drain`: what it takes back, if anything."""
        life = member.life
        if action is LifeAction.SERVE_ON:
            _count_drain(drain, "undrained")
        if (kind := NOTED.get(action)) is not None:
            self.notes.note(kind, member.id, life.why or "")
        match action:
            case LifeAction.SERVE:
                assert member.run is not None
                self._launcher.accept(member.run, True)
                metrics.START_S.observe(time.monotonic() - member.run.began_s)
                if life.restarts:
                    extra = about("ready", instance=member.id)
                    logger.warning("Instance %s serves again.", member.id, extra=extra)
            case LifeAction.RESTART:
                assert life.restart is not None
                delay_s, why = life.restart.delay_s, life.restart.why
                extra = about("restart", instance=member.id, delay_s=delay_s, why=why)
                logger.warning(
                    "Instance %s is started again in %.0f s (%s).",
                    member.id,
                    delay_s,
                    why,
                    extra=extra,
                )
            case LifeAction.GIVE_UP:
                self.given_up += 1
                logger.error(
                    "Instance %s is %s. Mend the cause, then POST /llumnix/v1/instances.",
                    member.id,
                    life.why,
                    extra=about("give_up", instance=member.id, why=life.why),
                )
            case LifeAction.DRAIN:
                assert life.drain is not None
                extra = about("drain_begun", instance=member.id, why=life.drain.why)
                logger.info("Instance %s is drained: %s.", member.id, life.drain.why, extra=extra)
                self._begin_drain(member)
            case LifeAction.SERVE_ON:
                assert member.run is not None
                self._launcher.accept(member.run, True)
                self.supervise(member)
            case LifeAction.RENEW:
                logger.info("Instance %s is started again.", member.id)
                self.supervise(member)
            case LifeAction.FORGET:
                if self._members.get(member.id) is member:
                    del self._members[member.id]
        self._on_change()

    def _begin_drain(self, member: Member) -> None:
        async def work() -> None:
            await self._guarded(member, "Draining", lambda: self._drain(member))
            if member.state is LifeState.STOPPING:
                self._perform(member, member.life.stopped())

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
            self._perform(member, member.life.stuck(f"{type(error).__name__}: {error}"))

    # -- kept up

    async def _supervise(self, member: Member) -> None:
        while member.state is not LifeState.FAILED:
            serving = member.state is LifeState.SERVING
            death = await (self._watch(member) if serving else self._start(member))
            if death is not None:
                await self._died(member, death)
        await self.end(member)

    async def _watch(self, member: Member) -> Death:
        run = member.run
        assert run is not None
        assert run.ended is not None
        death = await asyncio.shield(run.ended)
        self._on_change()  # At once, as another that is drained may have to stand in for it.
        return await self._hosts.examine(run, death)

    async def _start(self, member: Member) -> Death | None:
        """A new run of the member; returns None once it serves, or how it ended before."""
        await self.end(member)  # The last one, or what an attempt that was cut short has left.
        pause_s = member.life.start_at_s - asyncio.get_running_loop().time()
        if pause_s > 0:
            await asyncio.sleep(pause_s)
        why = await self.start_run(member)
        return None if why is None else Death(why=why)

    def create_run(self, member: Member) -> None:
        """Begins a new run of the member, of whose hangs nothing is known yet."""
        member.hangs, member.health = HangPolicy(stall_s=self._stall_s), Health()
        member.run = self._launcher.create(member.id, member.slot)

    async def start_run(self, member: Member) -> str | None:
        """Creates a run and brings it up; returns None once it serves, or why it ended before."""
        if member.run is None:
            self.create_run(member)
        assert member.run is not None
        why = await self._launcher.until_ready(member.run)
        if why is None:
            why = await self._frontends.bring_up(member.run.engine_index)
        if why is None:
            await self._hosts.first_look(member.run)
            why = member.run.why_ended
        if why is None:
            member.run.reach("up")
            self._perform(member, member.life.up(asyncio.get_running_loop().time()))
        return why

    async def _died(self, member: Member, death: Death) -> None:
        """Ends the streams of a dead run, and has decided whether there is to be another."""
        why, now_s = death.why, asyncio.get_running_loop().time()
        _count(member.run, death)
        if member.run is not None and not death.fenced:
            streams = await self._lose(member.run, blamed=death.blamed)
            tail: list[str] = []
            try:
                if death.code is not DeathCode.OOM and await self._hosts.lost(member.run):
                    death = replace(death, code=DeathCode.NODE)
                else:  # A busy host may have told meanwhile.
                    told = await self._hosts.examine(member.run, death)
                    death = replace(death, code=told.code)
                tail = await self._hosts.tail(member.run)
            finally:  # An order may end this task meanwhile.
                _tell_death(member, member.run, death, streams, tail)
        member.health = Health()
        action = member.life.died(why, now_s, host_lost=death.code is DeathCode.NODE)
        if action is LifeAction.RESTART:
            metrics.RESTARTS.labels(str(member.slot), death.code).inc()
        self._perform(member, action)

    async def _lose(self, run: EngineRun, *, blamed: bool) -> int:
        """Tells the frontends of a death, and of which requests it may have been. Returns how many
        streams have ended."""
        suspects = await self._hosts.suspects(run) if blamed else None
        return await self._frontends.lose(run.engine_index, blamed=blamed, suspects=suspects)

    async def fence(self, member: Member, run: EngineRun, fenced: Fenced) -> None:
        """Ends a run that lives and does nothing. Its engine counts as lost at once, whatever it
        still says, and whether or not it can be killed; then follows what follows on a death."""
        if member.run is not run or not run.alive:
            return
        # First, as on its end the member's task goes on, and loses it too, without a suspect.
        streams = await self._lose(run, blamed=fenced.blamed)
        why = f"{FENCED}{fenced.why}"
        death = Death(why=why, blamed=fenced.blamed, fenced=True, code=fenced.code)
        tell = run.alive  # Else it has died meanwhile, and its death is told.
        run.fenced = True
        self._on_change()
        killing, tail = asyncio.create_task(self._hosts.kill(run)), list[str]()
        try:
            tail = await self._hosts.tail(run)  # It may take long, and the kill does not wait.
        finally:
            run.end(death)
        if tell:
            _tell_death(member, run, death, streams, tail)
        await killing

    # -- emptied

    async def _drain(self, member: Member) -> None:
        drain, run = member.life.drain, member.run
        assert drain is not None
        if run is not None and run.alive and member.state is LifeState.DRAINING:
            self._launcher.accept(run, drain.held)
        while member.state is LifeState.DRAINING:
            now_s = asyncio.get_running_loop().time()
            busy = (
                run is not None
                and run.alive
                and (drain.held or self._frontends.may_hold(run.engine_index))
            )
            hung = member.health.hung is not None
            action = member.life.drain_looked_at(now_s, busy=busy, hung=hung)
            if action is LifeAction.SERVE_ON:
                extra = about("undrain", instance=member.id)
                logger.warning(
                    "Instance %s could not be emptied: it serves on.", member.id, extra=extra
                )
                self._perform(member, action, drain)
                return
            if action is LifeAction.NOTHING:
                await asyncio.sleep(DRAIN_POLL_S)
            else:
                self._perform(member, action)
        await self._cut_off(member)
        await self.end(member)
        extra = about("drain_ended", instance=member.id)
        logger.info("Instance %s is stopped.", member.id, extra=extra)

    async def _cut_off(self, member: Member) -> None:
        """Ends what is left of the streams of a member that is being stopped."""
        drain, run = member.life.drain, member.run
        if run is None:
            _count_drain(drain, "died")
            return
        assert drain is not None
        took_s = asyncio.get_running_loop().time() - drain.began_s
        how = "were cut off" if run.alive else "ended with its engine"
        death = None if run.why_ended is None else await self._watch(member)
        if death is not None:
            _count(run, death)
        ended = await self._lose(run, blamed=death is not None and death.blamed)
        _count_drain(drain, "died" if death else "forced" if ended else "emptied")
        if ended:
            why = f"{drain.why}; {ended} of its requests {how} after {took_s:.1f} s"
            member.life.why = why
            logger.warning("Instance %s: %s.", member.id, why)
        else:
            logger.info("Instance %s is empty after %.1f s.", member.id, took_s)

    # -- ended

    async def end(self, member: Member) -> None:
        """Ends the member's run, if it has one; what fails is raised, and the run not forgotten."""
        if member.run is not None:
            await self._frontends.lose(member.run.engine_index)
            await self._launcher.end(member.run)
            member.run = None


def _count(run: EngineRun | None, death: Death) -> None:
    """Adds a death to the metrics, once."""
    if run is not None and not run.counted:
        run.counted = True
        how, blamed = "fenced" if death.fenced else "ended", str(death.blamed).lower()
        metrics.ENGINE_DEATHS.labels(how=how, blamed=blamed).inc()


def _count_drain(drain: Drain | None, outcome: str) -> None:
    """Adds a drain that ended to the metrics."""
    if drain is not None:
        cause = "scaling" if drain.by == "scheduler" else drain.by
        metrics.DRAINS.labels(cause, outcome).inc()
        took_s = asyncio.get_running_loop().time() - drain.began_s
        metrics.DRAIN_S.labels(outcome).observe(took_s)


def _tell_death(
    member: Member, run: EngineRun, death: Death, streams: int, tail: list[str]
) -> None:
    """One line for a death, with the end of what the engine has logged."""
    logger.error(
        "Instance %s %s (%s); %d of its streams ended%s.",
        member.id,
        "is fenced" if death.fenced else "died",
        death.why.removeprefix(FENCED),
        streams,
        "; a request may have caused that" if death.blamed else "",
        extra=about(
            "death",
            instance=member.id,
            engine=run.engine_index,
            cause=death.code,
            why=death.why,
            blamed=death.blamed,
            streams_ended=streams,
            tail=tail,
        ),
    )
