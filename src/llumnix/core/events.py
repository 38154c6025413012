"""Facts that go into the scheduler, and decisions that come out.

All are frozen values. Facts report what was seen; nothing in them is derived. Every decision
carries its reason (`why`).
"""

from dataclasses import dataclass

from llumnix.core.load import LoadReport
from llumnix.core.types import EngineIndex, InstanceId, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestArrived:
    """A frontend asks where to put a request. `prompt_tokens`: tokens. `priority`: vLLM's, lower
    is served earlier."""

    request: RequestId
    prompt_tokens: int
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReported:
    """An instance pushed its load."""

    report: LoadReport


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLost:
    """This run of the instance's engine is over; nothing that it says later counts."""

    instance: InstanceId
    engine_index: EngineIndex


Fact = RequestArrived | LoadReported | InstanceLost


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Put the request on this run of this instance."""

    request: RequestId
    instance: InstanceId
    engine_index: EngineIndex
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NoInstance:
    """No instance can take the request now."""

    request: RequestId
    why: str


Decision = Dispatch | NoInstance
