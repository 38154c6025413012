"""Continuous batching in virtual time: queue, batch, KV memory, preemption, steps.

Rules, as vLLM 0.32 has them with priority scheduling
- A step has `budget` tokens. First the running requests get theirs, in the order in which they
  began; for one that finds no block free, the least urgent of them is preempted, the youngest
  first. If that is itself, the step ends with what it has so far; an empty step takes no time.
- A preempted request gives up its KV and is queued again. A step that preempts starts none.
- Then, while there are slots: requests that came with their KV, then the queue by priority and
  arrival. The head starts only if blocks for all its tokens are free, and if it has to wait, all
  wait. It takes blocks for what it computes in the step.
- `chunked`: prompts share steps with others and are cut to the budget. Without, a step computes
  waiting prompts alone, whole, as older versions do.
- llumnix's own queueing (engine/queueing.py): a request that waited for long is queued as the most
  urgent, a preempted one goes before those of its class that have not started.
- llumnix's own preemption (engine/urgent.py): running requests of less urgent classes are preempted
  for a head of the queue that could not start in this step.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from llumnix.core.priorities import AGING_LOOK_EVERY_S, Priorities, QueueKey
from llumnix.core.reports import ClassLoad
from llumnix.core.types import RequestId
from llumnix.sim.model.jobs import Job, Sequence, Token
from llumnix.sim.model.memory import Memory
from llumnix.sim.model.profile import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """vLLM's flags. `kv_tokens`: 0 for the profile's."""

    kv_tokens: int = 0
    budget: int = 2048
    slots: int = 256
    chunked: bool = True
    prefix_caching: bool = True


@dataclass(slots=True, kw_only=True)
class Batch:
    """One step, and how long it takes."""

    scheduled: list[tuple[Sequence, int]]  # requests, each with the tokens to compute
    seconds: float


class Batching:
    """One engine's requests, and the steps that serve them."""

    def __init__(self, profile: Profile, options: EngineOptions, priorities: Priorities) -> None:
        self.block_tokens = profile.block_tokens
        self.profile = profile
        self.options = options
        total = (options.kv_tokens or profile.kv_tokens) // profile.block_tokens
        self.memory = Memory(total, caching=options.prefix_caching)
        self.requests: dict[RequestId, Sequence] = {}
        self.running: list[Sequence] = []
        self.holding: list[Sequence] = []
        self.preemptions = 0
        self.finished = 0
        self.finished_tokens = 0
        self.steps = 0
        self.steps_s = 0.0
        self._priorities = priorities
        self._queue: list[tuple[QueueKey, int, Sequence]] = []
        self._count = 0
        self._next_look_s = 0.0
        self._classes: tuple[ClassLoad, ...] | None = None
        self._pinned_blocks: dict[RequestId, int] = {}

    # -- what a frontend does

    def add(self, job: Job, now: float) -> None:
        """A new request."""
        seq = Sequence(job=job, turn=QueueKey(job.priority, job.arrived_s), queued_s=now)
        self.requests[job.id] = seq
        self._enqueue(seq)

    def abort(self, request: RequestId) -> None:
        """Its client hung up, or another engine has it."""
        seq = self.requests.get(request)
        if seq is not None:
            self._finish(seq)

    # -- steps

    def schedule(self, now: float) -> Batch | None:
        """The next step, or None if there is nothing to do."""
        if self._queue and now >= self._next_look_s:
            self._look(now)
        self._make_room(now)
        scheduled: list[tuple[Sequence, int]] = []
        if not self.options.chunked and (self._queue or self.holding):
            self._admit(scheduled, self.options.budget, now)
            if any(new > 1 for _, new in scheduled):
                return self._batch(scheduled)
            scheduled.clear()  # They came with their KV, and run with the others.
        before = self.preemptions
        budget = self._run(scheduled, now)
        if self.preemptions > before and not scheduled:
            return self.schedule(now)  # A step with nothing in it is over at once.
        if self.preemptions == before and (self._queue or self.holding):
            self._admit(scheduled, budget, now)
        return self._batch(scheduled) if scheduled else None

    def land(self, batch: Batch, now: float) -> list[Token]:
        """The step is over. Returns the tokens that it brought."""
        self.steps += 1
        self.steps_s += batch.seconds
        said = []
        for seq, new in batch.scheduled:
            seq.computed += new
            if seq.computed < seq.job.prompt + seq.outputs:
                continue
            if not seq.outputs and seq.job.prefix:
                self._publish(seq)
            seq.outputs += 1
            job = seq.job
            if job.preempted_s is not None:
                job.lost_s += now - job.preempted_s
                job.preempted_s = None
            over = seq.outputs >= job.answer
            said.append((job.id, over))
            if over:
                self.finished += 1
                self.finished_tokens += seq.outputs
                self._finish(seq)
        return said

    def _run(self, scheduled: list[tuple[Sequence, int]], now: float) -> int:
        """Tokens for those that run; returns what is left of the budget."""
        budget, block, memory = self.options.budget, self.block_tokens, self.memory
        place = 0
        running = self.running
        while place < len(running) and budget > 0:
            seq = running[place]
            new = seq.job.prompt + seq.outputs - seq.computed
            if new > budget:
                new = budget
            need = -(-(seq.computed + new) // block) - seq.blocks
            if need > 0:
                while need > memory.free:
                    victim = max(running, key=lambda s: s.turn)
                    victim_index = running.index(victim)
                    for number, (other, count) in enumerate(scheduled):
                        if other is victim:
                            budget += count
                            del scheduled[number]
                            break
                    self._preempt(victim, now)
                    if victim is seq:
                        return budget  # vLLM leaves the step at what it has so far.
                    if victim_index < place:
                        place -= 1
                memory.take(need)
                seq.blocks += need
            scheduled.append((seq, new))
            budget -= new
            place += 1
        return budget

    def _admit(self, scheduled: list[tuple[Sequence, int]], budget: int, now: float) -> int:
        """Starts those that wait; returns what is left of the budget."""
        block, memory = self.block_tokens, self.memory
        while budget > 0 and len(self.running) < self.options.slots:
            if self.holding:
                seq = self.holding[0]
                shared = private_blocks = 0
            elif self._queue:
                seq = self._queue[0][2]
                shared, private_blocks = self._hits(seq)
            else:
                break
            found = seq.computed + (shared * seq.job.prefix_blocks + private_blocks) * block
            new = seq.tokens - found
            if new > budget:
                if not self.options.chunked:
                    # Older versions want a budget of the longest prompt. Here none is stuck.
                    if scheduled:
                        break
                    budget = new
                new = min(new, budget)
            ids = seq.job.prefix[:shared]
            idle = memory.idle(ids) * seq.job.prefix_blocks + private_blocks
            held_blocks = seq.blocks + shared * seq.job.prefix_blocks + private_blocks
            if -(-seq.tokens // block) - held_blocks + idle > memory.free:
                break
            if self.holding:
                self.holding.pop(0)
            else:
                self._queue.pop(0)
                memory.hold(ids, seq.job.prefix_blocks)
                memory.take_back(private_blocks)
                seq.held = list(ids)
                seq.blocks, seq.computed, seq.freed_blocks = held_blocks, found, None
            need = -(-(seq.computed + new) // block) - seq.blocks
            if need > 0:
                memory.take(need)
                seq.blocks += need
            seq.running = True
            self.running.append(seq)
            self._classes = None
            scheduled.append((seq, new))
            budget -= new
        return budget

    def _make_room(self, now: float) -> None:
        """Preempts less urgent requests if the head of the queue could not start otherwise."""
        priorities = self._priorities
        if not self._queue or self.holding or not priorities.preempt:
            return
        head = self._queue[0][2]
        rank = priorities.rank(head.job.priority)
        if rank + 1 >= len(priorities):
            return
        slots, blocks, tokens = self._missing(head)
        chosen = []
        for seq in sorted(self.running, key=lambda s: s.turn, reverse=True):
            if max(slots, blocks, tokens) <= 0 or priorities.rank(seq.turn.priority) <= rank:
                break
            need, new = self._wanted(seq)
            if slots > 0 or blocks > 0 or new > 1:
                private_blocks = seq.blocks - len(seq.held) * seq.job.prefix_blocks - seq.pinned
                slots, blocks, tokens = slots - 1, blocks - private_blocks - need, tokens - new
                chosen.append(seq)
        if max(slots, blocks, tokens) <= 0:
            for seq in chosen:
                self._preempt(seq, now)

    def _missing(self, head: Sequence) -> tuple[int, int, int]:
        """Slots, blocks and tokens that it needs beyond what the next step leaves."""
        shared, private_blocks = self._hits(head)
        held_blocks = shared * head.job.prefix_blocks + private_blocks
        idle = self.memory.idle(head.job.prefix[:shared]) * head.job.prefix_blocks + private_blocks
        wanted = [self._wanted(seq) for seq in self.running]
        taken = sum(w[0] for w in wanted)
        return (
            len(wanted) + 1 - self.options.slots,
            -(-head.tokens // self.block_tokens) - held_blocks + idle + taken - self.memory.free,
            min(head.tokens - held_blocks * self.block_tokens, self.options.budget - len(wanted))
            + sum(w[1] for w in wanted)
            - self.options.budget,
        )

    def _wanted(self, seq: Sequence) -> tuple[int, int]:
        """Blocks and tokens that a running request takes in the next step."""
        new = seq.tokens - seq.computed
        return max(0, -(-(seq.computed + new) // self.block_tokens) - seq.blocks), new

    def _hits(self, seq: Sequence) -> tuple[int, int]:
        """What the prefix cache has of a request: shared ids, and blocks of its own after them. At
        least one token is left to compute."""
        job, most = seq.job, (seq.tokens - 1) // self.block_tokens
        shared = self.memory.hits(job.prefix) if job.prefix else 0
        while shared and shared * job.prefix_blocks > most:
            shared -= 1
        private_blocks = self.memory.kept(seq.freed_blocks) if seq.freed_blocks is not None else 0
        if shared < len(job.prefix):
            return shared, 0
        return shared, max(0, min(private_blocks, most - shared * job.prefix_blocks))

    def _batch(self, scheduled: list[tuple[Sequence, int]]) -> Batch:
        decodes = context = 0
        prompts = []
        for seq, new in scheduled:
            if new == 1 and seq.outputs:
                decodes += 1
                context += seq.computed + 1
            else:
                prompts.append((new, seq.computed))
        return Batch(scheduled=scheduled, seconds=self.profile.step(decodes, context, prompts))

    def _publish(self, seq: Sequence) -> None:
        """Its prompt is computed: whole prefix blocks of it can be shared."""
        rest = seq.job.prefix[len(seq.held) :]
        seq.held += self.memory.publish(rest)

    def _preempt(self, seq: Sequence, now: float) -> None:
        self.running.remove(seq)
        seq.running = False
        full = seq.computed // self.block_tokens
        self._free(seq, kept=full)
        seq.preemptions += 1
        seq.job.preemptions += 1
        if seq.job.preempted_s is None:
            seq.job.preempted_s = now
        self.preemptions += 1
        seq.found = None
        self._enqueue(seq)

    def _finish(self, seq: Sequence) -> None:
        del self.requests[seq.job.id]
        self._take_out(seq)
        self._free(seq)
        self._classes = None

    def _take_out(self, seq: Sequence) -> None:
        if seq.running:
            self.running.remove(seq)
            seq.running = False
        elif seq in self.holding:
            self.holding.remove(seq)
        elif not seq.stopped:
            self._queue = [entry for entry in self._queue if entry[2] is not seq]

    def _free(self, seq: Sequence, kept: int = 0) -> None:
        """Frees its blocks, but those that are being copied only when that is over."""
        job = seq.job
        private_blocks = seq.blocks - len(seq.held) * job.prefix_blocks
        self.memory.unhold(seq.held, job.prefix_blocks)
        if seq.pinned:
            pinned = min(seq.pinned, private_blocks)
            self._pinned_blocks[job.id] = self._pinned_blocks.get(job.id, 0) + pinned
            private_blocks, kept, seq.pinned = private_blocks - pinned, 0, 0
        mine = max(0, min(private_blocks, kept - len(seq.held) * job.prefix_blocks))
        self.memory.give(private_blocks - mine)
        seq.freed_blocks = self.memory.leave(mine) if mine else None
        seq.held, seq.blocks, seq.computed = [], 0, 0

    def _enqueue(self, seq: Sequence) -> None:
        seq.turn = self._priorities.queue_key(
            *seq.turn, waited_s=0.0, preempted=bool(seq.preemptions)
        )
        self._count += 1
        insort(self._queue, (seq.turn, self._count, seq))
        self._classes = None

    def _look(self, now: float) -> None:
        """Queues anew what has waited for long."""
        self._next_look_s = now + AGING_LOOK_EVERY_S
        changed = False
        for _, _, seq in self._queue:
            priority = self._priorities.aged(seq.job.priority, now - seq.queued_s)
            if priority != seq.turn.priority:
                seq.turn, changed = seq.turn._replace(priority=priority), True
        if changed:
            self._queue = sorted((seq.turn, count, seq) for _, count, seq in self._queue)

    # -- what it counts

    def classes(self) -> tuple[ClassLoad, ...]:
        """Requests by priority class, most urgent first."""
        if self._classes is None:
            rank = self._priorities.rank
            counts = [[0] * 5 for _ in range(len(self._priorities))]
            for seq in self.running:
                counts[rank(seq.job.priority)][0] += 1
            for seq in self._waiting():
                mine = counts[rank(seq.job.priority)]
                mine[1] += 1
                if seq.found is None:
                    seq.found = (0, 0) if seq.preemptions else self._found(seq)
                cached, held = seq.found
                mine[2] += self.needed(seq)
                mine[3] += max(held, seq.computed)
                mine[4] += seq.tokens - max(cached, seq.computed)
            self._classes = tuple(
                ClassLoad(
                    running=r, waiting=w, waiting_tokens=t, waiting_shared=s, waiting_prefill=p
                )
                for r, w, t, s, p in counts
            )
        return self._classes

    def head_tokens(self) -> int:
        """What the head of the queue needs to start."""
        return self.needed(self._queue[0][2]) if self._queue else 0

    def prefill_tokens(self) -> int:
        """Tokens of running requests' prompts that no step has been given yet."""
        block = self.block_tokens
        return sum(
            max(0, s.tokens - s.blocks * block) for s in self.running if s.computed < s.tokens - 1
        )

    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue) + len(self.holding)

    def needed(self, seq: Sequence) -> int:
        """KV tokens of a request, in whole blocks."""
        return -(-seq.tokens // self.block_tokens) * self.block_tokens

    def _found(self, seq: Sequence) -> tuple[int, int]:
        """Tokens of a request in the prefix cache, and how many of them others hold."""
        shared, private_blocks = self._hits(seq)
        held = shared - self.memory.idle(seq.job.prefix[:shared])
        each = seq.job.prefix_blocks
        return (shared * each + private_blocks) * self.block_tokens, held * each * self.block_tokens

    def _waiting(self) -> Iterable[Sequence]:
        yield from self.holding
        for _, _, seq in self._queue:
            yield seq
