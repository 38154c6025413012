"""Where a new request goes.

A policy is asked with the view and answers one instance with the reason, or None if no instance
takes requests. It may keep state of its own, but it sees no clock and no dice.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from llumnix.core.events import PrefixesChanged, RequestArrived
from llumnix.core.prefixes import BLOCK_TOKENS
from llumnix.core.scheduling.load import Load
from llumnix.core.scheduling.prefix_index import PrefixIndex
from llumnix.core.scheduling.tuning import (
    HALF_WEIGHT_BATCH,
    HOLDERS_MAX,
    NEIGHBOUR_PROMPT_SHARE,
    NEIGHBOUR_TOKENS,
    PREFILL_QUANTUM_TOKENS,
    PREFILL_WEIGHT,
)
from llumnix.core.scheduling.view import ClusterView, InstanceView
from llumnix.core.types import InstanceId


class Choice(NamedTuple):
    """An answer to a request: the instance, the reason, and how many tokens of the prompt are known
    to be in its prefix cache."""

    instance: InstanceView
    why: str
    cached: int = 0


class DispatchPolicy(ABC):
    """One rule of placing requests."""

    looks_at_caches: ClassVar[bool] = False
    """Whether it wants to know what is in the instances' prefix caches."""

    @abstractmethod
    def choose(self, view: ClusterView, request: RequestArrived, now: float) -> Choice | None:
        """Returns an instance and why it; None if no instance takes requests."""

    def learn(self, fact: PrefixesChanged) -> None:  # noqa: B027 - optional
        """Takes in what changed in an instance's prefix cache."""

    def forget(self, instance: InstanceId) -> None:  # noqa: B027 - optional
        """This run of the instance is over, and its prefix cache with it."""


class RoundRobin(DispatchPolicy):
    """The instances in turn, whatever their load."""

    def __init__(self) -> None:
        self._last = InstanceId("")

    def choose(self, view: ClusterView, request: RequestArrived, now: float) -> Choice | None:
        chosen = view.next_after(self._last, now)
        if chosen is None:
            return None
        self._last = chosen.report.instance
        return Choice(chosen, "round-robin: its turn")


class LeastLoaded(DispatchPolicy):
    """Fewest requests (dispatches in flight included), then fewest KV tokens, then in turn."""

    def __init__(self) -> None:
        self._last = InstanceId("")

    def choose(self, view: ClusterView, request: RequestArrived, now: float) -> Choice | None:
        candidates = view.candidates(now)
        if not candidates:
            return None
        lowest = min((v.requests, v.tokens) for v in candidates)
        tied = [v for v in candidates if (v.requests, v.tokens) == lowest]
        chosen = next((v for v in tied if v.report.instance > self._last), tied[0])
        self._last = chosen.report.instance
        why = f"least-loaded: {lowest[0]} requests, {lowest[1]} KV tokens"
        return Choice(chosen, why)


def by_freeness(known: InstanceView, rank: int, view: ClusterView) -> tuple[float, ...]:
    """The highest freeness first, as a newcomer of that class meets it; of several alike, the one
    that has waited longest for a dispatch."""
    return -known.load.freeness_for(rank, view.priorities), known.turn


def by_start(known: InstanceView, rank: int, view: ClusterView) -> tuple[float, ...]:
    """First those that have memory: the fewest tokens to compute before a newcomer's own, in
    `PREFILL_QUANTUM_TOKENS`, then the highest freeness. Then those where only the headroom of more
    urgent classes is left, last those so short of it that they give requests away, each the least
    short first. Of several alike, mostly because they stand idle, the one that was dispatched to
    last: it is the warmest."""
    load = known.load
    freeness = load.freeness_for(rank, view.priorities)
    ahead = load.ahead_of(rank) // PREFILL_QUANTUM_TOKENS
    short = view.thresholds[0] - freeness
    if short <= 0:
        return 0.0, 0.0, ahead, -freeness, -known.turn
    # No headroom is kept from the most urgent class.
    full = view.thresholds[0] - load.freeness_for(0, view.priorities) if rank else short
    return max(0.0, full), short, ahead, -freeness, -known.turn


class HighestFreeness(DispatchPolicy):
    """The highest freeness as a newcomer of the request's class meets it."""

    def choose(self, view: ClusterView, request: RequestArrived, now: float) -> Choice | None:
        rank = view.priorities.rank(request.priority)
        chosen = view.best(by_freeness, rank, now)
        if chosen is None:
            return None
        freeness = chosen.load.freeness_for(rank, view.priorities)
        return Choice(chosen, f"freest: {freeness:.0f} tokens a request")


