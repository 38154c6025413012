"""The fleet: all instances of a deployment, and the orders of users, scheduler and signals.

The fleet decides which instances there are; cluster/supervision/supervisor.py works on each of
them. Every run of an instance is a new Ray actor with a new engine index.
"""

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llumnix.cluster import ray_runtime
from llumnix.cluster.addresses import Addresses
from llumnix.cluster.controller import Controller
from llumnix.cluster.controller_process import ControllerProcess
from llumnix.cluster.frontends.seam import Frontends
from llumnix.cluster.supervision.capacity import (
    ask_ray,
    check_one_more,
    check_start,
    wait_for_room,
)
from llumnix.cluster.supervision.hosts import Hosts
from llumnix.cluster.supervision.member import Member
from llumnix.cluster.supervision.runs import EngineLauncher
from llumnix.cluster.supervision.supervisor import Supervisor
from llumnix.cluster.supervision.watcher import Watcher
from llumnix.config import DeploymentConfig
from llumnix.core.events import (
    AddInstances,
    DrainedBy,
    DrainInstance,
    FleetReported,
    ScalingDecision,
    SettingsChanged,
    UndrainInstance,
)
from llumnix.core.limits import FLEET_REPORT_EVERY_S
from llumnix.core.scheduling.presets import priorities_of
from llumnix.core.settings import SchedulerSettings
from llumnix.core.supervision.hang import Standstill
from llumnix.core.supervision.lifecycle import InstanceStatus, LifeState
from llumnix.core.supervision.readiness import FleetSeen
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.engine.launch import EngineLaunch
from llumnix.errors import (
    CapacityError,
    ConflictError,
    InstanceFailedError,
    LastInstanceError,
    UnknownInstanceError,
    UsageError,
)
from llumnix.observe import metrics
from llumnix.observe.event_log import EventLog
from llumnix.observe.exposition import Exposition, Seen
from llumnix.observe.fleet_metrics import FleetAtScrape, FleetMetrics
from llumnix.observe.lines import about
from llumnix.tasks import keep_running
from llumnix.versions import build

logger = logging.getLogger("llumnix.fleet")

CLOSE_TIMEOUT_S = 5.0
SETTLED_SLOTS = 64
"""Restarts are shown from the start for so many instances, for the others from their first on."""
DECIDED = {AddInstances: "add", DrainInstance: "drain", UndrainInstance: "undrain"}


