"""Where a new request goes.

A policy is asked with the candidates in order of id (never empty) and answers one of them with
the reason. It may keep state of its own, but it sees no clock and no dice.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from llumnix.core.types import InstanceId
from llumnix.core.view import InstanceView


class DispatchPolicy(Protocol):
    """One rule of placing requests."""

    def choose(self, candidates: Sequence[InstanceView]) -> tuple[InstanceView, str]:
        """Returns one of `candidates` and why it."""
        ...


class RoundRobin:
    """The instances in turn, whatever their load."""

    def __init__(self) -> None:
        self._last = InstanceId("")

    def choose(self, candidates: Sequence[InstanceView]) -> tuple[InstanceView, str]:
        chosen = _next_after(self._last, candidates)
        self._last = chosen.report.instance
        return chosen, "round-robin: its turn"


class LeastLoaded:
    """Fewest requests (dispatches in flight included), then fewest KV tokens, then in turn."""

    def __init__(self) -> None:
        self._last = InstanceId("")

    def choose(self, candidates: Sequence[InstanceView]) -> tuple[InstanceView, str]:
        lowest = min((v.requests, v.tokens) for v in candidates)
        tied = [v for v in candidates if (v.requests, v.tokens) == lowest]
        chosen = _next_after(self._last, tied)
        self._last = chosen.report.instance
        return chosen, f"least-loaded: {lowest[0]} requests, {lowest[1]} KV tokens"


def _next_after(last: InstanceId, candidates: Sequence[InstanceView]) -> InstanceView:
    """The first in order of id behind `last`, else the first of all."""
    return next((v for v in candidates if v.report.instance > last), candidates[0])


DISPATCH_POLICIES: dict[str, Callable[[], DispatchPolicy]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
}
