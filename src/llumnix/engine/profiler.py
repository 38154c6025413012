"""Times the steps of one real engine: what `llumnix profile` fits a profile to.

The engine core runs in this process, its workers as they always do. A scenario adds requests of
random tokens, whose batches are known beforehand. It measures the time between outputs, which is
that of a step, with and without asynchronous scheduling.

vLLM internals relied on here (tests/engine/test_profiler.py fails when one changes):
`EngineCore(config, executor_class, log_stats)`, its `step_fn()`, which returns the outputs by
client, `preprocess_add_request`, `add_request`, `abort_requests` and `shutdown`;
`InputProcessor.process_inputs`.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm import platforms
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.executor import Executor

from llumnix.demo import is_demo, prepare_demo_model
from llumnix.engine.readings import token_bytes
from llumnix.flag_sources import suit_device

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (32, 256, 1024, 4096, 16384)
PROMPTS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DECODED = 14
"""Steps of a scenario of decoding, once all its prompts are computed."""
SETTLED = 4
"""The first of them, which are not counted."""
FILL = 0.9
"""The share of the KV memory that a scenario may take."""
FIRST_TOKEN, LAST_TOKEN = 300, 30000
STEPS_MAX = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step computes."""

    prompts: tuple[tuple[int, int], ...] = ()  # of each: tokens, and tokens before them
    decodes: int = 0  # requests that decode
    context: int = 0  # tokens of KV of these, in all


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Steps one after another, and how long they took."""

    steps: tuple[Step, ...]
    seconds: float  # the median of some runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One engine."""

    model: str
    device: str
    kv_tokens: int
    block_tokens: int
    kv_token_bytes: int
    start_s: float  # from nothing to ready
    samples: list[Sample]


def engine_config(argv: list[str], prog: str) -> tuple[Any, str]:
    """vLLM's configuration from its own flags (`[MODEL] [any engine flag]`), and the model. The
    engine is as `llumnix serve` has it."""
    parser = FlexibleArgumentParser(prog=prog)
    parser.add_argument("model_tag", nargs="?", metavar="MODEL")
    AsyncEngineArgs.add_cli_args(parser)
    args, defaults = parser.parse_args(argv), parser.parse_args([])
    args.model = args.model_tag or args.model
    demo = is_demo(args.model, defaults.model)
    suit_device(platforms.current_platform, args, defaults, argv, demo=demo)
    if demo:
        args.model = str(prepare_demo_model(print))
    return AsyncEngineArgs.from_cli_args(args).create_engine_config(
        UsageContext.ENGINE_CONTEXT
    ), args.model


def measure(config: Any, model: str, repeats: int, say: Callable[[str], None]) -> Measured:
    """Starts the engine, times its steps, stops it."""
    from vllm.platforms import current_platform

    began = time.monotonic()
    core = EngineCore(config, Executor.get_class(config), log_stats=False)
    start_s = time.monotonic() - began
    try:
        pool = core.scheduler.kv_cache_manager.block_pool
        block = int(core.scheduler.block_size)
        runner = _Runner(core, config)
        kv_tokens = (pool.num_gpu_blocks - 1) * block
        samples = []
        for name, scenario in _scenarios(config, kv_tokens):
            found = [scenario(runner) for _ in range(repeats + 1)][1:]  # The first warms up.
            seconds = statistics.median(seconds for _, seconds in found)
            samples.append(Sample(steps=found[0][0], seconds=seconds))
            say(f"{name}: {seconds * 1e3:.2f} ms")
        return Measured(
            model=model,
            device=current_platform.get_device_name(),
            kv_tokens=kv_tokens,
            block_tokens=block,
            kv_token_bytes=token_bytes(core.scheduler),
            start_s=start_s,
            samples=samples,
        )
    finally:
        core.shutdown()


Scenario = Callable[["_Runner"], tuple[tuple[Step, ...], float]]


