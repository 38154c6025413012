"""Lines to the user on standard output, and our log on standard error."""

import logging
import os
import sys


def say(text: str, *, prefix: str = "llumnix: ") -> None:
    """Prints one line. If its reader is gone, everything goes on all the same, above all a stop."""
    try:
        print(f"{prefix}{text}", flush=True)
    except OSError:
        # Later lines go nowhere. Else Python would fail again when it flushes at exit.
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)


def log_to_stderr() -> None:
    """Sends our own log lines to stderr, whatever the libraries do to the root logger."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("llumnix: %(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger("llumnix")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    # A line that cannot be written is lost. No traceback is to take its place.
    logging.raiseExceptions = False
