"""What is wrong with a fact that no part of llumnix would send.

A fact crosses sockets. Its types are checked there, its numbers are not. The scheduler divides by
some of them and indexes with others, so it takes a fact only if its numbers make sense.
"""

from collections.abc import Callable
from dataclasses import fields
from math import inf
from operator import attrgetter

from llumnix.core.events import Fact, FleetReported, InstanceLost, LoadReported, RequestArrived
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.types import ENGINE_INDEX_MAX

PROMPT_TOKENS_MAX = 2**40


def _all_of(kind: type, of: type) -> Callable[[object], tuple[float, ...]]:
    """Reads all fields of that kind; a class has several."""
    return attrgetter(*(f.name for f in fields(of) if f.type is kind))


_counts = _all_of(int, LoadReport)
_seconds = _all_of(float, LoadReport)
_of_a_class = _all_of(int, ClassLoad)


def why_malformed(fact: Fact, classes: int) -> str | None:
    """What is wrong with the fact, if anything. `classes`: how many classes of requests there
    are."""
    match fact:
        case LoadReported(report=report):
            return _report(report, classes)
        case RequestArrived(prompt_tokens=tokens):
            if not 0 <= tokens <= PROMPT_TOKENS_MAX:
                return f"a prompt of {tokens} tokens"
        case InstanceLost(engine_index=index):
            return _index(index)
        case FleetReported(starting=starting, given_up=given_up):
            if starting < 0 or given_up < 0:
                return f"{starting} instances starting, {given_up} given up"
    return None


def _report(report: LoadReport, classes: int) -> str | None:
    if len(report.classes) not in (0, classes):
        return f"{len(report.classes)} classes of requests, and there are {classes}"
    if min(_counts(report)) < 0 or report.block_tokens < 1:
        return "a count below 0"
    for known in report.classes:
        if min(_of_a_class(known)) < 0:
            return "a class with a count below 0"
    for seconds in _seconds(report):
        if not 0 <= seconds < inf:  # NaN is neither.
            return "seconds that are no time"
    return _index(report.engine_index)


def _index(index: int) -> str | None:
    return None if 0 <= index <= ENGINE_INDEX_MAX else f"an engine of index {index}"
