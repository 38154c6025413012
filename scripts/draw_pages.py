"""Fills the pages between their markers, from the code and from raw figures.

From the code: the tables of a migration, a stream and an instance's life as diagrams, the knobs,
the policies and the metrics as tables. From raw figures: the tables of scripts/raw_tables/. A
page's markers say what stands between them:

    <!-- knobs: drawn -->
    <!-- knobs: end -->

`python scripts/draw_pages.py` writes the pages. With `--check` it writes nothing, and exits with 1
if one is not up to date.
"""

import argparse
import enum
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from llumnix.core.migration.tables import (
    DESTINATION,
    SOURCE,
    DestinationState,
    SourceState,
    destination_machine,
    source_machine,
)
from llumnix.core.scheduling.presets import POLICIES
from llumnix.core.settings import PriorityClass, SchedulerSettings
from llumnix.core.slices.published import STATIC
from llumnix.core.streams.states import STREAM, StreamState, stream_machine
from llumnix.core.supervision.lifecycle import LIFE, LifeState, life_machine
from llumnix.core.types import InstanceId, RequestId
from llumnix.observe.metrics import FAMILIES, Family

sys.path.insert(0, str(Path(__file__).resolve().parent))

import raw_tables

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"<!-- ([^:>]+): drawn -->\n")
Table = dict[Any, dict[Any, tuple[Any, enum.Enum]]]
Arrow = tuple[str, str, str, str]


def arrows(table: Table) -> list[Arrow]:
    """From state, to state, events, action. Events with the same end and action share an arrow;
    those that change nothing and do nothing have none."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for state, row in table.items():
        for event, (after, action) in row.items():
            if after is not state or action.value != "-":
                found.setdefault((state.value, after.value, action.value), []).append(event.value)
    return [(before, after, " or ".join(e), action) for (before, after, action), e in found.items()]


def diagram(table: Table, start: enum.Enum, end: enum.Enum) -> str:
    """A table as a Mermaid diagram of the ways ahead. Arrows that stay, and those to the end that
    nearly every state can come to, would hide them: they stand in a table beneath."""
    # Mermaid's names of states have no spaces.
    names = {state.value: state.value.replace(" ", "_") for state in table}
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [f'    state "{value}" as {name}' for value, name in names.items() if value != name]
    lines.append(f"    [*] --> {names[start.value]}")
    others: dict[tuple[str, str, str], list[str]] = {}
    for before, after, events, action in arrows(table):
        if after in (before, end.value):
            to = "itself" if after == before else after
            others.setdefault((to, events, action), []).append(before)
        else:
            done = "" if action == "-" else f" / {action}"
            lines.append(f"    {names[before]} --> {names[after]}: {events}{done}")
    for state, row in table.items():
        if state is not end and all(after is state for after, _ in row.values()):
            lines.append(f"    {names[state.value]} --> [*]")
    lines += ["```", "", "| from | to | when | action |", "|---|---|---|---|"]
    lines += [
        f"| {', '.join(states)} | {to} | {events} | {action} |"
        for (to, events, action), states in sorted(
            others.items(), key=lambda o: o[0][0] != "itself"
        )
    ]
    return "\n".join(lines)


def knobs(kind: Any = SchedulerSettings, path: str = "") -> list[str]:
    """Rows of the table of settings: name, default, unit, meaning."""
    rows = [] if path else ["| knob | default | unit | what it does |", "|---|---|---|---|"]
    hints = get_type_hints(kind)
    for f in fields(kind):
        name = f"{path}{f.name}"
        if is_dataclass(hints[f.name]):
            rows += knobs(hints[f.name], f"{name}.")
        else:
            default = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc]
            unit, what = f.metadata["unit"], f.metadata["help"]
            rows.append(f"| `{name}` | {_shown(default)} | {unit} | {what} |")
    return rows


def _shown(value: Any) -> str:
    """A default as YAML."""
    if value is None:
        return "null"
    if isinstance(value, tuple) and value and isinstance(value[0], PriorityClass):
        shown = (f"{c.name} {c.priority} {c.headroom:g}" for c in value)
        return ", ".join(shown)
    return f"{value:g}" if isinstance(value, float) else str(value)


def policies() -> list[str]:
    """The table of policies."""
    rows = ["| policy | a new request goes to … |", "|---|---|"]
    return rows + [f"| `{name}` | {preset.text} |" for name, preset in POLICIES.items()]


def published() -> list[str]:
    """The table of the policies for static batches."""
    rows = ["| policy | what it is |", "|---|---|"]
    return rows + [f"| `{name}` | {rules.text} |" for name, rules in STATIC.items()]


def metrics() -> list[str]:
    """The table of metrics: name, type, labels with their values, meaning."""
    rows = ["| name | type | labels | what it says |", "|---|---|---|---|"]
    for one in FAMILIES.values():
        labels = "; ".join(f"`{n}`" + _values(known) for n, known in one.labels.items())
        rows.append(f"| `{one.name}` | {one.kind} | {labels} | {one.help} |")
    return rows


def _values(known: tuple[str, ...]) -> str:
    return f": {', '.join(known)}" if known else ""


def buckets() -> list[str]:
    """The table of histograms' buckets; histograms that share them share a row."""
    found: dict[tuple[float, ...], list[Family]] = {}
    for one in FAMILIES.values():
        if one.buckets:
            found.setdefault(one.buckets, []).append(one)
    rows = ["| histograms | buckets up to |", "|---|---|"]
    for bounds, those in found.items():
        names = ", ".join(f"`{one.name}`" for one in those)
        rows.append(f"| {names} | {', '.join(f'{b:g}' for b in bounds)} |")
    return rows


DRAWINGS: dict[str, Callable[[], str]] = {
    "source": lambda: diagram(SOURCE, source_machine("").state, SourceState.ABORTED),
    "destination": lambda: diagram(
        DESTINATION, destination_machine("").state, DestinationState.ABORTED
    ),
    "stream": lambda: diagram(STREAM, stream_machine(RequestId("")).state, StreamState.ORPHAN),
    "life": lambda: diagram(LIFE, life_machine(InstanceId("")).state, LifeState.FAILED),
    "knobs": lambda: "\n".join(knobs()),
    "policies": lambda: "\n".join(policies()),
    "published policies": lambda: "\n".join(published()),
    "metrics": lambda: "\n".join(metrics()),
    "buckets": lambda: "\n".join(buckets()),
    **raw_tables.DRAWINGS,
}
"""What stands between the markers, by their names."""


def pages(root: Path = ROOT) -> list[Path]:
    """README and the pages of docs/."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def drawn(text: str) -> str:
    """The page with what code and raw figures say today. ValueError if a marker has no end or no
    drawing."""
    for name in MARKER.findall(text):
        begin, end = f"<!-- {name}: drawn -->\n", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page lacks the marker {end}")
        if name not in DRAWINGS:
            raise ValueError(f"nothing is called {name!r} that could be drawn")
        text = f"{before}{begin}{DRAWINGS[name]()}\n{end}{after}"
    return text


def main(argv: Sequence[str], root: Path = ROOT) -> int:
    """Writes or checks the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    args = parser.parse_args(argv)
    status = 0
    for page in pages(root):
        text = page.read_text()
        today = drawn(text)
        if text == today:
            continue
        if args.check:
            print(f"{page} is not up to date: run python scripts/draw_pages.py", file=sys.stderr)
            status = 1
        else:
            page.write_text(today)
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
