"""The unit for systemd: it says what systemd knows, and `serve` behaves as it expects. No systemd
runs here; the last test does what its manual says."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from llumnix.frontend.arguments import SHUTDOWN_TIMEOUT_S
from llumnix.frontend.http.server import HTTP_CLOSE_TIMEOUT_S
from support.managed import (
    ADMIN_KEY,
    KEY,
    environment,
    notify_socket,
    one_stream,
    running,
    seconds,
    unit_settings,
)
from support.server import alive, descendants, eventually, free_port

UNIT = Path(__file__).resolve().parents[2] / "deploy" / "systemd" / "llumnix.service"
PROGRAM = "/opt/llumnix/.venv/bin/llumnix"


def test_systemd_knows_every_setting_of_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze (Debian's package systemd)")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(PROGRAM, "/bin/true"))
    done = subprocess.run([analyze, "verify", copy], capture_output=True, text=True, check=False)
    # Its exit status is 0 when it finds a name that it does not know.
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stop_has_the_time_that_running_requests_have() -> None:
    settings = unit_settings(UNIT)
    assert settings["KillMode"] == ["mixed"]
    stop_s = seconds(settings["TimeoutStopSec"][0])
    assert stop_s >= SHUTDOWN_TIMEOUT_S + HTTP_CLOSE_TIMEOUT_S + 20


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.parametrize("frontends", [1, 2])
def test_a_service_is_ready_when_it_serves_and_ends_when_its_stream_has_ended(
    frontends: int, tmp_path: Path, tiny_model: Path
) -> None:
    settings = unit_settings(UNIT)
    config, port = tmp_path / "config.yaml", free_port()
    flags = {"model": str(tiny_model), "served-model-name": "tiny", "port": port, "instances": 1}
    flags |= {"dtype": "float32", "kv-cache-memory-bytes": 2**25, "max-num-seqs": 16}
    flags["api-server-count"] = frontends
    config.write_text(yaml.safe_dump(flags))
    (tmp_path / "api-keys").write_text(KEY + "\n")
    (tmp_path / "admin-api-keys").write_text(ADMIN_KEY + "\n")
    command = settings["ExecStart"][0]
    command = command.replace("/etc/llumnix/config.yaml", str(config))
    command = command.replace("${CREDENTIALS_DIRECTORY}", str(tmp_path))
    words = command.replace(PROGRAM, f"{sys.executable} -m llumnix").split()
    log = tmp_path / "log"
    with notify_socket(tmp_path / "notify") as manager, log.open("w") as out:
        given = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "2000000"}
        main = subprocess.Popen(
            words, env=environment(**given), stdout=out, stderr=out, start_new_session=True
        )
        try:
            eventually(
                lambda: "READY=1" in manager.of(main.pid) or main.poll() is not None, 240, "ready"
            )
            before = manager.of(main.pid)
            assert main.poll() is None, log.read_text()
            assert before[0].startswith("STATUS=")
            where = before[before.index("READY=1") + 1]
            assert where.startswith(f"STATUS=serving tiny at http://127.0.0.1:{port}")
            processes = descendants(main.pid)
            ended: list[str] = []
            stream = threading.Thread(target=lambda: ended.append(one_stream(port)))
            stream.start()
            eventually(lambda: running(port), 30, "a stream runs")
            eventually(lambda: "WATCHDOG=1" in manager.of(main.pid), 5, "the watchdog's message")
            main.send_signal(signal.SIGTERM)  # As KillMode=mixed: nobody else gets it.
            assert main.wait(seconds(settings["TimeoutStopSec"][0])) == 0
            stream.join()
            assert ended == ["data: [DONE]"]
            assert "STOPPING=1" in manager.of(main.pid)
            assert {pid for pid, _ in manager.heard} == {main.pid}
            # With several frontends Python's fork server ends once it notices that this one has.
            eventually(lambda: not [p for p in processes if alive(p)], 5, "nothing is left")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(main.pid, signal.SIGKILL)
