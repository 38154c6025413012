"""One run of an instance's engine: a Ray actor that is started, waited for and ended.

Ray places and supervises the actors; what happens when one dies is decided by the fleet.
"""

import asyncio
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llumnix.cluster import ray_runtime
from llumnix.cluster.addresses import Addresses
from llumnix.cluster.engine_actor import EngineActor, pack
from llumnix.config import DeploymentConfig
from llumnix.core.limits import MigrationLimits
from llumnix.core.types import ENGINE_INDEX_MAX, EngineIndex, InstanceId
from llumnix.engine.host import HostSeat
from llumnix.engine.instance import InstanceFacts, InstanceSeat
from llumnix.engine.launch import EngineLaunch
from llumnix.engine.transfer import TransferOptions
from llumnix.errors import LlumnixError
from llumnix.frontend.client import FleetClient

logger = logging.getLogger("llumnix.fleet")

STOP_TIMEOUT_S = 5.0
READY_TIMEOUT_S = float(os.environ.get("VLLM_ENGINE_READY_TIMEOUT_S", "600"))


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """One of them. `ended` resolves (with why) once the engine is no more."""

    engine_index: EngineIndex
    actor: Any
    group: Any
    facts: InstanceFacts | None = None
    ended: asyncio.Task[str] | None = None


class Runs:
    """Starts and ends runs for one deployment."""

    def __init__(
        self,
        client: FleetClient,
        launch: EngineLaunch,
        addresses: Addresses,
        config: DeploymentConfig,
    ) -> None:
        self._client = client
        self._launch = launch
        self._controller = addresses.controller
        self._keys = addresses.keys
        self._slots = config.slots
        self.event_log = config.event_log and str(Path(config.event_log).absolute())
        limit = config.migration_bandwidth
        self._seat = HostSeat(
            peers=addresses.peers,
            agents=addresses.agents,
            key=secrets.token_bytes(32),
            limits=MigrationLimits(),
            settings=config.scheduler.without_keys(),
            transfer=TransferOptions(bandwidth_bytes_per_s=limit and limit * 1e6),
        )
        self._started = 0

    def create(self, instance: InstanceId, slot: int) -> Run:
        """Starts a new run: a new actor, known to the frontend before it can announce itself."""
        if self._started > ENGINE_INDEX_MAX:
            raise LlumnixError("65,536 engines were started; restart llumnix to start more")
        index = EngineIndex(self._started)
        self._started += 1
        self._client.expect(instance, index, slot)
        seat = InstanceSeat(
            instance=instance,
            engine_index=index,
            slot=slot,
            slots=max(self._slots, slot + 1),
            controller=self._controller,
            llumlet=self._seat,
            event_log=self.event_log,
            keys=self._keys,
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
            ray.remote(EngineActor)
            .options(
                num_cpus=0,
                max_concurrency=2,
                max_restarts=0,
                runtime_env={"env_vars": launch.environment_before},
                **options,
            )
            .remote(
                launch.environment,
                pack(
                    seat,
                    launch.vllm_config,
                    launch.addresses,
                    launch.executor_class,
                    launch.log_stats,
                ),
            )
        )
        return Run(engine_index=index, actor=actor, group=group)

    async def until_ready(self, run: Run) -> str | None:
        """Waits until it serves; returns None then, or why it ended before."""
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
        return None

    async def end(self, run: Run) -> None:
        """Ends its actor, politely if it can still listen."""
        if run.ended is not None and not run.ended.done():
            try:
                run.actor.stop.remote()
                await asyncio.wait_for(asyncio.shield(run.ended), STOP_TIMEOUT_S)
            except TimeoutError:
                logger.debug("engine %d did not stop by itself", run.engine_index)
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
