"""`llumnix config`: what `llumnix serve` would start with, or what a running server was started
with."""

import os
from typing import Any

from llumnix.commands.printing import count, print_json, table
from llumnix.commands.server_client import ask, server_parser
from llumnix.errors import UsageError
from llumnix.versions import check_versions

CONFIG = "/llumnix/v1/config"
RELOAD = "/llumnix/v1/reload"
ANSWER_TIMEOUT_S = 5.0
RELOAD_TIMEOUT_S = 20.0
VALUE_MAX = 80
WHEN = {
    "now": "counts now",
    "engines": "counts for engines that start from now on (`llumnix restart`)",
    "start": "counts from the next start of the server",
}
"""When settings count that a server has read again."""
USAGE = """usage: llumnix config check [--json] [MODEL] [any flag of `llumnix serve`]
          reads all of it as `llumnix serve` would, without Ray, engines or GPU
       llumnix config show [SERVER]
          what a running server was started with
"""


def config(argv: list[str]) -> int:
    """`llumnix config check` and `show`."""
    match argv:
        case ["check", *flags]:
            return _check(flags)
        case ["show", *flags]:
            return _show(flags)
        case ["--help"] | ["-h"]:
            print(USAGE, end="")
            return 0
    raise UsageError("config: say `check` or `show`; `llumnix config --help` explains both")


def _check(flags: list[str]) -> int:
    """Prints what is not a default, and where from; `UsageError` as `serve` has it."""
    as_json = "--json" in flags
    flags = [word for word in flags if word != "--json"]
    if {"--help", "-h"} & set(flags):
        print(USAGE, end="")
        return 0
    check_versions()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # The other is for the answer.
    from llumnix.frontend.arguments import parse, settle_variables
    from llumnix.observe.console import say

    settle_variables()
    command = parse(["serve", *flags], say)
    _print(command.args.settings, as_json)
    return 0


def _show(flags: list[str]) -> int:
    args = server_parser("config show").parse_args(flags)
    body = ask(args, "GET", CONFIG, wanted="settings", timeout_s=ANSWER_TIMEOUT_S)
    _print(body["settings"], args.json)
    return 0


def reload(argv: list[str]) -> int:
    """`llumnix reload`: has a server read its keys and the scheduler's settings again; 1 if a
    frontend has not confirmed."""
    args = server_parser("reload").parse_args(argv)
    body = ask(args, "POST", RELOAD, wanted="keys", timeout_s=RELOAD_TIMEOUT_S)
    unconfirmed = ", ".join(body.get("unconfirmed", ()))
    if args.json:
        print_json(body)
        return 1 if unconfirmed else 0
    parts = [
        f"{word} {', '.join(body[word])}" for word in ("added", "changed", "removed") if body[word]
    ]
    settings = body.get("settings", {})
    if parts or not any(settings.values()):
        print(f"{count(body['keys'], 'key')}: {'; '.join(parts) or 'nothing has changed'}")
    for when, says in WHEN.items():
        if knobs := settings.get(when):
            print(f"{says}: {', '.join(knobs)}")
    if unconfirmed:
        print(f"not confirmed by {unconfirmed}: what stands still has them once it goes on")
    return 1 if unconfirmed else 0


def _print(settings: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json({"settings": settings})
        return
    rows = [(s["name"], _short(s["value"]), s["source"]) for s in settings]
    print("\n".join(table(("FLAG", "VALUE", "FROM"), rows)))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= VALUE_MAX else text[: VALUE_MAX - 1] + "…"
