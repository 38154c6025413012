"""What an instance reports of itself: what its engine counted (tokens, requests, seconds, running
totals), and nothing derived."""

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCounts:
    """What a report says of moves: requests on their way out, how many of them wait and hold no KV,
    the KV tokens that the others hold here, requests on their way in, and the running totals of
    bytes moved away and the seconds it took."""

    out: int = 0
    out_waiting: int = 0
    out_tokens: int = 0
    incoming: int = 0
    moved_bytes: int = 0
    moved_s: float = 0.0
