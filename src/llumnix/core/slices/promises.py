"""Promises: a bound on what each running request may still take, so that none starts without room.

Rules
- A running request has a promise: the KV blocks that it may take until its slice ends. A request
  starts only if its own first slice fits beside all promises. At its slice's end a request goes on
  with the next slice without a pause, even if that does not fit.
- A slice is a quarter of the mean answer, from `SLICE_MIN` to `SLICE_MAX` tokens, and `SLICE_FIRST`
  until enough answers are known. It is shorter where most requests that got as far end sooner, or
  where the request's own limit is near.
- A session's next input makes its promise anew.
- Nothing is kept free where nothing runs.

So in a step no request is preempted for want of memory if all renewed promises fitted as well.
"""

from dataclasses import dataclass

from llumnix.core.queue_rules import SliceRules
from llumnix.core.slices.lengths import End, Lengths, bucket_of

SLICE_MIN, SLICE_MAX, SLICE_FIRST = 64, 1024, 128
"""Tokens of answer."""
SHARE_OF_MEAN = 0.25
ANSWERS_MIN = 50


@dataclass(slots=True)
class Promise:
    """What a running request may take until its slice ends."""

    until: int  # tokens of answer at which its slice ends; 0: it is to be made anew
    blocks: int  # whole blocks that it has by then
    bucket: int  # in which it was when it was counted last (lengths.py)
    prompt: int  # tokens before its answer; others belong to another input of a session


class Slices:
    """The promises of one engine. `block_tokens`: of a KV block."""

    def __init__(self, rules: SliceRules, block_tokens: int) -> None:
        self.lengths = Lengths()
        self._rules = rules
        self.block_tokens = block_tokens

    def slice_tokens(self) -> int:
        """The length of a slice, in tokens of answer."""
        if self._rules.tokens:
            return self._rules.tokens
        mean = self.lengths.mean() if self.lengths.answers >= ANSWERS_MIN else None
        if mean is None:
            return SLICE_FIRST
        return round(min(SLICE_MAX, max(SLICE_MIN, SHARE_OF_MEAN * mean)))

    def first(self, key: str, tokens: int, outputs: int, most: int) -> int:
        """Blocks that a request takes in its next slice beyond those of its `tokens`. It has
        `outputs` tokens of answer, and ends at `most` in any case."""
        ahead = self._slice(key, outputs, most)
        return -(-(tokens + ahead) // self.block_tokens) - -(-tokens // self.block_tokens)

    def left(
        self,
        promise: Promise | None,
        key: str,
        tokens: int,
        outputs: int,
        blocks: int,
        most: int,
        came: int = 0,
    ) -> tuple[Promise, int]:
        """The promise of a request that has so many blocks, renewed if its slice is over, and the
        blocks that it may still take. `promise`: None if it has none yet. `came`: tokens of answer
        with which it moved in."""
        if promise is not None and promise.prompt != tokens - outputs:
            promise, came = None, 0
        if promise is None or outputs >= promise.until:
            ahead = self._slice(key, outputs, most)
            promise = Promise(
                until=outputs + ahead,
                blocks=-(-(tokens + ahead) // self.block_tokens),
                bucket=self.lengths.passed(key, _bucket(promise, came), outputs),
                prompt=tokens - outputs,
            )
        return promise, max(0, promise.blocks - blocks)

    def gone(
        self, promise: Promise | None, key: str, outputs: int, came: int = 0, *, end: End
    ) -> None:
        """A request has left after so many tokens of answer."""
        self.lengths.gone(key, _bucket(promise, came), outputs, end)

    def _slice(self, key: str, outputs: int, most: int) -> int:
        rest = self.lengths.rest(key, outputs, self._rules.quantile)
        return max(1, round(min(self.slice_tokens(), rest, most - outputs)))


def _bucket(promise: Promise | None, came: int) -> int:
    """In which a request was when it was counted last."""
    return bucket_of(came) if promise is None else promise.bucket
