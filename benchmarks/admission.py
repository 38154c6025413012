"""What llumnix's queue costs an engine's thread in a step, by its rules: vLLM's own scheduler with
many running and waiting requests, and no model. Needs no GPU.

    python benchmarks/admission.py [--running 256] [--waiting 1000] [--steps 600] [--out FILE]

Each step is timed from before it is scheduled to the last question of who starts, and what the
rules learn of requests that ended in it. `plain`: our queue without rules; what the others take
beyond it is the rules' cost. A fifth of the steps end a request, so that another starts.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, percentile, write_result
from llumnix.core.priorities import Priorities
from llumnix.core.queue_rules import PLAIN, QueueRules
from llumnix.core.scheduling.presets import queue_rules_of
from llumnix.core.settings import PrioritySettings, SchedulerSettings

sys.path.insert(0, str(ROOT / "tests"))

VARIANTS = {
    "plain": PLAIN,
    "llumnix": queue_rules_of(SchedulerSettings()),
    "scls": queue_rules_of(SchedulerSettings(policy="scls")),
}


class Timed:
    """Calls of the queue's rules in one step, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, call: Any) -> Any:
        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def measure(model: Path, rules: QueueRules, running: int, waiting: int, steps: int) -> list[float]:
    """Seconds of each step, once so many run and wait."""
    from llumnix.engine.queueing import Queueing
    from support.no_model import BLOCK, add, engine_core

    dice = random.Random("admission")
    # Memory for the running ones and a little more, so that the queue is blocked mostly.
    core: Any = engine_core(
        model, blocks=running * 14, max_model_len=2048, max_num_seqs=2 * running,
        max_num_batched_tokens=8192, enable_prefix_caching=False,
    )  # fmt: skip
    scheduler = core.scheduler
    queueing = Queueing(scheduler, Priorities(PrioritySettings()), rules=rules)
    timed, count, found, here = Timed(), 0, [], {}
    scheduler.waiting.peek_request = timed(scheduler.waiting.peek_request)
    ended = timed(queueing.ended)

    def come() -> None:
        nonlocal count
        count += 1
        prompt, name = dice.randrange(3 * BLOCK, 7 * BLOCK), f"r{count}"
        here[name] = add(core, name, [7] * prompt, dice.randrange(200, 1200), arrival_time=count)

    for _ in range(waiting):
        come()
    for number in range(3 * running + steps):
        timed.seconds = 0.0
        timed(queueing.before_step)()
        core.step_fn()
        while len(scheduler.waiting) < waiting:
            come()
        if number % 5 == 0:
            core.abort_requests([scheduler.running[0].request_id])
        for name in scheduler.finished_req_ids:
            ended(here.pop(name))
        if number >= 3 * running:
            found.append(timed.seconds)
    print(f"{len(scheduler.running)} run, {len(scheduler.waiting)} wait", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from support.tiny_model import make_tiny_model

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "tiny")
        for name, rules in VARIANTS.items():
            seconds = measure(model, rules, args.running, args.waiting, args.steps)
            row = {"rules": name, "running": args.running, "waiting": args.waiting}
            for title, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
                row[f"step_us_{title}"] = round(percentile(seconds, share) * 1e6, 1)
            row["step_us_mean"] = round(sum(seconds) / len(seconds) * 1e6, 1)
            rows.append(row)
            print(row, flush=True)
    if args.out is not None:
        write_result(args.out, rows)


if __name__ == "__main__":
    main()
