"""How long answers become: survival by length, counted while requests run. No model is asked.

Rules
- Lengths are split into buckets whose edges are 16·2^(i/2) tokens. A request counts in a bucket
  once it has left that bucket: its answer ended there by itself, or became longer. An answer that
  is cut off by a limit, aborted or moved away counts in the buckets that it left, and in no further
  one. One that moved in counts from the bucket in which it came. So requests that still run count
  with what is known of them, and long answers are not missed because they end late.
- A bucket's hazard is the share that ended in it, of the requests that left it. The hazard of a key
  leans on that of all requests, with the weight of `LEAN` requests.
- An answer counts as known once it has ended by itself or been cut off by a limit. Before
  `KEY_ANSWERS_MIN` answers of a key are known, the counts of all requests stand for it. Before
  `ANSWERS_MIN` answers in all are known nothing follows.
- All counts are halved every `HALF_LIFE_ANSWERS` answers.
- What follows from the counts is worked out anew once `FRESH_SHARE` more is known.
"""

import math
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from enum import Enum, auto
from functools import lru_cache

EDGES = tuple(round(16 * 2 ** (i / 2)) for i in range(27))
"""Upper edges of the buckets, in tokens of answer. A bucket beyond the last has no edge."""
LEAN = 20.0
ANSWERS_MIN = 20
KEY_ANSWERS_MIN = 50
KEYS_MAX = 256
"""Keys that are remembered; the one that was least recently counted is forgotten."""
HALF_LIFE_ANSWERS = 2000
FRESH_SHARE = 0.02
RESTS_KEPT = 1024
"""Answers of `Lengths.rest` that are kept, since requests begin alike and have slices alike."""
_REST_TOLERANCE = 1e-12


class End(Enum):
    """How a request left an engine."""

    BY_ITSELF = auto()
    AT_LIMIT = auto()  # its answer is as long as it may be
    EARLY = auto()  # it was aborted, or goes on elsewhere


class _Counts:
    """Of one key, or of all requests."""

    def __init__(self) -> None:
        self.left = [0.0] * (len(EDGES) + 1)  # requests that left each bucket
        self.ended = [0.0] * (len(EDGES) + 1)  # those of them that ended in it
        self.answers = 0.0  # that are known
        self.events = 0.0
        self.curve: _Curve | None = None

    def halve(self) -> None:
        self.left = [n / 2 for n in self.left]
        self.ended = [n / 2 for n in self.ended]
        self.answers /= 2
        self.events /= 2
        self.curve = None


class Lengths:
    """What is known of answers on one engine. A key stands for who asks; "" for nobody."""

    def __init__(self) -> None:
        self._all = _Counts()
        self._keys: OrderedDict[str, _Counts] = OrderedDict()

    def passed(self, key: str, bucket: int, outputs: int) -> int:
        """A running request has so many tokens of answer. `bucket`: in which it was when it was
        counted last. Returns the bucket in which it is now, for the next call."""
        now = bucket_of(outputs)
        if now > bucket:
            for counts in self._of(key):
                for number in range(bucket, now):
                    counts.left[number] += 1
                counts.events += now - bucket
        return now

    def gone(self, key: str, bucket: int, outputs: int, end: End) -> None:
        """A request has left after so many tokens of answer."""
        whole = end is End.BY_ITSELF
        now = self.passed(key, bucket, max(0, outputs - whole))
        if end is End.EARLY:
            return
        for counts in self._of(key):
            if whole:
                counts.left[now] += 1
                counts.ended[now] += 1
                counts.events += 1
            counts.answers += 1
            if counts.answers >= HALF_LIFE_ANSWERS:
                counts.halve()

    def rest(self, key: str, outputs: int, share: float) -> float:
        """The further tokens after which this share of the requests that got as far have ended.
        Infinite if that is not known."""
        known = self._curve(key)
        return math.inf if known is None else known.rest(outputs, share)

    def mean(self) -> float | None:
        """Mean length of an answer, in tokens; None before enough are known. Answers longer than
        any that has ended count only up to the last edge that a request has passed."""
        known = self._curve("")
        return None if known is None else known.mean

    @property
    def answers(self) -> float:
        """Answers that are known, the older ones with less weight."""
        return self._all.answers

    def _of(self, key: str) -> tuple[_Counts, ...]:
        """What a request of that key counts in."""
        if not key:
            return (self._all,)
        counts = self._keys.get(key)
        if counts is None:
            counts = self._keys[key] = _Counts()
            if len(self._keys) > KEYS_MAX:
                self._keys.popitem(last=False)
        self._keys.move_to_end(key)
        return self._all, counts

    def _curve(self, key: str) -> "_Curve | None":
        """What follows for a key; None if too little is known."""
        if self._all.answers < ANSWERS_MIN:
            return None
        counts, mine = self._all, self._keys.get(key) if key else None
        if mine is not None and mine.answers >= KEY_ANSWERS_MIN:
            counts = mine
        events, curve = self._all.events + counts.events, counts.curve
        if curve is None or abs(events - curve.events) > FRESH_SHARE * events:
            curve = counts.curve = _Curve(self._all, counts, events)
        return curve


class _Curve:
    """Survival by bucket, in logarithms. `events`: what was known by then."""

    def __init__(self, everybody: _Counts, counts: _Counts, events: float) -> None:
        self.events = events
        self.survived: list[float] = []  # at each edge
        self._lost: list[float] = []  # the same, rising, with a tolerance
        self.falls: list[float] = []  # within each bucket, evenly
        self.mean = 0.0
        log = 0.0
        for number in range(len(EDGES)):
            share = _share(everybody.ended[number], everybody.left[number])
            if counts is not everybody:
                share = _share(counts.ended[number] + LEAN * share, counts.left[number] + LEAN)
            fall = -math.log(1 - min(share, 0.999))
            if counts.left[number]:
                there, width = math.exp(log), _span(number)[1]
                self.mean += width * there * ((1 - math.exp(-fall)) / fall if fall else 1.0)
            log -= fall
            self.survived.append(log)
            self._lost.append(_REST_TOLERANCE - log)
            self.falls.append(fall)
        self.rest = lru_cache(RESTS_KEPT)(self._rest)

    def _rest(self, outputs: int, share: float) -> float:
        """As `Lengths.rest`."""
        aim = self.at(outputs) + math.log(1 - share)
        edge = bisect_left(self._lost, -aim)  # the first at which no more than the aim are left
        if edge >= len(self.survived):
            return math.inf
        low, width = _span(edge)
        before = self.survived[edge - 1] if edge else 0.0
        return max(0.0, low + width * (before - aim) / self.falls[edge] - outputs)

    def at(self, outputs: int) -> float:
        """At so many tokens of answer."""
        bucket = bucket_of(outputs)
        if bucket >= len(self.survived):
            return self.survived[-1]
        low, width = _span(bucket)
        return self.survived[bucket] + self.falls[bucket] * (1 - (outputs - low) / width)


def bucket_of(outputs: int) -> int:
    """The number of the bucket in which a request with so many tokens of answer is."""
    return bisect_right(EDGES, outputs)


def _span(bucket: int) -> tuple[int, int]:
    """Where a bucket begins, and its width, in tokens."""
    low = EDGES[bucket - 1] if bucket else 0
    return low, EDGES[bucket] - low


def _share(ended: float, left: float) -> float:
    return ended / left if left else 0.0
