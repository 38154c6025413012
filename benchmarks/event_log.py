"""Whether the event log delays the engine that writes it, and how fast it grows.

`steps`: one vLLM engine decodes. Blocks of steps take turns: without a log, with one on a healthy
disk, on a full one (a small tmpfs, which root alone can mount), on a slow one (a pipe that another
process empties at 20 kB a second). With a log, 20 lines are written at each step, as many as a move
has in all. A block's figure is the median of its steps, a variant's the least of its blocks.

`idle`: a deployment of two instances serves nobody. What its log has grown by is extrapolated to a
day.

    python benchmarks/observe.py eventlog [--part steps|idle] [--rounds 10] [--seconds 60]
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import markdown, serve, write_result
from llumnix.config import LogPlace
from llumnix.core.types import MigrationId
from llumnix.demo import DEMO_MODEL
from llumnix.observe.event_log import EventLog

BATCH, CONTEXT = 4, 64
BLOCK_STEPS = 25
LINES_A_STEP = 20
FULL_DISK_BYTES = 64 * 1024
SLOW_BYTES_PER_S = 20_000
DRAIN = """
import os, sys, time
pipe, rate = os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2])
while os.read(pipe, rate // 10):
    time.sleep(0.1)
"""


def main(argv: list[str]) -> None:
    """Measures, prints a table, writes the raw figures if a file is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["steps", "idle"], action="append")
    parser.add_argument("--model", nargs=1, default=[], help="default: the demo model")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0, help="of idling")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    parts, rows = args.part or ["steps", "idle"], []
    with tempfile.TemporaryDirectory() as folder:
        if "steps" in parts:
            rows += steps(Path(folder), args.rounds, args.model)
            head = ["disk", "step, ms", "of none", "longest call, ms", "lines", "dropped"]
            print(markdown(head, [[str(v) for v in list(r.values())[1:]] for r in rows]))
        if "idle" in parts:
            rows.append(idle(Path(folder), args.seconds))
            print(f"two idle instances write {rows[-1]['mb_a_day']} MB a day")
    if args.out:
        write_result(args.out, rows)


def steps(folder: Path, rounds: int, model: list[str]) -> list[dict[str, Any]]:
    """A row for each disk."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    from llumnix.engine import profiler

    flags = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**30)]
    config, _ = profiler.engine_config([*model, *flags], "observe")
    core = EngineCore(config, Executor.get_class(config), log_stats=False)
    try:
        with contextlib.ExitStack() as undo:
            logs = {"none": EventLog(None, who="engine 0")}
            for disk, path in disks(folder, undo).items():
                logs[disk] = EventLog(LogPlace(path=path), who="engine 0")
                undo.callback(logs[disk].close)
            runner = profiler._Runner(core, config)
            for number in range(BATCH):
                runner._add(CONTEXT + number, 1800, runner._dice)
            blocks: dict[str, list[float]] = {disk: [] for disk in logs}
            longest: dict[str, float] = dict.fromkeys(logs, 0.0)
            counts: dict[str, int] = {}
            for round_ in range(rounds + 1):
                # Beginning with another one each time, as the batch's context grows.
                order = [*logs, *logs][round_ % len(logs) :][: len(logs)]
                for disk, log in ((disk, logs[disk]) for disk in order):
                    took, call_s = block(lambda: runner._step(counts), log)
                    if round_:  # The first warms up.
                        blocks[disk].append(took)
                        longest[disk] = max(longest[disk], call_s)
            assert max(counts.values()) < 1800, "the requests have ended"
            lines = (rounds + 1) * BLOCK_STEPS * LINES_A_STEP
            return [
                {
                    "part": "steps",
                    "disk": disk,
                    "step_ms": round(min(blocks[disk]) * 1e3, 3),
                    "ratio": round(min(blocks[disk]) / min(blocks["none"]), 4),
                    "longest_call_ms": round(longest[disk] * 1e3, 2),
                    "lines": lines if disk != "none" else 0,
                    "dropped": log.dropped,
                }
                for disk, log in logs.items()
            ]
    finally:
        core.shutdown()


def block(step: Any, log: EventLog) -> tuple[float, float]:
    """Makes steps, each with some lines for the log. Their median duration, and that of the
    longest call of the log, in seconds."""
    times, longest = [], 0.0
    for number in range(BLOCK_STEPS):
        began = time.perf_counter()
        for line in range(LINES_A_STEP):
            called = time.perf_counter()
            name = MigrationId(f"m{number}-{line}")
            log.step("source", name, "staged", "copying", "send what is new")
            longest = max(longest, time.perf_counter() - called)
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times), longest


def disks(folder: Path, undo: contextlib.ExitStack) -> dict[str, str]:
    """Where a log may be written, by what kind of disk it is."""
    found = {"healthy": str(folder / "log")}
    full = folder / "full"
    full.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={FULL_DISK_BYTES}", "tmpfs", str(full)]
    if subprocess.run(mount, check=False, capture_output=True).returncode == 0:
        undo.callback(subprocess.run, ["umount", "-l", str(full)], check=True)
        found["full"] = str(full / "log")
    else:
        print("a full disk is not measured: only root can mount one")
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    drain = subprocess.Popen([sys.executable, "-c", DRAIN, str(pipe), str(SLOW_BYTES_PER_S)])
    undo.callback(drain.wait)
    undo.callback(drain.kill)
    found["slow"] = str(pipe)
    return found


def idle(folder: Path, seconds: float) -> dict[str, Any]:
    """How fast the log of an idle deployment grows."""
    log = folder / "idle"
    flags = ["--instances", "2", "--event-log", str(log), "--max-model-len", "256"]
    flags += ["--kv-cache-memory-bytes", str(2**28)]
    server = serve("llumnix", DEMO_MODEL, "demo", flags, folder / "server.log")
    try:
        asyncio.run(server.wait_until_up())
        time.sleep(5.0)
        before = log.stat().st_size
        time.sleep(seconds)
        grown = log.stat().st_size - before
    finally:
        server.stop()
    return {"part": "idle", "seconds": seconds, "mb_a_day": round(grown / seconds * 0.0864, 2)}
