"""The simulated runs that `test_recorded_runs.py` compares with their records.

Together they reach every policy, priorities, shared prefixes, memory that runs out, scaling, drains
and faults, each with as many moves as a short run can have. Their profile stands here and not in
`profiles/`, so that a better fit of a profile changes no record.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llumnix.core.settings import (
    MigrationSettings,
    PriorityClass,
    PrioritySettings,
    ScalingSettings,
    SchedulerSettings,
)
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.faults import Faults
from llumnix.sim.model.jobs import Job
from llumnix.sim.model.profile import Profile
from llumnix.sim.simulate import Spec

PROFILE = Profile(
    name="recorded",
    text="For recorded runs only.",
    step_s=0.022,
    request_s=0.001,
    context_s=2.2e-6,
    prompt_s=0.000213,
    prompt_context_s=7.6e-9,
    overlap_s=0.018,
    kv_tokens=4096,
    kv_token_bytes=524288,
    stop_s=0.005,
    start_s=5.0,
)
SLOW_LINKS = replace(PROFILE, link_bytes_s=1.5e8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run that is recorded."""

    spec: Spec
    trace: tuple[dict[str, Any], ...] = ()  # rows of a file of requests, instead of `spec.trace`
    priorities: tuple[int, ...] = ()  # of the requests, in turn; () leaves those of the trace
    drains: tuple[tuple[float, str], ...] = ()  # a user drains this instance at this time (s)

    def jobs(self) -> list[Job]:
        """The requests, in order of arrival."""
        found = self.spec
        with TemporaryDirectory() as folder:
            if self.trace:
                path = Path(folder) / "trace.jsonl"
                path.write_text("\n".join(map(json.dumps, self.trace)))
                found = replace(found, trace=str(path), requests=len(self.trace))
            jobs = found.jobs()
        for number, job in enumerate(jobs if self.priorities else ()):
            job.priority = self.priorities[number % len(self.priorities)]
        return jobs


def scheduler(policy: str = "llumnix", **changes: Any) -> SchedulerSettings:
    return SchedulerSettings(policy=policy, **changes)


def spec(**changes: Any) -> Spec:
    """The trace M-M at half its lengths, in bursts, on four instances. `changes` are fields."""
    return Spec(
        **{
            "scheduler": scheduler(),
            "profile": PROFILE,
            "engine": EngineOptions(),
            "instances": 4,
            "start_s": None,
            "trace": "M-M",
            "rate_per_s": 14.0,
            "requests": 300,
            "seed": 0,
            "cv": 2.0,
            "scale": 0.5,
            **changes,
        }
    )


def conversations(count: int, turns: int, seed: int) -> tuple[dict[str, Any], ...]:
    """Conversations whose every turn has all turns before it as its prefix; four system prompts."""
    dice = random.Random(f"{seed} conversations")
    rows = []
    for number in range(count):
        at_s, ids, tokens = dice.uniform(0, 30), [f"system {number % 4}"], [384]
        for turn in range(turns):
            ids, tokens = [*ids, f"{number} {turn}"], [*tokens, dice.randrange(16, 240)]
            answer = dice.randrange(8, 120)
            lengths = {"input_tokens": sum(tokens) + 3, "output_tokens": answer}
            rows.append({"arrival_s": at_s, **lengths, "hash_ids": ids, "hash_tokens": tokens})
            at_s += dice.uniform(1, 12)
    return tuple(sorted(rows, key=lambda row: row["arrival_s"]))


def tides(seed: int) -> tuple[dict[str, Any], ...]:
    """Three waves of requests: the second comes as the first ends, the third much later."""
    dice = random.Random(f"{seed} tides")
    times = (began_s + dice.uniform(0, 15) for began_s in (0, 55, 220) for _ in range(90))
    return tuple(
        {
            "arrival_s": at_s,
            "input_tokens": dice.randrange(16, 400),
            "output_tokens": dice.randrange(16, 400),
        }
        for at_s in sorted(times)
    )


