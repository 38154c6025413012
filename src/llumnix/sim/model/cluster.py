"""A whole deployment in virtual time: the production scheduler, llumlets and table of streams, with
engines, a network, a fleet and clients that are modelled.

Rules
- What decides is the code that serves: core/scheduling/scheduler.py in the controller's place,
  core/migration/llumlet.py beside each engine (sim/model/instance.py), core/streams/ in the
  frontend's (sim/model/clients.py).
- Instances and clients call nobody: they answer, and so does the scheduler. `Cluster._perform`
  carries out all answers.
- Time is one heap of events (sim/model/clock.py). A message takes `hop_s`.
- Faults (sim/model/faults.py) and checks (sim/model/checks.py) are apart, and look in from outside.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llumnix.core.events import (
    AddInstances,
    Decision,
    Dispatch,
    DrainedBy,
    DrainInstance,
    Fact,
    InstanceLost,
    LoadReported,
    MoveOrder,
    NoInstance,
    Tick,
    UndrainInstance,
)
from llumnix.core.limits import DRAIN_POLL_S, FLEET_REPORT_EVERY_S, HEARTBEAT_S
from llumnix.core.messages import FrontendMessage, PeerMessage, ToPeer
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.scheduling.presets import POLICIES, priorities_of, queue_rules_of
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.settings import SchedulerSettings
from llumnix.core.streams.effects import Abort, AskFate, TellLost
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.clients import Begin, Clients, ToEngine
from llumnix.sim.model.clock import ARRIVALS, MESSAGES, TICKS, TOKENS, EventHeap
from llumnix.sim.model.engine import Pull, SimEngine
from llumnix.sim.model.instance import (
    Add,
    Fate,
    FromInstance,
    Pulled,
    Said,
    SimInstance,
    State,
    ToInstance,
    fleet_report,
)
from llumnix.sim.model.jobs import Job, Token
from llumnix.sim.model.network import Flow, Network
from llumnix.sim.model.profile import Profile

FATE_POLL_S = 0.05
RETRY_S = 0.05
"""How soon a request that no instance takes is placed again, or one whose engine died."""

Answer = FromInstance | ToEngine | Decision
Wire = Callable[["Cluster", EngineIndex, PeerMessage], None]
Recorder = Callable[[float, Fact | Decision], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is simulated."""

    scheduler: SchedulerSettings
    profile: Profile
    instances: int  # at the beginning
    engine: EngineOptions = field(default_factory=EngineOptions)
    start_s: float | None = None  # an instance from nothing to ready; None for the profile's