class Fleet:
    """All instances of one deployment. It lives on the event loop of its process."""

    def __init__(
        self,
        frontends: Frontends,
        launch: EngineLaunch,
        addresses: Addresses,
        config: DeploymentConfig,
    ) -> None:
        self._frontends = frontends
        self._launch = launch
        self._members: dict[InstanceId, Member] = {}
        self._launcher = EngineLauncher(frontends, launch, addresses, config)
        self._addresses = addresses
        self._settings = config.scheduler.without_keys()
        self._resettled = False  # whether they are others than at the start
        self._hosts = Hosts(self._stopped)
        self._supervisor = Supervisor(
            self._frontends,
            self._launcher,
            self._members,
            self._hosts,
            self._changed,
            stall_s=self._settings.survival.stall_s,
        )
        self.notes = self._supervisor.notes
        self._log_place = config.log_place
        self._log: EventLog | None = None
        self._watcher = Watcher(
            self._frontends,
            self._members.values,
            self._hosts,
            answers=lambda run: self._launcher.answers(run),
            fence=self._supervisor.fence,
            on_health=lambda _: self._changed(),
        )
        self._refused = ""
        self._serials = itertools.count()
        self._figures = FleetMetrics(priorities_of(self._settings), build(self._settings.policy))
        self.exposition = Exposition(self._scraped)
        self._controller: ControllerProcess | None = None
        self._adding = asyncio.Lock()
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.all_failed = asyncio.Event()

    def start_controller(self) -> None:
        """Starts the controller on this node, and again whenever it ends or hangs."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

        def create() -> Any:
            return (
                ray.remote(Controller)
                .options(**ray_runtime.actor_options(), max_concurrency=2, scheduling_strategy=here)
                .remote(
                    [self._addresses.controller],
                    self._settings,
                    self._launcher.event_log,
                    self._addresses.keys,
                    self._launcher.log_format,
                    self._launcher.kept_log("controller"),
                )
            )

        self._controller = ControllerProcess(create, self._frontends.link)
        self._controller.start()

    # -- what a user asks for ----------------------------------------------------------------------

    async def start(self, count: int, say: Callable[[str], None]) -> None:
        """Starts the first `count` instances and returns once all serve; `InstanceFailedError`
        if one cannot be started."""
        self._loop = asyncio.get_running_loop()
        self._log = EventLog(self._log_place, who=f"fleet {os.getpid()}")
        self.notes.heard = self._log.instance
        members = [self._register() for _ in range(count)]
        for number, member in enumerate(members, 1):
            say(f"starting instance {number}/{count} ({member.id})")
            self._supervisor.create_run(member)
        for number, member in enumerate(members, 1):
            try:
                why_not = await self._supervisor.start_run(member)
            except Exception as error:  # noqa: BLE001 - Ray's, of any kind
                why_not = f"{type(error).__name__}: {error}"
            if why_not is not None:
                raise InstanceFailedError(f"instance {member.id} could not be started: {why_not}")
            say(f"instance {number}/{count} ({member.id}) is up")
        for member in members:
            self._supervisor.supervise(member)
        self._begin("Reporting the fleet", self._report)
        self._begin("Scaling the fleet", self._take_decisions)
        self._begin("Draining instances that ask for it", self._take_drain_requests)
        self._begin("Looking for hung instances", self._watcher.run)

    def status(self) -> list[InstanceStatus]:
        return [m.status() for m in sorted(self._members.values(), key=lambda m: m.slot)]

    def seen(self) -> FleetSeen:
        return FleetSeen(instances=self.status(), stopping=self._frontends.leaving)

    async def add(self, why: str = "a user's order") -> InstanceStatus:
        async with self._adding:
            return await self._add(why)

    async def _add(self, why: str) -> InstanceStatus:
        there, most = self._wanted(), self._settings.scaling.instances_max
        if most is not None and there >= most:
            raise CapacityError(
                f"there are {there} instances, and --max-instances is {most}: DELETE one first, or "
                "start llumnix with a higher one"
            )
        members = self._members.values()
        waiting = sum(m.life.coming and not (m.run and m.run.placed) for m in members)
        alive = sum(m.state is not LifeState.FAILED for m in members)
        await ask_ray(lambda: check_one_more(self._launch, there=alive, waiting=waiting))
        self._frontends.grow_metrics(self._free_slot() + 1)
        member = self._register()
        self.notes.note("add", member.id, why)
        self._supervisor.supervise(member)
        self._changed()
        return member.status()

    def _wanted(self) -> int:
        """How many instances serve, or will."""
        return sum(m.life.counts or m.life.renewed for m in self._members.values())

    async def drain(
        self,
        instance: InstanceId,
        why: str,
        *,
        by: DrainedBy = "user",
        timeout_s: float | None = None,
        force: bool = False,
        again: bool = False,
    ) -> InstanceStatus:
        member = self._member(instance)
        drain = member.life.drain
        if again and drain is not None and not drain.again:
            raise ConflictError(
                f"{instance} is {member.state.value} to be removed: undrain it first"
            )
        removed = drain is not None and drain.again and not again  # It was to be started again.
        if (drain is None and not (again and force)) or removed:
            self._check_not_last(member, again)
        self._supervisor.drain(member, by, why, timeout_s=timeout_s, force=force, again=again)
        return member.status()

    def take_settings(self, settings: SchedulerSettings) -> None:
        """Schedules by these from now on. Engines that start from now on get their part."""
        self._settings = settings.without_keys()
        self._launcher.take_settings(self._settings)
        self._resettled = True
        self._news.set()

    async def undrain(self, instance: InstanceId) -> InstanceStatus:
        member = self._member(instance)
        if not member.may_serve_on:
            raise ConflictError(
                f"{instance} is {member.state.value}: only an instance that has served and is "
                "draining can be undrained"
            )
        self._supervisor.undrain(member)
        extra = about("undrain", instance=member.id)
        logger.info("Instance %s serves on.", member.id, extra=extra)
        return member.status()

    def _member(self, instance: InstanceId) -> Member:
        member = self._members.get(instance)
        if member is None:
            known = ", ".join(self._members) or "none"
            raise UnknownInstanceError(f"no instance {instance}; there are: {known}")
        return member

    def _check_not_last(self, member: Member, again: bool) -> None:
        """Raises `LastInstanceError` if no other instance could serve in the member's place.

        A member that serves needs another that does; one that is coming needs another that does or
        will. A hung one counts, since it may only be slow: the drained one takes requests until
        then."""
        others = [m for m in self._members.values() if m is not member]
        needed = member.life.counts or member.life.renewed
        if not needed or any(m.state is LifeState.SERVING and m.alive for m in others):
            return
        if not member.serves and any(m.life.counts for m in others):
            return
        fix = "POST /llumnix/v1/instances first"
        if again:
            fix += ", or give `force`: then its requests wait until it serves again"
        raise LastInstanceError(f"{member.id} is the only instance that serves; {fix}")

    # -- what the scheduler and the instances ask for ----------------------------------------------

    def _begin(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Does this from now on."""
        self._keep(asyncio.create_task(keep_running(what, work, logger), name=what))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _changed(self) -> None:
        """Called after every change of an instance's state."""
        self._supervisor.settle_drains()
        self._news.set()
        if all(m.state is LifeState.FAILED for m in self._members.values()):
            self.all_failed.set()

    def _stopped(self, engine_index: EngineIndex, standstill: Standstill) -> None:
        """An engine cannot go on. Called on a thread."""
        with contextlib.suppress(RuntimeError):  # The loop is closed: all is over.
            self._loop.call_soon_threadsafe(self._watcher.stopped, engine_index, standstill)

    async def _report(self) -> None:
        """Tells the controller what there is, at once when it changes."""
        while True:
            self._news.clear()
            if self._resettled:  # Again and again, since a controller may have missed it.
                self._frontends.link.tell(SettingsChanged(settings=self._settings))
            self._frontends.link.tell(self._facts())
            # `wait_for` would lose a cancellation that comes together with news.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLEET_REPORT_EVERY_S):
                    await self._news.wait()

    def _facts(self) -> FleetReported:
        members = self._members.values()
        drains = {m.id: m.life.drain for m in members if m.state is LifeState.DRAINING}
        return FleetReported(
            starting=sum(m.life.coming or m.life.renewed for m in members),
            serving=tuple(m.id for m in members if m.state is LifeState.SERVING),
            draining=tuple(drains),
            drained_by={name: drain.by for name, drain in drains.items() if drain is not None},
            given_up=self._supervisor.given_up,
        )

    async def _take_decisions(self) -> None:
        while True:
            decision = await self._frontends.link.decisions.get()
            self._keep(asyncio.create_task(self._carry_out(decision, by="scheduler")))

    async def _take_drain_requests(self) -> None:
        while True:
            request = await self._frontends.drain_requests.get()
            self._keep(asyncio.create_task(self._carry_out(request, by="signal")))

    async def _carry_out(self, decision: ScalingDecision, by: DrainedBy) -> None:
        if self._frontends.leaving:
            return  # A SIGTERM to all processes makes the instances ask for drains as well.
        try:
            match decision:
                case AddInstances(count=count, total=total, why=why):
                    async with self._adding:
                        for _ in range(min(count, total - self._wanted())):
                            added = await self._add(why)
                            logger.info("Instance %s is added: %s.", added.id, why)
                case DrainInstance(instance=instance, why=why):
                    await self.drain(instance, why, by=by)
                case UndrainInstance(instance=instance):
                    drain = self._member(instance).life.drain
                    if drain is not None and drain.by == "scheduler":
                        await self.undrain(instance)
            self._refused, outcome = "", "done"
        except UsageError as error:
            outcome = "refused"
            if str(error) != self._refused:  # Logged once, though it is decided again and again.
                self._refused = str(error)
                logger.warning("Not done (%s): %s", decision.why, error)
        except Exception:
            logger.exception("Not done (%s)", decision.why)
            return
        if by == "scheduler":
            metrics.SCALING.labels(DECIDED[type(decision)], outcome).inc()

    async def _scraped(self) -> Seen:
        """The fleet, as a scrape of the metrics sees it."""
        seen = FleetAtScrape(
            instances=self.status(),
            frontends=self._frontends.status(),
            controller_starts=0 if self._controller is None else self._controller.starts,
            loads=await self._frontends.link.told(),
        )
        return Seen(engines=self._figures.engines(seen), families=self._figures.families(seen))

    async def check_capacity(self, count: int, wait_s: float, say: Callable[[str], None]) -> None:
        """Raises `CapacityError` unless the cluster has room for `count` instances in all, or gets
        it within so long."""
        await wait_for_room(lambda: check_start(self._launch, count), wait_s, say)

    async def close(self) -> None:
        """Stops all instances and the controller. Every step is tried; a failure is logged."""
        self._watcher.close()
        tasks = {*self._tasks, *(m.task for m in self._members.values() if m.task is not None)}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
        steps = {
            f"instance {m.id}": self._launcher.end(m.run) for m in self._members.values() if m.run
        }
        if self._controller is not None:
            steps["the controller"] = self._controller.close()
        results = await asyncio.gather(*steps.values(), return_exceptions=True)
        for what, result in zip(steps, results, strict=True):
            if isinstance(result, Exception):
                logger.error("%s could not be ended: %s: %s", what, type(result).__name__, result)
        if self._log is not None:
            self._log.close()

    def _register(self) -> Member:
        """Adds a new member, in the lowest free slot."""
        slot = self._free_slot()
        member = Member(id=InstanceId(f"i{slot}"), slot=slot, serial=next(self._serials))
        self._members[member.id] = member
        if slot < SETTLED_SLOTS:
            metrics.settle({"engine": [str(slot)]})
        return member

    def _free_slot(self) -> int:
        """The lowest slot that is free, or whose instance was given up. Slots are used again
        because each further one is one more label on every metric."""
        members = self._members.values()
        taken = {m.slot for m in members if m.state is not LifeState.FAILED or m.run is not None}
        return next(s for s in range(len(taken) + 1) if s not in taken)
