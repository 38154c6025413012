"""Figures out of many values: what the simulator, its report and the benchmarks of real engines
share, so that their numbers mean the same."""

import math
import statistics
from collections.abc import Iterable, Sequence

# The t distribution's 97.5 % points for 1 to 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def t_975(freedom: int) -> float:
    """The 97.5 % point of the t distribution, to within 0.001."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.95996 + 2.3723 / freedom + 2.82 / freedom**2


def half_interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % t-interval of their mean; None of fewer than two."""
    if len(values) < 2:
        return None
    return t_975(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def format_mean(values: Iterable[float | None], factor: float = 1.0, nothing: str = "–") -> str:
    """Their mean, with its interval if there are several; None counts as not measured."""
    known = [v * factor for v in values if v is not None]
    if not known:
        return nothing
    half = half_interval(known)
    mean = statistics.fmean(known)
    return f"{mean:.3g}" if half is None else f"{mean:.3g} ± {half:.2g}"


def format_ratio(
    ours: Sequence[float | None], reference: Sequence[float | None], nothing: str = "–"
) -> str:
    """What one is of the other, paired: the geometric mean, with the t-interval of the log ratio.
    A pair of which one is 0 or not measured has no ratio."""
    pairs = list(zip(ours, reference, strict=True))
    logs = [math.log(a / b) for a, b in pairs if a and b]
    if len(logs) < len(pairs) or not logs:
        return nothing
    middle, half = statistics.fmean(logs), half_interval(logs)
    text = f"{math.exp(middle):.2f}"
    if half is None:
        return text
    return f"{text} ({math.exp(middle - half):.2f} to {math.exp(middle + half):.2f})"


def quantile(values: Iterable[float], q: float) -> float:
    """The q-quantile (0 to 1), interpolated; of one value or more."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, P99 and the highest; all None of nothing."""
    if not values:
        return {"mean": None, "p50": None, "p99": None, "max": None}
    return {
        "mean": statistics.fmean(values),
        "p50": quantile(values, 0.5),
        "p99": quantile(values, 0.99),
        "max": max(values),
    }


def spread_and_tail(values: Sequence[float]) -> dict[str, float | None]:
    """`spread`, and `worst1`: the mean of the highest 1 %, at least of one. Unlike a percentile it
    says how bad the tail is."""
    worst = sorted(values)[-max(1, round(len(values) * 0.01)) :]
    return spread(values) | {"worst1": statistics.fmean(worst) if worst else None}


def satisfied(heads: Iterable[int], free: int) -> int:
    """How many tokens of free memory would satisfy heads of queues if it were in one place: the
    heads in ascending order while they fit."""
    served = 0
    for head in sorted(heads):
        if served + head > free:
            break
        served += head
    return served
