"""Calls that wait until nothing moves, and those that must not overtake them.

Rules
- Calls are made in the order in which they came.
- A call waits for requests on their way here, and if it says `leaving`, for those on their way from
  here too. It waits `MOVES_END_MAX_S` at most, then it is made all the same, and fails if vLLM has
  it fail.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from llumnix.core.migration.llumlet import Llumlet

MOVES_END_MAX_S = 30.0


@dataclass(frozen=True, slots=True)
class _WaitingCall:
    call: Callable[[], Any]
    leaving: bool
    until_s: float
    answer: "Future[Any]" = field(default_factory=Future)

    def make(self) -> None:
        """Makes it. What it returns may be a future of vLLM's itself."""
        try:
            result = self.call()
        except Exception as error:  # noqa: BLE001 - it is for whoever asked
            self.answer.set_exception(error)
            return
        if not isinstance(result, Future):
            self.answer.set_result(result)
        elif not result.done():
            result.add_done_callback(self._pass_on)
        else:
            self._pass_on(result)

    def _pass_on(self, result: "Future[Any]") -> None:
        if (error := result.exception()) is not None:
            self.answer.set_exception(error)
        else:
            self.answer.set_result(result.result())


class WaitingCalls:
    """One engine's. Its own thread only."""

    def __init__(self, llumlet: Llumlet) -> None:
        self._llumlet = llumlet
        self._calls: list[_WaitingCall] = []

    def __len__(self) -> int:
        return len(self._calls)

    def wait(self, call: Callable[[], Any], now: float, *, leaving: bool) -> Any:
        """Makes a call once nothing moves: returns its result, or a future if that is later."""
        waiting = _WaitingCall(call, leaving, now + MOVES_END_MAX_S)
        self._calls.append(waiting)
        self.make(now)
        return waiting.answer.result() if waiting.answer.done() else waiting.answer

    def follow(self, call: Callable[[], Any]) -> Any:
        """Makes a call that waits for no move, but for the calls that came before it."""
        if not self._calls:
            return call()
        waiting = _WaitingCall(call, leaving=False, until_s=0.0)
        self._calls.append(waiting)
        return waiting.answer

    def make(self, now: float) -> None:
        """Makes those whose time has come. Between two steps."""
        while self._calls:
            first = self._calls[0]
            if now < first.until_s and not self._llumlet.still(leaving=first.leaving):
                break  # The others came later.
            del self._calls[0]
            if not any(waiting.leaving for waiting in self._calls):
                self._llumlet.may_leave()
            first.make()
