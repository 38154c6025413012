"""Requests on their way through the frontend's client: placed, moved, ended. On fakes."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.exceptions import EngineDeadError

from llumnix.core.events import DrainInstance
from llumnix.core.keys import KeyLimits, KeyMeter
from llumnix.core.messages import (
    DrainRequested,
    MigrationEnded,
    MigrationRequested,
    StageDone,
    TookOver,
)
from llumnix.core.reports import LoadReport
from llumnix.core.types import EngineIndex, InstanceId, MigrationId, RequestId
from llumnix.errors import ConflictError, UnknownInstanceError, UnknownRequestError
from llumnix.frontend.context import HttpRequest, current_http_request
from llumnix.frontend.engines.calls import DRAIN_REQUESTS_MAX
from llumnix.frontend.own_streams import MoveAsked, OwnStreams
from llumnix.frontend.streams.info import FleetStream, find
from llumnix.wire import decode, encode
from support.frontend import Front, front, packed, request, tokens

I0, I1, I2 = EngineIndex(0), EngineIndex(1), EngineIndex(2)


class Mover:
    """A request on engine 0, ordered to engine 1; calls to engines are noted, and answered or
    raised as `answers` says."""

    def __init__(self, one: Front) -> None:
        self.one = one
        self.calls: list[tuple[int, str, tuple[Any, ...]]] = []
        self.answers: dict[str, Any] = {}
        one.client.call_engine = self._call  # type: ignore[method-assign]

    async def _call(self, engine: EngineIndex, method: str, *args: Any) -> Any:
        self.calls.append((engine, method, args))
        answer = self.answers.get(method)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def begin(self, **fields: Any) -> "asyncio.Task[Any]":
        await self.one.add_request("r", 0, **fields)
        self.one.take_in(tokens(0, "r", 1, 2))
        return await self.order()

    async def order(self, to: EngineIndex = I1) -> "asyncio.Task[Any]":
        target = self.one.client.engines.target(to)
        assert target is not None
        task = asyncio.ensure_future(self.one.client.migrate(self.stream, target))
        await self.idle()
        return task

    async def idle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def stream(self) -> FleetStream:
        return find(self.one.client.streams, "r")

    def says(self, engine: int, message: Any, name: str = "r") -> None:
        payload = {"llumnix": encode(message)}
        output = EngineCoreOutput(name, [], kv_transfer_params=payload)
        self.one.take_in(packed(EngineCoreOutputs(engine_index=engine, outputs=[output])))

    def takes_over(self, outputs: int, *tail: int) -> None:
        grant = self.stream.grant
        assert grant is not None
        self.says(
            grant.destination,
            TookOver(
                migration=grant.migration, request=RequestId("r"), epoch=grant.epoch,
                outputs=outputs, tail=list(tail),
            ),
        )  # fmt: skip

    def ends(self, *, taken: bool, why: str = "") -> None:
        stages = [StageDone(tokens=8, bytes=400, ms=1.5)]
        self.says(
            0,
            MigrationEnded(
                migration=MigrationId("m0"), request=RequestId("r"), taken=taken, why=why,
                stages=stages, downtime_ms=2.5,
            ),
        )  # fmt: skip

    @property
    def record(self) -> dict[str, Any]:
        return self.one.client.migrations.get("m0")


# -- placed


async def test_a_request_that_is_aborted_while_it_is_placed_is_sent_to_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with front(tmp_path) as one:
        asked, answer = one.link.place, asyncio.Event()

        async def slow(fact: Any) -> Any:
            await answer.wait()
            return await asked(fact)

        monkeypatch.setattr(one.link, "place", slow)
        adding = asyncio.ensure_future(one.client.add_request_async(request("r")))
        await asyncio.sleep(0)
        assert (len(one.client.streams), one.client.in_flight(I0)) == (1, 0)
        with pytest.raises(UnknownRequestError):  # Nobody is shown what has no engine yet.
            find(one.client.streams, "r")
        await one.client.abort_requests_async(["r"])
        answer.set()
        await adding
        assert (len(one.client.streams), await one.heard(0)) == (0, [])


async def test_a_request_that_cannot_be_placed_leaves_no_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with front(tmp_path) as one:

        async def broken(fact: Any) -> Any:
            raise RuntimeError("odd")

        monkeypatch.setattr(one.link, "place", broken)
        with pytest.raises(RuntimeError, match="odd"):
            await one.client.add_request_async(request("r"))
        assert len(one.client.streams) == 0


async def test_without_the_controller_the_engine_with_fewest_requests_gets_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with front(tmp_path, engines=3) as one:

        async def silent(fact: Any) -> None:
            return None

        monkeypatch.setattr(one.link, "place", silent)
        for number in range(7):
            await one.client.add_request_async(request(f"r{number}"))
        assert sorted(one.client.in_flight(e) for e in (I0, I1, I2)) == [2, 2, 3]


@pytest.mark.parametrize("what", ["is being emptied", "has died"])
async def test_a_decision_for_an_engine_that_takes_none_by_now_is_not_followed(
    tmp_path: Path, what: str
) -> None:
    """The controller decided before it could know."""
    async with front(tmp_path) as one:
        if what == "has died":
            await one.client.lose(EngineIndex(0))
        else:
            one.client.engines.accept(EngineIndex(0), False)
        await one.add_request("a", 0)
        stream = one.client.streams.get(RequestId("a"))
        assert stream is not None
        assert stream.owner == 1


async def test_the_next_input_of_a_session_goes_where_the_first_went(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        await one.add_request("s", 1, resumable=True)
        one.take_in(tokens(1, "s", 5, finish_reason=FinishReason.LENGTH))
        stream = one.client.streams.get(RequestId("s"))
        assert stream is not None
        assert stream.info.between_inputs
        await one.add_request("s", 0, resumable=True)
        assert not stream.info.between_inputs
        assert (len(await one.heard(0)), len(await one.heard(1))) == (0, 2)
        await one.add_request("s", 0)
        assert not stream.info.session
        one.take_in(tokens(1, "s", 6, finish_reason=FinishReason.STOP))
        assert len(one.client.streams) == 0


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
async def test_a_session_ends_for_the_reasons_for_which_vllms_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: FinishReason
) -> None:
    module = "llumnix.frontend.streams.client.SESSION_ENDS"
    async with front(tmp_path) as one:
        for name, ends in (("a", {FinishReason.ABORT}), ("b", {FinishReason.ABORT, reason})):
            monkeypatch.setattr(module, ends)
            await one.add_request(name, 1, resumable=True)
            one.take_in(tokens(1, name, 5, finish_reason=reason))
            ended = one.client.streams.get(RequestId(name)) is None
            assert ended is (reason in ends)


async def test_a_session_that_is_over_between_two_inputs_ends_here(tmp_path: Path) -> None:
    """The engine says nothing more of it."""
    async with front(tmp_path) as one:
        await one.add_request("s", 1, resumable=True)
        one.take_in(tokens(1, "s", 5, finish_reason=FinishReason.LENGTH))
        await one.add_request("s", 0)
        assert len(one.client.streams) == 0
        assert (len(await one.heard(0)), len(await one.heard(1))) == (0, 2)


async def test_the_next_input_of_a_session_whose_engine_is_gone_is_refused(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        await one.add_request("s", 1, resumable=True)
        one.client.engines.lose(I1)  # Its streams are about to be ended.
        with pytest.raises(EngineDeadError):
            await one.add_request("s", 1, resumable=True)


# -- moved


async def test_a_move_passes_every_token_once_in_order_and_is_recorded(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        mover = Mover(one)
        moving = await mover.begin()
        ((engine, method, (order,)),) = mover.calls
        assert (engine, method) == (0, "llumnix_migrate")
        assert decode(order) == mover.stream.grant
        mover.takes_over(3, 1, 2, 3)
        one.take_in(tokens(1, "r", 4))
        one.take_in(tokens(0, "r", 3))
        one.take_in(tokens(0, "r", 9))  # It is no longer the source's.
        one.take_in(tokens(1, "r", 5))
        await mover.idle()
        assert (mover.record["outcome"], moving.done()) == ("running", False)  # Without figures.
        mover.ends(taken=True)
        assert (await moving).outcome == "migrated"
        assert mover.record["stages"] == [{"tokens": 8, "bytes": 400, "ms": 1.5}]
        assert (mover.record["source_tokens"], mover.record["reason"]) == (3, "")
        assert one.due() == {"r": [1, 2, 3, 4, 5]}
        assert (one.client.in_flight(I0), one.client.in_flight(I1)) == (0, 1)
        one.take_in(tokens(1, "r", 6, finish_reason=FinishReason.STOP))
        assert one.due() == {"r": [6, "stop"]}
        assert len(one.client.streams) == 0


async def test_what_was_held_may_be_the_end(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        mover = Mover(one)
        await mover.begin()
        mover.takes_over(3, 1, 2, 3)
        one.take_in(tokens(1, "r", 4, finish_reason=FinishReason.LENGTH))
        assert one.due() == {"r": [1, 2]}
        one.take_in(tokens(0, "r", 3))
        assert one.due() == {"r": [3, 4, "length"]}
        assert len(one.client.streams) == 0
        mover.ends(taken=True)
        assert mover.record["outcome"] == "migrated"


async def test_a_move_that_the_source_gave_up_goes_on_there(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        mover = Mover(one)
        moving = await mover.begin()
        mover.ends(taken=False, why="no room")
        assert (await moving).outcome == "aborted"
        assert mover.record["reason"] == "no room"
        one.take_in(tokens(0, "r", 3))
        assert one.due() == {"r": [1, 2, 3]}


@pytest.mark.parametrize("closed", [False, True])
async def test_an_order_that_the_source_refuses_is_aborted_whether_or_not_the_client_waits(
    tmp_path: Path, closed: bool
) -> None:
    async with front(tmp_path) as one:
        mover = Mover(one)
        mover.answers["llumnix_migrate"] = Exception("odd")
        if closed:
            call = mover._call

            async def hang_up(*args: Any) -> Any:
                await one.client.abort_requests_async(["r"])
                return await call(*args)

            one.client.call_engine = hang_up  # type: ignore[method-assign]
        moving = await mover.begin()
        assert (await asyncio.wait_for(moving, 5)).outcome == "aborted"
        assert mover.record["reason"] == "the source refused the order: odd"
        assert len(one.client.streams) == (0 if closed else 1)
        assert closed or mover.stream.grant is None


async def test_a_user_is_told_why_a_request_cannot_be_moved(tmp_path: Path) -> None:
    async with front(tmp_path, engines=3) as one:
        mover = Mover(one)
        moving = await mover.begin()
        for to, why in ((I0, "request r is on i0 already"), (I2, "r is being moved already")):
            with pytest.raises(ConflictError, match=why):
                await (await mover.order(to))
        stream, gone = mover.stream, one.client.engines.target(I2)
        assert gone is not None
        mover.ends(taken=False)
        await moving
        await one.client.lose(I2)
        with pytest.raises(ConflictError, match="r cannot be moved to an engine that has died"):
            await one.client.migrate(stream, gone)
        await one.client.abort_requests_async(["r"])
        with pytest.raises(UnknownRequestError, match="request r has ended"):
            await one.client.migrate(stream, gone)


async def test_a_source_that_wants_a_request_moved_is_ordered_to_if_it_still_has_it(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as one:
        mover = Mover(one)
        wish = MigrationRequested(request=RequestId("r"), destination=I1, why="balance")
        mover.says(0, wish)  # It has ended.
        await one.add_request("r", 0)
        mover.says(1, wish)  # Not the owner.
        mover.says(0, MigrationRequested(request=RequestId("r"), destination=I2, why="x"))
        await mover.idle()
        assert mover.calls == []
        mover.says(0, wish)
        await mover.idle()
        mover.says(0, wish)  # It is being moved.
        await mover.idle()
        assert [call[:2] for call in mover.calls] == [(0, "llumnix_migrate")]
        grant = mover.stream.grant
        assert grant is not None
        assert grant.wanted
        assert mover.record["why"] == "balance"


async def test_an_engine_may_ask_to_be_emptied(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        Mover(one).says(1, DrainRequested(request=RequestId(""), why="a SIGTERM"), "")
        asked = one.client.drain_requests.get_nowait()
        assert asked == DrainInstance(instance=InstanceId("i1"), why="a SIGTERM")


async def test_requests_for_drains_that_nobody_takes_are_bounded(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        mover = Mover(one)
        for _ in range(DRAIN_REQUESTS_MAX + 3):
            mover.says(1, DrainRequested(request=RequestId(""), why="a SIGTERM"), "")
        assert one.client.drain_requests.qsize() == DRAIN_REQUESTS_MAX
        assert one.client.complaints.counts == {"Dropped an instance's request for a drain": 3}


# -- engines die


async def test_a_stream_whose_source_died_goes_on_with_what_the_take_over_repeats(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as one:
        mover = Mover(one)
        moving = await mover.begin()
        mover.takes_over(4, 1, 2, 3, 4)
        one.take_in(tokens(1, "r", 5))
        assert await one.client.lose(I0) == 0
        assert one.due() == {"r": [1, 2, 3, 4, 5]}
        assert (await moving).outcome == "migrated"
        assert mover.record["reason"] == "the source died after the handover"
        assert find(one.client.streams, "r").owner == I1


async def test_a_source_that_died_before_the_take_over_was_heard_has_the_destination_asked(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as one:
        mover = Mover(one)
        mover.answers["llumnix_fate"] = "taken"
        moving = await mover.begin()
        assert await one.client.lose(I0) == 0
        assert one.client.engines.name(mover.stream.owner) == "i0"  # As long as it is not known.
        mover.takes_over(3, 1, 2, 3)
        await mover.idle()
        assert (1, "llumnix_fate", ("m0",)) in mover.calls
        assert (1, "llumnix_engine_lost", (0, "", [], 0)) in mover.calls
        assert (await moving).outcome == "migrated"
        assert mover.record["reason"] == "the source died during the migration"
        one.take_in(tokens(1, "r", 4))
        due = one.due()["r"]
        assert sorted(due) == [1, 2, 3, 4]


async def test_a_client_that_wants_log_probabilities_is_not_given_tokens_without(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as one:
        mover = Mover(one)
        params = SamplingParams(max_tokens=50, logprobs=1)
        moving = await mover.begin(sampling_params=params)
        mover.takes_over(3, 1, 2, 3)
        await one.client.lose(I0)
        assert one.due() == {"r": [1, 2, "error"]}
        assert (await moving).outcome == "lost"
        await mover.idle()
        assert any(b"r" in b"".join(sent) for sent in await one.heard(1))  # It is to abort it.


async def test_a_destination_that_died_leaves_the_request_at_its_source(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        mover = Mover(one)
        one.client.engines.locate(I1, "there")
        moving = await mover.begin()
        assert await one.client.lose(I1) == 0
        await mover.idle()
        assert (0, "llumnix_engine_lost", (1, "there", ["m0"], 0)) in mover.calls
        one.take_in(tokens(0, "r", 3))
        assert one.due() == {"r": [1, 2, 3]}
        mover.ends(taken=False, why="the destination died")
        assert (await moving).outcome == "aborted"


async def test_a_source_that_could_not_be_told_of_a_death_keeps_what_it_has_said_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told all the same, only its answers were lost."""

    async def at_once(_: float) -> None:
        return None

    async with front(tmp_path) as one:
        mover = Mover(one)
        mover.answers["llumnix_engine_lost"] = Exception("odd")
        moving = await mover.begin()
        monkeypatch.setattr("llumnix.frontend.engines.calls.asyncio.sleep", at_once)
        await one.client.lose(I1)
        mover.ends(taken=False, why="the destination died")
        monkeypatch.undo()
        await asyncio.gather(*one.client._tasks)
        assert (await moving).outcome == "aborted"
        one.take_in(tokens(0, "r", 3))
        assert one.due() == {"r": [1, 2, 3]}


