"""Requests for benchmarks: drawn (when each comes, how long its parts are), and sent.

Lengths are drawn from a synthetic pair (input-output) or taken from a trace file.

Pairs: S, M and L are Table 1 of Llumnix (OSDI 2024): K on {1, ..., 2m-1} with P(K = k) proportional
to k^-alpha, length = min(6144, ceil(s K)); s gives the table's mean in expectation. sharegpt and
burstgpt go through the quantiles of that table; between two of them lengths are bent so that the
mean is the table's too, and the ends are assumed. All of them are synthetic: no real traffic, no
correlation of input and output, no sessions.

Trace files: csv or jsonl, gzip or not, with the columns input_tokens, output_tokens and, if the
source has arrival times, arrival_s. A file with arrival times gives consecutive requests from a
place that the seed picks, with their own gaps stretched to the wanted rate; without, random rows.
"""

import asyncio
import csv
import gzip
import io
import itertools
import json
import math
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from common import median, percentile

LENGTH_MAX = 6144
FIRST_TOKEN = 300
"""Those below are special in some vocabularies."""
ZIPF = {
    "S": (128, 2.0, 34.3195),
    "M": (256, 1.5, 14.7611),
    "L": (512, 1.15, 5.8988),
}
QUANTILES = (0.0, 0.5, 0.8, 0.95, 0.99, 1.0)
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

