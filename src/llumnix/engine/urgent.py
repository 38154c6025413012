"""Makes room for an urgent request: a slot, KV memory, and tokens of the next step.

vLLM's priority scheduling orders the queue, but the head of the queue waits until running requests
end or get through their prompts, however unimportant they are.

Rules
- The head of the queue is the first request that lacks nothing but room. One that waits for
  something else (a grammar, a place for its LoRA adapter, its last tokens from before a preemption)
  is passed over, as vLLM does. So is one that waits with KV blocks for its client's next input.
- If the head cannot start in the next step, running requests of less urgent classes are preempted:
  the least urgent class first, and in it the latest arrival. Only as many as the head needs, and
  none if even all of them would not suffice. Where only tokens of the step are short, only requests
  in the middle of their prompts are preempted.
- Classes are the clients' own. A request that was promoted since it waited long (aging) preempts no
  other, and is not preempted once it runs.
- A preempted request is queued before all of its class that have not started. It keeps its prefix
  cache entries while memory lasts, and may be moved to another instance like any that waits.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`Scheduler._preempt_request` takes a request that was taken out of `running` between two steps, as
`reset_prefix_cache` has it; `max_num_active_reqs` and `num_waiting_for_streaming_input` bound
`running`, `max_num_scheduled_tokens` a step; running requests are scheduled before waiting ones;
where no rules of ours say more, `kv_cache_manager.watermark_blocks` must be free beside what the
head needs;
`_request_blocks_can_be_freed` says whether blocks return to the pool at once; a request that waits
is skipped, and those behind it looked at, if its status is another than WAITING or PREEMPTED, if it
has `num_stale_output_tokens` without `drop_stale_output`, or if its adapter would be one too many
for `lora_config.max_loras`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request

from llumnix.core.priorities import Priorities
from llumnix.engine.queueing import Queueing
from llumnix.engine.readings import (
    ABLE,
    client_priority,
    has_adapter_room,
    kv_growth,
    start_blocks,
)

PASSED_OVER_MAX = 8
"""So many at the front of the queue are looked at for one that lacks nothing but room."""


class UrgentAdmission:
    """For one engine core. Works only with priority scheduling and at least two classes.
    `queueing`: whose rules say what must stay free; None: vLLM's watermark alone."""

    def __init__(
        self,
        scheduler: Any,
        priorities: Priorities,
        queueing: Queueing | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._kv, self._growth = scheduler.kv_cache_manager, kv_growth(scheduler)
        watermark = int(self._kv.watermark_blocks)
        self._room: Callable[[Request], int] = lambda request: watermark
        self._left: Callable[[Request], int] = lambda request: 0
        if queueing is not None and queueing.room is not None:
            self._room, self._left = queueing.room, queueing.left
        self._priorities = priorities
        self._on = (
            priorities.preempt
            and len(priorities) > 1
            and scheduler.policy == SchedulingPolicy.PRIORITY
        )

    def make_room(self) -> int:
        """Lets the head of the queue start in the next step, if it is urgent enough. Between two
        steps. Returns how many requests were preempted for it."""
        scheduler = self._scheduler
        if (
            not self._on
            or not scheduler.waiting
            or any(r.status in ABLE for r in scheduler.kv_holding_waiting)
            or scheduler.pause_state != PauseState.UNPAUSED
        ):
            return 0
        front = islice(iter(scheduler.waiting), PASSED_OVER_MAX)
        head = next((r for r in front if self._lacks_only_room(r)), None)
        if head is None:
            return 0
        rank = self._priorities.rank(client_priority(head))
        if rank + 1 >= len(self._priorities):
            return 0
        victims = self._enough(head, self._victims(rank))
        now = time.monotonic()
        for victim in victims:
            scheduler.running.remove(victim)
            scheduler._preempt_request(
                victim, now, drop_stale_output=scheduler.requires_kv_delivery
            )
            # The next step may resume it, and must not take it for one that ran on.
            scheduler.prev_step_scheduled_req_ids.discard(victim.request_id)
        return len(victims)

    def _lacks_only_room(self, request: Request) -> bool:
        if request.status not in ABLE:
            return False
        if request.num_stale_output_tokens and not request.drop_stale_output:
            return False
        return has_adapter_room(self._scheduler, request.lora_request, self._scheduler.running)

    def _victims(self, rank: int) -> list[Request]:
        """Running requests that a request of class `rank` may preempt, in that order."""
        found = [
            r
            for r in self._scheduler.running
            if self._priorities.rank(r.priority) > rank
            and self._scheduler._request_blocks_can_be_freed(r)
        ]
        return sorted(found, key=lambda r: (r.priority, r.arrival_time), reverse=True)

    def _enough(self, head: Request, victims: list[Request]) -> list[Request]:
        """As many of the victims, in their order, as `head` needs to start. None if it can start
        anyway, or could not even after all of them."""
        missing = self._missing(head)
        chosen: list[Request] = []
        for victim in victims:
            if missing.none:
                break
            freed = self._freed(victim)
            if missing.slots > 0 or missing.blocks > 0 or freed.tokens > 1:
                chosen.append(victim)
                missing = missing.less(freed)
        return chosen if missing.none else []

    def _missing(self, head: Request) -> "Amount":
        """What `head` needs to start beyond what the next step leaves, counted as vLLM does when it
        admits a request: the running requests get theirs first."""
        scheduler = self._scheduler
        needed, cached = start_blocks(scheduler, head)
        running = [self._wanted(r) for r in scheduler.running]
        beyond = zip(running, scheduler.running, strict=True)
        budget = scheduler.max_num_scheduled_tokens
        active = len(running) + scheduler.num_waiting_for_streaming_input
        return Amount(
            slots=active + 1 - scheduler.max_num_active_reqs,
            blocks=needed
            + sum(max(0, w.blocks - self._left(r)) for w, r in beyond)
            + self._room(head)
            - self._kv.block_pool.get_num_free_blocks(),
            tokens=min(head.num_tokens - cached, budget - len(running))
            + sum(w.tokens for w in running)
            - budget,
        )

    def _wanted(self, request: Request) -> "Amount":
        """What a running request takes in the next step: all that is left of its prompt, or one
        token."""
        growth = self._growth
        held = growth.held(self._kv.get_blocks(request.request_id).blocks)
        tokens = max(1, request.num_tokens - request.num_computed_tokens)
        reach = request.num_computed_tokens + tokens
        blocks = max(0, -(-reach // growth.tokens) - held) * growth.blocks
        return Amount(slots=1, blocks=blocks, tokens=tokens)

    def _freed(self, victim: Request) -> "Amount":
        """What the next step has more without `victim`, of whose blocks only those count that no
        other request holds."""
        groups = self._kv.get_blocks(victim.request_id).blocks
        own = sum(b.ref_cnt == 1 and not b.is_null for group in groups for b in group)
        wanted = self._wanted(victim)
        return Amount(
            slots=1, blocks=own + max(wanted.blocks, self._left(victim)), tokens=wanted.tokens
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """Running slots, KV blocks and tokens of one step."""

    slots: int
    blocks: int
    tokens: int

    @property
    def none(self) -> bool:
        """Whether nothing is missing."""
        return max(self.slots, self.blocks, self.tokens) <= 0

    def less(self, other: "Amount") -> "Amount":
        """Without what `other` provides."""
        return Amount(
            slots=self.slots - other.slots,
            blocks=self.blocks - other.blocks,
            tokens=self.tokens - other.tokens,
        )
