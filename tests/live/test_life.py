"""Instances die, come and go under load; the whole stops as told. Each test has its own server."""

import json
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from llumnix.engine.folders import sweep
from support.browser import chromium, needs_browser, wait_for
from support.server import (
    FRONTENDS_VARIABLE,
    Server,
    alive,
    eventually,
    real_time,
    unused_memory,
)

from .conftest import FLAGS

pytestmark = pytest.mark.live


class Load:
    """Streams requests from threads until told to stop, and keeps what each one saw."""

    def __init__(self, server: Server, streams: int, max_tokens: int) -> None:
        self.server, self.max_tokens = server, max_tokens
        self.done: list[dict] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(streams)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, index: int) -> None:
        number = 0
        while not self._stop.is_set():
            self.done.append(stream(self.server, f"{index}-{number}", self.max_tokens))
            number += 1


def stream(server: Server, name: str, max_tokens: int) -> dict:
    """One streamed completion: its instance, error, tokens and pieces."""
    real_time()
    body = {"prompt": f"p {name}", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    seen: dict = {"name": name, "tokens": 0, "error": None, "instance": None, "pieces": 0}
    try:
        with httpx.stream(
            "POST",
            server.url + "/v1/completions",
            json=body,
            headers={"X-Request-Id": name},
            timeout=120,
        ) as response:
            seen["status"] = response.status_code
            seen["instance"] = response.headers.get("x-llumnix-instance")
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                piece = json.loads(line[6:])
                if "error" in piece:
                    seen["error"] = piece["error"]
                elif piece["choices"]:
                    seen["pieces"] += 1
                else:
                    seen["tokens"] = piece["usage"]["completion_tokens"]
    except httpx.TransportError as error:
        seen["error"] = repr(error)
    return seen


def answer(server: Server, path: str) -> httpx.Response | None:
    """None as long as nobody listens."""
    try:
        return server.http.get(path)
    except httpx.ConnectError:
        return None


def start(tiny_model: Path, log: Path, *flags: str) -> Server:
    return Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS, *flags, log=log
    ).wait_until_serving()


@pytest.fixture(scope="module")
def pair(tiny_model: Path, logs: Path) -> Iterator[Server]:
    """Two instances, which the tests hurt one after the other; nothing of them stays behind."""
    unused = unused_memory()
    server = Server(str(tiny_model), "--served-model-name", "tiny", *FLAGS, log=logs / "pair.log")
    early = eventually(lambda: answer(server, "/health"), 60, "the port is listened on")
    yield server.wait_until_serving()
    assert early.status_code == 503
    assert early.json()["error"]["message"].startswith("llumnix is starting")
    server.stop()
    print(server.log[-3000:])
    eventually(lambda: unused_memory() <= unused, 10, "no shared memory")


