"""Metrics that processes share."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys
from pathlib import Path
import prometheus_client  # As vLLM does, before it is known that there are several processes.
from llumnix.observe import shared_metrics
shared_metrics.share(Path(sys.argv[1]))
from llumnix.observe import metrics

def deaths():
    from prometheus_client import CollectorRegistry, multiprocess
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    labels = {"how": "fenced", "blamed": "true"}
    waiting = registry.get_sample_value("llumnix_streams", {"state": "orphaned"})
    return registry.get_sample_value("llumnix_engine_deaths_total", labels), waiting

child = os.fork()
if child == 0:
    metrics.ENGINE_DEATHS.labels(how="fenced", blamed="true").inc(2)
    metrics.STREAMS.labels(state="orphaned").set(5)
    os._exit(0)
os.waitpid(child, 0)
metrics.ENGINE_DEATHS.labels(how="fenced", blamed="true").inc()
print(*deaths())
shared_metrics.forget(child)
print(*deaths())
"""


def test_they_are_added_up_and_a_gauge_goes_with_its_process(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "metrics")],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ran.stdout.split() == ["3.0", "5.0", "3.0", "0.0"], ran.stderr