THREE_CLASSES = PrioritySettings(
    classes=(
        PriorityClass(name="urgent", priority=-100, headroom=0.6),
        PriorityClass(name="soon", priority=-50, headroom=0.2),
        PriorityClass(name="normal", priority=0),
    ),
    aging_s=4.0,
)
MANY_MOVES = MigrationSettings(
    source_below=40.0,
    destination_above=80.0,
    moves_max=3,
    gain_min=1.0,
    interval_s=0.02,
    min_stay=1.0,
)
MOST_MOVES = replace(
    MANY_MOVES, source_below=500.0, destination_above=500.0, gain_min=0.0, min_stay=0.0
)
SCALES = ScalingSettings(
    instances_min=1, instances_max=5, up_after_s=1.0, down_after_s=4.0, cooldown_s=2.0
)

RUNS = {
    "llumnix": Case(spec=spec(rate_per_s=24.0, requests=400)),
    "llumnix_base": Case(
        spec=spec(scheduler=scheduler("llumnix-base"), high_share=0.2, seed=1, rate_per_s=20.0)
    ),
    "infaas": Case(spec=spec(scheduler=scheduler("infaas++"), seed=2, high_share=0.1)),
    "least_loaded": Case(
        spec=spec(
            scheduler=scheduler("least-loaded"),
            engine=EngineOptions(chunked=False),
            rate_per_s=4.0,
        )
    ),
    "round_robin": Case(spec=spec(scheduler=scheduler("round-robin"), seed=3)),
    "cache_aware": Case(
        spec=spec(scheduler=scheduler("cache-aware"), scale=1.0, cv=None, rate_per_s=None),
        trace=conversations(60, 5, 0),
    ),
    "prefixes": Case(
        spec=spec(scale=1.0, cv=None, rate_per_s=9.0, high_share=0.1),
        trace=conversations(60, 5, 1),
    ),
    "priorities": Case(
        spec=spec(scheduler=scheduler(priorities=THREE_CLASSES), seed=4, rate_per_s=10.0),
        priorities=(0, -50, 0, 0, -100, 0, -70),
    ),
    "memory_short": Case(
        spec=spec(
            trace="L-L",
            engine=EngineOptions(kv_tokens=1536, budget=256),
            instances=6,
            rate_per_s=5.0,
            requests=250,
            seed=5,
        )
    ),
    "few_slots": Case(
        spec=spec(scheduler=scheduler(migration=MANY_MOVES), engine=EngineOptions(slots=6), seed=6)
    ),
    "scaling": Case(
        spec=spec(
            scheduler=scheduler(scaling=SCALES),
            profile=SLOW_LINKS,
            instances=1,
            scale=1.0,
            cv=None,
            rate_per_s=None,
        ),
        trace=tides(0),
    ),
    "drains": Case(
        spec=spec(
            profile=SLOW_LINKS,
            engine=EngineOptions(kv_tokens=2048),
            requests=200,
            rate_per_s=8.0,
            seed=7,
        ),
        drains=((4.0, "i1"), (4.0, "i3"), (15.0, "i0")),
    ),
    "faults": Case(
        spec=spec(
            faults=Faults(instance_s=3, controller_s=8, client_s=1, link=0.08),
            instances=3,
            high_share=0.1,
            seed=8,
        )
    ),
    "faults_moving": Case(
        spec=spec(
            scheduler=scheduler(migration=MOST_MOVES),
            profile=replace(SLOW_LINKS, hop_s=0.03),
            engine=EngineOptions(slots=6),
            faults=Faults(instance_s=0.7, client_s=1, link=0.1),
            start_s=0.5,
            instances=6,
            rate_per_s=20.0,
            scale=0.8,
            seed=10,
        )
    ),
    "faults_scaling": Case(
        spec=spec(
            scheduler=scheduler(scaling=replace(SCALES, down_after_s=1.0, cooldown_s=0.0)),
            profile=SLOW_LINKS,
            engine=EngineOptions(chunked=False, prefix_caching=False),
            faults=Faults(instance_s=10, client_s=2, link=0.15),
            instances=2,
            rate_per_s=8.0,
            scale=0.8,
            cv=4.0,
            seed=10,
        )
    ),
}
