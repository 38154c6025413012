"""The command `llumnix`."""

import argparse
import json
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from llumnix.core.messages import COPIES
from llumnix.errors import LlumnixError, UsageError
from llumnix.server_client import ask, server_parser
from llumnix.versions import check_versions, versions_line

USAGE = """usage: llumnix COMMAND ...

  serve [MODEL] [--instances N] [any flag of `vllm serve`]
          serve vLLM's OpenAI API over several vLLM instances
  status [SERVER]
          show the instances of a running `llumnix serve`
  top [--once] [SERVER]
          show instances, rates and decisions as they change
  migrate REQUEST [--to INSTANCE] [--copy staged|blocking|recompute] [SERVER]
          move a running request to another instance
  drain INSTANCE [--timeout S] [--force] [SERVER]
          move everything away from an instance and stop it
  undrain INSTANCE [SERVER]
          let it serve on
  simulate [--policy P,P] [--trace NAME|FILE] [--rate R] [--instances N] [--report FILE] ...
          the same scheduler and migrations in virtual time: which policy, how many instances
  profile [MODEL] [any engine flag of vLLM] --out FILE
          time one engine's steps, for `simulate --profile FILE`
  replay LOG [--json]
          run the decisions of an event log again, and compare
  --version
          llumnix's version, and those of vLLM, Ray and Python here

SERVER: [--url URL | --uds PATH] [--api-key KEY | --api-key-file FILE] [--cacert FILE] [--json];
LLUMNIX_URL, and LLUMNIX_ADMIN_API_KEY or VLLM_API_KEY, stand for what is not given

`llumnix COMMAND --help` says more.
"""
ANSWER_TIMEOUT_S = 5.0
MIGRATE_TIMEOUT_S = 300.0
DRAIN_POLL_S = 0.1


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status (2 on bad input)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        match argv[:1]:
            case ["serve"]:
                check_versions()
                from llumnix.cluster.serve import serve

                return serve(argv)
            case ["status"]:
                return status(argv[1:])
            case ["top"]:
                from llumnix.top import top

                return top(argv[1:])
            case ["migrate"]:
                return migrate(argv[1:])
            case ["drain"]:
                return drain(argv[1:])
            case ["undrain"]:
                return undrain(argv[1:])
            case ["simulate"]:
                from llumnix.sim.command import simulate

                return simulate(argv[1:])
            case ["profile"]:
                check_versions()
                from llumnix.sim.profiling import profile

                return profile(argv[1:])
            case ["replay"]:
                return replay(argv[1:])
            case ["--version"] | ["-V"]:
                print(versions_line())
                return 0
            case [] | ["--help"] | ["-h"]:
                print(USAGE, end="")
                return 0 if argv else 2
            case [unknown, *_]:
                raise UsageError(
                    f"no command {unknown!r}; use serve, status, top, migrate, drain, undrain, "
                    "simulate, profile or replay"
                )
    except UsageError as error:
        print(f"llumnix: error: {error}", file=sys.stderr)
        return 2
    except LlumnixError as error:
        print(f"llumnix: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001
        # A bug, or a fault that nobody foresaw: the traceback, then one line.
        traceback.print_exc()
        what = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"llumnix: unexpected {what}; the traceback is above", file=sys.stderr)
        return 1
    return 2


def status(argv: list[str]) -> int:
    """`llumnix status`: the instances of a running server, as a table or as JSON."""
    args = server_parser("status").parse_args(argv)
    path = "/llumnix/v1/instances"
    body = ask(args, "GET", path, wanted="instances", timeout_s=ANSWER_TIMEOUT_S)
    print(json.dumps(body, indent=2) if args.json else _table(body))
    return 0


def migrate(argv: list[str]) -> int:
    """`llumnix migrate`: moves a request; 0 if it has moved, 1 if it has not."""
    parser = server_parser("migrate")
    parser.add_argument("request", metavar="REQUEST", help="its id, as /llumnix/v1/requests has it")
    parser.add_argument("--to", metavar="INSTANCE", help="default: the most free KV memory")
    parser.add_argument("--copy", choices=COPIES, default=COPIES[0], help="how its KV gets there")
    args = parser.parse_args(argv)
    order = {"request_id": args.request, "destination": args.to, "copy": args.copy}
    body = ask(
        args,
        "POST",
        "/llumnix/v1/migrations",
        order,
        wanted="outcome",
        timeout_s=MIGRATE_TIMEOUT_S,
        silence="whether it was moved is unknown; GET /llumnix/v1/migrations tells",
    )
    print(json.dumps(body, indent=2) if args.json else _migration_line(body))
    return 0 if body["outcome"] == "migrated" else 1


