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


class FreenessKey(NamedTuple):
    """Sort key: the highest freeness first. On a tie the instance that has waited longest for a
    dispatch."""

    minus_freeness: float
    last_dispatch: float


def highest_freeness_key(known: InstanceView, rank: int, view: ClusterView) -> FreenessKey:
    """The place of an instance for a new request of that class."""
    return FreenessKey(-known.load.freeness_for(rank, view.priorities), known.last_dispatch)


class StartKey(NamedTuple):
    """Sort key: where a new request starts soonest.

    Instances with memory come first: the fewest queued tokens, then the highest freeness. Then come
    those that have nothing left but the headroom of more urgent classes, and last those without
    even that, each the least short first. On a tie, which is mostly among idle instances, the one
    that was dispatched to last: its caches are the warmest."""

    short_without_headroom: float  # what its freeness lacks to the threshold, headroom not kept
    short: float  # what its freeness lacks to the threshold of sources
    prefill_quanta: float  # queued before the request, in `PREFILL_QUANTUM_TOKENS`
    minus_freeness: float
    minus_last_dispatch: float


def earliest_start_key(known: InstanceView, rank: int, view: ClusterView) -> StartKey:
    """The place of an instance for a new request of that class."""
    load, threshold = known.load, view.thresholds[0]
    freeness = load.freeness_for(rank, view.priorities)
    quanta = load.queued_prefill_before(rank) // PREFILL_QUANTUM_TOKENS
    short = threshold - freeness
    if short <= 0:
        return StartKey(0.0, 0.0, quanta, -freeness, -known.last_dispatch)
    # No headroom is kept from the most urgent class.
    full = threshold - load.freeness_for(0, view.priorities) if rank else short
    return StartKey(max(0.0, full), short, quanta, -freeness, -known.last_dispatch)


class PlacementCost(NamedTuple):
    """What it costs to place a request on one instance, in tokens of prompts to wait for.

    A request of p tokens comes to an instance that has h of them in its prefix cache, runs b
    requests and has w waiting. The instance that is best without a look at caches has n requests.

        queued   tokens of prompts that are computed before it
        memory   m B / (B + b), where m tokens of memory are missing to start it
        prefill  (PREFILL_WEIGHT + w) (p - h)
        batch    (NEIGHBOUR_TOKENS + NEIGHBOUR_PROMPT_SHARE p) B / (B + n) (b + w)

    `memory`: it waits until requests end, and of many one ends sooner than of few.
    `prefill`: to compute what another instance has takes its own time, and room in the cache here,
    and delays each request that waits here. Where all have queues, to keep to the caches is what
    makes them shorter.
    `batch`: each request beside it makes every step longer, and longer still if contexts are long,
    as they are where a long prefix is shared. Without this term a popular prefix would gather its
    requests on one instance while others stand idle. Among many requests a few more are chance, so
    that each weighs less. B is `HALF_WEIGHT_BATCH`."""

    queued: float
    memory: float
    prefill: float
    batch: float

    @property
    def quanta(self) -> float:
        """The sum, in `PREFILL_QUANTUM_TOKENS`: less of a difference decides nothing."""
        tokens = self.queued + self.memory + self.prefill + self.batch
        return tokens // PREFILL_QUANTUM_TOKENS


class HighestFreeness(DispatchPolicy):
    """The highest freeness as a newcomer of the request's class meets it."""

    def choose(self, view: ClusterView, request: RequestArrived, now: float) -> Choice | None:
        rank = view.priorities.rank(request.priority)
        chosen = view.best(highest_freeness_key, rank, now)
        if chosen is None:
            return None
        freeness = chosen.load.freeness_for(rank, view.priorities)
        return Choice(chosen, f"freest: {freeness:.0f} tokens a request")


class EarliestStart(DispatchPolicy):
    """Where the request starts soonest and disturbs the fewest: the first by `StartKey`, or an
    instance that has more of the prompt in its prefix cache, if its `PlacementCost` is lower.

    A hit is worth memory that is short, but neither the headroom of more urgent classes nor an
    instance without a free slot.

    A long prompt that no other instance has more of goes, of idle instances, to the next in turn
    and not to the warmest, so that the caches of all fill and not one alone."""

    looks_at_caches = True

    def __init__(self) -> None:
        self._index = PrefixIndex()
        self._last = InstanceId("")

    def choose(self, view: ClusterView, request: RequestArrived, now: float) -> Choice | None:
        rank = view.priorities.rank(request.priority)
        best, here = view.best(earliest_start_key, rank, now), 0
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
        queued = best.load.queued_prefill_before(rank)
        freeness = best.load.freeness_for(rank, view.priorities)
        why = f"soonest: after {queued} tokens, {freeness:.0f} tokens a request"
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
        mine, its = (earliest_start_key(v, rank, view) for v in (best, other))
        alike = mine[:-1] == its[:-1]
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
        """The holder that costs least, if it costs less than `best`, whose own hit is `here`; None
        if none does. `holders`: hits in blocks."""
        rank, prompt = view.priorities.rank(request.priority), request.prompt_tokens
        others = best.load.batch + best.load.waiting
        each = _each_neighbour(prompt, others)
        found: Choice | None = None
        lowest = _cost(best.load, prompt, _tokens(here, prompt), each, rank, view).quanta
        best_closed = _is_closed(best.load, rank, view)
        for instance, blocks in holders.items():
            known, hit = view.get(instance), _tokens(blocks, prompt)
            if known is None or not known.accepting or not known.answers(now):
                continue
            quanta = _cost(known.load, prompt, hit, each, rank, view).quanta
            if quanta < lowest and (best_closed or not _is_closed(known.load, rank, view)):
                lowest = quanta
                why = f"soonest: {hit} of {prompt} tokens are in its cache"
                found = Choice(known, why, hit)
        return found


def _each_neighbour(prompt: int, others: int) -> float:
    """What each request beside a prompt weighs. `others`: requests at the best instance without a
    look at caches."""
    alone = NEIGHBOUR_TOKENS + NEIGHBOUR_PROMPT_SHARE * prompt
    return alone * HALF_WEIGHT_BATCH / (HALF_WEIGHT_BATCH + others)


def _cost(
    load: Load, prompt: int, hit: int, each: float, rank: int, view: ClusterView
) -> PlacementCost:
    """Of a prompt on an instance that has `hit` tokens of it."""
    missing = max(0.0, prompt - hit - load.spare_for(0, view.priorities))
    return PlacementCost(
        queued=load.queued_prefill_before(rank),
        memory=missing * HALF_WEIGHT_BATCH / (HALF_WEIGHT_BATCH + load.batch),
        prefill=(PREFILL_WEIGHT + load.waiting) * (prompt - hit),
        batch=each * (load.batch + load.waiting),
    )


def _is_closed(load: Load, rank: int, view: ClusterView) -> bool:
    """Whether no hit is worth going there: no slot is free, or what is left is the headroom of more
    urgent classes."""
    if load.slots and load.batch + load.waiting >= load.slots:
        return True
    kept = view.priorities.headroom(load.total, load.running, above=rank)
    return kept > 0 and load.freeness_for(rank, view.priorities) < view.thresholds[0]


def _tokens(blocks: int, prompt: int) -> int:
    """What is found of a prompt, whose last token is computed in any case."""
    return max(0, min(blocks * BLOCK_TOKENS, prompt - 1))


DISPATCH_POLICIES: dict[str, type[DispatchPolicy]] = {
    "soonest": EarliestStart,
    "freest": HighestFreeness,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
}
