"""/health says what a new request would get."""

from itertools import count
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.exceptions import EngineDeadError

from llumnix.core.events import NoInstance, RefusalCode, RequestArrived
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.frontend.client import FleetClient
from llumnix.frontend.context import HttpRequest, RefusedError, current_http_request
from llumnix.frontend.llm import FleetLLM
from support.frontend import Front, front
from support.frontend import request as request_of


class LLM(FleetLLM):
    """Has a client, and nothing to shut down."""

    def __init__(self, client: FleetClient, stopping: bool) -> None:
        self.engine_core, self.stopping, self.output_handler = client, stopping, None

    def __del__(self) -> None:
        pass


async def health(client: FleetClient, *, stopping: bool = False) -> int:
    try:
        await LLM(client, stopping).check_health()
    except EngineDeadError:
        return 503
    return 200


async def request(one: Front, name: str) -> int:
    try:
        await one.add_request(name, 0)
    except GracefulHTTPError as error:
        return int(error.http_status)
    return 200


@pytest.mark.parametrize("code", ["overloaded", "queue_full"])
async def test_a_request_that_the_controller_turns_away_leaves_nothing(
    tmp_path: Path, code: RefusalCode
) -> None:
    async with front(tmp_path) as one:
        asked: list[RequestArrived] = []

        async def place(fact: RequestArrived) -> NoInstance:
            asked.append(fact)
            return NoInstance(request=fact.request, why="7 wait", code=code, retry_s=6.4)

        one.link.place = place  # type: ignore[assignment]
        http = HttpRequest(client_id=None)
        token = current_http_request.set(http)
        try:
            with pytest.raises(RefusedError, match="busy: 7 wait") as raised:
                await one.client.add_request_async(request_of("r1"))
        finally:
            current_http_request.reset(token)
        assert int(raised.value.http_status) == 429
        assert (http.code, http.retry_s) == (code, 6.4)
        assert len(one.client.streams) == 0
        assert await one.heard(0) == await one.heard(1) == []
        assert not asked[0].again
        assert await health(one.client) == 200  # It serves, though not this request.


async def test_health_and_new_requests_agree_whatever_the_instances_do(tmp_path: Path) -> None:
    found, names = [], count()
    async with front(tmp_path, engines=0) as one:
        i0, i1 = EngineIndex(0), EngineIndex(1)

        async def both() -> None:
            found.append(await health(one.client))
            assert found[-1] == await request(one, f"r{next(names)}")

        await both()  # None is there.
        one.client.engines.expect(InstanceId("i9"), EngineIndex(9), 2)
        await both()  # One starts.
        await one.add_engine(0)
        await one.add_engine(1)
        await both()
        one.client.engines.accept(i0, False)
        await both()
        one.client.engines.accept(i1, False)
        await both()  # Both drain: alive, and closed to new requests.
        one.client.engines.accept(i0, True)
        await both()
        await one.client.lose(i0)
        await both()
        one.client.engines.accept(i1, True)
        await both()
        assert await health(one.client, stopping=True) == 503
    assert found == [503, 503, 200, 200, 503, 200, 503, 200]
