"""`llumnix requests`, `migrate` and `migrations`: the requests of a running server."""

import argparse
import sys
from typing import Any
from urllib.parse import urlencode

from llumnix.commands.printing import count, print_json, printable, shortened, table
from llumnix.commands.server_client import ask, server_parser
from llumnix.core.codes import MoveCode
from llumnix.core.messages import COPIES

REQUESTS = "/llumnix/v1/requests"
MIGRATIONS = "/llumnix/v1/migrations"
ANSWER_TIMEOUT_S = 15.0
MIGRATE_TIMEOUT_S = 300.0
SHOWN = 100


def requests(argv: list[str]) -> int:
    """`llumnix requests`: what is running or waiting, the newest first."""
    parser = server_parser("requests")
    parser.add_argument("--instance", metavar="INSTANCE", help="only those of that instance")
    parser.add_argument("--class", dest="priority_class", metavar="NAME", help="only of that class")
    parser.add_argument("--key", metavar="NAME", help="only of the key of that name")
    parser.add_argument("--older", type=float, metavar="S", help="only those that came S s ago")
    _limit_flag(parser)
    args = parser.parse_args(argv)
    query = {
        "instance": args.instance,
        "class": args.priority_class,
        "key": args.key,
        "older_s": args.older,
        "limit": args.limit,
    }
    body = _listed(args, REQUESTS, query, "requests")
    if args.json:
        print_json(body)
        return 0
    rows = [
        (
            shortened(r["id"]),
            r["instance"],
            r["class"],
            r["key"],
            r["prompt_tokens"],
            r["output_tokens"],
            f"{r['age_s']:.1f} s",
        )
        for r in reversed(body["requests"])
    ]
    print(
        "\n".join(table(("REQUEST", "INSTANCE", "CLASS", "KEY", "PROMPT", "OUTPUT", "AGE"), rows))
    )
    _say_more(body, len(rows))
    return 0


def migrations(argv: list[str]) -> int:
    """`llumnix migrations`: the last moves, the newest first."""
    parser = server_parser("migrations")
    parser.add_argument("--since", type=float, metavar="S", help="only those of the last S s")
    reasons = [code.value for code in MoveCode]
    parser.add_argument("--reason", choices=reasons, help="only those ordered for such a reason")
    parser.add_argument(
        "--outcome", choices=("running", "migrated", "aborted", "lost"), help="only such"
    )
    _limit_flag(parser)
    args = parser.parse_args(argv)
    query = {
        "since_s": args.since,
        "reason": args.reason,
        "outcome": args.outcome,
        "limit": args.limit,
    }
    body = _listed(args, MIGRATIONS, query, "migrations")
    if args.json:
        print_json(body)
        return 0
    head = ("MOVE", "REQUEST", "FROM", "TO", "OUTCOME", "TOKENS", "DOWNTIME", "AGO", "WHY")
    rows = [
        (
            m["id"],
            shortened(m["request_id"]),
            m["source"],
            m["destination"],
            m["outcome"],
            sum(s["tokens"] for s in m["stages"]),
            None if m["downtime_ms"] is None else f"{m['downtime_ms']:.1f} ms",
            f"{m['ago_s']:.0f} s",
            "; ".join(text for text in (m["why"], m["reason"]) if text),
        )
        for m in reversed(body["migrations"])
    ]
    print("\n".join(table(head, rows)))
    _say_more(body, len(rows))
    return 0


def migrate(argv: list[str]) -> int:
    """`llumnix migrate`: moves a request; 0 if it has moved, 1 if it has not."""
    parser = server_parser("migrate")
    parser.add_argument("request", metavar="REQUEST", help="its id, as `llumnix requests` shows it")
    parser.add_argument("--to", metavar="INSTANCE", help="default: the most free KV memory")
    parser.add_argument("--copy", choices=COPIES, default=COPIES[0], help="how its KV gets there")
    args = parser.parse_args(argv)
    order = {"request_id": args.request, "destination": args.to, "copy": args.copy}
    body = ask(
        args,
        "POST",
        MIGRATIONS,
        order,
        wanted="outcome",
        timeout_s=MIGRATE_TIMEOUT_S,
        silence="whether it was moved is unknown; GET /llumnix/v1/migrations tells",
    )
    if args.json:
        print_json(body)
    else:
        print(printable(_migration_line(body)))
    return 0 if body["outcome"] == "migrated" else 1


def _limit_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit", type=int, default=SHOWN, metavar="N", help=f"the newest N; default: {SHOWN}"
    )


def _listed(
    args: argparse.Namespace, path: str, query: dict[str, Any], wanted: str
) -> dict[str, Any]:
    given = urlencode({name: value for name, value in query.items() if value is not None})
    return ask(args, "GET", f"{path}?{given}", wanted=wanted, timeout_s=ANSWER_TIMEOUT_S)


def _say_more(body: dict[str, Any], shown: int) -> None:
    if (more := body["total"] - shown) > 0:
        print(f"{more} more; --limit shows them")
    if body["incomplete"]:
        print(f"{', '.join(body['incomplete'])} did not say theirs", file=sys.stderr)


def _migration_line(m: dict[str, Any]) -> str:
    line = f"{m['id']}: {m['request_id']} {m['source']} -> {m['destination']} {m['outcome']}"
    if m["outcome"] != "migrated":
        return f"{line}: {m['reason']}"
    stages = m["stages"]
    down = "unknown" if m["downtime_ms"] is None else f"{m['downtime_ms']:.1f} ms"
    line += (
        f": {count(sum(s['tokens'] for s in stages), 'token')}, "
        f"{sum(s['bytes'] for s in stages) / 1e6:.1f} MB, {count(len(stages), 'stage')}, "
        f"downtime {down}, total {m['total_ms']:.1f} ms"
    )
    return f"{line} ({m['reason']})" if m["reason"] else line
