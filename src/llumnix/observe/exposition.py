"""The answer to `GET /metrics`, made so that no stream waits for it.

Rules
- After each `SAMPLES_AT_ONCE` lines the event loop has a turn. prometheus_client renders all in one
  go, which takes 24 ms at 8 engines.
- A gauge of vLLM's says something of an engine. It is left out while no engine serves in that
  slot. Counters stay, and those of slots that never had an engine are left out.
- Counters never fall. vLLM makes its metrics anew when there are more slots; what they had counted
  until then is kept here, and added (`Carried`). A scrape goes by the metrics that there were as it
  began, and adds what had been kept by then.
- vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes): its
  metrics' names begin with `vllm:`, and their label `engine` is the slot.
- Several processes are added up through files, which takes the loop's time for as long as it takes:
  so that is done on a thread, in a process without streams.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from llumnix.observe import shared_metrics

METRICS_PATHS = ("/metrics", "/metrics/")
SAMPLES_AT_ONCE = 200
VLLM = "vllm:"
_number: Callable[[float], str] = floatToGoString
_Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class _One(Collector):
    """A registry of one metric, or of a part of it."""

    metric: Metric

    def collect(self) -> Iterable[Metric]:
        return (self.metric,)


class Carried:
    """What vLLM's counters had counted before they were made anew."""

    def __init__(self) -> None:
        self.so_far: Mapping[_Key, float] = {}  # replaced as a whole

    def keep(self) -> None:
        """They are about to be made anew."""
        if shared_metrics.VARIABLE in os.environ:
            return  # The files keep them.
        before = self.so_far
        self.so_far = {
            _key(sample): _with_before(sample, before)
            for metric in REGISTRY.collect()
            if metric.name.startswith(VLLM) and metric.type in ("counter", "histogram")
            for sample in metric.samples
            if not sample.name.endswith("_created")
        }


carried = Carried()


def _with_before(sample: Sample, before: Mapping[_Key, float]) -> float:
    return sample.value + before.get(_key(sample), 0.0)


def _key(sample: Sample) -> _Key:
    return sample.name, tuple(sample.labels.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is seen of the fleet at a scrape."""

    engines: set[str]  # slots in which an engine serves
    families: AsyncIterator[Metric]


class Exposition:
    """All metrics of a deployment. `look` makes those of the fleet, for each scrape."""

    def __init__(self, look: Callable[[], Awaitable[Seen]]) -> None:
        self._look = look
        self._used: set[str] = set()
        self._scraping = asyncio.Lock()

    async def text(self) -> bytes:
        """What Prometheus reads: its text format, version 0.0.4."""
        async with self._scraping:
            return b"".join([part async for part in self._parts()])

    async def _parts(self) -> AsyncIterator[bytes]:
        seen = await self._look()
        self._used |= seen.engines
        counted = await self._counted()
        before = carried.so_far  # Nothing else has its turn until the metrics are listed, below.
        for metric in counted:
            for part in rendered(self._shown(metric, seen.engines, before)):
                yield part
                await asyncio.sleep(0)
        async for metric in seen.families:
            for part in rendered(metric):
                yield part
                await asyncio.sleep(0)

    async def _counted(self) -> Iterable[Metric]:
        if shared_metrics.VARIABLE not in os.environ:
            return REGISTRY.collect()
        registry = CollectorRegistry()
        collector = MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return await asyncio.to_thread(lambda: list(collector.collect()))  # type: ignore[no-untyped-call]

    def _shown(self, metric: Metric, serving: set[str], before: Mapping[_Key, float]) -> Metric:
        """The metric without what says nothing any more, and with what was counted before."""
        if not metric.name.startswith(VLLM):
            return metric
        of = serving if metric.type in ("gauge", "info") else self._used
        samples = [
            sample
            for sample in metric.samples
            if (engine := sample.labels.get("engine")) is None or engine in of
        ]
        if before and metric.type in ("counter", "histogram"):
            samples = [s._replace(value=_with_before(s, before)) for s in samples]
        return _with(metric, samples)


async def metrics_answer(text: Callable[[], Awaitable[bytes]], method: str) -> Response:
    """The answer to a request for the metrics."""
    if method not in ("GET", "HEAD"):
        return Response(status_code=405, headers={"allow": "GET, HEAD"})
    try:
        return Response(await text(), headers={"content-type": CONTENT_TYPE_LATEST})
    except HTTPException as error:
        return PlainTextResponse(error.detail, error.status_code)


def _with(metric: Metric, samples: list[Sample]) -> Metric:
    part = Metric(metric.name, metric.documentation, metric.type)
    part.samples = samples
    return part


def rendered(metric: Metric) -> Iterator[bytes]:
    """The metric as text, in parts of no more than `SAMPLES_AT_ONCE` lines. The times at which its
    parts were made, which are a metric of their own in this format, come last."""
    made = metric.name + "_created"
    own = [s for s in metric.samples if s.name != made]
    times = [s for s in metric.samples if s.name == made]
    yield generate_latest(_One(_with(metric, [])))
    if times:
        heads = generate_latest(_One(_with(metric, times[:1]))).splitlines(keepends=True)
        own += times
    for at in range(0, len(own), SAMPLES_AT_ONCE):
        part = own[at : at + SAMPLES_AT_ONCE]
        lines = [f"{s.name}{_labels(*s.labels.items())} {_number(s.value)}\n" for s in part]
        first = len(own) - len(times) - at  # the first of the times
        if times and 0 <= first < len(part):
            lines.insert(first, b"".join(heads[2:4]).decode())
        yield "".join(lines).encode()


@lru_cache(maxsize=2**16)
def _labels(*labels: tuple[str, str]) -> str:
    """Labels as text. prometheus_client makes them anew for each line, which takes it longest."""
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(labels)) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
