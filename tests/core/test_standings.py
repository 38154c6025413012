"""What rounds of pairing keep from report to report decides nothing: each round decides what one
does that looks at all instances."""

from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from random import Random

import pytest

from llumnix.core.codes import MoveCode
from llumnix.core.events import (
    Fact,
    InstanceLost,
    LoadReported,
    MoveOrder,
    RequestArrived,
    SettingsChanged,
    Tick,
)
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.presets import balances
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.scheduling.tuning import STALE_AFTER_S
from llumnix.core.settings import MigrationSettings, PrioritySettings, SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId
from support.plain_pairing import PlainPairing

TOTAL = 10_000
INSTANCES = 30
ROUNDS = 25
SEEDS = 16


class World:
    """Random facts for two schedulers at once, one of which pairs the plain way."""

    def __init__(self, seed: int) -> None:
        self.dice = Random(seed)
        dice = self.dice
        migration = MigrationSettings(
            rescues=dice.choice([0, 1, 2, 4]), moves_max=dice.choice([1, 1, 3])
        )
        # Of some worlds only a few instances are short of memory, of others most are.
        self.short = dice.choice([0.3, 0.6, 0.95])
        priorities = PrioritySettings(headroom_need=dice.choice([None, 1.25]))
        self.settings = SchedulerSettings(
            policy="llumnix", migration=migration, priorities=priorities
        )
        self.quick, self.plain = Scheduler(self.settings), Scheduler(self.settings)
        self.plain._pairing = PlainPairing(migration, balance=balances(self.settings))
        self.low: float | None = None
        self.now = 1000.0
        self.sequence = 0
        self.runs = Counter[int]()
        self.silent_until_s = defaultdict[int, float](float)
        self.orders: dict[int, list[OrderId]] = {}
        self.codes = Counter[MoveCode]()

    def tell(self, fact: Fact) -> None:
        quick, plain = (s.handle(fact, self.now) for s in (self.quick, self.plain))
        assert quick == plain
        for decided in quick:
            if isinstance(decided, MoveOrder):
                self.codes[decided.code] += 1
                self.orders.setdefault(int(decided.source[1:]), []).append(decided.order)

    def report(self, number: int) -> None:
        """The next report of an instance. It answers its orders most of the time."""
        dice = self.dice
        self.sequence += 1
        short = dice.random() < self.short
        used = dice.randrange(TOTAL - 900, TOTAL) if short else dice.randrange(TOTAL)
        waiting = dice.randrange(4) if short else 0
        head = dice.choice([200, 600, 3000]) * bool(waiting)
        orders = self.orders.pop(number, []) if dice.random() < 0.8 else []
        running = dice.randrange(12)
        report = LoadReport(
            instance=InstanceId(f"i{number}"),
            engine_index=EngineIndex(number + INSTANCES * self.runs[number]),
            sequence=self.sequence,
            kv_tokens_used=used,
            kv_tokens_total=TOTAL,
            block_tokens=16,
            slots=dice.choice([0, 10]),
            classes=(
                ClassLoad(running=dice.choice([0, 1])),
                ClassLoad(
                    running=running,
                    waiting=waiting,
                    waiting_tokens=head + 300 * max(0, waiting - 1),
                ),
            ),
            head_tokens=head,
            waiting_least=dice.choice([0, 100]) if waiting else 0,
            accepting=dice.random() < 0.99,
            moving_out=dice.choice([0] * 9 + [1]),
            moving_in=dice.choice([0] * 9 + [1]),
            orders=tuple(orders),
            kv_token_bytes=2**19,
            steps=self.sequence,
            steps_s=self.sequence * 0.03,
            # Answers grow longer, so that the thresholds follow.
            finished=self.sequence,
            finished_tokens=self.sequence * 200 + self.sequence**2,
        )
        self.tell(LoadReported(report=report))

    def step(self) -> None:
        dice, number = self.dice, self.dice.randrange(INSTANCES)
        match dice.choice(
            ["report"] * 30
            + ["arrive"] * 12
            + ["drain", "undrain", "undrain", "lose", "settings", "silence"]
        ):
            case "report" if self.now >= self.silent_until_s[number]:
                self.report(number)
            case "silence":
                self.silent_until_s[number] = self.now + 2 * STALE_AFTER_S
            case "arrive":
                self.sequence += 1
                self.tell(
                    RequestArrived(
                        request=RequestId(f"r{self.sequence}"),
                        prompt_tokens=dice.randrange(1, 2000),
                        priority=dice.choice([0, 0, -100]),
                    )
                )
            case "lose":
                engine = EngineIndex(number + INSTANCES * self.runs[number])
                self.tell(InstanceLost(instance=InstanceId(f"i{number}"), engine_index=engine))
                self.runs[number] += 1
                self.orders.pop(number, None)
            case "settings":
                self.low = self.low or dice.choice([None, -50.0, 30.0, 400.0])
                migration = replace(
                    self.settings.migration,
                    source_below=self.low,
                    destination_above=None if self.low is None else self.low + 100.0,
                )
                self.tell(SettingsChanged(settings=replace(self.settings, migration=migration)))
            case "drain":
                for s in (self.quick, self.plain):
                    s.view.drain(InstanceId(f"i{number}"), self.now)
            case "undrain":
                for s in (self.quick, self.plain):
                    s.view.undrain(InstanceId(f"i{number}"))


@cache
def played(seed: int) -> World:
    world = World(seed)
    for number in range(INSTANCES):
        world.report(number)
    for _ in range(ROUNDS):
        for _ in range(world.dice.randrange(60)):
            world.now += world.dice.choice([0.0, 0.001, 0.02])
            world.step()
        world.tell(Tick())
        world.quick.view.check(world.now)
    return world


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_round_decides_what_one_that_looks_at_all_instances_decides(seed: int) -> None:
    assert played(seed).codes


def test_these_worlds_have_moves_of_all_kinds() -> None:
    codes = sum((played(seed).codes for seed in range(SEEDS)), Counter[MoveCode]())
    assert codes.keys() == {MoveCode.BALANCE, MoveCode.DRAIN, MoveCode.HEADROOM, MoveCode.QUEUE}


@pytest.mark.parametrize(("silent", "codes"), [(True, [MoveCode.HEADROOM]), (False, [])])
def test_headroom_is_taken_where_the_only_other_room_is_silent(
    silent: bool, codes: list[MoveCode]
) -> None:
    migration = MigrationSettings(source_below=30.0, destination_above=60.0, rescues=0)
    scheduler = Scheduler(SchedulerSettings(migration=migration))

    def tell(now: float, number: int, used: int, urgent: int, normal: int, **more: int) -> None:
        report = LoadReport(
            instance=InstanceId(f"i{number}"),
            engine_index=EngineIndex(number),
            sequence=int(now),
            kv_tokens_used=used,
            kv_tokens_total=TOTAL,
            block_tokens=16,
            slots=10,
            classes=(
                ClassLoad(running=urgent),
                ClassLoad(running=normal, waiting=len(more), waiting_tokens=sum(more.values())),
            ),
            **more,
        )
        scheduler.handle(LoadReported(report=report), now)

    tell(1.0, 2, used=0, urgent=0, normal=0)
    now = 2.0 + 2 * STALE_AFTER_S * silent
    tell(now, 0, used=TOTAL - 100, urgent=0, normal=5, head_tokens=1000)
    tell(now, 1, used=TOTAL // 4, urgent=1, normal=5)
    decided = [d.code for d in scheduler.handle(Tick(), now) if isinstance(d, MoveOrder)]
    assert [code for code in decided if code is MoveCode.HEADROOM] == codes
