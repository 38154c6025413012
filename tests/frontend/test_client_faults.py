"""A fault in one message, or in dealing with it, ends at most that message's request."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason, UtilityOutput
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import SchedulerStats

from llumnix.core.messages import (
    DrainRequested,
    Migrate,
    MigrationEnded,
    MigrationRequested,
    TookOver,
)
from llumnix.core.streams.effects import Orphaned
from llumnix.core.streams.table import StreamTable
from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId
from llumnix.frontend.engines.calls import (
    CALL_PAUSE_S,
    CALL_TRIES_MAX,
    FATE_ASKED_MAX,
    FATE_POLL_S,
)
from llumnix.frontend.engines.outputs import COMPLAIN_EVERY_S, Complaints, FailedRequest
from llumnix.frontend.grammars import BAD_GRAMMAR
from llumnix.frontend.streams.client import StreamClient, died
from llumnix.frontend.streams.migration_records import MigrationRecords
from llumnix.frontend.streams.reviving import RevivingClient
from llumnix.wire import encode
from support.frontend import Front, front, packed, ready_payload, tokens

I0, I1, I2 = EngineIndex(0), EngineIndex(1), EngineIndex(2)


def in_band(engine: int, request: str, payload: Any) -> bytes:
    output = EngineCoreOutput(request, [], kv_transfer_params={"llumnix": payload})
    return packed(EngineCoreOutputs(engine_index=engine, outputs=[output]))


def took_over(request: str, epoch: int = 1, outputs: int = 0, tail: tuple[int, ...] = ()) -> bytes:
    return encode(
        TookOver(
            migration=MigrationId("m0"),
            request=RequestId(request),
            epoch=Epoch(epoch),
            outputs=outputs,
            tail=list(tail),
        )
    )


def ended(request: str, *, taken: bool) -> bytes:
    return encode(
        MigrationEnded(
            migration=MigrationId("m0"), request=RequestId(request), taken=taken, why="no room"
        )
    )


ODD_PAYLOADS = st.one_of(
    st.none(), st.binary(max_size=40), st.text(max_size=5), st.just([1]),
    st.integers(-(2**63), 2**64 - 1),  # msgpack has no others.
    st.sampled_from(
        [
            took_over("victim"),
            took_over("victim", epoch=7, outputs=10**9),
            took_over("nobody"),
            ended("victim", taken=True),
            ended("nobody", taken=False),
            encode(MigrationRequested(request=RequestId("victim"), destination=I2, why="x")),
            encode(DrainRequested(request=RequestId(""), why="x")),
        ]
    ),
)  # fmt: skip


@st.composite
def garbage(draw: st.DrawFn) -> list[bytes]:
    """The frames of one odd message. None of it is a good message of engine 1."""
    kind = draw(st.sampled_from(["bytes", "dead", "call", "cut", "changed", "in band", "nobody"]))
    if kind == "bytes":
        return draw(st.lists(st.binary(max_size=60), max_size=3))
    if kind == "dead":
        return [b"ENGINE_CORE_DEAD"]
    if kind == "call":
        answer = UtilityOutput(call_id=draw(st.integers(0, 2**63)), failure_message="x")
        return [packed(EngineCoreOutputs(utility_output=answer))]
    if kind == "in band":
        name = draw(st.sampled_from(["victim", "", "nobody"]))
        return [in_band(draw(st.integers(0, 3)), name, draw(ODD_PAYLOADS))]
    if kind == "nobody":
        stats = SchedulerStats(num_running_reqs=draw(st.integers(0, 2**62)))
        output = EngineCoreOutput("nobody", [5], finish_reason=None)
        outputs = EngineCoreOutputs(
            engine_index=draw(st.integers(2, 2**40)), outputs=[output], scheduler_stats=stats
        )
        return [packed(outputs)]
    whole = tokens(0, "victim", 1, 2, 3)
    if kind == "cut":
        return [whole[: draw(st.integers(0, len(whole)))]]
    changed = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        changed[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return [bytes(changed)]


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(messages=st.lists(garbage(), max_size=8))
def test_other_streams_go_on_byte_for_byte_through_any_garbage(
    tmp_path: Path, messages: list[list[bytes]]
) -> None:
    async def run() -> None:
        async with front(tmp_path) as one:
            await one.add_request("victim", 0)
            await one.add_request("other", 1)
            sent: list[int] = []
            for number, frames in enumerate(messages):
                one.take_in(*frames)
                sent += [2 * number, 2 * number + 1]
                one.take_in(tokens(1, "other", *sent[-2:]))
            assert one.due().get("other", []) == sent
            assert one.client.in_flight(I1) == 1
            call = asyncio.ensure_future(one.client.call_engine(I1, "llumnix_fate", "m0"))
            await asyncio.sleep(0)
            (call_id,) = one.client.utility_results
            failed = UtilityOutput(call_id=call_id, failure_message="still heard")
            one.take_in(packed(EngineCoreOutputs(engine_index=1, utility_output=failed)))
            with pytest.raises(Exception, match="still heard"):
                await call
            assert one.client.utility_results == {}

    asyncio.run(run())


async def test_garbage_on_the_socket_ends_neither_the_task_nor_the_server(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        await one.add_request("other", 1)
        stranger = one.connect(zmq.PUSH, "output_address")
        for payload in (b"ENGINE_CORE_DEAD", b"\xc1", packed_answer(1), b""):
            stranger.send(payload)
        stranger.send(tokens(1, "other", 7))
        found = await asyncio.wait_for(one.client.get_output_async(), 5)
        assert [(o.request_id, o.new_token_ids) for o in found.outputs] == [("other", [7])]
        assert not one.client.resources.engine_dead


def packed_answer(call_id: int) -> bytes:
    return packed(EngineCoreOutputs(utility_output=UtilityOutput(call_id=call_id)))


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("odd")


HANDLERS = {
    "a message of a llumlet": (StreamClient, "_receive_llumlet"),
    "a wish to move": (StreamClient, "_migration_wanted"),
    "a take-over": (StreamTable, "took_over"),
    "tokens of a request that moves": (StreamTable, "_receive_moving"),
    "what follows": (StreamClient, "_perform_one"),
    "a move": (StreamClient, "_moved"),
    "a finish": (StreamClient, "_note_finish"),
    "a change of owner": (StreamTable, "_flip"),
    "the records of migrations": (MigrationRecords, "took_over"),
}


@pytest.mark.parametrize("handler", HANDLERS)
async def test_a_handler_that_raises_ends_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: str
) -> None:
    async with front(tmp_path, engines=3) as one:
        for name in ("victim", "neighbour"):
            await one.add_request(name, 0)
        await one.add_request("other", 1)
        order = one.client.streams.grant(RequestId("victim"), I2, "there")
        assert isinstance(order, Migrate)
        wish = encode(MigrationRequested(request=RequestId("victim"), destination=I2, why="x"))
        monkeypatch.setattr(*HANDLERS[handler], broken)
        outputs = [
            EngineCoreOutput("neighbour", [1]),
            EngineCoreOutput("victim", [], kv_transfer_params={"llumnix": wish}),
            EngineCoreOutput("neighbour", [2]),
        ]
        one.take_in(packed(EngineCoreOutputs(engine_index=0, outputs=outputs)))
        one.take_in(in_band(2, "victim", took_over("victim", order.epoch)))
        one.take_in(tokens(0, "victim", 9, finish_reason=None))
        one.take_in(tokens(2, "victim", 9))
        outputs = [
            EngineCoreOutput("victim", [3], finish_reason=0),  # type: ignore[arg-type]
            EngineCoreOutput("neighbour", [3]),
        ]
        one.take_in(packed(EngineCoreOutputs(engine_index=2, outputs=outputs[:1])))
        one.take_in(packed(EngineCoreOutputs(engine_index=0, outputs=outputs)))
        one.take_in(tokens(1, "other", 4))
        due = one.due()
        assert due["neighbour"] == [1, 2, 3]
        assert due["other"] == [4]
        assert "error" in due["victim"]
        assert one.client.streams.get(RequestId("victim")) is None
        assert one.client.complaints.counts
        # It may be there already.
        assert any(b"victim" in b"".join(sent) for sent in await one.heard(2))


async def test_a_fault_while_giving_up_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with front(tmp_path) as one:
        for name in ("victim", "neighbour"):
            await one.add_request(name, 0)
        monkeypatch.setattr(StreamClient, "_receive_llumlet", broken)
        monkeypatch.setattr(one.client, "end", broken)
        outputs = [
            EngineCoreOutput("victim", [], kv_transfer_params={"llumnix": b""}),
            EngineCoreOutput("neighbour", [2]),
        ]
        one.take_in(packed(EngineCoreOutputs(engine_index=0, outputs=outputs)))
        assert one.due() == {"neighbour": [2]}


async def test_a_consumer_that_cannot_be_told_of_its_failure_costs_the_others_nothing(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as one:
        one.client.on_failed = broken
        await one.add_request("victim", 0)
        await one.add_request("other", 1)
        await one.client.lose(I0)
        one.take_in(tokens(1, "other", 4))
        found = [o async for o in heard_by_vllm(one, 2)]
        assert found == [[], [4]]


async def heard_by_vllm(one: Front, messages: int) -> AsyncIterator[list[int]]:
    for _ in range(messages):
        outputs = await asyncio.wait_for(one.client.get_output_async(), 5)
        yield [token for output in outputs.outputs for token in output.new_token_ids]


async def test_a_death_ends_every_stream_of_its_engine_though_one_cannot_be_dealt_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with front(tmp_path) as one:
        for name in ("a", "b", "c"):
            await one.add_request(name, 0)
        orphaned = RevivingClient.orphaned

        def odd(self: RevivingClient, effect: Orphaned) -> None:
            if effect.request == "b":
                raise RuntimeError("odd")
            orphaned(self, effect)

        monkeypatch.setattr(RevivingClient, "orphaned", odd)
        await one.client.lose(I0)
        assert one.due() == {"a": ["error"], "b": ["error"], "c": ["error"]}
        assert [type(fact).__name__ for fact in one.link.told] == ["InstanceLost"]


async def test_a_source_that_said_too_much_and_died_ends_its_stream_alone(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        for name in ("victim", "neighbour"):
            await one.add_request(name, 0)
        order = one.client.streams.grant(RequestId("victim"), I1, "there")
        assert isinstance(order, Migrate)
        one.take_in(in_band(1, "victim", took_over("victim", order.epoch, outputs=9)))
        stream = one.client.streams.get(RequestId("victim"))
        assert stream is not None
        stream.tokens += range(10)  # As no engine of ours would have it.
        await one.client.lose(I0)
        assert one.due() == {"victim": ["error"], "neighbour": ["error"]}


# -- engines that announce themselves


async def test_an_engine_that_announces_itself_badly_keeps_no_other_out(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        one.client.engines.expect("i2", I2, 2)  # type: ignore[arg-type]
        one.client.stats_update_address = "tcp://elsewhere"  # vLLM asserts that they agree.
        odd = one.connect(zmq.DEALER, "input_address", 2)
        blocks = one.client.vllm_config.cache_config.num_gpu_blocks
        odd.send(ready_payload(dp_stats_address="tcp://a"))
        odd.send(b"\xc1")
        told, counts = "An engine announced itself badly", one.client.complaints.counts
        while counts.get(told, 0) < 2:
            await asyncio.sleep(0.001)
        assert one.client.vllm_config.cache_config.num_gpu_blocks == blocks
        stranger = one.connect(zmq.DEALER, "input_address")
        stranger.send(ready_payload())
        odd.send(ready_payload())
        await asyncio.wait_for(one.client.engines.ready(I2), 5)
        assert counts[told] == 2
        odd.send(ready_payload(max_model_len=1))  # Again: whoever it is, it changes nothing.
        await one.add_engine(3)
        assert one.client.vllm_config.model_config.max_model_len == 16


# -- requests that nobody waits for


async def test_a_request_that_is_added_only_to_be_aborted_opens_no_stream(tmp_path: Path) -> None:
    async with front(tmp_path, engines=1) as one:
        await one.add_request("refused", 0, abort_immediately=True)
        assert len(one.client.streams) == 0
        assert one.client.in_flight(I0) == 0
        assert any(b"refused" in b"".join(sent) for sent in await one.heard(0))


async def test_a_call_leaves_nothing_behind_whoever_gives_it_up(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        lost = asyncio.ensure_future(one.client.call_engine(I0, "llumnix_fate", "m0"))
        tired = asyncio.ensure_future(one.client.call_engine(I1, "llumnix_fate", "m0"))
        await asyncio.sleep(0)
        calls = dict(one.client.utility_results)
        assert len(calls) == 2
        tired.cancel()
        await one.client.lose(I0)
        with pytest.raises(EngineDeadError):
            await lost
        with pytest.raises(asyncio.CancelledError):
            await tired
        assert not calls.keys() & one.client.utility_results.keys()
        waiting = set[Any]().union(*one.client._calls.values())
        assert not waiting & set(calls.values())


async def test_an_answer_without_a_result_fails_its_call(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        call = asyncio.ensure_future(one.client.call_engine(I1, "llumnix_fate", "m0"))
        await asyncio.sleep(0)
        one.take_in(packed_answer(next(iter(one.client.utility_results))))
        with pytest.raises(Exception, match="the answer is empty"):
            await call


async def test_a_grammar_that_the_engine_cannot_compile_is_the_clients_mistake(
    tmp_path: Path,
) -> None:
    def grammar() -> SamplingParams:
        return SamplingParams(structured_outputs=StructuredOutputsParams(regex="foo**"))

    async with front(tmp_path) as one:
        told: list[FailedRequest] = []
        one.client.on_failed = lambda failed: bool(told.append(failed))
        for name in ("bad", "late", "nothing"):
            await one.add_request(name, 0, sampling_params=grammar())
        await one.add_request("plain", 0)
        one.take_in(tokens(0, "late", 5))
        for name in ("bad", "late", "plain"):
            one.take_in(tokens(0, name, finish_reason=FinishReason.ERROR))
        one.take_in(tokens(0, "nothing", 5, finish_reason=FinishReason.ERROR))
        while not one.client.outputs_queue.empty():
            await one.client.get_output_async()
        assert [(f.request, f.status, f.why) for f in told] == [
            (name, 400, BAD_GRAMMAR) for name in ("bad", "nothing")
        ]
        assert len(one.client.streams) == 0


async def test_an_engine_that_says_why_it_refuses_a_grammar_is_not_contradicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As since vLLM 0.33: it is paused, or its first request had another backend."""
    monkeypatch.setattr("llumnix.frontend.streams.client.error_of", lambda output: "it is paused")
    grammar = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    async with front(tmp_path) as one:
        told: list[FailedRequest] = []
        one.client.on_failed = lambda failed: bool(told.append(failed))
        await one.add_request("r", 0, sampling_params=grammar)
        one.take_in(tokens(0, "r", finish_reason=FinishReason.ERROR))
        passed_on = await one.client.get_output_async()
        assert [o.finish_reason for o in passed_on.outputs] == [FinishReason.ERROR]
        assert one.client.outputs_queue.empty()
        assert (told, len(one.client.streams)) == ([], 0)


