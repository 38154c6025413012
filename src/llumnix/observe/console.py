"""Lines to the user on standard output, and our log on standard error: text, or JSON."""

import logging
import os
import sys
from typing import Any

from llumnix.observe.lines import JsonLines, TextLines, json_line

FORMATS = ("text", "json")
_json_as: list[str] = []
"""How this process is called in lines of JSON; empty while lines are text."""


def say(text: str, *, prefix: str = "llumnix: ", error: bool = False, **fields: Any) -> None:
    """Prints one line. If its reader is gone, everything goes on all the same, above all a stop.
    `fields` are more of a line of JSON. `error`: on standard error."""
    stream = sys.stderr if error else sys.stdout
    if _json_as:
        process = f"{_json_as[0]} {os.getpid()}"
        line = json_line("ERROR" if error else "INFO", "llumnix", process, text, **fields)
    else:
        line = f"{prefix}{text}"
    try:
        print(line, file=stream, flush=True)
    except OSError:
        # Later lines go nowhere. Else Python would fail again when it flushes at exit.
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)


def lines_are_json() -> bool:
    """Whether lines of this process are JSON."""
    return bool(_json_as)


def log_to_stderr(form: str = "text", *, process: str = "main") -> None:
    """Sends our own log lines to stderr, whatever the libraries do to the root logger. `form`: one
    of `FORMATS`; `process` is what lines of JSON call this one."""
    _json_as[:] = [process] if form == "json" else []
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(process) if form == "json" else TextLines())
    ours = logging.getLogger("llumnix")
    for before in list(ours.handlers):
        ours.removeHandler(before)
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    if form == "json":
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").handlers = [handler]
    # A line that cannot be written is lost. No traceback is to take its place.
    logging.raiseExceptions = False
