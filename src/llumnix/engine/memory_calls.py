"""Calls that touch all of an engine's KV memory at once, made only when nothing moves.

For these calls vLLM ends or preempts an engine's requests, and then insists that no block is in
use. It does not know of requests that are on their way: these hold blocks too, and their pulls read
and write KV memory beside the engine. So migrations are cancelled first, and the call waits until
the last pull has ended.

vLLM internals relied on here (tests/house/test_vllm_migration_contract.py fails when one
changes):
- `EngineCore.pause_scheduler`, `sleep` (which pauses first), `wake_up` (which resumes last),
  `release_kv_cache_memory` and `reset_prefix_cache`, which pausing calls too, are utility calls on
  the busy loop's thread. If one returns a future, the future's result is the answer.
- Since 0.33 `_reject_add_while_paused(request)` is asked ahead of each new request whether its
  client is told to come again later.
- `reset_prefix_cache(reset_running_requests=True)` preempts what runs, and raises if that leaves a
  block in use.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request

from llumnix.engine.migration.host import LlumletHost
from llumnix.engine.migration.vllm_core import is_sent_again


class MemoryCalls:
    """Mixed into the engine, ahead of vLLM's class."""

    _host: LlumletHost
    scheduler: Any
    model_executor: Any

    def pause_scheduler(self, mode: Any = "abort", clear_cache: bool = True) -> Any:
        """vLLM's, once no request is on its way here and, with `clear_cache`, none on its way from
        here."""
        pause = super().pause_scheduler  # type: ignore[misc]
        return self._host.after_moves(
            "it is paused", lambda: pause(mode, clear_cache), leaving=clear_cache
        )

    def _reject_add_while_paused(self, request: Request) -> bool:
        """vLLM's, since 0.33. A request that is sent again, because its engine died, is not new."""
        refuses = super()._reject_add_while_paused  # type: ignore[misc]
        return not is_sent_again(request) and bool(refuses(request))

    def resume_scheduler(self) -> Any:
        """vLLM's, once earlier pauses have begun. Requests may come again."""
        resume = super().resume_scheduler  # type: ignore[misc]

        def call() -> None:
            resume()
            self._welcome()

        return self._host.after_calls(call)

    def _welcome(self) -> None:
        """Requests may come, unless the engine is paused."""
        if self.scheduler.pause_state == PauseState.UNPAUSED:
            self._host.welcome()

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> Any:
        """vLLM's, once nothing moves."""
        reset = super().reset_prefix_cache  # type: ignore[misc]

        def call() -> bool:
            if reset_running_requests:
                self._host.port.give_up_blocks()
            return bool(reset(reset_running_requests, reset_connector))

        if self.scheduler.pause_state != PauseState.UNPAUSED:
            return call()  # Nothing comes. Pausing calls it too, and wants the answer at once.
        answer = self._host.after_moves("its caches are being reset", call, leaving=True)
        if isinstance(answer, Future):
            answer.add_done_callback(lambda _: self._welcome())
        else:
            self._welcome()
        return answer

    def sleep(self, level: int = 1, mode: Any = "abort") -> Any:
        """vLLM's, once nothing moves and no peer reads from here."""
        fall_asleep = super().sleep  # type: ignore[misc]
        if level < 1:
            return fall_asleep(level, mode)  # It only pauses.

        def call() -> Any:
            return self._with_memory_held(lambda: fall_asleep(level, mode))

        return self._host.after_moves("it sleeps", call, leaving=True)

    def release_kv_cache_memory(self) -> None:
        """vLLM's, of an engine that is paused. From now on no peer reads from here."""
        self._with_memory_held(super().release_kv_cache_memory)  # type: ignore[misc]

    def _with_memory_held(self, call: Callable[[], Any]) -> Any:
        """Makes a call after which no peer reads from here, if it does not fail."""

        def back() -> None:
            self._host.hold_memory(held=bool(self.model_executor.is_sleeping))

        def ended(answer: Future[Any]) -> None:
            if answer.cancelled() or answer.exception() is not None:
                back()

        self._host.hold_memory(held=True)
        try:
            answer = call()
        except BaseException:
            back()
            raise
        if isinstance(answer, Future):
            answer.add_done_callback(ended)
        return answer

    def wake_up(self, tags: list[str] | None = None) -> bool:
        """vLLM's. Peers may read again once all memory is back."""
        awake = bool(super().wake_up(tags))  # type: ignore[misc]
        if awake:
            self._host.hold_memory(held=False)
        return awake
