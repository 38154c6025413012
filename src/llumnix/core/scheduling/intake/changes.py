"""Which settings a running deployment takes, and from when on.

Rules
- What the scheduler alone goes by counts at once: how it moves, scales and refuses.
- What an engine goes by counts for engines that start from then on, so a rolling restart brings it
  everywhere.
- The policy, the classes but for their `queue_max`, and what the HTTP processes go by count from
  the next start of llumnix.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

from llumnix.core.settings import PriorityClass, SchedulerSettings


class When(Enum):
    """From when on a changed knob counts."""

    AT_ONCE = "now"
    BY_ENGINES = "engines"  # those that start from then on
    AT_START = "start"  # the next one of llumnix


_SECTIONS = {
    "policy": When.AT_START,
    "priorities": When.AT_START,
    "queue": When.BY_ENGINES,
    "migration": When.AT_ONCE,
    "scaling": When.AT_ONCE,
    "survival": When.AT_START,
    "admission": When.AT_ONCE,
}
_OTHERWISE = {
    "priorities.aging_s": When.BY_ENGINES,
    "priorities.preempt": When.BY_ENGINES,
    "migration.min_stay": When.BY_ENGINES,
}
_CLASSES = "priorities.classes"


def changes(before: SchedulerSettings, after: SchedulerSettings) -> list[tuple[str, When]]:
    """The knobs that differ, as `section.knob`, and from when on each counts."""
    now = dict(_leaves(after))
    return [
        (knob, _when(knob, value, now[knob]))
        for knob, value in _leaves(before)
        if value != now[knob]
    ]


def taken(before: SchedulerSettings, after: SchedulerSettings) -> SchedulerSettings:
    """The settings after a change, as far as it counts before the next start."""
    kept: dict[str, dict[str, Any]] = {}  # by section, since the knobs of one go together
    for knob, when in changes(before, after):
        section, _, name = knob.rpartition(".")
        if when is When.AT_START:
            kept.setdefault(section, {})[name] = getattr(
                getattr(before, section) if section else before, name
            )
    whole = kept.pop("", {})
    parts = {section: replace(getattr(after, section), **old) for section, old in kept.items()}
    return replace(after, **whole, **parts)


def _leaves(settings: SchedulerSettings) -> Iterator[tuple[str, Any]]:
    for section in fields(settings):
        value = getattr(settings, section.name)
        if is_dataclass(value):
            for knob in fields(value):
                yield f"{section.name}.{knob.name}", getattr(value, knob.name)
        else:
            yield section.name, value


def _when(knob: str, before: Any, after: Any) -> When:
    if knob == _CLASSES and _unlimited(before) == _unlimited(after):
        return When.AT_ONCE
    return _OTHERWISE.get(knob, _SECTIONS[knob.partition(".")[0]])


def _unlimited(classes: tuple[PriorityClass, ...]) -> list[PriorityClass]:
    return [replace(c, queue_max=None) for c in classes]
