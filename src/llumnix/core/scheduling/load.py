"""The one place where load is derived from what an instance reports of itself (core/reports.py).

Rules
- Virtual usage, in tokens: KV in use, what the rest of prompts that are being computed will take,
  what the head of the queue needs to start, and the headroom of each class that runs there.
- Requests behind the head count as nothing, except for a newcomer, which is a request that is being
  dispatched: they are served before it.
- Freeness F in decode steps: (total - virtual usage) / batch. Each running request takes a token a
  step, so F is how many steps the batch can take before memory runs out. A shortage is not divided
  by the batch, so that one more request or token never raises F.
- An instance that is being emptied has no freeness: it takes nothing, and gives away all it has.
- `Standings` keeps what a round of pairing needs of all loads, so that it looks at few of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from llumnix.core.limits import MigrationLimits
from llumnix.core.priorities import Priorities
from llumnix.core.reports import LoadReport
from llumnix.core.types import InstanceId

_LIMITS = MigrationLimits()
_ByFreeness = tuple[float, InstanceId]
_ByRoom = tuple[int, InstanceId]
"""What an instance is sorted by, and its id; the lowest comes first."""


class Booking(NamedTuple):
    """A dispatch that no report covers yet."""

    tokens: int  # of its prompt
    cached: int  # of these, in the instance's prefix cache
    rank: int  # its class
    made_s: float


class Load(NamedTuple):
    """The load of one instance: its report, and decisions that the report does not cover yet."""

    total: int  # KV tokens in all
    used: int  # KV tokens in use, or about to be
    head: int  # tokens that the head of the queue needs; all that are free if it waits for a slot
    keep: int  # tokens that must stay free beside those when it starts
    queued: int  # tokens that all waiting requests need
    shared: int  # the part of `queued` that is in use already
    batch: int  # requests that run, or are about to
    waiting: int  # requests that wait
    slots: int  # requests that can run at a time; 0 for no limit
    running: tuple[int, ...]  # the batch by class, most urgent first
    queued_prefill: tuple[int, ...]  # tokens to compute before a newcomer's, by its class

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
        return self.head > 0 and self.head + self.keep > max(0, self.free)

    def queued_prefill_before(self, rank: int) -> int:
        """Tokens of prompts that are computed before those of a newcomer of that class."""
        queued = self.queued_prefill
        return queued[rank] if rank < len(queued) else queued[-1]

    def spare(self, priorities: Priorities) -> float:
        """Tokens beyond the virtual usage; below zero if more are wanted than there are."""
        return self._spare(self.running, priorities)

    def spare_after(self, rank: int, requests: int, priorities: Priorities) -> float:
        """`spare` after that many requests of a class have come (below 0: have left). Their tokens
        are left out, so that only the headroom of the class may change it."""
        before = self.running[rank] if rank < len(self.running) else 0
        running = self.running
        if bool(before) != bool(before + requests):
            running = self._running_after(rank, requests)
        return self._spare(running, priorities)

    def _spare(self, running: tuple[int, ...], priorities: Priorities) -> float:
        """`spare` with so many requests of each class."""
        return self.total - self.used - self.head - priorities.headroom(self.total, running)

    def freeness(self, priorities: Priorities) -> float:
        """F, for migration and scaling."""
        return ratio(self.spare(priorities), self.batch)

    def freeness_for(self, rank: int, priorities: Priorities) -> float:
        """Freeness for a newcomer of that class. It counts all waiting requests, which are served
        before the newcomer, and only the headroom of more urgent classes, which it may not use."""
        spare = self.spare_for(rank, priorities)
        others = self.batch + self.waiting
        freeness = ratio(spare, others)
        if self.slots and others >= self.slots:
            # A newcomer would wait for a slot, however much memory is free.
            return min(freeness, (self.slots - 1 - others) * self.total / self.slots)
        return freeness

    def spare_for(self, rank: int, priorities: Priorities) -> float:
        """Tokens of memory that are left for a newcomer of that class."""
        reserved = priorities.headroom(self.total, self.running, above=rank)
        return self.total - self.used - (self.queued - self.shared) - reserved

    def room(self, block_tokens: int) -> int:
        """The largest request, in KV tokens, that fits now, with the blocks of that size that a
        migration has in reserve."""
        return self.total - self.used - _LIMITS.ahead_tokens(block_tokens)

    def changed(self, rank: int, requests: int, tokens: int) -> "Load":
        """The load after that many requests of a class, of `tokens` together, have come (below 0:
        have left)."""
        return self._replace(
            used=self.used + tokens,
            batch=max(0, self.batch + requests),
            running=self._running_after(rank, requests),
        )

    def _running_after(self, rank: int, requests: int) -> tuple[int, ...]:
        return tuple(n + requests * (r == rank) for r, n in enumerate(self.running))


def used_by(report: LoadReport) -> int:
    """KV tokens in use, or about to be, as the instance reports them."""
    held = max(0, report.kv_tokens_used - report.moving_out_tokens)
    return held + report.prefill_tokens


def mean_use(loads: Iterable[Load]) -> float:
    """The share of KV memory that is used, over all instances; 0 if there is none."""
    used = total = 0
    for load in loads:
        used, total = used + min(load.used, load.total), total + load.total
    return used / total if total else 0.0


def ratio(spare: float, requests: int) -> float:
    """Tokens for each request; a shortage is not divided."""
    return spare / (requests or 1) if spare > 0 else spare


def derive(
    report: LoadReport, booked: Sequence[int], booked_tokens: int, booked_cached: int = 0
) -> Load:
    """The load of an instance, with dispatches on their way to it that its report does not cover:
    `booked` of each class, with `booked_tokens` tokens in their prompts, `booked_cached` of which
    are in its prefix cache.

        used    KV in use
                - what is held by requests on their way out, which will be free
                + the rest of running prompts, which vLLM gives memory to chunk by chunk
                + the prompts of dispatches on their way
        batch   running requests and dispatches on their way
                - running requests on their way out
                + requests on their way in, whose memory is in use already
        queued_prefill, for a newcomer of class r
                the rest of running prompts, and prompts on their way, less their cached tokens
                + what waiting requests of class r and more urgent ones have to compute, but for
                  those of the head's class r if the newcomer may pass them: if the head does not
                  fit, they wait, and the newcomer does not wait for them

    A head of the queue that waits for a slot makes the instance full: whatever memory is free is of
    no use, so the head is taken to need all of it beside its own tokens."""
    prefill = report.prefill_tokens + booked_tokens
    computed = prefill - booked_cached
    waiting = queued = shared = 0
    by_class: list[int] = []
    queued_prefill = [] if report.classes else [computed]
    used = used_by(report) + booked_tokens
    passed = report.passable and report.lacks(report.kv_tokens_total - used)
    for rank, known in enumerate(report.classes):
        before = computed
        waiting += known.waiting
        queued += known.waiting_tokens
        shared += known.waiting_shared
        computed += known.waiting_prefill
        by_class.append(known.running + (booked[rank] if booked else 0))
        queued_prefill.append(before if passed and known.waiting else computed)
        passed = passed and not known.waiting  # The head is of the first class that waits.
    leaving = report.moving_out - report.moving_out_waiting
    batch = max(0, sum(by_class) - leaving) + report.moving_in
    head = report.head_tokens
    if head and report.slots and batch >= report.slots:
        head += max(0, report.kv_tokens_total - used)
    return Load(
        total=report.kv_tokens_total,
        used=used,
        head=head,
        keep=report.keep_tokens,
        queued=max(queued, report.head_tokens),
        shared=shared,
        batch=batch,
        waiting=max(0, waiting - report.moving_out_waiting),
        slots=report.slots,
        running=tuple(by_class),
        queued_prefill=tuple(queued_prefill),
    )


class Ranked(Protocol):
    """An instance as `Standings` sees it."""

    report: LoadReport
    load: Load
    freeness: float  # as of when it was ranked and took requests

    @property
    def accepting(self) -> bool:
        """Whether it takes requests."""


@dataclass(slots=True)
class Standings:
    """The parts that instances may have in a round of pairing, as far as their loads say. A round
    sorts these numbers, and looks only at the instances that come first.

    A load that changed is ranked when the next report comes, or at the latest with the round: no
    dispatch waits for that. Room is the largest request that fits, in KV tokens. An instance is
    open if it has no queue and could run one more request."""

    instances: Mapping[InstanceId, Ranked]
    """All that are known."""
    changed: set[InstanceId] = field(default_factory=set)
    """Those whose load has changed since they were ranked, or that came or went."""
    leaving: set[InstanceId] = field(default_factory=set)
    """Those that are being emptied. They have no other part."""
    low: dict[InstanceId, _ByFreeness] = field(default_factory=dict)
    """Those below the threshold of sources, or below zero, by freeness."""
    blocked: dict[InstanceId, _ByFreeness] = field(default_factory=dict)
    """Those with a head of the queue that cannot start, by freeness."""
    free: dict[InstanceId, _ByFreeness] = field(default_factory=dict)
    """Open ones above the threshold of destinations, by minus their freeness."""
    roomy: dict[InstanceId, _ByFreeness] = field(default_factory=dict)
    """Open ones at the threshold of sources or above, by minus the largest request that leaves them
    there."""
    rooms: dict[InstanceId, _ByRoom] = field(default_factory=dict)
    """Open ones that can take a request of the least urgent class and stay at the threshold of
    sources or above, by the size of the largest such request."""
    reserved: dict[InstanceId, _ByRoom] = field(default_factory=dict)
    """Open ones below that threshold that keep headroom, by the room that they have without."""
    _by: tuple[tuple[float, float], Priorities] | None = None  # what they were ranked by

    def rank(self, thresholds: tuple[float, float], priorities: Priorities) -> "Standings":
        """Gives their freeness and their parts to the instances that changed; returns itself.
        `thresholds`: of sources and of destinations."""
        if self._by is None or self._by[0] != thresholds or self._by[1] is not priorities:
            self._by = thresholds, priorities
            self.changed |= self.instances.keys()
        parts = self.low, self.blocked, self.free, self.roomy, self.rooms, self.reserved
        for name in self.changed:
            self.leaving.discard(name)
            for part in parts:
                part.pop(name, None)
            if (known := self.instances.get(name)) is not None:
                self._rank(name, known, *self._by)
        self.changed.clear()
        return self

    def _rank(
        self,
        name: InstanceId,
        known: Ranked,
        thresholds: tuple[float, float],
        priorities: Priorities,
    ) -> None:
        load, (below, above) = known.load, thresholds
        if not known.accepting:
            self.leaving.add(name)
            return
        spare = load.spare(priorities)
        known.freeness = freeness = ratio(spare, load.batch)
        if freeness < below or freeness < 0:
            self.low[name] = freeness, name
        if load.is_blocked:
            self.blocked[name] = freeness, name
        if load.waiting or not load.has_slot:
            return
        room, kept = load.room(known.report.block_tokens), below * (load.batch + 1)
        left = int(load.spare_for(len(priorities) - 1, priorities) - kept)
        if left > 0 and room > 0:
            self.rooms[name] = min(left, room), name
        if freeness > above:
            self.free[name] = -freeness, name
        if freeness >= below:
            self.roomy[name] = -min(int(spare - kept), room), name
        elif priorities.headroom(load.total, load.running):
            # No headroom is kept from the most urgent class.
            self.reserved[name] = min(int(load.spare_for(0, priorities) - kept), room), name
