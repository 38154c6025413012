"""What it costs to observe a deployment: CPU time, the least of five rounds, since what else runs
on the machine only adds to it.

- `metrics`: a scrape of /metrics. `ours at 1,024 instances` has reports made up, decoded as they
  come from the controller, and llumnix's own metrics alone. `8 engines` has vLLM's of a real
  configuration too, in one process. A stall is what the event loop does between two turns of
  another task.
- `path`: all that is counted for one request, on its way in and out.
- `feed`: the page's feed, by how many watch (feed.py).

    python benchmarks/observe.py [metrics|path|feed] [--rounds 5] [--out FILE]
    python benchmarks/observe.py eventlog ...   (event_log.py)
"""

import argparse
import asyncio
import gc
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import event_log
from common import markdown, write_result
from feed import feed
from shapes import write_shape

BIG, ENGINES = 1024, 8
REQUESTS = 20_000
SAMPLES_EACH = 300
"""Observations of each of vLLM's metrics, so that values are not all 0."""


def reports(count: int) -> Any:
    """The controller's answer: busy instances, each with two classes."""
    from llumnix.core.reports import ClassLoad, LoadReport
    from llumnix.core.types import EngineIndex, InstanceId
    from llumnix.wire import Loads

    dice = random.Random(1)
    return Loads(
        number=1,
        reports=[
            LoadReport(
                instance=InstanceId(f"i{n}"),
                engine_index=EngineIndex(n),
                sequence=dice.randrange(10**6),
                kv_tokens_used=dice.randrange(13_000),
                kv_tokens_total=13_616,
                block_tokens=16,
                slots=256,
                classes=(
                    ClassLoad(running=1, preempted=dice.randrange(9)),
                    ClassLoad(running=dice.randrange(40), waiting=dice.randrange(3)),
                ),
                kv_token_bytes=2**19,
                steps=dice.randrange(10**6),
                stalled_s=dice.random() / 10,
            )
            for n in range(count)
        ],
        facts={"LoadReported": 10**6},
    )


def exposition(count: int) -> Any:
    """That of a deployment with so many instances."""
    from llumnix.core.priorities import Priorities
    from llumnix.core.settings import PrioritySettings
    from llumnix.core.supervision.lifecycle import InstanceStatus
    from llumnix.core.types import EngineIndex, InstanceId
    from llumnix.observe.exposition import Exposition, Seen
    from llumnix.observe.fleet_metrics import FleetAtScrape, FleetMetrics
    from llumnix.wire import decode, encode

    payload = encode(reports(count))
    build = {"version": "0", "vllm": "0", "ray": "0", "policy": "llumnix"}
    figures = FleetMetrics(Priorities(PrioritySettings()), build)
    instances = [
        InstanceStatus(
            id=InstanceId(f"i{n}"), state="serving", hung=False, engine_index=EngineIndex(n),
            node="10.0.0.1", pid=n, devices=[str(n % 8)], restarts=0, why=None,
        )
        for n in range(count)
    ]  # fmt: skip

    async def look() -> Seen:
        seen = FleetAtScrape(
            instances=instances, frontends=[], controller_starts=1, loads=decode(payload)
        )
        return Seen(engines=figures.engines(seen), families=figures.families(seen))

    return Exposition(look)


async def scraped(made: Any) -> dict[str, float]:
    """One scrape: CPU time in ms, the longest stall of the loop in ms, and its length in kB."""
    longest, last = 0.0, time.thread_time()

    async def stream() -> None:
        nonlocal longest, last
        while True:
            now = time.thread_time()
            longest, last = max(longest, now - last), now
            await asyncio.sleep(0)

    beside = asyncio.create_task(stream())
    await asyncio.sleep(0)
    began = time.thread_time()
    text = await made.text()
    took = time.thread_time() - began
    beside.cancel()
    return {"cpu_ms": 1e3 * took, "stall_ms": 1e3 * longest, "kB": len(text) / 1e3}


