"""When a deployment is ready, and what it lacks when it is not."""

import pytest

from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.supervision.readiness import FleetSeen, not_ready, serving
from llumnix.core.types import EngineIndex, InstanceId


def one(number: int, how: str) -> InstanceStatus:
    return InstanceStatus(
        id=InstanceId(f"i{number}"),
        state=how,
        hung=how == "hung",
        engine_index=EngineIndex(number),
        node=None,
        pid=None,
        devices=[],
        restarts=0,
        why=None,
        takes_requests=how in ("serving", "draining last"),
    )


@pytest.mark.parametrize(
    ("states", "least", "reason"),
    [
        (["serving", "serving"], 2, None),
        (["serving", "serving"], 1, None),
        (["serving"], 2, "too_few"),
        ([], 1, "too_few"),
        (["serving", "starting"], 2, "too_few"),
        (["serving", "draining"], 2, "too_few"),
        (["draining last"], 1, None),
        (["serving", "hung"], 1, None),
        (["serving", "hung"], 2, "stalled"),
        (["serving", "hung", "restarting"], 3, "too_few"),
        (["hung"], 1, "stalled"),
        (["failed"], 1, "too_few"),
    ],
)
def test_as_many_must_serve_as_are_asked_for(
    states: list[str], least: int, reason: str | None
) -> None:
    instances = [one(number, state) for number, state in enumerate(states)]
    assert not_ready(FleetSeen(instances=instances, stopping=False), least) == reason


def test_a_fleet_that_stops_is_not_ready_though_all_of_it_serves() -> None:
    instances = [one(0, "serving"), one(1, "serving")]
    assert serving(instances) == 2
    assert not_ready(FleetSeen(instances=instances, stopping=True), 1) == "stopping"
