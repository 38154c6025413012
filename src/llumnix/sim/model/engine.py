"""One engine in virtual time: continuous batching, and the seam that migrations ask for.

Messages are dealt with between two steps, when nothing is in flight, as with vLLM's synchronous
scheduling. Tokens have no values: their number is what is moved and checked.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

from llumnix.core.limits import WAITING_SHOWN_MAX
from llumnix.core.messages import OFFICE, Blocks
from llumnix.core.migration.arrivals import Deferrals
from llumnix.core.migration.port import Movable, Phase, Progress, Refusal
from llumnix.core.priorities import Priorities, QueueKey
from llumnix.core.queue_rules import PLAIN, QueueRules
from llumnix.core.reports import ClassLoad, EngineCounts
from llumnix.core.types import EngineIndex, RequestId
from llumnix.sim.model.batching import Batching, EngineOptions
from llumnix.sim.model.jobs import Batch, Job, Sequence
from llumnix.sim.model.profile import Profile

_TOKEN = [0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """A copy that a destination's llumlet began. It is told of the end under this ticket."""

    destination: EngineIndex
    ticket: int
    source: EngineIndex
    size: int  # bytes


class SimEngine(Batching):
    """Implements `EnginePort`. `job_of` finds the request that arrives by a migration, which a live
    engine reads from the source's message."""

    def __init__(
        self,
        index: EngineIndex,
        profile: Profile,
        options: EngineOptions,
        priorities: Priorities,
        job_of: Callable[[RequestId], Job],
        rules: QueueRules = PLAIN,
    ) -> None:
        super().__init__(profile, options, priorities, rules)
        self.index = index
        self.arriving: dict[RequestId, Sequence] = {}
        self._job_of = job_of
        self._revives = False  # or has revived one
        self._pulls: list[Pull] = []
        self._deferrals = Deferrals()
        self._more_wait = False  # than the last step that admitted any could take

    def idle(self) -> bool:
        """Whether it has nothing to do and holds nothing."""
        return not self.requests and not self.arriving and not self._pinned_blocks

    def take_pulls(self) -> list[Pull]:
        """The copies that began since this was asked last."""
        pulls, self._pulls = self._pulls, []
        return pulls

    def schedule(self, now: float, *, defer: bool = False) -> Batch | None:
        """The next step, or None if there is nothing to do. `defer`: it should compute no prompts,
        since a handover is near."""
        self.quiet = defer and self._defers()
        if not defer:
            self._deferrals.rest()
        batch = super().schedule(now)
        if not self.quiet:
            self._more_wait = bool(self._queue)
        return batch

    def _defers(self) -> bool:
        """Whether the next step leaves prompts out, which vLLM's scheduler does not always do."""
        prompts = [seq.computed + 1 < seq.tokens for seq in self.running]
        if not self._queue and not any(prompts):
            return False
        return self._deferrals.take() and not self._more_wait and not all(prompts)

    def counts(self) -> EngineCounts:
        """What a load report says of the engine itself."""
        block, queue = self.block_tokens, [seq for _, _, seq in self._queue[:WAITING_SHOWN_MAX]]
        keep = self.room(queue[0]) if queue else 0
        least = 0
        if queue and self._blocks(queue[0]) + keep > self.memory.free:
            least = min(map(self.needed, queue))
        return EngineCounts(
            kv_tokens_used=(self.memory.total - self.memory.free) * block,
            kv_tokens_total=self.memory.total * block,
            prefill_tokens=self.prefill_tokens(),
            block_tokens=block,
            slots=self.options.slots,
            classes=self.classes(),
            head_tokens=self.head_tokens(),
            keep_tokens=keep * block,
            passable=self._passable(),
            waiting_least=least,
            kv_token_bytes=self.profile.kv_token_bytes,
            preemptions=self.preemptions,
            finished=self.finished,
            finished_tokens=self.finished_tokens,
        )

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

    def _passable(self) -> bool:
        """Whether a newcomer may start before the head of the queue."""
        if not self._queue:
            return False
        head = self._queue[0][2]
        return self.rules.passable(head.wait, self._now_s, self.needed(head), self.block_tokens)

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

    @property
    def step_s(self) -> float:
        return self.steps_s / self.steps if self.steps else 0.0

    @property
    def prompts_in_flight(self) -> bool:
        return False

    def _batch(self, scheduled: list[tuple[Sequence, int]]) -> Batch:
        batch = super()._batch(scheduled)
        if self._revives:
            others = [(seq, new) for seq, new in scheduled if seq.computed >= seq.again]
            if others and len(others) < len(scheduled):
                slowed_s = batch.seconds - super()._batch(others).seconds
                for seq, _ in others:
                    seq.job.slowed_s += slowed_s
        return batch

    def client(self, request: RequestId) -> int:
        return OFFICE

    def _holders(self) -> Iterable[Sequence]:
        # One that comes without KV will be queued.
        return chain(super()._holders(), (seq for seq in self.arriving.values() if seq.blocks))

    # -- source

    def movable(self) -> list[Movable]:
        shown = [seq for _, _, seq in self._queue[:WAITING_SHOWN_MAX]]
        return [
            Movable(
                request=seq.job.id,
                priority=seq.job.priority,
                tokens=self.needed(seq),
                waiting=not seq.running,
                busy=seq.running and seq.computed + 1 < seq.tokens,
            )
            for seq in shown + self.running
        ]

    def describe(self, request: RequestId) -> bytes | Refusal:
        return b""

    def agents(self) -> list[str]:
        return []

    def progress(self, request: RequestId) -> Progress:
        seq = self.requests.get(request)
        if seq is None:
            return Progress(phase=Phase.GONE)
        phase = Phase.RUNNING
        if seq.stopped:
            phase = Phase.STOPPED
        elif not seq.running and not seq.computed:
            phase = Phase.WAITING
        return Progress(
            phase=phase,
            settled=seq.computed,
            tokens=seq.tokens,
            outputs=seq.outputs,
            preemptions=seq.preemptions,
        )

    def outputs(self, request: RequestId, first: int) -> list[int]:
        return _TOKEN * (self.requests[request].outputs - first)

    def pin(self, request: RequestId, start: int, end: int) -> Blocks:
        seq = self.requests[request]
        seq.pinned = max(seq.pinned, -(-end // self.block_tokens))
        return [[]]

    def unpin(self, request: RequestId) -> None:
        seq = self.requests.get(request)
        if seq is not None:
            seq.pinned = 0
        self.memory.give(self._pinned_blocks.pop(request, 0))

    def stop(self, request: RequestId) -> None:
        seq = self.requests[request]
        self._take_out(seq)
        seq.stopped = True
        self._classes = None

    def handover_state(self, request: RequestId, start: int) -> tuple[int, Blocks, bytes]:
        return self.requests[request].computed, [[]], b""

    def resume(self, request: RequestId) -> None:
        seq = self.requests.get(request)
        if seq is None:
            return
        seq.stopped = False
        if seq.computed:
            self.holding.append(seq)
            self._classes = None
        else:
            self._enqueue(seq)

    def release(self, request: RequestId) -> None:
        self.abort(request)

    # -- destination

    def reserve(
        self, request: RequestId, body: bytes, outputs: list[int], tokens: int, agents: list[str]
    ) -> int | Refusal:
        seq = self._arrive(request, outputs)
        if isinstance(seq, Refusal):
            return seq
        if not self._grow(seq, tokens):
            return Refusal(why=f"no room for {tokens} tokens")
        self.arriving[request] = seq
        return 0

    def admit(self, request: RequestId, made: object, outputs: list[int]) -> Refusal | None:
        seq = self._arrive(request, outputs)
        if isinstance(seq, Refusal):
            return seq
        self._revives, seq.again = True, seq.tokens
        self.arriving[request] = seq
        return None

    def _arrive(self, request: RequestId, outputs: list[int]) -> Sequence | Refusal:
        if request in self.requests or request in self.arriving:
            return Refusal(why="it has not quite left here yet")
        job = self._job_of(request)
        seq = Sequence(job=job, turn=QueueKey(job.priority, job.arrived_s), queued_s=job.arrived_s)
        seq.outputs = seq.came_with = len(outputs)
        return seq

    def ready(self, request: RequestId) -> bool | Refusal:
        return True

    def reach(self, request: RequestId, tokens: int, outputs: list[int]) -> Refusal | None:
        seq = self.arriving[request]
        seq.outputs += len(outputs)
        return None if self._grow(seq, tokens) else Refusal(why=f"no room for {tokens} tokens")

    def pull(
        self,
        request: RequestId,
        ticket: int,
        source: EngineIndex,
        agents: list[str],
        start: int,
        end: int,
        blocks: Blocks,
        final: bool,
    ) -> None:
        size = (end - start) * self.profile.kv_token_bytes
        self._pulls.append(Pull(destination=self.index, ticket=ticket, source=source, size=size))

    def cancel(self, ticket: int) -> None:
        """Copies go on to their end."""

    def cache(self, request: RequestId, tokens: int) -> None:
        """Prefix caches of destinations are not modelled."""

    def commit(self, request: RequestId, computed: int, state: bytes) -> Refusal | None:
        seq = self.arriving.pop(request)
        self.requests[request] = seq
        seq.preemptions = seq.job.preemptions
        if computed:
            seq.computed = computed
            self.holding.append(seq)
            self._classes = None
        else:
            self._free(seq)
            self._enqueue(seq)
        return None

    def drop(self, request: RequestId) -> None:
        self._free(self.arriving.pop(request))

    def _grow(self, seq: Sequence, tokens: int) -> bool:
        need = max(0, -(-tokens // self.block_tokens) - seq.blocks)
        if need > self.memory.free:
            return False
        self.memory.take(need)
        seq.blocks += need
        return True
