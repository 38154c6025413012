"""An operator's day over two hosts, with what the documents name alone: commands, metrics, the log,
keys and the page."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.browser import chromium, needs_browser, wait_for
from support.hosts import Network, ServerOnHosts, needs_hosts
from support.server import eventually, free_port
from support.streaming import Recorded, stream

from .conftest import FLAGS
from .streams import COMPLETIONS, Streams, same, to_and_fro, undisturbed

pytestmark = [
    needs_hosts, pytest.mark.hosts, pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)
]  # fmt: skip

ADA, GRAFANA, OPS = "ada-of-yesterday", "grafana-looks-on", "ops-does-it-all"
KEYS = """
ada: {{key: {ada}}}
grafana: {{key: {grafana}, roles: [view]}}
ops: {{key: {ops}, roles: [admin]}}
"""
MOVES = 6
BODIES: list[dict[str, Any]] = [
    {"prompt": f"stream {i} " * 12, "max_tokens": 500, "temperature": 0.3, "seed": i,
     "ignore_eos": True, "return_token_ids": True}
    for i in range(5)
]  # fmt: skip


def keys_file(path: Path, ada: str) -> None:
    path.write_text(KEYS.format(ada=ada, grafana=GRAFANA, ops=OPS))
    path.chmod(0o600)


class Deployment(ServerOnHosts):
    """What the operator has: it, its log, and two files."""

    def __init__(self, net: Network, model: Path, folder: Path) -> None:
        self.keys = folder / "keys.yaml"
        keys_file(self.keys, ADA)
        self.disk = folder / "disk"  # a small one on each host, for the event log
        self.disk.mkdir()
        for host in net.hosts:
            host.run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(self.disk))
        self.metrics_port = free_port()
        super().__init__(
            net, model, *FLAGS,
            "--keys", str(self.keys), "--metrics-port", str(self.metrics_port),
            "--log-format", "json", "--event-log", str(self.disk / "events.jsonl"),
            log=folder / "serve.log",
        )  # fmt: skip
        self.http.headers["Authorization"] = f"Bearer {OPS}"
        self.key = ADA

    def command(self, *words: str, key: str = OPS) -> str:
        """Runs `llumnix …` as the operator does; its output."""
        done = subprocess.run(
            [sys.executable, "-m", "llumnix", *words, "--url", self.url],
            env={**os.environ, "LLUMNIX_ADMIN_API_KEY": key},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def samples(self) -> dict[str, float]:
        """A scrape, summed over the labels that `signs` does not ask for."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        text = httpx.get(url, headers={"Authorization": f"Bearer {GRAFANA}"}, timeout=30).text
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = [sample.labels[k] for k in ("how", "outcome") if k in sample.labels]
                name = ".".join([sample.name, *labels])
                found[name] = found.get(name, 0) + sample.value
        return found

    def events(self, since: int = 0) -> list[dict[str, Any]]:
        lines = self.log[since:].splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.fixture(scope="module")
