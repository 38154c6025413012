"""One instance of the fleet: its life, its run, and the task that works on it."""

import asyncio
from dataclasses import dataclass, field

from llumnix.cluster.supervision.runs import EngineRun
from llumnix.core.supervision.hang import HangPolicy, Health
from llumnix.core.supervision.lifecycle import InstanceStatus, Lifecycle, LifeState, life_machine
from llumnix.core.types import InstanceId


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """One instance. Its supervisor alone feeds its life."""

    id: InstanceId
    slot: int  # its number among the metrics
    serial: int = 0  # never used again, while a later instance may get the id and the slot
    life: Lifecycle = field(init=False)
    run: EngineRun | None = None  # of its engine; kept until nothing of it is left
    health: Health = field(default_factory=Health)
    hangs: HangPolicy = field(default_factory=HangPolicy)
    task: asyncio.Task[None] | None = None  # the only one that works on it

    def __post_init__(self) -> None:
        self.life = Lifecycle(machine=life_machine(self.id))

    @property
    def state(self) -> LifeState:
        """Where it is in its life."""
        return self.life.state

    @property
    def alive(self) -> bool:
        """Whether its engine runs, and is not being fenced."""
        return self.run is not None and self.run.alive and not self.run.fenced

    @property
    def may_serve_on(self) -> bool:
        """Whether its drain can be taken back. An engine that never served cannot serve on: it may
        be in another state than the others, with other LoRA adapters for one."""
        draining = self.state is LifeState.DRAINING and self.alive
        return draining and self.run is not None and self.run.step == "up"

    @property
    def serves(self) -> bool:
        """Whether requests may be sent to it, and are answered. False at once if its engine dies,
        though its life is told of that a few seconds later."""
        return self.state is LifeState.SERVING and self._answers

    @property
    def takes_requests(self) -> bool:
        """As `serves`, but true of one too that takes requests while it is drained."""
        drain = self.life.drain
        held = self.state is LifeState.DRAINING and drain is not None and drain.held
        return (self.state is LifeState.SERVING or held) and self._answers

    @property
    def _answers(self) -> bool:
        return self.alive and self.health.hung is None

    @property
    def _shown(self) -> str:
        """Its state as users read it. It is not shown as serving while its host is asked how its
        engine died."""
        if self.state is not LifeState.SERVING:
            return self.state.value
        if not self.alive:
            return LifeState.RESTARTING.value
        return "serving" if self.health.hung is None else "hung"

    def status(self) -> InstanceStatus:
        """What a user gets to see."""
        run = self.run
        facts = run.facts if run else None
        hung, why = self.health.hung, self.life.why
        return InstanceStatus(
            id=self.id,
            state=self._shown,
            hung=hung is not None,
            engine_index=run.engine_index if run else None,
            node=facts.node if facts else None,
            pid=facts.pid if facts else None,
            devices=facts.devices if facts else [],
            restarts=self.life.restarts,
            why=f"hung: {hung}" if hung and why is None else why,
            takes_requests=self.takes_requests,
            step=run.step if run else None,
            for_s=round(run.step_for_s, 1) if run else None,
            serial=self.serial,
        )
