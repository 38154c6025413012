"""What is seen of a server while a benchmark runs: its instances over time, its migrations, its
counters."""

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from llumnix.sim.summary import satisfied

SAMPLED = {
    "used": "kv_tokens_used",
    "total": "kv_tokens_total",
    "running": "running",
    "waiting": "waiting",
    "head_tokens": "head_tokens",
}
SAMPLE_EVERY_S = 0.25
MIGRATIONS_EVERY_S = 10.0
IDLE_TIMEOUT_S = 60.0
LOOK_TIMEOUT_S = 30.0


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
    """Looks at the server from beside."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http
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

    async def preemptions(self) -> int:
        lines = (await self._get("/metrics")).splitlines()
        counts = [x for x in lines if x.startswith("vllm:num_preemptions_total")]
        return round(sum(float(x.rsplit(" ", 1)[1]) for x in counts))

    async def keep_sampling(self, began: float) -> None:
        due = began
        while True:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            self.samples += await self.instances(began)
            due = max(due + SAMPLE_EVERY_S, time.perf_counter())

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
