"""What an instance reports of itself: what its engine counted (tokens, requests, seconds, running
totals), and nothing derived."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import Enum
from operator import attrgetter

from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassLoad:
    """The requests of one priority class on one instance, and KV tokens of those that wait. The
    three of waiting requests are as of when each request began to wait."""

    running: int = 0  # requests in the batch
    waiting: int = 0  # requests in the queue
    waiting_tokens: int = 0  # needed to start all that wait
    waiting_shared: int = 0  # the part that running requests hold already, as a shared prefix
    waiting_prefill: int = 0  # the part that has to be computed: it is not in the prefix cache
    preempted: int = 0  # running total of requests that lost their KV memory to others


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounts:
    """What an engine counts: the fields of `LoadReport` with the same names."""

    kv_tokens_used: int
    kv_tokens_total: int
    prefill_tokens: int
    block_tokens: int
    slots: int
    classes: tuple[ClassLoad, ...]
    head_tokens: int
    kv_token_bytes: int
    preemptions: int
    finished: int
    finished_tokens: int
    keep_tokens: int = 0
    passable: bool = False
    waiting_least: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCounts:
    """What a llumlet counts of moves."""

    out: int = 0  # requests on their way out
    out_waiting: int = 0  # those of them that wait, and hold no KV
    out_tokens: int = 0  # KV tokens that the others hold here
    incoming: int = 0  # requests on their way in
    void_orders: int = 0  # running total of orders for which there was nothing to move
    moved_bytes: int = 0  # running total of what was moved away
    moved_s: float = 0.0  # running total of the seconds that it took


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One instance's load at one moment. Tokens in use or in all are whole blocks' worth."""

    instance: InstanceId
    engine_index: EngineIndex  # which run of the instance's engine it is
    sequence: int  # grows by one a report within this run
    kv_tokens_used: int  # blocks that only the prefix cache holds count as free
    kv_tokens_total: int
    prefill_tokens: int = 0  # of running requests' prompts, neither computed nor with memory yet
    block_tokens: int = 1  # size of a block
    slots: int = 0  # requests that can run at a time; 0 for no limit
    classes: tuple[ClassLoad, ...] = ()  # most urgent first
    head_tokens: int = 0  # what the first request in the queue needs to start; 0 if none waits
    keep_tokens: int = 0  # what must stay free beside those when it starts
    waiting_least: int = 0  # what the smallest of the first few needs; 0 if the head fits
    passable: bool = False  # whether a newcomer of its class may start before it, if it fits
    admitted: tuple[RequestId, ...] = ()
    """Requests that reached the engine since the report before. They run or wait now, or are over
    already."""
    accepting: bool = True  # false while the instance is being emptied
    moving_out: int = 0  # requests on their way to other instances
    moving_out_tokens: int = 0  # held here, and free once those have left
    moving_out_waiting: int = 0  # those that wait; the others count as running until they have left
    moving_in: int = 0  # requests on their way here; their room is in use already
    orders: tuple[OrderId, ...] = ()
    """Orders of the scheduler that were carried out, or found impossible, since the report
    before."""
    kv_token_bytes: int = 0  # what a token of KV takes, on all workers of the engine
    # Running totals of this run:
    preemptions: int = 0
    steps: int = 0
    steps_s: float = 0.0
    finished: int = 0  # requests with an answer
    finished_tokens: int = 0  # in those answers
    moved_bytes: int = 0  # moved away
    moved_s: float = 0.0
    void_orders: int = 0  # for which there was nothing to move
    log_dropped: int = 0  # lines that its event log could not write
    # Not a total:
    stalled_s: float = 0.0  # since the last step was completed; 0 without requests
    in_call: bool = False  # whether it carries out a call, and makes no steps meanwhile

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return sum(c.running for c in self.classes)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(c.waiting for c in self.classes)

    def lacks(self, free: int) -> bool:
        """Whether the head of the queue waits for memory where so many tokens are free."""
        return self.head_tokens > 0 and self.head_tokens + self.keep_tokens > free

    def repeats(self, before: "LoadReport") -> bool:
        """Whether it says no more than the one before but that its engine lives, or still stands
        still."""
        if self.steps != before.steps or self.admitted or self.orders:
            return False
        return bool(_said(self) == _said(before))


_said = attrgetter(*(f.name for f in fields(LoadReport) if f.name not in ("sequence", "stalled_s")))


class Heard(Enum):
    """What became of a report in the scheduler."""

    NEWS = "news"  # it says what the one before did not
    LAPSED = "lapsed"  # it repeats that; what was in flight lapsed, or it answers now, or no more
    AGAIN = "again"  # it repeats that, and nothing changed but when its instance was heard last
    TOO_LATE = "too late"  # its run is over, or it was overtaken: nothing changed


def compose_report(
    counts: EngineCounts,
    moves: MoveCounts,
    *,
    instance: InstanceId,
    engine_index: EngineIndex,
    sequence: int,
    admitted: Iterable[RequestId] = (),
    accepting: bool = True,
    orders: Iterable[OrderId] = (),
    steps: int = 0,
    steps_s: float = 0.0,
    stalled_s: float = 0.0,
    in_call: bool = False,
    log_dropped: int = 0,
) -> LoadReport:
    """The one place where a report is put together, of what the engine and its llumlet counted."""
    return LoadReport(
        instance=instance,
        engine_index=engine_index,
        sequence=sequence,
        kv_tokens_used=counts.kv_tokens_used,
        kv_tokens_total=counts.kv_tokens_total,
        prefill_tokens=counts.prefill_tokens,
        block_tokens=counts.block_tokens,
        slots=counts.slots,
        classes=counts.classes,
        head_tokens=counts.head_tokens,
        keep_tokens=counts.keep_tokens,
        passable=counts.passable,
        waiting_least=counts.waiting_least,
        admitted=tuple(admitted),
        accepting=accepting,
        moving_out=moves.out,
        moving_out_tokens=moves.out_tokens,
        moving_out_waiting=moves.out_waiting,
        moving_in=moves.incoming,
        void_orders=moves.void_orders,
        orders=tuple(orders),
        kv_token_bytes=counts.kv_token_bytes,
        preemptions=counts.preemptions,
        steps=steps,
        steps_s=steps_s,
        finished=counts.finished,
        finished_tokens=counts.finished_tokens,
        moved_bytes=moves.moved_bytes,
        moved_s=moves.moved_s,
        stalled_s=stalled_s,
        in_call=in_call,
        log_dropped=log_dropped,
    )
