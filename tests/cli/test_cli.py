"""The commands that ask a running server, and the one that reads an event log."""

import json
import os
import re
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llumnix import cli
from llumnix.cli import main
from llumnix.commands import server_client
from llumnix.config import LogPlace, knobs
from llumnix.core.events import LoadReported, RequestArrived
from llumnix.core.reports import LoadReport
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, MigrationId, RequestId
from llumnix.observe.event_log import EventLog

INSTANCES = {
    "controller": "up",
    "instances": [
        {
            "id": "i0",
            "state": "serving",
            "node": "host",
            "pid": 8125,
            "devices": ["cpu:0"],
            "kv_tokens_used": 1536,
            "kv_tokens_total": 46464,
            "running": 3,
            "waiting": 0,
            "restarts": 0,
            "why": None,
        }
    ],
}
MIGRATED = {
    "id": "m3",
    "request_id": "r1",
    "request": "r1-0a1b2c3d",
    "outcome": "migrated",
    "source": "i0",
    "destination": "i1",
    "stages": [
        {"tokens": 80, "bytes": 400_000, "ms": 4.0},
        {"tokens": 17, "bytes": 85_000, "ms": 1.5},
    ],
    "downtime_ms": 2.16,
    "total_ms": 9.97,
    "reason": "",
}

LOOKED_AT = ("VLLM_API_KEY", "LLUMNIX_ADMIN_API_KEY", "LLUMNIX_URL", "SSL_CERT_FILE")


