"""The requests of a run, drawn before it begins: arrival times and lengths.

Lengths come from a synthetic pair (input-output) or from a trace (sim/workloads/traces.py). Pairs
have no real traffic, no correlation of input and output, and no sessions.
- S, M and L are those of Table 1 of Llumnix (OSDI 2024), as `ZIPF` has it.
- sharegpt and burstgpt go through the quantiles of that table. Between two of them a power of the
  length is interpolated, which gives the table's mean too. The lowest and highest are assumed.

Arrival times come from a Gamma distribution of gaps, of which Poisson is one, or from the trace,
with its own gaps stretched to the wanted rate. Mooncake's timestamps fall on a grid of 3 s, and
RAGPulse's are whole seconds. With these traces, requests of one instant are spread evenly over the
3 s or the second. Mooncake's then come more evenly (CV 0.4) than those of users would. A file named
by its path is taken as it is.
"""

import itertools
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llumnix.errors import UsageError
from llumnix.sim.workloads.named_files import CLIENTS, FILES, named_file
from llumnix.sim.workloads.traces import (
    ClientFile,
    Drawn,
    Lengths,
    Prefix,
    RequestFile,
    read_clients,
    read_requests,
)

LENGTH_MAX = 6144
"""Tokens of the longest synthetic prompt or output."""
# Mean m, exponent alpha and factor s of a pair's side. K is drawn from {1, ..., 2m - 1} with
# P(K = k) proportional to k^-alpha. The length is min(LENGTH_MAX, ceil(s K)), of which s makes the
# expectation m.
ZIPF = {
    "S": (128, 2.0, 34.3195),
    "M": (256, 1.5, 14.7611),
    "L": (512, 1.15, 5.8988),
}
QUANTILES = (0.0, 0.5, 0.8, 0.95, 0.99, 1.0)
# Of prompts and of outputs: tokens at `QUANTILES`, and the power that is interpolated between them.
KNOTS = {
    "sharegpt": (
        ((4, 74, 348, 1484, 3388, 6144), -0.35103),
        ((4, 487, 781, 988, 1234, 2048), 0.89773),
    ),
    "burstgpt": (
        ((4, 582, 1427, 2345, 3549, 6144), 0.39612),
        ((4, 243, 434, 669, 964, 2048), 0.37829),
    ),
}
PAIRS = ("S-S", "M-M", "L-L", "S-L", "L-S", *KNOTS)
NO_PREFIX = Prefix(ids=())

