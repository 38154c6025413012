"""What was added to the metrics meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY

IGNORED = ("_created", "_bucket", "_sum")


def _now() -> dict[str, float]:
    return {
        " ".join([sample.name.removeprefix("llumnix_"), *sample.labels.values()]): sample.value
        for family in REGISTRY.collect()
        if family.name.startswith("llumnix_")
        for sample in family.samples
        if not sample.name.endswith(IGNORED)
    }


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Filled at the end with what has changed: name and labels' values, and by how much."""
    before, changed = _now(), dict[str, float]()
    yield changed
    changed |= {name: v - before[name] for name, v in _now().items() if v != before[name]}
