"""A cluster in virtual time that hosts the real scheduler: engines that batch, queue, preempt and
move requests by simple rules, for claims about policies in seconds."""

import heapq
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from llumnix.core.events import (
    Dispatch,
    InstanceLost,
    LoadReported,
    MoveLoad,
    RequestArrived,
    Tick,
)
from llumnix.core.load import ClassLoad, LoadReport
from llumnix.core.policies.victim import Candidate, choose_victim
from llumnix.core.scheduler import Scheduler
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId

BLOCK = 16


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request: what it is, and how far it is. Times in seconds, lengths in tokens."""

    id: RequestId
    arrived_s: float
    prompt: int
    answer: int
    priority: int = 0
    queued_as: int = 0
    done: int = 0
    computed: bool = False
    where: int = -1
    moving: bool = False
    first_s: float | None = None
    ended_s: float | None = None
    preempted_s: float | None = None
    lost_s: float = 0.0
    preemptions: int = 0
    moves: int = 0
    rests_until_s: float = 0.0

    @property
    def turn(self) -> tuple[int, bool, float]:
        """Who is served first and preempted last."""
        return self.queued_as, not self.preemptions, self.arrived_s

    @property
    def tokens(self) -> int:
        """KV that it holds or needs, in whole blocks."""
        return -(-(self.prompt + self.done + 1) // BLOCK) * BLOCK


@dataclass(slots=True, kw_only=True, eq=False)
class Engine:
    """One instance."""

    index: int
    total: int
    running: list[Job] = field(default_factory=list)
    queue: list[Job] = field(default_factory=list)
    reserved: dict[RequestId, int] = field(default_factory=dict)
    leaving: dict[RequestId, Job] = field(default_factory=dict)
    accepting: bool = True
    alive: bool = True
    stepping: bool = False
    sequence: int = 0
    admitted: list[RequestId] = field(default_factory=list)
    orders: list[OrderId] = field(default_factory=list)
    preemptions: int = 0
    steps: int = 0
    steps_s: float = 0.0
    finished: int = 0
    finished_tokens: int = 0
    moved_bytes: int = 0
    moved_s: float = 0.0

    @property
    def name(self) -> InstanceId:
        return InstanceId(f"i{self.index:04}")

    @property
    def used(self) -> int:
        return sum(j.tokens for j in self.running) + sum(self.reserved.values())

    @property
    def free(self) -> int:
        return self.total - self.used


class ToyCluster:
    """`step_s`: of an empty step; `batch_s`: more for each request; `context_s`: for each token of
    KV; `prompt_s`: for each token of a prompt; `copy_s`: to move one token, `stop_s` to move at
    all. The defaults are about LLaMA-7B's on an A10."""

    def __init__(
        self,
        settings: SchedulerSettings,
        instances: int,
        total: int = 13616,
        *,
        step_s: float = 0.022,
        batch_s: float = 0.0002,
        context_s: float = 1.9e-6,
        prompt_s: float = 0.00028,
        copy_s: float = 2e-4,
        stop_s: float = 0.03,
        slots: int = 256,
    ) -> None:
        self.scheduler = Scheduler(settings)
        self.settings = settings
        self.now = 0.0
        self.engines = [Engine(index=i, total=total) for i in range(instances)]
        self.jobs: list[Job] = []
        self.moves: list[tuple[float, MoveLoad, Job]] = []
        self.orders = 0
        self.orders_seen: list[MoveLoad] = []
        self.samples: list[list[int]] = []
        self.fragmented: list[float] = []
        self._cost = (step_s, batch_s, context_s, prompt_s, copy_s, stop_s)
        self._slots = slots
        self._events: list[tuple[float, int, Any]] = []
        self._count = 0
        self._open = 0
        self._backlog: deque[Job] = deque()

    # -- driving it

    def submit(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.jobs.append(job)
            self._open += 1
            self._at(job.arrived_s, ("arrive", job))

    def drain(self, index: int, at_s: float) -> None:
        self._at(at_s, ("drain", index))

    def kill(self, index: int, at_s: float) -> None:
        self._at(at_s, ("kill", index))

    def run(self, until_s: float = 1e9) -> "ToyCluster":
        for engine in self.engines:
            self._report(engine)
        self._at(self.now, ("tick", None))
        while self._events and self._open and self.now < until_s:
            self.now, _, (kind, what) = heapq.heappop(self._events)
            getattr(self, "_" + kind)(what)
        return self

    def _at(self, when_s: float, what: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (when_s, self._count, what))

    # -- events

    def _arrive(self, job: Job) -> None:
        fact = RequestArrived(request=job.id, prompt_tokens=job.prompt, priority=job.priority)
        (decision,) = self.scheduler.handle(fact, self.now)
        if not isinstance(decision, Dispatch):
            self._backlog.append(job)
            return
        engine = self.engines[decision.engine_index]
        job.queued_as = job.priority
        engine.admitted.append(job.id)
        self._enqueue(engine, job)

    def _enqueue(self, engine: Engine, job: Job) -> None:
        job.where = engine.index
        engine.queue.append(job)
        engine.queue.sort(key=lambda j: j.turn)
        self._report(engine)
        self._wake(engine)

    def _wake(self, engine: Engine) -> None:
        if not engine.stepping and engine.alive and (engine.running or engine.queue):
            engine.stepping = True
            self._at(self.now, ("step", engine))

    def _step(self, engine: Engine) -> None:
        if not engine.alive:
            return
        step_s, batch_s, context_s, prompt_s, _, _ = self._cost
        self._age(engine)
        new = self._admit(engine)
        # A batch with new prompts computes those alone, as vLLM without chunked prefill does.
        seconds = step_s
        if new:
            seconds += prompt_s * sum(j.prompt + j.done for j in new)
        else:
            self._make_room(engine)
            seconds += batch_s * len(engine.running)
            seconds += context_s * sum(j.tokens for j in engine.running)
        if not engine.running:
            engine.stepping = False
            self._report(engine)
            return
        self._at(self.now + seconds, ("stepped", (engine, new or list(engine.running), seconds)))

    def _admit(self, engine: Engine) -> list[Job]:
        new: list[Job] = []
        while engine.queue and len(engine.running) < self._slots:
            job = engine.queue[0]
            if job.tokens > engine.free:
                break
            engine.running.append(engine.queue.pop(0))
            new.append(job)
        return new

    def _age(self, engine: Engine) -> None:
        priorities = self.scheduler.view.priorities
        for job in engine.queue:
            job.queued_as = priorities.aged(job.priority, self.now - job.arrived_s)
        engine.queue.sort(key=lambda j: j.turn)

    def _make_room(self, engine: Engine) -> None:
        """Room for one more token of each, by preempting the least urgent, the youngest first."""
        while True:
            need = sum(BLOCK for j in engine.running if (j.prompt + j.done + 1) % BLOCK == 0)
            if need <= engine.free or not engine.running:
                return
            victim = max(engine.running, key=lambda j: j.turn)
            engine.running.remove(victim)
            engine.leaving.pop(victim.id, None)
            victim.moving = victim.computed = False
            victim.preempted_s = self.now
            victim.preemptions += 1
            engine.preemptions += 1
            engine.queue.append(victim)
            engine.queue.sort(key=lambda j: j.turn)

    def _stepped(self, what: tuple[Engine, list[Job], float]) -> None:
        engine, batch, seconds = what
        if not engine.alive:
            return
        engine.steps += 1
        engine.steps_s += seconds
        for job in batch:
            if job not in engine.running:
                continue
            if job.preempted_s is not None:
                job.lost_s += self.now - job.preempted_s
                job.preempted_s = None
            job.computed = True
            job.done += 1
            if job.first_s is None:
                job.first_s = self.now
            if job.done >= job.answer:
                self._end(engine, job)
        self._report(engine)
        self._at(self.now, ("step", engine))

    def _end(self, engine: Engine, job: Job) -> None:
        job.ended_s = self.now
        engine.running.remove(job)
        engine.leaving.pop(job.id, None)
        engine.finished += 1
        engine.finished_tokens += job.done
        self._open -= 1

    def _tick(self, _: None) -> None:
        for engine in self.engines:
            if engine.alive and not engine.running:
                self._report(engine)
        self.samples.append([e.used for e in self.engines])
        self.fragmented.append(self.fragmentation())
        for decision in self.scheduler.handle(Tick(), self.now):
            assert isinstance(decision, MoveLoad)
            self._order(decision)
        self._at(self.now + self.settings.migration.tick_s, ("tick", None))

    def _order(self, order: MoveLoad) -> None:
        self.orders += 1
        self.orders_seen.append(order)
        source = self.engines[order.source_engine]
        destination = self.engines[order.destination_engine]
        source.orders.append(order.order)
        victim = choose_victim(self.candidates(source), order.limits)
        if victim is not None and destination.alive:
            job = next(j for j in source.running + source.queue if j.id == victim.request)
            assert not job.moving, "two moves of one request at once"
            self._move(source, destination, job, victim, order)
        self._report(source)

    def candidates(self, engine: Engine) -> list[Candidate]:
        rank = self.scheduler.view.priorities.rank
        return [
            Candidate(
                request=j.id,
                rank=rank(j.priority),
                tokens=j.tokens,
                waiting=j in engine.queue,
                resting=j.moving
                or self.now < j.rests_until_s
                or (j in engine.running and not j.computed),
            )
            for j in engine.queue[:8] + engine.running
        ]

    def _move(
        self, source: Engine, destination: Engine, job: Job, victim: Candidate, order: MoveLoad
    ) -> None:
        _, _, _, _, copy_s, stop_s = self._cost
        self.moves.append((self.now, order, job))
        if victim.waiting:
            source.queue.remove(job)
            job.moves += 1
            job.rests_until_s = self.now + 10 * stop_s
            self._enqueue(destination, job)
            return
        if job.tokens + 3 * BLOCK > destination.free:
            return
        destination.reserved[job.id] = job.tokens + 3 * BLOCK
        source.leaving[job.id] = job
        job.moving = True
        seconds = copy_s * job.tokens + stop_s
        source.moved_bytes += job.tokens
        source.moved_s += copy_s * job.tokens
        self._at(self.now + seconds, ("moved", (source, destination, job, seconds)))
        self._report(destination)

    def _moved(self, what: tuple[Engine, Engine, Job, float]) -> None:
        source, destination, job, seconds = what
        destination.reserved.pop(job.id, None)
        if job.id in source.leaving and source.alive and destination.alive:
            source.running.remove(job)
            del source.leaving[job.id]
            job.moving = False
            job.moves += 1
            job.where = destination.index
            job.rests_until_s = self.now + self.settings.migration.payback * seconds
            if job.tokens <= destination.free:
                destination.running.append(job)
            else:
                job.computed, job.preempted_s = False, self.now
                destination.queue.append(job)
            self._wake(destination)
        job.moving = False
        source.leaving.pop(job.id, None)
        self._report(source)
        self._report(destination)

    def _drain(self, index: int) -> None:
        self.engines[index].accepting = False
        self._report(self.engines[index])

    def _kill(self, index: int) -> None:
        engine = self.engines[index]
        engine.alive = False
        lost = InstanceLost(instance=engine.name, engine_index=EngineIndex(index))
        self.scheduler.handle(lost, self.now)
        for job in engine.running + engine.queue:
            job.moving = False
            self._open -= 1
        engine.running, engine.queue = [], []

    # -- what it reports

    def _report(self, engine: Engine) -> None:
        if not engine.alive:
            return
        rank = self.scheduler.view.priorities.rank
        classes = [[0, 0, 0] for _ in self.scheduler.view.priorities.classes]
        for job in engine.running:
            classes[rank(job.priority)][0] += 1
        for job in engine.queue:
            classes[rank(job.priority)][1] += 1
            classes[rank(job.priority)][2] += job.tokens
        engine.sequence += 1
        report = LoadReport(
            instance=engine.name,
            engine_index=EngineIndex(engine.index),
            sequence=engine.sequence,
            kv_tokens_used=engine.used,
            kv_tokens_total=engine.total,
            block_tokens=BLOCK,
            slots=self._slots,
            classes=tuple(
                ClassLoad(running=r, waiting=w, waiting_tokens=t, waiting_prefill=t)
                for r, w, t in classes
            ),
            head_tokens=engine.queue[0].tokens if engine.queue else 0,
            admitted=tuple(engine.admitted),
            accepting=engine.accepting,
            moving_out=len(engine.leaving),
            moving_out_tokens=sum(j.tokens for j in engine.leaving.values()),
            moving_in=len(engine.reserved),
            orders=tuple(engine.orders),
            kv_token_bytes=1,
            preemptions=engine.preemptions,
            steps=engine.steps,
            steps_s=engine.steps_s,
            finished=engine.finished,
            finished_tokens=engine.finished_tokens,
            moved_bytes=engine.moved_bytes,
            moved_s=engine.moved_s,
        )
        engine.admitted, engine.orders = [], []
        self.scheduler.handle(LoadReported(report=report), self.now)

    def fragmentation(self) -> float:
        """Share of the memory that is free, though it would hold a request that waits."""
        heads = sorted(e.queue[0].tokens for e in self.engines if e.queue)
        free = sum(e.free for e in self.engines if e.alive)
        served = wasted = 0
        for head in heads:
            if served + head > free:
                break
            served += head
            wasted += head
        return wasted / max(1, sum(e.total for e in self.engines))


def poisson(
    rate: float, count: int, lengths: Any, seed: int, high: float = 0.0, cv: float = 1.0
) -> list[Job]:
    """`count` requests at `rate` a second with Gamma gaps of that `cv`; `lengths(random)` gives
    prompt and answer; a share `high` is urgent."""
    dice = random.Random(seed)
    now, jobs = 0.0, []
    for n in range(count):
        now += dice.gammavariate(1 / cv**2, cv**2 / rate)
        prompt, answer = lengths(dice)
        priority = -100 if dice.random() < high else 0
        jobs.append(
            Job(
                id=RequestId(f"r{n}"),
                arrived_s=now,
                prompt=prompt,
                answer=answer,
                priority=priority,
            )
        )
    return jobs
