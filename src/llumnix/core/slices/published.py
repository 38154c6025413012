"""SCLS as it was published (arXiv 2406.13511), for static batches: `llumnix simulate` alone has it.

Rules
- A pool holds requests that are new and those that came back after a slice, unfinished. A batch is
  padded to its longest request, and serves all its requests for one slice.
- `batches` cuts the pool, sorted by length, where the sum of the estimated times is least. No batch
  takes more memory than there is, but a single request is a batch however long it is.
- `offload` gives the batches away, the longest time first, each to the least loaded instance.
- The pool is looked at again after half the least load, or a few seconds if that is more.

An estimate of a batch of N requests, padded to L tokens, for S steps is that of one prompt step and
of S decode steps, each linear in N and in N times the length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llumnix.errors import UsageError

SLICE_TOKENS = 128
LOAD_SHARE = 0.5
INTERVAL_MIN_S = 3.0
MEMORY_SHARE = 0.9
"""The share of KV memory that a batch takes at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticRules:
    """What a policy for static batches has."""

    text: str  # for docs/slices.md
    slices: bool = True  # false: a batch is served to its end
    sorted: bool = False  # batches of like lengths
    by_memory: bool = False  # batches as large as memory allows; else for the longest requests
    max_min: bool = False  # one pool, and batches to the least loaded; else requests in turn
    by_load: bool = False  # the more there is to do, the less often the pool is looked at


STATIC: dict[str, StaticRules] = {
    "sls": StaticRules(
        text="static batches of requests in order of arrival, each batch served to its end",
        slices=False,
    ),
    "scls-so": StaticRules(text="a batch is served for one slice at a time"),
    "scls-pm": StaticRules(text="the requests of a batch have like lengths", sorted=True),
    "scls-ab": StaticRules(
        text="batches are as large as memory allows", sorted=True, by_memory=True
    ),
    "scls-lb": StaticRules(
        text="all instances have one pool, and a batch goes to the least loaded one",
        sorted=True,
        by_memory=True,
        max_min=True,
    ),
    "scls-paper": StaticRules(
        text="the pool is looked at again after half the time that the least loaded instance has "
        "to do: SCLS as published",
        sorted=True,
        by_memory=True,
        max_min=True,
        by_load=True,
    ),
}
"""The published policies by name: each has one idea more than the one before it."""


def served(policy: str) -> str:
    """The policy's name, if engines can have it. Raises `UsageError` for a published one."""
    if policy in STATIC:
        raise UsageError(
            f"policy {policy}: it is simulated only, by `llumnix simulate`, because vLLM has no "
            "static batches; --policy scls has what is left of it (docs/slices.md)"
        )
    return policy


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceCost:
    """What a static batch takes, in seconds. The costs of a step are those of a simulated profile
    (sim/model/profile.py)."""

    step_s: float
    request_s: float
    context_s: float
    prompt_s: float
    prompt_context_s: float = 0.0
    overlap_s: float = 0.0

    def terms(self, length: int, steps: int) -> tuple[float, float]:
        """Seconds for each request, and for the batch, if it is padded to `length` tokens."""
        prompt = length * (self.prompt_s + self.prompt_context_s * length / 2)
        context = steps * length + steps * (steps + 1) / 2
        batch = steps * self.step_s + max(0.0, self.step_s - self.overlap_s)
        return prompt + steps * self.request_s + self.context_s * context, batch

    def seconds(self, requests: int, length: int, steps: int) -> float:
        """A batch of so many requests."""
        each, batch = self.terms(length, steps)
        return requests * each + batch


def most(length: int, slice_tokens: int, kv_tokens: int) -> int:
    """Requests of a batch that is padded to `length` tokens; one at least."""
    return max(1, int(MEMORY_SHARE * kv_tokens / (length + slice_tokens)))


def batches(
    lengths: Sequence[int], slice_tokens: int, kv_tokens: int, cost: SliceCost, limit: int = 0
) -> list[int]:
    """Sizes of the batches of a pool with the least sum of estimates. `lengths`: tokens of each
    request, sorted. `limit`: the most requests of a batch; 0: only memory limits it."""
    best, cut = [0.0], [0]
    for number, length in enumerate(lengths, start=1):
        largest = min(number, most(length, slice_tokens, kv_tokens))
        if limit:
            largest = min(largest, limit)
        each, batch = cost.terms(length, slice_tokens)
        # Of equal ones the larger batch.
        seconds, size = min(
            (best[number - size] + each * size, -size) for size in range(1, largest + 1)
        )
        best.append(seconds + batch)
        cut.append(-size)
    sizes, at = [], len(lengths)
    while at:
        sizes.append(cut[at])
        at -= cut[at]
    return sizes[::-1]


def offload(estimates: Sequence[float], loads: Sequence[float]) -> list[int]:
    """The instance of each batch. `loads`: seconds that each instance has to do by estimate."""
    load, places = list(loads), [0] * len(estimates)
    for batch in sorted(range(len(estimates)), key=lambda b: -estimates[b]):
        places[batch] = min(range(len(load)), key=load.__getitem__)
        load[places[batch]] += estimates[batch]
    return places


def interval(loads: Sequence[float]) -> float:
    """Seconds until the pool is looked at again."""
    return max(INTERVAL_MIN_S, LOAD_SHARE * min(loads, default=0.0))
