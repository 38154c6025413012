"""Bad input: one clear line that names the fix, exit status 2, nothing left running."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llumnix.commands.registry import COMMANDS
from support.server import eventually, unused_memory

pytestmark = pytest.mark.live


def on_any_port(words: tuple[str, ...]) -> list[str]:
    """`serve` listens at once, and another may have its default port."""
    return [*words, *(["--port", "0"] if words[0] == "serve" and "--port" not in words else [])]


def llumnix(*words: str) -> tuple[int, str]:
    """Runs the command to its end; its exit status and what it printed to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "llumnix", *on_any_port(words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    return done.returncode, done.stderr


WARM = """
import io, json, os, sys
import llumnix.cli
llumnix.cli.main(["serve", "--instances", "0", "--port", "0"])  # Loads all there is to load.
for line in sys.stdin:
    words, out = json.loads(line)
    child = os.fork()
    if not child:
        sink = os.open(out, os.O_WRONLY | os.O_CREAT)
        os.dup2(sink, 1), os.dup2(sink, 2)
        sys.stdin = io.StringIO()
        status = 1
        try:
            status = llumnix.cli.main(words)
        except SystemExit as leaving:
            status = leaving.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""A process that has loaded vLLM, which takes ten seconds, and runs each command in a fork."""


class Warm:
    """The command in forks of one such process."""

    def __init__(self, folder: Path) -> None:
        self._out = folder / "said"
        self._process = subprocess.Popen(
            [sys.executable, "-c", WARM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    def __call__(self, *words: str) -> tuple[int, str]:
        """The exit status of a command and what it printed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._out.unlink(missing_ok=True)
        print(
            json.dumps([on_any_port(words), str(self._out)]), file=self._process.stdin, flush=True
        )
        for line in self._process.stdout:
            if line.startswith("status "):
                return int(line.split()[1]), self._out.read_text()
        raise AssertionError("the process that runs commands has ended")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    one = Warm(tmp_path_factory.mktemp("warm"))
    yield one
    one.close()


def left_behind() -> set[Path]:
    """What dead processes left in shared memory and among the folders for sockets."""
    folders = Path(tempfile.gettempdir()).glob("llumnix-*")
    return {*map(Path, unused_memory()), *filter(is_dead, folders)}


def is_dead(folder: Path) -> bool:
    """Whether the folder had an owner, who is dead: nobody has its lock."""
    if folder.name.startswith("llumnix-removed-"):
        return True
    try:
        with (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def complaint(*words: str, run: Callable[..., tuple[int, str]] = llumnix) -> str:
    """The one line in which the command says what is wrong. `run`: by itself, or in `Warm`."""
    status, said = run(*words)
    lines = [line for line in said.splitlines() if line.startswith("llumnix: error: ")]
    assert status == 2, said
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]


def test_no_such_folder() -> None:
    assert "no such folder; name a folder" in complaint("serve", "./nowhere/model")


def test_a_folder_without_a_checkpoint(warm: Warm, tmp_path: Path) -> None:
    assert "holds no config.json" in complaint("serve", str(tmp_path), run=warm)


def test_unknown_model(warm: Warm) -> None:
    line = complaint("serve", "nobody/no-such-model", run=warm)
    assert "unknown model nobody/no-such-model" in line
    assert "check the name" in line


def test_fewer_than_one_instance(warm: Warm) -> None:
    assert "--instances 0: must be 1 or more" in complaint("serve", "--instances", "0", run=warm)


def test_bounds_that_do_not_hold_what_it_starts_with(warm: Warm) -> None:
    line = complaint("serve", "--instances", "3", "--max-instances", "2", run=warm)
    assert "--instances 3 is what it starts with" in line


def test_a_scheduler_config_that_is_not_there(warm: Warm) -> None:
    line = complaint("serve", "--scheduler-config", "nowhere.yaml", run=warm)
    assert "--scheduler-config nowhere.yaml cannot be read" in line


def test_a_port_in_use(warm: Warm, tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = complaint("serve", str(tiny_model), "--port", str(port), run=warm)
    assert f"cannot listen on 127.0.0.1:{port}" in line
    assert "another --port" in line


def test_beyond_loopback_without_a_key(warm: Warm, tiny_model: Path) -> None:
    line = complaint("serve", str(tiny_model), "--host", "0.0.0.0", run=warm)
    assert "give --api-key KEY or --keys FILE, or --insecure" in line


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        (["--data-parallel-size", "2"], "use --instances N"),
        (["--headless"], "use --ray-address"),
        (["--api-server-count", "0"], "must be 1 or more"),
        (["--policy", "scls", "--scheduling-policy", "fcfs"], "leave --scheduling-policy out"),
    ],
)
def test_flags_that_break_over_several_instances(
    warm: Warm, tiny_model: Path, flags: list[str], fix: str
) -> None:
    assert fix in complaint("serve", str(tiny_model), *flags, run=warm)


def test_a_flag_that_vllm_does_not_know(warm: Warm) -> None:
    status, said = warm("serve", "--no-such-flag")
    assert status == 2
    assert "unrecognized arguments: --no-such-flag" in said


def test_a_value_that_vllm_refuses(warm: Warm, tiny_model: Path) -> None:
    line = complaint("serve", str(tiny_model), "--max-model-len", "999999999", run=warm)
    assert "vLLM refuses these settings" in line
    assert "max_model_len" in line


def test_ray_that_cannot_be_reached(warm: Warm, tiny_model: Path) -> None:
    line = complaint("serve", str(tiny_model), "--ray-address", "127.0.0.1:1", run=warm)
    assert "cannot reach Ray at 127.0.0.1:1" in line
    assert "ray start --head" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "99999"], "--port 99999: must be 1 to 65535"),
        (["--config", "/nowhere.yaml"], "nowhere.yaml"),
        (["--chat-template", "/nowhere/t.jinja"], "/nowhere/t.jinja"),
        (["--ssl-keyfile", "/nowhere", "--ssl-certfile", "/nowhere"], "the certificate cannot be"),
        (["--event-log", "/tmp"], "--event-log /tmp cannot be written"),
        (["--event-log", "/proc/llumnix"], "--event-log /proc/llumnix cannot be written"),
        (["--enable-lora", "--lora-modules", "x=/nowhere"], "no adapter_config.json"),
        (["--middleware", "nowhere.Nothing"], "--middleware nowhere.Nothing cannot be imported"),
    ],
)
def test_files_that_cannot_be_used(
    warm: Warm, tiny_model: Path, flags: list[str], said: str
) -> None:
    assert said in complaint("serve", str(tiny_model), *flags, run=warm)


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
    line = complaint("sevre")
    first, *_, last = COMMANDS
    assert f"no command 'sevre'; use {first}, " in line
    assert f" or {last}" in line
