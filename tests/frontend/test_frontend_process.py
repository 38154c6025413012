"""The process of a frontend that is not alone: what it does with each word and question of the
office. The office is a socket in the test's hand, and vLLM's server is a fake."""

import asyncio
import os
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
import zmq.asyncio

pytest.importorskip("vllm")

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats

from llumnix.config import DeploymentConfig
from llumnix.core.keys import NamedKey
from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.quarantine import Quarantined
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.errors import UsageError
from llumnix.frontend.office import link as line
from llumnix.frontend.office import process
from llumnix.frontend.office.adapter import Adapter
from llumnix.frontend.office.messages import (
    AdaptersAre,
    Answer,
    Ask,
    DoYouHave,
    EngineDied,
    EngineSaid,
    EngineWanted,
    FleetWants,
    Hello,
    Holding,
    HowManyRun,
    KeysAre,
    Message,
    MoveYours,
    QuarantineIs,
    Question,
    Serving,
    StopAsked,
    TurnIs,
    WhoIsAccused,
    YourLook,
    YourMigrations,
    YourRequest,
    YourRequests,
    messages,
    questions,
)
from llumnix.frontend.office.process import Frontend
from llumnix.reload.key_file import KeyRing
from support.frontend import Front, front, packed, tokens

E0, E1 = EngineIndex(0), EngineIndex(1)
ON = SurvivalSettings()


class World:
    """The process, its client, and all that happened around it."""

    def __init__(self, one: Front, office: "zmq.asyncio.Socket") -> None:
        self.one, self.office = one, office
        self.identity = b""
        self.held: list[Any] = []
        self.said: list[Message] = []
        self.answers: dict[int, Answer] = {}
        self.done: list[str] = []
        self.served: list[tuple[Any, ...]] = []
        self.options: dict[str, Any] = {}
        self.ring = KeyRing("keys.toml")
        self.busy = False  # whether the engines answer no call
        self.asked = 0
        self.may_end = asyncio.Event()
        self.frontend: Any = None

    async def read(self) -> None:
        while True:
            self.identity, payload = await self.office.recv_multipart()
            match messages.decode(payload):
                case Holding(held=held):
                    self.held.append(held)
                case Answer(number=number) as answer:
                    self.answers[number] = answer
                case message:
                    self.said.append(message)

    def tell(self, message: Message) -> None:
        self.office.send_multipart([self.identity, messages.encode(message)])

    async def until(self, true: Any) -> None:
        async with asyncio.timeout(5):
            while not true():
                await asyncio.sleep(0.002)

    async def ask(self, question: Question) -> Any:
        number = len(self.answers) + 1
        self.tell(Ask(number=number, question=questions.encode(question)))
        await self.until(lambda: number in self.answers)
        answer = self.answers[number]
        if answer.failure is not None:
            return answer.failure.kind
        return answer.value

    def wants(self, version: int, *engines: int, let_in: bool = True) -> FleetWants:
        return FleetWants(
            version=version,
            engines=[
                EngineWanted(
                    engine_index=EngineIndex(e), instance=InstanceId(f"i{e}"), slot=e, address="",
                    accepting=True, joined=True, silent=False,
                )
                for e in engines
            ],
            slots=3,
            open=let_in,
        )  # fmt: skip