Lengths = list[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request to come. `at_s`: seconds since the run's beginning. `clipped`: it was longer."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    high: bool
    clipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What to draw. `trace`: a pair's name, or a file. `cv`: of the gaps, Gamma (1 is Poisson);
    None: the trace's own gaps where it has any, else Poisson. Lengths are multiplied by `scale`,
    and a request of more than `tokens_max` (prompt and output) is shrunk to that, both parts
    alike."""

    trace: str
    requests: int
    rate_per_s: float
    cv: float | None
    scale: float
    tokens_max: int
    high_share: float

    def draw(self, seed: int) -> list[Arrival]:
        """The requests of one seed, in order of arrival. Each thing drawn has dice of its own, so
        that another rate or share changes nothing else."""
        times = None
        if self.trace in PAIRS:
            lengths = _synthetic(self.trace, self.requests, random.Random(f"{seed} lengths"))
        else:
            times, lengths = self._from_file(random.Random(f"{seed} lengths"))
        if times is None or self.cv is not None:
            times = self._gamma(random.Random(f"{seed} gaps"))
        classes = random.Random(f"{seed} classes")
        return [
            self._arrival(at_s, *pair, classes.random() < self.high_share)
            for at_s, pair in zip(times, lengths, strict=True)
        ]

    def _arrival(self, at_s: float, prompt: int, output: int, high: bool) -> Arrival:
        prompt, output = (max(1, round(n * self.scale)) for n in (prompt, output))
        shrink = min(1.0, self.tokens_max / (prompt + output))
        return Arrival(
            at_s=at_s,
            prompt_tokens=max(1, math.floor(prompt * shrink)),
            output_tokens=max(1, math.floor(output * shrink)),
            high=high,
            clipped=shrink < 1.0,
        )

    def _gamma(self, dice: random.Random) -> list[float]:
        variance = (self.cv or 1.0) ** 2
        gaps = [
            dice.gammavariate(1 / variance, variance / self.rate_per_s)
            for _ in range(self.requests)
        ]
        return list(itertools.accumulate(gaps))

    def _from_file(self, dice: random.Random) -> tuple[list[float] | None, Lengths]:
        rows = read_trace(Path(self.trace))
        if len(rows) < self.requests:
            raise ValueError(f"{self.trace} has {len(rows)} requests; ask for no more (--requests)")
        if "arrival_s" not in rows[0]:
            return None, _lengths(dice.sample(rows, self.requests))
        first = dice.randrange(len(rows) - self.requests + 1)
        rows = rows[first : first + self.requests]
        began, ended = rows[0]["arrival_s"], rows[-1]["arrival_s"]
        if ended <= began:
            raise ValueError(f"{self.trace}: these {len(rows)} requests all come at once")
        stretch = (self.requests - 1) / self.rate_per_s / (ended - began)
        return [(row["arrival_s"] - began) * stretch for row in rows], _lengths(rows)


def read_trace(path: Path) -> list[dict[str, float]]:
    """The rows of a trace file, with the columns that are used here."""
    data = path.read_bytes()
    text = io.StringIO((gzip.decompress(data) if path.suffix == ".gz" else data).decode())
    jsonl = path.name.removesuffix(".gz").endswith(".jsonl")
    rows = map(json.loads, text) if jsonl else csv.DictReader(text)
    wanted = ("arrival_s", "input_tokens", "output_tokens")
    found = [{key: float(row[key]) for key in wanted if key in row} for row in rows]
    if not found or not {"input_tokens", "output_tokens"} <= found[0].keys():
        raise ValueError(f"{path} has no requests with input_tokens and output_tokens")
    return found


def _lengths(rows: list[dict[str, float]]) -> Lengths:
    return [(int(row["input_tokens"]), int(row["output_tokens"])) for row in rows]


def _synthetic(pair: str, count: int, dice: random.Random) -> Lengths:
    if pair in KNOTS:
        sides = [[_bent(*knots, dice.random()) for _ in range(count)] for knots in KNOTS[pair]]
    else:
        sides = [_zipf(*ZIPF[name], count, dice) for name in pair.split("-")]
    return list(zip(*sides, strict=True))


def _zipf(mean: int, alpha: float, scale: float, count: int, dice: random.Random) -> list[int]:
    values = range(1, 2 * mean)
    weights = list(itertools.accumulate(k**-alpha for k in values))
    drawn = dice.choices(values, cum_weights=weights, k=count)
    return [min(LENGTH_MAX, math.ceil(scale * k)) for k in drawn]


def _bent(lengths: tuple[int, ...], power: float, at: float) -> int:
    """The length at quantile `at`."""
    part = next(i for i, q in enumerate(QUANTILES[1:]) if at <= q)
    low, high = QUANTILES[part], QUANTILES[part + 1]
    share = (at - low) / (high - low)
    bent = (1 - share) * lengths[part] ** power + share * lengths[part + 1] ** power
    return round(bent ** (1 / power))


@dataclass(slots=True)
class Answer:
    """What a client saw of one request. Times in seconds, from when it was to be sent."""

    ttft_s: float | None = None
    e2e_s: float | None = None
    late_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    instance: str = ""
    error: str = "unfinished at the run's limit"

    @property
    def done(self) -> bool:
        return not self.error

    @property
    def tpot_s(self) -> float | None:
        if not self.done or self.tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.tokens - 1)


async def ask(
    http: aiohttp.ClientSession, arrival: Arrival, body: bytes, due: float, answer: Answer
) -> None:
    """Sends one request and fills in its answer."""
    headers = {"Content-Type": "application/json"}
    if arrival.high:
        headers["x-llumnix-priority"] = "high"
    answer.late_s = time.perf_counter() - due
    last, end = due, b""
    try:
        async with http.post("/v1/completions", data=body, headers=headers) as response:
            answer.instance = response.headers.get("x-llumnix-instance", "")
            if response.status != 200:
                answer.error = f"{response.status}: {(await response.text())[:300]}"
                return
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                end = line
                if b'"choices":[]' in line or line.startswith(b'data: {"error"'):
                    continue
                now = time.perf_counter()
                if answer.ttft_s is None:
                    answer.ttft_s = now - due
                else:
                    answer.gaps_s.append(now - last)
                last = now
    except aiohttp.ClientError as error:
        answer.error = repr(error)
        return
    answer.e2e_s = last - due
    usage = json.loads(end[6:]).get("usage") if end else None
    if usage is None or answer.ttft_s is None:
        answer.error = f"ended with {end[:300].decode()!r}"
        return
    answer.tokens = usage["completion_tokens"]
    wanted = arrival.output_tokens
    answer.error = "" if answer.tokens == wanted else f"{answer.tokens} tokens, not {wanted}"


def encode(arrivals: list[Arrival], dice: random.Random, tokens_end: int) -> list[bytes]:
    """The requests' bodies, made before the run so that they cost nothing in it."""
    common = {"model": "m", "temperature": 0, "ignore_eos": True, "stream": True}
    common["stream_options"] = {"include_usage": True}
    bodies = []
    for arrival in arrivals:
        prompt = [dice.randrange(FIRST_TOKEN, tokens_end) for _ in range(arrival.prompt_tokens)]
        body = {**common, "prompt": prompt, "max_tokens": arrival.output_tokens}
        bodies.append(json.dumps(body).encode())
    return bodies


async def send(
    http: aiohttp.ClientSession, arrivals: list[Arrival], bodies: list[bytes],
    begin: float, limit_s: float,
) -> list[Answer]:  # fmt: skip
    """Sends each request at its time; what has not ended at the limit is given up."""
    answers = [Answer() for _ in arrivals]
    tasks: list[asyncio.Task[None]] = []
    try:
        async with asyncio.timeout(limit_s):
            for arrival, body, answer in zip(arrivals, bodies, answers, strict=True):
                due = begin + arrival.at_s
                await asyncio.sleep(due - time.perf_counter())
                tasks.append(asyncio.create_task(ask(http, arrival, body, due, answer)))
            await asyncio.gather(*tasks)
    except TimeoutError:
        pass  # Their answers say so.
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return answers


def stalls(answers: list[Answer]) -> list[float]:
    """Each request's seconds in gaps that are abnormally long."""
    usual = median([g for a in answers for g in a.gaps_s])
    limit = max(5 * usual, usual + 0.25)
    return [sum(g - usual for g in a.gaps_s if g > limit) for a in answers]


def mean(values: list[float | None]) -> float | None:
    """None of nothing, or if a value is unknown."""
    return None if not values or None in values else statistics.fmean(values)


def spread(values: list[float | None]) -> dict[str, float | None]:
    known = [v for v in values if v is not None]
    if not known:
        return {"mean": None, "p50": None, "p99": None}
    return {"mean": mean(known), "p50": percentile(known, 0.5), "p99": percentile(known, 0.99)}


def of_requests(answers: list[Answer], losses: list[float]) -> dict[str, Any]:
    """The figures that each class has too."""
    return {
        "ttft_s": spread([a.ttft_s for a in answers if a.done]),
        "tpot_s": spread([a.tpot_s for a in answers]),
        "e2e_s": spread([a.e2e_s for a in answers if a.done]),
        "preemption_loss_s": {
            "mean": mean([x for a, x in zip(answers, losses, strict=True) if a.done])
        },
        "requests_done": sum(a.done for a in answers),
        "requests_failed": sum(not a.done for a in answers),
    }
