"""The fleet: starts instances as Ray actors, watches them, starts them again, stops them.

Ray places and supervises the actors; when one dies, its `run()` ends, and what happens then is
decided by core/policies/restart. A new run of an instance is a new actor with a new engine index.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
)

from llumnix.cluster import ray_runtime
from llumnix.cluster.addresses import Addresses
from llumnix.cluster.controller import Controller
from llumnix.cluster.controller_process import ControllerProcess
from llumnix.cluster.runs import Run, Runs
from llumnix.config import DeploymentConfig
from llumnix.core.events import (
    AddInstances,
    DrainInstance,
    FleetReported,
    ScalingDecision,
    UndrainInstance,
)
from llumnix.core.policies.restart import GiveUp, RestartPolicy
from llumnix.core.types import InstanceId
from llumnix.engine.launch import EngineLaunch
from llumnix.errors import (
    CapacityError,
    ConflictError,
    InstanceFailedError,
    LastInstanceError,
    UnknownInstanceError,
    UsageError,
)
from llumnix.frontend.control import InstanceStatus
from llumnix.frontend.llm import FleetLLM

logger = logging.getLogger("llumnix.fleet")

CPU_INSTANCES_PER_CORE_MAX = 4
DRAIN_POLL_S = 0.05
REPORT_EVERY_S = 0.5


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """One instance of the fleet, over all its runs."""

    id: InstanceId
    slot: int
    state: str = "starting"
    run: Run | None = None
    restarts: int = 0
    why: str | None = None
    history: RestartPolicy = field(default_factory=RestartPolicy)
    task: asyncio.Task[None] | None = None

    def status(self) -> InstanceStatus:
        """What a user gets to see."""
        facts = self.run.facts if self.run else None
        return InstanceStatus(
            id=self.id,
            state=self.state,
            engine_index=self.run.engine_index if self.run else None,
            node=facts.node if facts else None,
            pid=facts.pid if facts else None,
            devices=facts.devices if facts else [],
            restarts=self.restarts,
            why=self.why,
        )


class Fleet:
    """All instances of one deployment. Lives on the frontend's event loop."""

    def __init__(
        self, llm: FleetLLM, launch: EngineLaunch, addresses: Addresses, config: DeploymentConfig
    ) -> None:
        self._llm = llm
        self._client = llm.engine_core
        self._launch = launch
        self._runs = Runs(self._client, launch, addresses, config)
        self._addresses = addresses
        self._settings = config.scheduler.without_keys()
        self._reporting: asyncio.Task[None] | None = None
        self._refused = ""
        self._members: dict[InstanceId, Member] = {}
        self._controller: ControllerProcess | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.all_failed = asyncio.Event()

    def start_controller(self) -> None:
        """Starts the controller on this node, and again whenever it ends or hangs."""
        addresses = self._addresses
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

        def create() -> Any:
            return (
                ray.remote(Controller)
                .options(num_cpus=0, max_concurrency=2, max_restarts=0, scheduling_strategy=here)
                .remote(
                    [addresses.controller], self._settings, self._runs.event_log, addresses.keys
                )
            )

        self._controller = ControllerProcess(create, self._client.link)
        self._controller.start()

    # -- what a user asks for ----------------------------------------------------------------------

    async def start(self, count: int, say: Callable[[str], None]) -> None:
        """Starts the first `count` instances and returns once all serve; `InstanceFailedError`
        if one cannot be started."""
        members = [self._enlist() for _ in range(count)]
        for number, member in enumerate(members, 1):
            say(f"starting instance {number}/{count} ({member.id})")
            member.run = self._runs.create(member.id, member.slot)
        for number, member in enumerate(members, 1):
            why_not = await self._until_ready(member)
            if why_not is not None:
                raise InstanceFailedError(f"instance {member.id} could not be started: {why_not}")
            say(f"instance {number}/{count} ({member.id}) is up")
        for member in members:
            member.task = asyncio.create_task(self._supervise(member), name=f"watch-{member.id}")
        self._client.on_leave = self._leave
        self._client.link.on_scaling = self._perform
        self._reporting = asyncio.create_task(self._report(), name="report-fleet")

    def status(self) -> list[InstanceStatus]:
        return [m.status() for m in sorted(self._members.values(), key=lambda m: m.slot)]

    async def add(self) -> InstanceStatus:
        self._check_free()
        member = self._enlist()
        self._llm.grow_metrics(member.slot + 1)
        member.task = asyncio.create_task(self._add(member), name=f"add-{member.id}")
        return member.status()

    async def drain(self, instance: InstanceId, why: str) -> InstanceStatus:
        member = self._member(instance)
        if member.state in ("draining", "stopping"):
            return member.status()
        others = [m for m in self._members.values() if m.state == "serving" and m is not member]
        if member.state == "serving" and not others:
            raise LastInstanceError(
                f"{instance} is the only instance that serves; POST /llumnix/v1/instances first"
            )
        if member.task is not None:
            member.task.cancel()
        member.state, member.why = "draining", f"draining: {why}"
        logger.info("Instance %s is drained: %s.", member.id, why)
        member.task = asyncio.create_task(self._drain(member), name=f"drain-{member.id}")
        return member.status()

    async def undrain(self, instance: InstanceId) -> InstanceStatus:
        member = self._member(instance)
        run = member.run
        if member.state != "draining" or run is None or run.ended is None or run.ended.done():
            raise ConflictError(
                f"{instance} is {member.state}: only an instance that is draining can be undrained"
            )
        assert member.task is not None
        member.task.cancel()
        member.state, member.why = "serving", None
        self._client.accept(run.engine_index, True)
        run.actor.accept.remote(True)
        member.task = asyncio.create_task(self._supervise(member), name=f"watch-{member.id}")
        logger.info("Instance %s serves on.", member.id)
        return member.status()

    def _member(self, instance: InstanceId) -> Member:
        member = self._members.get(instance)
        if member is None:
            known = ", ".join(self._members) or "none"
            raise UnknownInstanceError(f"no instance {instance}; there are: {known}")
        return member

    # -- what the scheduler and the instances ask for ----------------------------------------------

    async def _report(self) -> None:
        """Tells the controller what there is; its decisions come back to `_perform`."""
        while True:
            states = [(m.id, m.state) for m in self._members.values()]
            self._client.link.tell(
                FleetReported(
                    starting=sum(s in ("starting", "restarting") for _, s in states),
                    serving=tuple(i for i, s in states if s == "serving"),
                    draining=tuple(i for i, s in states if s == "draining"),
                )
            )
            await asyncio.sleep(REPORT_EVERY_S)

    def _perform(self, decision: ScalingDecision) -> None:
        task = asyncio.ensure_future(self._carry_out(decision))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _leave(self, instance: InstanceId, why: str) -> None:
        self._perform(DrainInstance(instance=instance, why=why))

    async def _carry_out(self, decision: ScalingDecision) -> None:
        try:
            match decision:
                case AddInstances(count=count, why=why):
                    for _ in range(count):
                        added = await self.add()
                        logger.info("Instance %s is added: %s.", added.id, why)
                case DrainInstance(instance=instance, why=why):
                    await self.drain(instance, why)
                case UndrainInstance(instance=instance):
                    await self.undrain(instance)
            self._refused = ""
        except UsageError as error:
            if str(error) != self._refused:  # Said once, though it is decided again and again.
                self._refused = str(error)
                logger.warning("Not done (%s): %s", decision.why, error)

    def check_capacity(self, count: int) -> None:
        """Raises `CapacityError` unless the cluster has devices for `count` instances in all."""
        kind, each = self._launch.device, self._launch.devices_per_instance
        if kind is None:
            return
        total = ray_runtime.devices_total(kind)
        if count * each > total:
            raise CapacityError(
                f"--instances {count} needs {count * each} {kind}s ({each} an instance), and there "
                f"are {total}: use --instances {total // each} or fewer"
                + (", or lower the parallel sizes" if each > 1 else "")
            )

    async def close(self) -> None:
        """Stops all instances and the controller."""
        if self._reporting is not None:
            self._reporting.cancel()
        members = list(self._members.values())
        for member in members:
            if member.task is not None:
                member.task.cancel()
        await asyncio.gather(*(self._end(m) for m in members))
        if self._controller is not None:
            await self._controller.close()

    # -- one instance ------------------------------------------------------------------------------

    def _enlist(self) -> Member:
        taken = {m.slot for m in self._members.values()}
        slot = next(s for s in range(len(taken) + 1) if s not in taken)
        member = Member(id=InstanceId(f"i{slot}"), slot=slot)
        self._members[member.id] = member
        return member

    def _check_free(self) -> None:
        kind, each = self._launch.device, self._launch.devices_per_instance
        if kind is None:
            most = CPU_INSTANCES_PER_CORE_MAX * (os.cpu_count() or 1)
            if len(self._members) >= most:
                raise CapacityError(
                    f"there are {len(self._members)} instances, {CPU_INSTANCES_PER_CORE_MAX} for "
                    "each core of this host: DELETE one first"
                )
            return
        # An instance that is starting may not hold its devices yet.
        starting = sum(m.state == "starting" for m in self._members.values())
        free = ray_runtime.devices_free(kind) - starting * each
        if each > free:
            raise CapacityError(
                f"one more instance needs {each} {kind}(s), and {free} of "
                f"{ray_runtime.devices_total(kind)} are free: DELETE an "
                "instance first, or add a host to the Ray cluster"
            )

    async def _add(self, member: Member) -> None:
        why_not = await self._create_and_wait(member)
        if why_not is None:
            await self._supervise(member)
        else:
            await self._bury(member, why_not)
            self._give_up(member, f"could not be started: {why_not}")

    async def _supervise(self, member: Member) -> None:
        """Watches a serving member and starts it again when it dies, until it is given up."""
        while True:
            served_from_s = time.monotonic()
            assert member.run is not None
            assert member.run.ended is not None
            why: str | None = await asyncio.shield(member.run.ended)
            served_s = time.monotonic() - served_from_s
            while why is not None:
                await self._bury(member, why)
                verdict = member.history.crashed(served_s)
                if isinstance(verdict, GiveUp):
                    self._give_up(member, f"given up: {verdict.why}; the last time: {why}")
                    return
                logger.warning(
                    "Instance %s is started again in %.0f s (%s).",
                    member.id,
                    verdict.delay_s,
                    verdict.why,
                )
                await asyncio.sleep(verdict.delay_s)
                member.restarts += 1
                why, served_s = await self._create_and_wait(member), 0.0
            logger.warning("Instance %s serves again.", member.id)

    def _give_up(self, member: Member, why: str) -> None:
        member.state, member.why = "failed", why
        logger.error("Instance %s is %s. Mend the cause, then DELETE and POST it.", member.id, why)
        if all(m.state == "failed" for m in self._members.values()):
            self.all_failed.set()

    async def _drain(self, member: Member) -> None:
        run, began_s = member.run, time.monotonic()
        if run is not None and run.ended is not None:
            self._client.accept(run.engine_index, False)
            # For the controller's sake, and not waited for: an engine may be dying right now.
            run.actor.accept.remote(False)
            while self._client.in_flight(run.engine_index) and not run.ended.done():
                await asyncio.sleep(DRAIN_POLL_S)
        member.state = "stopping"
        logger.info("Instance %s is empty after %.1f s.", member.id, time.monotonic() - began_s)
        if run is not None:
            await self._client.lose(run.engine_index)
        await self._end(member)
        del self._members[member.id]
        logger.info("Instance %s is stopped.", member.id)

    async def _create_and_wait(self, member: Member) -> str | None:
        """A new run of the member; returns None once it serves, or why it ended before."""
        member.run = self._runs.create(member.id, member.slot)
        return await self._until_ready(member)

    async def _until_ready(self, member: Member) -> str | None:
        assert member.run is not None
        why_not = await self._runs.until_ready(member.run)
        if why_not is None:
            member.state = "serving"
        return why_not

    async def _bury(self, member: Member, why: str) -> None:
        """Ends the streams of a dead run and clears it away."""
        assert member.run is not None
        member.state, member.why = "restarting", why
        streams = await self._client.lose(member.run.engine_index)
        logger.error("Instance %s died (%s); %d streams ended.", member.id, why, streams)
        await self._end(member)

    async def _end(self, member: Member) -> None:
        run, member.run = member.run, None
        if run is not None:
            await self._runs.end(run)
