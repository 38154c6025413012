"""`llumnix status`, `add`, `drain`, `remove` and `undrain`: the instances of a running server."""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

from llumnix.commands.printing import print_json, table
from llumnix.commands.server_client import ask, ask_again, server_parser, with_patience
from llumnix.errors import LlumnixError, UsageError

INSTANCES = "/llumnix/v1/instances"
ANSWER_TIMEOUT_S = 10.0
"""A busy server may take some seconds for the loads of all."""
ADD_TIMEOUT_S = 20.0
"""The server may have to ask Ray what is free."""
POLL_S = 0.1

Row = dict[str, Any]


def status(argv: list[str]) -> int:
    """`llumnix status`: the instances, as a table or as JSON."""
    args = server_parser("status").parse_args(argv)
    body = _list(args)
    if args.json:
        print_json(body)
    else:
        print("\n".join(_status_lines(body)))
    return 0


def add(argv: list[str]) -> int:
    """`llumnix add`: starts more instances, until one is refused; 1 if one that is waited for does
    not serve."""
    parser = server_parser("add")
    parser.add_argument("count", metavar="N", type=int, nargs="?", default=1, help="default: 1")
    parser.add_argument("--wait", action="store_true", help="return once all of them serve")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise UsageError(f"add {args.count}: name how many are to be added, 1 or more")
    began_s, rows = time.monotonic(), list[Row]()
    refused: list[LlumnixError] = []
    while len(rows) < args.count and not refused:
        try:
            rows.append(ask(args, "POST", INSTANCES, wanted="state", timeout_s=ADD_TIMEOUT_S))
        except LlumnixError as error:
            refused.append(error)  # Those that were added before are shown, and waited for.
        else:
            say(args, f"{rows[-1]['id']} is {rows[-1]['state']}")
    failed = False
    if args.wait and rows:
        rows = wait_until_serving(args, rows)
        for row in rows:
            failed |= row["state"] != "serving"
            say(args, came_up_line(row, began_s))
    if args.json and rows:
        print_json({"instances": rows})
    raise_refusals(refused)
    return 1 if failed else 0


def drain(argv: list[str]) -> int:
    """`llumnix drain`: empties instances and stops them; returns once they are gone, with 1 if one
    serves on."""
    return _drain("drain", argv)


def remove(argv: list[str]) -> int:
    """`llumnix remove`: the same."""
    return _drain("remove", argv)


def undrain(argv: list[str]) -> int:
    """`llumnix undrain`: lets instances that are being drained serve on."""
    parser = instances_parser("undrain")
    args = parser.parse_args(argv)
    check_named(args)
    names = named(args, rows_at_first(args) if args.node else {})
    rows: list[Row] = []
    refused: list[LlumnixError] = []
    for name in names:
        path = path_of(name, "/undrain")
        try:
            rows.append(ask(args, "POST", path, wanted="state", timeout_s=ANSWER_TIMEOUT_S))
        except LlumnixError as error:
            refused.append(error)
        else:
            say(args, f"{rows[-1]['id']} is {rows[-1]['state']}")
    if args.json and rows:
        print_rows(rows)
    raise_refusals(refused)
    return 0


# -- what the others share


def path_of(instance: str, rest: str = "") -> str:
    """The route of an instance."""
    return f"{INSTANCES}/{quote(instance, safe='')}{rest}"


def check_named(args: argparse.Namespace) -> None:
    """`UsageError` unless the user names either instances or a node."""
    if not args.node and not args.instances:
        raise UsageError("name instances, as `llumnix status` shows them, or give --node NODE")
    if args.node and args.instances:
        raise UsageError("give instances or --node, not both")


def named(args: argparse.Namespace, rows: dict[str, Row]) -> list[str]:
    """The instances that the user means: those named, or those of a node. `rows`: all there are."""
    if not args.node:
        return list(dict.fromkeys(args.instances))
    found = [name for name, row in rows.items() if row["node"] == args.node]
    if not found:
        nodes = ", ".join(sorted({str(r["node"]) for r in rows.values() if r["node"]})) or "none"
        raise UsageError(f"--node {args.node}: no instance runs there; nodes with one: {nodes}")
    return found


def rows_at_first(args: argparse.Namespace) -> dict[str, Row]:
    """All instances, by id, before anything is ordered: no server is waited for."""
    return _rows(_list(args))


def rows_of(args: argparse.Namespace) -> dict[str, Row]:
    """The same, while something is waited for: a server that is busy is asked again."""
    return _rows(ask_again(args, INSTANCES, wanted="instances", timeout_s=ANSWER_TIMEOUT_S))


def _rows(body: Row) -> dict[str, Row]:
    return {row["id"]: row for row in body["instances"]}


def now(before: Row, rows: dict[str, Row]) -> Row | None:
    """What an instance is now; None if it is gone. Its id may be another's by now."""
    row = rows.get(before["id"])
    return row if row is not None and row.get("serial") == before.get("serial") else None


def order(
    args: argparse.Namespace,
    path: str,
    before: Row | None,
    taken: Callable[[Row], bool] = lambda row: False,
) -> Row:
    """What the server answers to an order about an instance. If no answer came, the order may have
    been carried out, and the id may be another instance's. So the order is given again only to the
    instance that is meant, `before`, and only unless it was `taken`."""

    def unless() -> Row | None:
        if before is None:  # There was none: the server may say so.
            return None
        row = now(before, rows_of(args)) or {**before, "state": "gone"}
        return row if row["state"] == "gone" or taken(row) else None

    return with_patience(
        lambda: ask(args, "POST", path, wanted="state", timeout_s=ANSWER_TIMEOUT_S), unless
    )


