"""One run of an instance in virtual time: its engine, its llumlet, and what lies in its inbox.

An instance calls nobody. `turn` returns what it says to others, and the cluster carries that out
(sim/model/cluster.py). A turn is what happens between two steps, as in vLLM's engine with
synchronous scheduling: the tokens of the step that ended, the messages that came meanwhile, the
llumlet's own look at its migrations, the next step, a load report.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from llumnix.core.events import DrainedBy, FleetReported, MoveOrder, PrefixesChanged
from llumnix.core.limits import HEARTBEAT_S
from llumnix.core.messages import (
    OFFICE,
    FrontendMessage,
    Migrate,
    Out,
    PeerMessage,
    Revive,
    ToPeer,
)
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.reports import LoadReport, compose_report
from llumnix.core.streams.effects import Abort, AskFate, TellLost
from llumnix.core.types import EngineIndex, InstanceId, MigrationId, RequestId
from llumnix.sim.model.engine import Pull, SimEngine
from llumnix.sim.model.jobs import Batch, Job, Token

WAKE_AFTER_S = 0.001
"""The soonest look at a llumlet's deadline while the engine stands still."""

State = Literal["serving", "draining"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """From the frontend: a new request."""

    job: Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """From the network: a copy to this engine is over. `error` is None if all is here."""

    ticket: int
    error: str | None
    size: int  # bytes
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """The answer to `AskFate`: `taken`, `declined` or `undecided`."""

    engine: EngineIndex  # the one that was asked
    migration: MigrationId
    fate: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the llumlet of that engine tells the frontend."""

    engine: EngineIndex
    message: FrontendMessage


ToInstance = Add | Abort | Migrate | Revive | MoveOrder | TellLost | AskFate | Pulled | PeerMessage
FromInstance = ToPeer | Said | Pull | Fate


@dataclass(slots=True)  # not frozen, no keywords: there is one for each step
class Turn:
    """What an instance says between two steps, in this order."""

    outputs: list[Token]  # of the step that ended
    messages: list[FromInstance]
    report: LoadReport | None  # None if the load is as it was reported last
    prefixes: PrefixesChanged | None
    step_ends_s: float | None  # of the step that began; None if none did
    wake_s: float | None  # the llumlet's next deadline, if no step began


class SimInstance:
    """One run of an instance. `reports_prefixes`: whether the scheduler looks at prefix caches."""

    def __init__(
        self, name: InstanceId, engine: SimEngine, llumlet: Llumlet, *, reports_prefixes: bool
    ) -> None:
        self.id = name
        self.index: EngineIndex = engine.index
        self.engine = engine
        self.llumlet = llumlet
        self.state: State = "serving"
        self.drained_by: DrainedBy = "scheduler"
        self.inbox: list[ToInstance] = []
        self.reported_s = -1.0
        self._reports_prefixes = reports_prefixes
        self._batch: Batch | None = None  # the step under way
        self._turned_s = 0.0  # when it was last between two steps
        self._messages: list[FromInstance] = []  # said in this turn so far
        self._admitted: list[RequestId] = []  # since the last report
        self._sequence = 0  # of the last report
        self._reported: tuple[Any, ...] = ()  # what the last report said of the load

    @property
    def stepping(self) -> bool:
        """Whether a step is under way: what comes meanwhile waits for its end."""
        return self._batch is not None

    @property
    def empty(self) -> bool:
        """Whether nothing runs here, waits here or moves from or to here."""
        return self._batch is None and self.engine.idle() and not self.llumlet.busy

    def turn(self, now: float) -> Turn:
        """What happens between two steps."""
        engine, llumlet = self.engine, self.llumlet
        outputs = [] if self._batch is None else engine.land(self._batch, now)
        self._turned_s = now
        self._messages = []
        if self.inbox:
            for message in self.inbox:
                self._receive(message, now)
            self.inbox = []
        if llumlet.busy:
            self._say(llumlet.poll(now))
        self._batch = batch = engine.schedule(now, defer=llumlet.defer_prefills(now))
        report = self.report(now)
        prefixes = None if report is None else self.prefixes()
        step_ends_s = wake_s = None
        if batch is not None:
            step_ends_s = now + batch.seconds
        elif (deadline_s := llumlet.deadline_s()) is not None:
            wake_s = max(now + WAKE_AFTER_S, deadline_s)
        return Turn(outputs, self._messages, report, prefixes, step_ends_s, wake_s)

    def _receive(self, message: ToInstance, now: float) -> None:
        llumlet = self.llumlet
        match message:
            case Add(job=job):
                if not job.error:  # Its client hung up while it was on its way.
                    self.engine.add(job, now)
                    self._admitted.append(job.id)
            case Abort(request=request):
                self._say(llumlet.client_gone([request]))
                self.engine.abort(request)
            case Migrate():
                self._say(llumlet.migrate(message, now))
            case Revive(request=request):
                self._say(llumlet.revive(message, None, now))
                self._admitted.append(request)
            case MoveOrder():
                self._say(llumlet.order(message, now))
            case TellLost(lost=lost, granted=granted):
                self._say(llumlet.engine_lost(lost, set(granted), now, OFFICE))
            case AskFate(migration=migration):
                fate = llumlet.fate(migration)
                self._messages.append(Fate(engine=self.index, migration=migration, fate=fate))
            case Pulled():
                error, size, seconds = message.error, message.size, message.seconds
                self._say(llumlet.pulled(message.ticket, error, size, seconds, now))
            case _:
                self._say(llumlet.receive(message, now))

    def _say(self, out: list[Out]) -> None:
        """Copies that the llumlet began come before what it says."""
        self._messages += self.engine.take_pulls()
        for item in out:
            if isinstance(item, ToPeer):
                self._messages.append(item)
            else:
                self._messages.append(Said(engine=self.index, message=item.message))

    def report(self, now: float) -> LoadReport | None:
        """The load, if it has changed or was reported long ago."""
        engine, llumlet = self.engine, self.llumlet
        moves = llumlet.moving(now)
        answered = llumlet.answered()
        load = (engine.memory.free, engine.classes(), moves, self.state)
        fresh = now - self.reported_s < HEARTBEAT_S
        if load == self._reported and fresh and not self._admitted and not answered:
            return None
        self._reported, self.reported_s = load, now
        self._sequence += 1
        llumlet.reported(self._sequence)
        admitted, self._admitted = tuple(self._admitted), []
        return compose_report(
            engine.counts(),
            moves,
            instance=self.id,
            engine_index=self.index,
            sequence=self._sequence,
            admitted=admitted,
            accepting=self.state == "serving",
            orders=answered,
            steps=engine.steps,
            steps_s=engine.steps_s,
            stalled_s=now - self._turned_s if self.stepping else 0.0,
        )

    def prefixes(self) -> PrefixesChanged | None:
        """What its prefix cache began to have and lost since it was asked last."""
        changes = self.engine.memory.cache_changes
        if not changes:
            return None
        last = dict(changes)
        changes.clear()
        if not self._reports_prefixes:
            return None
        return PrefixesChanged(
            instance=self.id,
            engine_index=self.index,
            stored=tuple(name for name, cached in last.items() if cached),
            removed=tuple(name for name, cached in last.items() if not cached),
        )


def fleet_report(instances: Collection[SimInstance], starting: int) -> FleetReported:
    """What the fleet tells the scheduler of its instances."""
    return FleetReported(
        starting=starting,
        serving=tuple(i.id for i in instances if i.state == "serving"),
        draining=tuple(i.id for i in instances if i.state == "draining"),
        drained_by={i.id: i.drained_by for i in instances if i.state == "draining"},
    )
