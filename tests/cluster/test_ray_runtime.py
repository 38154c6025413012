"""What Ray, and whoever looks at the process list, is told of the command line; where a run on one
host listens; how a cluster is joined; what is read of the logs of Ray's workers."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llumnix.cluster import ray_runtime
from llumnix.errors import UsageError


def test_no_flags_value_is_in_the_job_that_ray_records() -> None:
    argv = [
        "serve",
        "a/model",
        "--api-key",
        "sk-1",
        "sk-2",
        "--hf-token=hf-1",
        "--port",
        "8000",
        "-O3",
    ]
    code = (
        "import sys; from llumnix.cluster import ray_runtime;"
        "ray_runtime.hide_arguments(sys.argv[1:]);"
        "from ray._private.utils import get_entrypoint_name; print(get_entrypoint_name())"
    )
    run = [sys.executable, "-c", code, *argv]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    told = told.replace(' ""', "").strip('"')  # What is left of the longer line is NULs.
    assert told == "llumnix serve a/model --api-key --hf-token --port -O3"


def test_a_run_on_one_host_is_at_no_address_of_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "VLLM_HOST_IP": "192.0.2.2"})
    ray_runtime.settle(local=False)
    assert os.environ["VLLM_HOST_IP"] == "192.0.2.2"
    ray_runtime.settle(local=True)
    assert os.environ["VLLM_HOST_IP"] == "127.0.0.1"


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_cluster_that_lets_in_everybody_is_warned_of(mode: str) -> None:
    code = (
        "from llumnix.cluster import ray_runtime; print(ray_runtime.warning_without_token('h:1'))"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": mode}
    run = [sys.executable, "-c", code]
    told = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert (told == "None\n") is (mode == "token")
    assert ("start it, and llumnix, with RAY_AUTH_MODE=token" in told) is (mode == "disabled")


# -- the logs of Ray's workers


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where Ray's workers on this node log."""
    import ray

    node = SimpleNamespace(get_logs_dir_path=lambda: str(tmp_path))
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    return tmp_path


def test_the_end_of_a_dead_workers_log_is_found_by_its_process(
    monkeypatch: pytest.MonkeyPatch, logs: Path
) -> None:
    monkeypatch.setattr(ray_runtime, "LOG_TAIL_BYTES", 11)
    (logs / "worker-a-7.err").write_text("one\ntwo\nthree\n")
    (logs / "worker-b-7.out").write_bytes(b"out \xff\n")
    (logs / "worker-a-77.err").write_text("another's\n")
    found = ray_runtime.log_about("The worker died, pid=7, ip=127.0.0.1")
    assert found == ["", "two", "three", "out \ufffd"]  # The last bytes of each file.
    assert ray_runtime.log_about("it died") == []
    assert ray_runtime.log_tail(8) == []


def test_a_worker_of_another_node_has_no_log_here(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray._private.worker, "_global_node", None)
    assert ray_runtime.log_tail(os.getpid()) == []


def test_the_cause_is_the_last_error_that_is_no_pointer_to_another() -> None:
    lines = [
        "INFO ValueError is a word",
        "ValueError: the first",
        "torch.OutOfMemoryError: CUDA out of memory.  ",
        "RuntimeError: Engine core initialization failed. See root cause above.",
        "ray.exceptions.RayTaskError: x",
        "bye",
    ]
    assert ray_runtime.root_cause(lines) == "torch.OutOfMemoryError: CUDA out of memory."
    assert ray_runtime.root_cause(["all is well"]) is None


def test_a_log_that_is_kept_elsewhere_is_found_among_rays_too(
    monkeypatch: pytest.MonkeyPatch, logs: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.log"
    kept.write_text("kept\n")
    asked: list[tuple[Path, str]] = []
    monkeypatch.setattr(
        ray_runtime, "keep_own_log", lambda folder, name: (asked.append((folder, name)), kept)[1]
    )
    assert ray_runtime.keep_log("/var/log/mine", "i0") is None
    assert asked == [(Path("/var/log/mine"), "i0")]
    assert ray_runtime.log_tail(os.getpid()) == ["kept"]


def test_a_log_that_cannot_be_kept_is_said_and_stays_with_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(folder: Path, name: str) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ray_runtime, "keep_own_log", full)
    said = ray_runtime.keep_log("/var/log/mine", "i0")
    assert said == f"--log-dir /var/log/mine on {socket.gethostname()}: No space left on device"


# -- a cluster that is joined


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray was asked to join."""
    import ray

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **how: asked.append(how))
    return asked


def test_a_cluster_is_joined_once_its_port_answers(joined: list[dict[str, Any]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        ray_runtime.join(address, logs=True)
    assert joined == [{"address": address, "configure_logging": False, "log_to_driver": True}]
    with pytest.raises(UsageError, match=f"cannot reach Ray at {address}"):
        ray_runtime.join(address, logs=False)
    with pytest.raises(UsageError, match="cannot reach Ray at nowhere"):
        ray_runtime.join("nowhere", logs=False)
    assert len(joined) == 1
    ray_runtime.join("auto", logs=False)  # Ray finds the one of this host.
    assert joined[1]["address"] == "auto"


def test_actors_do_not_step_back_unless_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    env_vars = ray_runtime.actor_options()["runtime_env"]["env_vars"]
    assert env_vars == {"RAY_worker_niceness": "0"}
    monkeypatch.setenv("RAY_worker_niceness", "5")
    env_vars = ray_runtime.actor_options({"B": "2"})["runtime_env"]["env_vars"]
    assert env_vars == {"RAY_worker_niceness": "5", "B": "2"}


def test_a_sigterm_while_it_joins_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def leave(**_: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(ray, "init", leave)
    with pytest.raises(KeyboardInterrupt):
        ray_runtime.join("auto", logs=False)


def test_what_ray_reads_is_set_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own words stay, but for those without which strangers could get in."""
    given = {
        "RAY_USAGE_STATS_ENABLED": "1",
        "RAY_worker_niceness": "5",
        "RAY_AUTH_MODE": "disabled",
    }
    monkeypatch.setattr(os, "environ", dict(given))
    ray_runtime.settle(local=False)
    assert os.environ == given
    ray_runtime.settle(local=True)
    token = os.environ.pop("RAY_AUTH_TOKEN")
    assert len(token) == 64
    assert os.environ == {
        **given,
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "RAY_kill_child_processes_on_worker_exit": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
    }
    monkeypatch.setattr(os, "environ", {})
    ray_runtime.settle(local=False)
    assert os.environ == {"RAY_USAGE_STATS_ENABLED": "0"}
