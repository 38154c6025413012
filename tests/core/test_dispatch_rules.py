"""Every policy's choice beside its rule, worked out on all instances.

The rules are written down here once more, without heaps, indexes and sort keys. Ties are left open:
any instance that the rule puts first is right.
"""

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from llumnix.core.events import Dispatch, LoadReported, PrefixesChanged, RequestArrived
from llumnix.core.prefixes import BLOCK_TOKENS, chain, root
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.presets import POLICIES
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.scheduling.tuning import (
    HALF_WEIGHT_BATCH,
    NEIGHBOUR_PROMPT_SHARE,
    NEIGHBOUR_TOKENS,
    PREFILL_QUANTUM_TOKENS,
    PREFILL_WEIGHT,
    STALE_AFTER_S,
)
from llumnix.core.scheduling.view import InstanceView
from llumnix.core.settings import MigrationSettings, SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, RequestId

TOTAL = 10_000
THRESHOLD = 48.0
WORLDS, STEPS = 60, 60
PROMPT = list(range(3000))
HASHES = chain(root(), PROMPT)


@dataclass
class World:
    """A scheduler, and what the test knows of its instances."""

    policy: str
    now: float = 0.0
    last: str = ""  # that a policy in turn has chosen
    kept: dict[str, int] = field(default_factory=dict)  # leading blocks in its prefix cache
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        migration = MigrationSettings(source_below=THRESHOLD, destination_above=100.0)
        self.s = Scheduler(SchedulerSettings(policy=self.policy, migration=migration))

    def candidates(self) -> list[InstanceView]:
        """Those that accept and were heard of lately; all that accept if there is none."""
        accepting = sorted((v for v in self.s.view if v.accepting), key=lambda v: v.report.instance)
        return [v for v in accepting if self.fresh(v)] or accepting

    def fresh(self, v: InstanceView) -> bool:
        return self.now - v.seen_s <= STALE_AFTER_S

    def right(self, request: RequestArrived) -> set[str]:
        """The instances that the policy may choose."""
        found, rank = self.candidates(), self.s.view.priorities.rank(request.priority)
        match POLICIES[self.policy].dispatch:
            case "round-robin":
                names = [v.report.instance for v in found]
                later = [n for n in names if n > self.last]
                self.last = (later or names)[0]
                return {self.last}
            case "least-loaded":
                return first(found, lambda v: (v.requests, v.tokens))
            case "freest":
                return first(found, lambda v: -self.freeness(v, rank))
        soonest = first(found, lambda v: self.start(v, rank))
        return soonest if not request.prefix else self.with_hits(found, soonest, request, rank)

    def freeness(self, v: InstanceView, rank: int) -> float:
        return v.load.freeness_for(rank, self.s.view.priorities)

    def start(self, v: InstanceView, rank: int) -> tuple[float, ...]:
        """With memory: by queued tokens and freeness. Else by what is short, headroom last."""
        freeness, best_case = self.freeness(v, rank), self.freeness(v, 0)
        queued = v.load.queued_prefill_before(rank) // PREFILL_QUANTUM_TOKENS
        if freeness >= THRESHOLD:
            return (0, queued, -freeness)
        if best_case >= THRESHOLD:
            return (1, THRESHOLD - freeness, queued)
        return (2, THRESHOLD - best_case, THRESHOLD - freeness, queued)

    def with_hits(
        self, found: list[InstanceView], soonest: set[str], request: RequestArrived, rank: int
    ) -> set[str]:
        """Of the soonest and all that have more of the prompt, the one that costs least."""
        best = max(
            (v for v in found if v.report.instance in soonest), key=lambda v: v.last_dispatch
        )
        name = best.report.instance
        longer = [
            v for v in found if self.fresh(v) and self.hit(v, request) > self.hit(best, request)
        ]
        if not any(n > self.kept.get(name, 0) for n in self.kept.values()):
            idle = not best.load.batch and not best.load.waiting
            return soonest if idle else {name}  # among idle ones they are taken in turn
        closed = self.closed(best, rank)
        able = [v for v in longer if closed or not self.closed(v, rank)]
        others = best.load.batch + best.load.waiting
        costs = {v.report.instance: self.cost(v, request, rank, others) for v in [best, *able]}
        least = min(costs.values())
        self.seen["hits that decide"] += least < costs[name]
        return {name} if costs[name] <= least else {i for i, c in costs.items() if c == least}

    def hit(self, v: InstanceView, request: RequestArrived) -> int:
        blocks = min(self.kept.get(v.report.instance, 0), len(request.prefix))
        return max(0, min(blocks * BLOCK_TOKENS, request.prompt_tokens - 1))

    def closed(self, v: InstanceView, rank: int) -> bool:
        requests = v.load.batch + v.load.waiting
        if v.load.slots and requests >= v.load.slots:
            return True
        kept = rank and v.load.running[0] and self.s.view.priorities.headroom_max
        return bool(kept) and self.freeness(v, rank) < THRESHOLD

    def cost(self, v: InstanceView, request: RequestArrived, rank: int, others: int) -> float:
        load, new = v.load, request.prompt_tokens - self.hit(v, request)
        half = HALF_WEIGHT_BATCH
        missing = max(0.0, new - load.spare_for(0, self.s.view.priorities))
        each = NEIGHBOUR_TOKENS + NEIGHBOUR_PROMPT_SHARE * request.prompt_tokens
        tokens = load.queued_prefill_before(rank)
        tokens += missing * half / (half + load.batch)
        tokens += (PREFILL_WEIGHT + load.waiting) * new
        tokens += each * half / (half + others) * (load.batch + load.waiting)
        return tokens // PREFILL_QUANTUM_TOKENS

    def take(self, sequence: int, step: object) -> None:
        """One fact; what is chosen for a request must be right."""
        match step:
            case LoadReport():
                one = replace(step, sequence=sequence, steps=sequence)
                self.s.handle(LoadReported(report=one), self.now)
            case (str(name), int(blocks)):
                fact = PrefixesChanged(
                    instance=InstanceId(name),
                    engine_index=EngineIndex(int(name[1:])),
                    stored=HASHES[:blocks],
                    cleared=True,
                )
                self.s.handle(fact, self.now)
                if POLICIES[self.policy].looks_at_caches:
                    self.kept[name] = blocks
            case RequestArrived():
                request = replace(step, request=RequestId(f"r{sequence}"))
                right = self.right(request) if self.candidates() else {""}
                (decision,) = self.s.handle(request, self.now)
                chosen = decision.instance if isinstance(decision, Dispatch) else ""
                assert chosen in right, decision.why
                self.seen["requests"] += bool(chosen)