async def test_a_stop_ends_every_stream(tmp_path: Path) -> None:
    """One of pooling by an error, since no output of it could say so."""
    async with front(tmp_path) as one:
        for name, engine in (("a", 0), ("b", 1)):
            await one.add_request(name, engine)
        await one.add_request(
            "p", 0, sampling_params=None, pooling_params=PoolingParams(task="embed")
        )
        await one.client.abort_all()
        assert one.due() == {"a": ["abort"], "b": ["abort"], "p": ["error"]}
        assert len(one.client.streams) == 0


def ended(engine: int, request: str) -> bytes:
    """What an engine says of a request's last token."""
    last = EngineCoreOutput(request, [3], finish_reason=FinishReason.LENGTH)
    return packed(EngineCoreOutputs(engine_index=engine, outputs=[last]))


async def test_a_request_tells_its_key_what_it_used_when_it_ends_and_goes_by_its_class(
    tmp_path: Path,
) -> None:
    async with front(tmp_path) as one:
        spent: list[tuple[int, int]] = []

        def spend(prompt: int, output: int) -> None:
            spent.append((prompt, output))

        http = HttpRequest(
            client_id=None, priority_class="high", key_name="ada", cap="high", spend=spend
        )
        token = current_http_request.set(http)
        await one.add_request("r", 0)
        current_http_request.reset(token)
        assert find(one.client.streams, "r").info.priority == -100
        one.take_in(tokens(0, "r", 1, 2))
        assert spent == []
        (row,) = OwnStreams(one.client).rows()
        assert (row["key"], row["class"]) == ("ada", "high")
        one.take_in(ended(0, "r"))
        assert spent == [(3, 3)]


