"""The life of one instance, over all runs of its engine, as a table of transitions.

Rules
- An instance that never served is given up at its first death: the same would kill it again.
- An instance that has served is started again, until core/supervision/restart.py gives it up. The
  loss of its host does not count there.
- A drain ends in a stop, even if the engine dies meanwhile. Only an undrain prevents that.
- After a stop the instance is gone, unless the order was to start it again.
- A stop ends, even if the engine cannot be ended.
- Every event in every state is in the table. An event that is missing is a bug, and raises with the
  story.

cluster/supervision/supervisor.py feeds the events and carries out the actions.
docs/operating.md is drawn from this table by scripts/draw_pages.py.
"""

import enum
import math
from dataclasses import dataclass, field

from llumnix.core.events import DrainedBy
from llumnix.core.machine import Machine
from llumnix.core.supervision.restart import FIRST_DELAY_S, GiveUp, RestartAfter, RestartPolicy
from llumnix.core.types import EngineIndex, InstanceId

DRAIN_TIMEOUT_S = 300.0
"""How long a drain waits for the requests of its instance, unless its caller says otherwise."""
HOST_NOTICED_S = 30.0
"""Ray takes 10 to 20 s to notice that a host is gone. Until then it may start engines there, which
fail."""


class LifeState(enum.Enum):
    """What an instance does. The values are what users read."""

    STARTING = "starting"
    """Its first run is coming up."""
    SERVING = "serving"
    """Its engine runs and takes requests."""
    RESTARTING = "restarting"
    """Its engine died, or was stopped to be started again; another run is coming up, perhaps after
    a pause."""
    DRAINING = "draining"
    """Its requests move away or end where they are."""
    STOPPING = "stopping"
    """Its engine is being ended for good."""
    FAILED = "failed"
    """It was given up, and is listed until a user removes it."""
    GONE = "gone"


class LifeEvent(enum.Enum):
    """What can happen to an instance."""

    UP = "up"
    DIED = "died"
    DIED_TOO_OFTEN = "died too often"
    STUCK = "stuck"
    """The work on it raised, time after time."""
    DRAIN = "drain"
    UNDRAIN = "undrain"
    EMPTY = "empty or cut off"
    STOPPED = "stopped"
    STOPPED_TO_START = "stopped, to be started again"


class LifeAction(enum.Enum):
    """What the supervisor does on a transition."""

    NOTHING = "-"
    SERVE = "let it take requests"
    RESTART = "start it again"
    GIVE_UP = "give it up"
    DRAIN = "empty it"
    SERVE_ON = "let it take requests again"
    STOP = "end its engine"
    RENEW = "start it anew"
    FORGET = "forget it"


S, E, A = LifeState, LifeEvent, LifeAction

LIFE: dict[LifeState, dict[LifeEvent, tuple[LifeState, LifeAction]]] = {
    S.STARTING: {
        E.UP: (S.SERVING, A.SERVE),
        E.DIED: (S.FAILED, A.GIVE_UP),
        E.STUCK: (S.FAILED, A.GIVE_UP),
        E.DRAIN: (S.DRAINING, A.DRAIN),
    },
    S.SERVING: {
        E.DIED: (S.RESTARTING, A.RESTART),
        E.DIED_TOO_OFTEN: (S.FAILED, A.GIVE_UP),
        E.STUCK: (S.FAILED, A.GIVE_UP),
        E.DRAIN: (S.DRAINING, A.DRAIN),
    },
    S.RESTARTING: {
        E.UP: (S.SERVING, A.SERVE),
        E.DIED: (S.RESTARTING, A.RESTART),
        E.DIED_TOO_OFTEN: (S.FAILED, A.GIVE_UP),
        E.STUCK: (S.FAILED, A.GIVE_UP),
        E.DRAIN: (S.DRAINING, A.DRAIN),
    },
    S.DRAINING: {
        E.DRAIN: (S.DRAINING, A.NOTHING),  # The same drain, with another time-out or reason.
        E.UNDRAIN: (S.SERVING, A.SERVE_ON),
        E.EMPTY: (S.STOPPING, A.STOP),
        E.STUCK: (S.STOPPING, A.NOTHING),  # The supervisor has tried often enough.
    },
    S.STOPPING: {
        E.DRAIN: (S.STOPPING, A.NOTHING),
        E.STUCK: (S.STOPPING, A.NOTHING),
        E.STOPPED: (S.GONE, A.FORGET),
        E.STOPPED_TO_START: (S.RESTARTING, A.RENEW),
    },
    S.FAILED: {
        E.DRAIN: (S.DRAINING, A.DRAIN),  # A user removes it.
        E.STUCK: (S.FAILED, A.NOTHING),  # What is left of its engine cannot be ended.
    },
    S.GONE: {},
}

LifeMachine = Machine[LifeState, LifeEvent, LifeAction]


def life_machine(instance: InstanceId) -> LifeMachine:
    """An instance that is to be started."""
    return Machine(f"instance {instance}", LIFE, S.STARTING, (S.GONE,))


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStatus:
    """One instance, as users see it."""

    id: InstanceId
    state: str  # a `LifeState`, or "hung"
    hung: bool  # whether its engine lives and does nothing; it may be draining too
    engine_index: EngineIndex | None
    node: str | None
    pid: int | None
    devices: list[str]
    restarts: int
    why: str | None  # what went wrong with it last, or why it is drained
    takes_requests: bool = False  # whether requests may be sent to it, and are answered
    step: str | None = None  # of its engine's start: "placing", "loading", or "up"
    for_s: float | None = None  # for how long it has been at that step
    serial: int = 0  # tells it from an earlier instance with the same id


