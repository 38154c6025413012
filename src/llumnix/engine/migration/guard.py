"""Keeps exceptions of migrations away from the engine's busy loop, which they would end.

Rules
- A call that can be refused is: `describe`, `reserve`, `admit`, `ready`, `reach`, `commit`.
- A pull that cannot begin has failed.
- Cleaning up is tried again between the next steps, `TRIES_MAX` times in all.
- A request that cannot be put back into the batch is freed, and its client told.
- Any other exception goes on to the host, which has the migration ended (`Llumlet.failed`).
"""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from llumnix.core.migration.port import EnginePort, Refusal
from llumnix.core.types import RequestId

logger = logging.getLogger("llumnix.engine")
T = TypeVar("T")

TRIES_MAX = 3
LOG_EVERY_S = 10.0
"""An exception of the same kind from the same call is logged no more often."""
KINDS_MAX = 100
"""Kinds of exceptions that are told apart."""


class ErrorLog:
    """Logs exceptions, each kind at most every `LOG_EVERY_S`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged: dict[tuple[str, str], float] = {}
        self._left_out: dict[tuple[str, str], int] = {}

    def note(self, what: str, error: Exception) -> str:
        """Logs that `what` ended with this exception. Returns the reason, in one line."""
        kind, now = (what, type(error).__name__), self._clock()
        why = f"{kind[1]}: {error}"
        if now - self._logged.get(kind, -LOG_EVERY_S) < LOG_EVERY_S:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return why
        if len(self._logged) >= KINDS_MAX:
            self._logged.clear()
        self._logged[kind] = now
        left_out = self._left_out.pop(kind, 0)
        logger.error(
            "A migration's %s failed: %s%s", what, why,
            f" (and {left_out} times before this)" if left_out else "",
            exc_info=error,
        )  # fmt: skip
        return why

    def keep(self, what: str, call: Callable[[], T], otherwise: T) -> T:
        """What the call returns, or `otherwise` after an exception."""
        try:
            return call()
        except Exception as error:
            self.note(what, error)
            return otherwise


class GuardedPort:
    """An `EnginePort` in front of another one. `pull_failed` is told the ticket of a pull that
    could not begin, and why; `lost` a request that could not be put back, and the client index of
    its frontend."""

    def __init__(
        self,
        port: EnginePort,
        errors: ErrorLog,
        pull_failed: Callable[[int, str], None],
        lost: Callable[[RequestId, int], None],
    ) -> None:
        self._port = port
        self._errors = errors
        self._pull_failed = pull_failed
        self._lost = lost
        self._again: list[tuple[str, RequestId, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._port, name)

    def describe(self, *args: Any) -> Any:
        """As the port does, or refuses."""
        return self._or_refuse("describe", args)

    def reserve(self, *args: Any) -> Any:
        """As the port does, or refuses."""
        return self._or_refuse("reserve", args)

    def admit(self, *args: Any) -> Any:
        """As the port does, or refuses."""
        return self._or_refuse("admit", args)

    def ready(self, *args: Any) -> Any:
        """As the port does, or refuses."""
        return self._or_refuse("ready", args)

    def reach(self, *args: Any) -> Any:
        """As the port does, or refuses."""
        return self._or_refuse("reach", args)

    def commit(self, *args: Any) -> Any:
        """As the port does, or refuses."""
        return self._or_refuse("commit", args)

    def pull(self, request: RequestId, ticket: int, *args: Any) -> None:
        """As the port does, or it has failed at once."""
        try:
            self._port.pull(request, ticket, *args)
        except Exception as error:
            self._pull_failed(ticket, self._errors.note("pull", error))

    def unpin(self, request: RequestId) -> None:
        """As the port does, now or a little later."""
        self._clean("unpin", request)

    def release(self, request: RequestId) -> None:
        """As the port does, now or a little later."""
        self._clean("release", request)

    def drop(self, request: RequestId) -> None:
        """As the port does, now or a little later."""
        self._clean("drop", request)

    def resume(self, request: RequestId) -> None:
        """As the port does, or frees the request and has its client told."""
        client = self._port.client(request)
        try:
            self._port.resume(request)
        except Exception as error:
            self._errors.note("resume", error)
            self._clean("release", request)
            self._lost(request, client)

    def retry(self) -> None:
        """Between two steps, cleans up what could not be cleaned up before."""
        again, self._again = self._again, []
        for name, request, tries in again:
            self._clean(name, request, tries)

    def _or_refuse(self, name: str, args: tuple[Any, ...]) -> Any:
        try:
            return getattr(self._port, name)(*args)
        except Exception as error:
            return Refusal(why=self._errors.note(name, error))

    def _clean(self, name: str, request: RequestId, tries: int = 0) -> None:
        try:
            getattr(self._port, name)(request)
        except Exception as error:
            self._errors.note(name, error)
            if tries + 1 < TRIES_MAX:
                self._again.append((name, request, tries + 1))
