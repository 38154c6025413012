"""Requests that may have killed their engine, at the frontend."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from llumnix.core.messages import MigrationRequested, Revive
from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.probation import CLEARED_AFTER
from llumnix.core.streams.states import StreamState
from llumnix.core.types import EngineIndex, RequestId
from llumnix.frontend.context import HttpRequest, current_http_request
from llumnix.frontend.http.control import OwnControl
from llumnix.frontend.http.routes import control_app
from llumnix.frontend.streams.digests import digest_of
from support.frontend import Front, front, request, tokens

from .test_reviving import order_in, say, sent_to, state, took, until

I0, I1, I2 = EngineIndex(0), EngineIndex(1), EngineIndex(2)
ON = SurvivalSettings()


def suspects(*names: str) -> frozenset[RequestId]:
    return frozenset(map(RequestId, names))


async def orders_at(one: Front, engine: int) -> dict[str, Revive]:
    """What was sent there again since the last look."""
    return {again.request_id: order_in(again) for again in await sent_to(one, engine)}


async def with_requests(one: Front, *names: str, engine: int = 0) -> None:
    """These run there, in this order, and have a token each."""
    for number, name in enumerate(names):
        await one.add_request(name, engine, prompt_token_ids=[number, 5, 6])
        one.take_in(tokens(engine, name, 1))
    await sent_to(one, engine)


async def test_suspects_go_one_by_one_and_the_innocent_at_once(tmp_path: Path) -> None:
    async with front(tmp_path, survival=ON) as one:
        await with_requests(one, "first", "second", "innocent")
        one.link.where = 1
        assert await one.client.lose(I0, blamed=True, suspects=suspects("first", "second")) == 0
        orders = await orders_at(one, 1)
        assert set(orders) == {"first", "innocent"}
        for order in orders.values():
            one.take_in(took(1, order))
        for number in range(1 + CLEARED_AFTER):
            assert await sent_to(one, 1) == [], number
            one.take_in(tokens(1, "first", 2))
            one.take_in(tokens(1, "innocent", 2))
        assert set(await orders_at(one, 1)) == {"second"}


async def test_the_end_of_one_that_is_tried_lets_the_next_one_go(tmp_path: Path) -> None:
    async with front(tmp_path, survival=ON) as one:
        await with_requests(one, "first", "second")
        one.link.where = 1
        await one.client.lose(I0, blamed=True, suspects=suspects("first", "second"))
        assert set(await orders_at(one, 1)) == {"first"}
        await one.client.abort_requests_async(["first"])
        assert set(await orders_at(one, 1)) == {"second"}


async def test_nobody_is_suspected_of_a_death_that_came_from_outside(tmp_path: Path) -> None:
    async with front(tmp_path, survival=ON) as one:
        await with_requests(one, "first", "second")
        one.link.where = 1
        await one.client.lose(I0, suspects=suspects("first", "second"))
        assert set(await orders_at(one, 1)) == {"first", "second"}


async def test_if_nothing_is_known_all_that_the_engine_had_are_suspects(tmp_path: Path) -> None:
    async with front(tmp_path, survival=ON) as one:
        await with_requests(one, "first", "second")
        await with_requests(one, "elsewhere", engine=1)
        one.link.where = 1
        await one.client.lose(I0, blamed=True)
        assert set(await orders_at(one, 1)) == {"first"}
        assert one.client.orphans.probation.verdict(RequestId("elsewhere")).value == "innocent"


async def test_each_engine_tries_another_one(tmp_path: Path) -> None:
    """The controller would send all of them to the same."""
    async with front(tmp_path, engines=3, survival=ON) as one:
        await with_requests(one, "first", "second", "third")
        one.link.where = 1
        await one.client.lose(I0, blamed=True)
        assert set(await orders_at(one, 1)) == {"first"}
        assert set(await orders_at(one, 2)) == {"second"}


async def died_twice(one: Front, name: str) -> None:
    """Engine 0 died of this request, and engine 1 does."""
    one.link.where = 1
    await one.client.lose(I0, blamed=True, suspects=suspects(name))
    orders = await orders_at(one, 1)
    for order in orders.values():
        one.take_in(took(1, order))
        one.take_in(tokens(1, order.request, 2))
    assert name in orders
    one.link.where = 2
    await one.client.lose(I1, blamed=True, suspects=suspects(name))


async def test_the_one_that_a_second_engine_dies_of_ends_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with front(tmp_path, engines=3, survival=ON) as one:
        await with_requests(one, "poison", "innocent")
        with caplog.at_level(logging.WARNING, "llumnix.frontend"):
            await died_twice(one, "poison")
        found = []
        while not one.client.outputs_queue.empty():
            found.append(one.client.outputs_queue.get_nowait())
        (failed,) = [item for item in found if hasattr(item, "why")]
        assert (failed.request, failed.status, failed.code) == (
            "poison", 500, "request_quarantined"
        )  # fmt: skip
        assert set(await orders_at(one, 2)) == {"innocent"}
        digest = digest_of(request("x", prompt_token_ids=[0, 5, 6]))
        (line,) = [m for m in caplog.messages if "quarantined" in m]
        assert line == (
            f"Request {digest[:16]} (prompt of 3 tokens, 2 tokens generated) is quarantined, "
            "since instances died of it."
        )


async def test_it_is_refused_when_it_is_sent_again_until_it_is_released(tmp_path: Path) -> None:
    async with front(tmp_path, engines=3, survival=ON) as one:
        await with_requests(one, "poison")
        await died_twice(one, "poison")
        http = HttpRequest(client_id=None)
        token = current_http_request.set(http)
        try:
            with pytest.raises(GracefulHTTPError, match="quarantine/") as refused:
                await one.add_request("again", 2, prompt_token_ids=[0, 5, 6])
        finally:
            current_http_request.reset(token)
        assert refused.value.http_status == 422
        assert http.code == "request_quarantined"
        assert len(one.client.streams) == 0
        await one.add_request("other", 2, prompt_token_ids=[0, 5, 7])
        transport = httpx.ASGITransport(control_app(one.client, OwnControl(one.client, None)))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            path = "/llumnix/v1/quarantine"
            (row,) = (await client.get(path)).json()["quarantine"]
            digest = digest_of(request("x", prompt_token_ids=[0, 5, 6]))
            assert 590 < row.pop("seconds_left") <= 600
            assert row == {
                "id": digest[:16],
                "client_id": "poison",
                "prompt_tokens": 3,
                "output_tokens": 2,
                "refused": 1,
            }
            assert (await client.delete(f"{path}/none")).status_code == 404
            assert (await client.delete(f"{path}/{row['id']}")).json() == {"released": 1}
            assert (await client.get(path)).json() == {"quarantine": []}
            assert (await client.delete(path)).json() == {"released": 0}
        await one.add_request("again", 2, prompt_token_ids=[0, 5, 6])


async def test_its_like_that_waits_for_its_turn_is_not_tried_either(tmp_path: Path) -> None:
    async with front(tmp_path, engines=3, survival=ON) as one:
        for name in ("poison", "copy"):
            await one.add_request(name, 0, prompt_token_ids=[0, 5, 6])
        await sent_to(one, 0)
        one.link.where = 1
        await one.client.lose(I0, blamed=True, suspects=suspects("poison", "copy"))
        assert set(await orders_at(one, 1)) == {"poison"}
        assert set(await orders_at(one, 2)) == {"copy"}
        await one.add_engine(3)
        one.link.where = 3
        await one.client.lose(I1, blamed=True, suspects=suspects("poison"))
        await one.client.lose(I2)
        await until(lambda: len(one.client.streams) == 0)
        assert one.due() == {"poison": ["error"], "copy": ["error"]}
        assert await sent_to(one, 3) == []


async def test_a_suspect_that_is_tried_is_not_moved_away(tmp_path: Path) -> None:
    async with front(tmp_path, engines=3, survival=ON) as one:
        await with_requests(one, "first")
        one.link.where = 1
        await one.client.lose(I0, blamed=True)
        (order,) = (await orders_at(one, 1)).values()
        one.take_in(took(1, order))
        wanted = MigrationRequested(request=RequestId("first"), destination=I2, why="balance")
        one.take_in(say(1, "first", wanted))
        await asyncio.sleep(0.01)
        assert state(one, "first") is StreamState.OWNED
        for _ in range(1 + CLEARED_AFTER):
            one.take_in(tokens(1, "first", 2))
        one.take_in(say(1, "first", wanted))
        await asyncio.sleep(0.01)
        assert state(one, "first") is StreamState.GRANTED


async def test_while_most_instances_are_down_suspects_wait_and_others_do_not(
    tmp_path: Path,
) -> None:
    async with front(tmp_path, engines=3, survival=ON) as one:
        await with_requests(one, "first", "innocent")
        await with_requests(one, "second", engine=1)
        one.client.engines.accept(I2, False)
        one.link.where = 2
        await one.client.lose(I0, blamed=True, suspects=suspects("first"))
        await one.client.lose(I1, blamed=True, suspects=suspects("second"))
        one.client.engines.accept(I2, True)
        assert set(await orders_at(one, 2)) == {"innocent"}
        await asyncio.sleep(0.3)
        assert (state(one, "first"), state(one, "second")) == (StreamState.ORPHAN,) * 2
        again = EngineIndex(4)  # The next run of the first instance.
        one.client.engines.expect(one.client.engines.name(I0), again, 0)
        engine = one.client.engines.get(again)
        assert engine is not None
        engine.ready.set_result(None)
        await until(lambda: StreamState.REVIVING in (state(one, "first"), state(one, "second")))


async def test_without_survival_nobody_is_suspected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with front(tmp_path) as one:
        await with_requests(one, "first")
        assert await one.client.lose(I0, blamed=True) == 1
        assert not any("suspects" in message for message in caplog.messages)


async def test_what_cannot_go_on_ends_with_a_code(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        http = HttpRequest(client_id=None)
        token = current_http_request.set(http)
        await one.add_request("first", 0)
        current_http_request.reset(token)
        await one.client.lose(I0)
        item: Any = one.client.outputs_queue.get_nowait()
        assert (item.code, http.code) == ("engine_died", "engine_died")


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"request_id": "other", "priority": 5, "arrival_time": 1.0, "cache_salt": "x"}, True),
        (
            {
                "sampling_params": SamplingParams(
                    max_tokens=50, output_kind=RequestOutputKind.FINAL_ONLY
                )
            },
            True,
        ),
        ({"prompt_token_ids": [1, 2]}, False),
        ({"prompt_token_ids": None, "prompt_embeds": torch.zeros(1, 4)}, False),
        (
            {"prompt_token_ids": None, "prompt_embeds": torch.ones(1, 4, dtype=torch.bfloat16)},
            False,
        ),
        ({"sampling_params": SamplingParams(max_tokens=50, temperature=0.5)}, False),
        ({"sampling_params": SamplingParams(max_tokens=50, extra_args={"a": 1})}, False),
        ({"lora_request": LoRARequest("a", 1, "/a")}, False),
    ],
)
def test_a_request_is_known_again_by_what_is_computed(fields: dict[str, Any], same: bool) -> None:
    assert (digest_of(request("a", **fields)) == digest_of(request("a"))) == same
