"""A replay has a scheduler know and decide what it knew and decided, though the event log leaves
out reports that repeat the one before, rounds that decided nothing, and what a fleet says again."""

import json
import random
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from llumnix.core.events import (
    AddInstances,
    Decision,
    Dispatch,
    DrainInstance,
    Fact,
    FleetReported,
    InstanceLost,
    LoadReported,
    MoveOrder,
    PrefixesChanged,
    RequestArrived,
    SettingsChanged,
    Tick,
    UndrainInstance,
)
from llumnix.core.reports import ClassLoad, Heard, LoadReport
from llumnix.core.settings import (
    AdmissionSettings,
    MigrationSettings,
    PriorityClass,
    PrioritySettings,
    ScalingSettings,
    SchedulerSettings,
)
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId
from llumnix.observe.replay import _Replay, replay
from support.logged import Logged

SEEDS, FACTS, INSTANCES = 10, 1500, 4
TOTAL = 4000
SETTINGS = SchedulerSettings(
    priorities=PrioritySettings(
        classes=(
            PriorityClass(name="high", priority=-100, headroom=0.6),
            PriorityClass(name="soon", priority=-50, headroom=0.2),
            PriorityClass(name="normal", priority=0),
        )
    ),
    migration=MigrationSettings(source_below=40.0, destination_above=60.0, moves_max=2),
    scaling=ScalingSettings(
        instances_min=1,
        instances_max=6,
        freeness_low=30.0,
        freeness_high=150.0,
        up_after_s=0.5,
        down_after_s=0.5,
        cooldown_s=0.5,
    ),
    admission=AdmissionSettings(queue_max=6),
)

# -- what a scheduler knows

LEFT_OUT = {"version", "_versions", "_heaps", "standings", "freeness", "heard"}
"""What may differ: numbers of changes, what is sorted by need and follows from the rest
(`ClusterView.check`), and what became of a report."""


PLAIN = None | int | float | str | tuple | LoadReport | SchedulerSettings


