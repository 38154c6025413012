"""The scheduler's settings, which may be read again while the server runs.

They come from the same places as at the start: the file of --scheduler-config or the --config file,
with flags of the command line and variables before them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llumnix.core.scheduling.intake.changes import When, changes, taken
from llumnix.core.settings import SchedulerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the command line, variables and files say."""

    settings: SchedulerSettings
    others: Mapping[str, Any] = field(default_factory=dict)  # all other flags that are no default


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """What has changed since they were taken last."""

    settings: SchedulerSettings  # from now on
    now: list[str]  # knobs that count at once
    engines: list[str]  # knobs that count for engines that start from now on
    start: list[str]  # knobs and flags that count from the next start of llumnix


class SettingsFile:
    """The settings of one deployment, as they count. `read` reads them again; None where no file
    has any."""

    def __init__(self, given: Given, read: Callable[[], Given] | None = None) -> None:
        self._counts = given
        self._read = read

    def __bool__(self) -> bool:
        return self._read is not None

    def read(self) -> Changed:
        """What has changed; nothing without a file. `UsageError` if a file is bad."""
        before = self._counts
        given = before if self._read is None else self._read()
        knobs = changes(before.settings, given.settings)
        old, new = before.others, given.others
        flags = sorted(n for n in {**old, **new} if old.get(n) != new.get(n))
        return Changed(
            settings=taken(before.settings, given.settings),
            now=[knob for knob, when in knobs if when is When.AT_ONCE],
            engines=[knob for knob, when in knobs if when is When.BY_ENGINES],
            start=[knob for knob, when in knobs if when is When.AT_START] + flags,
        )

    def take(self, changed: Changed) -> None:
        """This counts from now on. What needs a new start is named again by the next `read`."""
        self._counts = Given(settings=changed.settings, others=self._counts.others)
