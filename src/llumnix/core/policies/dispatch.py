"""Where a new request goes.

A policy is asked with the view and answers one instance with the reason, or None if no instance
takes requests. It may keep state of its own, but it sees no clock and no dice.
"""

from collections.abc import Callable
from typing import Protocol

from llumnix.core.events import RequestArrived
from llumnix.core.load import Load
from llumnix.core.prefixes import BLOCK_TOKENS, PrefixIndex
from llumnix.core.types import InstanceId
from llumnix.core.view import ClusterView, InstanceView, Order

AHEAD_TOKENS = 512
"""Fewer tokens of prompts take about as long as a decode step or two: no reason to go where less
memory is free."""


class DispatchPolicy(Protocol):
    """One rule of placing requests."""

    def choose(
        self, view: ClusterView, request: RequestArrived, now: float
    ) -> tuple[InstanceView, str] | None:
        """Returns an instance and why it."""
        ...


class RoundRobin:
    """The instances in turn, whatever their load."""

    def __init__(self) -> None:
        self._last = InstanceId("")

    def choose(
        self, view: ClusterView, request: RequestArrived, now: float
    ) -> tuple[InstanceView, str] | None:
        chosen = view.next_after(self._last, now)
        if chosen is None:
            return None
        self._last = chosen.report.instance
        return chosen, "round-robin: its turn"


class LeastLoaded:
    """Fewest requests (dispatches in flight included), then fewest KV tokens, then in turn."""

    def __init__(self) -> None:
        self._last = InstanceId("")

    def choose(
        self, view: ClusterView, request: RequestArrived, now: float
    ) -> tuple[InstanceView, str] | None:
        candidates = view.candidates(now)
        if not candidates:
            return None
        lowest = min((v.requests, v.tokens) for v in candidates)
        tied = [v for v in candidates if (v.requests, v.tokens) == lowest]
        chosen = next((v for v in tied if v.report.instance > self._last), tied[0])
        self._last = chosen.report.instance
        return chosen, f"least-loaded: {lowest[0]} requests, {lowest[1]} KV tokens"


def by_freeness(known: InstanceView, rank: int, view: ClusterView) -> tuple[float, ...]:
    """The highest freeness first, as a newcomer of that class meets it; of several alike, the one
    that has waited longest for a dispatch."""
    return -known.load.freeness_for(rank, view.priorities), known.turn


def by_start(known: InstanceView, rank: int, view: ClusterView) -> tuple[float, ...]:
    """First those that have memory: the fewest tokens to compute before a newcomer's own, in
    `AHEAD_TOKENS`, then the highest freeness. Then those where only the headroom of more urgent
    classes is left, last those so short of it that they give requests away, each the least short
    first. Of several alike, mostly because they stand idle, the one that was dispatched to last:
    it is the warmest."""
    return *_by_start(known.load, rank, view), -known.turn


def by_start_in_turn(known: InstanceView, rank: int, view: ClusterView) -> tuple[float, ...]:
    """The same, but of several alike the one that has waited longest for a dispatch: what no
    instance has in its prefix cache is spread over all of them."""
    return *_by_start(known.load, rank, view), known.turn


def _by_start(load: Load, rank: int, view: ClusterView) -> tuple[float, float, float, float]:
    freeness = load.freeness_for(rank, view.priorities)
    ahead = load.ahead_of(rank) // AHEAD_TOKENS
    short = view.thresholds[0] - freeness
    if short <= 0:
        return 0.0, 0.0, ahead, -freeness
    # No headroom is kept from the most urgent class.
    full = view.thresholds[0] - load.freeness_for(0, view.priorities) if rank else short
    return max(0.0, full), short, ahead, -freeness


class Best:
    """The first in one order of the instances. `why`: a format of `freeness`, in tokens a request,
    and of `ahead`, the tokens to compute before the request's own."""

    def __init__(self, order: Order, why: str) -> None:
        self._order = order
        self._why = why

    def choose(
        self, view: ClusterView, request: RequestArrived, now: float
    ) -> tuple[InstanceView, str] | None:
        rank = view.priorities.rank(request.priority)
        chosen = view.best(self._order, rank, now)
        if chosen is None:
            return None
        load = chosen.load
        freeness = load.freeness_for(rank, view.priorities)
        return chosen, self._why.format(freeness=freeness, ahead=load.ahead_of(rank))


def freest() -> Best:
    """The highest freeness as a newcomer of the request's class meets it."""
    return Best(by_freeness, "freest: {freeness:.0f} tokens a request")


def soonest(order: Order = by_start) -> Best:
    """Where the request starts soonest, and disturbs the fewest: memory is not short, and the
    fewest tokens of other prompts are still to be computed; of several alike the freest."""
    return Best(order, "soonest: after {ahead} tokens, {freeness:.0f} tokens a request")


class CacheAware:
    """The fewest tokens to compute until the request's first: those of its prompt that the
    instance does not have, and those that wait there; of several alike the freest, then the one
    that has waited longest. An instance that is short of memory is not worth a hit, so a popular
    prefix does not make a hot spot."""

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self._soonest = soonest(by_start_in_turn)

    def choose(
        self, view: ClusterView, request: RequestArrived, now: float
    ) -> tuple[InstanceView, str] | None:
        fallback = self._soonest.choose(view, request, now)
        if fallback is None or not request.prefix:
            return fallback
        rank = view.priorities.rank(request.priority)
        source_below, _ = view.thresholds

        def cost(known: InstanceView, new: int) -> tuple[float, float, int]:
            freeness = known.load.changed(rank, 1, new).freeness_for(rank, view.priorities)
            return known.load.ahead_of(rank) + new, -freeness, known.turn

        best, why = fallback
        lowest = cost(best, request.prompt_tokens)
        for instance, blocks in self.index.hits(request.prefix).items():
            known = view.get(instance)
            if known is None or not known.report.accepting or not known.fresh(now):
                continue
            hit = min(blocks * BLOCK_TOKENS, request.prompt_tokens - 1)
            mine = cost(known, request.prompt_tokens - hit)
            if mine < lowest and -mine[1] >= source_below:
                best, lowest = known, mine
                why = f"cache-aware: {hit} of {request.prompt_tokens} tokens there"
        return best, why


DISPATCH_POLICIES: dict[str, Callable[[], DispatchPolicy]] = {
    "soonest": soonest,
    "freest": freest,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "cache-aware": CacheAware,
}
