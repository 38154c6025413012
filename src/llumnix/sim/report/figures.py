"""The report's plots that compare policies, as plotly figures in plain dicts.

Colours are names of the page's CSS variables (`var(--p0)`), so that a figure fits the light and the
dark page; page.js puts the colours, fonts and grids in. Names and reasons from outside are escaped,
because plotly reads text as HTML. The page draws a figure's title, as text.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from llumnix.core.scheduling.presets import POLICIES
from llumnix.errors import UsageError
from llumnix.sim.report.data import (
    Details,
    Setting,
    differ,
    distribution,
    downsampled,
    estimate,
    finite,
    four_digits,
    last_of,
    samples_per_point,
)

COLOURS = 8
"""Colours of policies (--p0, --p1, ...). Further policies have the same ones, dashed."""
LOG_SPREAD = 20.0
"""An axis is logarithmic if its largest value is more than so many times its smallest."""

Figure = dict[str, Any]
# Title, path in the metrics, title of the axis, factor to the axis' unit.
_RATE_FIGURES = (
    ("TTFT, P99", ("ttft_s", "p99"), "TTFT P99, s", 1.0),
    ("TTFT, mean", ("ttft_s", "mean"), "mean TTFT, s", 1.0),
    ("TPOT, P99", ("tpot_s", "p99"), "TPOT P99, ms", 1e3),
    ("End to end, mean", ("e2e_s", "mean"), "mean end to end, s", 1.0),
    ("Preemption loss, mean", ("preemption_loss_s", "mean"), "mean preemption loss, s", 1.0),
    ("Fragmentation, mean", ("fragmentation_blocked", "mean"), "fragmented KV memory, %", 100.0),
    ("Serving instances, mean", ("instances_mean",), "serving instances", 1.0),
)


def plotly() -> Any:
    """The package plotly, imported only when a report is written. Raises UsageError without it."""
    try:
        import plotly
        import plotly.graph_objects
        import plotly.offline
    except ImportError as error:
        raise UsageError("a report needs plotly: pip install 'llumnix[report]'") from error
    return plotly


def figure(title: str, data: Sequence[Figure], layout: Figure) -> Figure:
    """A figure, after plotly has checked it. Raises ValueError if it has unknown properties."""
    checked = plotly().graph_objects.Figure(data=data, layout=layout | {"template": "none"})
    made = checked.to_plotly_json()
    del made["layout"]["template"]
    return {"title": title, "data": made["data"], "layout": made["layout"]}


def colours(policies: Iterable[str]) -> dict[str, int]:
    """The number of each policy's colour. Policies of llumnix have the same in every report."""
    others = [p for p in dict.fromkeys(policies) if p not in POLICIES]
    return {name: i for i, name in enumerate([*POLICIES, *others])}


def against_rate(settings: Sequence[Setting], colour: Mapping[str, int]) -> list[Figure]:
    """One plot for each row of `_RATE_FIGURES`: a line for each policy, with its 95 % interval as a
    band. Empty if there is only one rate."""
    rates = [s.rate for s in settings if s.rate is not None]
    if len(rates) < 2:
        return []
    figures = []
    for title, path, axis, scale in _RATE_FIGURES:
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for setting in settings:
            for policy, runs in setting.runs.items():
                found = estimate(runs, *path)
                if found and setting.rate is not None:
                    point = (setting.rate, found.mean * scale, (found.half or 0.0) * scale)
                    lines.setdefault(policy, []).append(point)
        means = [mean for points in lines.values() for _, mean, _ in points]
        if not any(means) or (path == ("instances_mean",) and not differ(means)):
            continue
        # A band may reach below zero, which a log axis cannot show. A very wide one is cut off, so
        # that the lines can be told apart.
        log = spread(means) > LOG_SPREAD
        floor, most = (min(means) / 2 if log else 0.0), max(means) * (2 if log else 1.5)
        highest = max(mean + half for points in lines.values() for _, mean, half in points)
        top = min(highest * 1.05, most)
        data = []
        for policy, points in lines.items():
            data += _band(policy, colour[policy], points, floor)
        layout = {
            "xaxis": {"title": "rate, requests/s"},
            "yaxis": value_axis(axis, means)
            | {"range": [math.log10(floor), math.log10(top)] if log else [0, top]},
        }
        if len(rates) <= 8:
            layout["xaxis"] |= {"tickvals": rates}
        figures.append(figure(title, data, layout))
    return figures


