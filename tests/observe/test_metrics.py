"""Names and labels of llumnix's metrics, alone and over several processes."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from llumnix.core.codes import AbortCode, DeathCode, DispatchCode, MoveCode
from llumnix.observe import metrics
from llumnix.observe.metrics import FAMILIES

PROCESS = """
from llumnix.observe import metrics
metrics.QUARANTINED.inc()
metrics.STREAMS_SURVIVED.labels(how="revived").inc(2)
metrics.STREAM_GAP_S.labels(how="revived").observe(0.7)
metrics.STREAMS.labels(state="orphaned").set(3)
"""
SHOW = """
from llumnix.observe import metrics
from prometheus_client import generate_latest
metrics.settle({"policy": ["cache-aware"], "engine": ["0", "1"], "process": ["f0"]})
print(generate_latest().decode())
"""
SETTLED = {"policy": ("cache-aware",), "engine": ("0", "1"), "process": ("f0",)}
SCRAPE = """
import json
from prometheus_client import CollectorRegistry, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
asked = json.loads(input())
print(json.dumps([registry.get_sample_value(name, labels) for name, labels in asked]))
"""
PROMISED = """
gauge build_info version vllm ray policy
gauge instances state
gauge instance_info engine id node devices
gauge instance_freeness_tokens engine
gauge instance_virtual_usage_tokens engine
gauge instance_kv_used_tokens engine
gauge instance_kv_capacity_tokens engine
gauge instance_requests engine phase
gauge instance_last_step_age_seconds engine
gauge requests_running
gauge requests_waiting
gauge kv_usage_ratio
gauge mean_freeness_tokens
gauge class_requests class phase
counter preemptions_total class
counter controller_starts_total
counter controller_busy_seconds_total
counter controller_facts_total fact
gauge frontend_processes state
counter frontend_restarts_total
counter restarts_total engine cause
counter engine_deaths_total how blamed
histogram instance_start_seconds
counter drains_total cause outcome
histogram drain_seconds outcome
counter scaling_decisions_total decision outcome
counter dispatches_total policy reason
histogram dispatch_seconds via
histogram routing_seconds part
histogram loop_lag_seconds process
gauge controller_up process
counter controller_bypasses_total
gauge http_open
counter key_requests_total key
counter key_tokens_total key kind
counter gate_refusals_total code
gauge streams state
counter streams_ended_total how
counter streams_survived_total how
histogram stream_gap_seconds how
counter requests_quarantined_total
counter quarantine_refusals_total
counter migrations_total reason outcome
counter migration_aborts_total code
histogram migration_seconds copy
histogram migration_downtime_seconds copy
histogram migration_stages copy
counter migration_bytes_total copy
gauge migrations_open
counter event_log_dropped_total writer
gauge ui_watchers
"""
"""Type, name and labels of each. Boards and alerts go by them: one may be added, none changed."""
CODES = {
    DispatchCode: "soonest cached freest least_loaded turn pinned bypass revived none",
    MoveCode: "balance headroom queue drain user",
    AbortCode: "no_room busy immovable preempted ended silent grammar state peer_lost other",
    DeathCode: "exit signal oom stall stopped node",
}


def test_names_types_and_labels_are_those_that_were_promised() -> None:
    found = [
        " ".join([one.kind, name.removeprefix("llumnix_"), *one.labels])
        for name, one in FAMILIES.items()
    ]
    assert found == PROMISED.strip().splitlines()


def test_reasons_are_those_that_were_promised() -> None:
    assert {kind: " ".join(kind) for kind in CODES} == CODES


def test_each_has_a_help_and_no_label_that_prometheus_sets_itself() -> None:
    for one in FAMILIES.values():
        assert one.help[0].isupper()
        assert not {"instance", "job", "le"} & set(one.labels)
        assert list(one.buckets) == sorted(one.buckets)


def test_all_values_of_every_label_are_there_from_the_start() -> None:
    """In a process where nothing was counted."""
    said = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    found: dict[str, set[tuple[str, ...]]] = {}
    for family in text_string_to_metric_families(said):
        name = family.name + "_total" * (family.type == "counter")
        if (one := FAMILIES.get(name)) is not None:
            assert (family.type, family.documentation) == (one.kind, one.help)
            labels = {tuple(s.labels[label] for label in one.labels) for s in family.samples}
            found[name] = labels
    counted = {metric.describe()[0].name for metric, _ in metrics._COUNTED}
    expected = {
        name: set(product(*(SETTLED.get(n, known) for n, known in one.labels.items())))
        for name, one in FAMILIES.items()
        if name.removesuffix("_total") in counted
    }
    assert found == expected
    assert len(found) == len(metrics._COUNTED)


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