class Cluster:
    """One run. `record` is told of every fact and decision of the scheduler; `wire` carries
    messages between llumlets (to lose some); `check` looks at the scheduler after every fact."""

    def __init__(
        self,
        setup: Setup,
        *,
        record: Recorder | None = None,
        wire: Wire | None = None,
        check: Callable[[Scheduler, float], None] | None = None,
    ) -> None:
        self.setup = setup
        self.clock = EventHeap()
        self.scheduler: Scheduler | None = Scheduler(setup.scheduler)
        self.clients = Clients(setup.scheduler.survival)
        self.instances: dict[InstanceId, SimInstance] = {}
        self.by_engine: dict[EngineIndex, SimInstance] = {}
        self.starting: set[InstanceId] = set()
        self.instance_s = 0.0
        self._network = Network(setup.profile.link_bytes_s, self._later)
        self._hop_s = setup.profile.hop_s
        self._priorities = priorities_of(setup.scheduler)
        self._cache_aware = POLICIES[setup.scheduler.policy].looks_at_caches
        self._record = record
        self._wire = wire or Cluster.carry
        self._check = check
        self._engines = 0  # that were ever started
        self._names = 0  # of instances that were ever used
        self._preemptions_lost = 0  # counted by engines that are gone
        self._counted_s = 0.0  # until when `instance_s` counts
        self._reviving = False  # whether requests of dead engines are looked after
        for _ in range(setup.instances):
            self._up(self._new_name())

    @property
    def now(self) -> float:
        """The virtual time in seconds."""
        return self.clock.now

    @property
    def preemptions(self) -> int:
        """Of all engines so far."""
        return self._preemptions_lost + sum(i.engine.preemptions for i in self.by_engine.values())

    # -- driving it

    def run(self, jobs: Iterable[Job], until_s: float = float("inf")) -> None:
        """Serves these requests, given in order of arrival, to the last one's end."""
        self.clients.expect(jobs)
        self._await_arrival()
        for instance in list(self.instances.values()):
            self._report(instance)
        self.clock.at(self.now, TICKS, self._tick)
        if self.setup.scheduler.scaling.on:
            self.clock.at(self.now, TICKS, self._tell_fleet)
        self.go_on(until_s, self.clients.over)

    def go_on(self, until_s: float, over: Callable[[], bool]) -> None:
        """Lives through events until that time, or until it is over."""
        self.clock.run(until_s, over)
        self._count_instances()

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        self.clock.at(self.now + seconds, MESSAGES, what)

    def _hop(self, what: Callable[..., None], *args: Any) -> None:
        self.clock.at(self.clock.now + self._hop_s, MESSAGES, what, *args)

    # -- clients and their frontend

    def _await_arrival(self) -> None:
        if (job := self.clients.next_arrival()) is not None:
            self.clock.at(job.arrived_s, ARRIVALS, self._arrive, job)

    def _arrive(self, job: Job) -> None:
        self.clients.arrive(job)
        self._place(job)
        self._await_arrival()

    def _place(self, job: Job) -> None:
        index = self._choose(job)
        if index is not None:
            self.clients.placed(job, index)
            self._send(index, Add(job=job))
        elif not job.error:
            self.clock.at(self.now + RETRY_S, ARRIVALS, self._place, job)

    def _choose(self, job: Job, *, again: bool = False) -> EngineIndex | None:
        """Asks the scheduler where to put it, which may refuse a new one for good. Without a
        scheduler, the frontend decides."""
        if self.scheduler is None:
            return self.clients.fewest_streams(self._serving())
        (decision,) = self._decide(job.arrival(again=again))
        if isinstance(decision, NoInstance) and decision.code != "no_instance":
            self.clients.refuse(job, decision.why)
        return decision.engine_index if isinstance(decision, Dispatch) else None

    def _serving(self) -> list[EngineIndex]:
        return [i.index for i in self.instances.values() if i.state == "serving"]

    def _revive(self) -> None:
        choose = partial(self._choose, again=True)
        self._perform(self.clients.revive(self._serving(), choose, self.now))
        self._reviving = bool(self.clients.orphans)
        if self._reviving:
            self.clock.at(self.now + RETRY_S, ARRIVALS, self._revive)

    def hang_up(self, request: RequestId) -> None:
        """A client goes away."""
        self._perform(self.clients.hang_up(request))

    def _receive_tokens(self, index: EngineIndex, tokens: list[Token]) -> None:
        answers = self.clients.receive(index, tokens, self.clock.now)
        if answers:
            self._perform(answers)

    def _receive_llumlet(self, index: EngineIndex, message: FrontendMessage) -> None:
        if index in self.by_engine:
            self._perform(self.clients.receive_llumlet(index, message, self.now))

    def _receive_fate(self, fate: Fate) -> None:
        self._perform(self.clients.receive_fate(fate.migration, fate.fate, self.now))

    # -- what is carried out

    def _perform(self, answers: Sequence[Answer]) -> None:
        """Carries out what the scheduler, the clients or an instance answered, in order."""
        for answer in answers:
            match answer:
                case ToPeer(engine=engine, message=message):
                    self._wire(self, engine, message)
                case Said(engine=engine, message=message):
                    self._hop(self._receive_llumlet, engine, message)
                case Pull():
                    self._pull(answer)
                case Begin(engine=engine, order=order):
                    self._send(engine, order)
                case Abort(engine=engine) | TellLost(engine=engine) | AskFate(engine=engine):
                    self._send(engine, answer)
                case Fate(engine=engine, migration=migration, fate="undecided"):
                    again = AskFate(engine=engine, migration=migration)
                    self.clock.at(self.now + FATE_POLL_S, MESSAGES, self._deliver, engine, again)
                case Fate():
                    self._hop(self._receive_fate, answer)
                case MoveOrder(source_engine=engine):
                    self._send(engine, answer)
                case AddInstances(count=count):
                    for _ in range(count):
                        self.start()
                case DrainInstance(instance=name):
                    self.drain(name, "scheduler")
                case UndrainInstance(instance=name):
                    self._set_state(name, "serving")
        if self.clients.orphans and not self._reviving:
            self._reviving = True
            self.clock.at(self.now, ARRIVALS, self._revive)

    # -- engines

    def _send(self, index: EngineIndex, message: ToInstance) -> None:
        self._hop(self._deliver, index, message)

    def carry(self, index: EngineIndex, message: PeerMessage, late_s: float = 0.0) -> None:
        """Brings a message to another llumlet."""
        when_s = self.now + self._hop_s + late_s
        self.clock.at(when_s, MESSAGES, self._deliver, index, message)

    def _deliver(self, index: EngineIndex, message: ToInstance) -> None:
        """Puts a message into an engine's inbox, which it looks at between two steps."""
        if (instance := self.by_engine.get(index)) is not None:
            instance.inbox.append(message)
            self._wake(instance)

    def _wake(self, instance: SimInstance) -> None:
        if not instance.stepping:
            self._turn(instance)

    def _turn(self, instance: SimInstance) -> None:
        if instance.index not in self.by_engine:
            return
        clock = self.clock
        now = clock.now
        turn = instance.turn(now)
        if turn.outputs:
            index, outputs = instance.index, turn.outputs
            clock.at(now + self._hop_s, TOKENS, self._receive_tokens, index, outputs)
        if turn.messages:
            self._perform(turn.messages)
        if turn.report is not None:
            self._decide(LoadReported(report=turn.report))
        if turn.prefixes is not None:
            self._decide(turn.prefixes)
        if turn.step_ends_s is not None:
            clock.at(turn.step_ends_s, TOKENS, self._turn, instance)
        elif instance.state == "draining" and instance.empty:
            self._stop_if_empty(instance)
        elif turn.wake_s is not None:
            clock.at(turn.wake_s, MESSAGES, self._wake, instance)

    def _pull(self, pull: Pull) -> None:
        profile = self.setup.profile
        when_s = self.now + profile.hop_s + profile.stop_s
        self.clock.at(when_s, MESSAGES, self._copy, pull, self.now)

    def _copy(self, pull: Pull, began_s: float) -> None:
        if pull.source in self.by_engine and pull.destination in self.by_engine:
            ended = partial(self._copied, pull, began_s, None)
            self._network.copy(pull.source, pull.destination, pull.size, self.now, ended)
        else:
            self._copied(pull, began_s, "its source is gone")

    def _copied(self, pull: Pull, began_s: float, error: str | None, _: Flow | None = None) -> None:
        seconds = self.now - began_s
        message = Pulled(ticket=pull.ticket, error=error, size=pull.size, seconds=seconds)
        self._deliver(pull.destination, message)

    # -- the controller

    def _decide(self, fact: Fact) -> list[Decision]:
        """What the scheduler makes of a fact; nothing while there is none."""
        if self.scheduler is None:
            return []
        decisions = self.scheduler.handle(fact, self.clock.now)
        if self._check is not None:
            self._check(self.scheduler, self.now)
        if self._record is not None:
            for each in (fact, *decisions):
                self._record(self.now, each)
        return decisions

    def _tick(self) -> None:
        for instance in self.instances.values():
            if self.now - instance.reported_s >= HEARTBEAT_S:
                self._report(instance)
        self._perform(self._decide(Tick()))
        self.clock.at(self.now + self.setup.scheduler.migration.interval_s, TICKS, self._tick)

    def _report(self, instance: SimInstance) -> None:
        report = instance.report(self.now)
        if report is not None:
            self._decide(LoadReported(report=report))
            prefixes = instance.prefixes()
            if prefixes is not None:
                self._decide(prefixes)

    # -- the fleet

    def _new_name(self) -> InstanceId:
        self._names += 1
        return InstanceId(f"i{self._names - 1}")

    def _up(self, name: InstanceId) -> None:
        self._count_instances()
        self.starting.discard(name)
        index = EngineIndex(self._engines)
        self._engines += 1
        setup, job_of = self.setup, self.clients.jobs.__getitem__
        rules, min_stay = queue_rules_of(setup.scheduler), setup.scheduler.migration.min_stay
        engine = SimEngine(index, setup.profile, setup.engine, self._priorities, job_of, rules)
        llumlet = Llumlet(index, "", engine, priorities=self._priorities, min_stay=min_stay)
        instance = SimInstance(name, engine, llumlet, reports_prefixes=self._cache_aware)
        self.instances[name] = self.by_engine[index] = instance
        self.clients.engines[index] = name
        self._report(instance)

    def start(self, name: InstanceId | None = None) -> None:
        """One more instance, or this one again; it is ready after a while."""
        name = name or self._new_name()
        self._count_instances()
        self.starting.add(name)
        setup = self.setup
        start_s = setup.profile.start_s if setup.start_s is None else setup.start_s
        self.clock.at(self.now + start_s, TICKS, self._up, name)

    def _stop_if_empty(self, instance: SimInstance) -> None:
        """An instance that was emptied ends, once the frontend has heard all that it said."""
        if self.clients.needs(instance.index):
            self.clock.at(self.now + DRAIN_POLL_S, TICKS, self._wake, instance)
        else:
            self._lose(instance)

    def kill(self, instance: SimInstance) -> None:
        """It crashes, and is started again."""
        self._lose(instance)
        self.start(instance.id)

    def _lose(self, instance: SimInstance) -> None:
        self._count_instances()
        index = instance.index
        del self.instances[instance.id], self.by_engine[index]
        self._preemptions_lost += instance.engine.preemptions
        self._decide(InstanceLost(instance=instance.id, engine_index=index))
        for flow in self._network.cut(index, self.now):
            flow.ended(flow)
        self._perform(self.clients.engine_lost(index, self.now))

    def _tell_fleet(self) -> None:
        fleet = fleet_report(self.instances.values(), len(self.starting))
        self._perform(self._decide(fleet))
        self.clock.at(self.now + FLEET_REPORT_EVERY_S, TICKS, self._tell_fleet)

    def drain(self, name: InstanceId, by: DrainedBy = "user") -> None:
        """An instance is to be emptied, then stopped."""
        if name in self.instances:
            self.instances[name].drained_by = by
        self._set_state(name, "draining")

    def _set_state(self, name: InstanceId, state: State) -> None:
        instance = self.instances.get(name)
        if instance is not None:
            instance.state = state
            self._report(instance)
            self._wake(instance)

    def _count_instances(self) -> None:
        """Counts the instance-seconds up to now: of those that serve or are being emptied, and of
        those that start, since they cost as much."""
        count = len(self.instances) + len(self.starting)
        self.instance_s += count * (self.now - self._counted_s)
        self._counted_s = self.now
