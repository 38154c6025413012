"""Continuous batching in virtual time: queue, batch, KV memory, preemption, steps.

Rules, as vLLM 0.32 has them with priority scheduling
- A step has `budget` tokens. First the running requests get theirs, in the order in which they
  began; for one that finds no block free, the least urgent of them is preempted, the youngest
  first. If that is itself, the step ends with what it has so far; an empty step takes no time.
- A preempted request gives up its KV and is queued again. A step that preempts starts none.
- Then, while there are slots: requests that came with their KV, then the queue by priority and
  arrival. The head starts only if blocks for all its tokens are free, and if it has to wait, all
  wait. It takes blocks for what it computes in the step.
- A `quiet` step leaves prompts out, those that wait too.
- `chunked`: prompts share steps with others and are cut to the budget. Without, a step computes
  waiting prompts alone, whole, as older versions do.
- llumnix's own queueing (engine/queueing.py): a request that waited for long is queued as the most
  urgent, a preempted one goes before those of its class that have not started.
- llumnix's own rules of who starts (core/queue_rules.py).
- llumnix's own preemption (engine/urgent.py): running requests of less urgent classes are preempted
  for a head of the queue that could not start in this step.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from llumnix.core.priorities import AGING_LOOK_EVERY_S, Priorities, QueueKey
from llumnix.core.queue_rules import PLAIN, PromptTimer, QueueRules, Wait
from llumnix.core.reports import ClassLoad
from llumnix.core.slices.lengths import End
from llumnix.core.types import RequestId
from llumnix.sim.model.jobs import Batch, Job, Sequence, Token
from llumnix.sim.model.memory import SequenceBlocks, Start
from llumnix.sim.model.profile import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """vLLM's flags. `kv_tokens`: 0 for the profile's."""

    kv_tokens: int = 0
    budget: int = 2048
    slots: int = 256
    chunked: bool = True
    prefix_caching: bool = True
    watermark: float = 0.0  # share of memory that is left free by what starts, if any runs


class Batching(SequenceBlocks):
    """One engine's requests, and the steps that serve them."""

    def __init__(
        self,
        profile: Profile,
        options: EngineOptions,
        priorities: Priorities,
        rules: QueueRules = PLAIN,
    ) -> None:
        super().__init__(
            options.kv_tokens or profile.kv_tokens,
            profile.block_tokens,
            caching=options.prefix_caching,
            slices=rules.slices,
        )
        self.profile = profile
        self.options = options
        self.requests: dict[RequestId, Sequence] = {}
        self.running: list[Sequence] = []
        self.holding: list[Sequence] = []
        self.preemptions = 0
        self.finished = 0
        self.finished_tokens = 0
        self.steps = 0
        self.steps_s = 0.0
        self._priorities = priorities
        self.rules = rules
        self._prompt_timer = PromptTimer()
        self._queue: list[tuple[QueueKey, int, Sequence]] = []
        self._count = 0
        self._next_look_s = 0.0
        self._classes: tuple[ClassLoad, ...] | None = None
        self._now_s = 0.0
        self.quiet = False  # whether the next step is to compute no prompts

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
            self._learn(seq, End.EARLY)
            self._finish(seq)

    # -- steps

    def schedule(self, now: float) -> Batch | None:
        """The next step, or None if there is nothing to do."""
        self._now_s, self._promised = now, None
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
        self._prompt_timer.record(batch.prompt_tokens, batch.seconds)
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
                self._learn(seq, End.BY_ITSELF)
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
            if new > 1 and self.quiet:
                place += 1
                continue
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
        while budget > 0 and len(self.running) < self.options.slots:
            if self.holding:
                seq = self.holding[0]
                start = Start((), 0, seq.computed, seq.blocks, self._blocks(seq) - seq.blocks)
                fits = start.wanted <= self.memory.free
            elif self._queue and not self.quiet:
                seq = self._queue[0][2]
                start = self._start(seq)
                fits = self._fits(seq, start)
            else:
                break
            new = seq.tokens - start.found
            if new > budget:
                if not self.options.chunked:
                    # Older versions want a budget of the longest prompt. Here none is stuck.
                    if scheduled:
                        break
                    budget = new
                new = min(new, budget)
            if not fits:
                if self.holding:
                    break
                return self._pass(scheduled, budget, now)
            if self.holding:
                self.holding.pop(0)
            else:
                self._queue.pop(0)
            self._begin(seq, start, new)
            scheduled.append((seq, new))
            budget -= new
        return budget

    def _pass(self, scheduled: list[tuple[Sequence, int]], budget: int, now: float) -> int:
        """The head of the queue does not fit. Starts some of those behind it that do; returns what
        is left of the budget."""
        head, rules = self._queue[0][2], self.rules
        if head.wait is None:
            head.wait = Wait(since_s=now)
            head.later_s = 0.0  # From now on it is passed within the bounds alone.
            self._queue[0] = (head.turn, *self._queue[0][1:])
        if not rules.may_pass(head.wait, now):
            return budget
        for _, _, seq in [entry for entry in self._queue[1 : rules.passers + 1]]:
            if budget <= 0 or len(self.running) >= self.options.slots:
                break
            if (seq.turn.priority, seq.job.priority) != (head.turn.priority, head.job.priority):
                continue
            start = self._start(seq)
            new = seq.tokens - start.found
            if (
                (new > budget and not self.options.chunked)
                or not rules.may_take(
                    head.wait, self.needed(head), start.wanted * self.block_tokens
                )
                or not self._fits(seq, start)
            ):
                continue
            self._queue = [entry for entry in self._queue if entry[2] is not seq]
            head.wait.passed_tokens += start.wanted * self.block_tokens
            new = min(new, budget)
            self._begin(seq, start, new)
            scheduled.append((seq, new))
            budget -= new
        return budget

    def _fits(self, seq: Sequence, start: Start) -> bool:
        """Whether there is memory for it, with room for the batch to grow. What prompts under way
        will take is taken already: while tokens are left for others, they have got all theirs."""
        return start.wanted + self.room(seq) <= self.memory.free

    def room(self, seq: Sequence) -> int:
        """Blocks to leave free when it starts."""
        running = len(self.running)
        room = self.rules.room(running, preempted=bool(seq.preemptions))
        if running:
            room = max(room, int(self.options.watermark * self.memory.total))
        if self.slices is None or not (running or self.holding):
            return room
        return max(room, self.slice_room(seq))

    def _holders(self) -> Iterable[Sequence]:
        """Requests that have KV and run, or will."""
        return chain(self.running, self.holding)

    def _begin(self, seq: Sequence, start: Start, new: int) -> None:
        """Runs it from this step on, in which it computes `new` tokens."""
        memory = self.memory
        if seq.computed == 0:
            memory.hold(start.ids, seq.job.prefix_blocks)
            memory.take_back(start.private_blocks)
            seq.held = list(start.ids)
            seq.blocks, seq.computed, seq.freed_blocks = start.held, start.found, None
        need = -(-(seq.computed + new) // self.block_tokens) - seq.blocks
        if need > 0:
            memory.take(need)
            seq.blocks += need
        seq.running, seq.wait = True, None
        self.running.append(seq)
        self._classes = self._promised = None

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
                blocks -= private_blocks + max(need, self.left(seq))
                slots, tokens = slots - 1, tokens - new
                chosen.append(seq)
        if max(slots, blocks, tokens) <= 0:
            for seq in chosen:
                self._preempt(seq, now)

    def _missing(self, head: Sequence) -> tuple[int, int, int]:
        """Slots, blocks and tokens that it needs beyond what the next step leaves."""
        shared, private_blocks = self._hits(head)
        held_blocks = shared * head.job.prefix_blocks + private_blocks
        idle = self.memory.idle(head.job.prefix[:shared]) * head.job.prefix_blocks + private_blocks
        wanted, room = [self._wanted(seq) for seq in self.running], self.room(head)
        # What is promised to them is part of the room for the head.
        taken = sum(max(0, w[0] - self.left(s)) for w, s in zip(wanted, self.running, strict=True))
        return (
            len(wanted) + 1 - self.options.slots,
            self._blocks(head) - held_blocks + idle + taken + room - self.memory.free,
            min(head.tokens - held_blocks * self.block_tokens, self.options.budget - len(wanted))
            + sum(w[1] for w in wanted)
            - self.options.budget,
        )

    def _wanted(self, seq: Sequence) -> tuple[int, int]:
        """Blocks and tokens that a running request takes in the next step."""
        new = seq.tokens - seq.computed
        return max(0, -(-(seq.computed + new) // self.block_tokens) - seq.blocks), new

    def _batch(self, scheduled: list[tuple[Sequence, int]]) -> Batch:
        decodes = context = 0
        prompts = []
        for seq, new in scheduled:
            if new == 1 and seq.outputs:
                decodes += 1
                context += seq.computed + 1
            else:
                prompts.append((new, seq.computed))
        tokens = sum(new for new, _ in prompts)
        seconds = self.profile.step(decodes, context, prompts)
        return Batch(scheduled=scheduled, prompt_tokens=tokens, seconds=seconds)

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
        seq.found = self._promised = None
        self._enqueue(seq)

    def _finish(self, seq: Sequence) -> None:
        del self.requests[seq.job.id]
        self._take_out(seq)
        self._free(seq)
        self._classes = self._promised = None

    def _take_out(self, seq: Sequence) -> None:
        if seq.running:
            self.running.remove(seq)
            seq.running = False
        elif seq in self.holding:
            self.holding.remove(seq)
        elif not seq.stopped:
            self._queue = [entry for entry in self._queue if entry[2] is not seq]

    def _enqueue(self, seq: Sequence) -> None:
        seq.turn = self._priorities.queue_key(
            *seq.turn, waited_s=0.0, preempted=bool(seq.preemptions)
        )
        seq.later_s = 0.0
        if self.rules.short_first and not (seq.preemptions or seq.outputs or seq.wait):
            left = seq.tokens - self._start(seq).found
            seq.later_s = self.rules.later_s(left, self._prompt_timer.token_s)
        self._count += 1
        insort(self._queue, (seq.queued, self._count, seq))
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
            self._queue = sorted((seq.queued, count, seq) for _, count, seq in self._queue)

    # -- what it counts

    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue) + len(self.holding)