@dataclass(slots=True, kw_only=True)
class Drain:
    """An order to empty an instance and stop it. Times are the event loop's."""

    by: DrainedBy
    why: str
    began_s: float
    deadline_s: float  # when the requests that are left are cut off
    force: bool = False  # whether they are cut off at once
    held: bool = False  # whether the instance takes requests all the same, as no other serves
    again: bool = False  # whether it is to be started again once it is stopped


@dataclass(slots=True, kw_only=True, eq=False)
class Lifecycle:
    """One instance's walk through the table, with what the decisions need to know. A method that
    takes an event returns the action to carry out."""

    machine: LifeMachine
    why: str | None = None  # what went wrong last, or why it is drained
    drain: Drain | None = None  # in draining and stopping
    restart: RestartAfter | None = None  # the newest verdict
    restarts: int = 0
    start_at_s: float = 0.0  # when the next run may start
    serving_since_s: float = 0.0
    crashes: RestartPolicy = field(default_factory=RestartPolicy)
    host_lost_s: float = -math.inf  # when it lost its host last

    @property
    def state(self) -> LifeState:
        """Where the instance is in its life."""
        return self.machine.state

    @property
    def coming(self) -> bool:
        """Whether it will serve by itself."""
        return self.state in (S.STARTING, S.RESTARTING)

    @property
    def renewed(self) -> bool:
        """Whether it is being emptied or stopped only to be started again."""
        return self.drain is not None and self.drain.again

    @property
    def counts(self) -> bool:
        """Whether it is one of the instances that the deployment wants."""
        return self.coming or self.state is S.SERVING

    # -- starts and deaths

    def up(self, now_s: float) -> LifeAction:
        """Its engine is ready."""
        action = self.machine.feed(E.UP)
        self.why, self.serving_since_s = None, now_s
        return action

    def died(self, why: str, now_s: float, *, host_lost: bool = False) -> LifeAction:
        """Its engine ended unasked, or did not come up. The loss of its host counts as no crash,
        nor does what fails while the cluster may still start it there."""
        if self.state is S.STARTING:
            self.why = f"could not be started: {why}"
            return self.machine.feed(E.DIED)
        served_s = now_s - self.serving_since_s if self.state is S.SERVING else 0.0
        if host_lost:
            self.host_lost_s = now_s
        if now_s - self.host_lost_s <= HOST_NOTICED_S:
            delay_s = 0.0 if host_lost else FIRST_DELAY_S
            verdict: RestartAfter | GiveUp = RestartAfter(delay_s=delay_s, why="its host was lost")
        else:
            verdict = self.crashes.crashed(served_s)
        if isinstance(verdict, GiveUp):
            self.why = f"given up: {verdict.why}; the last time: {why}"
            return self.machine.feed(E.DIED_TOO_OFTEN)
        self.why, self.restart, self.start_at_s = why, verdict, now_s + verdict.delay_s
        self.restarts += 1
        return self.machine.feed(E.DIED)

    def stuck(self, why: str) -> LifeAction:
        """The work on it raised `why`, time after time."""
        action = self.machine.feed(E.STUCK)
        if action is A.GIVE_UP:
            self.why = f"given up: {why}"
        return action

    # -- drains

    def order_drain(
        self,
        by: DrainedBy,
        why: str,
        now_s: float,
        *,
        timeout_s: float | None,
        force: bool,
        again: bool = False,
    ) -> LifeAction:
        """Somebody wants it emptied and stopped, and then started again if `again` is set. A second
        order changes the first one's time-out. It also changes who asked, why and what comes then,
        unless it is the scheduler's."""
        action = self.machine.feed(E.DRAIN)
        if self.state is S.STOPPING:
            if self.drain is not None and by != "scheduler":
                self.drain.again = again
            return action
        if self.drain is None:
            wait_s = DRAIN_TIMEOUT_S if timeout_s is None else timeout_s
            self.drain = Drain(by=by, why=why, began_s=now_s, deadline_s=now_s + wait_s)
        if by != "scheduler":
            self.drain.by, self.drain.why, self.drain.again = by, why, again
        if timeout_s is not None:
            self.drain.deadline_s = now_s + timeout_s
        if force:
            self.drain.deadline_s, self.drain.force = now_s, True
        self.why = f"draining: {self.drain.why}"
        return action

    def undrain(self) -> LifeAction:
        """Its drain is taken back."""
        action = self.machine.feed(E.UNDRAIN)
        self.why = self.drain = None
        return action

    def drain_looked_at(self, now_s: float, *, busy: bool, hung: bool) -> LifeAction:
        """Decides whether its drain goes on. `busy`: its engine lives and has requests, or may get
        some; `hung`: the engine does nothing."""
        assert self.drain is not None
        if busy and now_s < self.drain.deadline_s:
            return A.NOTHING
        # A drain that only the scheduler wanted costs no stream.
        unforced = self.drain.by == "scheduler" and not hung
        if busy and (self.drain.held or unforced):
            return self.undrain()
        return self.machine.feed(E.EMPTY)

    def stopped(self) -> LifeAction:
        """Its engine is ended, as far as it can be."""
        if not self.renewed:
            return self.machine.feed(E.STOPPED)
        self.why = self.drain = None
        self.crashes, self.start_at_s = RestartPolicy(), 0.0
        return self.machine.feed(E.STOPPED_TO_START)
