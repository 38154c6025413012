"""Trace files: requests, or clients' statistics, that a workload is drawn from.

Request files: csv or jsonl, gzip or not, with the columns input_tokens, output_tokens and, if the
source has them, arrival_s and hash_ids. A file with arrival times gives consecutive requests from a
place that the seed picks; without, random rows, none twice. hash_ids, a list (JSON in a csv),
names the prompt's parts, from its beginning: two prompts agree in as many leading tokens as their
lists do. Each id stands for 512 tokens, or for as many as the list hash_tokens says. Where priority
(vLLM's number) is below 0 the request is urgent.

An event log of `llumnix serve` (observe/event_log.py) is such a file too.

Files of clients (ServeGen's): one client a line, with its rate and the family of its gaps in
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
from llumnix.sim.workloads.event_log import logged

FILES_KEPT_MAX = 16
"""Files that a process keeps in memory once read."""
HASH_BLOCK_TOKENS = 512
"""What an id of hash_ids stands for, unless hash_tokens says otherwise (Mooncake's traces)."""
SEGMENT_BLOCK_TOKENS = 16
"""Blocks that prompts are cut into whose parts differ in length (RAGPulse)."""
END_BITS = 32
"""Room for a place in a prompt, in ids made of a part's number and that place."""
WINDOW_S = 600
TABLE_S = 21600
"""Clients' rates are told for windows of the one length, their lengths for the other."""
TABLE_QUANTILES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
COLUMNS = (
    "a trace has the columns input_tokens and output_tokens, perhaps arrival_s, hash_ids, priority"
)

Lengths = list[tuple[int, int]]
"""Prompt and output of each request, in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """A prompt's parts. `ids`: one id stands for a part and all before it. `ends`: where each part
    ends, in tokens from the prompt's beginning; () if each has `HASH_BLOCK_TOKENS`."""

    ids: tuple[int, ...]
    ends: tuple[int, ...] = ()

    def blocks(self, prompt_tokens: int, scale: float) -> tuple[tuple[int, ...], int]:
        """Ids of the prompt's full leading blocks of equal size, and that size in tokens.

        The prompt has been shrunk by `scale`, and its end may have been cut off. Parts of equal
        size are the blocks, and shrink too. Others are cut into blocks of `SEGMENT_BLOCK_TOKENS`,
        each named after the part that it ends in and where."""
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
    """Requests of one seed. `at_s`: None if their source has no arrival times; `prefixes`: () if
    it has none; `high`: which are urgent, () if it does not tell."""

    at_s: list[float] | None
    lengths: Lengths
    prefixes: tuple[Prefix, ...] = ()
    high: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFile:
    """What a file of requests has, in order of arrival. `at_s`, `prefixes` and `high`: () if it
    has none."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    at_s: tuple[float, ...] = ()
    prefixes: tuple[Prefix, ...] = ()
    high: tuple[bool, ...] = ()

    def draw(self, seed: int, requests: int, rate_per_s: float | None) -> Drawn:
        """Consecutive requests, or random ones if they have no arrival times. Their gaps are
        stretched to the rate; None leaves them as they are."""
        dice = random.Random(f"{seed} lengths")
        size = len(self.lengths)
        if size < requests:
            raise UsageError(f"{self.name} has {size} requests: ask for no more (--requests)")
        if not self.at_s:
            return self._some(dice.sample(range(size), requests), None)
        first = dice.randrange(size - requests + 1)
        at_s = self.at_s[first : first + requests]
        began, lasted_s, stretch = at_s[0], at_s[-1] - at_s[0], 1.0
        if rate_per_s is not None and requests > 1:
            if lasted_s <= 0:
                raise UsageError(
                    f"{self.name}: these {requests} requests all come at once, which no rate can "
                    "stretch: ask for more requests (--requests)"
                )
            stretch = (requests - 1) / rate_per_s / lasted_s
        times = [(at - began) * stretch for at in at_s]
        return self._some(range(first, first + requests), times)

    def _some(self, rows: Iterable[int], at_s: list[float] | None) -> Drawn:
        rows = list(rows)
        return Drawn(
            at_s=at_s,
            lengths=[self.lengths[i] for i in rows],
            prefixes=tuple(self.prefixes[i] for i in rows) if self.prefixes else (),
            high=tuple(self.high[i] for i in rows) if self.high else (),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """The gaps between a client's requests in one window: Gamma ("G"), Weibull ("W") or
    exponential ("")."""

    rate_per_s: float
    family: str
    shape: float

    def begin(self, dice: random.Random, rate_per_s: float) -> Iterator[float]:
        """Seconds to the first request, then from each to the next.

        The first gap is under way when the window begins, and only its rest counts: so bursts do
        not begin with the window, and the mean rate is right from the start."""
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
    """`windows`: by their start. `tables`: the quantiles of its prompts and outputs in tokens, by
    the start of six hours."""

    number: int
    windows: Mapping[int, Gaps]
    tables: Mapping[int, tuple[tuple[float, ...], tuple[float, ...]]]

    def arrivals(
        self, window: int, begin_s: float, factor: float, dice_of: str
    ) -> Iterator[tuple[float, int, int]]:
        """Its requests in one window that begins at `begin_s`: when, prompt, output. Lengths are
        independent of each other."""
        gaps, prompts = self.windows[window], random.Random(f"{dice_of} {self.number} prompts")
        outputs = random.Random(f"{dice_of} {self.number} outputs")
        times = random.Random(f"{dice_of} {self.number} gaps")
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
    """What a file of clients has. Clients and windows whose lengths are unknown are left out, and
    their rates with them. `starts`: of the windows in which anybody sends."""

    clients: tuple[Client, ...]
    starts: tuple[int, ...]

    def draw(self, seed: int, requests: int, rate_per_s: float | None) -> Drawn:
        """The first requests from a window on that the seed picks; after the last window comes
        the first. All clients' rates are multiplied by one factor, so that the windows that the
        run is to last have that rate on average; None leaves the rates as they are."""
        first = random.Random(f"{seed} window").randrange(len(self.starts))
        factor = 1.0
        if rate_per_s is not None:
            lasts = min(len(self.starts), math.ceil(requests / rate_per_s / WINDOW_S))
            own = [self.rate_per_s(self._start(first + n)) for n in range(lasts)]
            factor = rate_per_s * len(own) / sum(own)
        drawn = list(itertools.islice(self._arrivals(seed, first, factor), requests))
        return Drawn(
            at_s=[at_s for at_s, _, _ in drawn],
            lengths=[(prompt, output) for _, prompt, output in drawn],
        )

    def rate_per_s(self, start: int) -> float:
        """Of all clients, in one window."""
        return sum(c.windows[start].rate_per_s for c in self.clients if start in c.windows)

    def _start(self, place: int) -> int:
        return self.starts[place % len(self.starts)]

    def _arrivals(self, seed: int, first: int, factor: float) -> Iterator[tuple[float, int, int]]:
        for n in itertools.count():
            start = self._start(first + n)
            active = [c for c in self.clients if start in c.windows]
            yield from heapq.merge(
                *(c.arrivals(start, n * WINDOW_S, factor, f"{seed} {n}") for c in active)
            )


def from_quantiles(lengths: tuple[float, ...], at: float) -> int:
    """The length at quantile `at`; on a logarithmic scale between two of `TABLE_QUANTILES`, which
    comes closer to the tables' means than a straight line."""
    i = bisect_left(TABLE_QUANTILES, at)
    if i == 0:
        return round(lengths[0])
    low, high = TABLE_QUANTILES[i - 1], TABLE_QUANTILES[i]
    return round(lengths[i - 1] * (lengths[i] / lengths[i - 1]) ** ((at - low) / (high - low)))


@lru_cache(maxsize=FILES_KEPT_MAX)
def read_requests(path: Path, grid_s: float = 0.0) -> RequestFile:
    """A file of requests, read once in a process; `grid_s` as in `TraceFile`."""
    lengths, at_s, prefixes, high = [], [], [], []
    numbers: dict[tuple[int, Any], int] = {}
    rows = _rows(path)
    if (first := next(rows, None)) is not None:
        rows = itertools.chain([first], rows)
        if "who" in first:
            rows = logged(rows)
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
    """A file of clients, read once in a process."""
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
    """`numbers` gives each list of leading ids that was seen a number of its own."""
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
    for at, same in itertools.groupby(at_s):
        count = len(list(same))
        yield from (at + grid_s * i / count for i in range(count))


def _client(row: dict[str, Any]) -> Client:
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
