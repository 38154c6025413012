"""`llumnix profile`: times a real engine's steps and fits a profile to them."""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llumnix.errors import UsageError
from llumnix.sim.model.profile import Profile, save_profile


def profile(argv: list[str]) -> int:
    """Runs the command. Returns 0 once the profile is written; raises UsageError."""
    parser = argparse.ArgumentParser(
        prog="llumnix profile",
        usage="llumnix profile [MODEL] [any engine flag of vLLM] --out FILE [--repeats N] "
        "[--link-bytes-s BYTES]",
        description="Times the steps of one real engine over batch sizes and lengths, and fits a "
        "profile for `llumnix simulate --profile FILE`.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the profile")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")
    parser.add_argument(
        "--link-bytes-s",
        type=float,
        default=3e9,
        help="of an instance's link for migrations: not measured here (default: %(default)g)",
    )
    args, rest = parser.parse_known_args(argv)
    if not args.out.absolute().parent.is_dir() or args.repeats < 1:
        raise UsageError("--out wants a file in a folder that exists, --repeats 1 or more")
    from llumnix.engine.profiler import engine_config, measure

    config, model = engine_config(rest, "llumnix profile")
    measured = measure(config, model, args.repeats, lambda line: print(line, file=sys.stderr))
    fitted, lines = fit(measured.samples)
    name = Path(model).name
    text = (
        f"{name} on {measured.device}: {len(measured.samples)} measurements of `llumnix profile`, "
        "each the median of its repeats. The link is not measured."
    )
    made = Profile(
        name=args.out.stem,
        text=text,
        kv_tokens=measured.kv_tokens,
        block_tokens=measured.block_tokens,
        kv_token_bytes=measured.kv_token_bytes,
        start_s=round(measured.start_s, 1),
        link_bytes_s=args.link_bytes_s,
        **fitted,
    )
    save_profile(made, args.out)
    print("\n".join(lines))
    print(f"{args.out}: a profile of {text}")
    return 0


def fit(samples: Sequence[Any]) -> tuple[dict[str, Any], list[str]]:
    """The costs that come nearest to the samples of engine/profiler.py, by relative error.

    The costs of decoding are fitted first, then those of prompts, given a step's own time. Returns
    fields of `Profile`, `error` included, and a line on each sample. Raises UsageError if there are
    too few."""
    import numpy as np

    decodes = [s for s in samples if not s.steps[0].prompts and s.seconds > 0]
    prompts = [s for s in samples if s.steps[0].prompts]
    if len(decodes) < 3 or len(prompts) < 3:
        raise UsageError(
            "too few measurements: give the engine more KV memory (--kv-cache-memory-bytes) or a "
            "longer --max-model-len"
        )
    rows = np.array([[1.0, s.steps[0].decodes, s.steps[0].context] for s in decodes])
    seconds = np.array([s.seconds for s in decodes])
    step_s, request_s, context_s = _least_squares(rows, seconds, seconds)
    costs = {"step_s": step_s, "request_s": request_s, "context_s": context_s}
    costs |= _fit_prompts(prompts, step_s)
    fitted = Profile(name="", text="", kv_tokens=1, kv_token_bytes=1, **costs)
    errors: dict[str, list[float]] = {"decode": [], "prefill": []}
    lines = []
    for sample in (*decodes, *prompts):
        expected = sum(fitted.step(s.decodes, s.context, s.prompts) for s in sample.steps)
        error = expected / sample.seconds - 1
        kind = "prefill" if sample.steps[0].prompts else "decode"
        errors[kind].append(abs(error))
        lines.append(
            f"{kind:8} {_described(sample):34} {sample.seconds * 1e3:9.2f} ms, "
            f"fitted {expected * 1e3:9.2f} ms ({error:+.1%})"
        )
    rounded = {name: float(f"{value:.6g}") for name, value in costs.items()}
    summary = {f"{k}_mean": round(float(np.mean(v)), 4) for k, v in errors.items()}
    summary |= {f"{k}_max": round(max(v), 4) for k, v in errors.items()}
    return {**rounded, "error": summary}, lines


def _fit_prompts(samples: Sequence[Any], step_s: float) -> dict[str, float]:
    """The costs of prompts, given a step's own time, with the smallest mean relative error. Of two
    fits that are about as good it is the simpler one. Raises UsageError if tokens cost nothing."""
    # A sample is c steps with prompts. Its prompts have x = sum of n tokens, and y = sum of
    # n (b + n / 2) pairs of a token and one before it, as n of them follow b others. Then
    #     computed = max(0, x prompt_s + y prompt_context_s - c overlap_s)
    #     seconds  = max(c step_s + computed, c prompts_least_s)
    # Given overlap_s and prompts_least_s this is linear in the two costs wherever neither max
    # holds. So both are tried: overlap_s in 21 parts of step_s, because a prompt can hide behind
    # no more than a step, and as prompts_least_s each time that was measured of a single step.
    import numpy as np

    counts = np.array([len(s.steps) for s in samples], dtype=float)
    pairs = np.array(
        [
            [
                sum(n for step in s.steps for n, _ in step.prompts),
                sum(n * (b + n / 2) for step in s.steps for n, b in step.prompts),
            ]
            for s in samples
        ]
    )
    seconds = np.array([s.seconds for s in samples])
    best, lowest = [0.0] * 4, np.inf
    leasts = (0.0, *sorted(seconds[counts == 1]))
    for hidden, least in itertools.product(np.linspace(0.0, step_s, 21), leasts):
        linear = seconds > 1.02 * counts * max(step_s, least)  # Elsewhere costs do not show.
        costs = [0.0, 0.0]
        if linear.sum() >= 2:
            values = seconds - counts * (step_s - hidden)
            costs = _least_squares(pairs[linear], values[linear], seconds[linear])
        computed = np.maximum(0.0, pairs @ np.array(costs) - counts * hidden)
        expected = np.maximum(counts * step_s + computed, counts * least)
        error = float(np.mean(np.abs(expected / seconds - 1)))
        if error < lowest - 1e-4:
            best, lowest = [*costs, float(hidden), float(least)], error
    if not any(best[:2]):
        raise UsageError(
            "all prompts took about as long, so what their tokens cost is unknown: give the engine "
            "a longer --max-model-len (with the KV memory for it)"
        )
    names = ("prompt_s", "prompt_context_s", "overlap_s", "prompts_least_s")
    return dict(zip(names, best, strict=True))


def _described(sample: Any) -> str:
    step = sample.steps[0]
    if step.prompts:
        total = sum(n for s in sample.steps for n, _ in s.prompts)
        return f"{total} tokens in {len(sample.steps)} steps"
    return f"{step.decodes} requests, {step.context} of context"


def _least_squares(rows: Any, values: Any, scale: Any) -> list[float]:
    """Coefficients, none below 0, by which `rows` come nearest to `values`: by least squares of the
    errors in units of `scale`. The most negative one is set to 0 until none is left."""
    import numpy as np

    weights = 1.0 / scale
    free = list(range(rows.shape[1]))
    coefficients = np.zeros(rows.shape[1])
    while free:
        part, *_ = np.linalg.lstsq(rows[:, free] * weights[:, None], values * weights, rcond=None)
        if (part >= 0).all():
            coefficients[free] = part
            break
        free.pop(int(np.argmin(part)))
    return [float(x) for x in coefficients]
