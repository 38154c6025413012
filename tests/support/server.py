"""`llumnix serve` as a process of its own, driven as a user would: HTTP, signals, exit status."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT_S = 240
FRONTENDS_VARIABLE = "LLUMNIX_TEST_API_SERVERS"
"""So many frontends every server has that a test starts, unless the test says how many."""
STOP_TIMEOUT_S = 60


def real_time() -> None:
    """Lets the calling thread go before the servers where it may. Two engines that poll for their
    workers keep two cores busy, and the kernel leaves an ordinary observer waiting for up to a
    second, in which a whole stream comes and goes."""
    with contextlib.suppress(PermissionError):
        # Without RESET_ON_FORK the servers would inherit it.
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """One running `llumnix serve`. In a session of its own, so that a signal to its process group
    is what Ctrl-C in a terminal would be."""

    def __init__(
        self, model: str | None, *flags: str, log: Path, before: Sequence[str] = (), **env: str
    ) -> None:
        """`before`: a command that runs it."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = log
        words = [*before, sys.executable, "-m", "llumnix", "serve"]
        words += ([model] if model else []) + ["--port", str(self.port), *flags]
        frontends = os.environ.get(FRONTENDS_VARIABLE)
        if frontends and "--api-server-count" not in flags:
            words += ["--api-server-count", frontends]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
        with log.open("w") as out:
            self.process = subprocess.Popen(
                words,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        self.http = httpx.Client(base_url=self.url, timeout=120)
        self.key: str | None = None  # that of the streams of support/streaming.py

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_until_serving(self) -> "Server":
        deadline = time.monotonic() + START_TIMEOUT_S
        while "; try" not in self.log:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"llumnix did not come up:\n{self.log[-4000:]}")
            time.sleep(0.1)
        return self

    def instances(self) -> dict[str, dict[str, Any]]:
        rows = self.http.get("/llumnix/v1/instances").json()["instances"]
        return {row["id"]: row for row in rows}

    def requests(self) -> list[dict[str, Any]]:
        """Those of all frontends."""
        return all_requests(self.http.get)

    def complete(self, prompt: str = "hello", max_tokens: int = 8, **more: Any) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
        body.setdefault("ignore_eos", True)
        return self.http.post("/v1/completions", json=body)

    def signal(self, number: int = signal.SIGTERM, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.process.pid, number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.signal()
        self.http.close()
        return self.wait()

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def descendants(self) -> set[int]:
        """All processes below this one, by id."""
        return descendants(self.process.pid)

    def controllers(self) -> list[int]:
        """The processes of its controller; there is one, but for moments."""
        return [p for p in self.descendants() if title(p).startswith("ray::Controller")]


def all_requests(get: Callable[[str], httpx.Response]) -> list[dict[str, Any]]:
    """The rows of all requests. `get` asks a path of the server."""
    return _all_rows(get, "requests")


def all_migrations(get: Callable[[str], httpx.Response]) -> list[dict[str, Any]]:
    """The rows of the last migrations, the oldest first."""
    return _all_rows(get, "migrations")


def _all_rows(get: Callable[[str], httpx.Response], what: str) -> list[dict[str, Any]]:
    """Once no frontend was too busy to say its own."""

    def asked() -> tuple[list[dict[str, Any]]] | None:
        answer = get(f"/llumnix/v1/{what}").json()
        return None if answer["incomplete"] else (answer[what],)

    (rows,) = eventually(asked, 20, "all frontends say theirs")
    return rows  # type: ignore[no-any-return]


def descendants(root: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
    found, todo = set(), [root]
    while todo:
        parent = todo.pop()
        children = [pid for pid, p in parents.items() if p == parent and pid not in found]
        found.update(children)
        todo += children
    return found


def title(pid: int) -> str:
    """How a process calls itself; empty if it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    try:
        return re.search(r"State:\s+[ZX]", Path(f"/proc/{pid}/status").read_text()) is None
    except OSError:
        return False


def unused_memory() -> set[str]:
    """Files of shared memory that no process has: what a dead one left. Other servers, whose files
    come and go meanwhile, have theirs."""
    folder = "/dev/shm/"
    names = {folder + name for name in os.listdir(folder)}
    used: set[str] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                lines = (entry / "maps").read_text().splitlines()
                used |= {line.rpartition(" ")[2] for line in lines if folder in line}
                used |= {os.readlink(fd) for fd in (entry / "fd").iterdir()}
    return names - used


def eventually(true: Callable[[], Any], timeout_s: float = 60, what: str = "") -> Any:
    """Waits until `true()` holds, and returns what it gave."""
    deadline = time.monotonic() + timeout_s
    while True:
        if (value := true()) or time.monotonic() > deadline:
            assert value, f"not within {timeout_s} s: {what}"
            return value
        time.sleep(0.05)
