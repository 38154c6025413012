"""The event log: facts, decisions, steps of migrations, requests; one JSON object a line.

All processes of a deployment append to the same file (on their own host); a line is written with
one call, so lines never mix. `at` is the writer's monotonic clock in seconds, `time` the wall
clock; lines of one writer (`who`) are in the order in which things happened. observe/replay.py
runs the pure core on it again, and its requests are a trace for the simulator (sim/traces.py).
"""

import logging
import os
import time
from typing import Any

import msgspec

from llumnix.core.events import Decision, Fact
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import MigrationId

logger = logging.getLogger("llumnix")
_encoder = msgspec.json.Encoder()


class EventLog:
    """One writer's end of the log at `path`; with None it writes nothing."""

    def __init__(self, path: str | None, *, who: str) -> None:
        self._who = who
        self._file: int | None = None
        if path is not None:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def started(self, settings: SchedulerSettings) -> None:
        """A scheduler begins, knowing nothing but its settings. Keys are not written."""
        self._write("started", time.monotonic(), {"settings": settings.without_keys()})

    def fact(self, fact: Fact, at: float) -> None:
        """A fact that went into the scheduler at that time."""
        self._write("fact", at, {"name": type(fact).__name__, "body": fact})

    def decision(self, decision: Decision, at: float) -> None:
        """A decision that came out."""
        self._write("decision", at, {"name": type(decision).__name__, "body": decision})

    def step(self, role: str, migration: MigrationId, event: str, state: str, action: str) -> None:
        """A transition of one side of a migration."""
        if self._file is not None:
            step = {"role": role, "migration": migration}
            self._write(
                "step", time.monotonic(), {**step, "event": event, "state": state, "action": action}
            )

    def migration(self, shown: dict[str, Any]) -> None:
        """A migration as its frontend sees it: when it is ordered, and when it has ended."""
        self._write("migration", time.monotonic(), {"body": shown})

    def request(self, shown: dict[str, Any]) -> None:
        """A request as its frontend saw it, when it is over."""
        self._write("request", time.monotonic(), {"body": shown})

    def _write(self, kind: str, at: float, rest: dict[str, Any]) -> None:
        if self._file is not None:
            line = {"at": at, "time": time.time(), "who": self._who, "kind": kind, **rest}
            try:
                os.write(self._file, _encoder.encode(line) + b"\n")
            except OSError as error:
                # A full disk must not stop an engine.
                logger.error("The event log ends here (%s): %s", self._who, error.strerror)
                self.close()
