"""How many instances it takes to keep a bound: `llumnix simulate --capacity-for`."""

from dataclasses import replace

from llumnix.errors import UsageError
from llumnix.sim.simulate import Run, Spec, run_one


def smallest_fleet(spec: Spec, bound: str, most: int) -> tuple[int, Run]:
    """The fewest instances with which a run keeps a bound such as `ttft_p99<2s` and no request
    fails, and that run. Raises UsageError if `most` do not either. Doubles until it holds, then
    halves the gap; that more instances make it worse is chance."""
    (figure, part), limit = parse_bound(bound)

    def value_of(run: Run) -> float | None:
        value: float | None = run["metrics"][figure][part]
        return value

    def holds(count: int) -> tuple[bool, Run]:
        run = run_one(replace(spec, instances=count))
        value = value_of(run)
        done = run["metrics"]["requests_failed"] == 0
        return done and value is not None and value < limit, run

    low, high = 0, 1
    kept, found = holds(high)
    while not kept:
        if high >= most:
            value, failed = value_of(found), found["metrics"]["requests_failed"]
            raise UsageError(
                f"{bound} does not hold with {most} instances either: {figure} {part} is "
                f"{'not measured' if value is None else f'{value:.3g}'}, and {failed:,} of "
                f"{spec.requests:,} requests failed; loosen the bound, or lower --rate"
            )
        low, high = high, min(most, high * 2)
        kept, found = holds(high)
    while high - low > 1:
        middle = (low + high) // 2
        kept, run = holds(middle)
        if kept:
            high, found = middle, run
        else:
            low = middle
    return high, found


def parse_bound(text: str) -> tuple[tuple[str, str], float]:
    """`ttft_p99<2s` or `tpot_mean<80ms` as a figure's place and seconds."""
    name, sign, value = text.replace(" ", "").partition("<")
    figure, _, part = name.rpartition("_")
    number, unit = value.removesuffix("s"), 1.0
    if number.endswith("m"):
        number, unit = number[:-1], 1e-3
    try:
        limit = float(number) * unit
    except ValueError:
        limit = 0.0
    if not sign or figure not in ("ttft", "tpot", "e2e") or part not in ("mean", "p50", "p99"):
        limit = 0.0
    if limit <= 0:
        raise UsageError(
            f"--capacity-for {text!r}: write a bound like ttft_p99<2s or tpot_mean<80ms (ttft, "
            "tpot or e2e; mean, p50 or p99)"
        )
    return (f"{figure}_s", part), limit