def deployment(
    net: Network, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    there = Deployment(net, tiny_model, tmp_path_factory.mktemp("operator"))
    try:
        there.wait_until_serving()
        yield there
        there.stop()
    finally:
        there.kill()
        print(there.log[-6000:])


@pytest.fixture(scope="module")
def calm(deployment: Deployment) -> list[Recorded]:
    """The streams with nothing going on."""
    return undisturbed(deployment, BODIES)


@contextmanager
def streaming(deployment: Deployment, calm: list[Recorded]) -> Iterator[None]:
    """Streams that begin before the block, end after it, and are what they are undisturbed."""
    with Streams(deployment, BODIES) as streams:
        yield
        same(calm, streams.ended(180))


def nodes(deployment: Deployment) -> dict[str, str]:
    """The host of each instance, as `llumnix status` says it."""
    rows = json.loads(deployment.command("status", "--json"))["instances"]
    return {row["id"]: row["node"] for row in rows}


def test_each_host_is_fit_and_has_an_instance(net: Network, deployment: Deployment) -> None:
    for host in net.hosts:
        checks = json.loads(host.run(sys.executable, "-m", "llumnix", "doctor", "--json"))
        assert not [c for c in checks if c["verdict"] == "FAIL"], checks
    assert len(set(nodes(deployment).values())) == 2
    assert deployment.samples()["llumnix_requests_running"] == 0


@needs_browser
def test_the_page_opens_for_who_may_look_on(deployment: Deployment) -> None:
    with chromium() as browser:
        page = browser.new_page()
        page.goto(deployment.url + "/llumnix/ui")
        page.get_by_role("textbox", name="Key").fill(GRAFANA)
        page.get_by_role("button", name="Open").click()
        wait_for(page, "llumnix.model.ready", 30)
        assert page.evaluate("[...llumnix.model.instances.keys()].sort()") == ["i0", "i1"]


def test_a_host_is_taken_out_and_comes_back(
    net: Network, deployment: Deployment, calm: list[Recorded]
) -> None:
    (name, node), *_ = (
        (name, node)
        for name, node in nodes(deployment).items()
        if net.hosts[1].name in node or net.hosts[1].address in node
    )
    with streaming(deployment, calm):
        deployment.command("drain", "--node", node)
        assert name not in nodes(deployment)
    with streaming(deployment, calm):
        deployment.command("add", "--wait")
    assert node in nodes(deployment).values()


def test_a_key_is_changed_while_requests_run(deployment: Deployment, calm: list[Recorded]) -> None:
    with streaming(deployment, calm):
        keys_file(deployment.keys, "ada-of-today")
        deployment.command("reload")
        refused = stream(deployment, COMPLETIONS, BODIES[0])
        assert refused.status == 401
    deployment.key = "ada-of-today"
    with streaming(deployment, calm):
        pass
    assert {e["key"] for e in deployment.events() if e.get("event") == "admin_call"} == {"ops"}


MOVE = "llumnix_migration_seconds"


def signs(
    before: dict[str, float], after: dict[str, float], lines: list[dict[str, Any]]
) -> set[str]:
    """What is wrong, from two scrapes and the lines between them, by docs/metrics.md."""

    def rise(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    def mean(scrape: dict[str, float], base: dict[str, float], name: str) -> float:
        count = scrape[f"{name}_count"] - base.get(f"{name}_count", 0)
        return (scrape[f"{name}_sum"] - base.get(f"{name}_sum", 0)) / count if count else 0.0

    found = set()
    causes = {line["cause"] for line in lines if line.get("event") == "death"}
    if rise("llumnix_engine_deaths_total.fenced") and causes & {"stall", "stopped"}:
        found.add("an engine hangs")
    usual_s, now_s = mean(before, {}, MOVE), mean(after, before, MOVE)
    print(f"a move takes {now_s:.3f} s, and {usual_s:.3f} s as a rule")
    if now_s > 3 * usual_s:
        found.add("a slow link")
    dropped = "llumnix_event_log_dropped_total"
    if rise(dropped) and any("stands still" in line.get("msg", "") for line in lines):
        found.add("a full disk")
    return found


@pytest.mark.parametrize("fault", ["nothing", "an engine hangs", "a slow link", "a full disk"])
def test_metrics_and_logs_tell_faults_apart(
    net: Network, deployment: Deployment, calm: list[Recorded], fault: str
) -> None:
    mover = {**BODIES[0], "max_tokens": 1500}
    to_and_fro(deployment, mover, MOVES)  # what is usual
    before, written = deployment.samples(), len(deployment.log)
    ballast = deployment.disk / "ballast"
    with streaming(deployment, calm):
        match fault:
            case "an engine hangs":
                pid = deployment.instances()["i0"]["pid"]
                (outside,) = [
                    p for h in net.hosts for p in h.processes("ray::EngineActor") if inner(p) == pid
                ]
                os.kill(outside, signal.SIGSTOP)
            case "a slow link":
                net.both_ways(*net.hosts, delay_s=0.25)
            case "a full disk":
                host = net.hosts[0]
                host.run("sh", "-c", f"head -c 9M /dev/zero > {ballast} || true")
    to_and_fro(deployment, mover, MOVES)
    time.sleep(3)
    net.both_ways(*net.hosts)
    net.hosts[0].run("rm", "-f", str(ballast))
    found = signs(before, deployment.samples(), deployment.events(written))
    assert found == ({fault} - {"nothing"})
    eventually(
        lambda: all(r["state"] == "serving" for r in deployment.instances().values()), 240, "whole"
    )


def inner(pid: int) -> int:
    """The id that a process has on its host."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("NSpid:")]
    return int(line.split()[-1])
