"""Reads again, on an order, all that a running server can take: its keys, and the scheduler's
settings."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from llumnix.core.keys import NamedKey
from llumnix.core.settings import SchedulerSettings
from llumnix.errors import UsageError
from llumnix.reload.key_file import KeyRing
from llumnix.reload.settings_file import Changed, Given, SettingsFile


class Reloading:
    """What one deployment reads again: keys, and settings if `take` carries out those that have
    changed."""

    def __init__(
        self,
        ring: KeyRing,
        settings: SettingsFile | None = None,
        take: Callable[[SchedulerSettings], None] = lambda _: None,
    ) -> None:
        self.ring = ring
        self._settings = settings or SettingsFile(Given(settings=SchedulerSettings()))
        self._take = take
        self._one = asyncio.Lock()

    def __bool__(self) -> bool:
        return bool(self.ring or self._settings)

    @asynccontextmanager
    async def done(self) -> AsyncIterator[dict[str, Any]]:
        """Reads all files, then takes what they say; what that changes, as JSON. `UsageError` if
        one is bad, and nothing has changed then. Another reload waits until the block has ended,
        else a later one could read a file first."""
        async with self._one:
            keys, changed = await asyncio.to_thread(self._read)
            if changed.now or changed.engines:
                self._take(changed.settings)
            self._settings.take(changed)
            settings = {"now": changed.now, "engines": changed.engines, "start": changed.start}
            yield {**self.ring.replace(keys), "settings": settings}

    def _read(self) -> tuple[Collection[NamedKey], Changed]:
        if not self:
            raise UsageError(
                "there is nothing to read again: the server has no --keys, --scheduler-config or "
                "--config file"
            )
        return self.ring.read() if self.ring else (), self._settings.read()
