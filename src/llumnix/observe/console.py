"""Lines to the user on standard output."""

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