def least(rounds: int, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The least of each figure."""
    measure()  # Once without, since much is done for the first time.
    gc.collect()
    gc.freeze()  # As the server does, garbage is looked for seldom.
    gc.disable()
    found = [measure() for _ in range(rounds)]
    gc.enable()
    return {key: round(min(each[key] for each in found), 3) for key in found[0]}


def vllms(engines: int) -> None:
    """Makes vLLM's metrics of so many engines, as its server does, and fills them."""
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram

    from llumnix.frontend.arguments import parse, settle_variables

    settle_variables()
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape("mini", Path(folder) / "model")
        words = ["serve", str(model), "--enforce-eager", "--max-model-len", "2048"]
        command = parse(words, lambda text: None)
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        PrometheusStatLogger(command.vllm_config, list(range(engines)))
    dice = random.Random(2)
    for metric in list(REGISTRY._collector_to_names):
        if getattr(metric, "_name", "").startswith("vllm:"):
            for child in getattr(metric, "_metrics", {}).values():
                for _ in range(SAMPLES_EACH if isinstance(metric, Histogram) else 1):
                    if isinstance(child, Histogram):
                        child.observe(dice.expovariate(1))
                    elif isinstance(child, Counter):
                        child.inc(dice.randrange(10**6))
                    elif isinstance(child, Gauge):
                        child.set(dice.random())


def metrics(rounds: int) -> list[dict[str, Any]]:
    """Scrapes of both sizes."""
    from prometheus_client import REGISTRY, generate_latest

    from llumnix.observe import metrics as registry

    names = {"engine": map(str, range(ENGINES)), "policy": ["llumnix"], "process": ["f0"]}
    registry.settle({key: list(values) for key, values in names.items()})
    rows = []
    for what, engines in ((f"ours at {BIG:,} instances", BIG), (f"{ENGINES} engines", ENGINES)):
        if engines == ENGINES:
            vllms(engines)
        made = exposition(engines)
        rows.append({"what": what, **least(rounds, lambda made=made: asyncio.run(scraped(made)))})

    def whole() -> dict[str, float]:
        began = time.thread_time()
        text = generate_latest(REGISTRY)
        took = 1e3 * (time.thread_time() - began)
        return {"cpu_ms": took, "stall_ms": took, "kB": len(text) / 1e3}

    return [*rows, {"what": f"{ENGINES} engines, vLLM's renderer", **least(rounds, whole)}]


def path(rounds: int) -> list[dict[str, Any]]:
    """What is counted for a request."""
    from llumnix.core.codes import DispatchCode
    from llumnix.frontend import client
    from llumnix.frontend.streams import client as streams
    from llumnix.observe import metrics as registry

    placed = registry.DISPATCHES.labels("llumnix", DispatchCode.SOONEST)
    parts = (client._GATE, client._HASH, client._DISPATCH, client._SEND, client._TOTAL)

    def one() -> None:
        for part in (*parts, client._VIA["controller"]):
            part.observe(0.0007)
        placed.inc()
        for _ in range(2):  # As it comes and as it goes.
            registry.HTTP_OPEN.set(5)
            streams._OPEN.set(5)
        streams._ENDED["stop"].inc()

    def many() -> dict[str, float]:
        began = time.thread_time()
        for _ in range(REQUESTS):
            one()
        return {"us": 1e6 * (time.thread_time() - began) / REQUESTS}

    return [{"what": "counted for a request", **least(rounds, many)}]


PARTS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "metrics": metrics,
    "path": path,
    "feed": feed,
}


def main() -> None:
    if sys.argv[1:2] == ["eventlog"]:
        event_log.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("part", choices=PARTS, nargs="?", help="all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for part in (args.part,) if args.part else PARTS:
        found = PARTS[part](args.rounds)
        head = list(found[0])
        print(markdown(head, [[str(row[key]) for key in head] for row in found]) + "\n")
        rows += [{"part": part, **row} for row in found]
    if args.out is not None:
        write_result(args.out, rows)


if __name__ == "__main__":
    main()
