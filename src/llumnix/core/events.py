"""Facts that go into the scheduler, and decisions that come out.

All are frozen values. Facts report what was seen; nothing in them is derived. Every decision
carries its reason (`why`).
"""

from dataclasses import dataclass, field
from typing import Literal

from llumnix.core.codes import DispatchCode, MoveCode
from llumnix.core.reports import LoadReport
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, OrderId, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestArrived:
    """A frontend asks where to put a request."""

    request: RequestId
    prompt_tokens: int
    priority: int = 0  # vLLM's number, lower is served earlier
    prefix: tuple[
        int, ...
    ] = ()  # hashes of the prompt's leading blocks (core/prefixes.py), if wanted
    again: bool = False  # whether it was let in before, and its engine died


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReported:
    """An instance pushed its load."""

    report: LoadReport


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixesChanged:
    """What changed in the prefix cache of this run of an instance's engine."""

    instance: InstanceId
    engine_index: EngineIndex
    stored: tuple[int, ...] = ()  # blocks that it keeps from now on
    removed: tuple[int, ...] = ()  # blocks that it does not keep any more
    cleared: bool = False  # it dropped all that it had, before those `stored`


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLost:
    """This run of the instance's engine is over; nothing that it says later counts."""

    instance: InstanceId
    engine_index: EngineIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed. Load may have to be moved."""


DrainedBy = Literal["user", "signal", "scheduler"]
"""Who asked for an instance to be emptied: a user by HTTP, a signal to its process, or the
scheduler itself, which takes back no drain but its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReported:
    """What the supervisor of the instances has."""

    starting: int  # instances, those that are started again included
    serving: tuple[InstanceId, ...]
    draining: tuple[InstanceId, ...]
    drained_by: dict[InstanceId, DrainedBy] = field(default_factory=dict)  # for each of `draining`
    given_up: int = 0
    """Running total of instances that could not be started, or crashed too often in a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsChanged:
    """The scheduler's settings are these from now on. What takes a new start is as it was."""

    settings: SchedulerSettings


Fact = (
    RequestArrived
    | LoadReported
    | PrefixesChanged
    | InstanceLost
    | Tick
    | FleetReported
    | SettingsChanged
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Put the request on this run of this instance."""

    request: RequestId
    instance: InstanceId
    engine_index: EngineIndex
    why: str
    code: DispatchCode = DispatchCode.SOONEST


RefusalCode = Literal["no_instance", "queue_full", "overloaded"]
"""Why: none is known that could, or too many wait, of the request's class or of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoInstance:
    """No instance takes the request now."""

    request: RequestId
    why: str
    code: RefusalCode = "no_instance"
    retry_s: float | None = None  # when it may be tried again, if that can be foretold


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveLimit:
    """Which requests of one class may be moved, by their KV tokens."""

    rank: int  # of the class
    tokens_min: int  # of a running request, at least
    tokens_wanted: int  # the same, if there is one
    tokens_max: int  # of a running request, at most
    waiting_max: int  # that a waiting request needs, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveOrder:
    """The source's llumlet is to move one request to the destination. It picks the request, since
    only it knows them (core/migration/victim.py)."""

    order: OrderId
    source: InstanceId
    source_engine: EngineIndex
    destination: InstanceId
    destination_engine: EngineIndex
    limits: tuple[MoveLimit, ...]  # one for each class that may be moved
    why: str
    code: MoveCode = MoveCode.BALANCE
    source_sequence: int = 0  # of the source's load report that the order was computed from


@dataclass(frozen=True, slots=True, kw_only=True)
class AddInstances:
    """Start that many more instances, but no more than there are to be in all: the fleet may hear
    of the next decision before it has carried out this one."""

    count: int
    total: int  # of those that serve or are coming
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainInstance:
    """Empty this instance, then stop it."""

    instance: InstanceId
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UndrainInstance:
    """Let this instance, which is being emptied, serve on."""

    instance: InstanceId
    why: str


ScalingDecision = AddInstances | DrainInstance | UndrainInstance
Decision = Dispatch | NoInstance | MoveOrder | ScalingDecision