def first(found: list[InstanceView], key) -> set[str]:
    lowest = min(map(key, found))
    return {v.report.instance for v in found if key(v) == lowest}


def a_report(number: int, used: int, running: int, waiting: int, **more: int) -> LoadReport:
    urgent = more.pop("urgent", 0)
    return LoadReport(
        instance=InstanceId(f"i{number}"),
        engine_index=EngineIndex(number),
        sequence=0,
        kv_tokens_used=used,
        kv_tokens_total=TOTAL,
        classes=(
            ClassLoad(running=urgent),
            ClassLoad(
                running=running,
                waiting=waiting,
                waiting_tokens=700 * waiting,
                waiting_prefill=500 * waiting,
            ),
        ),
        head_tokens=700 * bool(waiting),
        **more,  # type: ignore[arg-type]
    )


def step_of(dice: random.Random) -> object:
    """A report, what an instance keeps of the prompt, or a request."""
    number, kind = dice.randrange(5), dice.random()
    if kind < 0.35:
        short = dice.random() < 0.3
        return a_report(
            number,
            used=dice.randrange(9000, TOTAL) if short else dice.randrange(3000),
            running=dice.randrange(8),
            waiting=dice.choice([0, 0, 1, 3]),
            urgent=dice.choice([0, 0, 1]),
            prefill_tokens=dice.choice([0, 0, 400, 1500]),
            slots=dice.choice([0, 0, 8]),
            accepting=dice.random() < 0.9,
        )
    if kind < 0.5:
        return f"i{number}", dice.choice([0, 8, 30, len(HASHES)])
    tokens = dice.choice([dice.randrange(1, len(PROMPT)), len(PROMPT)])
    return RequestArrived(
        request=RequestId(""),
        prompt_tokens=tokens,
        priority=dice.choice([0, 0, -100]),
        prefix=chain(root(), PROMPT[:tokens]) if dice.random() < 0.7 else (),
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_every_choice_is_the_best_by_brute_force(policy: str) -> None:
    seen: Counter[str] = Counter()
    for seed in range(WORLDS):
        dice, world = random.Random(seed), World(policy, seen=seen)
        for sequence in range(1, STEPS):
            world.now += dice.choice([0.0, 0.0, 0.1, STALE_AFTER_S / 2])
            try:
                world.take(sequence, step_of(dice))
            except AssertionError as error:
                raise AssertionError(f"world {seed}, step {sequence}: {error}") from error
    assert seen["requests"] > WORLDS * STEPS / 4, seen
    if POLICIES[policy].looks_at_caches:
        assert seen["hits that decide"] > WORLDS, seen
