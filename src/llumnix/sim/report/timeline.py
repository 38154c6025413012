"""The report's plot of one run: rows over one axis of time, as one plotly figure.

The rows are the KV memory of each instance, migrations as arcs between instances, waiting requests,
and the number of instances. Colours and texts are as in figures.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from llumnix.sim.report.data import (
    DecisionLine,
    Details,
    MigrationSpan,
    differ,
    downsampled,
    evenly_picked,
    finite,
    four_digits,
    has_waiting,
    last_of,
    natural_key,
    samples_per_point,
)
from llumnix.sim.report.figures import Figure, count_axis, figure, plain_line, queues, times_of

ARCS_MAX = 2_000
"""Of more migrations, so many are drawn, evenly picked."""
FEW_ARCS = 200
"""From so many on, arcs are drawn fainter."""
LINES_MAX = 4
"""So many instances have a line each; more become a heat map."""
FAULT_LINES_MAX = 40
"""Faults beyond these are not drawn."""
_GAP_PX, _FOOT_PX = 46, 44
_ARC_STEPS = 6
_ARC_BOW = 0.008
"""How far an arc bows, as a share of the run's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plot of the stack."""

    title: str
    height_px: int
    traces: list[Figure]
    axis: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Arc:
    """A migration as it is drawn."""

    began_s: float
    ended_s: float
    source: int  # place of its source's line
    destination: int  # place of its destination's line
    text: str  # shown beneath the mouse


def timeline(details: Details) -> Figure | None:
    """The run over time; None if it was not sampled."""
    if not details.get("t_s") or not details.get("instances"):
        return None
    names = sorted(details["instances"], key=natural_key)
    size = samples_per_point(len(details["t_s"]))
    times = times_of(details, size)
    end_s = max((finite(t) or 0.0 for t in details["t_s"]), default=0.0)
    spread_px = min(420, max(120, 15 * len(names)))
    if len(names) > LINES_MAX:
        heat = _heat(details, names, times, size)
        rows = [_row("KV memory in use", spread_px, [heat], _instance_axis(names))]
    else:
        axis = {"title": "KV memory, %", "range": [0, 103]}
        rows = [_row("KV memory in use", 170, _kv_lines(details, names, times, size), axis)]
    if arcs := _migrations(details, names, end_s):
        rows.append(_row("Migrations", spread_px, arcs, _instance_axis(names)))
    if has_waiting(details):
        traces = _waiting(details, times, size)
        rows.append(_row("Waiting requests", 120, traces, count_axis("requests")))
    if differ(details.get("serving") or ()):
        traces = _serving(details, times, size)
        rows.append(_row("Serving instances", 110, traces, count_axis("instances")))
    return _stack(rows, _faults(details), end_s)


def _row(title: str, height_px: int, traces: list[Figure], axis: Figure) -> Row:
    return Row(title=title, height_px=height_px, traces=traces, axis=axis)


def _stack(rows: Sequence[Row], faults: Sequence[DecisionLine], end_s: float) -> Figure:
    """The rows one below the other, each with its title and legend above it."""
    plot_px = sum(row.height_px + _GAP_PX for row in rows)
    data: list[Figure] = []
    layout: Figure = {
        "height": plot_px + _FOOT_PX,
        "margin": {"t": 0, "b": _FOOT_PX, "l": 64, "r": 64},
        "annotations": [],
        "shapes": [],
        "hovermode": "closest",
    }
    top_px = plot_px
    for i, row in enumerate(rows):
        suffix = str(i + 1) if i else ""
        top_px -= _GAP_PX
        top, bottom = top_px / plot_px, max(0.0, (top_px - row.height_px) / plot_px)
        layout[f"yaxis{suffix}"] = row.axis | {"domain": [bottom, top], "anchor": "x"}
        above = {"y": top + 4 / plot_px, "yanchor": "bottom"}
        layout["annotations"].append(
            {
                "text": f"<b>{row.title}</b>",
                "x": 0,
                "xanchor": "left",
                "xref": "paper",
                "yref": "paper",
                "showarrow": False,
            }
            | above
        )
        layout[f"legend{suffix}"] = {"orientation": "h", "x": 1, "xanchor": "right"} | above
        for trace in row.traces:
            where = {"yaxis": f"y{suffix}"}
            if trace["type"] == "scatter":
                where["legend"] = f"legend{suffix}"
            else:
                bar = {"y": (top + bottom) / 2, "len": top - bottom}
                trace = trace | {"colorbar": trace["colorbar"] | bar}
            data.append(trace | where)
        layout["shapes"] += [_fault_line(fault, f"y{suffix} domain") for fault in faults]
        top_px -= row.height_px
    layout["annotations"] += [_fault_name(fault) for fault in faults]
    layout["xaxis"] = {
        "title": "time, s",
        "range": [0, end_s],
        "anchor": f"y{len(rows)}" if len(rows) > 1 else "y",
    }
    return figure("", data, layout)


