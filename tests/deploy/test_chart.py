"""The Helm chart, rendered without a cluster: what it makes is what Kubernetes knows, and hangs
together. No cluster is there to apply it."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llumnix.frontend.arguments import make_parser

from .rendered import CHART, CI, DEPLOY, config_of, helm, objects, of_kind, pods, read, render

MINIMAL = {"model": "m", "keys": {"existingSecret": "k"}}
OTHERS_KINDS = {"RayCluster", "ServiceMonitor", "PrometheusRule", "HTTPRoute"}
"""Kinds that operators bring. Kubernetes' own schemas do not know them."""
VERSIONS = ("1.25", "1.31", "1.37")
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


def named(path: Path) -> str:
    return path.stem.removesuffix("-values")


def check(kind: str, found: dict[str, Any], version: str) -> None:
    """Raises what Kubernetes of that version would refuse."""
    validate = pytest.importorskip("kubernetes_validate", reason="needs requirements/deploy.lock")
    validate.validate({**found, "kind": kind}, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", CI, ids=named)
def test_kubernetes_knows_every_field(path: Path, version: str) -> None:
    for found in objects(read(path)):
        if found["kind"] not in OTHERS_KINDS:
            check(found["kind"], found, version)
    for pod in pods(read(path)):
        whole = {"apiVersion": "v1", "metadata": {"name": "p", "namespace": "n"}, "template": pod}
        check("PodTemplate", whole, version)


def test_a_misspelt_field_would_be_found() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs requirements/deploy.lock")
    (pod,) = pods(MINIMAL)
    pod["spec"]["terminationGracePeriod"] = 60
    whole = {"apiVersion": "v1", "metadata": {"name": "p", "namespace": "n"}, "template": pod}
    with pytest.raises(validate.ValidationError):
        check("PodTemplate", whole, VERSIONS[-1])


def test_helms_own_linter_is_content() -> None:
    report = helm.chart.lint(CHART, values=MINIMAL, strict=True)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] > 1] == []


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"instnces": 3}, "instnces"),
        ({"ray": {"gpus": 3}}, "gpus"),
        ({"mode": "both"}, "must be one of 'pod', 'ray'"),
        ({"instances": 0}, "minimum"),
        ({"model": ""}, "model: name one"),
        ({"keys": {"existingSecret": ""}}, "keys.existingSecret: name a secret"),
        ({"config": {"port": 80}}, "config.port: the chart sets this one"),
        ({"config": {"shutdown_timeout": 300}}, "config.shutdown_timeout: the chart sets this"),
        ({"config": {"model-tag": "n"}}, "config.model-tag: the chart sets this one"),
        ({"config": {"tensor-parallel-size": 2}}, "config.tensor-parallel-size: the chart sets"),
        ({"config": {"tensor_parallel_size": 2}}, "config.tensor_parallel_size: the chart sets"),
        ({"config": {"pipeline-parallel-size": 2}}, "1 GPUs of an instance cannot be cut into"),
        ({"config": {"pipeline-parallel-size": 0}}, "1 GPUs of an instance cannot be cut into"),
        ({"gpusPerInstance": 3, "config": {"pipeline_parallel_size": 2}}, "cannot be cut into"),
        ({"config": {"uds": "/tmp/s"}}, "config.uds: probes and the Service need the HTTP port"),
        ({"mode": "ray", "config": {"ssl_certfile": "/c"}}, "config.ssl_certfile: in mode ray"),
    ],
)
def test_bad_values_are_refused_with_the_fix(values: dict[str, Any], says: str) -> None:
    with pytest.raises(helm.HelmError, match=says):
        render(MINIMAL | values)


@pytest.mark.parametrize("path", CI, ids=named)
def test_every_flag_of_the_configuration_is_one_of_serves(path: Path) -> None:
    parser = make_parser()
    known = set(vars(parser.parse_args(["serve"])))
    known |= {"model", "scheduler"}
    assert {name.replace("-", "_") for name in config_of(read(path))} - known == set()


