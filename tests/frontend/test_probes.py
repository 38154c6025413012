"""What probes are answered, and what becomes of those that are wrong."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.exceptions import HTTPException

from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.supervision.readiness import FleetSeen
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.frontend.door import probes
from llumnix.frontend.door.probes import Probes


def instance(name: str, state: str = "serving", **more: Any) -> InstanceStatus:
    given: dict[str, Any] = {
        "id": InstanceId(name), "state": state, "hung": state == "hung",
        "engine_index": EngineIndex(0), "node": None, "pid": None, "devices": [], "restarts": 0,
        "why": None, "takes_requests": state == "serving", "step": "up", "for_s": 4.5,
    }  # fmt: skip
    return InstanceStatus(**(given | more))


def client(
    *instances: InstanceStatus, stopping: bool = False, ready_min: int = 1
) -> httpx.AsyncClient:
    async def fleet() -> FleetSeen:
        return FleetSeen(instances=instances, stopping=stopping)

    return of(fleet, ready_min)


def of(fleet: Callable[[], Awaitable[FleetSeen]], ready_min: int = 1) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(Probes(fleet, ready_min))
    return httpx.AsyncClient(transport=transport, base_url="http://t")


async def test_it_is_ready_while_enough_instances_serve() -> None:
    two = instance("i0"), instance("i1", "starting", step="loading", for_s=12.0)
    async with client(*two) as http:
        answer = await http.get("/ready")
        assert answer.status_code == 200
        assert answer.json() == {
            "ready": True, "phase": "serving", "reason": None, "serving": 1, "min": 1,
            "instances": [
                {"id": "i0", "state": "serving", "step": "up", "for_s": 4.5},
                {"id": "i1", "state": "starting", "step": "loading", "for_s": 12.0},
            ],
        }  # fmt: skip
        assert "retry-after" not in answer.headers
        assert (await http.head("/ready")).status_code == 200
        answer = await http.get("/ready?min=2")
        assert (answer.status_code, answer.json()["reason"]) == (503, "too_few")
        assert (answer.json()["serving"], answer.json()["min"]) == (1, 2)
        assert answer.headers["x-llumnix-reason"] == "too_few"
        assert int(answer.headers["retry-after"]) > 0


async def test_a_hung_instance_does_not_count_and_is_named() -> None:
    async with client(instance("i0"), instance("i1", "hung")) as http:
        assert (await http.get("/ready")).status_code == 200
        answer = await http.get("/ready?min=2")
        assert (answer.status_code, answer.json()["reason"]) == (503, "stalled")
        assert answer.json()["instances"][1]["state"] == "hung"


async def test_the_flag_says_how_many_must_serve_unless_the_probe_does() -> None:
    async with client(instance("i0"), ready_min=2) as http:
        assert (await http.get("/ready")).status_code == 503
        assert (await http.get("/ready?min=1")).status_code == 200


async def test_while_it_stops_it_lives_and_is_not_ready() -> None:
    async with client(instance("i0"), stopping=True) as http:
        answer = await http.get("/ready")
        assert (answer.status_code, answer.json()["phase"]) == (503, "stopping")
        assert answer.json()["reason"] == "stopping"
        assert (await http.get("/live")).status_code == 200


@pytest.mark.parametrize(
    "query", ["min=", "min=0", "min=-1", "min=two", "min=1.5", "min=9999999999999", "min=%C2%B2"]
)
async def test_a_number_that_is_none_is_refused(query: str) -> None:
    async with client(instance("i0")) as http:
        answer = await http.get("/ready?" + query)
        assert answer.status_code == 400
        assert "whole number of instances" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/live", "/ready"])
async def test_a_probe_is_read_and_nothing_else(path: str) -> None:
    async with client(instance("i0")) as http:
        for method in ("POST", "DELETE", "PUT"):
            answer = await http.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


async def test_without_the_main_process_it_is_not_ready_and_says_so_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "ANSWER_S", 0.05)

    async def hangs() -> FleetSeen:
        await asyncio.sleep(60)
        raise AssertionError

    async def closed() -> FleetSeen:
        raise HTTPException(503, "The main process does not answer; try again.")

    for fleet in (hangs, closed):
        async with of(fleet) as http:
            async with asyncio.timeout(5):
                answer = await http.get("/ready")
            assert (answer.status_code, answer.json()["reason"]) == (503, "no_answer")
            assert (await http.get("/live")).status_code == 200
