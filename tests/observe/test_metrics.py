"""Names and labels of llumnix's metrics, alone and over several processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from prometheus_client import REGISTRY

from llumnix.observe import metrics

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operating.md"
PROCESS = """
from llumnix.observe import metrics
metrics.QUARANTINED.inc()
metrics.STREAMS_SURVIVED.labels(how="revived").inc(2)
metrics.STREAM_GAP_S.labels(how="revived").observe(0.7)
metrics.STREAMS_WAITING.labels(state="orphaned").set(3)
"""
SHOW = """
import llumnix.observe.metrics
from prometheus_client import generate_latest
print(generate_latest().decode())
"""
SCRAPE = """
import json
from prometheus_client import CollectorRegistry, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
asked = json.loads(input())
print(json.dumps([registry.get_sample_value(name, labels) for name, labels in asked]))
"""


def test_all_values_of_every_label_are_there_from_the_start() -> None:
    """In a process where nothing was counted."""
    said = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    found = {
        line.rsplit(" ", 1)[0]
        for line in said.splitlines()
        if line.startswith("llumnix_") and "_bucket{" not in line and "_created" not in line
    }
    assert found == {
        *(
            f'llumnix_engine_deaths_total{{blamed="{blamed}",how="{how}"}}'
            for blamed in ("true", "false")
            for how in ("ended", "fenced")
        ),
        'llumnix_streams{state="orphaned"}',
        *(
            f'llumnix_streams_survived_total{{how="{how}"}}'
            for how in ("handover", "revived", "resent")
        ),
        *(f'llumnix_streams_ended_total{{how="{h}"}}' for h in ("lost", "quarantined")),
        *(
            f'llumnix_stream_gap_seconds_{part}{{how="{how}"}}'
            for part in ("count", "sum")
            for how in ("revived", "resent")
        ),
        "llumnix_requests_quarantined_total",
        "llumnix_quarantine_refusals_total",
        *(
            f'llumnix_migrations_total{{outcome="{outcome}"}}'
            for outcome in ("migrated", "aborted", "lost")
        ),
        *(
            f'llumnix_migration_{figure}{{copy="{copy}"}}'
            for figure in ("seconds_count", "seconds_sum", "downtime_seconds_count",
                           "downtime_seconds_sum", "bytes_total")
            for copy in ("staged", "blocking", "recompute")
        ),
    }  # fmt: skip


def test_the_page_lists_them_all_with_their_labels() -> None:
    page = PAGE.read_text()
    listed = set(re.findall(r"^\| `(llumnix_\w+)(?:\{([\w, ]+)\})?` \|", page, flags=re.M))
    assert listed == {
        (next(iter(metric.describe())).name + "_total" * (metric._type == "counter"), labels)
        for metric in metrics.LABELS
        for labels in [", ".join(metric._labelnames)]
    }


def test_vllm_adds_up_those_of_several_processes(tmp_path: Path) -> None:
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", PROCESS], env=env, timeout=60, check=True)
    asked = [
        ("llumnix_requests_quarantined_total", {}),
        ("llumnix_streams_survived_total", {"how": "revived"}),
        ("llumnix_streams_survived_total", {"how": "resent"}),
        ("llumnix_stream_gap_seconds_count", {"how": "revived"}),
        ("llumnix_stream_gap_seconds_bucket", {"how": "revived", "le": "1.0"}),
        ("llumnix_streams", {"state": "orphaned"}),
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRAPE], env=env, timeout=60, check=True,
        input=json.dumps(asked), capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [2, 4, 0, 2, 2, 6]


def test_vllm_leaves_them_in_the_registry() -> None:
    """It removes its own whenever instances are added (`FleetLLM.grow_metrics`)."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry, unregister_vllm_metrics

    unregister_vllm_metrics()
    assert get_prometheus_registry() is REGISTRY
    assert REGISTRY.get_sample_value("llumnix_requests_quarantined_total") is not None
