"""What is wrong with a fact that no part of llumnix would send.

A fact crosses sockets, so its types are right, and its numbers may be anybody's. The scheduler is
told of it only if they make sense together: it divides by some and indexes with others.
"""

from math import inf
from operator import attrgetter

from llumnix.core.events import Fact, FleetReported, InstanceLost, LoadReported, RequestArrived
from llumnix.core.load import LoadReport
from llumnix.core.types import ENGINE_INDEX_MAX

PROMPT_TOKENS_MAX = 2**40
_COUNTS = (
    "sequence", "kv_tokens_used", "kv_tokens_total", "prefill_tokens", "slots", "head_tokens",
    "moving_out", "moving_out_tokens", "moving_in", "kv_token_bytes", "preemptions", "steps",
    "finished", "finished_tokens", "moved_bytes",
)  # fmt: skip
_counts = attrgetter(*_COUNTS)
_SECONDS = ("steps_s", "moved_s", "stalled_s")
_seconds = attrgetter(*_SECONDS)
_of_a_class = attrgetter(
    "running", "waiting", "waiting_tokens", "waiting_shared", "waiting_prefill"
)


def why_malformed(fact: Fact, classes: int) -> str | None:
    """What is wrong with it, if anything. `classes`: of requests, in this deployment."""
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
    if report.classes and min(min(_of_a_class(c)) for c in report.classes) < 0:
        return "a class with a count below 0"
    if not all(0 <= seconds < inf for seconds in _seconds(report)):  # NaN is neither.
        return "seconds that are no time"
    return _index(report.engine_index)


def _index(index: int) -> str | None:
    return None if 0 <= index <= ENGINE_INDEX_MAX else f"an engine of index {index}"
