"""Words are planted where secrets stand: keys, tokens, prompts. Then they are looked for wherever
others could read: Ray's logs and control store, the list of processes, the event log, the page's
feed, answers and errors. And keys are exchanged while two frontends serve."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from support.server import Server, eventually, real_time, title

from .conftest import FLAGS
from .test_network import ray_logs

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(600)]

FLAG, ADMIN, NAMED, VIEWER = (f"planted-{n}-key" for n in ("flag", "admin", "named", "viewer"))
TOKENS = {"HF_TOKEN": "planted-hf-token", "S3_SECRET_ACCESS_KEY": "planted-s3-secret"}
PROMPT = "planted-prompt-words"
MARK = "planted-"
FEED_S = 3.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def write_keys(files: Path, text: str) -> Path:
    path = files / "keys.yaml"
    path.touch(mode=0o600)
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def planted(tiny_model: Path, logs: Path, files: Path) -> Iterator[Server]:
    keys = write_keys(
        files,
        f"ada: {{key: {NAMED}, requests_per_min: 20}}\nvic: {{key: {VIEWER}, roles: [view]}}\n",
    )
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS, "--instances", "2",
        "--api-server-count", "2", "--api-key", FLAG, "--keys", str(keys),
        "--event-log", str(files / "events.jsonl"),
        log=logs / "secrets.log", LLUMNIX_ADMIN_API_KEY=ADMIN, **TOKENS,
    )  # fmt: skip
    server.http.headers["Authorization"] = f"Bearer {ADMIN}"
    yield server.wait_until_serving()
    assert server.stop() == 0
    print(server.log[-3000:])


def ask(server: Server, key: str | None, method: str, path: str, **more: Any) -> httpx.Response:
    """One request on a connection of its own, so that any frontend may get it."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.request(method, server.url + path, headers=headers, timeout=60, **more)


def complete(server: Server, key: str | None, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, **more}
    return ask(server, key, "POST", "/v1/completions", json=body)


def feed(server: Server) -> str:
    """What the page is told for some seconds."""
    told, began = "", time.monotonic()
    headers = {"Authorization": f"Bearer {VIEWER}"}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("GET", server.url + "/llumnix/v1/events", headers=headers, timeout=5) as seen,
    ):
        for line in seen.iter_lines():
            told += line + "\n"
            if time.monotonic() > began + FEED_S:
                break
    return told


def control_store(actor: int) -> str:
    """What Ray's control store says of jobs, actors and nodes, and holds under keys."""
    raylet = psutil.Process(actor).parent()
    assert raylet is not None
    address = next(w.partition("=")[2] for w in raylet.cmdline() if w.startswith("--gcs-address="))
    code = (
        "import sys; from ray._raylet import GcsClient, GcsClientOptions, GlobalStateAccessor;"
        "c = GcsClient(address=sys.argv[1]);"
        "print(c.get_all_job_info(skip_submission_job_info_field=True,"
        " skip_is_running_tasks_field=True)); print(c.get_all_node_info());"
        "[print(k, c.internal_kv_get(k, n)) for n in (None, b'fun', b'session', b'job', b'cluster')"
        " for k in c.internal_kv_keys(b'', n)];"
        "o = GcsClientOptions.create(sys.argv[1], None, allow_cluster_id_nil=True,"
        " fetch_cluster_id_if_nil=True); a = GlobalStateAccessor(o); assert a.connect();"
        "[print(actor) for actor in a.get_actor_table(None, None)]"
    )
    environment = {**os.environ, **raylet.environ()}
    run = [sys.executable, "-c", code, address]
    got = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert got.returncode == 0, got.stderr
    return got.stdout


