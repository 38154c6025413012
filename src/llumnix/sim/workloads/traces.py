"""Trace files: requests, or clients' statistics, that a workload is drawn from.

Files of requests are csv or jsonl, gzip or not. Their columns are
- input_tokens, output_tokens.
- arrival_s, if it is known. Then consecutive requests are drawn, from a row on that the seed picks;
  else random rows, none twice.
- hash_ids, if shared prefixes are known: a list (JSON in a csv) that names the prompt's parts from
  its beginning. Two prompts agree in as many leading tokens as their lists do.
- hash_tokens: how many tokens each id of hash_ids stands for; 512 if it is missing.
- priority: vLLM's number. Below 0 the request is urgent.

An event log of `llumnix serve` (observe/event_log.py) is read as such a file too.

Files of clients (ServeGen's) have a client a line, with its rate and the family of its gaps in
windows of 600 s, and with quantiles of its lengths.
"""

import csv
import gzip
import heapq
import io
import itertools
import json
import math
import random
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llumnix.errors import UsageError
from llumnix.observe.log_files import files_of
from llumnix.sim.workloads.event_log import requests_in

FILES_KEPT_MAX = 16
"""Files that a process keeps in memory once read."""
HASH_BLOCK_TOKENS = 512
"""Tokens of an id of hash_ids, unless hash_tokens says otherwise (Mooncake's traces)."""
SEGMENT_BLOCK_TOKENS = 16
"""Tokens of a block where a prompt's parts differ in length (RAGPulse)."""
END_BITS = 32
"""Bits of a block's end, in ids made of a part's number and that end."""
WINDOW_S = 600
"""A client's rate holds for so long."""
TABLE_S = 21600
"""A client's quantiles of lengths hold for so long."""
TABLE_QUANTILES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
COLUMNS = (
    "a trace has the columns input_tokens and output_tokens, perhaps arrival_s, hash_ids, priority"
)

