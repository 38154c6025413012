"""A whole deployment in virtual time: the production scheduler, llumlets and table of streams, with
engines, a network, a fleet and clients that are modelled.

Rules
- What decides is the code that serves: core/scheduling/scheduler.py in the controller's place,
  core/migration/llumlet.py beside each engine, core/streams/table.py in the frontend's
  (sim/model/clients.py). This file carries out what they decide.
- One heap of events, ordered by time and by when they were made: a run is the same for the same
  seed.
- A message takes `hop_s`. An engine deals with what came during a step when the step is over.
- Faults and checks (sim/model/faults.py) are apart, and look in from outside.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from llumnix.core.events import (
    AddInstances,
    Decision,
    DrainedBy,
    DrainInstance,
    Fact,
    FleetReported,
    InstanceLost,
    LoadReported,
    MoveOrder,
    PrefixesChanged,
    Tick,
    UndrainInstance,
)
from llumnix.core.limits import (
    DRAIN_POLL_S,
    FLEET_REPORT_EVERY_S,
    HEARTBEAT_S,
)
from llumnix.core.messages import Out, PeerMessage, ToPeer
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.reports import compose_report
from llumnix.core.scheduling.presets import POLICIES, priorities_of
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, MigrationId, RequestId
from llumnix.sim.model.batching import Batch, EngineOptions, Job
from llumnix.sim.model.clients import Frontend
from llumnix.sim.model.engine import SimEngine
from llumnix.sim.model.network import Network
from llumnix.sim.model.profile import Profile

FATE_POLL_S = 0.05

Wire = Callable[["Cluster", EngineIndex, PeerMessage], None]
Recorder = Callable[[float, Fact | Decision], None]


@dataclass(slots=True, kw_only=True, eq=False)
class Instance:
    """One run of an instance. `inbox`: what its engine deals with after the step under way."""

    id: InstanceId
    index: EngineIndex
    engine: SimEngine
    llumlet: Llumlet
    state: str = "serving"
    stepping: bool = False
    inbox: list[Callable[[], None]] = field(default_factory=list)
    admitted: list[RequestId] = field(default_factory=list)
    sequence: int = 0
    reported_s: float = -1.0
    turned_s: float = 0.0  # when it was last between two steps
    drained_by: DrainedBy = "scheduler"
    said: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is simulated. `instances`: at the beginning. `start_s`: an instance from nothing to
    ready; None for the profile's."""

    scheduler: SchedulerSettings
    profile: Profile
    instances: int
    engine: EngineOptions = field(default_factory=EngineOptions)
    start_s: float | None = None


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
        self.now = 0.0
        self.scheduler: Scheduler | None = Scheduler(setup.scheduler)
        self.priorities = priorities_of(setup.scheduler)
        self.frontend = Frontend(self)
        self.instances: dict[InstanceId, Instance] = {}
        self.by_engine: dict[EngineIndex, Instance] = {}
        self.starting: set[InstanceId] = set()
        self.preemptions = 0
        self.instance_s = 0.0
        self.network = Network(setup.profile.link_bytes_s, self._later)
        self._cache_aware = POLICIES[setup.scheduler.policy].looks_at_caches
        self._record = record
        self._wire = wire
        self._check = check
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._engines = 0
        self._names = 0
        self._counted_s = 0.0
        for _ in range(setup.instances):
            self._up(self._new_name())

    # -- driving it

    def run(self, jobs: Iterable[Job], until_s: float = float("inf")) -> None:
        """Serves these requests, given in order of arrival, to the last one's end."""
        self.frontend.serve(jobs)
        for instance in list(self.instances.values()):
            self._report(instance)
        self.at(self.now, self._tick)
        if self.setup.scheduler.scaling.on:
            self.at(self.now, self._tell_fleet)
        self.go_on(until_s, lambda: self.frontend.over)

    def go_on(self, until_s: float, over: Callable[[], bool]) -> None:
        """Lives through events until that time, or until it is over."""
        heap = self._heap
        while heap and heap[0][0] <= until_s and not over():
            self.now, _, what, args = heapq.heappop(heap)
            what(*args)
        self._count_instances()

    def at(self, when_s: float, what: Callable[..., None], *args: Any) -> None:
        """Calls `what(*args)` at that time."""
        self._count += 1
        heapq.heappush(self._heap, (when_s, self._count, what, args))

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        self.at(self.now + seconds, what)

    def _hop(self, what: Callable[..., None], *args: Any) -> None:
        self.at(self.now + self.setup.profile.hop_s, what, *args)

    # -- what the frontend does to engines

    def tell_engine(self, index: EngineIndex, what: Callable[..., None], *args: Any) -> None:
        """Has `what(index, *args)` done by an engine, between two of its steps."""
        self._hop(self._deliver, index, what, index, *args)

    def admit(self, index: EngineIndex, job: Job) -> None:
        """A new request reaches an engine."""
        instance = self.by_engine[index]
        instance.engine.add(job, self.now)
        instance.admitted.append(job.id)

    def abort(self, index: EngineIndex, request: RequestId) -> None:
        """An engine is to keep nothing of a request."""
        self.llumlet(index, lambda it, _: it.client_gone([request]))
        self.by_engine[index].engine.abort(request)

    def llumlet(self, index: EngineIndex, what: Callable[[Llumlet, float], list[Out]]) -> None:
        """Lets a llumlet do something, and sends what it says."""
        instance = self.by_engine[index]
        self._send(instance, what(instance.llumlet, self.now))

    def fate(
        self, index: EngineIndex, migration: MigrationId, answer: Callable[[MigrationId, str], None]
    ) -> None:
        """Asks a destination what it decided, until it has."""
        fate = self.by_engine[index].llumlet.fate(migration)
        if fate == "undecided":
            self.at(
                self.now + FATE_POLL_S, self._deliver, index, self.fate, index, migration, answer
            )
        else:
            self._hop(answer, migration, fate)

    def serving(self) -> list[EngineIndex]:
        """The engines that take requests."""
        return [i.index for i in self.instances.values() if i.state == "serving"]

    def name_of(self, index: EngineIndex) -> InstanceId | None:
        """The instance whose run it is."""
        instance = self.by_engine.get(index)
        return None if instance is None else instance.id

    # -- engines

    def _deliver(self, index: EngineIndex, what: Callable[..., None], *args: Any) -> None:
        """Hands something to an engine, which looks at it between two steps."""
        instance = self.by_engine.get(index)
        if instance is None:
            return
        instance.inbox.append(lambda: what(*args))
        if not instance.stepping:
            self._turn(instance)

    def _turn(self, instance: Instance) -> None:
        """Between two steps."""
        instance.turned_s = self.now
        instance.stepping = True  # What follows may send it messages; they wait for their turn.
        llumlet = instance.llumlet
        while instance.inbox:
            inbox, instance.inbox = instance.inbox, []
            for what in inbox:
                what()
        if instance.index not in self.by_engine:
            return
        if llumlet.busy:
            self._send(instance, llumlet.poll(self.now))
        before = instance.engine.preemptions
        batch = instance.engine.schedule(self.now)
        self.preemptions += instance.engine.preemptions - before
        self._report(instance)
        if batch is not None:
            self.at(self.now + batch.seconds, self._stepped, instance, batch)
            return
        instance.stepping = False
        if instance.state == "draining" and instance.engine.idle() and not llumlet.busy:
            self._stop_if_empty(instance)
        elif (deadline_s := llumlet.deadline_s()) is not None:
            self.at(max(self.now + 0.001, deadline_s), self._wake, instance)

    def _wake(self, instance: Instance) -> None:
        if not instance.stepping and instance.index in self.by_engine:
            self._turn(instance)

    def _stepped(self, instance: Instance, batch: Batch) -> None:
        if instance.index not in self.by_engine:
            return
        said = instance.engine.land(batch, self.now)
        self._hop(self.frontend.hear, instance.index, said)
        self._turn(instance)

    def _pull(self, destination: EngineIndex, ticket: int, source: EngineIndex, size: int) -> None:
        began_s, profile = self.now, self.setup.profile

        def ended(error: str | None) -> None:
            seconds = self.now - began_s
            self._deliver(destination, self._pulled, destination, ticket, error, size, seconds)

        def begin() -> None:
            if source in self.by_engine and destination in self.by_engine:
                self.network.copy(source, destination, size, self.now, lambda _: ended(None))
            else:
                ended("its source is gone")

        self.at(self.now + profile.hop_s + profile.stop_s, begin)

    def _pulled(
        self, index: EngineIndex, ticket: int, error: str | None, size: int, seconds: float
    ) -> None:
        self.llumlet(index, lambda it, now: it.pulled(ticket, error, size, seconds, now))

    def _send(self, instance: Instance, out: list[Out]) -> None:
        for item in out:
            if isinstance(item, ToPeer):
                if self._wire is None:
                    self.carry(item.engine, item.message)
                else:
                    self._wire(self, item.engine, item.message)
            else:
                self._hop(self._hear_llumlet, instance.index, item.message)

    def _hear_llumlet(self, index: EngineIndex, message: Any) -> None:
        if index in self.by_engine:
            self.frontend.hear_llumlet(index, message)

    def carry(self, to: EngineIndex, message: PeerMessage, late_s: float = 0.0) -> None:
        """Brings a message to another llumlet."""
        when_s = self.now + self.setup.profile.hop_s + late_s
        self.at(when_s, self._deliver, to, self._receive, to, message)

    def _receive(self, index: EngineIndex, message: PeerMessage) -> None:
        self.llumlet(index, lambda it, now: it.receive(message, now))

    def _order(self, index: EngineIndex, order: MoveOrder) -> None:
        self.llumlet(index, lambda it, now: it.order(order, now))

    # -- the controller

    def decide(self, fact: Fact) -> list[Decision]:
        """What the scheduler makes of a fact; nothing while there is none."""
        if self.scheduler is None:
            return []
        decisions = self.scheduler.handle(fact, self.now)
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
        for decision in self.decide(Tick()):
            assert isinstance(decision, MoveOrder)
            index = decision.source_engine
            self.tell_engine(index, self._order, decision)
        self.at(self.now + self.setup.scheduler.migration.interval_s, self._tick)

    def _report(self, instance: Instance) -> None:
        """Pushes the load if it has changed, or if it was long ago."""
        engine, llumlet = instance.engine, instance.llumlet
        memory = engine.memory
        moving = llumlet.moving(self.now)
        answered = llumlet.answered()
        said = (memory.free, engine.classes(), moving, instance.state)
        fresh = self.now - instance.reported_s < HEARTBEAT_S
        if said == instance.said and fresh and not instance.admitted and not answered:
            return
        instance.said, instance.reported_s = said, self.now
        instance.sequence += 1
        llumlet.reported(instance.sequence)
        report = compose_report(
            engine.counts(),
            moving,
            instance=instance.id,
            engine_index=instance.index,
            sequence=instance.sequence,
            admitted=instance.admitted,
            accepting=instance.state == "serving",
            orders=answered,
            steps=engine.steps,
            steps_s=engine.steps_s,
            stalled_s=self.now - instance.turned_s if instance.stepping else 0.0,
        )
        instance.admitted = []
        self.decide(LoadReported(report=report))
        if self._cache_aware and memory.news:
            self._tell_prefixes(instance)

    def _tell_prefixes(self, instance: Instance) -> None:
        news = dict(instance.engine.memory.news)
        instance.engine.memory.news.clear()
        self.decide(
            PrefixesChanged(
                instance=instance.id,
                engine_index=instance.index,
                stored=tuple(n for n, there in news.items() if there),
                removed=tuple(n for n, there in news.items() if not there),
            )
        )

    # -- the fleet

    def _new_name(self) -> InstanceId:
        self._names += 1
        return InstanceId(f"i{self._names - 1}")

    def _up(self, name: InstanceId) -> None:
        self._count_instances()
        self.starting.discard(name)
        index = EngineIndex(self._engines)
        self._engines += 1
        engine = SimEngine(
            index,
            self.setup.profile,
            self.setup.engine,
            self.priorities,
            self.frontend.jobs.__getitem__,
            self._pull,
        )
        min_stay = self.setup.scheduler.migration.min_stay
        llumlet = Llumlet(index, "", engine, priorities=self.priorities, min_stay=min_stay)
        instance = Instance(id=name, index=index, engine=engine, llumlet=llumlet)
        self.instances[name] = self.by_engine[index] = instance
        self._report(instance)

    def start(self, name: InstanceId | None = None) -> None:
        """One more, or this one again; it is ready after a while."""
        name = name or self._new_name()
        self._count_instances()
        self.starting.add(name)
        setup = self.setup
        start_s = setup.profile.start_s if setup.start_s is None else setup.start_s
        self.at(self.now + start_s, self._up, name)

    def _stop_if_empty(self, instance: Instance) -> None:
        """An instance that was emptied ends, once its last words have been heard."""
        if self.frontend.has_business_with(instance):
            self._later(DRAIN_POLL_S, lambda: self._wake(instance))
        else:
            self._lose(instance)

    def kill(self, instance: Instance) -> None:
        """It crashes, and is started again."""
        self._lose(instance)
        self.start(instance.id)

    def _lose(self, instance: Instance) -> None:
        self._count_instances()
        index = instance.index
        del self.instances[instance.id], self.by_engine[index]
        self.decide(InstanceLost(instance=instance.id, engine_index=index))
        for flow in self.network.cut(index, self.now):
            flow.ended(flow)
        self.frontend.engine_lost(instance, list(self.by_engine))

    def _tell_fleet(self) -> None:
        there = self.instances.values()
        fleet = FleetReported(
            starting=len(self.starting),
            serving=tuple(i.id for i in there if i.state == "serving"),
            draining=tuple(i.id for i in there if i.state == "draining"),
            drained_by={i.id: i.drained_by for i in there if i.state == "draining"},
        )
        for decision in self.decide(fleet):
            match decision:
                case AddInstances(count=count):
                    for _ in range(count):
                        self.start()
                case DrainInstance(instance=name):
                    self.drain(name, "scheduler")
                case UndrainInstance(instance=name):
                    self._set_state(name, "serving")
        self.at(self.now + FLEET_REPORT_EVERY_S, self._tell_fleet)

    def drain(self, name: InstanceId, by: DrainedBy = "user") -> None:
        """An instance is to be emptied, then stopped."""
        if name in self.instances:
            self.instances[name].drained_by = by
        self._set_state(name, "draining")

    def _set_state(self, name: InstanceId, state: str) -> None:
        instance = self.instances.get(name)
        if instance is not None:
            instance.state = state
            self._report(instance)
            self._wake(instance)

    def _count_instances(self) -> None:
        """Instance-seconds up to now: those that serve or are being emptied, and those that start,
        for they cost as much."""
        there = len(self.instances) + len(self.starting)
        self.instance_s += there * (self.now - self._counted_s)
        self._counted_s = self.now