def _instance_axis(names: Sequence[str]) -> Figure:
    """An axis with a place for each instance, the first on top. Of many only some are named."""
    step = -(-len(names) // 16)
    return {
        "title": "instance",
        "range": [len(names) - 0.5, -0.5],
        "tickvals": list(range(0, len(names), step)),
        "ticktext": [escape(n) for n in names[::step]],
        "zeroline": False,
    }


def _heat(details: Details, names: Sequence[str], times: list[float], size: int) -> Figure:
    series = [details["instances"][name].get("kv_used") or () for name in names]
    shares = [[_percent(v) for v in downsampled(one, size)] for one in series]
    stops = (0, 0.5, 0.8, 0.95, 1)
    return {
        "type": "heatmap",
        "x": times,
        "y": list(range(len(names))),
        "z": shares,
        "zmin": 0,
        "zmax": 100,
        "colorscale": [[stop, f"var(--heat{i})"] for i, stop in enumerate(stops)],
        "colorbar": {"title": "%", "thickness": 10, "outlinewidth": 0, "x": 1.005},
        "hoverongaps": False,
        "meta": [escape(name) for name in names],  # page.js makes `customdata` of it.
        "hovertemplate": "%{z} % of %{customdata} at %{x:.1f} s<extra></extra>",
    }


def _kv_lines(
    details: Details, names: Sequence[str], times: list[float], size: int
) -> list[Figure]:
    return [
        plain_line(
            escape(name),
            f"var(--i{i})",
            times,
            [
                _percent(v)
                for v in downsampled(details["instances"][name].get("kv_used") or (), size)
            ],
            "%{y} % of %{fullData.name} at %{x:.1f} s",
        )
        for i, name in enumerate(names)
    ]


def _waiting(details: Details, times: list[float], size: int) -> list[Figure]:
    total, longest = ([four_digits(v) for v in downsampled(one, size)] for one in queues(details))
    hover = "%{y} wait at %{x:.1f} s"
    lines = [plain_line("on all instances", "var(--queued)", times, total, hover)]
    lines[0] |= {"fill": "tozeroy", "fillcolor": "var(--queued-band)"}
    if len(details["instances"]) > 1:
        hover = "%{y} wait on one instance at %{x:.1f} s"
        lines.append(plain_line("longest queue", "var(--ink)", times, longest, hover))
    return lines


def _serving(details: Details, times: list[float], size: int) -> list[Figure]:
    """The number of instances, and the decisions that change it."""
    counts = downsampled(details.get("serving") or (), size, last_of)
    lines = [plain_line("serving", "var(--ink)", times, counts, "%{y} serve at %{x:.1f} s", "hv")]
    for kind, symbol in (("add", "triangle-up"), ("drain", "triangle-down"), ("undrain", "circle")):
        found = [d for d in details.get("decisions") or () if d.get("kind") == kind]
        found = [d for d in found if finite(d.get("t_s")) is not None][:ARCS_MAX]
        if found:
            lines.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": kind,
                    "x": [d["t_s"] for d in found],
                    "y": [_count_at(d["t_s"], times, counts) for d in found],
                    "marker": {"symbol": symbol, "size": 9, "color": "var(--moved)"},
                    "customdata": [_decision_text(d) for d in found],
                    "hovertemplate": "%{customdata}<extra></extra>",
                }
            )
    return lines


def _count_at(t_s: float, times: Sequence[float], counts: Sequence[float | None]) -> float | None:
    before = [c for t, c in zip(times, counts, strict=False) if t <= t_s]
    return before[-1] if before else next(iter(counts), None)


def _faults(details: Details) -> list[DecisionLine]:
    faults = [d for d in details.get("decisions") or () if d.get("kind") == "fault"]
    return [f for f in faults if finite(f.get("t_s")) is not None][:FAULT_LINES_MAX]


def _fault_line(fault: DecisionLine, across: str) -> Figure:
    return {
        "type": "line",
        "xref": "x",
        "yref": across,
        "x0": fault["t_s"],
        "x1": fault["t_s"],
        "y0": 0,
        "y1": 1,
        "line": {"color": "var(--bad)", "width": 1.2, "dash": "dot"},
    }


