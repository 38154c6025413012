"""Requests for benchmarks, sent to a server. llumnix/sim/workloads/workload.py draws them, for the
simulator too."""

import asyncio
import json
import random
import statistics
import string
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from common import median
from llumnix.sim.summary import spread, spread_and_tail
from llumnix.sim.workloads.workload import PAIRS, Arrival, Workload

__all__ = ["PAIRS", "Arrival", "Workload"]

FIRST_TOKEN = 300
"""Those below are special in some vocabularies."""
LETTERS = string.ascii_letters + string.digits
"""Each is a token of its own for the tokenizer of benchmarks/shapes.py."""


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


def encode(
    arrivals: list[Arrival], dice: random.Random, tokens_end: int, text: bool = False
) -> list[bytes]:
    """The requests' bodies, made before the run so that they cost nothing in it. Prompts share the
    prefixes that the trace says they do, and nothing else, nor anything with other dice's. They are
    token ids, or with `text` a letter for each token."""
    common = {"model": "m", "temperature": 0, "ignore_eos": True, "stream": True}
    common["stream_options"] = {"include_usage": True}
    bodies = []
    salt = dice.random()

    def tokens(count: int, source: random.Random) -> list[int]:
        return [source.randrange(FIRST_TOKEN, tokens_end) for _ in range(count)]

    for arrival in arrivals:
        prompt: list[int] = []
        for block in arrival.prefix:
            prompt += tokens(arrival.prefix_block_tokens, random.Random(f"{salt} {block}"))
        prompt += tokens(arrival.prompt_tokens - len(prompt), dice)
        words = "".join(LETTERS[token % len(LETTERS)] for token in prompt) if text else prompt
        body = {**common, "prompt": words, "max_tokens": arrival.output_tokens}
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


def _spread(values: list[float | None]) -> dict[str, float | None]:
    return spread([v for v in values if v is not None])


def of_requests(answers: list[Answer], losses: list[float]) -> dict[str, Any]:
    """The figures that each class has too."""
    first = [a.ttft_s for a in answers if a.done and a.ttft_s is not None]
    return {
        "ttft_s": spread_and_tail(first),
        "tpot_s": _spread([a.tpot_s for a in answers]),
        "e2e_s": _spread([a.e2e_s for a in answers if a.done]),
        "preemption_loss_s": {
            "mean": mean([x for a, x in zip(answers, losses, strict=True) if a.done])
        },
        "requests_done": sum(a.done for a in answers),
        "requests_failed": sum(not a.done for a in answers),
    }