class Server:
    """Answers everything with one status and one body; notes what it was asked."""

    def __init__(self) -> None:
        self.status = 200
        self.body: Any = None
        self.asked: list[tuple[str, str, str | None, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                size = int(self.headers.get("content-length", 0))
                content = json.loads(self.rfile.read(size)) if size else None
                key = self.headers.get("authorization")
                outer.asked.append((self.command, self.path, key, content))
                if outer.status == 0:
                    self.close_connection = True  # Dies without a word.
                    return
                body = outer.body if isinstance(outer.body, bytes) else json.dumps(outer.body)
                body = body if isinstance(body, bytes) else body.encode()
                self.send_response(outer.status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.handler = Handler
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self._thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in os.environ:
        if name.lower().endswith("_proxy") or name in LOOKED_AT:
            monkeypatch.delenv(name)
    running = Server()
    yield running
    running.close()


def refusal(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error as frontend/http/routes.py writes it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": 400}}


# -- status


def test_status_is_a_table(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.body = INSTANCES
    assert main(["status", "--url", server.url + "/"]) == 0
    assert capsys.readouterr().out == (
        "INSTANCE  STATE    NODE  PID   DEVICES  KV TOKENS   RUNNING  WAITING  RESTARTS\n"
        "i0        serving  host  8125  cpu:0    1536/46464  3        0        0\n"
    )
    assert server.asked == [("GET", "/llumnix/v1/instances", None, None)]


def test_status_as_json_is_the_servers_answer(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.body = INSTANCES
    assert main(["status", "--json", "--url", server.url, "--api-key", "k"]) == 0
    assert json.loads(capsys.readouterr().out) == INSTANCES
    assert server.asked[0][2] == "Bearer k"


@pytest.mark.parametrize("command", [["status"], ["migrate", "r1"]])
def test_every_command_says_what_to_mend(
    server: Server, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    asked = [*command, "--url", server.url]
    for status, body, said in [
        (401, {"error": "Unauthorized"}, "the server wants a key: give --api-key KEY"),
        (404, {"detail": "Not Found"}, f"{server.url} is no llumnix server (status 404)"),
        (404, refusal("Not Found", "NotFoundError"), f"{server.url} is no llumnix server"),
        (200, b"<html>", f"{server.url} is no llumnix server (status 200)"),
        (200, [], f"{server.url} is no llumnix server (status 200)"),
        (200, {"hello": 1}, f"{server.url} is no llumnix server (status 200)"),
    ]:
        server.status, server.body = status, body
        assert main(asked) == 2
        assert capsys.readouterr().err.startswith(f"llumnix: error: {said}")
    server.close()
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"llumnix: error: no llumnix answers at {server.url} (")
    assert error.endswith("): start `llumnix serve`, or give --url\n")
    assert main([*command, "--url", "http://[::1"]) == 2


@pytest.mark.parametrize("command", [["status"], ["migrate", "r1"]])
def test_a_server_that_fails_is_not_the_users_fault(
    server: Server, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    asked = [*command, "--url", server.url]
    server.status, server.body = 500, b"Internal Server Error"
    assert main(asked) == 1
    assert capsys.readouterr().err == (
        f"llumnix: {server.url} failed (status 500); its log says why\n"
    )
    server.status = 503
    server.body = refusal("The server is stopping.", "service_unavailable")
    assert main(asked) == 1
    assert capsys.readouterr().err == "llumnix: The server is stopping.\n"


# -- how a server is asked


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "127.1.2.3", "[::1]"])
@pytest.mark.parametrize(
    "proxies",
    [
        {"HTTP_PROXY": "http://127.0.0.1:9"},
        {"http_proxy": "127.0.0.1:9"},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"all_proxy": "socks://127.0.0.1:9"},
        {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.0/8,::1/128"},
        {"HTTP_PROXY": "http://[::1", "NO_PROXY": "[::1"},
        {"SSL_CERT_FILE": "/nowhere"},
    ],
)
def test_a_server_on_loopback_is_asked_directly(
    monkeypatch: pytest.MonkeyPatch, host: str, proxies: dict[str, str]
) -> None:
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    args = server_client.server_parser("status").parse_args(["--url", f"http://{host}:8000"])
    with server_client._client(args, 1.0) as asking:
        through = asking._transport_for_url(asking.base_url)
    assert through is asking._transport
    assert through._pool.__class__.__name__ == "ConnectionPool"  # type: ignore[attr-defined]


def test_a_proxy_is_asked_for_other_hosts_only(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.body = INSTANCES
    monkeypatch.setenv("HTTP_PROXY", server.url)
    assert main(["status", "--url", "http://llm.example"]) == 0
    assert server.asked[0][1] == "http://llm.example/llumnix/v1/instances"
    for odd in ("socks://127.0.0.1:9", "http://[::1"):
        monkeypatch.setenv("HTTP_PROXY", odd)
        capsys.readouterr()
        assert main(["status", "--url", "http://llm.example"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("llumnix: error: the environment's proxies cannot be used (")
        assert error.count("\n") == 1


def test_the_key_is_the_flags_the_files_or_a_variables(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.body = INSTANCES
    file = tmp_path / "key"
    file.write_text("# mine\nfrom-file\nold\n")
    asked = ["status", "--url", server.url]
    monkeypatch.setenv("VLLM_API_KEY", "ordinary")
    assert main(asked) == 0
    monkeypatch.setenv("LLUMNIX_ADMIN_API_KEY", "admin")
    assert main(asked) == 0
    assert main([*asked, "--api-key-file", str(file)]) == 0
    assert main([*asked, "--api-key-file", str(file), "--api-key", "given"]) == 0
    assert [key for _, _, key, _ in server.asked] == [
        "Bearer ordinary", "Bearer admin", "Bearer from-file", "Bearer given",
    ]  # fmt: skip
    capsys.readouterr()
    server.status, server.body = 401, {"error": "Unauthorized"}
    assert main(asked) == 2
    assert "the server wants another key" in capsys.readouterr().err
    for bad in (["--api-key", "sch\u00f6n"], ["--api-key", ""], ["--api-key-file", "/nowhere"]):
        assert main([*asked, *bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_what_is_forbidden_is_told_in_the_servers_words(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status, server.body = 403, refusal("POST x is for administrators.", "forbidden")
    assert main(["drain", "i0", "--url", server.url]) == 2
    assert capsys.readouterr().err == "llumnix: error: POST x is for administrators.\n"


@pytest.mark.parametrize("way", ["--uds", "--url", "LLUMNIX_URL"])
def test_a_server_on_a_unix_socket_is_asked_there(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    way: str,
) -> None:
    server.body = INSTANCES
    path = str(tmp_path / "s")
    flags = {"--uds": ["--uds", path], "--url": ["--url", f"unix:{path}"], "LLUMNIX_URL": []}
    monkeypatch.setenv(
        "LLUMNIX_URL", f"unix:{path}" if way == "LLUMNIX_URL" else "http://x.example"
    )
    assert main(["status", *flags[way]]) == 2
    assert f"no llumnix answers at unix:{path} (" in capsys.readouterr().err
    with socketserver.UnixStreamServer(path, server.handler) as unix:
        thread = threading.Thread(target=unix.handle_request)
        thread.start()
        assert main(["status", *flags[way]]) == 0
        thread.join()
    assert server.asked[0][:2] == ("GET", "/llumnix/v1/instances")


def test_certificates_that_cannot_be_read_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("/nowhere", __file__):
        assert main(["status", "--url", "https://127.0.0.1:1", "--cacert", file]) == 2
        assert capsys.readouterr().err.startswith(
            f"llumnix: error: --cacert: {file} cannot be read"
        )


# -- migrate


def test_migrate_sends_the_order_and_prints_one_line(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.body = MIGRATED
    assert main(["migrate", "r1", "--to", "i1", "--copy", "blocking", "--url", server.url]) == 0
    assert capsys.readouterr().out == (
        "m3: r1 i0 -> i1 migrated: 97 tokens, 0.5 MB, 2 stages, downtime 2.2 ms, total 10.0 ms\n"
    )
    order = {"request_id": "r1", "destination": "i1", "copy": "blocking"}
    assert server.asked == [("POST", "/llumnix/v1/migrations", None, order)]


def test_migrate_leaves_the_choice_to_the_server(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.body = MIGRATED
    assert main(["migrate", "r1", "--json", "--url", server.url]) == 0
    assert json.loads(capsys.readouterr().out) == MIGRATED
    order = {"request_id": "r1", "destination": None, "copy": "staged"}
    assert server.asked == [("POST", "/llumnix/v1/migrations", None, order)]


def test_a_migration_whose_source_died_has_no_figures_of_the_source(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "the source died after the handover"
    server.body = MIGRATED | {"stages": [], "downtime_ms": None, "reason": why}
    assert main(["migrate", "r1", "--url", server.url]) == 0
    assert capsys.readouterr().out == (
        "m3: r1 i0 -> i1 migrated: 0 tokens, 0.0 MB, 0 stages, downtime unknown, total 10.0 ms "
        "(the source died after the handover)\n"
    )


@pytest.mark.parametrize("outcome", ["aborted", "lost"])
def test_what_was_not_moved_is_status_1_with_the_reason(
    server: Server, capsys: pytest.CaptureFixture[str], outcome: str
) -> None:
    server.body = MIGRATED | {"outcome": outcome, "reason": "it ended meanwhile"}
    assert main(["migrate", "r1", "--url", server.url]) == 1
    assert capsys.readouterr().out == f"m3: r1 i0 -> i1 {outcome}: it ended meanwhile\n"
    assert main(["migrate", "r1", "--url", server.url, "--json"]) == 1


@pytest.mark.parametrize("status", [400, 404, 409])
def test_a_bad_order_is_status_2_with_the_servers_message(
    server: Server, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    server.status, server.body = status, refusal("request r1 is on i1 already")
    assert main(["migrate", "r1", "--to", "i1", "--url", server.url]) == 2
    assert capsys.readouterr().err == "llumnix: error: request r1 is on i1 already\n"


def test_silence_after_an_order_is_unknown_and_says_where_to_look(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = 0
    assert main(["migrate", "r1", "--url", server.url]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"llumnix: no answer from {server.url} (")
    assert error.endswith("): whether it was moved is unknown; GET /llumnix/v1/migrations tells\n")


# -- drain


class Draining:
    """A body that changes with each question: what there is, the drain's answer, then the lists of
    instances."""

    def __init__(self, server: Server, *states: tuple[str, str | None]) -> None:
        rows = [{"id": "i1", "state": state, "why": why} for state, why in states]
        listed = [{"controller": "up", "instances": [row]} for row in rows]
        there = {"controller": "up", "instances": [{**rows[0], "state": "serving"}]}
        bodies = iter([there, rows[0], *listed, {"controller": "up", "instances": []}])
        handler = server.handler
        answer = handler.answer

        def next_one(handling: Any) -> None:
            server.body = next(bodies)
            answer(handling)

        handler.do_GET = handler.do_POST = next_one


@pytest.mark.parametrize(
    ("flags", "query"),
    [
        ([], ""),
        (["--timeout", "2.5"], "?timeout_s=2.5"),
        (["--force"], "?force=true"),
        (["--timeout", "0", "--force"], "?timeout_s=0.0&force=true"),
    ],
)
def test_drain_sends_what_it_was_told_and_returns_once_the_instance_is_gone(
    server: Server, capsys: pytest.CaptureFixture[str], flags: list[str], query: str
) -> None:
    Draining(server, ("draining", "draining: a user's order"), ("stopping", None))
    assert main(["drain", "i1", *flags, "--url", server.url]) == 0
    assert capsys.readouterr().out.startswith("i1 is empty and stopped after 0.")
    assert server.asked[1][:2] == ("POST", f"/llumnix/v1/instances/i1/drain{query}")
    assert [a[0] for a in server.asked] == ["GET", "POST", "GET", "GET", "GET"]


def test_drain_says_what_was_cut_off(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    why = "a user's order; 2 of its requests were cut off after 3.0 s"
    Draining(server, ("draining", None), ("stopping", why))
    assert main(["drain", "i1", "--timeout", "3", "--url", server.url]) == 0
    said = capsys.readouterr().out
    assert said.startswith("i1 is stopped after 0.")
    assert said.endswith(f" s: {why}\n")


def test_a_drain_that_was_taken_back_is_status_1(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    Draining(server, ("draining", None), ("serving", None))
    assert main(["drain", "i1", "--url", server.url]) == 1
    assert capsys.readouterr().out == "i1 is serving: its drain was taken back\n"


@pytest.mark.parametrize("words", [["migrate"], ["migrate", "r1", "--copy", "gently"], ["replay"]])
def test_words_that_no_command_knows_are_status_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2


# -- replay


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two facts, one decision and two steps."""
    path = tmp_path / "log.jsonl"
    writer = EventLog(LogPlace(path=str(path)), who="test")
    settings = SchedulerSettings(policy="least-loaded")
    scheduler = Scheduler(settings)
    report = LoadReport(
        instance=InstanceId("i0"),
        engine_index=EngineIndex(0),
        sequence=1,
        kv_tokens_used=0,
        kv_tokens_total=100,
    )
    writer.started(settings)
    for fact in (
        LoadReported(report=report),
        RequestArrived(request=RequestId("r"), prompt_tokens=3),
    ):
        decisions = scheduler.handle(fact, 1.0)
        writer.fact(fact, 1.0)
        for decision in decisions:
            writer.decision(decision, 1.0)
    writer.step("source", MigrationId("m0"), "reserved", "between stages", "see what is left")
    writer.step(
        "source",
        MigrationId("m0"),
        "request ended",
        "aborted",
        "let it go on, tell the destination",
    )
    writer.close()
    return path


def test_a_log_that_comes_out_the_same_is_status_0(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(log)]) == 0
    assert capsys.readouterr().out == (
        "2 facts, 1 decision and 2 migration steps run again: no difference\n"
    )
    assert main(["replay", str(log), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "facts": 2,
        "decisions": 1,
        "steps": 2,
        "skipped": 0,
        "dropped": 0,
        "failed": 0,
        "differences": [],
    }


def test_a_log_that_comes_out_otherwise_is_status_1_with_the_differences(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.write_text(log.read_text().replace('"between stages"', '"stopping"'))
    assert main(["replay", str(log)]) == 1
    assert capsys.readouterr().out == (
        "2 facts, 1 decision and 2 migration steps run again: 1 difference\n"
        "line 6: was ('stopping', 'see what is left'), "
        "is ('between stages', 'see what is left')\n"
    )
    assert main(["replay", str(log), "--json"]) == 1


def test_facts_without_their_schedulers_start_are_left_out(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version, _, *facts = log.read_text().splitlines(keepends=True)[:4]
    log.write_text("".join([version, *facts]))
    assert main(["replay", str(log)]) == 0
    assert capsys.readouterr().out == (
        "0 facts, 0 decisions and 0 migration steps run again: no difference\n"
        "2 facts left out: no start of a scheduler goes before them\n"
    )


def test_what_follows_a_bug_of_the_scheduler_is_left_out(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version, started, fact, *rest = log.read_text().splitlines(keepends=True)[:5]
    failed = json.dumps({**json.loads(fact), "kind": "failed", "why": "KeyError: 'i0'"}) + "\n"
    log.write_text("".join([version, started, failed, *rest]))
    assert main(["replay", str(log)]) == 0
    assert capsys.readouterr().out == (
        "0 facts, 0 decisions and 0 migration steps run again: no difference\n"
        "1 fact could not be handled, which is a bug: what follows is not replayed\n"
        "1 fact left out: no start of a scheduler goes before them\n"
    )


def test_a_decision_that_is_missing_before_a_bug_is_a_difference(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version, started, report, asked, _, *rest = log.read_text().splitlines(keepends=True)
    failed = json.dumps({**json.loads(report), "kind": "failed", "why": "KeyError: 'i0'"}) + "\n"
    log.write_text("".join([version, started, report, asked, failed, *rest]))
    assert main(["replay", str(log)]) == 1
    assert "line 5: before this line: was nothing, is Dispatch(" in capsys.readouterr().out


def test_what_is_no_log_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.write_text("hello\n")
    assert main(["replay", str(other)]) == 2
    assert f"{other}, line 1: not a line of an event log" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


# -- the command itself


def test_what_nobody_foresaw_has_its_traceback_and_then_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(argv: list[str]) -> int:
        raise ZeroDivisionError("not\nforeseen")

    monkeypatch.setattr("llumnix.commands.replaying.replay", broken)
    assert main(["replay", "x"]) == 1
    *story, last = capsys.readouterr().err.splitlines()
    assert story[0].startswith("Traceback")
    assert last == ("llumnix: unexpected ZeroDivisionError: not foreseen; the traceback is above")


READERLESS = """
import sys
from llumnix import cli
from llumnix.commands import replaying, top
def follow(args, path):
    while True:
        yield "delta", {"seq": 1}
def replay(argv):
    print("all is well")
    return 1
def broken(argv):
    raise BrokenPipeError("of something else")
top.follow, replaying.replay = follow, replay
if sys.argv[1] == "broken":
    replaying.replay = broken
raise SystemExit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("words", "unbuffered", "status"),
    [
        (["top", "--json"], "", 128 + signal.SIGPIPE),
        (["top", "--json"], "1", 128 + signal.SIGPIPE),
        (["--help"], "", 0),
        (["add", "--help"], "", 0),
        (["replay", "x"], "", 1),  # It has come to its end before it notices.
        (["replay", "x"], "1", 128 + signal.SIGPIPE),
    ],
)
def test_where_nobody_reads_the_output_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, words: list[str], unbuffered: str, status: int
) -> None:
    """As after `| head -1`, which goes when it has its line."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", READERLESS, "ends", *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (status, "")


def test_another_pipe_that_breaks_has_its_traceback() -> None:
    command = [sys.executable, "-c", READERLESS, "broken", "replay", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "unexpected BrokenPipeError: of something else" in done.stderr


def test_the_help_of_serve_shows_our_flags_and_where_vllms_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "--help"]) == 0
    said = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in said for name, _, _ in knobs())
    assert "--help=all" in said
    # It takes ten seconds to import what only knows vLLM's own flags.
    program = (
        "import sys; from llumnix.cli import main; main(['serve', '--help']); "
        "sys.exit('vllm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_every_command_is_in_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert said == cli.USAGE
    assert all(re.search(rf"^ +([a-z]+, )*{c}\b", said, re.M) for c in cli.COMMANDS), said
    assert main(["mgirate"]) == 2
    assert "use serve, status, top, requests, migrate, " in capsys.readouterr().err