# -- nobody serves


async def test_without_an_engine_that_takes_requests_they_are_refused_with_503(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as one:
        one.client.ensure_served()
        one.client.engines.accept(I0, accepting=False)
        one.client.ensure_served()
        await one.client.lose(I1)
        with pytest.raises(GracefulHTTPError, match="No instance serves") as refused:
            one.client.ensure_served()
        assert refused.value.http_status == 503


# -- calls that must not be lost


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Those that would have been made, in seconds: none is."""
    pause, asked_s = asyncio.sleep, []

    def note(seconds: float) -> Any:
        if seconds:
            asked_s.append(seconds)
        return pause(0)

    monkeypatch.setattr("llumnix.frontend.engines.calls.asyncio.sleep", note)
    return asked_s


GROWING_S = [CALL_PAUSE_S * 2**n for n in range(CALL_TRIES_MAX)]


async def moving(one: Front, answers: dict[str, Any]) -> list[str]:
    """A request is on its way from engine 0 to engine 1; what is called is noted, and answered or
    raised as `answers` says."""
    called: list[str] = []

    async def call(engine: EngineIndex, method: str, *_: Any) -> Any:
        called.append(method)
        answer = answers.get(method)
        if isinstance(answer, Exception):
            raise answer
        return answer

    await one.add_request("mover", 0)
    one.client.call_engine = call  # type: ignore[method-assign]
    stream = one.client.streams.get(RequestId("mover"))
    target = one.client.engines.target(I1)
    assert stream is not None
    assert target is not None
    one.client.start_task(one.client.migrate(stream, target))
    await asyncio.sleep(0)
    return called


async def settle(one: Front) -> None:
    for _ in range(10 * FATE_ASKED_MAX):
        if not one.client._tasks:
            return
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("answer", "asked"),
    [(Exception("no such method"), CALL_TRIES_MAX), ("undecided", FATE_ASKED_MAX), ("declined", 1)],
)
async def test_a_fate_that_is_never_told_ends_the_stream(
    tmp_path: Path, pauses: list[float], answer: Any, asked: int
) -> None:
    async with front(tmp_path) as one:
        called = await moving(one, {"llumnix_fate": answer})
        await one.client.lose(I0)
        await settle(one)
        assert called.count("llumnix_fate") == asked
        if isinstance(answer, Exception):
            assert [s for s in pauses if s != FATE_POLL_S] == GROWING_S
        assert one.due() == {"mover": ["error"]}
        assert one.client.migrations.recent()[0]["outcome"] == "lost"


async def test_a_source_that_cannot_be_told_of_a_death_loses_only_what_it_moved_there(
    tmp_path: Path, pauses: list[float]
) -> None:
    async with front(tmp_path) as one:
        await one.add_request("stays", 0)
        called = await moving(one, {"llumnix_engine_lost": Exception("odd")})
        await one.client.lose(I1)
        await settle(one)
        assert called.count("llumnix_engine_lost") == CALL_TRIES_MAX
        assert pauses == GROWING_S
        assert one.due() == {"mover": ["error"]}
        assert one.client.streams.get(RequestId("stays")) is not None


async def test_gauges_of_an_engine_that_is_lost_go_to_zero(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        await one.add_request("a", 1)
        await one.client.lose(I1)
        items: list[Any] = []
        while not one.client.outputs_queue.empty():
            items.append(one.client.outputs_queue.get_nowait())
        assert items[0].why == died()
        assert items[0].slot == 1
        assert items[1].engine_index == 1
        assert items[1].scheduler_stats == SchedulerStats()


async def test_an_engine_that_is_lost_speaks_into_no_stream_though_it_lives_on(
    tmp_path: Path,
) -> None:
    """It was stopped, say, and goes on later, or its host comes back."""
    async with front(tmp_path) as one:
        await one.add_request("a", 0)
        await one.add_request("b", 1)
        one.take_in(tokens(0, "a", 7))
        assert one.client.engines.heard_s(I0) is not None
        await one.client.lose(I0, blamed=True)
        assert one.client.engines.heard_s(I0) is None
        one.due()
        one.engines[0].send(ready_payload())
        for name in ("a", "b"):
            one.take_in(tokens(0, name, 8, finish_reason=FinishReason.STOP))
            one.take_in(in_band(0, name, took_over(name, epoch=9, outputs=1, tail=(8,))))
        one.take_in(packed(EngineCoreOutputs(engine_index=0, scheduler_stats=SchedulerStats())))
        await asyncio.sleep(0.05)
        one.take_in(tokens(1, "b", 9))
        assert one.due() == {"b": [9]}
        assert I0 not in one.client.engines
        assert one.client.streams.get(RequestId("b")).owner == I1  # type: ignore[union-attr]


def test_complaints_are_counted_and_logged_with_a_bound(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    complaints = Complaints(lambda: now_s)
    for _ in range(1000):
        complaints.note("odd", "bytes")
    complaints.note("other", "bytes")
    assert complaints.counts == {"odd": 1000, "other": 1}
    assert len(caplog.records) == 2
    now_s = COMPLAIN_EVERY_S
    complaints.note("odd", "bytes")
    assert caplog.records[-1].getMessage() == "odd (1001 so far): bytes"
