"""The fleet: starts instances as Ray actors, watches them, starts them again, stops them.

Ray places and supervises the actors; when one dies, its `run()` ends, and what happens then is
decided by core/policies/restart. A new run of an instance is a new actor with a new engine index.
"""

import asyncio
import copy
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from llumnix.cluster import ray_runtime
from llumnix.cluster.addresses import Addresses
from llumnix.cluster.controller import Controller
from llumnix.config import DeploymentConfig
from llumnix.core.limits import MigrationLimits
from llumnix.core.policies.restart import GiveUp, RestartPolicy
from llumnix.core.types import ENGINE_INDEX_MAX, EngineIndex, InstanceId
from llumnix.engine.host import HostSeat
from llumnix.engine.instance import EngineInstance, InstanceFacts, InstanceSeat
from llumnix.engine.launch import EngineLaunch
from llumnix.engine.transfer import TransferOptions
from llumnix.errors import (
    CapacityError,
    InstanceFailedError,
    LastInstanceError,
    LlumnixError,
    UnknownInstanceError,
)
from llumnix.frontend.control import InstanceStatus
from llumnix.frontend.llm import FleetLLM

logger = logging.getLogger("llumnix.fleet")

STOP_TIMEOUT_S = 5.0
READY_TIMEOUT_S = float(os.environ.get("VLLM_ENGINE_READY_TIMEOUT_S", "600"))
CPU_INSTANCES_PER_CORE_MAX = 4
DRAIN_POLL_S = 0.05


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """One run of an instance's engine. `ended` resolves (with why) once the engine is no more."""

    engine_index: EngineIndex
    actor: Any
    group: Any
    facts: InstanceFacts | None = None
    ended: asyncio.Task[str] | None = None


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
        self._controller_address = addresses.controller
        self._slots = config.instances
        self._event_log = config.event_log and str(Path(config.event_log).absolute())
        limit = config.migration_bandwidth
        self._seat = HostSeat(
            peers=addresses.peers,
            agents=addresses.agents,
            key=secrets.token_bytes(32),
            limits=MigrationLimits(),
            transfer=TransferOptions(bandwidth_bytes_per_s=limit and limit * 1e6),
        )
        self._members: dict[InstanceId, Member] = {}
        self._engines_started = 0
        self._controller: Any = None
        self.all_failed = asyncio.Event()

    def start_controller(self, policy: str) -> None:
        """Starts the controller on this node, for Ray to start again whenever it dies."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._controller = (
            ray.remote(Controller)
            .options(
                num_cpus=0,
                max_concurrency=2,
                max_restarts=-1,
                max_task_retries=-1,
                scheduling_strategy=here,
            )
            .remote([self._controller_address], policy, self._event_log)
        )
        # With `max_task_retries`, Ray calls run() again on every new process of the actor.
        self._controller_run = self._controller.run.remote()

    # -- what a user asks for ----------------------------------------------------------------------

    async def start(self, count: int, say: Callable[[str], None]) -> None:
        """Starts the first `count` instances and returns once all serve; `InstanceFailedError`
        if one cannot be started."""
        members = [self._enlist() for _ in range(count)]
        for number, member in enumerate(members, 1):
            say(f"starting instance {number}/{count} ({member.id})")
            self._create(member)
        for number, member in enumerate(members, 1):
            why_not = await self._until_ready(member)
            if why_not is not None:
                raise InstanceFailedError(f"instance {member.id} could not be started: {why_not}")
            say(f"instance {number}/{count} ({member.id}) is up")
        for member in members:
            member.task = asyncio.create_task(self._supervise(member), name=f"watch-{member.id}")

    def status(self) -> list[InstanceStatus]:
        return [m.status() for m in sorted(self._members.values(), key=lambda m: m.slot)]

    async def add(self) -> InstanceStatus:
        self._check_free()
        member = self._enlist()
        self._llm.grow_metrics(member.slot + 1)
        member.task = asyncio.create_task(self._add(member), name=f"add-{member.id}")
        return member.status()

    async def remove(self, instance: InstanceId) -> InstanceStatus:
        member = self._members.get(instance)
        if member is None:
            known = ", ".join(self._members) or "none"
            raise UnknownInstanceError(f"no instance {instance}; there are: {known}")
        if member.state == "draining":
            return member.status()
        others = [m for m in self._members.values() if m.state == "serving" and m is not member]
        if member.state == "serving" and not others:
            raise LastInstanceError(
                f"{instance} is the only instance that serves; POST /llumnix/v1/instances first"
            )
        if member.task is not None:
            member.task.cancel()
        member.state = "draining"
        member.task = asyncio.create_task(self._drain(member), name=f"drain-{member.id}")
        return member.status()

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
        members = list(self._members.values())
        for member in members:
            if member.task is not None:
                member.task.cancel()
        await asyncio.gather(*(self._end(m) for m in members))
        if self._controller is not None:
            self._controller.stop.remote()
            await asyncio.wait({asyncio.wrap_future(self._controller_run.future())}, timeout=1.0)
            ray.kill(self._controller)

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
        self._create(member)
        why_not = await self._until_ready(member)
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
                self._create(member)
                why, served_s = await self._until_ready(member), 0.0
            logger.warning("Instance %s serves again.", member.id)

    def _give_up(self, member: Member, why: str) -> None:
        member.state, member.why = "failed", why
        logger.error("Instance %s is %s. Mend the cause, then DELETE and POST it.", member.id, why)
        if all(m.state == "failed" for m in self._members.values()):
            self.all_failed.set()

    async def _drain(self, member: Member) -> None:
        run = member.run
        if run is not None and run.ended is not None:
            self._client.accept(run.engine_index, False)
            # For the controller's sake, and not waited for: an engine may be dying right now.
            run.actor.accept.remote(False)
            while self._client.in_flight(run.engine_index) and not run.ended.done():
                await asyncio.sleep(DRAIN_POLL_S)
        if run is not None:
            await self._client.lose(run.engine_index)
        await self._end(member)
        del self._members[member.id]
        logger.info("Instance %s is stopped.", member.id)

    # -- one run of it -----------------------------------------------------------------------------

    def _create(self, member: Member) -> None:
        """Starts a new run: a new actor, known to the frontend before it can announce itself."""
        if self._engines_started > ENGINE_INDEX_MAX:
            raise LlumnixError("65,536 engines were started; restart llumnix to start more")
        index = EngineIndex(self._engines_started)
        self._engines_started += 1
        self._client.expect(member.id, index, member.slot)
        seat = InstanceSeat(
            instance=member.id,
            engine_index=index,
            slot=member.slot,
            slots=max(self._slots, member.slot + 1),
            controller=self._controller_address,
            llumlet=self._seat,
            event_log=self._event_log,
        )
        launch, group = self._launch, None
        options: dict[str, Any] = {"scheduling_strategy": "SPREAD"}
        if launch.device is not None:
            group = placement_group([{launch.device: launch.devices_per_instance}])
            options = {
                "num_gpus": launch.devices_per_instance,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=0
                ),
            }
        actor = (
            ray.remote(EngineInstance)
            .options(
                num_cpus=0,
                max_concurrency=2,
                max_restarts=0,
                runtime_env={"env_vars": launch.env},
                **options,
            )
            .remote(
                seat,
                copy.deepcopy(launch.vllm_config),
                launch.addresses,
                launch.executor_class,
                launch.log_stats,
            )
        )
        member.run = Run(engine_index=index, actor=actor, group=group)

    async def _until_ready(self, member: Member) -> str | None:
        """Waits until the member's run serves; returns None then, or why it ended before."""
        run = member.run
        assert run is not None
        try:
            run.facts = await asyncio.wait_for(
                asyncio.wrap_future(run.actor.describe.remote().future()), READY_TIMEOUT_S
            )
        except TimeoutError:
            return f"it was not ready within {READY_TIMEOUT_S:.0f} s (VLLM_ENGINE_READY_TIMEOUT_S)"
        except ray.exceptions.RayError as error:
            logged = await asyncio.to_thread(ray_runtime.error_logged, str(error))
            return logged or _reason(error)
        self._client.locate(run.engine_index, run.facts.address)
        run.ended = asyncio.create_task(_until_ended(run.actor.run.remote()))
        connected = asyncio.create_task(self._client.connected(run.engine_index))
        await asyncio.wait({run.ended, connected}, return_when=asyncio.FIRST_COMPLETED)
        if not connected.done():
            connected.cancel()
            return run.ended.result()
        member.state = "serving"
        return None

    async def _bury(self, member: Member, why: str) -> None:
        """Ends the streams of a dead run and clears it away."""
        assert member.run is not None
        member.state, member.why = "restarting", why
        streams = await self._client.lose(member.run.engine_index)
        logger.error("Instance %s died (%s); %d streams ended.", member.id, why, streams)
        await self._end(member)

    async def _end(self, member: Member) -> None:
        """Ends the member's actor, politely if it can still listen."""
        run, member.run = member.run, None
        if run is None:
            return
        if run.ended is not None and not run.ended.done():
            try:
                run.actor.stop.remote()
                await asyncio.wait_for(asyncio.shield(run.ended), STOP_TIMEOUT_S)
            except TimeoutError:
                logger.debug("instance %s did not stop by itself", member.id)
        ray.kill(run.actor)
        if run.group is not None:
            remove_placement_group(run.group)


async def _until_ended(run: Any) -> str:
    try:
        await run
    except ray.exceptions.RayError as error:
        return _reason(error)
    return "its engine stopped"


def _reason(error: BaseException) -> str:
    """Of what Ray says about a dead actor: the cause, without the stack."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    for line in reversed(lines):
        if "Error" in line or "Exception" in line:
            return line
    return lines[0] if lines else type(error).__name__
