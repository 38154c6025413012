"""What the chart's pod starts, probed and stopped as the kubelet does it: a deployment of the tiny
model for real."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.kubelet import Container
from support.managed import ADMIN_KEY, KEY, one_stream, running
from support.server import alive, eventually, free_port

from .rendered import CHART, objects, pods, read

LAME_DUCK_S = 8


def values_of(port: int, model: Path) -> dict[str, Any]:
    """Of the chart: the tiny model with keys, on loopback."""
    values = read(CHART / "ci" / "cpu-values.yaml")
    values |= {"model": str(model), "port": port, "host": "127.0.0.1"}
    values |= {"keys": {"existingSecret": "keys"}, "shutdown": {"lameDuckSeconds": LAME_DUCK_S}}
    values |= {"probes": {"periodSeconds": 1}, "metrics": {"port": free_port()}}
    values["config"] = {**values["config"], "served-model-name": "tiny"}
    del values["config"]["insecure"]
    return values


def container_of(values: dict[str, Any], folder: Path, **instead: str) -> Container:
    """That of the first pod, not started, with its files in the folder."""
    spec = next(pods(values))["spec"]
    (config,) = [o for o in objects(values) if o["kind"] == "ConfigMap"]
    text = config["data"]["config.yaml"].replace("/etc/llumnix-keys", str(folder))
    (folder / "config.yaml").write_text(text)
    (folder / "api-keys").write_text(KEY + "\n")
    (folder / "admin-api-keys").write_text(ADMIN_KEY + "\n")
    mounts = {"/etc/llumnix-keys": str(folder), "/etc/llumnix": str(folder)}
    return Container(spec, {**mounts, **instead}, folder / "log")


@pytest.fixture
def pod(tmp_path: Path, tiny_model: Path) -> tuple[Container, int]:
    port = free_port()
    return container_of(values_of(port, tiny_model), tmp_path), port


@pytest.mark.live
@pytest.mark.slow
def test_a_pod_is_ready_when_it_serves_and_leaves_without_cutting_a_stream(
    pod: tuple[Container, int],
) -> None:
    container, port = pod
    serve_and_stop(container, port)
    eventually(lambda: not [p for p in container.processes if alive(p)], 5, "nothing is left")


@pytest.mark.live
@pytest.mark.slow
def test_the_head_of_a_ray_cluster_does_so_too(tmp_path: Path, tiny_model: Path) -> None:
    port, gcs = free_port(), free_port()
    values = values_of(port, tiny_model) | {"mode": "ray"}
    here = {":6379": f":{gcs}", "http://llm-llumnix.serving:80": f"http://127.0.0.1:{port}"}
    container = container_of(values, tmp_path, **here)
    words = f"ray start --head --block --node-ip-address=127.0.0.1 --port={gcs} --num-cpus=0"
    container.more_env = {
        # What KubeRay puts there.
        "KUBERAY_GEN_RAY_START_CMD": f"{words} --include-dashboard=false",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a" * 64,
        # On this machine Ray is to listen on loopback alone.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    _, worker = pods(values)
    leaving = Container(worker["spec"], container.instead, tmp_path / "worker", {"HOSTNAME": "w"})

    def workers_hook_reaches_the_head() -> None:
        said = leaving.pre_stop(60)
        assert said is not None
        assert "--node w: no instance runs there" in said

    serve_and_stop(container, port, workers_hook_reaches_the_head)


def serve_and_stop(
    container: Container, port: int, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Starts a pod, and ends it while it has a stream."""
    container.start()
    try:
        eventually(lambda: container.ready or container.process.poll() is not None, 240, "ready")
        assert container.ready, container.log.read_text()
        (metrics,) = container.ports("llumnix-metrics")
        assert "llumnix_instances" in httpx.get(f"http://127.0.0.1:{metrics}/metrics").text
        meanwhile()
        ended: list[str] = []
        first = threading.Thread(target=lambda: ended.append(one_stream(port)))
        first.start()
        eventually(lambda: running(port), 30, "a stream runs")
        stopped: list[tuple[int, float]] = []
        stopping = threading.Thread(target=lambda: stopped.append(container.stop()))
        stopping.start()
        # A load balancer that has not heard of it yet still sends a request.
        eventually(lambda: not container.ready, LAME_DUCK_S, "unready at once")
        ended.append(one_stream(port, max_tokens=8))
        first.join()
        stopping.join()
        assert ended == ["data: [DONE]"] * 2
        ((status, took_s),) = stopped
        assert (status, container.why_killed) == (0, None)
        assert took_s < container.spec["terminationGracePeriodSeconds"] - 20
        assert container.became_ready == [True, False]
    finally:
        container.close()


def test_the_double_kills_what_is_not_ready_in_time_and_what_outlives_its_grace(
    pod: tuple[Container, int],
) -> None:
    container, _ = pod
    (it,) = container.spec["containers"]
    it["command"], it["args"] = ["tini", "--", "sleep"], ["60"]
    it["startupProbe"]["failureThreshold"] = 2
    container.start()
    eventually(lambda: container.why_killed, 30)
    assert container.why_killed == "its startupProbe never succeeded"
    container.close()
    container.why_killed = None
    it["command"], it["args"] = ["tini", "--", "sh", "-c"], ["trap '' TERM; sleep 60 & wait; wait"]
    it["startupProbe"]["failureThreshold"] = 100
    container.spec["terminationGracePeriodSeconds"] = 1
    container.start()
    time.sleep(0.3)
    assert container.stop()[0] == -signal.SIGKILL
    assert container.why_killed == "its grace was over"
