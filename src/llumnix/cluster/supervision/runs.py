"""One run of an instance's engine: a Ray actor that is started, waited for and ended.

Ray places the actors and notices when one dies; the supervisor decides what follows. A call that
may have to wait for Ray's control service is made on a thread, beside the event loop.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llumnix.cluster import ray_runtime
from llumnix.cluster.addresses import Addresses
from llumnix.cluster.frontends.seam import Frontends
from llumnix.cluster.ray_calls import off_loop, ray_call
from llumnix.cluster.supervision.engine_actor import EngineActor, pack
from llumnix.cluster.supervision.places import Places
from llumnix.cluster.supervision.processes import Remains
from llumnix.config import DeploymentConfig
from llumnix.core.limits import MigrationLimits
from llumnix.core.scheduling.presets import POLICIES, priorities_of, queue_rules_of
from llumnix.core.settings import SchedulerSettings
from llumnix.core.supervision.blame import Death, Traces, code_of, is_blamed
from llumnix.core.types import ENGINE_INDEX_MAX, EngineIndex, InstanceId
from llumnix.engine.instance import InstanceFacts
from llumnix.engine.kv.agent import TransferOptions
from llumnix.engine.launch import EngineLaunch, InstanceConfig, LlumletConfig
from llumnix.errors import LlumnixError
from llumnix.observe.lines import tail_of

logger = logging.getLogger("llumnix.fleet")

STOP_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 2.0
READY_TIMEOUT_S = float(os.environ.get("VLLM_ENGINE_READY_TIMEOUT_S", "600"))
NOT_READY = f"it was not ready within {READY_TIMEOUT_S:.0f} s (VLLM_ENGINE_READY_TIMEOUT_S)"
PLACED_POLL_S = 1  # Ray takes whole seconds
PLACING_SAID_AFTER_S = 5.0


@dataclass(slots=True, kw_only=True, eq=False)
class EngineRun:
    """One run. It is made on a thread, and everything else happens on the event loop."""

    engine_index: EngineIndex
    made: asyncio.Future[None] = field(init=False)  # done once Ray knows the actor
    group: Any = None  # Ray's placement group, which holds its devices
    placed: bool = False  # whether Ray has given it its devices
    step: str = "placing"  # of its start; then "loading", and "up" once it has served
    step_began_s: float = field(default_factory=time.monotonic)
    actor: Any = None
    facts: InstanceFacts | None = None  # where it runs; known once it is ready
    ended: asyncio.Future[Death] | None = None  # done once its engine has ended, or counts as dead
    listening: asyncio.Task[None] | None = field(default=None, repr=False)
    began_s: float = field(default_factory=time.monotonic)
    counted: bool = False  # whether its death is in the metrics
    fenced: bool = False  # whether its fence says when it counts as dead, and of what
    last_words: list[str] = field(default_factory=list)  # the end of its log, if it never was ready
    remains: asyncio.Task[Remains | None] | None = field(default=None, repr=False)
    """The question what its end has left on its host, once it is asked."""
    heard_s: float | None = None  # when outputs of it came last, as of the watcher's last look
    unwanted: bool = False  # whether what is still being made must be removed again
    accepting: bool = True  # what its reports are to say
    telling: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def alive(self) -> bool:
        """Whether its engine runs."""
        return self.ended is not None and not self.ended.done()

    @property
    def why_ended(self) -> str | None:
        """How its engine ended, if it has."""
        return self.ended.result().why if self.ended is not None and self.ended.done() else None

    @property
    def step_for_s(self) -> float:
        """For how long it has been at its step."""
        return time.monotonic() - self.step_began_s

    def reach(self, step: str) -> None:
        """Its start has come so far."""
        self.step, self.step_began_s = step, time.monotonic()

    def end(self, death: Death) -> None:
        """It has ended, or counts as dead from now on. The first word stands, and a fence's goes
        before what follows from its kill."""
        if self.fenced and not death.fenced:
            return
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(death)


class EngineLauncher:
    """Starts and ends runs for one deployment."""

    def __init__(
        self,
        frontends: Frontends,
        launch: EngineLaunch,
        addresses: Addresses,
        config: DeploymentConfig,
    ) -> None:
        self._frontends = frontends
        self._launch = launch
        self._controller = addresses.controller
        self._keys = addresses.keys
        self._slots = config.slots
        self.event_log, self.log_format = config.log_place, config.log_format
        self._log_dir = config.log_dir and str(Path(config.log_dir).absolute())
        limit, settings = config.migration_bandwidth, config.scheduler.without_keys()
        self._llumlet = LlumletConfig(
            peers=addresses.peers,
            agents=addresses.agents,
            key=secrets.token_bytes(32),
            limits=MigrationLimits(),
            transfer=TransferOptions(bandwidth_bytes_per_s=limit and limit * 1e6),
            priorities=priorities_of(settings),
            queue_rules=queue_rules_of(settings),
            min_stay=settings.migration.min_stay,
            looks_at_caches=POLICIES[settings.policy].looks_at_caches,
        )
        self._places = Places()
        self._started = 0

    def take_settings(self, settings: SchedulerSettings) -> None:
        """Engines that start from now on go by these."""
        self._llumlet = replace(
            self._llumlet,
            priorities=priorities_of(settings),
            queue_rules=queue_rules_of(settings),
            min_stay=settings.migration.min_stay,
        )

    def kept_log(self, name: str) -> tuple[str, str] | None:
        """Where a process of that name keeps its log, as `keep_log` has it; None for nowhere."""
        return None if self._log_dir is None else (self._log_dir, name)

    def create(self, instance: InstanceId, slot: int) -> EngineRun:
        """Begins a new run: a new actor, known to the frontends before it can announce itself."""
        if self._started > ENGINE_INDEX_MAX:
            raise LlumnixError("65,536 engines were started; restart llumnix to start more")
        index = EngineIndex(self._started)
        self._started += 1
        # It takes requests only once it is in the state that all engines share.
        self._frontends.expect(instance, index, slot)
        config = InstanceConfig(
            instance=instance,
            engine_index=index,
            slot=slot,
            slots=max(self._slots, slot + 1),
            controller=self._controller,
            llumlet=self._llumlet,
            event_log=self.event_log,
            log_format=self.log_format,
            keys=self._keys,
        )
        run = EngineRun(engine_index=index)
        launch = self._launch
        # Packed here: the event loop may change the configuration while the thread works.
        arguments = pack(
            config, launch.vllm_config, launch.addresses, launch.executor_class, launch.log_stats
        )
        run.made = asyncio.ensure_future(off_loop(self._make, run, instance, arguments))
        run.made.add_done_callback(_seen)
        return run

    def _make(self, run: EngineRun, instance: InstanceId, arguments: bytes) -> None:
        """Has Ray make the actor, and a placement group for its devices. On a thread."""
        try:
            launch = self._launch
            options: dict[str, Any]
            if launch.device is None:
                options = {"scheduling_strategy": self._places.take(run)}
            else:
                run.group = placement_group([{launch.device: launch.devices_per_instance}])
                self._wait_placed(run, instance)
                options = {
                    "num_gpus": launch.devices_per_instance,
                    "scheduling_strategy": PlacementGroupSchedulingStrategy(
                        placement_group=run.group, placement_group_bundle_index=0
                    ),
                }
            if run.unwanted:
                return
            run.actor = (
                ray.remote(EngineActor)
                .options(
                    **ray_runtime.actor_options(launch.environment_before),
                    max_concurrency=2,
                    **options,
                )
                .remote(launch.environment, arguments, self.kept_log(instance))
            )
            run.reach("loading")
        finally:
            if run.unwanted:
                for clear in _clearing(run):
                    clear()

    def _wait_placed(self, run: EngineRun, instance: InstanceId) -> None:
        began_s, said = time.monotonic(), False
        while not (run.placed or run.unwanted):
            run.placed = run.group.wait(PLACED_POLL_S)
            waited_s = time.monotonic() - began_s
            if not run.placed and waited_s > READY_TIMEOUT_S:
                raise LlumnixError(
                    f"Ray gave it no {self._launch.device} within {READY_TIMEOUT_S:.0f} s: all are "
                    "held by others (VLLM_ENGINE_READY_TIMEOUT_S)"
                )
            if not (run.placed or said) and waited_s > PLACING_SAID_AFTER_S:
                said = True
                logger.warning(
                    "Instance %s waits for %d free %s(s) on one host; others hold them.",
                    instance,
                    self._launch.devices_per_instance,
                    self._launch.device,
                )

    async def until_ready(self, run: EngineRun) -> str | None:
        """Waits until the engine is ready. Returns None then, or why it ended before."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await asyncio.shield(run.made)
                reference = await off_loop(run.actor.describe.remote)
                run.facts = await asyncio.wrap_future(reference.future())
        except TimeoutError:
            return NOT_READY
        except LlumnixError as error:
            return str(error)
        except ray.exceptions.RayError as error:
            lines = await asyncio.to_thread(ray_runtime.log_about, str(error))
            run.last_words = tail_of(lines)
            return ray_runtime.root_cause(lines) or _reason(error)
        if run.facts.no_log is not None:
            logger.warning("Engine %d keeps no log: %s", run.engine_index, run.facts.no_log)
        self._frontends.locate(run.engine_index, run.facts.address)
        run.ended = asyncio.get_running_loop().create_future()
        run.listening = asyncio.create_task(_listen(run))
        connected = asyncio.create_task(self._frontends.ready(run.engine_index))
        first = asyncio.FIRST_COMPLETED
        try:
            await asyncio.wait({run.ended, connected}, timeout=READY_TIMEOUT_S, return_when=first)
            announced = connected.done()
        finally:
            connected.cancel()
        return run.why_ended if run.ended.done() or announced else NOT_READY

    def accept(self, run: EngineRun, accepting: bool) -> None:
        """Says whether the run takes new requests, to the frontends and in its own reports. Does
        not wait for the engine, which may be dying right now."""
        self._frontends.accept(run.engine_index, accepting)
        if run.accepting != accepting:
            run.accepting = accepting
            if run.telling is None or run.telling.done():
                run.telling = asyncio.create_task(_tell(run))

    async def answers(self, run: EngineRun) -> bool:
        """Whether the actor's process answers when it is asked through Ray."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await (await off_loop(run.actor.describe.remote))
        except Exception:  # noqa: BLE001 - Ray's, of any kind
            return False
        return True

    async def end(self, run: EngineRun) -> None:
        """Ends the run's actor and frees its devices. An engine that still listens is asked to stop
        first. Every step is tried; the first failure is raised at the end, and `end` may then be
        called again."""
        run.unwanted = True
        await asyncio.wait({run.made}, timeout=STOP_TIMEOUT_S)
        failed: list[Exception] = []
        if run.alive:
            assert run.ended is not None
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await off_loop(run.actor.stop.remote)
                    await asyncio.shield(run.ended)
            except TimeoutError:
                logger.debug("engine %d did not stop by itself", run.engine_index)
            except Exception as error:  # noqa: BLE001 - the other steps must be tried too
                failed.append(error)
        for clear in _clearing(run):
            try:
                await ray_call(clear)
            except Exception as error:  # noqa: BLE001 - likewise
                failed.append(error)
        if failed:
            raise failed[0]


def _clearing(run: EngineRun) -> list[Callable[[], None]]:
    """The steps that remove a run from Ray."""
    steps: list[Callable[[], None]] = []
    if run.actor is not None:
        steps.append(partial(ray.kill, run.actor))
    if run.group is not None:
        steps.append(partial(remove_placement_group, run.group))
    return steps


def _seen(made: asyncio.Future[None]) -> None:
    """Marks an exception as seen: nobody may wait for the run any more, and asyncio would warn."""
    if not made.cancelled():
        made.exception()


async def _tell(run: EngineRun) -> None:
    """Tells the actor whether it is to report that it accepts requests, until it knows the newest
    value."""
    told: bool | None = None
    while told != run.accepting:
        told = run.accepting
        try:
            await ray_call(run.actor.accept.remote, told)
        except Exception as error:  # noqa: BLE001 - the frontend's word is what counts
            logger.warning("Engine %d could not be told: %s", run.engine_index, _reason(error))
            return


async def _listen(run: EngineRun) -> None:
    run.end(await _until_ended(run.actor))


async def _until_ended(actor: Any) -> Death:
    try:
        await (await off_loop(actor.run.remote))
    except Exception as error:  # noqa: BLE001 - whatever it is, nobody hears of it any more
        traces = Traces(
            raised=isinstance(error, ray.exceptions.RayTaskError),
            out_of_memory=isinstance(error, ray.exceptions.OutOfMemoryError),
        )
        return Death(why=_reason(error), blamed=is_blamed(traces), code=code_of(traces))
    return Death(why="its engine stopped")


def _reason(error: BaseException) -> str:
    """Of what Ray says about a dead actor: the cause, without the stack."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    for line in reversed(lines):
        if "Error" in line or "Exception" in line:
            return line
    return lines[0] if lines else type(error).__name__