def _scenarios(config: Any, kv_tokens: int) -> Iterator[tuple[str, Scenario]]:
    scheduler = config.scheduler_config
    room = int(kv_tokens * FILL)
    most = config.model_config.max_model_len - 1
    budget = scheduler.max_num_batched_tokens
    for tokens in PROMPTS:
        if tokens <= min(room, most):
            yield f"prompt of {tokens}", lambda r, n=tokens: r.prompt(n, budget)
    for context in CONTEXTS:
        for batch in BATCHES:
            if batch > scheduler.max_num_seqs or batch >= budget:
                continue
            # The first decodes while the prompts of the last are computed.
            outputs = DECODED + math.ceil(batch * context / (budget - batch))
            if batch * (context + outputs) <= room and context + outputs <= most:
                yield (
                    f"{batch} decoding after {context}",
                    lambda r, b=batch, c=context, n=outputs: r.decode(b, c, n),
                )


class _Runner:
    """Brings requests to the engine and makes its steps."""

    def __init__(self, core: EngineCore, config: Any) -> None:
        self._core = core
        self._inputs = InputProcessor(config)
        self._dice = random.Random(0)
        self._last = min(LAST_TOKEN, config.model_config.get_vocab_size() - 1)
        self._count = 0

    def prompt(self, tokens: int, budget: int) -> tuple[tuple[Step, ...], float]:
        """One prompt, to its first token."""
        self._add(tokens, 1, self._dice)
        began = time.perf_counter()
        self._until(lambda counts: len(counts) == 1)
        chunks = [(min(budget, tokens - b), b) for b in range(0, tokens, budget)]
        seconds = time.perf_counter() - began
        self._to_the_end()
        return tuple(Step(prompts=(chunk,)) for chunk in chunks), seconds

    def decode(self, batch: int, context: int, outputs: int) -> tuple[tuple[Step, ...], float]:
        """A batch that only decodes, with `outputs` tokens each at the most: the median of its
        steps. A repetition has the same prompts, so a prefix cache spares it computing them."""
        dice = random.Random(f"{batch} {context}")
        made = [self._add(context, outputs, dice) for _ in range(batch)]
        times: list[float] = []
        held: list[int] = []
        counts: dict[str, int] = {}
        last = time.perf_counter()
        for _ in range(STEPS_MAX):
            if not self._step(counts):
                continue
            now = time.perf_counter()
            if len(counts) == batch and min(counts.values()) > SETTLED:
                times.append(now - last)
                held.append(batch * context + sum(counts.values()))
            last = now
            if len(times) == DECODED - SETTLED or max(counts.values()) >= outputs:
                break
        self._core.abort_requests(made)
        self._to_the_end()
        step = Step(decodes=batch, context=int(statistics.median(held)) if held else 0)
        return (step,), statistics.median(times) if times else 0.0

    def _add(self, tokens: int, outputs: int, dice: random.Random) -> str:
        self._count += 1
        prompt = [dice.randrange(FIRST_TOKEN, self._last) for _ in range(tokens)]
        made = self._inputs.process_inputs(
            f"profile-{self._count}",
            {"prompt_token_ids": prompt},
            SamplingParams(max_tokens=outputs, ignore_eos=True, temperature=0.0),
            ("generate",),
        )
        made.request_id = f"profile-{self._count}"
        self._core.add_request(*self._core.preprocess_add_request(made))
        return made.request_id

    def _step(self, counts: dict[str, int]) -> bool:
        """Makes a step; counts the tokens that came of it. Whether any did."""
        outputs, _ = self._core.step_fn()
        some = False
        for of_client in (outputs or {}).values():
            for output in of_client.outputs:
                counts[output.request_id] = counts.get(output.request_id, 0) + len(
                    output.new_token_ids
                )
                some = True
        return some

    def _until(self, holds: Callable[[dict[str, int]], bool]) -> None:
        counts: dict[str, int] = {}
        for _ in range(STEPS_MAX):
            self._step(counts)
            if holds(counts):
                return

    def _to_the_end(self) -> None:
        for _ in range(STEPS_MAX):
            if not self._core.scheduler.has_requests():
                return
            self._core.step_fn()