async def test_a_request_is_open_for_its_key_until_its_answer_and_its_streams_have_ended(
    tmp_path: Path,
) -> None:
    """A background response's stream begins after its answer, or outlives it."""
    async with front(tmp_path) as one:
        meter = KeyMeter(KeyLimits(open_max=9), 0.0)
        http = HttpRequest(client_id=None, meter=meter)
        token = current_http_request.set(http)
        meter.admit(0.0)
        await one.add_request("early", 0)
        http.part_ends()  # The answer is sent.
        assert meter.open == 1
        one.take_in(ended(0, "early"))
        assert meter.open == 0
        for name in ("late", "later"):
            await one.add_request(name, 0)
        assert meter.open == 1
        one.take_in(ended(0, "late"))
        assert meter.open == 1
        await one.client.abort_requests_async(["later"])
        assert meter.open == 0
        current_http_request.reset(token)


# -- what a user asks for


async def test_without_a_destination_the_instance_with_the_most_free_memory_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of instances of which nothing is known the one with the fewest requests."""
    async with front(tmp_path, engines=3) as one:
        ours, moved = OwnStreams(one.client), list[tuple[int, str]]()

        async def migrate(stream: FleetStream, target: Any, copy: str) -> Any:
            moved.append((target.engine_index, copy))
            return SimpleNamespace(shown=lambda: {"id": "m"})

        async def loads() -> list[LoadReport] | None:
            return reports

        monkeypatch.setattr(one.client, "migrate", migrate)
        monkeypatch.setattr(one.link, "loads", loads, raising=False)
        await one.add_request("r", 0)
        await one.add_request("other", 1)
        order = MoveAsked(request_id="r", destination=None, copy="blocking")
        free = {0: 900, 1: 500, 2: 400}
        reports: list[LoadReport] | None = [
            LoadReport(
                instance=InstanceId(f"i{n}"), engine_index=EngineIndex(n), sequence=1,
                kv_tokens_used=1000 - tokens_free, kv_tokens_total=1000,
            )
            for n, tokens_free in free.items()
        ]  # fmt: skip
        assert await ours.move(order) == {"id": "m"}
        reports = None
        await ours.move(order)
        named = MoveAsked(request_id="r", destination="i1", copy="staged")
        await ours.move(named)
        assert moved == [(1, "blocking"), (2, "blocking"), (1, "staged")]
        nowhere = MoveAsked(request_id="r", destination="i9", copy="staged")
        with pytest.raises(UnknownInstanceError, match=r"no instance i9 .*: i0, i1, i2"):
            await ours.move(nowhere)
        for index in (I1, I2):
            one.client.engines.accept(index, False)
        with pytest.raises(ConflictError, match="no other instance"):
            await ours.move(order)


async def test_a_request_is_found_by_its_id_or_else_by_its_clients_name(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        ours = OwnStreams(one.client)
        for name in ("r-0", "r-1", "x"):
            await one.add_request(name, 0, external_req_id="x" if name == "r-1" else "r")
        assert ours.named("r") == (["r-0", "x"], False)
        assert ours.named("x") == (["x"], True)
        assert ours.named("r-1") == (["r-1"], True)
        assert ours.named("none") == ([], False)


async def test_a_look_has_what_happened_since_the_one_before(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        ours = OwnStreams(one.client)
        await one.add_request("a", 0)
        first = ours.look({})
        assert [(s.request, s.instance, s.orphan) for s in first.streams] == [("a", "i0", False)]
        assert (first.placed, first.ended) == ([], []), "what was before the first look is old"
        await one.add_request("b", 1, prompt_token_ids=[1, 2])
        one.take_in(tokens(0, "a", 7, 8))
        one.take_in(tokens(0, "a", 9, finish_reason=FinishReason.STOP))
        second = ours.look(first.cursor)
        assert [(s.request, s.prompt_tokens, s.output_tokens) for s in second.streams] == [
            ("b", 2, 0)
        ]
        assert [(p.request, p.instance) for p in second.placed] == [("b", "i1")]
        assert [(e.request, e.how, e.tokens) for e in second.ended] == [("a", "stop", 3)]
        third = ours.look(second.cursor)
        assert (third.placed, third.ended) == ([], [])
