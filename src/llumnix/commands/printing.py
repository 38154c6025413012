"""How commands print what a server told them."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

NAME_MAX = 60
"""So much of a request's name is shown in a table. Clients choose it."""


def count(number: int, what: str) -> str:
    """A number and what it counts, in the plural if it must be."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def print_json(value: Any) -> None:
    """For programs."""
    print(json.dumps(value, indent=2))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table. What is not known or empty is a dash."""
    cells = [tuple(head)]
    cells += [tuple("-" if c in (None, "") else printable(str(c)) for c in row) for row in rows]
    widths = [max(len(row[c]) for row in cells) for c in range(len(head))]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    ]


def shortened(name: str) -> str:
    """A client's name for its request, as long as a table bears."""
    return name if len(name) <= NAME_MAX else name[: NAME_MAX - 1] + "…"


def printable(text: str) -> str:
    """What a client named must not steer the terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)
