"""When an engine dies, its requests go on at another one, each once, with the tokens that its
client has."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from vllm.pooling_params import LateInteractionParams, PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackDecoder

from llumnix.core.events import Dispatch, RequestArrived
from llumnix.core.messages import REVIVE, MigrationEnded, Revive, TookOver
from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.states import StreamState
from llumnix.core.types import EngineIndex, RequestId
from llumnix.frontend.context import HttpRequest, current_http_request
from llumnix.frontend.streams.client import died
from llumnix.frontend.streams.revivable import why_never, why_not_now
from llumnix.wire import decode, encode
from support.frontend import Front, front, packed, request, tokens

I0, I1, I2 = EngineIndex(0), EngineIndex(1), EngineIndex(2)
ON = SurvivalSettings()
LATE = LateInteractionParams(mode="cache_query", query_key="k")


def say(engine: int, request: str, message: Any) -> bytes:
    output = EngineCoreOutput(request, [], kv_transfer_params={"llumnix": encode(message)})
    return packed(EngineCoreOutputs(engine_index=engine, outputs=[output]))


def took(engine: int, order: Revive) -> bytes:
    """The engine goes on with it."""
    message = TookOver(
        migration=order.migration,
        request=order.request,
        epoch=order.epoch,
        outputs=len(order.outputs),
        tail=[],
    )
    return say(engine, order.request, message)


def declined(engine: int, order: Revive, why: str = "no place") -> bytes:
    message = MigrationEnded(migration=order.migration, request=order.request, taken=False, why=why)
    return say(engine, order.request, message)


async def sent_to(one: Front, engine: int) -> list[EngineCoreRequest]:
    """The requests that were sent there since the last look."""
    decoder = MsgpackDecoder(EngineCoreRequest)
    frames = await one.heard(engine)
    return [decoder.decode(parts[1:]) for parts in frames if parts[0] == b"\x00"]


def order_in(request: EngineCoreRequest) -> Revive:
    more = (
        request.pooling_params.extra_kwargs
        if request.pooling_params is not None
        else request.sampling_params and request.sampling_params.extra_args
    )
    assert more is not None
    order = decode(more[REVIVE])
    assert isinstance(order, Revive)
    return order


async def until(what: Any) -> None:
    async with asyncio.timeout(5):
        while not what():
            await asyncio.sleep(0.01)


def state(one: Front, name: str) -> StreamState | None:
    stream = one.client.streams.get(RequestId(name))
    return None if stream is None else stream.state


async def test_a_request_goes_on_elsewhere_after_the_tokens_that_its_client_has(
    tmp_path: Path,
) -> None:
    async with front(tmp_path, survival=ON) as one:
        await one.add_request("a", 0)
        (first,) = await sent_to(one, 0)
        one.take_in(tokens(0, "a", 5, 6))
        one.link.where = 1
        assert await one.client.lose(I0) == 0
        (again,) = await sent_to(one, 1)
        order = order_in(again)
        assert order.outputs == [5, 6]
        assert order.destination == I1
        assert one.link.asked[-1].prompt_tokens == 3 + 2
        assert state(one, "a") is StreamState.REVIVING
        assert (one.client.in_flight(I0), one.client.in_flight(I1)) == (0, 1)
        one.take_in(tokens(0, "a", 7))  # The dead engine's, late.
        one.take_in(took(1, order))
        assert one.client.in_flight(I1) == 1
        one.take_in(tokens(1, "a", 8))
        one.take_in(tokens(0, "a", 7))
        one.take_in(tokens(1, "a", 9, finish_reason=FinishReason.LENGTH))
        assert one.due() == {"a": [5, 6, 8, 9, "length"]}
        assert len(one.client.streams) == 0
        # Sent again as it was, but for the order.
        assert again.sampling_params is not None
        again.sampling_params.extra_args = None
        assert msgspec.structs.asdict(again) == msgspec.structs.asdict(first)


async def test_what_the_client_sent_is_not_changed_by_being_sent_again(tmp_path: Path) -> None:
    async with front(tmp_path, survival=ON) as one:
        params = SamplingParams(
            max_tokens=9, prompt_logprobs=2, extra_args={"kv_transfer_params": {"x": 1}, "mine": 2}
        )
        await one.add_request("a", 0, sampling_params=params)
        one.take_in(tokens(0, "a", 5))
        one.link.where = 1
        await one.client.lose(I0)
        (again,) = await sent_to(one, 1)
        assert again.sampling_params is not None
        assert set(again.sampling_params.extra_args or ()) == {"mine", REVIVE}
        assert again.sampling_params.prompt_logprobs is None  # The client has them.
        assert params.prompt_logprobs == 2
        assert params.extra_args == {"kv_transfer_params": {"x": 1}, "mine": 2}


async def test_prompt_logprobs_are_asked_for_again_before_the_first_token(tmp_path: Path) -> None:
    async with front(tmp_path, survival=ON) as one:
        await one.add_request("a", 0, sampling_params=SamplingParams(prompt_logprobs=2))
        one.link.where = 1
        await one.client.lose(I0)
        (again,) = await sent_to(one, 1)
        assert again.sampling_params is not None
        assert again.sampling_params.prompt_logprobs == 2
        assert order_in(again).outputs == []


async def test_a_pooling_request_is_sent_again(tmp_path: Path) -> None:
    async with front(tmp_path, survival=ON) as one:
        params = PoolingParams(task="embed")
        await one.add_request("a", 0, sampling_params=None, pooling_params=params)
        one.link.where = 1
        await one.client.lose(I0)
        (again,) = await sent_to(one, 1)
        one.take_in(took(1, order_in(again)))
        assert state(one, "a") is StreamState.OWNED
        assert params.extra_kwargs is None


async def test_it_goes_on_after_several_deaths_and_no_more_than_it_has_lives(
    tmp_path: Path,
) -> None:
    async with front(tmp_path, engines=1, survival=SurvivalSettings(lives=2)) as one:
        await one.add_request("a", 0)
        for engine in (1, 2):
            await one.add_engine(engine)
            one.link.where = engine
            assert await one.client.lose(EngineIndex(engine - 1)) == 0
            (again,) = await sent_to(one, engine)
            one.take_in(took(engine, order_in(again)))
            one.take_in(tokens(engine, "a", engine))
        await one.add_engine(3)
        assert await one.client.lose(I2) == 1
        assert one.due() == {"a": [1, 2, "error"]}


async def test_an_engine_that_dies_as_it_takes_it_up_costs_a_life_too(tmp_path: Path) -> None:
    """Else a request that kills each engine that it comes to would kill them for ever."""
    async with front(tmp_path, engines=1, survival=SurvivalSettings(lives=2)) as one:
        await one.add_request("a", 0)
        for engine in (1, 2):
            await one.add_engine(engine)
            one.link.where = engine
            assert await one.client.lose(EngineIndex(engine - 1)) == 0
            assert len(await sent_to(one, engine)) == 1
        assert await one.client.lose(I2) == 1
        assert one.due() == {"a": ["error"]}


async def test_without_an_engine_it_waits_for_one(tmp_path: Path) -> None:
    async with front(tmp_path, engines=1, survival=ON) as one:
        await one.add_request("a", 0)
        one.take_in(tokens(0, "a", 5))
        assert await one.client.lose(I0) == 0
        await asyncio.sleep(0.2)
        assert state(one, "a") is StreamState.ORPHAN
        one.link.where = 1
        await one.add_engine(1)
        await until(lambda: state(one, "a") is StreamState.REVIVING)
        (again,) = await sent_to(one, 1)
        one.take_in(took(1, order_in(again)))
        one.take_in(tokens(1, "a", 6))
        assert one.due() == {"a": [5, 6]}


async def test_it_does_not_wait_for_ever(tmp_path: Path) -> None:
    async with front(tmp_path, engines=1, survival=SurvivalSettings(wait_s=0.2)) as one:
        await one.add_request("a", 0)
        await one.client.lose(I0)
        await until(lambda: len(one.client.streams) == 0)
        item: Any = one.client.outputs_queue.get_nowait()
        while not hasattr(item, "why"):
            item = one.client.outputs_queue.get_nowait()
        assert item.why == died("none could go on with it within 0 s")


async def test_one_that_is_declined_goes_to_another(tmp_path: Path) -> None:
    async with front(tmp_path, engines=3, survival=ON) as one:
        await one.add_request("a", 0)
        one.link.where = 1
        await one.client.lose(I0)
        (first,) = await sent_to(one, 1)
        one.link.where = 2
        one.take_in(declined(1, order_in(first)))
        await until(lambda: state(one, "a") is StreamState.REVIVING)
        (second,) = await sent_to(one, 2)
        assert order_in(second).epoch > order_in(first).epoch
        one.take_in(took(1, order_in(first)))  # Too late.
        assert state(one, "a") is StreamState.REVIVING
        one.take_in(took(2, order_in(second)))
        one.take_in(tokens(2, "a", 6))
        assert one.due() == {"a": [6]}


async def test_one_that_everybody_declines_ends_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llumnix.core.streams.survival.DECLINED_PAUSE_S", 0.001)
    async with front(tmp_path, survival=ON) as one:
        await one.add_request("a", 0)
        one.link.where = 1
        await one.client.lose(I0)
        asked = 0
        while len(one.client.streams):
            for again in await sent_to(one, 1):
                asked += 1
                one.take_in(declined(1, order_in(again), "its grammar is odd"))
        assert 3 < asked < 12
        found: list[Any] = []
        while not one.client.outputs_queue.empty():
            found.append(one.client.outputs_queue.get_nowait())
        assert any("its grammar is odd" in getattr(item, "why", "") for item in found)


async def test_one_that_vllm_refuses_as_it_comes_in_goes_to_another(tmp_path: Path) -> None:
    async with front(tmp_path, engines=3, survival=ON) as one:
        await one.add_request("a", 0)
        one.link.where = 1
        await one.client.lose(I0)
        assert len(await sent_to(one, 1)) == 1
        one.link.where = 2
        one.take_in(tokens(1, "a", finish_reason=FinishReason.ERROR))
        await until(lambda: len(one.link.asked) == 3)
        assert len(await sent_to(one, 2)) == 1
        assert one.due() == {}


async def test_a_client_that_hangs_up_ends_it_wherever_it_is(tmp_path: Path) -> None:
    async with front(tmp_path, engines=1, survival=ON) as one:
        await one.add_request("waits", 0)
        await one.add_request("goes", 0)
        await one.client.lose(I0)
        await one.client.abort_requests_async(["waits"])
        one.link.where = 1
        await one.add_engine(1)
        await until(lambda: state(one, "goes") is StreamState.REVIVING)
        (again,) = await sent_to(one, 1)
        assert again.request_id == "goes"
        await one.client.abort_requests_async(["goes"])
        assert [parts[0] for parts in await one.heard(1)] == [b"\x01"]
        one.take_in(took(1, order_in(again)))
        assert len(one.client.streams) == 0
        assert not one.client.orphans
        assert not one.client.orphans.taken_up


async def test_an_engine_takes_up_a_few_at_a_time_the_urgent_and_the_short_first(
    tmp_path: Path,
) -> None:
    async with front(tmp_path, engines=1, survival=SurvivalSettings(at_once=2)) as one:
        for name, priority, prompt in (
            ("long", 0, 9), ("short", 0, 2), ("urgent", -5, 9), ("middle", 0, 5),
        ):  # fmt: skip
            fields = {"priority": priority, "prompt_token_ids": list(range(prompt))}
            await one.add_request(name, 0, **fields)
        one.link.where = 1
        await one.client.lose(I0)
        await one.add_engine(1)
        came: list[str] = []
        while len(came) < 4:
            batch = await sent_to(one, 1)
            assert len(batch) <= 2
            came += [again.request_id for again in batch]
            for again in batch:
                one.take_in(took(1, order_in(again)))
            assert await sent_to(one, 1) == []  # Not before their first tokens.
            for again in batch:
                one.take_in(tokens(1, again.request_id, 5))
        assert came == ["urgent", "short", "middle", "long"]


async def test_one_that_moves_on_before_its_first_token_is_taken_up_no_more(tmp_path: Path) -> None:
    async with front(tmp_path, engines=3, survival=SurvivalSettings(at_once=1)) as one:
        await one.add_request("a", 0)
        one.link.where = 1
        await one.client.lose(I0)
        await until(lambda: state(one, "a") is StreamState.REVIVING)
        (again,) = await sent_to(one, 1)
        one.take_in(took(1, order_in(again)))
        stream, target = one.client.streams.get(RequestId("a")), one.client.engines.target(I2)
        assert stream is not None
        assert target is not None
        one.client.start_task(one.client.migrate(stream, target))
        await asyncio.sleep(0)
        assert one.client.orphans.engine_of(stream.request) == I1
        move = stream.grant
        assert move is not None
        taken: dict[str, Any] = {"migration": move.migration, "request": "a", "epoch": move.epoch}
        one.take_in(say(2, "a", TookOver(**taken, outputs=0, tail=[])))
        assert stream.owner == I2
        assert one.client.orphans.engine_of(stream.request) is None
        assert not one.client.orphans.taken_up


@pytest.mark.parametrize("emptied", [False, True])
async def test_it_goes_first_where_a_part_of_its_kv_may_be(tmp_path: Path, emptied: bool) -> None:
    """Unless no more requests are to go there."""
    async with front(tmp_path, engines=3, survival=ON) as one:
        await one.add_request("a", 0)
        stream = one.client.streams.get(RequestId("a"))
        target = one.client.engines.target(I2)
        assert stream is not None
        assert target is not None
        one.client.start_task(one.client.migrate(stream, target))
        await asyncio.sleep(0)
        one.link.where = 1
        await one.client.lose(I0)
        assert stream.grant is not None
        effects = one.client.streams.fate(stream.grant.migration, "declined")
        one.client.engines.accept(I2, not emptied)
        one.client._perform(effects, [])
        chosen = I1 if emptied else I2
        (again,) = await sent_to(one, chosen)
        assert order_in(again).destination == chosen


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"resumable": True}, "session"),
        (
            {
                "sampling_params": None,
                "pooling_params": PoolingParams(
                    task="token_embed",
                    late_interaction_params=LateInteractionParams(
                        mode="cache_query", query_key="k"
                    ),
                ),
            },
            "embedding",
        ),
        ({"prompt_token_ids": None, "prompt_embeds": torch.zeros(1, 2000)}, "kept_mb"),
    ],
)
async def test_what_cannot_outlive_its_engine_ends_at_once_and_says_why(
    tmp_path: Path, fields: dict[str, Any], why: str
) -> None:
    async with front(tmp_path, survival=SurvivalSettings(kept_mb=0.001)) as one:
        await one.add_request("a", 0, **fields)
        stream = one.client.streams.get(RequestId("a"))
        assert stream is not None
        assert stream.owner is not None
        assert await one.client.lose(stream.owner) == 1
        item: Any = one.client.outputs_queue.get_nowait()
        assert why in item.why


async def test_memory_that_is_kept_for_images_is_given_back(tmp_path: Path) -> None:
    async with front(tmp_path, survival=SurvivalSettings(kept_mb=0.01)) as one:
        for _ in range(5):
            embeds = torch.zeros(1, 2000)  # 8,000 bytes
            await one.add_request("a", 0, prompt_token_ids=None, prompt_embeds=embeds)
            stream = one.client.streams.get(RequestId("a"))
            assert stream is not None
            assert stream.info.sent is not None
            one.take_in(tokens(0, "a", 1, finish_reason=FinishReason.STOP))
            assert one.client._kept_bytes == 0
            one.due()


async def test_what_runner_v1_cannot_resume_goes_on_only_without_tokens(tmp_path: Path) -> None:
    async with front(tmp_path, survival=ON) as one:
        for name in ("none", "some"):
            embeds = torch.zeros(1, 8)
            await one.add_request(name, 0, prompt_token_ids=None, prompt_embeds=embeds)
        one.take_in(tokens(0, "some", 1))
        one.link.where = 1
        assert await one.client.lose(I0) == 1
        assert one.due() == {"some": [1, "error"]}
        (again,) = await sent_to(one, 1)
        assert again.request_id == "none"


async def test_a_stop_ends_what_waits(tmp_path: Path) -> None:
    async with front(tmp_path, engines=1, survival=ON) as one:
        await one.add_request("a", 0)
        await one.client.lose(I0)
        await one.client.abort_all()
        assert len(one.client.streams) == 0
        assert one.due() == {"a": ["abort"]}


async def test_a_client_is_shown_that_its_stream_lives_while_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llumnix.core.streams.survival.SHOWN_EVERY_S", 0.2)
    async with front(tmp_path, engines=1, survival=ON) as one:
        shown: list[float] = []
        http = HttpRequest(client_id=None, on_wait=lambda: shown.append(time.monotonic()))
        token = current_http_request.set(http)
        await one.add_request("a", 0)
        current_http_request.reset(token)
        await one.client.lose(I0)
        await until(lambda: len(shown) == 3)
        assert shown[2] - shown[0] > 0.3
        one.link.where = 1
        await one.add_engine(1)
        await until(lambda: state(one, "a") is StreamState.REVIVING)
        before = len(shown)
        await asyncio.sleep(0.5)
        assert len(shown) == before


async def test_it_waits_though_the_last_engine_goes_while_its_place_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with front(tmp_path, survival=ON) as one:
        await one.add_request("a", 0)
        one.link.where = 1
        place = one.link.place

        async def gone(asked: RequestArrived) -> Dispatch:
            one.client.engines.accept(I1, False)
            return await place(asked)

        monkeypatch.setattr(one.link, "place", gone)
        assert await one.client.lose(I0) == 0
        await until(lambda: len(one.link.asked) == 2)
        await asyncio.sleep(0.2)
        assert state(one, "a") is StreamState.ORPHAN
        assert one.due() == {}
        monkeypatch.setattr(one.link, "place", place)
        one.client.engines.accept(I1, True)
        await until(lambda: state(one, "a") is StreamState.REVIVING)


# -- what cannot outlive its engine


def config(**fields: Any) -> Any:
    given = {"v2": False, "aux": False, "mask": False, "extension": ""} | fields
    return SimpleNamespace(
        use_v2_model_runner=given["v2"],
        aux_output_config=SimpleNamespace(enabled=given["aux"]),
        model_config=SimpleNamespace(return_sampling_mask=given["mask"]),
        parallel_config=SimpleNamespace(worker_extension_cls=given["extension"]),
    )


def test_what_only_the_engine_kept_cannot_outlive_it() -> None:
    late = PoolingParams(task="token_embed", late_interaction_params=LATE)
    plain, session = request("r"), request("r", resumable=True)
    scored = request("r", sampling_params=None, pooling_params=late)
    embedded = request("r", sampling_params=None, pooling_params=PoolingParams(task="embed"))
    for kept, what in ((plain, config()), (embedded, config()), (plain, config(v2=True))):
        assert why_never(kept, what) is None
    for lost, what, why in (
        (session, config(), "it is a session"),
        (scored, config(), "it is scored against an embedding"),
        (plain, config(aux=True), "the engine kept what comes with its last token"),
        (plain, config(mask=True), "the engine kept what comes with its last token"),
    ):
        assert (why_never(lost, what) or "").startswith(why)


def test_with_tokens_only_plain_prompts_go_on_in_model_runner_v1() -> None:
    plain, images = request("r"), request("r", mm_features=["an image"])
    embeds = request("r", prompt_token_ids=None)
    both = request("r", prompt_embeds=object())
    for any_of_them in (plain, images, embeds, both):
        assert why_not_now(any_of_them, config(extension="a.B"), 0) is None, "it has no token"
        assert why_not_now(any_of_them, config(extension="a.B", v2=True), 5) is None
    assert why_not_now(plain, config(), 5) is None
    for lost, what, why in (
        (plain, config(extension="a.B"), "with a --worker-extension-cls of your own"),
        (images, config(), "it has multimodal inputs and tokens"),
        (embeds, config(), "its prompt is embeddings"),
        (both, config(), "its prompt is embeddings"),
    ):
        assert (why_not_now(lost, what, 5) or "").startswith(why)
