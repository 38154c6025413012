"""/health says what a new request would get."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.exceptions import EngineDeadError

from llumnix.core.types import EngineIndex, InstanceId
from llumnix.frontend.client import FleetClient
from llumnix.frontend.llm import FleetLLM


class Client(FleetClient):
    """Knows engines, and has no socket."""

    def __init__(self) -> None:
        self._engines, self._rotation = {}, 0
        self.streams: Any = SimpleNamespace(instances={}, count=lambda _: 0)
        self.resources: Any = SimpleNamespace(engine_dead=False)


class LLM(FleetLLM):
    """Has a client, and nothing to shut down."""

    def __init__(self, client: FleetClient, stopping: bool) -> None:
        self.engine_core, self.stopping, self.output_handler = client, stopping, None

    def __del__(self) -> None:
        pass


async def health(client: FleetClient, stopping: bool = False) -> int:
    try:
        await LLM(client, stopping).check_health()
    except EngineDeadError:
        return 503
    return 200


def request(client: FleetClient) -> int:
    try:
        client._place_alone()
    except GracefulHTTPError:
        return 503
    return 200


async def test_health_and_new_requests_agree_whatever_the_instances_do() -> None:
    client = Client()
    indexes = [EngineIndex(0), EngineIndex(1)]
    found = []

    async def both() -> None:
        found.append(await health(client))
        assert found[-1] == request(client)

    await both()  # None is there.
    for index in indexes:
        client.expect(InstanceId(f"i{index}"), index, index)
    await both()  # They start.
    for index in indexes:
        client._engines[index].ready.set_result(None)
    await both()
    client.accept(indexes[0], False)
    await both()
    client.accept(indexes[1], False)
    await both()  # Both drain: alive, and closed to new requests.
    client.accept(indexes[0], True)
    await both()
    del client._engines[indexes[0]]
    await both()
    assert found == [503, 503, 200, 200, 503, 200, 503]
    client.accept(indexes[1], True)
    assert await health(client, stopping=True) == 503
