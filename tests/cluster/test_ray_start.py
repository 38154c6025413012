"""Ray is started as ours, and what it refuses is one line."""

import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

ray = pytest.importorskip("ray")

from llumnix.cluster import ray_runtime  # noqa: E402
from llumnix.errors import UsageError  # noqa: E402
from support.server import alive, eventually  # noqa: E402


def test_a_ray_of_ours_is_no_other_whatever_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray joins what RAY_ADDRESS names, unless it is told otherwise."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **given: seen.update(given))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    ray_runtime.start_local(tmp_path, logs=False)
    assert seen["address"] == "local"
    from ray._private.services import canonicalize_bootstrap_address

    assert canonicalize_bootstrap_address("local") is None


@pytest.mark.parametrize(
    "error", [OSError("No space\nleft"), RuntimeError("x\ny"), ValueError("bad"), OSError()]
)
def test_a_ray_that_does_not_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UsageError, match="Ray could not be started") as refused:
        ray_runtime.start_local(tmp_path / "ray", logs=False)
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match="cannot reach Ray at auto"):
        ray_runtime.join("auto", logs=False)


def test_a_sigterm_while_it_starts_is_an_interruption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray puts a handler of its own, which exits."""

    def init(**_: Any) -> None:
        raise SystemExit(15)

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KeyboardInterrupt):
        ray_runtime.start_local(tmp_path, logs=False)
    with pytest.raises(KeyboardInterrupt):
        ray_runtime.join("auto", logs=False)


def test_a_cluster_of_other_versions_is_not_called_unreachable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.11.7\n"
            "This process on node 127.0.0.1 was started with:\n    Ray: 2.60.0\n"
        )

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UsageError, match=r"other versions than this host .*2\.59\.0") as no:
        ray_runtime.join("auto", logs=False)
    assert "cannot reach" not in str(no.value)


DAEMON = """
bash -c 'exec -a ray::DashboardAgent sleep 60' &
bash -c 'exec -a ray::Controller sleep 60' &
echo $!
wait
"""


def test_rays_processes_and_their_agents_are_killed_and_its_workers_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM is blocked in all of them, and the agents would notice later only."""
    with subprocess.Popen(
        ["bash", "-c", DAEMON], stdout=subprocess.PIPE, preexec_fn=_deaf
    ) as daemon:
        assert daemon.stdout is not None
        worker = psutil.Process(int(daemon.stdout.readline()))
        below = psutil.Process(daemon.pid)
        eventually(lambda: all(_name(child).startswith("ray::") for child in below.children()), 10)
        (agent,) = [c for c in below.children() if c != worker]
        node = SimpleNamespace(all_processes={"raylet": [SimpleNamespace(process=daemon)]})
        monkeypatch.setattr(ray._private.worker, "_global_node", node)
        monkeypatch.setattr(ray, "shutdown", lambda: daemon.terminate())
        ray_runtime.stop()
        assert daemon.wait() == -signal.SIGKILL
        eventually(lambda: not alive(agent.pid), 10)
        assert alive(worker.pid)
        worker.kill()


def _name(process: psutil.Process) -> str:
    """Its command line's first word; none while it is being started."""
    return next(iter(process.cmdline()), "")


def _deaf() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
