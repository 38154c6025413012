"""What was added to the metrics meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY

IGNORED = ("_created", "_bucket", "_sum")
EACH_REQUEST = (
    "dispatches_total", "dispatch_seconds", "routing_seconds", "loop_lag", "streams open",
    "streams_ended_total stop", "streams_ended_total abort", "controller_", "migrations_open",
)  # fmt: skip
"""What nearly every test changes."""


def _now() -> dict[str, float]:
    return {
        " ".join([sample.name.removeprefix("llumnix_"), *sample.labels.values()]): sample.value
        for family in REGISTRY.collect()
        if family.name.startswith("llumnix_")
        for sample in family.samples
        if not sample.name.endswith(IGNORED)
    }


@contextmanager
def counted(*, each_request: bool = False) -> Iterator[dict[str, float]]:
    """Filled at the end with what has changed: name and labels' values, and by how much. What is
    counted for each request is left out, unless asked for."""
    before, changed = _now(), dict[str, float]()
    yield changed
    changed |= {
        name: v - before.get(name, 0)
        for name, v in _now().items()
        if v != before.get(name, 0) and (each_request or not name.startswith(EACH_REQUEST))
    }
