"""Static batches in virtual time: SCLS and the steps to it as they were published
(core/slices/published.py), beside what llumnix simulates for continuous batching.

Rules
- A batch is padded to its longest request. It computes all prompts in one step, then takes a step
  for each token of its slice, or fewer if all answers end before. A request whose answer has ended
  keeps its place until the batch is over, and its tokens come to the client then.
- After a slice KV is dropped: what is unfinished goes back to a pool with its tokens as prompt.
- Without `max_min` requests go to the instances in turn, and an instance that has nothing to do
  looks at its own pool. With it there is one pool.
- Messages take no time, nothing moves, and nothing is shared.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from llumnix.core.slices.published import (
    INTERVAL_MIN_S,
    SLICE_TOKENS,
    STATIC,
    SliceCost,
    batches,
    interval,
    most,
    offload,
)
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.jobs import Job
from llumnix.sim.model.profile import Profile


@dataclass(slots=True)
class Work:
    """A request that is not finished."""

    job: Job
    made: int = 0  # tokens of its answer

    @property
    def tokens(self) -> int:
        return self.job.prompt + self.made

    @property
    def rest(self) -> int:
        return self.job.answer - self.made


@dataclass(slots=True)
class Instance:
    """What one instance has to do."""

    pool: list[Work] = field(default_factory=list)  # requests that it got by turn
    queue: list[tuple[list[Work], float]] = field(default_factory=list)  # batches, estimates
    load_s: float = 0.0  # by estimate
    busy: bool = False


class StaticModel:
    """The instances of one run. `slots`: places of a batch, summed over its steps; `wasted`: those
    of requests that had ended."""

    def __init__(self, policy: str, profile: Profile, kv_tokens: int, instances: int) -> None:
        self.rules = STATIC[policy]
        self.profile, self.kv_tokens = profile, kv_tokens
        self.cost = SliceCost(
            step_s=profile.step_s,
            request_s=profile.request_s,
            context_s=profile.context_s,
            prompt_s=profile.prompt_s,
            prompt_context_s=profile.prompt_context_s,
            overlap_s=profile.overlap_s,
        )
        self.instances = [Instance() for _ in range(instances)]
        self.pool: list[Work] = []
        self.now = 0.0
        self.slots = self.wasted = 0
        self._limit = 0
        self._slice = SLICE_TOKENS
        self._events: list[tuple[float, int, Any, Any]] = []
        self._count = count()

    def run(self, jobs: Sequence[Job]) -> None:
        """Serves them all."""
        longest = max(job.answer for job in jobs)
        if not self.rules.slices:
            self._slice = longest
        if not self.rules.by_memory:
            # For fear of running out of memory a batch is one of longest requests.
            self._limit = most(max(job.prompt for job in jobs), longest, self.kv_tokens)
        for number, job in enumerate(jobs):
            self._at(job.arrived_s, self._arrive, (Work(job=job), number % len(self.instances)))
        if self.rules.max_min:
            self._at(0.0, self._tick, None)
        while self._events:
            self.now, _, what, value = heapq.heappop(self._events)
            what(value)

    def _at(self, when: float, what: Any, value: Any) -> None:
        heapq.heappush(self._events, (when, next(self._count), what, value))

    def _arrive(self, came: tuple[Work, int]) -> None:
        work, turn = came
        if self.rules.max_min:
            self.pool.append(work)
            return
        instance = self.instances[turn]
        instance.pool.append(work)
        self._go_on(instance)

    def _tick(self, _: None) -> None:
        """Looks at the common pool."""
        if self.pool:
            made = self._cut(self.pool)
            self.pool = []
            loads = [i.load_s for i in self.instances]
            for (batch, estimate), place in zip(
                made, offload([e for _, e in made], loads), strict=True
            ):
                instance = self.instances[place]
                instance.queue.append((batch, estimate))
                instance.load_s += estimate
                self._go_on(instance)
        if self._events or self.pool:
            loads = [i.load_s for i in self.instances]
            after_s = interval(loads) if self.rules.by_load else INTERVAL_MIN_S
            self._at(self.now + after_s, self._tick, None)

    def _cut(self, pool: list[Work]) -> list[tuple[list[Work], float]]:
        """Batches of a pool, with their estimates."""
        if self.rules.sorted:
            pool = sorted(pool, key=lambda w: w.tokens)
            lengths = [w.tokens for w in pool]
            sizes = batches(lengths, self._slice, self.kv_tokens, self.cost, self._limit)
        else:
            sizes = [min(self._limit, len(pool))]
        found, at = [], 0
        for size in sizes:
            batch = pool[at : at + size]
            at += size
            longest = max(w.tokens for w in batch)
            found.append((batch, self.cost.seconds(size, longest, self._slice)))
        return found

    def _go_on(self, instance: Instance) -> None:
        """Begins the next batch, if it does nothing."""
        if instance.busy:
            return
        if not instance.queue and instance.pool:
            made = self._cut(instance.pool)
            taken = sum(len(batch) for batch, _ in made)
            instance.queue = made
            instance.load_s = sum(estimate for _, estimate in made)
            # Unsorted ones are the first of the pool, sorted ones all of it.
            instance.pool = instance.pool[taken:]
        if instance.queue:
            instance.busy = True
            batch, estimate = instance.queue.pop(0)
            steps = min(self._slice, max(w.rest for w in batch))
            self._at(
                self.now + self._seconds(batch, steps),
                self._end,
                (instance, batch, estimate, steps),
            )

    def _seconds(self, batch: list[Work], steps: int) -> float:
        """How long a batch takes."""
        size, length = len(batch), max(w.tokens for w in batch)
        profile = self.profile
        context = size * (steps * length + steps * (steps + 1) / 2)
        decodes = steps * (profile.step_s + profile.request_s * size) + profile.context_s * context
        return profile.step(0, 0, [(length, 0)] * size) + decodes

    def _end(self, what: tuple[Instance, list[Work], float, int]) -> None:
        """A batch is over."""
        instance, batch, estimate, steps = what
        instance.busy = False
        instance.load_s = max(0.0, instance.load_s - estimate)
        for work in batch:
            new = min(steps, work.rest)
            self.slots += steps
            self.wasted += steps - new
            work.made += new
            job = work.job
            job.got = work.made
            if job.first_s is None:
                job.first_s = self.now
            if not work.rest:
                job.ended_s = self.now
            elif self.rules.max_min:
                self.pool.append(work)
            else:
                instance.pool.append(work)
        self._go_on(instance)


def serve_static(
    policy: str, jobs: Sequence[Job], profile: Profile, engine: EngineOptions, instances: int
) -> dict[str, Any]:
    """Serves the requests by a published policy. Returns the figures that those of the requests do
    not say."""
    model = StaticModel(policy, profile, engine.kv_tokens or profile.kv_tokens, instances)
    model.run(jobs)
    return {
        "fragmentation_blocked": {"mean": None},
        "fragmentation": {"mean": None},
        "kv_used": {"mean": None},
        "instances_mean": instances,
        "preemptions": 0,
        "migrations": 0,
        "virtual_s": max(job.ended_s or 0.0 for job in jobs),
        "slots_wasted": model.wasted / max(1, model.slots - model.wasted),
    }
