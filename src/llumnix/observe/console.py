"""Lines to the user on standard output."""

import os
import sys


def say(text: str, *, prefix: str = "llumnix: ") -> None:
    """Prints one line. That its reader is gone must stop nothing, least of all a stop."""
    try:
        print(f"{prefix}{text}", flush=True)
    except OSError:
        # From here on the lines go nowhere; Python would fail once more when it flushes at exit.
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)
