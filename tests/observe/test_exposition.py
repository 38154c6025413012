"""The answer to a scrape."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as whole
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.exceptions import HTTPException

from llumnix.observe import exposition
from llumnix.observe.exposition import Carried, Exposition, Seen, metrics_answer, rendered

ENGINES = 3


class Stock:
    """A registry in the place of the process's, with metrics like vLLM's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.make()

    def make(self) -> None:
        labels, more = ("model_name", "engine"), {"registry": self.registry}
        self.running = Gauge("vllm:num_requests_running", "Running", labels, **more)
        self.tokens = Counter("vllm:generation_tokens", "Tokens", labels, **more)
        self.wait_s = Histogram("vllm:request_queue_time_seconds", "Waits", labels, **more)
        for engine in range(ENGINES):
            for metric in (self.running, self.tokens, self.wait_s):
                metric.labels("m", str(engine))

    def make_anew(self) -> None:
        for metric in (self.running, self.tokens, self.wait_s):
            self.registry.unregister(metric)
        self.make()


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Stock:
    made = Stock()
    monkeypatch.setattr(exposition, "REGISTRY", made.registry)
    monkeypatch.setattr(exposition, "carried", Carried())
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    return made


class Deployment:
    """Slots in which engines serve."""

    def __init__(self) -> None:
        self.engines = {"0", "1"}
        self.exposition = Exposition(self.look)

    async def look(self) -> Seen:
        async def families() -> AsyncIterator[Metric]:
            yield GaugeMetricFamily("llumnix_instances", "Instances", len(self.engines))

        return Seen(engines=self.engines, families=families())

    async def scrape(self) -> dict[tuple[str, str | None], float]:
        text = (await self.exposition.text()).decode()
        return {
            (s.name, s.labels.get("engine")): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
            if not s.name.endswith(("_bucket", "_created"))
        }


def test_a_metric_in_parts_is_what_prometheus_client_makes_in_one_go() -> None:
    registry = CollectorRegistry()
    many = Histogram("seconds", "With times of its own", ("of",), registry=registry)
    for n in range(100):
        many.labels(f'{n} \\ "of"\n').observe(n)
    Counter("empty", "Without a value", ("of",), registry=registry)
    (metric, empty) = registry.collect()
    assert len(metric.samples) > 5 * exposition.SAMPLES_AT_ONCE
    text = b"".join([*rendered(metric), *rendered(empty)])
    assert text == whole(registry)
    assert all(p.count(b"\n") <= exposition.SAMPLES_AT_ONCE + 4 for p in rendered(metric))


async def test_gauges_of_engines_that_do_not_serve_are_gone_and_counters_stay(stock: Stock) -> None:
    deployment = Deployment()
    stock.tokens.labels("m", "1").inc(7)
    before = await deployment.scrape()
    assert {e for n, e in before if n == "vllm:num_requests_running"} == {"0", "1"}
    assert {e for n, e in before if n == "vllm:generation_tokens_total"} == {"0", "1"}
    deployment.engines = {"0", "2"}
    after = await deployment.scrape()
    assert {e for n, e in after if n == "vllm:num_requests_running"} == {"0", "2"}
    assert {e for n, e in after if n == "vllm:generation_tokens_total"} == {"0", "1", "2"}
    assert after["vllm:generation_tokens_total", "1"] == 7
    assert after["llumnix_instances", None] == 2


async def test_counters_never_fall_though_vllm_makes_them_anew(stock: Stock) -> None:
    deployment = Deployment()
    for number in (1, 2, 3):
        stock.tokens.labels("m", "0").inc(5)
        stock.wait_s.labels("m", "0").observe(2)
        found = await deployment.scrape()
        assert found["vllm:generation_tokens_total", "0"] == 5 * number
        assert found["vllm:request_queue_time_seconds_count", "0"] == number
        assert found["vllm:request_queue_time_seconds_sum", "0"] == 2 * number
        exposition.carried.keep()
        stock.make_anew()


async def test_counters_are_right_though_they_are_made_anew_during_a_scrape(stock: Stock) -> None:
    deployment = Deployment()
    stock.tokens.labels("m", "0").inc(5)
    stock.wait_s.labels("m", "0").observe(2)
    turns = sum([1 async for _ in deployment.exposition._parts()])
    for turn in range(turns):  # Both before each part, and within the look.

        async def add(turn: int = turn) -> None:
            for _ in range(turn):
                await asyncio.sleep(0)
            exposition.carried.keep()
            stock.make_anew()

        adding = asyncio.create_task(add())
        found = await deployment.scrape()
        await adding
        assert found["vllm:generation_tokens_total", "0"] == 5, turn
        assert found["vllm:request_queue_time_seconds_count", "0"] == 1, turn


async def test_streams_get_turns_while_it_is_made(stock: Stock) -> None:
    for engine in range(64):
        stock.wait_s.labels("m", str(engine))
    deployment, turns = Deployment(), 0
    deployment.engines = {str(n) for n in range(64)}

    async def stream() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    beside = asyncio.create_task(stream())
    await deployment.exposition.text()
    beside.cancel()
    assert turns > 64 * 17 / exposition.SAMPLES_AT_ONCE


async def test_only_reading_is_answered() -> None:
    async def text() -> bytes:
        return b"x 1\n"

    for method in ("GET", "HEAD"):
        answer = await metrics_answer(text, method)
        assert (answer.status_code, answer.body) == (200, b"x 1\n")
        assert answer.headers["content-type"].startswith("text/plain; version=")
    for method in ("POST", "OPTIONS", "DELETE"):
        answer = await metrics_answer(text, method)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


async def test_an_office_that_does_not_answer_is_a_503() -> None:
    async def text() -> bytes:
        raise HTTPException(503, "Try again.")

    answer = await metrics_answer(text, "GET")
    assert (answer.status_code, answer.body) == (503, b"Try again.")


SEVERAL = """
import asyncio, os, sys
from pathlib import Path
from llumnix.observe import shared_metrics
shared_metrics.share(Path(sys.argv[1]) / "metrics")
from llumnix.observe import metrics
from llumnix.observe.exposition import Exposition, Seen
if (child := os.fork()) == 0:
    metrics.QUARANTINED.inc(2)
    os._exit(0)
os.waitpid(child, 0)
metrics.QUARANTINED.inc()
async def look():
    async def families():
        return
        yield
    return Seen(engines=set(), families=families())
print(asyncio.run(Exposition(look).text()).decode())
"""


def test_processes_are_added_up(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", SEVERAL, str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert "\nllumnix_requests_quarantined_total 3.0\n" in said


def test_the_process_has_one_registry() -> None:
    assert exposition.REGISTRY is REGISTRY
