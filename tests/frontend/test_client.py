"""Whose word moves a request, and what becomes of one that is aborted before it has a place."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from llumnix.core.events import Dispatch, RequestArrived
from llumnix.core.messages import MigrationRequested
from llumnix.core.types import EngineIndex, RequestId
from llumnix.wire import encode
from support.frontend import front, packed


@pytest.mark.parametrize(("engine", "orders"), [(0, 1), (2, 0)], ids=["its owner", "another"])
async def test_only_the_owner_of_a_request_has_it_moved(
    tmp_path: Path, engine: int, orders: int
) -> None:
    async with front(tmp_path, engines=3) as one:
        await one.add_request("r", 0)
        wish = MigrationRequested(request=RequestId("r"), destination=EngineIndex(1), why="balance")
        said = EngineCoreOutput("r", [], kv_transfer_params={"llumnix": encode(wish)})
        one.take_in(packed(EngineCoreOutputs(engine_index=engine, outputs=[said])))
        sent = await one.heard(0)
        assert sum(b"llumnix_migrate" in b"".join(frames) for frames in sent) == orders
        assert len(one.client.migrations.recent()) == orders


async def test_a_request_that_is_aborted_while_it_is_placed_reaches_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with front(tmp_path, engines=1) as one:
        asked, answered, place = asyncio.Event(), asyncio.Event(), one.link.place

        async def slow(request: RequestArrived) -> Dispatch:
            asked.set()
            await answered.wait()
            return await place(request)

        monkeypatch.setattr(one.link, "place", slow)
        adding = asyncio.ensure_future(one.add_request("gone", 0))
        await asked.wait()
        await one.client.abort_requests_async(["gone"])
        answered.set()
        await adding
        assert len(one.client.streams) == 0
        assert await one.heard(0) == []
