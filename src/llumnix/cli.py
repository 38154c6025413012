"""The command `llumnix`."""

import argparse
import json
import os
import sys
from typing import Any

from llumnix import __version__
from llumnix.errors import LlumnixError, UsageError

USAGE = """usage: llumnix COMMAND ...

  serve [MODEL] [--instances N] [any flag of `vllm serve`]
          serve vLLM's OpenAI API over several vLLM instances
  status [--url URL] [--api-key KEY] [--json]
          show the instances of a running `llumnix serve`

`llumnix serve --help` and `llumnix status --help` say more.
"""
STATUS_TIMEOUT_S = 5.0


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status (2 on bad input)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        match argv[:1]:
            case ["serve"]:
                from llumnix.cluster.serve import serve

                return serve(argv)
            case ["status"]:
                return status(argv[1:])
            case ["--version"] | ["-V"]:
                print(__version__)
                return 0
            case [] | ["--help"] | ["-h"]:
                print(USAGE, end="")
                return 0 if argv else 2
            case [unknown, *_]:
                raise UsageError(f"no command {unknown!r}; use serve or status")
    except UsageError as error:
        print(f"llumnix: error: {error}", file=sys.stderr)
        return 2
    except LlumnixError as error:
        print(f"llumnix: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 2


def status(argv: list[str]) -> int:
    """`llumnix status`: the instances of a running server, as a table or as JSON."""
    import httpx

    parser = argparse.ArgumentParser(prog="llumnix status")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"), help="if it wants one")
    parser.add_argument("--json", action="store_true", help="the server's answer as it is")
    args = parser.parse_args(argv)
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    try:
        answer = httpx.get(
            f"{args.url.rstrip('/')}/llumnix/v1/instances",
            headers=headers,
            timeout=STATUS_TIMEOUT_S,
        )
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise UsageError(
            f"no llumnix answers at {args.url} ({error}): start `llumnix serve`, or give --url"
        ) from error
    if answer.status_code == 401:
        raise UsageError("the server wants a key: give --api-key KEY")
    if answer.status_code != 200:
        raise UsageError(f"{args.url} is no llumnix server (status {answer.status_code})")
    body = answer.json()
    print(json.dumps(body, indent=2) if args.json else _table(body))
    return 0


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
