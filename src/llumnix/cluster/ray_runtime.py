"""Ray, started on this machine or joined.

A Ray that we start is ours alone. It listens on loopback only, wants a token that only our own
processes know, and shows no dashboard. It ends, and its files are removed, when we end.
"""

import contextlib
import os
import re
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import setproctitle

from llumnix.errors import UsageError
from llumnix.observe.own_log import keep_own_log

OBJECT_STORE_BYTES = 80 * 2**20
"""The smallest object store that Ray allows. Only configuration goes through it."""
NICENESS = "RAY_worker_niceness"
"""What Ray adds to the niceness of its workers, 15 by default. An engine would get little of a core
that a process that speaks HTTP wants too."""
CONNECT_TIMEOUT_S = 5.0
LOOPBACK_ADDRESS = "127.0.0.1"
LOG_TAIL_BYTES = 2**18
ERROR_MAX = 600
"""How many characters of one of Ray's errors are passed on."""


def settle(*, local: bool) -> None:
    """Sets the variables that Ray reads as it is imported. vLLM imports Ray, so call it before that
    too. `local`: whether we will start Ray ourselves."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not local:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # "No cluster over several machines": it makes Ray listen on 127.0.0.1 alone.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # vLLM should listen there too. Else it takes the address of the default route.
    os.environ["VLLM_HOST_IP"] = LOOPBACK_ADDRESS
    # A dying actor would kill its children, and one of them removes its shared memory. Ray ends the
    # actor's process group, with vLLM's workers, all the same.
    os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "0")
    # No idle workers: each costs 80 MB and a second of a core, and none is ever used.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_enable_worker_prestart", "0")


def hide_arguments(argv: list[str]) -> None:
    """Hides the values of flags, which may be API keys. `ps` shows them, and Ray keeps them as the
    job's entry point, which everybody on the cluster can read. Call it before Ray starts."""
    command, *others = argv
    words = ["llumnix", command]
    for place, word in enumerate(others):
        if word.startswith("-") or place == 0:  # The model comes first, if there is one.
            words.append(word.partition("=")[0])
    setproctitle.setproctitle(" ".join(words))


def start_local(folder: Path, *, logs: bool) -> None:
    """Starts Ray on this machine, with its files in `folder`. Needs `settle(local=True)` before.
    `logs`: whether to print what the actors log."""
    import ray

    try:
        ray.init(
            # Without it Ray would join what RAY_ADDRESS names.
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(folder),
            _node_ip_address=LOOPBACK_ADDRESS,
            configure_logging=False,
            log_to_driver=logs,
        )
    except SystemExit as leaving:  # Ray's answer to a SIGTERM.
        raise KeyboardInterrupt from leaving
    except (OSError, ValueError, RuntimeError) as error:  # Ray's own errors are RuntimeErrors.
        raise UsageError(
            f"Ray could not be started on this machine ({_one_line(error)}): check that "
            f"{folder.parent} and /dev/shm have room, and `ulimit -n` and `-u`"
        ) from error


def join(address: str, *, logs: bool) -> None:
    """Joins a running cluster; `UsageError` if that fails."""
    try:
        if address != "auto":
            # Ray itself would try for a minute.
            host, _, port = address.rpartition(":")
            with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S):
                pass
        import ray

        ray.init(address=address, configure_logging=False, log_to_driver=logs)
    except SystemExit as leaving:
        raise KeyboardInterrupt from leaving
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(why_not_joined(address, error)) from error


