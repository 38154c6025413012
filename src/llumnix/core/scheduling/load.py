"""What an instance reports of itself, and the one place where load is derived from it.

Rules
- A report holds what its engine counted: tokens, requests, seconds, running totals.
- Virtual usage, in tokens: what is in use, what the rest of prompts that are being computed will
  take, what the head of the queue needs to start, and the headroom of each class that runs there.
  Requests behind the head count as nothing, except for dispatch, where all of them will be served
  before the newcomer.
- Freeness F = (total - virtual usage) / batch size, in tokens a request, which is in decode steps:
  how many more the batch can take before memory runs out. Below zero it is not divided, so that one
  more request or token never raises it.
- An instance that is being emptied has a request of infinite size: its freeness is -inf.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llumnix.core.priorities import Priorities
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassLoad:
    """The requests of one priority class: how many run, how many wait, and the KV tokens that those
    need to start. As of when they began to wait: the tokens of those that are in use already, by
    running requests that share them, and the tokens that they have to compute."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    waiting_shared: int = 0
    waiting_prefill: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One instance's load at one moment.

    `sequence` grows by one a report within one run of the engine (`engine_index`).
    `kv_tokens_used` and `kv_tokens_total` are whole blocks' worth of tokens; blocks that only the
    prefix cache holds count as free. `prefill_tokens`: what requests that run have still to compute
    of their prompts, and have no KV memory for yet. `block_tokens`: size of a block. `slots`:
    requests that can run at a time, 0 for no limit. `classes`: most urgent first. `head_tokens`:
    what the request that is next in the queue needs to start, 0 if none waits. `admitted` are the
    requests that reached the engine since the report before: they are running or waiting now, or
    already over. `accepting` is false while the instance is being emptied. `moving_out` requests
    are on their way to other instances, with `moving_out_tokens` here that will be free, and
    `moving_out_waiting` of them wait (the others count as running until they have left);
    `moving_in` are on their way here, their room in use already. `orders`: those of the scheduler
    that were carried out, or found impossible, since the report before. `kv_token_bytes`: what a
    token of KV takes, on all workers of the engine. `stalled_s`: seconds since the engine completed
    a step, while it has requests; 0 without any.

    Running totals of this run: `preemptions`; `steps` and the seconds they took; requests
    `finished` and the tokens they had generated; bytes moved away and the seconds that took."""

    instance: InstanceId
    engine_index: EngineIndex
    sequence: int
    kv_tokens_used: int
    kv_tokens_total: int
    prefill_tokens: int = 0
    block_tokens: int = 1
    slots: int = 0
    classes: tuple[ClassLoad, ...] = ()
    head_tokens: int = 0
    admitted: tuple[RequestId, ...] = ()
    accepting: bool = True
    moving_out: int = 0
    moving_out_tokens: int = 0
    moving_out_waiting: int = 0
    moving_in: int = 0
    orders: tuple[OrderId, ...] = ()
    kv_token_bytes: int = 0
    preemptions: int = 0
    steps: int = 0
    steps_s: float = 0.0
    finished: int = 0
    finished_tokens: int = 0
    moved_bytes: int = 0
    moved_s: float = 0.0
    stalled_s: float = 0.0

    @property
    def kv_tokens_free(self) -> int:
        """KV tokens that no request holds."""
        return self.kv_tokens_total - self.kv_tokens_used

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return sum(c.running for c in self.classes)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(c.waiting for c in self.classes)


class Load(NamedTuple):
    """What follows from a report and the decisions that it does not cover yet. `used`: KV tokens,
    without those about to be free and with those of dispatches on their way and of the rest of
    prompts; `head`, `queued`: tokens that the head of the queue needs, and that all who wait need,
    `shared` of which are in use already;
    `batch` runs or will, `waiting` waits; `slots`: see the report; `running`, `ahead`: the batch,
    and tokens to compute before a newcomer's, by class, most urgent first."""

    total: int
    used: int
    head: int
    queued: int
    shared: int
    batch: int
    waiting: int
    slots: int
    running: tuple[int, ...]
    ahead: tuple[int, ...]

    def ahead_of(self, rank: int) -> int:
        """Tokens to compute before those of a newcomer of a class."""
        ahead = self.ahead
        return ahead[rank] if rank < len(ahead) else ahead[-1]

    def spare(self, priorities: Priorities) -> float:
        """Tokens that nobody uses, virtually or not; below zero if more are wanted than there
        are."""
        return self.total - self.used - self.head - priorities.headroom(self.total, self.running)

    def spare_after(self, rank: int, requests: int, priorities: Priorities) -> float:
        """`spare` after that many requests of a class have come, or left if below 0, their tokens
        left out of account."""
        spare = self.spare(priorities)
        if rank >= len(self.running):
            return spare
        before = self.running[rank]
        return spare + priorities.share(rank) * self.total * (
            bool(before) - bool(before + requests)
        )

    def freeness(self, priorities: Priorities) -> float:
        """F, for migration and scaling."""
        return ratio(self.spare(priorities), self.batch)

    def freeness_for(self, rank: int, priorities: Priorities) -> float:
        """F as a newcomer of a class meets it: all who wait are served before it, and only the
        headroom of more urgent classes is none of its."""
        spare = self.spare_for(rank, priorities)
        others = self.batch + self.waiting
        freeness = ratio(spare, others)
        if self.slots and others >= self.slots:
            # It would wait for a slot, however much memory is free.
            return min(freeness, (self.slots - 1 - others) * self.total / self.slots)
        return freeness

    def spare_for(self, rank: int, priorities: Priorities) -> float:
        """Tokens that would be left for a newcomer of a class."""
        reserved = priorities.headroom(self.total, self.running, above=rank)
        return self.total - self.used - (self.queued - self.shared) - reserved

    def changed(self, rank: int, requests: int, tokens: int) -> "Load":
        """After that many requests of a class, of `tokens` together, have come; below 0: have
        left."""
        running = tuple(n + requests * (r == rank) for r, n in enumerate(self.running))
        return self._replace(
            used=self.used + tokens, batch=max(0, self.batch + requests), running=running
        )


