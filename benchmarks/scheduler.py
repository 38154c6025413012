"""What the scheduler's decisions cost, by the number of instances: pure core, one core, no I/O.

    python benchmarks/scheduler.py [--instances 16,64,256,1024] [--json] [--out FILE]

Instances have random loads, half of them short of memory. A dispatch is timed amid the facts of a
busy cluster: for each of 10,000 requests a second there comes one report of some instance, so that
what a dispatch finds has always just changed. All prompts begin with the same 512 tokens, half of
them go on with a conversation; an instance says with its report which blocks its prefix cache has
since, and which others went for them. A pairing round is timed after every tick's worth of
them, and its orders are answered by the next reports, so that each round has work to do.
"""

import argparse
import gc
import json
import random
import time
from pathlib import Path
from typing import Any

from common import percentile, write_result
from llumnix.core.events import (
    Dispatch,
    LoadReported,
    MoveOrder,
    PrefixesChanged,
    RequestArrived,
    Tick,
)
from llumnix.core.prefixes import BLOCK_TOKENS
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId

TOTAL = 13616
RATE = 10_000
TICK_S = 0.05
ROUNDS = 60
COMMON = tuple(range(1, 1 + 512 // BLOCK_TOKENS))
TALKS = 50_000
"""Conversations; there are more than the caches hold."""


class Cluster:
    """Instances that report random loads, and name what they were given in the next report."""

    def __init__(self, instances: int, policy: str, seed: int) -> None:
        self.dice = random.Random(seed)
        self.scheduler = Scheduler(SchedulerSettings(policy=policy))
        self.instances = instances
        self.now = 0.0
        self.sequence = 0
        self.requests = self.hits = 0
        self.admitted: dict[int, list[RequestId]] = {}
        self.orders: dict[int, list[OrderId]] = {}
        self.talks: dict[int, tuple[int, ...]] = {}
        self.blocks = len(COMMON)
        # What each instance's cache has, the oldest first, and what is new there.
        self.caches: list[dict[int, None]] = [{} for _ in range(instances)]
        self.fresh: list[list[int]] = [[] for _ in range(instances)]
        for number in range(instances):
            self.report(number)

    def report(self, number: int) -> None:
        """One instance's next report."""
        self.sequence += 1
        short = self.dice.random() < 0.5
        used = self.dice.randrange(TOTAL - 900, TOTAL) if short else self.dice.randrange(9000)
        running = self.dice.randrange(10, 40)
        waiting = self.dice.randrange(3) if short else 0
        high = int(self.dice.random() < 0.1)
        report = LoadReport(
            instance=InstanceId(f"i{number:04}"),
            engine_index=EngineIndex(number),
            sequence=self.sequence,
            kv_tokens_used=used,
            kv_tokens_total=TOTAL,
            block_tokens=16,
            slots=256,
            classes=(
                ClassLoad(running=high),
                ClassLoad(
                    running=running,
                    waiting=waiting,
                    waiting_tokens=600 * waiting,
                    waiting_prefill=600 * waiting,
                ),
            ),
            head_tokens=600 * bool(waiting),
            admitted=tuple(self.admitted.pop(number, ())),
            orders=tuple(self.orders.pop(number, ())),
            kv_token_bytes=2**19,
            steps=self.sequence,
            steps_s=self.sequence * 0.03,
            finished=self.sequence,
            finished_tokens=self.sequence * 400,
        )
        self.scheduler.handle(LoadReported(report=report), self.now)
        if self.fresh[number]:
            self.tell(number)

    def tell(self, number: int) -> None:
        """What changed in one instance's prefix cache."""
        cache, stored = self.caches[number], []
        for block in self.fresh[number]:
            if block not in cache:
                stored.append(block)
            cache[block] = cache.pop(block, None)
        self.fresh[number] = []
        removed = list(cache)[: max(0, len(cache) - TOTAL // BLOCK_TOKENS)]
        for block in removed:
            del cache[block]
        fact = PrefixesChanged(
            instance=InstanceId(f"i{number:04}"),
            engine_index=EngineIndex(number),
            stored=tuple(stored),
            removed=tuple(removed),
        )
        self.scheduler.handle(fact, self.now)

    def prompt(self) -> tuple[int, tuple[int, ...]]:
        """The next prompt: its length in tokens, and its blocks."""
        talk = self.dice.randrange(2 * TALKS)
        before = self.talks.get(talk, COMMON) if talk < TALKS else COMMON
        new = self.dice.randrange(20, 2000)
        end = self.blocks + new // BLOCK_TOKENS
        blocks = (*before, *range(self.blocks + 1, end + 1))
        self.blocks = end
        if talk < TALKS:
            # Too long a one begins anew.
            self.talks[talk] = blocks if len(blocks) < 100 else COMMON
        return len(before) * BLOCK_TOKENS + new, blocks

    def arrive(self) -> float:
        """One request: returns the seconds that its dispatch took."""
        self.requests += 1
        tokens, blocks = self.prompt()
        fact = RequestArrived(
            request=RequestId(f"r{self.requests}"),
            prompt_tokens=tokens,
            prefix=blocks,
            priority=-100 if self.dice.random() < 0.1 else 0,
        )
        began = time.perf_counter()
        (decision,) = self.scheduler.handle(fact, self.now)
        took = time.perf_counter() - began
        assert isinstance(decision, Dispatch)
        self.hits += "in its cache" in decision.why
        self.admitted.setdefault(decision.engine_index, []).append(fact.request)
        # The last first: the end of a prompt is the first to go.
        self.fresh[decision.engine_index] += reversed(blocks)
        return took

    def tick(self) -> tuple[float, int]:
        """One round of pairing: the seconds it took, and its orders."""
        began = time.perf_counter()
        decisions = self.scheduler.handle(Tick(), self.now)
        took = time.perf_counter() - began
        for decision in decisions:
            assert isinstance(decision, MoveOrder)
            self.orders.setdefault(decision.source_engine, []).append(decision.order)
        return took, len(decisions)


def measure(instances: int, policy: str, seed: int) -> dict[str, Any]:
    """One row: microseconds a dispatch, milliseconds a round."""
    cluster = Cluster(instances, policy, seed)
    dispatch_s: list[float] = []
    pairing_s: list[float] = []
    orders = facts = 0
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for _ in range(int(RATE * TICK_S)):
            cluster.now += 1 / RATE
            cluster.report(cluster.dice.randrange(instances))
            dispatch_s.append(cluster.arrive())
            facts += 2
        took, count = cluster.tick()
        pairing_s.append(took)
        orders += count
        if policy == "llumnix":
            # Whoever was given an order answers before the next round.
            for number in list(cluster.orders):
                cluster.report(number)
    wall_s = time.perf_counter() - began
    return {
        "instances": instances,
        "policy": policy,
        "dispatch_us": _spread(dispatch_s, 1e6),
        "pairing_ms": _spread(pairing_s, 1e3),
        "orders_a_round": orders / ROUNDS,
        "facts_a_second": round(facts / wall_s),
        "hits": cluster.hits / cluster.requests,
    }


def _spread(seconds: list[float], unit: float) -> dict[str, float]:
    return {
        "p50": round(percentile(seconds, 0.5) * unit, 2),
        "p99": round(percentile(seconds, 0.99) * unit, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", default="16,64,256,1024")
    parser.add_argument("--policy", default="llumnix")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print nothing but JSON")
    parser.add_argument("--out", type=Path, help="write the raw figures there too")
    args = parser.parse_args()
    gc.freeze()
    rows = [measure(int(n), args.policy, args.seed) for n in args.instances.split(",")]
    if args.out is not None:
        write_result(args.out, rows)
    if args.json:
        print(json.dumps({"rows": rows}))
        return
    print("instances  dispatch us p50/p99  pairing ms p50/p99  orders a round  facts/s")
    for row in rows:
        d, p = row["dispatch_us"], row["pairing_ms"]
        print(
            f"{row['instances']:9}  {d['p50']:8.1f} {d['p99']:9.1f}  {p['p50']:8.2f} "
            f"{p['p99']:8.2f}  {row['orders_a_round']:14.1f}  {row['facts_a_second']:7}"
        )


if __name__ == "__main__":
    main()
