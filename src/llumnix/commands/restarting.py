"""`llumnix restart`: starts instances again without cutting their requests off."""

import argparse
import time

from llumnix.commands.instances import (
    POLL_S,
    Row,
    check_named,
    drain_flags,
    drain_query,
    instances_parser,
    named,
    now,
    order,
    path_of,
    print_rows,
    raise_refusals,
    rows_at_first,
    rows_of,
    say,
)
from llumnix.errors import LlumnixError

UNDER_WAY = ("draining", "stopping", "restarting", "starting")


def restart(argv: list[str]) -> int:
    """`llumnix restart`: 0 once each serves again, 1 at the first that does not. Raises what was
    refused, once the others of its group serve again."""
    parser = instances_parser("restart")
    drain_flags(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--one-by-one",
        action="store_true",
        help="the next once the last one serves again; the default",
    )
    how.add_argument("--together", action="store_true", help="all of them at once")
    args = parser.parse_args(argv)
    there = rows_at_first(args)
    if args.instances or args.node:
        check_named(args)
        names = named(args, there)
    else:
        names = list(there)
    groups = [names] if args.together else [[name] for name in names]
    rows: list[Row] = []
    refused: list[LlumnixError] = []
    for group in groups:
        rows += _restart(args, group, refused)
        if refused or any(row["state"] != "serving" for row in rows):
            break
    if args.json and rows:
        print_rows(rows)
    raise_refusals(refused)
    return 0 if all(row["state"] == "serving" for row in rows) else 1


def _restart(args: argparse.Namespace, names: list[str], refused: list[LlumnixError]) -> list[Row]:
    """Restarts these, and returns what became of each that was not `refused`."""
    began_s, query, rows = time.monotonic(), drain_query(args), rows_of(args)
    before: dict[str, Row] = {}
    for name in names:
        there = rows.get(name)
        old = None if there is None else there["engine_index"]

        def begun(row: Row, old: int | None = old) -> bool:
            return row["state"] in UNDER_WAY or row["engine_index"] != old

        try:
            row = order(args, path_of(name, f"/restart{query}"), there, begun)
        except LlumnixError as error:
            refused.append(error)  # Those that were ordered before go on.
            continue
        before[name] = {**row, "engine_index": old}
        say(args, f"{name} is {row['state']}")
    found: dict[str, Row] = {}
    while len(found) < len(before):
        time.sleep(POLL_S)
        rows = rows_of(args)
        for name in before:
            gone = {**before[name], "state": "gone", "why": "it was ordered away"}
            row = now(before[name], rows) or gone
            if name in found or row["state"] in UNDER_WAY:
                continue
            if row["state"] == "serving" and row["engine_index"] == before[name]["engine_index"]:
                row = {**row, "state": "not restarted", "why": "its restart was taken back"}
            found[name] = row
            say(args, _line(row, time.monotonic() - began_s))
    return [found[name] for name in before]


def _line(row: Row, took_s: float) -> str:
    if row["state"] == "serving":
        return f"{row['id']} serves again after {took_s:.1f} s"
    return f"{row['id']} is {row['state']}: {row['why']}"
