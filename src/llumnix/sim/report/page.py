"""The report of a simulation: one HTML page that needs no other file and no network.

`write_report` takes the result that data.py describes. Heading and tables are made here, plots in
figures.py and timeline.py. page.css has the colours, light and dark; page.js shows the chosen
setting, policies and decisions. plotly.js is written into the page, and the page's content security
policy lets nothing be fetched.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from llumnix.errors import UsageError
from llumnix.sim.report import figures
from llumnix.sim.report.data import (
    Details,
    Estimate,
    Setting,
    count,
    differ,
    estimate,
    finite,
    has_waiting,
    samples_per_point,
    settings_of,
)
from llumnix.sim.report.timeline import ARCS_MAX, drawable, timeline

REFERENCE = "llumnix"
"""The policy that ratios refer to, if it was simulated; else the first."""
CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
"""What the browser may load for the page: what is in it, and nothing else."""


class Kind(Enum):
    """How a figure is shown."""

    COST = "cost"  # the lower the better: with its ratio to the reference
    TALLY = "tally"  # a cost that is a whole number in each run
    COUNT = "count"  # a whole number that is neither good nor bad


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table."""

    title: str
    path: tuple[str, ...]  # in the metrics
    group: str = ""  # stands above the titles of several columns
    scale: float = 1.0  # factor to the title's unit
    kind: Kind = Kind.COST


LATENCIES = tuple(
    Column(group=group, title=title, path=(key, which), scale=scale)
    for group, key, scale in (
        ("TTFT, s", "ttft_s", 1.0),
        ("TPOT, ms", "tpot_s", 1e3),
        ("end to end, s", "e2e_s", 1.0),
    )
    for which, title in (("mean", "mean"), ("p50", "P50"), ("p99", "P99"))
)
COLUMNS = (
    *LATENCIES,
    Column(title="preemption loss, s", path=("preemption_loss_s", "mean")),
    Column(title="fragmented memory, %", path=("fragmentation_blocked", "mean"), scale=100.0),
    Column(title="instances, mean", path=("instances_mean",)),
    Column(title="preemptions", path=("preemptions",), kind=Kind.TALLY),
    Column(title="migrations", path=("migrations",), kind=Kind.COUNT),
    Column(title="requests done", path=("requests_done",), kind=Kind.COUNT),
    Column(title="requests failed", path=("requests_failed",), kind=Kind.TALLY),
)


