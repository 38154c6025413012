"""Three rules of an engine's queue, for live engines and simulated ones.

Room to grow
    A request starts only if every running request, itself included, can then take `growth` more
    blocks. Else the batch takes the last blocks within a few steps, and a request is preempted and
    computed again. With one block each, none is preempted for want of memory for as many steps as
    a block has tokens, unless another prompt or a move comes in. A request that was preempted must
    leave twice as much. Nothing is kept free where nothing runs.

Bounded passing
    Behind a head of the queue that does not fit, the first few requests of its class may start if
    they fit. Together they may take a share of the head's own tokens, and they may pass it for a
    limited time. So the head waits longer by no more than it takes to free that share again.

Short prompts first
    A request is queued as if it had come later, by `short_first` times what its prompt takes to
    compute, `pass_s` at most. Only requests of its class that come within that time may pass it.
    A request that has run or has generated tokens keeps its place.

The first two rules count blocks and tokens, the third the time that this engine takes for a token
of a prompt. So the rules hold on engines of any speed.
"""

import math
from dataclasses import dataclass

HALF_LIFE_STEPS = 512
"""A step with prompts loses half its weight for every so many new ones, or half as many."""
STEPS_MIN = 4
"""Before so many steps with prompts the time of a token is not known, and taken as 0."""
AGAIN = 2
"""A preempted request must leave so many times the room, because to preempt it again costs most."""


@dataclass(slots=True, kw_only=True)
class Wait:
    """The wait of a request that headed the queue and did not fit."""

    since_s: float  # when it was first seen there
    passed_tokens: int = 0  # taken by requests that passed it


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceRules:
    """How far ahead room is kept for what runs (core/slices/promises.py)."""

    tokens: int = 0  # of answer in a slice; 0: as answers are long
    quantile: float = 0.8  # a slice ends by when this share of the requests that got as far end


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRules:
    """The rules as one deployment has them."""

    growth: int = 0  # blocks that each running request can take after a start
    passers: int = 0  # requests behind the head that are tried
    pass_s: float = 0.0  # so long a head may be passed
    pass_share: float = 0.0  # of a head's tokens: what all requests that pass it may take
    slices: SliceRules | None = None  # None: no promises are kept
    short_first: float = 0.0  # times a prompt's own time: how much later than it came it is queued

    def room(self, running: int, *, preempted: bool) -> int:
        """Blocks to leave free beside a request that starts. `running`: requests that run
        without it. `preempted`: whether it ran before."""
        if not running:
            return 0
        return self.growth * (running + 1) * (AGAIN if preempted else 1)

    def later_s(self, tokens: int, token_s: float) -> float:
        """How much later than it came a request is queued, in seconds. `tokens`: of its prompt, to
        be computed. `token_s`: seconds that one takes."""
        return min(self.pass_s, self.short_first * token_s * tokens)

    def may_pass(self, wait: Wait, now: float) -> bool:
        """Whether the time for which a head may be passed is not over."""
        return self.passers > 0 and now - wait.since_s <= self.pass_s

    def may_take(self, wait: Wait, head_tokens: int, tokens: int) -> bool:
        """Whether a request that takes so many tokens may pass a head that needs
        `head_tokens`."""
        return wait.passed_tokens + tokens <= self.pass_share * head_tokens

    def passable(self, wait: Wait | None, now: float, head_tokens: int, tokens: int) -> bool:
        """`may_pass` and `may_take` together. `wait`: None for a head that was not seen to wait
        yet."""
        if wait is None:
            return self.passers > 0
        return self.may_pass(wait, now) and self.may_take(wait, head_tokens, tokens)


class PromptTimer:
    """The seconds that a token of a prompt adds to a step on one engine.

    They are the slope of the line that fits steps with prompts best, their seconds over their
    tokens: the fixed part of a step belongs to no token. Two standard errors are subtracted, so
    that a few slow steps with prompts of like length show no slope. Where all steps compute as many
    tokens, because prompts are alike or fill each step, no slope is seen, and no request is queued
    later than it came."""

    def __init__(self) -> None:
        self._steps = 0.0
        # Sums over steps: tokens, seconds, their squares, their products.
        self._sums = [0.0] * 5

    def record(self, tokens: int, seconds: float) -> None:
        """A step has ended that computed so many tokens of prompts."""
        if tokens <= 0:
            return
        new = (tokens, seconds, tokens * tokens, seconds * seconds, tokens * seconds)
        self._sums = [old + more for old, more in zip(self._sums, new, strict=True)]
        self._steps += 1
        if self._steps >= HALF_LIFE_STEPS:
            self._steps /= 2
            self._sums = [old / 2 for old in self._sums]

    @property
    def token_s(self) -> float:
        """Seconds a token, rather too few than too many; 0 until steps differ in their tokens."""
        n, (x, y, xx, yy, xy) = self._steps, self._sums
        if n < STEPS_MIN:
            return 0.0
        # Squares and products of what lies off the means.
        xx, yy, xy = xx - x * x / n, yy - y * y / n, xy - x * y / n
        if xx < 1:
            return 0.0
        slope = xy / xx
        error = math.sqrt(max(0.0, yy - slope * xy) / (n - 2) / xx)
        return max(0.0, slope - 2 * error)


PLAIN = QueueRules()
"""No rules: the queue of stock vLLM."""