def known(thing: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """All that a scheduler has in its memory: each value with where it stands."""
    seen = set() if seen is None else seen
    if isinstance(thing, PLAIN):
        yield path, thing
    elif isinstance(thing, dict):
        yield f"{path} names", list(thing)
        for key, value in thing.items():
            yield from known(value, f"{path}[{key}]", seen)
    elif isinstance(thing, list | deque):
        yield f"{path} length", len(thing)
        for number, value in enumerate(thing):
            yield from known(value, f"{path}[{number}]", seen)
    elif isinstance(thing, set):
        yield path, sorted(thing)
    elif type(thing).__module__.startswith("llumnix.") and id(thing) not in seen:
        seen.add(id(thing))
        names = [f.name for f in fields(thing)] if is_dataclass(thing) else list(vars(thing))
        for name in names:
            if name not in LEFT_OUT:
                yield from known(getattr(thing, name), f"{path}.{name}", seen)


# -- a deployment in which all happens that a scheduler is told


@dataclass(slots=True, kw_only=True)
class Engine:
    """One run of an instance."""

    report: LoadReport  # the last
    asked: list[RequestId] = field(default_factory=list)  # dispatched, and in no report yet
    orders: list[OrderId] = field(default_factory=list)  # likewise
    silent_until_s: float = 0.0
    stands_since_s: float | None = None  # since when it repeats its counts, as one that hangs
    says: bool = True  # whether it says so
    drains: str = ""  # who has it emptied


class World:
    """Instances, requests and a fleet that do all that they can, at random."""

    def __init__(self, path: Path, seed: int) -> None:
        self.dice, self.logged = random.Random(seed), Logged(path, SETTINGS)
        self.now, self.happened, self.runs = 100.0, Counter[str](), 0
        self.engines: dict[InstanceId, Engine] = {}
        self.over: list[LoadReport] = []  # the last of each run that has ended
        self.level = 0.5  # of the use of memory
        self.quiet_until_s = 0.0  # until then instances repeat themselves, and few requests come
        self.moments: dict[float, dict[str, Any]] = {}
        """What the scheduler knew when it had come to a decision, or might have."""
        for number in range(INSTANCES):
            self.begin(InstanceId(f"i{number}"))

    def begin(self, instance: InstanceId) -> None:
        self.runs += 1
        report = LoadReport(
            instance=instance,
            engine_index=EngineIndex(self.runs),
            sequence=1,
            kv_tokens_used=0,
            kv_tokens_total=TOTAL,
            block_tokens=16,
            slots=64,
            classes=(ClassLoad(),) * 3,
            kv_token_bytes=1000 * self.dice.randrange(1, 4),
        )
        self.engines[instance] = Engine(report=report)

    def tell(self, fact: Fact) -> None:
        before = self.logged.scheduler.view.priorities
        decisions = self.logged.tell(fact, self.now)
        after = self.logged.scheduler.view.priorities
        self.happened["headroom"] += after.headroom_max != before.headroom_max
        if isinstance(fact, LoadReported):
            self.happened[self.logged.scheduler.heard.value] += 1
        elif decisions or isinstance(fact, FleetReported | InstanceLost):
            self.moments[self.now] = dict(known(self.logged.scheduler))
        for decision in decisions:
            self.happened[type(decision).__name__] += 1
            self.carry_out(decision)

    def carry_out(self, decision: Decision) -> None:
        if isinstance(decision, Dispatch):
            self.engines[decision.instance].asked.append(decision.request)
        elif isinstance(decision, MoveOrder):
            self.engines[decision.source].orders.append(decision.order)
        elif isinstance(decision, DrainInstance) and self.dice.random() < 0.7:
            self.engines[decision.instance].drains = "scheduler"
        elif isinstance(decision, UndrainInstance):
            self.engines[decision.instance].drains = ""
        elif isinstance(decision, AddInstances):
            for engine in self.engines.values():  # Those that drain end, and others come.
                engine.drains = ""

    def step(self) -> None:
        dice = self.dice
        quiet = self.now < self.quiet_until_s
        self.now += dice.choice((0.05, 0.1) if quiet else (0.001, 0.01, 0.03, 0.05))
        if dice.random() < 0.004:
            self.now += dice.choice((0.5, 3.0, 12.0))
        if dice.random() < 0.004:
            self.quiet_until_s = self.now + 8.0
        if dice.random() < 0.006:
            self.level = dice.choice((0.05, 0.05, 0.5, 0.8, 1.0, 1.0))
        instance = dice.choice(list(self.engines))
        engine, kind = self.engines[instance], 0.5 if quiet else dice.random()
        if quiet and dice.random() < 0.1:
            kind = dice.choice((0.0, 0.19))  # a round, or what the fleet has
        if kind < 0.12:
            self.tell(Tick())
        elif kind < 0.18:
            self.ask()
        elif kind < 0.25:
            self.tell(self.fleet())
        elif kind < 0.26:
            blocks = tuple(dice.sample(range(1, 40), 6))
            fresh = PrefixesChanged(
                instance=instance,
                engine_index=engine.report.engine_index,
                stored=blocks[:4],
                removed=blocks[4:],
                cleared=dice.random() < 0.5,
            )
            for _ in range(dice.randrange(1, 3)):
                self.tell(fresh)
        elif kind < 0.265:
            index = engine.report.engine_index
            self.over.append(engine.report)
            self.tell(InstanceLost(instance=instance, engine_index=index))
            self.begin(instance)
        elif kind < 0.275 and self.over:
            self.tell(LoadReported(report=dice.choice(self.over)))  # It comes late.
        elif kind < 0.28:
            gain = dice.choice((1.0, 8.0))
            migration = replace(SETTINGS.migration, gain_min=gain)
            scaling = dice.choice((SETTINGS.scaling, ScalingSettings()))
            changed = replace(SETTINGS, migration=migration, scaling=scaling)
            self.tell(SettingsChanged(settings=changed))
        elif self.now >= engine.silent_until_s:
            self.report(engine)

    def ask(self) -> None:
        dice = self.dice
        prompt = dice.randrange(1, 900)
        fact = RequestArrived(
            request=RequestId(f"r{self.now}"),
            prompt_tokens=prompt,
            priority=dice.choice((-100, -50, 0, 0, 0)),
            prefix=tuple(range(1, dice.randrange(1, 12))),
        )
        self.tell(fact)

    def fleet(self) -> FleetReported:
        draining = tuple(i for i, e in self.engines.items() if e.drains)
        return FleetReported(
            starting=int(self.dice.random() < 0.02),
            serving=tuple(i for i in self.engines if i not in draining),
            draining=draining,
            drained_by={i: self.engines[i].drains for i in draining},  # type: ignore[misc]
            given_up=self.happened["AddInstances"] // 3,
        )

    def report(self, engine: Engine) -> None:
        """The next of an engine: mostly it repeats the one before."""
        dice, last = self.dice, engine.report
        if engine.stands_since_s is None and dice.random() < 0.01:
            # Its last step ended a little before it was reported.
            engine.stands_since_s, engine.says = self.now - dice.random() / 5, dice.random() < 0.7
        elif engine.stands_since_s is not None and dice.random() < 0.02:
            engine.stands_since_s = None
        if dice.random() < 0.006:
            engine.silent_until_s = self.now + dice.choice((0.5, 2.0, 7.0))
        stalled_s = 0.0
        if engine.stands_since_s is not None and engine.says and (last.running or last.waiting):
            stalled_s = self.now - engine.stands_since_s
            if dice.random() < 0.02:
                engine.stands_since_s = self.now  # It has ended a step that ran no model.
        engine.report = replace(
            last, sequence=last.sequence + 1, stalled_s=stalled_s, admitted=(), orders=()
        )
        quiet = self.now < self.quiet_until_s
        if engine.stands_since_s is None and not quiet and dice.random() < 0.3:
            engine.report = self.news(engine)
        if dice.random() < 0.01:
            self.tell(LoadReported(report=engine.report))
            self.tell(LoadReported(report=last))  # It was overtaken.
            return
        self.tell(LoadReported(report=engine.report))

    def news(self, engine: Engine) -> LoadReport:
        dice, last = self.dice, engine.report
        if engine.drains == "user":
            engine.drains = ""
        elif not engine.drains and dice.random() < 0.005:
            engine.drains = "user"
        full = self.level * dice.choice((0.6, 0.9, 1.0))
        running = [dice.choice((0, 0, 1)), dice.choice((0, 0, 1)), dice.choice((0, 3, 6, 9, 12))]
        waiting = dice.choice((0, 0, 3)) * (full > 0.5)
        admitted = tuple(r for r in engine.asked if dice.random() < 0.8)
        orders = tuple(o for o in engine.orders if dice.random() < 0.7)
        engine.asked, engine.orders = [], []  # What is not named is lost.
        if dice.random() < 0.1:
            running, waiting = [0, 0, 0], 3
        steps, ended = dice.randrange(3), dice.randrange(4) * (dice.random() < 0.3)
        moved = dice.choice((0, 0, 0, 10**6))
        return replace(
            engine.report,
            admitted=admitted,
            orders=orders,
            accepting=not engine.drains,
            kv_tokens_used=int(full * TOTAL) if any(running) else 0,
            prefill_tokens=dice.choice((0, 0, 700)),
            classes=tuple(
                ClassLoad(running=n, waiting=waiting * (r == 2), waiting_tokens=500 * waiting)
                for r, n in enumerate(running)
            ),
            head_tokens=500 if waiting else 0,
            moving_out=len(orders) and dice.randrange(2),
            moving_out_tokens=dice.choice((0, 0, 100)),
            steps=last.steps + steps,
            steps_s=last.steps_s + steps * 0.02 * dice.random(),
            finished=last.finished + ended,
            finished_tokens=last.finished_tokens + ended * dice.randrange(10, 300),
            moved_bytes=last.moved_bytes + moved,
            moved_s=last.moved_s + moved * 1e-9,
        )


def test_a_replay_knows_and_decides_the_same_whatever_the_log_leaves_out(tmp_path: Path) -> None:
    happened, compared, written = Counter[str](), 0, 0
    for seed in range(SEEDS):
        path = tmp_path / f"{seed}"
        world = World(path, seed)
        for _ in range(FACTS):
            world.step()
        world.logged.log.close()
        happened += world.happened
        again = _Replay(cut=False)
        for number, line in enumerate(map(json.loads, path.read_text().splitlines()[1:])):
            again.line(f"line {number}", line)
            written += 1
            if line["kind"] == "fact" and (was := world.moments.get(line["at"])):
                compared += 1
                (scheduler,) = again._schedulers.values()
                now = dict(known(scheduler))
                names = [n for n in now.keys() | was.keys() if now.get(n) != was.get(n)]
                differ = {n: (was.get(n), now.get(n)) for n in sorted(names)}
                assert not differ, f"seed {seed}, {line['name']} at {line['at']}: {differ}"
        assert replay(path).differences == []
    decisions = ("Dispatch", "NoInstance", "MoveOrder", "DrainInstance", "UndrainInstance")
    rare = {*decisions, "AddInstances", "headroom", *(h.value for h in Heard)}
    assert min(happened[what] for what in rare) > 2, happened
    assert written < sum(happened.values())
    assert compared > 800
