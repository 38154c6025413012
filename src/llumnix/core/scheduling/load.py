"""The one place where load is derived from what an instance reports of itself (core/reports.py).

Rules
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
from typing import NamedTuple

from llumnix.core.priorities import Priorities
from llumnix.core.reports import LoadReport


class Load(NamedTuple):
    """What follows from a report and the decisions that it does not cover yet. `used`: KV tokens,
    without those about to be free and with those of dispatches on their way and of the rest of
    prompts; `head`, `queued`: tokens that the head of the queue needs, and that all who wait need,
    `shared` of which are in use already;
    `batch` runs or will, `waiting` waits; `slots`: see the report; `running`,
    `queued_prefill`: the batch, and tokens to compute before a newcomer's, by class, most urgent
    first."""

    total: int
    used: int
    head: int
    queued: int
    shared: int
    batch: int
    waiting: int
    slots: int
    running: tuple[int, ...]
    queued_prefill: tuple[int, ...]

    @property
    def free(self) -> int:
        """Tokens of memory that are not used; below zero if more are promised than there are."""
        return self.total - self.used

    @property
    def has_slot(self) -> bool:
        """Whether one more request could run, as far as slots go."""
        return not self.slots or self.batch < self.slots

    @property
    def is_blocked(self) -> bool:
        """Whether the head of the queue cannot start, for want of memory or of a slot."""
        return self.head > max(0, self.free)

    def queued_prefill_before(self, rank: int) -> int:
        """Tokens to compute before those of a newcomer of a class."""
        queued = self.queued_prefill
        return queued[rank] if rank < len(queued) else queued[-1]

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
    waiting = queued = shared = 0
    by_class: list[int] = []
    queued_prefill = [] if report.classes else [computed]
    for rank, known in enumerate(report.classes):
        waiting += known.waiting
        queued += known.waiting_tokens
        shared += known.waiting_shared
        computed += known.waiting_prefill
        by_class.append(known.running + (booked[rank] if booked else 0))
        queued_prefill.append(computed)
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
        queued_prefill=tuple(queued_prefill),
    )
