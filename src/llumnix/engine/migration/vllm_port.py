"""The seam of core/migration/port.py on vLLM's engine: both halves of it, and what concerns both.

Everything here happens on the engine core's own thread, so nothing is locked. It touches vLLM's
scheduler from outside; no class of vLLM's is replaced.

vLLM internals relied on here, beside those of vllm_core.py, vllm_source.py and
vllm_destination.py (tests/house/test_vllm_migration_contract.py fails when one changes):
- `Scheduler.pause_state`; with PAUSED_ALL nothing is scheduled.
- `num_waiting_for_streaming_input` sessions wait for their next input in `kv_holding_waiting` and
  keep their slots.
- A step that schedules nothing is in `batch_queue` too, with `total_num_scheduled_tokens` 0.
"""

from collections.abc import Callable

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from llumnix.core.migration.arrivals import StepTimer
from llumnix.engine.kv.agent_client import AgentClient
from llumnix.engine.migration.vllm_core import VllmCore
from llumnix.engine.migration.vllm_destination import VllmDestination
from llumnix.engine.migration.vllm_source import VllmSource
from llumnix.engine.readings import ABLE, has_prompts

STUCK_STEPS = 3
"""Steps in a row that ran nothing, after which a request that waits with blocks gives them up."""


class VllmPort:
    """Implements `EnginePort` for one engine core."""

    def __init__(
        self,
        engine: EngineCore,
        agents: list[str],
        client: AgentClient,
        pull_failed: Callable[[int, str], None],
        on_commit: Callable[[Request], None] = lambda request: None,
    ) -> None:
        """`agents`: addresses of this engine's own workers' agents, `client` tells them what to
        pull. `pull_failed` is given the ticket of a pull that could not begin, and why;
        `on_commit` a request that has moved in."""
        self.core = core = VllmCore(engine)
        self.source = source = VllmSource(core, agents)
        self.destination = destination = VllmDestination(core, client, pull_failed, on_commit)
        self.step_timer = StepTimer()  # told by the instance, which makes the steps
        self._stuck_steps = 0
        self.block_tokens = core.block_tokens
        self.client = source.client
        self.progress = source.progress
        self.movable = source.movable
        self.describe = source.describe
        self.agents = source.agents
        self.outputs = source.outputs
        self.pin = source.pin
        self.unpin = source.unpin
        self.stop = source.stop
        self.handover_state = source.handover_state
        self.resume = source.resume
        self.release = source.release
        self.reserve = destination.reserve
        self.admit = destination.admit
        self.ready = destination.ready
        self.reach = destination.reach
        self.pull = destination.pull
        self.cancel = destination.cancel
        self.cache = destination.cache
        self.commit = destination.commit
        self.drop = destination.drop

    @property
    def step_s(self) -> float:
        return self.step_timer.step_s

    @property
    def prompts_in_flight(self) -> bool:
        return any(has_prompts(batch) for _, batch, _ in self.core.steps_in_flight())

    def between_steps(self, ran: bool) -> None:
        """A step of the engine has ended. `ran`: whether it ran the model."""
        if ran or not self._deadlocked():
            self._stuck_steps = 0
            return
        self._stuck_steps += 1
        if self._stuck_steps >= STUCK_STEPS:
            self._stuck_steps = 0
            self._break_deadlock()

    def give_up_blocks(self) -> None:
        """Every request that waits with blocks, since it has just come or come back, goes on
        waiting without: vLLM preempts only those that run."""
        for request in reversed(self._able()):
            self._give_up(request)

    def _deadlocked(self) -> bool:
        """Whether nothing runs because requests that wait hold the KV memory that each of them
        lacks."""
        scheduler = self.core.scheduler
        flying = any(b.total_num_scheduled_tokens for _, b, _ in self.core.steps_in_flight())
        if flying or scheduler.running or scheduler.pause_state == PauseState.PAUSED_ALL:
            return False
        if scheduler.num_waiting_for_streaming_input >= scheduler.max_num_active_reqs:
            return False  # Sessions have all slots.
        able = len(self._able())
        # What moves hold comes back by itself, and a single request gains nothing if it gives up
        # its own blocks.
        return able > 1 or (able == 1 and not (self.source.holds() or self.destination.holds()))

    def _break_deadlock(self) -> None:
        """Requests that wait with blocks cannot be preempted by each other. The last of them gives
        its blocks up, as vLLM's own preemption would make it."""
        self._give_up(self._able()[-1])

    def _able(self) -> list[Request]:
        """The requests that wait with blocks and could start."""
        return [r for r in self.core.scheduler.kv_holding_waiting if r.status in ABLE]

    def _give_up(self, request: Request) -> None:
        self.core.scheduler.kv_holding_waiting.remove_requests([request])
        self.core.kv.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.core.scheduler.waiting.prepend_request(request)