def distributions(setting: Setting, colour: Mapping[str, int]) -> list[Figure]:
    """The distributions of TTFT and TPOT over the requests of each policy's detailed run."""
    figures = []
    for name, key, unit, scale in (("TTFT", "ttft_s", "s", 1.0), ("TPOT", "tpot_s", "ms", 1e3)):
        data, seen = [], []
        for policy in setting.runs:
            details: Mapping[str, Any] = setting.details(policy) or {}
            xs, shares = distribution(details.get(key) or ())
            if not xs:
                continue
            seen += xs[len(xs) // 50 :]  # The lowest 2 % do not make the axis logarithmic.
            hover = f"%{{y:.1f}} % within %{{x}} {unit}"
            points = [four_digits(x, scale) for x in xs], [four_digits(s) for s in shares]
            data.append(line(policy, colour[policy], *points, hover, "hv"))
        if data:
            layout = {
                "xaxis": value_axis(f"{name}, {unit}", seen),
                "yaxis": {"title": "share of requests, %", "range": [0, 101]},
            }
            figures.append(figure(name, data, layout))
    return figures


def over_time(setting: Setting, colour: Mapping[str, int]) -> list[Figure]:
    """Fragmentation, waiting requests and instances over time, with a line for each policy's
    detailed run."""
    fragmentation, waiting, serving = [], [], []
    scaled = False
    for policy in setting.runs:
        details = setting.details(policy)
        if not details or not details.get("t_s"):
            continue
        of, size = colour[policy], samples_per_point(len(details["t_s"]))
        times = times_of(details, size)
        shares = [
            four_digits(v, 100) for v in downsampled(details.get("fragmentation") or (), size)
        ]
        fragmentation.append(line(policy, of, times, shares, "%{y:.1f} % at %{x:.1f} s"))
        total = [four_digits(v) for v in downsampled(queues(details)[0], size)]
        waiting.append(line(policy, of, times, total, "%{y:.1f} wait at %{x:.1f} s"))
        counts = downsampled(details.get("serving") or (), size, last_of)
        scaled = scaled or differ(counts)
        serving.append(line(policy, of, times, counts, "%{y} serve at %{x:.1f} s", "hv"))
    figures = []
    for title, data, axis in (
        ("Fragmentation", fragmentation, "fragmented KV memory, %"),
        ("Waiting requests", waiting, "waiting requests"),
        ("Serving instances", serving if scaled else [], "serving instances"),
    ):
        if any(v is not None for one in data for v in one["y"]):
            layout = {"xaxis": {"title": "time, s"}, "yaxis": count_axis(axis)}
            figures.append(figure(title, data, layout))
    return figures


def queues(details: Details) -> tuple[list[float], list[float]]:
    """At each sample: waiting requests of all instances, and of the instance with the most."""
    samples = range(len(details.get("t_s") or ()))
    series = [i.get("waiting") or [] for i in (details.get("instances") or {}).values()]
    waiting = [[finite(s[k]) or 0.0 for s in series if k < len(s)] for k in samples]
    return [sum(counts) for counts in waiting], [max(counts, default=0.0) for counts in waiting]


def times_of(details: Details, size: int) -> list[float]:
    """The time of each point, which is that of its first sample."""
    return [round(t, 3) for t in details["t_s"][::size]]


def spread(values: Sequence[float]) -> float:
    """The largest value ÷ the smallest; 1 if some are not above zero."""
    return max(values) / min(values) if values and min(values) > 0 else 1.0


def value_axis(title: str, values: Sequence[float]) -> Figure:
    """An axis for these values. A logarithmic one has ticks at 1, 2, 5 as long as they fit."""
    if (wide := spread(values)) > LOG_SPREAD:
        dtick = "D2" if wide < 3e3 else 1
        return {"title": title, "type": "log", "tickformat": "~g", "dtick": dtick}
    return count_axis(title)


def count_axis(title: str) -> Figure:
    """A linear axis from zero."""
    return {"title": title, "rangemode": "tozero"}


def plain_line(
    name: str,
    colour: str,
    xs: Sequence[Any],
    ys: Sequence[Any],
    hover: str,
    shape: str = "linear",
    width: float = 1.6,
) -> Figure:
    """A line. `colour` is a CSS colour, `hover` plotly's template of a point's text."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": xs,
        "y": ys,
        "line": {"color": colour, "width": width, "shape": shape},
        "hovertemplate": f"{hover}<extra></extra>",
    }


def line(
    policy: str,
    colour: int,
    xs: Sequence[Any],
    ys: Sequence[Any],
    hover: str,
    shape: str = "linear",
) -> Figure:
    """A policy's line. `colour` is the number of its colour, `hover` as in `plain_line`."""
    css, text = f"var(--p{colour % COLOURS})", f"%{{fullData.name}}<br>{hover}"
    made = plain_line(escape(policy), css, xs, ys, text, shape, width=2)
    made["meta"] = policy
    made["line"]["dash"] = "solid" if colour < COLOURS else "dash"
    return made


def _band(
    policy: str, colour: int, points: Sequence[tuple[float, float, float]], floor: float
) -> list[Figure]:
    """A line over the rates, and the area of its intervals if there are any. `points`: rate, mean
    and half an interval; the area ends at `floor`."""
    rates = [rate for rate, _, _ in points]
    means = [four_digits(mean) for _, mean, _ in points]
    made = line(policy, colour, rates, means, "%{y} at %{x} requests/s")
    made |= {"mode": "lines+markers", "marker": {"size": 6}}
    if not any(half for _, _, half in points):
        return [made]
    made["customdata"] = [four_digits(half) for _, _, half in points]
    made["hovertemplate"] = made["hovertemplate"].replace("%{y}", "%{y} ± %{customdata}")
    upper = [four_digits(mean + half) for _, mean, half in points]
    lower = [four_digits(max(mean - half, floor)) for _, mean, half in points]
    area = {
        "type": "scatter",
        "mode": "lines",
        "meta": policy,
        "x": rates + rates[::-1],
        "y": upper + lower[::-1],
        "fill": "toself",
        "fillcolor": f"var(--p{colour % COLOURS}-band)",
        "line": {"width": 0},
        "hoverinfo": "skip",
    }
    return [area, made]
