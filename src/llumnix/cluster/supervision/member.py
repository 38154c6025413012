"""One instance of the fleet: what is known of it over all its runs."""

import asyncio
from dataclasses import dataclass, field

from llumnix.cluster.supervision.runs import Run
from llumnix.core.events import DrainedBy
from llumnix.core.supervision.hang import HangPolicy, Health
from llumnix.core.supervision.restart import RestartPolicy
from llumnix.core.types import InstanceId
from llumnix.frontend.http.routes import InstanceStatus

DRAIN_TIMEOUT_S = 300.0
"""What a drained instance still holds after this long is cut off, unless who asked for the drain
says otherwise."""


@dataclass(slots=True, kw_only=True)
class Drain:
    """An order to empty an instance and stop it. `deadline_s`: when what is left is cut off, by the
    event loop's clock. `held`: it takes requests all the same, since no other serves; not with
    `force`."""

    by: DrainedBy
    why: str
    began_s: float
    deadline_s: float
    force: bool = False
    held: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """`state`: starting, serving, restarting, draining, stopping or failed. `task`: the only one
    that works on it."""

    id: InstanceId
    slot: int
    state: str = "starting"
    run: Run | None = None
    restarts: int = 0
    why: str | None = None
    history: RestartPolicy = field(default_factory=RestartPolicy)
    ever_served: bool = False
    serving_since_s: float = 0.0
    start_at_s: float = 0.0  # the next run, after a pause
    drain: Drain | None = None
    health: Health = field(default_factory=Health)
    hangs: HangPolicy = field(default_factory=HangPolicy)
    task: asyncio.Task[None] | None = None

    @property
    def serves(self) -> bool:
        """Whether requests may be sent to it, and are answered."""
        return self.state == "serving" and self.health.hung is None

    @property
    def coming(self) -> bool:
        """Whether it will serve by itself."""
        return self.state in ("starting", "restarting")

    @property
    def counts(self) -> bool:
        """Whether it is one of those that there shall be."""
        return self.state in ("starting", "restarting", "serving")

    def status(self) -> InstanceStatus:
        """What a user gets to see."""
        facts = self.run.facts if self.run else None
        hung = self.health.hung
        return InstanceStatus(
            id=self.id,
            state="hung" if hung and self.state == "serving" else self.state,
            hung=hung is not None,
            engine_index=self.run.engine_index if self.run else None,
            node=facts.node if facts else None,
            pid=facts.pid if facts else None,
            devices=facts.devices if facts else [],
            restarts=self.restarts,
            why=f"hung: {hung}" if hung and self.why is None else self.why,
        )
