"""Bad input: one clear line that names the fix, exit status 2, nothing left running."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from support.server import eventually

pytestmark = pytest.mark.live


def llumnix(*words: str, **env: str) -> tuple[int, str]:
    """Runs the command to its end; its exit status and what it printed to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "llumnix", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
        check=False,
    )
    return done.returncode, done.stderr


def left_behind() -> set[Path]:
    return {*Path(tempfile.gettempdir()).glob("llumnix-*"), *Path("/dev/shm").iterdir()}


def complaint(*words: str, **env: str) -> str:
    status, stderr = llumnix(*words, **env)
    lines = [line for line in stderr.splitlines() if line.startswith("llumnix: error: ")]
    assert status == 2, stderr
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]


def test_no_such_folder() -> None:
    assert "no such folder; name a folder" in complaint("serve", "./nowhere/model")


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    assert "holds no config.json" in complaint("serve", str(tmp_path))


def test_unknown_model() -> None:
    line = complaint("serve", "nobody/no-such-model")
    assert "unknown model nobody/no-such-model" in line
    assert "check the name" in line


def test_fewer_than_one_instance() -> None:
    assert "--instances 0: must be 1 or more" in complaint("serve", "--instances", "0")


def test_bounds_that_do_not_hold_what_it_starts_with() -> None:
    line = complaint("serve", "--instances", "3", "--max-instances", "2")
    assert "--instances 3 is what it starts with" in line


@pytest.mark.slow
def test_a_scheduler_config_that_is_not_there() -> None:
    line = complaint("serve", "--scheduler-config", "nowhere.yaml")
    assert "--scheduler-config nowhere.yaml cannot be read" in line


def test_a_port_in_use(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = complaint("serve", str(tiny_model), "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}" in line
    assert "another --port" in line


def test_beyond_loopback_without_a_key(tiny_model: Path) -> None:
    line = complaint("serve", str(tiny_model), "--host", "0.0.0.0")
    assert "give --api-key KEY, or --insecure" in line


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        (["--data-parallel-size", "2"], "use --instances N"),
        pytest.param(["--headless"], "use --ray-address", marks=pytest.mark.slow),
        pytest.param(["--api-server-count", "2"], "one frontend process", marks=pytest.mark.slow),
    ],
)
def test_flags_that_break_over_several_instances(
    tiny_model: Path, flags: list[str], fix: str
) -> None:
    assert fix in complaint("serve", str(tiny_model), *flags)


def test_a_flag_that_vllm_does_not_know() -> None:
    status, stderr = llumnix("serve", "--no-such-flag")
    assert status == 2
    assert "unrecognized arguments: --no-such-flag" in stderr


def test_a_value_that_vllm_refuses(tiny_model: Path) -> None:
    line = complaint("serve", str(tiny_model), "--max-model-len", "999999999")
    assert "vLLM refuses these settings" in line
    assert "max_model_len" in line


def test_ray_that_cannot_be_reached(tiny_model: Path) -> None:
    line = complaint("serve", str(tiny_model), "--ray-address", "127.0.0.1:1")
    assert "cannot reach Ray at 127.0.0.1:1" in line
    assert "ray start --head" in line


@pytest.mark.slow
def test_what_an_engine_refuses_is_told_and_nothing_stays(tiny_model: Path) -> None:
    """Only the engine finds out that not even one request fits."""
    before = left_behind()
    line = complaint(
        "serve", str(tiny_model), "--kv-cache-memory-bytes", "65536", "--instances", "1"
    )
    assert "instance i0 could not be started" in line
    assert "cache blocks" in line
    eventually(lambda: left_behind() <= before, 10, "what it made is gone")


def test_no_server_to_ask() -> None:
    line = complaint("status", "--url", "http://127.0.0.1:9")
    assert "start `llumnix serve`, or give --url" in line


def test_an_unknown_command() -> None:
    assert "use serve, status, migrate, drain, undrain, simulate, profile or replay" in complaint(
        "sevre"
    )