@pytest.fixture
def single(tiny_model: Path, logs: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    server = start(tiny_model, logs / f"{request.node.name}.log", "--instances", "1")
    yield server
    server.stop()
    print(server.log[-3000:])


def test_a_killed_instance_takes_no_stream_with_it_and_comes_back(pair: Server) -> None:
    server = pair
    with Load(server, streams=6, max_tokens=300) as load:
        eventually(lambda: {r["instance"] for r in server.requests()} == {"i0", "i1"}, what="load")
        victim = server.instances()["i1"]
        here = {r["id"] for r in server.requests() if r["instance"] == "i1"}
        killed = time.monotonic()
        os.kill(victim["pid"], signal.SIGKILL)
        eventually(lambda: server.instances()["i1"]["state"] != "serving", 2.0, "noticed in 2 s")
        eventually(lambda: len([s for s in load.done if s["name"] in here]) == len(here), 30)
        assert time.monotonic() - killed < 30
        before = len(load.done)
        eventually(lambda: len(load.done) > before + 3, what="the others go on")
        eventually(lambda: server.instances()["i1"]["state"] == "serving", 120, "comes back")
        back = server.instances()["i1"]
        eventually(lambda: server.instances()["i1"]["running"], 30, "gets requests again")
    assert here
    assert [s for s in load.done if s["error"]] == []
    assert {s["tokens"] for s in load.done} == {300}
    assert back["pid"] != victim["pid"]
    assert back["restarts"] == 1
    assert back["engine_index"] == 2


PLACE = """(id) => {
  const row = [...llumnix.model.rows.values()].find((r) => r.id === id);
  const sprite = row && llumnix.board.sprites.get(row.k);
  const column = sprite && llumnix.board.columns.find((c) => c.x === sprite.to.x);
  return row && [column?.id, row.phase];
}"""


def begun(server: Server) -> dict | None:
    """A request with few of its tokens, if there is one."""
    return next((row for row in server.requests() if row["output_tokens"] < 100), None)


@contextmanager
def watched(server: Server) -> Iterator[tuple[Any, dict]]:
    """The page, while one stream after the other goes on; and a request that has just begun, so
    that it outlasts what follows."""
    # The browser first: it starts slowly beside engines that have the cores.
    with chromium() as browser, Load(server, streams=1, max_tokens=1500) as load:
        page = browser.new_page()
        page.goto(server.url + "/llumnix/ui")
        wait_for(page, "llumnix.model.ready && llumnix.model.rows.size", 30)
        row = eventually(lambda: begun(server), 60, "a request begins")
        eventually(lambda: page.evaluate(PLACE, row["id"]), 5, "the page shows it")
        yield page, row
    assert [s["error"] for s in load.done] == [None] * len(load.done)


@needs_browser
def test_the_page_shows_a_move_within_a_second(pair: Server) -> None:
    with watched(pair) as (page, row):
        other = "i1" if row["instance"] == "i0" else "i0"
        order = {"request_id": row["request"], "destination": other}
        moved = pair.http.post("/llumnix/v1/migrations", json=order).json()
        assert moved["outcome"] == "migrated", moved
        ended_s = time.monotonic()
        eventually(lambda: page.evaluate(PLACE, row["id"])[0] == other, 5, "it is shown there")
        assert time.monotonic() - ended_s < 3  # Within one, where a browser has cores to spare.
        lines = "llumnix.model.events.map((e) => e.text).join()"
        wait_for(page, f"{lines}.includes('moved {row['instance']} → {other}, paused')")


@pytest.mark.slow  # tests/ui has it too, over a deployment that is made up.
@needs_browser
def test_the_page_shows_a_death_with_its_orphans(pair: Server) -> None:
    with watched(pair) as (page, row):
        here = row["instance"]
        other = "i1" if here == "i0" else "i0"
        page.evaluate("""() => {
          const { board } = llumnix, see = board.see.bind(board), seen = window.seen = [];
          board.see = (list, now) => { seen.push(...list); see(list, now); };
        }""")
        # The page knows of the deaths before it was opened, too.
        known = page.evaluate("llumnix.model.events.length")
        lines = f"llumnix.model.events.slice({known}).map((e) => e.text).join()"
        os.kill(pair.instances()[here]["pid"], signal.SIGKILL)
        wait_for(page, f"{lines}.includes('{here} died and starts again')", 30)
        wait_for(page, f"{lines}.includes('goes on at {other} after')", 30)
        assert page.evaluate("seen.some((s) => s.see === 'flash')")
        flights = page.evaluate("seen.filter((s) => s.see === 'flight').map((s) => s.orphan)")
        assert flights == [True]
        eventually(lambda: pair.instances()[here]["state"] == "serving", 120, f"{here} serves")
        wait_for(page, f"llumnix.model.instances.get('{here}').state === 'serving'")


def test_with_the_controller_killed_no_request_fails_and_it_comes_back(pair: Server) -> None:
    server = pair
    eventually(lambda: all(i["state"] == "serving" for i in server.instances().values()), 120)
    pids = server.controllers()
    assert len(pids) == 1
    with Load(server, streams=4, max_tokens=20) as load:
        eventually(lambda: len(load.done) > 8)
        os.kill(pids[0], signal.SIGKILL)
        before = len(load.done)
        eventually(lambda: "The controller does not answer" in server.log, what="says so")
        eventually(lambda: len(load.done) > before + 8, what="requests go on")
        eventually(lambda: "The controller is back" in server.log, 60, "it is started again")
        before = len(load.done)
        eventually(lambda: len(load.done) > before + 8)
        answer = server.http.get("/llumnix/v1/instances").json()
    assert [s for s in load.done if s["error"] or s["status"] != 200] == []
    assert answer["controller"] == "up"
    assert all(i["kv_tokens_total"] for i in answer["instances"])
    frontends = int(os.environ.get(FRONTENDS_VARIABLE, "1"))
    # Each process says it once: the frontends, and the main process beside several.
    links = 1 if frontends == 1 else frontends + 1
    assert server.log.count("The controller does not answer") == links
    assert {s["instance"] for s in load.done} == {"i0", "i1"}


@pytest.mark.slow
def test_a_controller_that_hangs_is_replaced_without_a_request_to_notice_it(pair: Server) -> None:
    server = pair
    (pid,) = server.controllers()
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: "it has not answered" in server.log, 60, "it says so")
    eventually(lambda: server.http.get("/llumnix/v1/instances").json()["controller"] == "up", 60)
    assert pid not in server.descendants()


@pytest.mark.slow
def test_instances_are_added_and_removed_while_streams_go_on(pair: Server) -> None:
    server = pair
    with Load(server, streams=4, max_tokens=200) as load:
        added = server.http.post("/llumnix/v1/instances")
        assert (added.status_code, added.json()["id"]) == (202, "i2")
        eventually(lambda: server.instances()["i2"]["state"] == "serving", 120)
        eventually(lambda: server.instances()["i2"]["running"], 30, "the new one gets requests")
        pid = server.instances()["i0"]["pid"]
        removed = server.http.delete("/llumnix/v1/instances/i0")
        assert (removed.status_code, removed.json()["state"]) == (202, "draining")
        eventually(lambda: "i0" not in server.instances(), 60)
        eventually(lambda: not alive(pid), 10)
    assert [s for s in load.done if s["error"]] == []
    assert "i2" in {s["instance"] for s in load.done}
    metrics = server.http.get("/metrics").text
    for engine in (1, 2):
        counted = re.search(
            rf'vllm:generation_tokens_total{{engine="{engine}".*}} ([\d.]+)', metrics
        )
        assert counted is not None
        assert float(counted[1]) > 0

    missing = server.http.delete("/llumnix/v1/instances/i7")
    assert missing.status_code == 404
    assert "no instance i7; there are: i1, i2" in missing.json()["error"]["message"]
    assert server.http.delete("/llumnix/v1/instances/i1").status_code == 202
    eventually(lambda: set(server.instances()) == {"i2"})
    last = server.http.delete("/llumnix/v1/instances/i2")
    assert last.status_code == 409
    assert "POST /llumnix/v1/instances first" in last.json()["error"]["message"]
    assert server.complete().status_code == 200