Lengths = list[tuple[int, int]]
"""Prompt and output tokens of each request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """A prompt's leading parts."""

    ids: tuple[int, ...]  # one for each part; it stands for the part and all before it
    ends: tuple[int, ...] = ()
    """Where each part ends, in tokens from the prompt's beginning; () if each has
    `HASH_BLOCK_TOKENS`."""

    def blocks(self, prompt_tokens: int, scale: float) -> tuple[tuple[int, ...], int]:
        """Ids of the prompt's full leading blocks of equal size, and that size in tokens.

        The prompt has been shrunk by `scale`, and its end may have been cut off. Parts of equal
        size are the blocks, and shrink with it. Others are cut into blocks of
        `SEGMENT_BLOCK_TOKENS`; a block's id is made of the part that it ends in, and of its end."""
        if not self.ends:
            block_tokens = max(1, round(HASH_BLOCK_TOKENS * scale))
            return self.ids[: prompt_tokens // block_tokens], block_tokens
        found, end = [], SEGMENT_BLOCK_TOKENS
        for number, part_end in zip(self.ids, self.ends, strict=True):
            while end <= min(part_end * scale, prompt_tokens):
                found.append(number << END_BITS | end)
                end += SEGMENT_BLOCK_TOKENS
        return tuple(found), SEGMENT_BLOCK_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Requests of one seed."""

    at_s: list[float] | None  # arrival times; None if their source has none
    lengths: Lengths
    prefixes: tuple[Prefix, ...] = ()  # () if their source has none
    high: tuple[bool, ...] = ()  # which are urgent; () if their source does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFile:
    """The requests of a file, in order of arrival."""

    name: str
    lengths: tuple[tuple[int, int], ...]  # as `Lengths`
    at_s: tuple[float, ...] = ()  # arrival times; () if it has none
    prefixes: tuple[Prefix, ...] = ()  # () if it has none
    high: tuple[bool, ...] = ()  # which are urgent; () if it does not say

    def draw(self, seed: int, requests: int, rate_per_s: float | None) -> Drawn:
        """Consecutive requests, or random ones if they have no arrival times. Their gaps are
        stretched to the rate, unless that is None. Raises UsageError if the file has too few."""
        dice = random.Random(f"{seed} lengths")
        size = len(self.lengths)
        if size < requests:
            raise UsageError(f"{self.name} has {size} requests: ask for no more (--requests)")
        if not self.at_s:
            return self._select(dice.sample(range(size), requests), None)
        first = self._first(dice, requests)
        at_s = self.at_s[first : first + requests]
        span_s, stretch = at_s[-1] - at_s[0], 1.0
        if rate_per_s is not None and requests > 1:
            if span_s <= 0:
                raise UsageError(
                    f"{self.name}: these {requests} requests all come at once, which no rate can "
                    "stretch: ask for more requests (--requests)"
                )
            stretch = (requests - 1) / rate_per_s / span_s  # wanted span ÷ the file's
        times = [(at - at_s[0]) * stretch for at in at_s]
        return self._select(range(first, first + requests), times)

    def repeated(self, seeds: Iterable[int], requests: int) -> tuple[int, int] | None:
        """Two of these seeds that draw the same requests with the same gaps; None if there are
        none. Random rows differ in their order, at least."""
        seen: dict[int, int] = {}
        for seed in seeds if self.at_s and requests <= len(self.lengths) else ():
            first = self._first(random.Random(f"{seed} lengths"), requests)
            if first in seen:
                return seen[first], seed
            seen[first] = seed
        return None

    def _first(self, dice: random.Random, requests: int) -> int:
        """The row that consecutive requests begin with."""
        return dice.randrange(len(self.lengths) - requests + 1)

    def _select(self, rows: Iterable[int], at_s: list[float] | None) -> Drawn:
        rows = list(rows)
        return Drawn(
            at_s=at_s,
            lengths=[self.lengths[i] for i in rows],
            prefixes=tuple(self.prefixes[i] for i in rows) if self.prefixes else (),
            high=tuple(self.high[i] for i in rows) if self.high else (),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """The distribution of the gaps between a client's requests in one window."""

    rate_per_s: float
    family: str  # "G" for Gamma, "W" for Weibull, "" for exponential
    shape: float

    def begin(self, dice: random.Random, rate_per_s: float) -> Iterator[float]:
        """Seconds to the first request, then from each to the next.

        The first gap is under way when the window begins, and only its rest counts. So bursts do
        not begin with the window, and the mean rate is right from the start."""
        # A gap that is under way at a random moment is drawn with its length as weight, and that
        # moment lies anywhere in it: a uniform share of a gap of the density x f(x) / mean. For
        # Gamma(k) that is Gamma(k + 1) of the same scale. A Weibull gap is scale * E^(1/k), with E
        # exponential; weighted by its length, E is Gamma(1 + 1/k).
        if self.family == "W":
            power = 1 / self.shape
            scale = 1 / rate_per_s / math.gamma(1 + power)
            yield dice.random() * scale * dice.gammavariate(1 + power, 1) ** power
            while True:
                yield dice.weibullvariate(scale, self.shape)
        shape = self.shape if self.family == "G" else 1.0
        scale = 1 / rate_per_s / shape
        yield dice.random() * dice.gammavariate(shape + 1, scale)
        while True:
            yield dice.gammavariate(shape, scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One client's statistics."""

    number: int
    windows: Mapping[int, Gaps]  # by start of the window, in s
    tables: Mapping[int, tuple[tuple[float, ...], tuple[float, ...]]]
    """Quantiles of its prompt and output tokens, by start of the `TABLE_S`, in s."""

    def arrivals(
        self, window: int, begin_s: float, factor: float, dice_seed: str
    ) -> Iterator[tuple[float, int, int]]:
        """Its requests in one window: arrival in s, prompt and output tokens. In the run the window
        begins at `begin_s`. `factor` multiplies its rate. Prompt and output are independent."""
        gaps, prompts = self.windows[window], random.Random(f"{dice_seed} {self.number} prompts")
        outputs = random.Random(f"{dice_seed} {self.number} outputs")
        times = random.Random(f"{dice_seed} {self.number} gaps")
        prompt_table, output_table = self.tables[window // TABLE_S * TABLE_S]
        since_s = 0.0
        for gap in gaps.begin(times, gaps.rate_per_s * factor):
            since_s += gap
            if since_s >= WINDOW_S:
                return
            yield (
                begin_s + since_s,
                from_quantiles(prompt_table, prompts.random()),
                from_quantiles(output_table, outputs.random()),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientFile:
    """The clients of a file. Clients and windows whose lengths are unknown are left out, and their
    rates with them."""

    clients: tuple[Client, ...]
    starts: tuple[int, ...]  # of the windows in which any client sends, in s

    def draw(self, seed: int, requests: int, rate_per_s: float | None) -> Drawn:
        """The first requests from a window on that the seed picks. After the last window comes the
        first. One factor multiplies all clients' rates, so that the windows of the run have that
        rate on average; None leaves the rates as they are."""
        first = random.Random(f"{seed} window").randrange(len(self.starts))
        factor = 1.0
        if rate_per_s is not None:
            windows = min(len(self.starts), math.ceil(requests / rate_per_s / WINDOW_S))
            own = [self.rate_per_s(self._start(first + n)) for n in range(windows)]
            factor = rate_per_s * len(own) / sum(own)  # wanted rate ÷ their mean rate
        drawn = list(itertools.islice(self._arrivals(seed, first, factor), requests))
        return Drawn(
            at_s=[at_s for at_s, _, _ in drawn],
            lengths=[(prompt, output) for _, prompt, output in drawn],
        )

    def rate_per_s(self, start: int) -> float:
        """The rate of all clients in one window."""
        return sum(c.windows[start].rate_per_s for c in self.clients if start in c.windows)

    def _start(self, number: int) -> int:
        """The start of a window by its number. After the last window comes the first."""
        return self.starts[number % len(self.starts)]

    def _arrivals(self, seed: int, first: int, factor: float) -> Iterator[tuple[float, int, int]]:
        for n in itertools.count():
            start = self._start(first + n)
            active = [c for c in self.clients if start in c.windows]
            yield from heapq.merge(
                *(c.arrivals(start, n * WINDOW_S, factor, f"{seed} {n}") for c in active)
            )


def from_quantiles(lengths: tuple[float, ...], at: float) -> int:
    """The length in tokens at quantile `at`. Between two of `TABLE_QUANTILES` its logarithm is
    interpolated, which comes closer to the tables' means than a straight line."""
    i = bisect_left(TABLE_QUANTILES, at)
    if i == 0:
        return round(lengths[0])
    low, high = TABLE_QUANTILES[i - 1], TABLE_QUANTILES[i]
    return round(lengths[i - 1] * (lengths[i] / lengths[i - 1]) ** ((at - low) / (high - low)))


@lru_cache(maxsize=FILES_KEPT_MAX)
def read_requests(path: Path, grid_s: float = 0.0) -> RequestFile:
    """A file of requests, read once in a process. `grid_s` is as in `TraceFile`. Raises UsageError
    if it cannot be read."""
    lengths, at_s, prefixes, high = [], [], [], []
    numbers: dict[tuple[int, Any], int] = {}
    rows = _rows(path)
    if (first := next(rows, None)) is not None:
        rows = itertools.chain([first], rows)
        if "who" in first:
            older = (_rows(file) for file in files_of(path)[:-1])
            rows = requests_in(itertools.chain(*older, rows))
    for n, row in enumerate(rows, start=1):
        if missing := [c for c in ("input_tokens", "output_tokens") if row.get(c) is None]:
            raise UsageError(f"{path}, request {n} has no {' and no '.join(missing)}; {COLUMNS}")
        try:
            lengths.append((_tokens(row["input_tokens"]), _tokens(row["output_tokens"])))
            if row.get("arrival_s") is not None:
                at_s.append(float(row["arrival_s"]))
            if row.get("hash_ids") is not None:
                prefixes.append(_prefix(row, numbers))
            if row.get("priority") is not None:
                high.append(float(row["priority"]) < 0)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"{path}, request {n}: {error}; mend that row") from error
    if not lengths:
        raise UsageError(f"{path} has no requests; {COLUMNS}")
    for column, found in (("arrival_s", at_s), ("hash_ids", prefixes), ("priority", high)):
        if found and len(found) < len(lengths):
            raise UsageError(f"{path}: only some requests have {column}; give it to all or to none")
    if any(not a <= b for a, b in itertools.pairwise([0.0, *at_s])):
        raise UsageError(f"{path}: sort the requests by arrival_s, from 0 s or more")
    return RequestFile(
        name=path.name,
        lengths=tuple(lengths),
        at_s=tuple(_spread(at_s, grid_s)),
        prefixes=tuple(prefixes),
        high=tuple(high),
    )


@lru_cache(maxsize=FILES_KEPT_MAX)
def read_clients(path: Path) -> ClientFile:
    """A file of clients, read once in a process. Raises UsageError if it cannot be read."""
    try:
        clients = tuple(_client(row) for row in _rows(path) if row["lengths_available"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path} is no file of ServeGen's clients ({error!r}): put the right one there"
        ) from error
    starts = tuple(sorted({start for c in clients for start in c.windows}))
    if not starts:
        raise UsageError(f"{path} has no client of known rates and lengths: put another there")
    return ClientFile(clients=clients, starts=starts)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not path.name.removesuffix(".gz").endswith(".jsonl") and not text.startswith("{"):
        yield from csv.DictReader(io.StringIO(text))
        return
    for n, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {n} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {n} is no JSON object; {COLUMNS}")
        yield row


def _tokens(value: Any) -> int:
    if (tokens := int(float(value))) < 0:
        raise ValueError(f"{value} tokens")
    return tokens


def _prefix(row: dict[str, Any], numbers: dict[tuple[int, Any], int]) -> Prefix:
    """The parts of a row's prompt. `numbers` gives a number to each list of leading ids, found by
    the number of the list without its last id, and that id."""
    ids, tokens = _list(row["hash_ids"]), _list(row.get("hash_tokens") or [])
    if tokens and len(tokens) != len(ids):
        raise ValueError(f"{len(ids)} hash_ids and {len(tokens)} hash_tokens")
    found, parent = [], -1
    for part in ids:
        parent = numbers.setdefault((parent, part), len(numbers))
        found.append(parent)
    ends = itertools.accumulate(_tokens(n) for n in tokens)
    return Prefix(ids=tuple(found), ends=tuple(ends))


def _list(value: Any) -> list[Any]:
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise TypeError(f"{value!r} is no list")
    return found


def _spread(at_s: list[float], grid_s: float) -> Iterator[float]:
    """The times, with those of one instant spread evenly over `grid_s`."""
    for at, same in itertools.groupby(at_s):
        count = len(list(same))
        yield from (at + grid_s * i / count for i in range(count))


def _client(row: dict[str, Any]) -> Client:
    """A line of a file of clients. Windows without requests or lengths are left out."""
    sides = ("input_tokens", "output_tokens")
    tables = {
        int(start): tuple(tuple(max(1, n) for n in table[side]["q"]) for side in sides)
        for start, table in row["lengths_6h"].items()
    }
    return Client(
        number=int(row["client"]),
        windows={
            int(start): Gaps(rate_per_s=rate, family=family, shape=shape)
            for start, rate, _, family, shape in row["windows_600s"]
            if rate > 0 and int(start) // TABLE_S * TABLE_S in tables
        },
        tables=tables,
    )
