"""The log of a deployment, as a program reads it: JSON, one line a death, nothing of a user's own
mistakes but what to mend."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.server import Server, eventually

from .conftest import FLAGS

pytestmark = [pytest.mark.live, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tiny_model: Path, logs: Path) -> Iterator[Server]:
    """Two instances, whose lines and those of vLLM, uvicorn and Ray are all shown."""
    started = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS, "--log-format", "json",
        log=logs / "json.log", VLLM_LOGGING_LEVEL="INFO",
    )  # fmt: skip
    yield started.wait_until_serving()
    started.kill()


def lines(server: Server) -> list[dict[str, Any]]:
    """All lines so far. Whatever is no JSON object fails."""
    whole, _, _ = server.log.rpartition("\n")
    found = [json.loads(line) for line in whole.splitlines()]
    assert all(isinstance(line, dict) for line in found)
    return found


def events(server: Server, code: str) -> list[dict[str, Any]]:
    return [line for line in lines(server) if line.get("event") == code]


def test_every_line_is_json_whichever_process_wrote_it(server: Server) -> None:
    assert server.complete().status_code == 200, server.log[-3000:]
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/nowhere").status_code == 404
    eventually(lambda: "/nowhere" in server.log, 10, "the access log")
    found = lines(server)
    # Ours, vLLM's in this process and in an engine's, and uvicorn's.
    (ready,) = events(server, "ready")
    assert ready["url"].endswith(str(server.port))
    named = {line.get("name", line.get("logger")) for line in found}
    assert {"llumnix", "uvicorn.access"} <= named
    assert any(name.startswith("vllm.v1.engine.core") for name in named)
    asked = [line["message"] for line in found if line.get("name") == "uvicorn.access"]
    assert any("/v1/completions" in line for line in asked)
    assert not any("/health" in line for line in asked), "probes are not worth a line"


def test_a_death_is_one_line_with_its_cause_and_the_end_of_the_engines_log(server: Server) -> None:
    i1 = server.instances()["i1"]
    os.kill(i1["pid"], signal.SIGABRT)
    eventually(lambda: len(events(server, "ready")) == 2, 60, "i1 is back")
    (death,) = events(server, "death")
    assert (death["instance"], death["level"]) == ("i1", "ERROR")
    assert death["blamed"] is True
    assert death["streams_ended"] == 0
    assert death["cause"] in ("signal", "exit")
    assert any("Fatal Python error: Aborted" in line for line in death["tail"])
    (restart,) = events(server, "restart")
    assert restart["instance"] == "i1"
    assert [line["instance"] for line in events(server, "ready") if "instance" in line] == ["i1"]


def test_a_stop_is_told_in_json_to_the_end(server: Server) -> None:
    assert server.stop() == 0
    assert server.log.endswith("\n")
    # The last lines of an engine, which is another process, may come between.
    said = [line["msg"] for line in lines(server) if line.get("logger") == "llumnix"]
    after = said[said.index("stopped") + 1 :]
    lost = "an instance was lost; what it logged is in /"
    assert all(line.startswith(lost) for line in after), "if the test above has run"
    assert not any("Traceback" in line.get("msg", "") for line in lines(server))


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        (["--port", "banana"], "--port"),
        (["/nowhere/model"], "name a folder with a checkpoint"),
        (["--event-log", "/nowhere/log"], "make it first"),
        (["--instances", "0"], "must be 1 or more"),
    ],
)
def test_what_a_user_can_mend_is_one_line_without_a_traceback(flags: list[str], fix: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "llumnix", "serve", "--log-format", "json", *flags],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    found = [json.loads(line) for line in (run.stdout + run.stderr).splitlines()]
    assert not any("Traceback" in json.dumps(line) for line in found)
    assert fix in found[-1]["msg"]
