"""What a test has a forked process do. It is found by name there, so it stands in a module."""

import os
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Forked:
    """A process's start: what it does after its end is up to `ends`."""

    slot: int
    client: int
    folder: str
    ends: int | None = None  # its exit status at once; None: it stays


def run(start: Forked) -> None:
    """Says who it is, and stays or ends."""
    with open(f"{start.folder}/{start.client}", "w") as file:
        file.write(f"{os.getpid()} {os.getppid()}")
    if start.ends is not None:
        os._exit(start.ends)
    time.sleep(60)