def test_ctrl_c_lets_running_requests_end_and_leaves_nothing(pair: Server) -> None:
    """The last test of this pair."""
    server = pair
    unused = unused_memory()
    pids = server.descendants()
    assert len(pids) > 3
    results: list[dict] = []
    thread = threading.Thread(target=lambda: results.append(stream(server, "long", 600)))
    thread.start()
    eventually(lambda: any(r["output_tokens"] > 3 for r in server.requests()), what="it runs")
    server.signal(signal.SIGINT, group=True)
    eventually(lambda: "have 30 s to end" in server.log, 10)
    turned_away = server.complete()
    assert turned_away.status_code == 503
    assert turned_away.json()["error"]["message"] == "The server is stopping."
    assert server.http.get("/health").status_code == 503
    assert server.wait() == 0
    thread.join()
    assert results[0]["error"] is None
    assert results[0]["tokens"] == 600
    eventually(lambda: not any(map(alive, pids)), 10, "no process is left")
    eventually(lambda: unused_memory() <= unused, 10, "no shared memory")
    # But for what an engine that was killed had logged.
    assert not any("Traceback" in t for t in server.log.splitlines() if not t.startswith("    | "))


@pytest.mark.slow
def test_a_second_signal_stops_at_once(single: Server) -> None:
    server = single
    thread = threading.Thread(target=stream, args=(server, "long", 1900))
    thread.start()
    eventually(lambda: any(r["output_tokens"] > 3 for r in server.requests()))
    server.signal(signal.SIGTERM)
    eventually(lambda: "have 30 s to end" in server.log, 10)
    began = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert time.monotonic() - began < 15
    thread.join()
    assert "stopping at once" in server.log


def own_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("llumnix-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_that_goes_to_every_process_lets_running_requests_end(
    single: Server, number: signal.Signals
) -> None:
    """As a service manager stops a service, and as a terminal ends."""
    server = single
    pids = server.descendants()
    results: list[dict] = []
    thread = threading.Thread(target=lambda: results.append(stream(server, "long", 600)))
    thread.start()
    eventually(lambda: any(r["output_tokens"] > 3 for r in server.requests()), what="it runs")
    for pid in (server.process.pid, *pids):
        os.kill(pid, number)
    assert server.wait() == 0
    thread.join()
    assert results[0]["error"] is None
    assert results[0]["tokens"] == 600
    eventually(lambda: not any(map(alive, pids)), 10, "no process is left")
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_what_a_killed_run_leaves_is_swept(single: Server) -> None:
    pids = single.descendants()
    left = own_folders()
    single.signal(signal.SIGKILL)
    # Ray's agents look for their raylet for a minute.
    eventually(lambda: not any(map(alive, pids)), 150, "its processes end by themselves")
    swept = set(sweep(Path(tempfile.gettempdir())))
    assert swept
    assert swept <= left
    assert not swept & own_folders()


@pytest.mark.slow
def test_ctrl_c_while_it_starts_leaves_nothing(tiny_model: Path, logs: Path) -> None:
    server = Server(str(tiny_model), *FLAGS, log=logs / "early.log")
    eventually(lambda: "starting instance 2/2" in server.log, 120)
    time.sleep(2)
    early = server.http.get("/v1/models").json()
    assert [(one["id"], one["state"]) for one in early["instances"]] == [
        ("i0", "starting"),
        ("i1", "starting"),
    ]
    pids = server.descendants()
    server.signal(signal.SIGINT, group=True)
    time.sleep(0.5)
    server.signal(signal.SIGTERM)  # Cuts no clean-up short.
    assert server.wait() == 130
    eventually(lambda: not any(map(alive, pids)), 10, "no process is left")
    assert "stopped before it served" in server.log


@pytest.mark.slow
def test_a_crash_loop_ends_with_a_clear_message(single: Server) -> None:
    server = single

    def died() -> bool:
        try:
            return server.instances()["i0"]["state"] != "serving"
        except httpx.TransportError:
            return True  # The server has ended.

    for _ in range(5):
        eventually(lambda: server.instances()["i0"]["state"] == "serving", 120)
        os.kill(server.instances()["i0"]["pid"], signal.SIGKILL)
        eventually(died, 10, "its death is seen")
    assert server.wait() == 2
    assert "every instance failed: given up: crashed 5 times" in server.log
