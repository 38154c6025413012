"""What is seen of a system while a benchmark runs: its instances over time, its migrations, its
counters."""

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from llumnix.sim.summary import satisfied

SAMPLED = {
    "used": "kv_tokens_used",
    "total": "kv_tokens_total",
    "running": "running",
    "waiting": "waiting",
    "head_tokens": "head_tokens",
}
SAMPLE_EVERY_S = 0.25
SCRAPE_EVERY_S = 1.0
"""Of a peer's /metrics, which costs its server some 6 ms."""
MIGRATIONS_EVERY_S = 10.0
IDLE_TIMEOUT_S = 60.0
LOOK_TIMEOUT_S = 30.0
COUNTED = {
    "preemptions": "vllm:num_preemptions_total",
    "prefix_queries": "vllm:prefix_cache_queries_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
}
"""Counters of vLLM's, the last two in tokens."""
GAUGES = {
    "used": "vllm:kv_cache_usage_perc",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
}
WANTED = (*COUNTED.values(), *GAUGES.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One instance at one moment. `head_tokens`: None if it is not told."""

    t_s: float
    instance: str
    used: int
    total: int
    running: int
    waiting: int
    head_tokens: int | None


class Watch:
    """Looks at a server of llumnix from beside. `scraped`: whose /metrics count, together."""

    sample_every_s = SAMPLE_EVERY_S
    tells_of_the_idle = True

    def __init__(self, http: aiohttp.ClientSession, scraped: list[str]) -> None:
        self._http = http
        self._scraped = scraped
        self.samples: list[Sample] = []
        self.outcomes: dict[str, str] = {}

    async def _get(self, path: str) -> str:
        timeout = aiohttp.ClientTimeout(total=LOOK_TIMEOUT_S)
        async with self._http.get(path, timeout=timeout) as response:
            response.raise_for_status()
            return await response.text()

    async def instances(self, began: float = 0.0) -> list[Sample]:
        """The instances that serve, now."""
        rows = json.loads(await self._get("/llumnix/v1/instances"))["instances"]
        t_s = time.perf_counter() - began
        return [
            Sample(t_s=t_s, instance=row["id"], **{k: row.get(v) for k, v in SAMPLED.items()})
            for row in rows
            if row["state"] in ("serving", "draining") and row["kv_tokens_total"] is not None
        ]

    async def migrations(self) -> None:
        """Notes how migrations ended; the server lists the last thousand only."""
        for row in json.loads(await self._get("/llumnix/v1/migrations"))["migrations"]:
            self.outcomes[row["id"]] = row["outcome"]

    async def metrics(self) -> list[tuple[str, str, float]]:
        """What is wanted of all that is scraped: name, engine, value."""
        pages = await asyncio.gather(*(self._get(url + "/metrics") for url in self._scraped))
        return [
            (sample.name, f"{number}-{sample.labels.get('engine', '')}", sample.value)
            for number, page in enumerate(pages)
            # To parse a whole page would hold up the client, which times tokens, for 12 ms.
            for family in text_string_to_metric_families(
                "\n".join(x for x in page.splitlines() if x.startswith(WANTED))
            )
            for sample in family.samples
        ]

    async def counters(self) -> dict[str, int]:
        """Sums over all engines, by the names of `COUNTED`."""
        found = await self.metrics()
        return {
            mine: round(sum(value for name, _, value in found if name == theirs))
            for mine, theirs in COUNTED.items()
        }

    async def keep_sampling(self, began: float) -> None:
        due = began
        while True:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            self.samples += await self.instances(began)
            due = max(due + self.sample_every_s, time.perf_counter())

    async def keep_counting(self) -> None:
        while True:
            await asyncio.sleep(MIGRATIONS_EVERY_S)
            await self.migrations()

    async def until(self, what: str, holds: Callable[[list[Sample]], bool]) -> None:
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while not holds(await self.instances()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {IDLE_TIMEOUT_S:.0f} s in vain: {what}")
            await asyncio.sleep(0.2)


class PeerWatch(Watch):
    """Looks at a system of vLLM's own servers, which tell less. `kv_tokens`: of an instance."""

    sample_every_s = SCRAPE_EVERY_S
    # Several processes that speak HTTP do not, before the first request.
    tells_of_the_idle = False

    def __init__(self, http: aiohttp.ClientSession, scraped: list[str], kv_tokens: int) -> None:
        super().__init__(http, scraped)
        self._kv_tokens = kv_tokens

    async def instances(self, began: float = 0.0) -> list[Sample]:
        found: dict[str, dict[str, float]] = {}
        for name, engine, value in await self.metrics():
            for mine, theirs in GAUGES.items():
                if name == theirs:
                    found.setdefault(engine, {})[mine] = value
        t_s = time.perf_counter() - began
        return [
            Sample(
                t_s=t_s,
                instance=engine,
                used=round(seen["used"] * self._kv_tokens),
                total=self._kv_tokens,
                running=round(seen["running"]),
                waiting=round(seen["waiting"]),
                head_tokens=None,
            )
            for engine, seen in sorted(found.items())
        ]

    async def migrations(self) -> None:
        """There are none."""


def fragmentation(moment: list[Sample], blocked: bool = False) -> float | None:
    """The share of all memory that is free and would satisfy heads if it were in one place.
    `blocked`: only heads that do not fit where they are."""
    waiting = [s for s in moment if s.waiting]
    if any(s.head_tokens is None for s in waiting):
        return None
    heads = [s.head_tokens for s in waiting if not blocked or s.head_tokens > s.total - s.used]
    total, free = sum(s.total for s in moment), sum(s.total - s.used for s in moment)
    return satisfied(heads, free) / total


def moments(samples: list[Sample], until_s: float = math.inf) -> list[list[Sample]]:
    """The samples by time."""
    found: dict[float, list[Sample]] = {}
    for sample in samples:
        if 0 <= sample.t_s <= until_s:
            found.setdefault(sample.t_s, []).append(sample)
    return list(found.values())
