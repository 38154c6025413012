"""Where a new request goes.

A policy is asked with the view, and answers with one instance and the reason, or with None if no
instance takes requests. It may keep state of its own, but it sees no clock and no dice.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from llumnix.core.codes import DispatchCode
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
    """A policy's answer."""

    instance: InstanceView
    why: str
    code: DispatchCode
    cached: int = 0  # tokens of the prompt that are known to be in its prefix cache


class DispatchPolicy(ABC):
    """A rule of placing requests."""

    looks_at_caches: ClassVar[bool] = False
    """Whether it wants to know what is in the instances' prefix caches."""

    @abstractmethod
    def choose(self, view: ClusterView, request: RequestArrived, now: float) -> Choice | None:
        """Where the request goes; None if no instance takes requests."""

    def learn(self, fact: PrefixesChanged) -> None:  # noqa: B027 - optional
        """Takes in what has changed in an instance's prefix cache."""

    def forget(self, instance: InstanceId) -> None:  # noqa: B027 - optional
        """This run of the instance is over, and its prefix cache with it."""


class RoundRobin(DispatchPolicy):
    """The instances in turn, regardless of their load."""

    def __init__(self) -> None:
        self._last = InstanceId("")

    def choose(self, view: ClusterView, request: RequestArrived, now: float) -> Choice | None:
        chosen = view.next_after(self._last, now)
        if chosen is None:
            return None
        self._last = chosen.report.instance
        return Choice(chosen, "round-robin: its turn", DispatchCode.TURN)


class LeastLoaded(DispatchPolicy):
    """The fewest requests, dispatches in flight included, then the fewest KV tokens, then in
    turn."""

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
        return Choice(chosen, why, DispatchCode.LEAST_LOADED)


class FreenessKey(NamedTuple):
    """Sort key: the highest freeness first. On a tie, the instance whose last dispatch is longest
    ago."""

    minus_freeness: float
    last_dispatch: float


def highest_freeness_key(known: InstanceView, rank: int, view: ClusterView) -> FreenessKey:
    """The key of an instance for a new request of that class."""
    return FreenessKey(-known.load.freeness_for(rank, view.priorities), known.last_dispatch)


class StartKey(NamedTuple):
    """Sort key: where a new request starts soonest.

    - Instances with free memory come first. Of these the fewest queued tokens of prompts decide,
      then the highest freeness.
    - Then come those with nothing left but the headroom of more urgent classes, and last those
      without even that, each the least short first.
    - On a tie, which is mostly among idle instances, the most recently used one, since its caches
      are the warmest."""

    short_without_headroom: float  # the same as `short` if headroom were not kept free
    short: float  # decode steps of freeness that are missing to the threshold of sources
    prefill_quanta: float  # tokens queued before the request, in `PREFILL_QUANTUM_TOKENS`
    minus_freeness: float
    minus_last_dispatch: float


def earliest_start_key(known: InstanceView, rank: int, view: ClusterView) -> StartKey:
    """The key of an instance for a new request of that class."""
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

    `memory`: the request waits until others end, and among many one ends sooner than among few.
    `prefill`: a token that is computed again takes time and room in the cache here, and delays each
    waiting request. So where all instances have queues, requests keep to the caches, which makes
    the queues shorter.
    `batch`: each request makes the steps of the others longer, and longer still with a long
    context, as requests with a long shared prefix have. Without this term a popular prefix would
    gather its requests on one instance while others are idle. Among many requests a difference of
    a few is chance, so that each weighs less.
    B is `HALF_WEIGHT_BATCH`."""

    queued: float
    memory: float
    prefill: float
    batch: float

    @property
    def quanta(self) -> float:
        """The sum in `PREFILL_QUANTUM_TOKENS`, because smaller differences decide nothing."""
        tokens = self.queued + self.memory + self.prefill + self.batch
        return tokens // PREFILL_QUANTUM_TOKENS


class HighestFreeness(DispatchPolicy):
    """The highest freeness for the request's class."""

    def choose(self, view: ClusterView, request: RequestArrived, now: float) -> Choice | None:
        rank = view.priorities.rank(request.priority)
        chosen = view.best(highest_freeness_key, rank, now)
        if chosen is None:
            return None
        freeness = chosen.load.freeness_for(rank, view.priorities)
        why = f"freest: {freeness:.0f} tokens a request"
        return Choice(chosen, why, DispatchCode.FREEST)