def ratio(spare: float, requests: int) -> float:
    """Tokens a request; a shortage is not shared out."""
    return spare / max(1, requests) if spare > 0 else spare


def derive(
    report: LoadReport, booked: Sequence[int], booked_tokens: int, booked_cached: int = 0
) -> Load:
    """The load of an instance with dispatches on their way that its report does not cover yet:
    `booked` of each class, with `booked_tokens` tokens in their prompts, `booked_cached` of which
    are in its prefix cache."""
    coming = report.prefill_tokens + booked_tokens
    computed = coming - booked_cached
    waiting, queued, shared, by_class, ahead = 0, 0, 0, [], [] if report.classes else [computed]
    for rank, known in enumerate(report.classes):
        waiting += known.waiting
        queued += known.waiting_tokens
        shared += known.waiting_shared
        computed += known.waiting_prefill
        by_class.append(known.running + (booked[rank] if booked else 0))
        ahead.append(computed)
    used = max(0, report.kv_tokens_used - report.moving_out_tokens) + coming
    queued = max(queued, report.head_tokens)
    leaving = report.moving_out - report.moving_out_waiting
    batch = max(0, sum(by_class) - leaving) + report.moving_in
    head = report.head_tokens
    if head and report.slots and batch >= report.slots:
        # It waits for a slot, so whatever memory is free is of no use to it.
        head += max(0, report.kv_tokens_total - used)
    return Load(
        total=report.kv_tokens_total,
        used=used,
        head=head,
        queued=queued,
        shared=shared,
        batch=batch,
        waiting=max(0, waiting - report.moving_out_waiting),
        slots=report.slots,
        running=tuple(by_class),
        ahead=tuple(ahead),
    )