@asynccontextmanager
async def frontend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """One with two engines. Its run ends with this context."""
    context = zmq.asyncio.Context()
    office = context.socket(zmq.ROUTER)
    office.setsockopt(zmq.LINGER, 0)
    office.bind(f"ipc://{folder}/office")
    alive, office_lives = os.pipe()
    monkeypatch.setattr(line, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(process, "ENGINES_POLL_S", 0.002)
    async with front(folder, survival=ON) as one:
        w = World(one, office)

        async def tasks() -> list[str]:
            w.asked += 1
            if w.busy:
                raise GracefulHTTPError("no answer from i0", HTTPStatus.GATEWAY_TIMEOUT)
            return ["generate"]

        llm: Any = SimpleNamespace(
            engine_core=one.client,
            get_supported_tasks=tasks,
            grow_metrics=lambda slots: w.done.append(f"room for {slots}"),
            running=lambda: 7,
            stop_now=lambda: w.done.append("stop now"),
            shutdown=lambda: w.done.append("shutdown"),
        )

        async def serve(
            llm: Any, control: Any, listener: Any, args: Any, announce: Any, **rest: Any
        ) -> None:
            w.served.append((llm, control, listener, args))
            w.options = rest
            await announce()
            await w.may_end.wait()

        def signalled() -> None:
            w.done.append("signal")
            w.may_end.set()

        monkeypatch.setattr(process, "_office", lambda: alive)
        monkeypatch.setattr(process, "_client", lambda start, log: one.client)
        monkeypatch.setattr(process, "_llm", lambda start, client: llm)
        monkeypatch.setattr(process, "serve", serve)
        monkeypatch.setattr(process, "_signal_self", signalled)
        start: Any = SimpleNamespace(
            place=SimpleNamespace(index=4),
            beside=SimpleNamespace(slot=1),
            args=Namespace(lora_modules=["a"], port=1, access=SimpleNamespace(ring=w.ring)),
            deployment=DeploymentConfig(),
            office=f"ipc://{folder}/office",
            url="http://here",
            socket=None,
            loads=[0, 0],
        )
        w.frontend = Frontend(start)
        reading = asyncio.create_task(w.read())
        run = asyncio.create_task(w.frontend.run())
        try:
            await w.until(lambda: w.said)
            yield w
            w.tell(StopAsked())
            async with asyncio.timeout(5):
                await run
        finally:
            run.cancel()
            reading.cancel()
            asyncio.get_running_loop().remove_reader(alive)
            os.close(alive)
            os.close(office_lives)
            office.close()
            context.term()


async def serving(w: World) -> None:
    """It lets requests in."""
    w.tell(w.wants(1, 0, 1))
    await w.until(lambda: Serving() in w.said)


async def test_it_says_hello_and_serves_once_the_office_lets_requests_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with frontend(tmp_path, monkeypatch) as w:
        assert w.said == [Hello(client=4, pid=os.getpid())]
        w.tell(w.wants(1, 0, 1, let_in=False))
        await w.until(lambda: any(h.version == 1 for h in w.held))
        assert not w.served
        w.tell(w.wants(2, 0, 1))
        await w.until(lambda: Serving() in w.said)
        (llm, _, listener, args) = w.served[0]
        assert llm.engine_core is w.one.client
        assert listener.url == "http://here"
        # The office has loaded the command line's adapters.
        assert (args.lora_modules, args.port) == (None, 1)
        assert w.options["peer_loads"] == ([0, 0], 1)
        assert w.done == ["room for 3", "room for 3"]
    assert w.done[2:] == ["signal", "shutdown"]


async def test_it_waits_for_the_engines_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "ENGINES_WAIT_S", 0.2)
    async with frontend(tmp_path, monkeypatch) as w:
        now_s = asyncio.get_running_loop().time
        w.tell(w.wants(1, 0, 1, 2))  # The third never comes.
        began_s = now_s()
        await w.until(lambda: w.served)
        assert now_s() - began_s >= 0.2


async def test_while_an_engine_is_in_a_long_call_it_waits_and_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with frontend(tmp_path, monkeypatch) as w:
        w.busy = True
        w.tell(w.wants(1, 0, 1))
        await w.until(lambda: w.asked > 3)
        assert not w.served
        w.busy = False
        await w.until(lambda: w.served)


async def test_asked_to_stop_before_it_serves_it_never_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with frontend(tmp_path, monkeypatch) as w:
        w.tell(w.wants(1, 2, let_in=False))
    assert not w.served
    assert w.done == ["room for 3", "shutdown"]


async def test_asked_to_stop_twice_it_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with frontend(tmp_path, monkeypatch) as w:
        await serving(w)
        monkeypatch.setattr(process, "_signal_self", lambda: w.done.append("signal"))
        w.tell(StopAsked())
        await w.until(lambda: "signal" in w.done)
        assert "stop now" not in w.done
        w.tell(StopAsked())
        await w.until(lambda: "stop now" in w.done)
        assert w.done.count("signal") == 1
        w.may_end.set()


async def test_it_answers_what_the_office_asks_of_its_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with frontend(tmp_path, monkeypatch) as w:
        await serving(w)
        await w.one.add_request("r", 1)
        assert [row["request"] for row in await w.ask(YourRequests())] == ["r"]
        assert (await w.ask(YourRequest(name="r")))["instance"] == "i1"
        assert await w.ask(YourRequest(name="other")) == "UnknownRequestError"
        assert await w.ask(DoYouHave(name="r")) == [["r"], True]
        look = await w.ask(YourLook(since={}))
        assert [s[0] for s in look["streams"]] == ["r"]
        assert await w.ask(YourMigrations()) == []
        assert await w.ask(HowManyRun()) == 7
        elsewhere = MoveYours(request_id="other", destination="i0", copy="staged")
        assert await w.ask(elsewhere) == "UnknownRequestError"
        assert await w.ask(WhoIsAccused(engine_index=E1, among=None)) == ["r"]
        others = WhoIsAccused(engine_index=E1, among=[RequestId("other")])
        assert await w.ask(others) == []
        w.one.take_in(tokens(1, "r", 5))
        await w.until(lambda: any(h.in_flight == {E1: 1} for h in w.held))
        died = EngineDied(engine_index=E1, blamed=True, suspects=[])
        assert await w.ask(died) == 0
        assert list(w.one.client.engines.by_index) == [E0]