TRACES = {
    "S-S": "the paper's synthetic lengths: short and short, 128 and 128 tokens",
    "M-M": "the paper's synthetic lengths: medium and medium, 256 and 256 tokens",
    "L-L": "the paper's synthetic lengths: long and long, 512 and 512 tokens",
    "S-L": "the paper's synthetic lengths: short and long, 128 and 512 tokens",
    "L-S": "the paper's synthetic lengths: long and short, 512 and 128 tokens",
    "sharegpt": "synthetic, with the quantiles of ShareGPT (GPT4): 306 and 500 tokens",
    "burstgpt": "synthetic, with the quantiles of BurstGPT's conversations: 830 and 271 tokens",
    **{name: file.about for name, file in {**FILES, **CLIENTS}.items()},
}
"""A line on each named trace. Tokens are means of input and output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request to come."""

    at_s: float  # since the run's beginning
    prompt_tokens: int
    output_tokens: int
    high: bool = False  # it is urgent
    clipped: bool = False  # it was longer
    prefix: tuple[int, ...] = ()
    """An id for each full leading block of the prompt whose content is known. An id stands for its
    block and all before it, so that two prompts of one trace that have it agree up to there."""
    prefix_block_tokens: int = 0  # of a block of `prefix`

    def blocks(self, block_tokens: int) -> tuple[int, ...]:
        """The prefix in blocks of an engine's cache. A block is shared if the block of `prefix`
        that it ends in is. So an id of 512 tokens gives 32 of 16 each, and what two prompts share
        beyond their last common id stays unknown."""
        size = self.prefix_block_tokens
        ends = range(block_tokens - 1, len(self.prefix) * size, block_tokens)
        return tuple(self.prefix[last // size] * size + last % size for last in ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What to draw. Raises UsageError if a value makes no sense."""

    trace: str  # one of `TRACES`, or the path of a file of requests
    requests: int
    rate_per_s: float | None  # None for the trace's own
    cv: float | None = None
    """Coefficient of variation of Gamma gaps; 1 is Poisson. None for the trace's own gaps, or
    Poisson if it has none."""
    scale: float = 1.0  # lengths are multiplied by it
    tokens_max: int | None = None
    """A request of more tokens, prompt and output, is shrunk to so many, both parts alike."""
    high_share: float = 0.0  # of urgent requests; 0 if the trace says which are
    folder: str | Path | None = None
    """Has the files of named traces; None for the one that LLUMNIX_TRACES names."""

    def __post_init__(self) -> None:
        above_zero = {
            "requests": self.requests,
            "rate": self.rate_per_s,
            "cv": self.cv,
            "scale": self.scale,
        }
        for name, value in above_zero.items():
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} is {value}: give a number above 0")
        if self.tokens_max is not None and self.tokens_max < 2:
            raise UsageError(f"a request has 2 tokens or more, not {self.tokens_max}: allow more")
        if not 0 <= self.high_share <= 1:
            raise UsageError(f"the share of urgent requests is {self.high_share}: give 0 to 1")

    def draw(self, seed: int) -> list[Arrival]:
        """The requests of one seed, in order of arrival.

        Lengths, gaps and classes have dice of their own, so that another rate or share changes
        nothing else. ServeGen's clients are an exception: a run of more than 600 s takes its later
        requests from further windows, and the rate decides which requests these are."""
        if self.trace in PAIRS:
            lengths = _synthetic(self.trace, self.requests, random.Random(f"{seed} lengths"))
            drawn = Drawn(at_s=None, lengths=lengths)
        else:
            drawn = source(self.trace, self.folder).draw(seed, self.requests, self.rate_per_s)
        times = drawn.at_s
        if times is None or self.cv is not None:
            times = self._gamma(random.Random(f"{seed} gaps"), self._rate(times))
        classes = random.Random(f"{seed} classes")
        prefixes = drawn.prefixes or [NO_PREFIX] * self.requests
        if drawn.high and self.high_share:
            raise UsageError(f"the trace {self.trace} says which are urgent: no --high-share")
        high = drawn.high or [classes.random() < self.high_share for _ in range(self.requests)]
        return [
            self._arrival(at_s, *pair, urgent, prefix)
            for at_s, pair, urgent, prefix in zip(times, drawn.lengths, high, prefixes, strict=True)
        ]

    def _arrival(
        self, at_s: float, prompt: int, output: int, high: bool, prefix: Prefix
    ) -> Arrival:
        prompt, output = (max(1, round(n * self.scale)) for n in (prompt, output))
        tokens_max = math.inf if self.tokens_max is None else self.tokens_max
        shrink = min(1.0, tokens_max / (prompt + output))
        prompt_tokens = max(1, math.floor(prompt * shrink))
        ids, block_tokens = prefix.blocks(prompt_tokens, self.scale) if prefix.ids else ((), 0)
        return Arrival(
            at_s=at_s,
            prompt_tokens=prompt_tokens,
            output_tokens=max(1, math.floor(output * shrink)),
            high=high,
            clipped=shrink < 1.0,
            prefix=ids,
            prefix_block_tokens=block_tokens,
        )

    def _rate(self, times: list[float] | None) -> float:
        """The wanted rate, or that of the trace's own times."""
        if self.rate_per_s is not None:
            return self.rate_per_s
        if times is None:
            raise UsageError(f"the trace {self.trace} has no rate of its own: give one (--rate)")
        if times[-1] <= times[0]:
            raise UsageError(
                f"these {self.requests} requests of {self.trace} have no rate of their own: give "
                "one (--rate), or ask for more requests (--requests)"
            )
        return (len(times) - 1) / (times[-1] - times[0])

    def _gamma(self, dice: random.Random, rate_per_s: float) -> list[float]:
        """Arrival times with Gamma gaps."""
        # Shape k and scale s give the mean k s = 1 / rate and the CV 1 / sqrt(k).
        variance = (self.cv or 1.0) ** 2  # of a gap, in squares of its mean
        gaps = [
            dice.gammavariate(1 / variance, variance / rate_per_s) for _ in range(self.requests)
        ]
        return list(itertools.accumulate(gaps))


def source(trace: str, folder: str | Path | None) -> RequestFile | ClientFile:
    """The file that `trace` names, read. Raises UsageError if there is none, or a wrong one."""
    if trace in CLIENTS:
        return read_clients(named_file(trace, folder))
    if trace in FILES:
        return read_requests(named_file(trace, folder), FILES[trace].grid_s)
    if Path(trace).is_file():
        return read_requests(Path(trace))
    raise UsageError(
        f"no trace is called {trace!r}, and no file: give the path of a csv or jsonl file, or one "
        f"of {', '.join(TRACES)}"
    )


def requests_of(trace: str, folder: str | Path | None) -> int | None:
    """How many requests a trace has; None if it has no end."""
    found = None if trace in PAIRS else source(trace, folder)
    return len(found.lengths) if isinstance(found, RequestFile) else None


def repeated(
    trace: str, folder: str | Path | None, seeds: Iterable[int], requests: int
) -> tuple[int, int] | None:
    """Two of these seeds that draw the same requests with the trace's own gaps; None if all
    differ."""
    found = None if trace in PAIRS else source(trace, folder)
    return found.repeated(seeds, requests) if isinstance(found, RequestFile) else None


def _synthetic(pair: str, count: int, dice: random.Random) -> Lengths:
    if pair in KNOTS:
        sides = [[_at_quantile(*k, dice.random()) for _ in range(count)] for k in KNOTS[pair]]
    else:
        sides = [_zipf(*ZIPF[name], count, dice) for name in pair.split("-")]
    return list(zip(*sides, strict=True))


def _zipf(mean: int, alpha: float, scale: float, count: int, dice: random.Random) -> list[int]:
    values = range(1, 2 * mean)
    weights = list(itertools.accumulate(k**-alpha for k in values))
    drawn = dice.choices(values, cum_weights=weights, k=count)
    return [min(LENGTH_MAX, math.ceil(scale * k)) for k in drawn]


def _at_quantile(lengths: tuple[int, ...], power: float, at: float) -> int:
    """The length in tokens at quantile `at`, through `lengths` at `QUANTILES`."""
    part = next(i for i, q in enumerate(QUANTILES[1:]) if at <= q)
    low, high = QUANTILES[part], QUANTILES[part + 1]
    share = (at - low) / (high - low)
    powered = (1 - share) * lengths[part] ** power + share * lengths[part + 1] ** power
    return round(powered ** (1 / power))
