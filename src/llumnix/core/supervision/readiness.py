"""Decides whether a deployment is ready for requests: what a probe asks.

An instance counts if requests may be sent to it and it answers them. A drained instance counts
while it takes requests all the same, because no other does. Otherwise the last pod that answers
would be taken out of service.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llumnix.core.supervision.lifecycle import InstanceStatus

Reason = Literal["loading", "stopping", "stalled", "too_few", "no_answer", "no_frontend"]
"""Why it is not ready. `stalled`: instances hang, and with them there would be enough. `no_answer`:
the process that has the fleet does not say. `no_frontend`: of several none is there to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSeen:
    """What the fleet says of itself."""

    instances: Sequence[InstanceStatus]
    stopping: bool  # whether a stop has begun, though requests may still be let in


def serving(instances: Sequence[InstanceStatus]) -> int:
    """How many instances take requests and answer them."""
    return sum(each.takes_requests for each in instances)


def not_ready(fleet: FleetSeen, least: int) -> Reason | None:
    """Why the fleet is not ready; None if it is, with `least` instances or more."""
    if fleet.stopping:
        return "stopping"
    there = serving(fleet.instances)
    if there >= least:
        return None
    hung = sum(each.hung for each in fleet.instances)
    return "stalled" if there + hung >= least else "too_few"