class EarliestStart(DispatchPolicy):
    """Where the request starts soonest and disturbs the fewest: the first instance by `StartKey`,
    or one that has more of the prompt in its prefix cache, if its `PlacementCost` is lower.

    A hit may decide for an instance that is short of memory. It may not decide for one that has no
    free slot, or nothing left but the headroom of more urgent classes, unless the first instance is
    like that too.

    If the first instance is idle and no other has more of a long prompt, the next idle instance in
    turn takes it instead, so that the caches of all fill, and not one alone."""

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
                found = self._cheapest_holder(holders, best, here, view, request, now)
                if found is not None:
                    return found
            elif not best.load.batch and not best.load.waiting:
                best, here = self._next_idle(best, here, view, request, now)
        queued = best.load.queued_prefill_before(rank)
        freeness = best.load.freeness_for(rank, view.priorities)
        why = f"soonest: after {queued} tokens, {freeness:.0f} tokens a request"
        return Choice(best, why, DispatchCode.SOONEST, _tokens(here, request.prompt_tokens))

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
        """The next instance in turn and its hit in blocks, if it is as good as `best`, which is
        idle, and much of the prompt is to be computed; else `best` and its own hit, `here`."""
        if request.prompt_tokens - here * BLOCK_TOKENS < PREFILL_QUANTUM_TOKENS:
            return best, here
        rank = view.priorities.rank(request.priority)
        other = view.next_after(self._last, now) or best
        self._last = other.report.instance
        mine, its = (earliest_start_key(v, rank, view) for v in (best, other))
        alike = mine[:-1] == its[:-1]
        there = self._index.hit(other.report.instance, request.prefix) if alike else -1
        return (other, there) if there >= here else (best, here)

    def _cheapest_holder(
        self,
        holders: dict[InstanceId, int],
        best: InstanceView,
        here: int,
        view: ClusterView,
        request: RequestArrived,
        now: float,
    ) -> Choice | None:
        """The holder of the lowest cost; None if `best`, whose own hit is `here`, costs no more.
        `holders`: their hits in blocks."""
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
                found = Choice(known, why, DispatchCode.CACHED, hit)
        return found


def _each_neighbour(prompt: int, others: int) -> float:
    """What each request on the same instance weighs. `others`: requests on the instance that is
    best without a look at caches."""
    alone = NEIGHBOUR_TOKENS + NEIGHBOUR_PROMPT_SHARE * prompt
    return alone * HALF_WEIGHT_BATCH / (HALF_WEIGHT_BATCH + others)


def _cost(
    load: Load, prompt: int, hit: int, each: float, rank: int, view: ClusterView
) -> PlacementCost:
    """The cost of a prompt on an instance that has `hit` tokens of it. `each`: what each request
    there weighs."""
    missing = max(0.0, prompt - hit - load.spare_for(0, view.priorities))
    return PlacementCost(
        queued=load.queued_prefill_before(rank),
        memory=missing * HALF_WEIGHT_BATCH / (HALF_WEIGHT_BATCH + load.batch),
        prefill=(PREFILL_WEIGHT + load.waiting) * (prompt - hit),
        batch=each * (load.batch + load.waiting),
    )


def _is_closed(load: Load, rank: int, view: ClusterView) -> bool:
    """Whether no hit may decide for the instance: it has no free slot, or nothing left but the
    headroom of more urgent classes."""
    if load.slots and load.batch + load.waiting >= load.slots:
        return True
    kept = view.priorities.headroom(load.total, load.running, above=rank)
    return kept > 0 and load.freeness_for(rank, view.priorities) < view.thresholds[0]


def _tokens(blocks: int, prompt: int) -> int:
    """Tokens of the prompt in a hit of that many blocks. The last token is computed in any case."""
    return max(0, min(blocks * BLOCK_TOKENS, prompt - 1))


DISPATCH_POLICIES: dict[str, type[DispatchPolicy]] = {
    "soonest": EarliestStart,
    "freest": HighestFreeness,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
}