def actor_options(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What Ray is told of each of our actors. `environment`: variables that Ray sets as it starts
    the process."""
    niceness = {NICENESS: os.environ.get(NICENESS, "0")}
    env_vars = niceness | dict(environment or {})
    return {"num_cpus": 0, "max_restarts": 0, "runtime_env": {"env_vars": env_vars}}


def warning_without_token(address: str) -> str | None:
    """What to say of a cluster that was joined and lets in everybody who reaches it. One that wants
    a token lets nobody in who has none, so this process's own setting tells."""
    from ray._raylet import AuthenticationMode, get_authentication_mode

    if get_authentication_mode() != AuthenticationMode.DISABLED:
        return None
    return (
        f"warning: Ray at {address} asks for no token, so whoever reaches it runs programs as you: "
        "start it, and llumnix, with RAY_AUTH_MODE=token"
    )


def why_not_joined(address: str, error: BaseException) -> str:
    """Why a cluster was not joined, and what to do."""
    text = _one_line(error)
    if "ersion mismatch" in text:
        return (
            f"the Ray cluster at {address} runs other versions than this host ({text}): install "
            "the same Ray and Python on all hosts"
        )
    return (
        f"cannot reach Ray at {address} ({text}): start it with `ray start --head`, or leave "
        "--ray-address out to have Ray started here"
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:ERROR_MAX]


def stop() -> None:
    """Leaves the cluster; one that we started ends."""
    import ray

    node = ray._private.worker._global_node
    infos = [] if node is None else [one for some in node.all_processes.values() for one in some]
    agents = [agent for info in infos for agent in _agents(info.process.pid)]
    for info in infos:
        # They ignore SIGTERM (cluster/signals.py), and Ray would wait a second for each.
        info.process.terminate = info.process.kill
    ray.shutdown()
    for agent in agents:
        with contextlib.suppress(psutil.NoSuchProcess):
            agent.kill()


def _agents(daemon: int) -> list[psutil.Process]:
    """Ray's own processes below a daemon. They take seconds to notice that it has ended."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(daemon).children():
            if child.cmdline()[:1] in (["ray::DashboardAgent"], ["ray::RuntimeEnvAgent"]):
                found.append(child)
    return found


def node_address() -> str:
    """This node's address in the cluster."""
    import ray

    return str(ray.util.get_node_ip_address())


def host_name() -> str:
    """Names this node of the cluster and the processes that can be seen on it: those whose ids mean
    the same have the same name."""
    import ray

    return f"{ray.get_runtime_context().get_node_id()} {os.readlink('/proc/self/ns/pid')}"


_ROOT_CAUSE = re.compile(r"\b([A-Za-z_.]*(?:Error|Exception): .+)")
_NOT_A_CAUSE = ("See stack trace", "See root cause", "ray.exceptions", "initialization failed")


def keep_log(folder: str, name: str) -> str | None:
    """Keeps the log of this worker in a folder of the user's. It is found among Ray's all the same
    (`log_tail`). Returns why it cannot be kept there; it stays among Ray's alone then."""
    import ray

    try:
        path = keep_own_log(Path(folder), name)
    except OSError as error:
        return f"--log-dir {folder} on {socket.gethostname()}: {error.strerror or error}"
    node = ray._private.worker._global_node
    if node is not None:
        link = Path(node.get_logs_dir_path()) / f"worker-kept-{os.getpid()}.out"
        with contextlib.suppress(OSError):
            link.symlink_to(path)
    return None


def log_about(error: str) -> list[str]:
    """The last lines of a Ray worker that died. `error` is Ray's message, which names the worker.
    None if it ran on another node."""
    pid = re.search(r"pid=(\d+)", error)
    return [] if pid is None else log_tail(int(pid[1]))


def root_cause(lines: list[str]) -> str | None:
    """The last error in the log of a dead engine. Its exception often says only that a process
    behind it failed; the reason stands in the log that both write to. None if it wrote nothing."""
    found = None
    for line in lines:
        match = _ROOT_CAUSE.search(line)
        if match is not None and not any(word in line for word in _NOT_A_CAUSE):
            found = match[1].strip()
    return found


def log_tail(pid: int) -> list[str]:
    """The last lines that a Ray worker on this node wrote; none if it ran on another node."""
    import ray

    node = ray._private.worker._global_node
    if node is None:
        return []
    lines: list[str] = []
    for log in sorted(Path(node.get_logs_dir_path()).glob(f"worker-*-{pid}.*")):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            lines += file.read().decode(errors="replace").splitlines()
    return lines