def write_report(result: Mapping[str, Any], path: Path) -> None:
    """Writes the page of a simulation's result (`data.Result`).

    Raises UsageError if plotly is not installed or the file cannot be written."""
    plotly = figures.plotly()
    settings = settings_of(result.get("runs") or ())
    policies = list(dict.fromkeys(p for s in settings for p in s.runs))
    colour = figures.colours(policies)
    body = _heading(result, settings, policies) + _sections(settings, colour)
    page = _PAGE.format(
        content_policy=escape(CONTENT_POLICY),
        title=escape(_title(settings)),
        css=_file("page.css"),
        body=body,
        plotly=plotly.offline.get_plotlyjs(),
        data=_embedded(_data(settings, colour)),
        js=_file("page.js"),
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        reason = f"{path}: {error.strerror}"
        raise UsageError(f"the report cannot be written to {reason}; name another file") from error


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{content_policy}">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
{body}
<script>{plotly}</script>
<script type="application/json" id="data">{data}</script>
<script>
{js}</script>
</body>
</html>
"""


def _file(name: str) -> str:
    return files("llumnix.sim.report").joinpath(name).read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """JSON that may stand in a script element, because it has no character of HTML's syntax."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(settings: Sequence[Setting], colour: Mapping[str, int]) -> dict[str, Any]:
    """The data that page.js reads."""
    workloads = list(dict.fromkeys(s.workload for s in settings))
    return {
        "colours": {name: i % figures.COLOURS for name, i in colour.items()},
        "workloads": workloads,
        "against_rate": [
            figures.against_rate([s for s in settings if s.workload == w], colour)
            for w in workloads
        ],
        "settings": [
            {
                "workload": workloads.index(s.workload),
                "rate": "no rate" if s.rate is None else f"{s.rate:g} requests/s",
                "policies": list(s.runs),
                "distributions": figures.distributions(s, colour),
                "over_time": figures.over_time(s, colour),
                "runs": {p: _run(d) for p in s.runs if (d := s.details(p)) is not None},
            }
            for s in settings
        ],
    }


def _run(details: Details) -> dict[str, Any]:
    """The data of one detailed run: its plot, a note beneath it, its decisions."""
    return {
        "figure": timeline(details),
        "note": _note(details),
        "decisions": [
            [finite(d.get("t_s")), *(str(d.get(key) or "") for key in ("kind", "what", "why"))]
            for d in details.get("decisions") or ()
        ],
    }


def _note(details: Details) -> str:
    migrations = details.get("migrations") or ()
    aborted = sum(m.get("outcome") != "migrated" for m in migrations)
    parts = [count(len(migrations), "migration") + (f", {aborted:,} aborted" if aborted else "")]
    arcs = len(drawable(details))
    if arcs > ARCS_MAX:
        parts.append(f"{ARCS_MAX:,} of them are drawn, evenly picked")
    if arcs:
        parts.append("an arc goes from its source at the start to the dot at its destination")
    if (size := samples_per_point(len(details.get("t_s") or ()))) > 1:
        parts.append(f"each point is the mean of {size} samples")
    if details.get("t_s") and not has_waiting(details):
        parts.append("no request waited")
    return "; ".join(parts) + "."


def _title(settings: Sequence[Setting]) -> str:
    workloads = list(dict.fromkeys(s.workload for s in settings))
    return "Simulation: " + ("; ".join(workloads) or "no run")


def _heading(result: Mapping[str, Any], settings: Sequence[Setting], policies: list[str]) -> str:
    """The page's head: what was simulated."""
    runs = result.get("runs") or ()
    rates = sorted({s.rate for s in settings if s.rate is not None})
    facts = [", ".join(policies)]
    if rates:
        facts.append((f"{rates[0]:g} to " if len(rates) > 1 else "") + f"{rates[-1]:g} requests/s")
    facts.append(count(len({r.get("seed") for r in runs}), "seed"))
    wall_s = finite(result.get("wall_s"))
    took = f", simulated in {three_digits(wall_s)} s" if wall_s is not None else ""
    facts.append(count(len(runs), "run") + took)
    lines = [f"<h1>{escape(_title(settings))}</h1>", f"<p>{escape(' · '.join(facts))}</p>"]
    if about := result.get("about"):
        rows = (f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in about.items())
        lines.append(f"<dl>{''.join(rows)}</dl>")
    return f"<header>{''.join(lines)}</header>"


def _sections(settings: Sequence[Setting], colour: Mapping[str, int]) -> str:
    """The page's frame: the tables, and the places that page.js fills with plots."""
    if not settings:
        return "<p>There is nothing to show: the result holds no run.</p>"
    tables = "".join(
        f'<div data-setting="{i}"{" hidden" if i else ""}>{_tables(s, colour)}</div>'
        for i, s in enumerate(settings)
    )
    return f"""<nav id="bar" aria-label="What is shown"></nav>
<noscript><p>The plots and the choice of a setting need JavaScript.</p></noscript>
<section><h2>Summary <small class="of-setting"></small></h2>{tables}</section>
<section><h2>Against the rate <small class="of-workload"></small></h2>
<p class="about">Means over seeds; the bands are their 95 % t-intervals.</p>
<div class="plots three" data-plots="against_rate"></div></section>
<section><h2>Distributions <small class="of-setting"></small></h2>
<p class="about">Share of requests that took no longer, in one run of each policy.</p>
<div class="plots" data-plots="distributions"></div></section>
<section><h2>Over time <small class="of-setting"></small></h2>
<p class="about">One run of each policy.</p>
<div class="plots" data-plots="over_time"></div></section>
<section id="run"><h2>Inside a run <small class="of-setting"></small></h2>
<div class="tabs" role="tablist"></div><p class="about" id="note"></p>
<div class="plots one" data-plots="run"></div>
<h3>Decisions</h3><div id="decisions"></div></section>"""


def _tables(setting: Setting, colour: Mapping[str, int]) -> str:
    columns = [c for c in COLUMNS if _is_worth_showing(setting, c)]
    seeds = {len(runs) for runs in setting.runs.values()}
    reference = REFERENCE if REFERENCE in setting.runs else next(iter(setting.runs))
    about = []
    if max(seeds) > 1:
        means = f"means over {max(seeds)} seeds" if len(seeds) == 1 else "means over the seeds"
        about.append(f"{means}, ± half of their 95 % t-interval")
    if len(setting.runs) > 1:
        about.append(f"× the ratio to {reference}")
        about.append("the lowest of each column in bold")
    html = f'<p class="about">{escape(_sentence(about))}</p>' if about else ""
    html += _table(columns, _rows(setting, columns, reference, colour))
    if classes := _classes(setting):
        rows = ""
        latencies = [
            c
            for c in LATENCIES
            if any(_is_worth_showing(setting, _of_class(c, name)) for name in classes)
        ]
        for name in classes:
            span = len(latencies) + 1
            rows += f'<tr class="class"><th colspan="{span}">{escape(name)}</th></tr>'
            of_class = [_of_class(c, name) for c in latencies]
            rows += _rows(setting, of_class, reference, colour)
        html += f"<h3>By priority class</h3>{_table(latencies, rows)}"
    return html


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def _classes(setting: Setting) -> list[str]:
    found = (
        name
        for runs in setting.runs.values()
        for run in runs
        for name in ((run.get("metrics") or {}).get("classes") or {})
    )
    return list(dict.fromkeys(found))


def _of_class(column: Column, name: str) -> Column:
    """The column for one priority class."""
    return Column(title=column.title, path=("classes", name, *column.path), scale=column.scale)


def _is_worth_showing(setting: Setting, column: Column) -> bool:
    """Whether any policy has the figure, and not merely the value that a reader expects."""
    found = [e for runs in setting.runs.values() if (e := estimate(runs, *column.path))]
    expected: Mapping[tuple[str, ...], int | None]
    expected = {("instances_mean",): setting.instances, ("requests_failed",): 0}
    return any(e.mean != expected.get(column.path) for e in found)


def _table(columns: Sequence[Column], rows: str) -> str:
    groups: list[tuple[str, int]] = []
    for column in columns:
        if groups and groups[-1][0] == column.group:
            groups[-1] = (column.group, groups[-1][1] + 1)
        else:
            groups.append((column.group, 1))
    above = "".join(f'<th colspan="{n}">{escape(name)}</th>' for name, n in groups)
    titles = "".join(f"<th>{escape(c.title)}</th>" for c in columns)
    spans = "".join(f'<colgroup span="{n}"></colgroup>' for _, n in groups)
    return (
        f'<div class="table"><table><colgroup></colgroup>{spans}<thead>'
        f'<tr class="groups"><th></th>{above}</tr><tr><th>policy</th>{titles}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _rows(
    setting: Setting, columns: Sequence[Column], reference: str, colour: Mapping[str, int]
) -> str:
    """A row for each policy."""
    found = {
        policy: [estimate(runs, *c.path) for c in columns] for policy, runs in setting.runs.items()
    }
    best = [_best(c, [row[i] for row in found.values()]) for i, c in enumerate(columns)]
    html = ""
    for policy, row in found.items():
        cells = "".join(
            _cell(c, row[i], best[i], None if policy == reference else found[reference][i])
            for i, c in enumerate(columns)
        )
        dot = f'<i class="dot" style="--c:var(--p{colour[policy] % figures.COLOURS})"></i>'
        html += f"<tr><th>{dot}{escape(policy)}</th>{cells}</tr>"
    return html


def _best(column: Column, row: Iterable[Estimate | None]) -> float | None:
    """The lowest value of a column; None if lower is not better, or all are alike."""
    means = [e.mean for e in row if e is not None]
    return min(means) if column.kind is not Kind.COUNT and differ(means) else None


def _cell(
    column: Column, value: Estimate | None, best: float | None, reference: Estimate | None
) -> str:
    if value is None:
        return "<td>–</td>"
    mean = float(value.mean * column.scale)
    places = _places(mean) if column.kind is Kind.COST else int(not mean.is_integer())
    text = f"{mean:,.{places}f}"
    html = f"<b>{text}</b>" if value.mean == best else text
    if value.half:
        html += f"<small>± {value.half * column.scale:,.{places}f}</small>"
    if column.kind is not Kind.COUNT and reference is not None and reference.mean > 0:
        html += f'<small class="ratio">× {three_digits(value.mean / reference.mean)}</small>'
    return f"<td>{html}</td>"


def three_digits(value: float) -> str:
    """The value with three significant digits, without an exponent."""
    return f"{value:,.{_places(value)}f}"


def _places(value: float) -> int:
    """How many decimals make three significant digits; four at most."""
    if value == 0:
        return 0
    return min(4, max(0, 2 - math.floor(math.log10(abs(value)))))
