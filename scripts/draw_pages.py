"""Fills pages of docs/ from the code, between their markers.

The tables of core/migration/tables.py, core/streams/states.py and core/supervision/lifecycle.py
become diagrams, the knobs of core/settings.py and the policies become tables.

`python scripts/draw_pages.py` writes the pages; with `--check` it writes nothing, and exits with
1 if one is not up to date.
"""

import argparse
import enum
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from llumnix.core.migration.tables import DESTINATION, SOURCE, destination_machine, source_machine
from llumnix.core.scheduling.presets import POLICIES
from llumnix.core.settings import PriorityClass, SchedulerSettings
from llumnix.core.streams.states import STREAM, stream_machine
from llumnix.core.supervision.lifecycle import LIFE, life_machine
from llumnix.core.types import InstanceId, RequestId

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {
    "ARCHITECTURE.md": ("life",),
    "migration.md": ("source", "destination", "stream"),
    "scheduler.md": ("knobs", "policies"),
}
Table = dict[Any, dict[Any, tuple[Any, enum.Enum]]]


def diagram(table: Table, start: enum.Enum) -> str:
    """A table as a Mermaid diagram. Events with the same end and action share an arrow; those that
    change nothing and do nothing have none."""
    lines = ["stateDiagram-v2", f"    [*] --> {start.value}"]
    for state, row in table.items():
        arrows: dict[tuple[str, str], list[str]] = {}
        for event, (after, action) in row.items():
            if after is not state or action.value != "-":
                arrows.setdefault((after.value, action.value), []).append(event.value)
        for (after, action), events in arrows.items():
            done = "" if action == "-" else f" / {action}"
            lines.append(f"    {state.value} --> {after}: {' or '.join(events)}{done}")
        if all(after is state for after, _ in row.values()):
            lines.append(f"    {state.value} --> [*]")
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


def drawings() -> dict[str, str]:
    """What stands between the markers, by their names."""
    mermaid = "```mermaid\n{}\n```"
    return {
        "source": mermaid.format(diagram(SOURCE, source_machine("").state)),
        "destination": mermaid.format(diagram(DESTINATION, destination_machine("").state)),
        "stream": mermaid.format(diagram(STREAM, stream_machine(RequestId("")).state)),
        "life": mermaid.format(diagram(LIFE, life_machine(InstanceId("")).state)),
        "knobs": "\n".join(knobs()),
        "policies": "\n".join(policies()),
    }


def drawn(text: str, names: Sequence[str]) -> str:
    """The page with what the code says today. ValueError if a marker is missing."""
    every = drawings()
    for name in names:
        drawing = every[name]
        begin, end = f"<!-- {name}: drawn -->\n", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page lacks the markers {begin.strip()} and {end}")
        text = f"{before}{begin}{drawing}\n{end}{after}"
    return text


def main(argv: Sequence[str], docs: Path = DOCS) -> int:
    """Writes or checks the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    args = parser.parse_args(argv)
    status = 0
    for name, markers in PAGES.items():
        page = docs / name
        text = page.read_text()
        today = drawn(text, markers)
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