def _fault_name(fault: DecisionLine) -> Figure:
    """The fault's name, above the first row."""
    return {
        "text": escape(str(fault.get("what") or "fault")),
        "x": fault["t_s"],
        "xref": "x",
        "y": 1,
        "yref": "y domain",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"color": "var(--bad)", "size": 11},
    }


def _migrations(details: Details, names: Sequence[str], end_s: float) -> list[Figure]:
    """An arc for each migration, from its source at its start to its destination at its end."""
    places = {name: i for i, name in enumerate(names)}
    kinds: dict[str, list[Arc]] = {"running": [], "waiting": [], "aborted": []}
    for migration in evenly_picked(drawable(details), ARCS_MAX):
        waiting = "waiting" if migration.get("waiting") else "running"
        kind = waiting if migration.get("outcome") == "migrated" else "aborted"
        kinds[kind].append(_arc(migration, places))
    names_and_colours = {
        "running": ("moved while running", "var(--moved)"),
        "waiting": ("moved while waiting", "var(--queued)"),
        "aborted": ("aborted", "var(--bad)"),
    }
    few = sum(map(len, kinds.values())) < FEW_ARCS
    traces = []
    for kind, arcs in kinds.items():
        if arcs:
            traces += _arc_traces(*names_and_colours[kind], arcs, end_s * _ARC_BOW, few)
    return traces


def drawable(details: Details) -> list[MigrationSpan]:
    """The migrations whose start and both ends are known."""
    known = details.get("instances") or {}
    return [
        m
        for m in details.get("migrations") or ()
        if m.get("source") in known
        and m.get("destination") in known
        and finite(m.get("t_s")) is not None
    ]


def _arc(migration: MigrationSpan, places: Mapping[str, int]) -> Arc:
    began_s = migration["t_s"]
    ended_s = finite(migration.get("ended_s"))
    return Arc(
        began_s=began_s,
        ended_s=began_s if ended_s is None else ended_s,
        source=places[migration["source"]],
        destination=places[str(migration["destination"])],
        text=_migration_text(migration),
    )


def _arc_traces(
    name: str, colour: str, arcs: Sequence[Arc], bow_s: float, few: bool
) -> list[Figure]:
    """All arcs of one kind as one line with gaps, and a dot at each destination. An arc is a
    parabola about the straight line from its start to its end, `bow_s` wide at its middle."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for arc in arcs:
        for step in range(_ARC_STEPS + 1):
            u = step / _ARC_STEPS
            straight = arc.began_s + (arc.ended_s - arc.began_s) * u
            xs.append(round(straight + bow_s * 4 * u * (1 - u), 2))
            ys.append(round(arc.source + (arc.destination - arc.source) * u, 2))
        xs.append(None)
        ys.append(None)
    lines = plain_line(f"{name} ({len(arcs):,})", colour, xs, ys, "")
    del lines["hovertemplate"]
    lines["line"] |= {"width": 1}
    lines["opacity"] = 1.0 if few else 0.6
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": [round(arc.ended_s, 3) for arc in arcs],
        "y": [arc.destination for arc in arcs],
        "marker": {"color": colour, "size": 6 if few else 4},
        "customdata": [arc.text for arc in arcs],
        "hovertemplate": "%{customdata}<extra></extra>",
        "showlegend": False,
        "legendgroup": name,
    }
    return [lines | {"hoverinfo": "skip", "legendgroup": name}, dots]


def _migration_text(m: MigrationSpan) -> str:
    tokens = finite(m.get("tokens"))
    ended_s = finite(m.get("ended_s"))
    parts = [
        f"<b>{escape(str(m.get('request', '')))}</b>"
        f" {escape(str(m['source']))} → {escape(str(m['destination']))}",
        escape(str(m.get("outcome") or ""))
        + (" while waiting" if m.get("waiting") else "")
        + (f", {tokens:,.0f} tokens" if tokens is not None else ""),
        f"{m['t_s']:.2f} s"
        + (f", took {ended_s - m['t_s']:.3f} s" if ended_s is not None else ", not ended"),
        wrapped(str(m.get("why") or "")),
    ]
    return "<br>".join(part for part in parts if part)


def _decision_text(d: DecisionLine) -> str:
    what = f"{d.get('kind', '')} {d.get('what', '')}"
    return f"{d['t_s']:.1f} s: {escape(what)}<br>{wrapped(str(d.get('why') or ''))}"


def wrapped(text: str, width: int = 70) -> str:
    """The text as plotly's HTML, in lines of about `width` characters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "<br>".join(escape(part) for part in lines)


def _percent(share: Any) -> float | None:
    known = finite(share)
    return None if known is None else round(known * 100)