def raise_refusals(refused: list[LlumnixError]) -> None:
    """Raises what was refused as one error, each with its own words."""
    if len(refused) == 1:
        raise refused[0]
    if refused:
        usage = all(isinstance(error, UsageError) for error in refused)
        raise (UsageError if usage else LlumnixError)("; ".join(map(str, refused)))


def wait_until_serving(args: argparse.Namespace, added: list[Row]) -> list[Row]:
    """Waits until each of them serves, or will not by itself. Returns what became of them."""
    while True:
        rows = rows_of(args)
        seen = [now(row, rows) or {**row, "state": "gone", "why": None} for row in added]
        if not any(row["state"] in ("starting", "restarting") for row in seen):
            return seen
        time.sleep(POLL_S)


def came_up_line(row: Row, began_s: float) -> str:
    """What became of an instance that was waited for."""
    if row["state"] == "serving":
        return f"{row['id']} serves after {time.monotonic() - began_s:.1f} s"
    return f"{row['id']} is {row['state']}: {row['why'] or 'it was not to serve any more'}"


def drain_query(args: argparse.Namespace) -> str:
    """The time-out and `force` as a query."""
    query = {"timeout_s": args.timeout, "force": "true" if args.force else None}
    given = urlencode({name: value for name, value in query.items() if value is not None})
    return f"?{given}" if given else ""


def drain_flags(parser: argparse.ArgumentParser) -> None:
    """How long an instance is given to become empty."""
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help="stop it after S seconds, whatever it still holds: that goes on at others, as after a "
        "death (default: as the server has it, 300)",
    )
    parser.add_argument(
        "--force", action="store_true", help="stop it now; what it holds goes on at others likewise"
    )


def instances_parser(command: str) -> argparse.ArgumentParser:
    """The flags of a command about instances."""
    parser = server_parser(command)
    parser.add_argument(
        "instances", metavar="INSTANCE", nargs="*", help="ids, as `llumnix status` shows them"
    )
    parser.add_argument("--node", metavar="NODE", help="all instances of that node instead")
    return parser


def _list(args: argparse.Namespace) -> Row:
    return ask(args, "GET", INSTANCES, wanted="instances", timeout_s=ANSWER_TIMEOUT_S)


def say(args: argparse.Namespace, line: str) -> None:
    """A line for a person."""
    if not args.json:
        print(line, flush=True)


def print_rows(rows: list[Row]) -> None:
    """One instance as the server shows it, several as its list does."""
    print_json(rows[0] if len(rows) == 1 else {"instances": rows})


# -- drains


def _drain(command: str, argv: list[str]) -> int:
    parser = instances_parser(command)
    drain_flags(parser)
    args = parser.parse_args(argv)
    check_named(args)
    before = rows_at_first(args)
    began_s, query = time.monotonic(), drain_query(args)
    last: dict[str, Row] = {}
    refused: list[LlumnixError] = []
    for name in named(args, before):
        try:
            last[name] = order(args, path_of(name, f"/drain{query}"), before.get(name))
        except LlumnixError as error:
            refused.append(error)  # Those that were ordered before go on.
    under, taken_back = list(last), False
    while under:
        time.sleep(POLL_S)
        rows = rows_of(args)
        for name in list(under):
            row = now(last[name], rows)
            if row is not None:
                last[name] = row
            if row is None:
                say(args, _gone_line(last[name], time.monotonic() - began_s))
                last[name] = {**last[name], "state": "gone"}
            elif row["state"] not in ("draining", "stopping"):
                print(f"{name} is {row['state']}: its drain was taken back", file=_out(args))
                taken_back = True
            else:
                continue
            under.remove(name)
    if args.json and last:
        print_rows(list(last.values()))
    raise_refusals(refused)
    return 1 if taken_back else 0


def _out(args: argparse.Namespace) -> Any:
    return sys.stderr if args.json else sys.stdout


def _gone_line(row: Row, took_s: float) -> str:
    if "of its requests" in (row["why"] or ""):
        return f"{row['id']} is stopped after {took_s:.1f} s: {row['why']}"
    return f"{row['id']} is empty and stopped after {took_s:.1f} s"


def _status_lines(body: Row) -> list[str]:
    head = (
        "INSTANCE",
        "STATE",
        "NODE",
        "PID",
        "DEVICES",
        "KV TOKENS",
        "RUNNING",
        "WAITING",
        "RESTARTS",
    )
    rows = []
    for i in body["instances"]:
        total = i["kv_tokens_total"]
        rows.append((
            i["id"],
            i["state"],
            i["node"],
            i["pid"],
            " ".join(i["devices"]),
            "-" if total is None else f"{i['kv_tokens_used']}/{total}",
            i["running"],
            i["waiting"],
            i["restarts"],
        ))  # fmt: skip
    lines = table(head, rows)
    lines += [f"{i['id']}: {i['why']}" for i in body["instances"] if i["why"]]
    if body["controller"] != "up":
        lines.append("The controller is away: the frontend places requests by itself.")
    return lines