@pytest.mark.parametrize("path", CI, ids=named)
def test_everything_that_is_mounted_is_there(path: Path) -> None:
    claims = {
        claim["metadata"]["name"]
        for found in objects(read(path))
        for claim in found.get("spec", {}).get("volumeClaimTemplates", [])
    }
    for pod in pods(read(path)):
        spec = pod["spec"]
        (container,) = spec["containers"]
        volumes = [v["name"] for v in spec["volumes"]] + sorted(claims)
        mounted = [m["name"] for m in container["volumeMounts"]]
        assert sorted(volumes) == sorted(mounted)
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert spec["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("path", CI, ids=named)
def test_a_pods_grace_is_more_than_a_stop_takes(path: Path) -> None:
    flags = config_of(read(path))
    first, *workers = pods(read(path))
    stop_s = flags["lame-duck"] + flags["shutdown-timeout"]
    assert first["spec"]["terminationGracePeriodSeconds"] == stop_s + 20
    for worker in workers:
        (container,) = worker["spec"]["containers"]
        (shell, _, drain) = container["lifecycle"]["preStop"]["exec"]["command"]
        assert shell == "/bin/bash"
        # What an instance calls its node (engine/instance.py), and bash its host.
        assert 'llumnix drain --node "$HOSTNAME" --timeout 60 ' in drain
        assert worker["spec"]["terminationGracePeriodSeconds"] == 80


@pytest.mark.parametrize("path", CI, ids=named)
def test_services_and_policies_find_their_pods(path: Path) -> None:
    values = read(path)
    templates = list(pods(values))
    labels = [pod["metadata"]["labels"] for pod in templates]
    service = of_kind("Service", values)["spec"]["selector"]
    # KubeRay adds which of its pods is the head.
    head = {**labels[0], "ray.io/node-type": "head"}
    assert service.items() <= head.items()
    policy = of_kind("NetworkPolicy", values)["spec"]
    assert all(policy["podSelector"]["matchLabels"].items() <= each.items() for each in labels)
    # HTTP, metrics, and in a cluster of Ray's the release's pods among themselves.
    assert len(policy["ingress"]) == 1 + len(templates)
    named = {port["name"] for port in templates[0]["spec"]["containers"][0]["ports"]}
    assert {p["targetPort"] for p in of_kind("Service", values)["spec"]["ports"]} <= named


def test_a_pod_has_a_gpu_for_each_part_of_each_instance() -> None:
    (pod,) = pods(MINIMAL | {"instances": 2, "gpusPerInstance": 4})
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert config_of(MINIMAL | {"gpusPerInstance": 4})["tensor-parallel-size"] == 4
    (pod,) = pods(MINIMAL | {"gpusPerInstance": 0})
    assert "nvidia.com/gpu" not in pod["spec"]["containers"][0]["resources"]["limits"]
    layers = {"gpusPerInstance": 4, "config": {"pipeline-parallel-size": 2}}
    (pod,) = pods(MINIMAL | layers)
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert config_of(MINIMAL | layers)["tensor-parallel-size"] == 2
    # Without GPUs the user divides an instance among cores.
    cores = {"gpusPerInstance": 0, "config": {"tensor-parallel-size": 2}}
    assert config_of(MINIMAL | cores)["tensor-parallel-size"] == 2


@pytest.mark.parametrize(
    ("config", "port"),
    [
        ({}, "http"),
        ({"ssl-certfile": "/tls/tls.crt", "ssl-keyfile": "/tls/tls.key"}, "llumnix-metrics"),
        ({"ssl_certfile": "/tls/tls.crt", "ssl_cert_reqs": 2}, "llumnix-metrics"),
    ],
)
def test_probes_ask_a_port_that_speaks_plain_http(config: dict[str, Any], port: str) -> None:
    (pod,) = pods(MINIMAL | {"config": config})
    (container,) = pod["spec"]["containers"]
    asked = {name: container[name]["httpGet"] for name in PROBES}
    assert asked == {
        "startupProbe": {"path": "/ready", "port": port},
        "livenessProbe": {"path": "/live", "port": port},
        "readinessProbe": {"path": "/ready", "port": port},
    }


def test_every_container_has_probes_of_its_own() -> None:
    """Else KubeRay adds its own, which ask an agent that plain `ray` does not bring."""
    for path in CI:
        for pod in pods(read(path)):
            (container,) = pod["spec"]["containers"]
            assert [name for name in PROBES if name not in container] == []


def test_a_worker_is_ready_while_its_raylet_runs(tmp_path: Path) -> None:
    _, worker = pods(read(CHART / "ci" / "ray-values.yaml"))
    (container,) = worker["spec"]["containers"]
    commands = [container[name]["exec"]["command"] for name in PROBES]
    assert commands[1:] == commands[:-1]
    words = commands[0]
    here = [word.replace("/proc/", f"{tmp_path}/") for word in words]
    assert here != words
    assert subprocess.run(here, check=False).returncode != 0  # No process at all.
    for number, (name, status) in enumerate((("bash", 1), ("raylets", 1), ("raylet", 0))):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "comm").write_text(f"{name}\n")
        assert subprocess.run(here, check=False).returncode == status
    # A process that came and went, and a real one.
    (tmp_path / "9").mkdir()
    assert subprocess.run(here, check=False).returncode == 0
    program = shutil.copy(shutil.which("sleep") or "", tmp_path / "raylet")
    with subprocess.Popen([program, "60"]) as raylet:
        try:
            assert subprocess.run(words, check=False).returncode == 0
        finally:
            raylet.kill()


def test_ray_starts_beside_the_server_and_only_the_server_is_signalled() -> None:
    values = read(CHART / "ci" / "ray-values.yaml")
    cluster = of_kind("RayCluster", values)
    assert cluster["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    head, worker = pods(values)
    (script,) = head["spec"]["containers"][0]["args"]
    lines = script.strip().splitlines()
    assert lines[1] == 'eval "$KUBERAY_GEN_RAY_START_CMD" &'
    assert lines[-1].startswith("exec llumnix serve ")
    # It is bounded, and within what the startup probe allows for.
    probe = head["spec"]["containers"][0]["startupProbe"]
    waits_s = config_of(values)["ray-wait"]
    assert 0 < waits_s < probe["periodSeconds"] * probe["failureThreshold"]
    assert "ray-wait" not in config_of(MINIMAL)
    (script,) = worker["spec"]["containers"][0]["args"]
    assert script.strip().splitlines()[-1] == 'eval "exec $KUBERAY_GEN_RAY_START_CMD"'


def test_the_alerts_and_the_board_travel_with_it() -> None:
    values = read(CHART / "ci" / "pod-values.yaml")
    rules = of_kind("PrometheusRule", values)["spec"]
    assert rules == read(DEPLOY / "prometheus" / "alerts.yml")
    boards = [o["data"] for o in objects(values) if "llumnix.json" in o.get("data", {})]
    (board,) = [json.loads(data["llumnix.json"]) for data in boards]
    assert board == json.loads((DEPLOY / "grafana" / "llumnix.json").read_text())