def command(server: Server, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLUMNIX_ADMIN_API_KEY": ADMIN}
    return subprocess.run(
        [sys.executable, "-m", "llumnix", *words, "--url", server.url],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_no_planted_word_is_found_where_others_could_read(planted: Server, files: Path) -> None:
    real_time()
    told: dict[str, str] = {}
    watcher = threading.Thread(target=lambda: told.update(feed=feed(planted)))
    watcher.start()
    for key in (FLAG, NAMED, ADMIN):
        assert complete(planted, key, max_tokens=40, ignore_eos=True).status_code == 200
    errors = [
        complete(planted, None), complete(planted, "planted-wrong-key"), complete(planted, VIEWER),
        complete(planted, NAMED, model="none"), complete(planted, NAMED, temperature="hot"),
        ask(planted, NAMED, "POST", "/llumnix/v1/instances"),
        ask(planted, NAMED, "GET", "/llumnix/v1/requests"),
        ask(planted, ADMIN, "GET", "/llumnix/v1/migrations/m99"),
    ]  # fmt: skip
    assert [e.status_code for e in errors] == [401, 401, 403, 404, 400, 403, 403, 404]
    told["errors"] = "".join(e.text + str(e.headers) for e in errors)
    for path in ("instances", "requests", "migrations", "config", "quarantine"):
        answer = ask(planted, VIEWER, "GET", f"/llumnix/v1/{path}")
        assert answer.status_code == 200
        told[path] = answer.text
    told["metrics"] = ask(planted, VIEWER, "GET", "/metrics").text
    told["the server's log"] = planted.log
    told["processes"] = "\n".join(title(p) for p in (planted.process.pid, *planted.descendants()))
    engine = planted.instances()["i0"]["pid"]
    told["Ray's logs"], told["Ray's control store"] = ray_logs(engine), control_store(engine)
    watcher.join()
    told["the event log"] = "".join(p.read_text() for p in files.glob("events.jsonl*"))
    # Each was looked at where there is something to be seen.
    for where, there in {
        "feed": "event: state", "config": '"***"', "metrics": "llumnix_", "processes": "--keys",
        "the server's log": "serving tiny", "Ray's logs": "ray", "the event log": "finish_reason",
        "Ray's control store": "EngineActor",
    }.items():  # fmt: skip
        assert there in told[where], where
    found = {
        where: [line[:200] for line in text.splitlines() if MARK in line]
        for where, text in told.items()
        if MARK in text
    }
    assert found == {}


def test_what_an_engine_that_dies_leaves_behind_has_no_planted_word(planted: Server) -> None:
    row = planted.instances()["i1"]
    os.kill(row["pid"], signal.SIGKILL)
    eventually(lambda: planted.instances()["i1"]["restarts"] > row["restarts"], 60, "it is noticed")
    eventually(lambda: planted.instances()["i1"]["state"] == "serving", 240, "it serves again")
    assert MARK not in planted.log
    assert MARK not in ray_logs(planted.instances()["i0"]["pid"])


def test_keys_are_exchanged_in_all_frontends_while_they_serve(planted: Server, files: Path) -> None:
    def statuses(key: str) -> set[int]:
        return {complete(planted, key).status_code for _ in range(8)}

    write_keys(files, f"bea: {{key: planted-new-key}}\nvic: {{key: {VIEWER}, roles: [view]}}\n")
    assert statuses("planted-new-key") == {401}
    done = command(planted, "reload")
    assert (done.returncode, done.stdout) == (0, "2 keys: added bea; removed ada\n"), done.stderr
    assert statuses("planted-new-key") == {200}
    assert statuses(NAMED) == {401}
    write_keys(files, "bea: {key: planted-other-key, roles: [root]}\n")
    done = command(planted, "reload")
    assert done.returncode == 2
    assert "bea: roles is a list of some of" in done.stderr
    assert MARK not in done.stderr
    assert statuses("planted-new-key") == {200}
    # A service has no terminal.
    write_keys(files, "cleo: {key: planted-third-key, requests_per_min: 4}\n")
    planted.signal(signal.SIGHUP)
    eventually(lambda: complete(planted, "planted-third-key").status_code != 401, 20, "reloaded")
    over = [complete(planted, "planted-third-key") for _ in range(8)][-1]
    assert (over.status_code, over.json()["error"]["code"]) == (429, "rate_limited")
    assert int(over.headers["retry-after"]) > 1
    rows = json.loads(command(planted, "config", "show", "--json").stdout)["settings"]
    shown = {row["name"]: row["value"] for row in rows}
    assert (shown["api-key"], shown["keys"]) == ("***", str(files / "keys.yaml"))
    assert MARK not in planted.log