async def test_a_question_that_takes_long_keeps_no_other_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with frontend(tmp_path, monkeypatch) as w:
        await serving(w)
        moved, orders = asyncio.Event(), []

        async def move(order: Any) -> dict[str, Any]:
            orders.append((order.request_id, order.destination, order.copy))
            await moved.wait()
            return {"id": "m1"}

        monkeypatch.setattr(w.frontend._streams, "move", move)
        order = MoveYours(request_id="r", destination="i1", copy="blocking")
        w.tell(Ask(number=99, question=questions.encode(order)))
        assert await w.ask(HowManyRun()) == 7
        assert 99 not in w.answers
        moved.set()
        await w.until(lambda: 99 in w.answers)
        assert w.answers[99].value == {"id": "m1"}
        assert orders == [("r", "i1", "blocking")]


async def test_what_it_holds_is_said_when_it_changes_and_from_time_to_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with frontend(tmp_path, monkeypatch) as w:
        await serving(w)
        await w.until(lambda: w.held and w.held[-1].version == 1)
        said = len(w.held)
        await asyncio.sleep(0.05)
        assert len(w.held) == said, "nothing has changed"
        await w.one.add_request("r", 1)
        await w.until(lambda: w.held[-1].in_flight == {E1: 1})
        said = len(w.held)
        monkeypatch.setattr(line, "SAY_EVERY_S", 0.02)
        await w.until(lambda: len(w.held) > said + 1)


async def test_a_word_that_cannot_be_handled_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with frontend(tmp_path, monkeypatch) as w:
        w.office.send_multipart([w.identity, b"junk"])
        await serving(w)
        assert "could not be handled" in caplog.text


@pytest.mark.parametrize("alive", [True, False])
def test_a_frontend_that_cannot_begin_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, alive: bool
) -> None:
    """Nor does one begin after its office has ended."""

    def refuse(args: Any) -> None:
        raise UsageError("such a parser is not there")

    office, other_end = os.pipe()
    if not alive:
        os.close(other_end)
    monkeypatch.setattr(process, "_office", lambda: office)
    monkeypatch.setattr(process.os, "setsid", lambda: None)
    monkeypatch.setattr(process.setproctitle, "setproctitle", lambda title: None)
    monkeypatch.setattr(process, "log_to_stderr", lambda *_, **__: None)
    monkeypatch.setattr(process, "check_server_args", refuse)
    start: Any = SimpleNamespace(
        beside=SimpleNamespace(slot=2),
        deployment=DeploymentConfig(),
        args=None,
        vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(_api_process_rank=-1)),
    )
    if alive:
        with pytest.raises(SystemExit) as ended:
            process.run(start)
        assert ended.value.code == 1
        assert "A frontend ends: such a parser is not there" in caplog.text
        assert start.vllm_config.parallel_config._api_process_rank == 2
        os.close(other_end)
    else:
        process.run(start)
    os.close(office)


async def test_it_takes_over_what_the_office_says_is_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with frontend(tmp_path, monkeypatch) as w:
        await serving(w)
        models: Any = SimpleNamespace(lora_requests={}, unload_lora_adapter=None)
        w.options["on_state"](SimpleNamespace(openai_serving_models=models))
        key = NamedKey(name="one", digest=b"a" * 32, roles=("infer",), cap="normal")
        old, new = (
            Quarantined(
                digest=name, request=RequestId("r"), client_id="c", prompt_tokens=3,
                output_tokens=0, since_s=0.0,
            )
            for name in ("old", "new")
        )  # fmt: skip
        client = w.one.client
        client.quarantine.add(old)
        assert await w.ask(QuarantineIs(quarantined=[new])) is None
        assert [q.digest for q in client.quarantine.all(0.0)] == ["new"]
        assert await w.ask(KeysAre(keys=[key])) is None
        assert w.ring.keys == (key,)
        adapter = Adapter(name="a", number=4, path="/a", base_model=None)
        assert await w.ask(AdaptersAre(adapters=[adapter])) is None
        assert models.lora_requests["a"].lora_int_id == 4
        probation = client.orphans.probation
        assert not probation.turn, "the office has not said yet that it may"
        w.tell(TurnIs(mine=True))
        await w.until(lambda: probation.turn)
        stats = EngineCoreOutputs(
            engine_index=0, scheduler_stats=SchedulerStats(num_running_reqs=3)
        )
        w.tell(EngineSaid(frames=[packed(stats)]))
        said: Any = await asyncio.wait_for(client.outputs_queue.get(), 5)
        assert said.scheduler_stats.num_running_reqs == 3