class Soonest(DispatchPolicy):
    """Where the request starts soonest, and disturbs the fewest: memory is not short, and the
    fewest tokens of prompts are still to be computed, its own included as far as they are not in
    the instance's prefix cache; of several alike the freest.

    With a hit elsewhere a token to compute weighs `PREFILL_WEIGHT` times as much as one to wait
    for, and once more for each request that waits there: to compute what another has delays
    everybody there, and takes room in its cache. Where all have queues, to keep to the caches is
    what makes them shorter.
    A hit is worth memory that is short: tokens that are missing to start weigh as much as tokens to
    wait for, and less the more requests run there, of which one will soon end. It is not worth the
    headroom of more urgent classes, nor a full batch, nor one with many more requests, each of
    which makes every step longer: each weighs as much as `NEIGHBOUR_TOKENS` to wait for, and
    `NEIGHBOUR_PROMPT_SHARE` of the prompt, since who shares a long prefix has a long context.
    Otherwise a popular prefix would gather its requests on one instance while others stand idle.
    With `HALF_WEIGHT_BATCH` requests where it would go else each weighs half of that, and so on:
    among many, a few more are chance.

    Of idle instances a long prompt of which the warmest has no more than the next in turn goes to
    the latter, so that all their caches fill and not one alone."""

    looks_at_caches = True

    def __init__(self) -> None:
        self._index = PrefixIndex()
        self._last = InstanceId("")

    def choose(self, view: ClusterView, request: RequestArrived, now: float) -> Choice | None:
        rank = view.priorities.rank(request.priority)
        best, here = view.best(by_start, rank, now), 0
        if best is None:
            return None
        if request.prefix:
            here = self._index.hit(best.report.instance, request.prefix)
            holders = self._index.hits(request.prefix, HOLDERS_MAX, above=here)
            if holders:
                found = self._worth(holders, best, here, view, request, now)
                if found is not None:
                    return found
            elif not best.load.batch and not best.load.waiting:
                best, here = self._next_idle(best, here, view, request, now)
        load = best.load
        freeness = load.freeness_for(rank, view.priorities)
        why = f"soonest: after {load.ahead_of(rank)} tokens, {freeness:.0f} tokens a request"
        return Choice(best, why, _tokens(here, request.prompt_tokens))

    def learn(self, fact: PrefixesChanged) -> None:
        if fact.cleared:
            self._index.clear(fact.instance)
        self._index.remove(fact.instance, fact.removed)
        self._index.store(fact.instance, fact.stored)

    def forget(self, instance: InstanceId) -> None:
        self._index.clear(instance)

    def _next_idle(
        self, best: InstanceView, here: int, view: ClusterView, request: RequestArrived, now: float
    ) -> tuple[InstanceView, int]:
        """The instance that follows in turn, and its hit in blocks, if much of the prompt is to be
        computed and the two are alike; else `best`, which is idle, and its own hit, `here`."""
        if request.prompt_tokens - here * BLOCK_TOKENS < PREFILL_QUANTUM_TOKENS:
            return best, here
        rank = view.priorities.rank(request.priority)
        other = view.next_after(self._last, now) or best
        self._last = other.report.instance
        alike = by_start(other, rank, view)[:-1] == by_start(best, rank, view)[:-1]
        there = self._index.hit(other.report.instance, request.prefix) if alike else -1
        return (other, there) if there >= here else (best, here)

    def _worth(
        self,
        holders: dict[InstanceId, int],
        best: InstanceView,
        here: int,
        view: ClusterView,
        request: RequestArrived,
        now: float,
    ) -> Choice | None:
        """The instance whose hit is worth most, if it is better than the best without, whose own
        is `here`. `holders`: hits in blocks."""
        rank, prompt = view.priorities.rank(request.priority), request.prompt_tokens
        others = best.load.batch + best.load.waiting
        each = (
            (NEIGHBOUR_TOKENS + NEIGHBOUR_PROMPT_SHARE * prompt)
            * HALF_WEIGHT_BATCH
            / (HALF_WEIGHT_BATCH + others)
        )

        def cost(load: Load, hit: int) -> float:
            new = (PREFILL_WEIGHT + load.waiting) * (prompt - hit)
            beside = each * (load.batch + load.waiting)
            missing = max(0.0, prompt - hit - load.spare_for(0, view.priorities))
            freed = missing * HALF_WEIGHT_BATCH / (HALF_WEIGHT_BATCH + load.batch)
            return (load.ahead_of(rank) + freed + new + beside) // PREFILL_QUANTUM_TOKENS

        def closed(load: Load) -> bool:
            if load.slots and load.batch + load.waiting >= load.slots:
                return True
            kept = view.priorities.headroom(load.total, load.running, above=rank)
            return kept > 0 and load.freeness_for(rank, view.priorities) < view.thresholds[0]

        found: Choice | None = None
        lowest = cost(best.load, _tokens(here, prompt))
        best_closed = closed(best.load)
        for instance, blocks in holders.items():
            known, hit = view.get(instance), _tokens(blocks, prompt)
            if known is None or not known.accepting or not known.answers(now):
                continue
            mine = cost(known.load, hit)
            if mine < lowest and (best_closed or not closed(known.load)):
                lowest = mine
                why = f"soonest: {hit} of {prompt} tokens are in its cache"
                found = Choice(known, why, hit)
        return found


def _tokens(blocks: int, prompt: int) -> int:
    """What is found of a prompt, whose last token is computed in any case."""
    return max(0, min(blocks * BLOCK_TOKENS, prompt - 1))


DISPATCH_POLICIES: dict[str, type[DispatchPolicy]] = {
    "soonest": Soonest,
    "freest": HighestFreeness,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
}