def drain(argv: list[str]) -> int:
    """`llumnix drain`: empties an instance and stops it; returns once it is gone."""
    parser = _instance_parser("drain")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help="cut off what it still holds after S seconds (default: as the server has it, 300)",
    )
    parser.add_argument("--force", action="store_true", help="cut off what it holds now")
    args = parser.parse_args(argv)
    began = time.monotonic()
    query = {"timeout_s": args.timeout, "force": "true" if args.force else None}
    given = urlencode({name: value for name, value in query.items() if value is not None})
    path = f"/llumnix/v1/instances/{quote(args.instance, safe='')}/drain"
    path += f"?{given}" if given else ""
    body = ask(args, "POST", path, wanted="state", timeout_s=ANSWER_TIMEOUT_S)
    while body is not None:
        time.sleep(DRAIN_POLL_S)
        listed = ask(
            args, "GET", "/llumnix/v1/instances", wanted="instances", timeout_s=ANSWER_TIMEOUT_S
        )
        last, body = body, next((i for i in listed["instances"] if i["id"] == args.instance), None)
        if body is not None and body["state"] not in ("draining", "stopping"):
            print(f"{args.instance} is {body['state']}: its drain was taken back")
            return 1
    took_s = time.monotonic() - began
    if args.json:
        print(json.dumps({**last, "state": "gone"}, indent=2))
    elif "of its requests" in (last["why"] or ""):
        print(f"{args.instance} is stopped after {took_s:.1f} s: {last['why']}")
    else:
        print(f"{args.instance} is empty and stopped after {took_s:.1f} s")
    return 0


def undrain(argv: list[str]) -> int:
    """`llumnix undrain`: lets an instance that is being drained serve on."""
    args = _instance_parser("undrain").parse_args(argv)
    path = f"/llumnix/v1/instances/{quote(args.instance, safe='')}/undrain"
    body = ask(args, "POST", path, wanted="state", timeout_s=ANSWER_TIMEOUT_S)
    print(json.dumps(body, indent=2) if args.json else f"{body['id']} is {body['state']}")
    return 0


def _instance_parser(command: str) -> argparse.ArgumentParser:
    parser = server_parser(command)
    parser.add_argument("instance", metavar="INSTANCE", help="its id, as `llumnix status` shows it")
    return parser


def replay(argv: list[str]) -> int:
    """`llumnix replay`: 0 if the log's decisions and steps come out the same again, else 1."""
    from llumnix.observe.replay import DIFFERENCES_MAX
    from llumnix.observe.replay import replay as run_again

    parser = argparse.ArgumentParser(prog="llumnix replay")
    parser.add_argument("log", metavar="LOG", type=Path, help="what --event-log wrote")
    parser.add_argument("--json", action="store_true", help="counts and differences as JSON")
    args = parser.parse_args(argv)
    result = run_again(args.log)
    found = result.differences
    if args.json:
        print(json.dumps(asdict(result), indent=2))
        return 1 if found else 0
    print(
        f"{_count(result.facts, 'fact')}, {_count(result.decisions, 'decision')} and "
        f"{_count(result.steps, 'migration step')} run again: "
        + (_count(len(found), "difference") if found else "no difference")
        + (" or more" if len(found) >= DIFFERENCES_MAX else "")
    )
    if result.dropped:
        print(f"{_count(result.dropped, 'line')} missing: what follows them is not replayed")
    if result.skipped:
        print(f"{_count(result.skipped, 'fact')} left out: the log lacks their scheduler's start")
    for difference in found:
        print(difference)
    return 1 if found else 0


# -- what is printed


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _migration_line(m: dict[str, Any]) -> str:
    line = f"{m['id']}: {m['request_id']} {m['source']} -> {m['destination']} {m['outcome']}"
    if m["outcome"] != "migrated":
        return f"{line}: {m['reason']}"
    stages = m["stages"]
    down = "unknown" if m["downtime_ms"] is None else f"{m['downtime_ms']:.1f} ms"
    line += (
        f": {_count(sum(s['tokens'] for s in stages), 'token')}, "
        f"{sum(s['bytes'] for s in stages) / 1e6:.1f} MB, {_count(len(stages), 'stage')}, "
        f"downtime {down}, total {m['total_ms']:.1f} ms"
    )
    return f"{line} ({m['reason']})" if m["reason"] else line


def _table(body: dict[str, Any]) -> str:
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
    rows = [head]
    for i in body["instances"]:
        kv = (
            "-" if i["kv_tokens_total"] is None else f"{i['kv_tokens_used']}/{i['kv_tokens_total']}"
        )
        cells = (
            i["id"],
            i["state"],
            i["node"],
            i["pid"],
            " ".join(i["devices"]),
            kv,
            i["running"],
            i["waiting"],
            i["restarts"],
        )
        rows.append(tuple("-" if c in (None, "") else str(c) for c in cells))
    widths = [max(len(row[c]) for row in rows) for c in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines += [f"{i['id']}: {i['why']}" for i in body["instances"] if i["why"]]
    if body["controller"] != "up":
        lines.append("The controller is away: the frontend places requests by itself.")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
