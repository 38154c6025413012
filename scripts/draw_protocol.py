"""Draws the two tables of core/migration.py into docs/migration.md, between its markers.

`python scripts/draw_protocol.py` writes the page; with `--check` it writes nothing, and exits with
1 if the page is not up to date.
"""

import argparse
import enum
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llumnix.core.migration import DESTINATION, SOURCE, destination_machine, source_machine

PAGE = Path(__file__).resolve().parents[1] / "docs" / "migration.md"
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


def drawings() -> dict[str, str]:
    """The diagrams, by the names in the page's markers."""
    return {
        "source": diagram(SOURCE, source_machine("").state),
        "destination": diagram(DESTINATION, destination_machine("").state),
    }


def drawn(text: str) -> str:
    """The page with the diagrams of today. ValueError if a marker is missing."""
    for name, drawing in drawings().items():
        begin, end = f"<!-- {name}: drawn -->\n", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page lacks the markers {begin.strip()} and {end}")
        text = f"{before}{begin}```mermaid\n{drawing}\n```\n{end}{after}"
    return text


def main(argv: Sequence[str], page: Path = PAGE) -> int:
    """Writes or checks the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    args = parser.parse_args(argv)
    text = page.read_text()
    today = drawn(text)
    if text == today:
        return 0
    if args.check:
        print(f"{page} is not up to date: run python scripts/draw_protocol.py", file=sys.stderr)
        return 1
    page.write_text(today)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
