"""What a scrape of a live deployment has, after one of each event."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llumnix.observe import metrics
from support.server import FRONTENDS_VARIABLE, START_TIMEOUT_S, Server, eventually, free_port

from .conftest import FLAGS

# Servers of its own, and bare vLLM.
pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]
VLLM = Path(__file__).resolve().parents[2] / "benchmarks" / "vllm_cli.py"
HELD_BACK = (
    "llumnix_mean_freeness_tokens", "llumnix_key_requests_total", "llumnix_key_tokens_total",
)  # fmt: skip
"""Absent while no instance stays, and without keys."""
Found = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(url: str) -> str:
    answer = httpx.get(url + "/metrics", timeout=30)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return answer.text


def samples(text: str) -> Found:
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def kinds(text: str) -> dict[str, str]:
    return {f.name: f.type for f in text_string_to_metric_families(text)}


def value(found: Found, name: str, **labels: str) -> float:
    return sum(
        v for (n, ls), v in found.items() if n == name and labels.items() <= dict(ls).items()
    )


def slots(found: Found, prefix: str) -> set[str]:
    """The values of `engine` of metrics whose names begin so."""
    return {
        dict(ls)["engine"] for (n, ls) in found if n.startswith(prefix) and "engine" in dict(ls)
    }


def totals(text: str) -> Found:
    """Counters, and the counts of histograms."""
    rising = {n for n, kind in kinds(text).items() if kind in ("counter", "histogram")}
    return {
        (name, labels): v
        for (name, labels), v in samples(text).items()
        if name.rpartition("_")[0] in rising and not name.endswith("_created")
    }


class Watch:
    """Scrapes all the time, and keeps what fell."""

    def __init__(self, url: str) -> None:
        self.fell: list[tuple[object, float, float]] = []
        self.scrapes = 0
        self._url, self._over = url, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        last: Found = {}
        while not self._over.wait(0.3):
            now = totals(read(self._url))
            self.fell += [(k, v, now.get(k, -1.0)) for k, v in last.items() if now.get(k, -1.0) < v]
            last, self.scrapes = now, self.scrapes + 1

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("metrics") / "log"
    flags = ("--served-model-name", "tiny", "--instances", "2", "--max-body-mb", "0.01", *FLAGS)
    one = Server(str(tiny_model), *flags, log=log, LLUMNIX_CACHE=str(log.parent))
    try:
        yield one.wait_until_serving()
    finally:
        one.kill()


def stream_in(server: Server, name: str, tokens: int) -> threading.Thread:
    body = {"prompt": "hello", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    headers = {"x-request-id": name}

    def run() -> None:
        httpx.post(server.url + "/v1/completions", json=body, headers=headers, timeout=120)

    thread = threading.Thread(target=run)
    thread.start()
    eventually(lambda: any(r["id"] == name for r in server.requests()))
    return thread


def where(server: Server, name: str) -> str:
    return next(r["instance"] for r in server.requests() if r["id"] == name)


def test_each_metric_is_there_after_one_of_each_event(server: Server) -> None:
    """A dispatch, a move, a refusal, a death and a drain, while somebody scrapes."""
    with Watch(server.url) as watch:
        streams = [stream_in(server, "moved", 1500)]
        source = where(server, "moved")
        order = {"request_id": "moved", "destination": "i1" if source == "i0" else "i0"}
        assert (
            server.http.post("/llumnix/v1/migrations", json=order).json()["outcome"] == "migrated"
        )
        refused = server.http.post("/v1/completions", content=b"x" * 20_000)
        assert refused.status_code == 413
        victim = where(server, "moved")
        pid = server.instances()[victim]["pid"]
        os.kill(pid, signal.SIGKILL)
        dead = victim.removeprefix("i")
        eventually(lambda: server.instances()[victim]["state"] == "restarting")
        gone = samples(read(server.url))
        assert dead not in slots(gone, "llumnix_instance_")
        assert not [
            key for key in gone
            if key[0].startswith("vllm:num_requests") and dict(key[1])["engine"] == dead
        ]  # fmt: skip
        assert value(gone, "llumnix_instances", state="restarting") == 1
        streams[0].join()
        eventually(lambda: server.instances()[victim]["state"] == "serving", 120)
        server.http.post("/llumnix/v1/instances").raise_for_status()
        eventually(lambda: server.instances().get("i2", {}).get("state") == "serving", 120)
        assert server.complete().status_code == 200
        server.http.post("/llumnix/v1/instances/i2/drain").raise_for_status()
        eventually(lambda: "i2" not in server.instances(), 60)
    text = read(server.url)
    found = samples(text)
    check_names_and_labels(text)
    assert watch.fell == []
    assert watch.scrapes > 10
    assert value(found, "llumnix_dispatches_total", policy="llumnix") >= 3
    assert value(found, "llumnix_dispatches_total", reason="revived") == 1
    assert value(found, "llumnix_migrations_total", reason="user", outcome="migrated") == 1
    assert value(found, "llumnix_migration_stages_count", copy="staged") == 1
    assert value(found, "llumnix_restarts_total", engine=dead, cause="signal") == 1
    assert value(found, "llumnix_drains_total", cause="user", outcome="emptied") == 1
    assert value(found, "llumnix_instance_start_seconds_count") == 4
    assert value(found, "llumnix_streams_ended_total", how="length") == 2
    assert value(found, "llumnix_streams_survived_total", how="revived") == 1
    assert value(found, "llumnix_routing_seconds_count", part="total") == 2
    assert value(found, "llumnix_controller_facts_total", fact="RequestArrived") >= 3
    assert value(found, "llumnix_controller_busy_seconds_total") > 0
    assert value(found, "llumnix_instances", state="serving") == 2
    assert value(found, "llumnix_http_open") == 0
    assert value(found, "llumnix_loop_lag_seconds_count") > 10
    assert slots(found, "llumnix_instance_") == {"0", "1"}


def check_names_and_labels(text: str) -> None:
    """All names are there and no others, with labels and values from the registry."""
    families = {
        f.name + "_total" * (f.type == "counter"): f
        for f in text_string_to_metric_families(text)
        if f.name.startswith("llumnix_") and not f.name.endswith("_created")
    }
    assert set(families) <= set(metrics.FAMILIES)
    # With several frontends what nothing was noted in is not there, as in vLLM's own metrics.
    assert set(metrics.FAMILIES) - set(families) <= set(HELD_BACK)
    for name, found in families.items():
        one = metrics.FAMILIES[name]
        assert (found.type, found.documentation) == (one.kind, one.help)
        assert found.samples or name in HELD_BACK, name
        for sample in found.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "le"}
            assert set(labels) == set(one.labels), name
            assert all(v in (one.labels[k] or (v,)) for k, v in labels.items()), sample


def test_vllms_own_are_those_of_bare_vllm(server: Server, tiny_model: Path, tmp_path: Path) -> None:
    """Names and labels, of one engine."""
    port, log = free_port(), tmp_path / "log"
    words = [sys.executable, str(VLLM), "serve", str(tiny_model)]
    words += ["--served-model-name", "tiny", "--port", str(port), "--enforce-eager", *FLAGS]
    words += ["--api-server-count", os.environ.get(FRONTENDS_VARIABLE, "1")]
    with log.open("w") as out:
        bare = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: _healthy(url) or bare.poll() is not None, START_TIMEOUT_S)
        assert bare.poll() is None, log.read_text()[-4000:]
        body = {"prompt": "hello", "max_tokens": 4}
        for each in (url, server.url):
            assert httpx.post(each + "/v1/completions", json=body, timeout=60).status_code == 200
        theirs = {(n, ls - engine()) for n, ls in samples(read(url)) if n.startswith("vllm:")}
    finally:
        bare.send_signal(signal.SIGTERM)
        bare.wait(60)
    eventually(lambda: missing(server, theirs) == (set(), set()), 10)


def engine() -> set[tuple[str, str]]:
    return {("engine", "0")}


def missing(server: Server, theirs: set) -> tuple[set, set]:
    """What only bare vLLM has, and only llumnix, of engine 0. What a label says of the
    configuration differs."""
    ours = {
        (n, ls - engine())
        for n, ls in samples(read(server.url))
        if n.startswith("vllm:") and dict(ls).get("engine", "0") == "0"
    }

    def names(of: set) -> set:
        return {(n, frozenset(k for k, _ in ls)) for n, ls in of}

    return names(theirs) - names(ours), names(ours) - names(theirs)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False


def test_promtool_finds_nothing_wrong_with_ours(server: Server) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("Debian's package prometheus, which has promtool, is not installed")
    lines = [
        line + "\n"
        for line in read(server.url).splitlines()
        if line.startswith(("llumnix_", "# HELP llumnix_", "# TYPE llumnix_"))
    ]
    ran = subprocess.run(
        [promtool, "check", "metrics"], input="".join(lines), capture_output=True, text=True,
        check=False, timeout=30,
    )  # fmt: skip
    said = [line for line in (ran.stdout + ran.stderr).splitlines() if "_created" not in line]
    assert said == []


def test_other_methods_than_reading_are_refused(server: Server) -> None:
    assert server.http.head("/metrics").status_code == 200
    assert server.http.post("/metrics").status_code == 405
