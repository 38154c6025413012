"""A frontend that is not alone, without its process: engines, adapters, suspects, quarantine."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

pytest.importorskip("vllm")

from starlette.exceptions import HTTPException
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import SchedulerStats

from llumnix.core.messages import IN_BAND, DrainRequested, MigrationEnded
from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.quarantine import Quarantined
from llumnix.core.types import EngineIndex, InstanceId, MigrationId, RequestId
from llumnix.frontend.engines.sockets import ClientPlace
from llumnix.frontend.office.adapter import Adapter
from llumnix.frontend.office.adapters import Adapters, as_request, of_command_line, of_request
from llumnix.frontend.office.asking import AskedError, LineClosedError
from llumnix.frontend.office.engine_client import EngineClient
from llumnix.frontend.office.messages import (
    EngineDied,
    EngineWanted,
    Failure,
    FleetWants,
)
from llumnix.frontend.office.mirror import Mirror
from llumnix.frontend.office.through_office import OfficeControl
from llumnix.wire import encode
from support.frontend import Front, front, packed, ready_payload, tokens

from .test_quarantine import died_twice, suspects, with_requests

E0, E1, E5 = EngineIndex(0), EngineIndex(1), EngineIndex(5)
ON = SurvivalSettings()


class Others:
    """Notes what it is told; a condemned request is known once `knows` is set."""

    def __init__(self) -> None:
        self.knows = asyncio.Event()
        self.told: list[Quarantined] = []
        self.refusals: list[str] = []
        self.calls: list[tuple[str, Any]] = []

    async def call_all(self, method: str, args: tuple[Any, ...]) -> dict[EngineIndex, Any]:
        self.calls.append((method, args))
        return {E0: True, E1: True}

    async def load_adapter(self, request: Any) -> None:
        request.lora_int_id = 7

    async def condemned(self, one: Quarantined) -> None:
        self.told.append(one)
        await self.knows.wait()

    def refused(self, name: str) -> None:
        self.refusals.append(name)


def wanted(index: EngineIndex, **fields: Any) -> EngineWanted:
    given = {
        "instance": InstanceId(f"i{index}"), "slot": index, "address": "ipc:///p",
        "accepting": True, "joined": True, "silent": False,
    }  # fmt: skip
    return EngineWanted(engine_index=index, **(given | fields))


def mirror(one: Front, grown: list[int]) -> Mirror:
    llm: Any = SimpleNamespace(engine_core=one.client, grow_metrics=grown.append)
    return Mirror(llm)


def wants(version: int, *engines: EngineWanted) -> FleetWants:
    return FleetWants(version=version, engines=list(engines), slots=3, open=True)


async def test_its_engines_become_those_of_the_office(tmp_path: Path) -> None:
    async with front(tmp_path, engines=0) as one:
        grown: list[int] = []
        it = mirror(one, grown)
        await it.apply(wants(4, wanted(E0), wanted(E1, accepting=False, joined=False)))
        engines, state = one.client.engines, one.client.shared_state
        assert list(engines.by_index) == [E0, E1]
        assert engines.address(E0) == "ipc:///p"
        assert (engines.by_index[E0].accepting, engines.by_index[E1].accepting) == (True, False)
        assert (state.joined, grown, it.held().version) == ({E0}, [3], 4)
        await it.apply(wants(5, wanted(E1, silent=True)))
        assert list(engines.by_index) == [E1]
        assert (state.joined, state.silent) == ({E1}, {E1})


async def test_an_engine_that_announces_itself_before_the_offices_word_is_let_in_with_it(
    tmp_path: Path,
) -> None:
    async with front(tmp_path, engines=0) as one:
        one.client.client_index = 3
        socket = one.connect(zmq.DEALER, "input_address", 5)
        socket.send(ready_payload())
        async with asyncio.timeout(5):
            while not one.client._early:
                await asyncio.sleep(0.01)
        assert one.client.complaints.counts == {}
        await mirror(one, []).apply(wants(1, wanted(E5)))
        assert [e.engine_index for e in one.client.engines.up()] == [E5]
        assert one.client.serving


async def test_what_it_holds_is_counted_by_engine(tmp_path: Path) -> None:
    async with front(tmp_path, survival=ON) as one:
        it = mirror(one, [])
        await with_requests(one, "a", "b", engine=1)
        held = it.held()
        assert (held.in_flight, held.suspects) == ({E1: 2}, False)
        assert held.heard_s[E1] > held.heard_s[E0]
        one.client.take_turn(False)
        death = EngineDied(engine_index=E1, blamed=True, suspects=[RequestId("a")])
        assert await it.died(death) == 0
        assert it.held().suspects


async def test_without_the_turn_its_suspects_wait_and_others_do_not(tmp_path: Path) -> None:
    async with front(tmp_path, survival=ON) as one:
        await with_requests(one, "suspect", "innocent")
        one.client.take_turn(False)
        one.link.where = 1
        await one.client.lose(E0, blamed=True, suspects=suspects("suspect"))
        sent = {frames[0] for frames in await one.heard(1)}
        assert sent
        assert one.client.streams.count(E1) == 0
        waiting = [s.request for s in one.client.streams if s.owner is None]
        assert "suspect" in waiting
        assert one.client.orphans.engine_of(RequestId("suspect")) is None
        assert one.client.orphans.engine_of(RequestId("innocent")) == E1
        one.client.take_turn(True)
        async with asyncio.timeout(5):
            while one.client.orphans.engine_of(RequestId("suspect")) is None:
                await asyncio.sleep(0.01)


async def test_a_client_hears_that_it_is_condemned_once_all_frontends_know(tmp_path: Path) -> None:
    async with front(tmp_path, engines=3, survival=ON) as one:
        one.client.others = others = Others()
        await with_requests(one, "poison")
        await died_twice(one, "poison")
        async with asyncio.timeout(5):
            while not others.told:
                await asyncio.sleep(0.01)
        assert "error" not in one.due().get("poison", [])
        others.knows.set()
        async with asyncio.timeout(5):
            while one.client.streams.get(RequestId("poison")) is not None:
                await asyncio.sleep(0.01)
        assert one.due()["poison"][-1] == "error"
        with pytest.raises(GracefulHTTPError):
            await one.add_request("again", 2, prompt_token_ids=[0, 5, 6])
        assert others.refusals == [others.told[0].id]


async def test_calls_that_change_what_engines_share_go_through_the_office(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        one.client.others = others = Others()
        await one.client.sleep_async(1, "abort")
        await one.client.reset_prefix_cache_async()
        adapter = as_request(Adapter(name="a", number=1, path="/a"))
        assert await one.client.add_lora_async(adapter)
        assert [method for method, _ in others.calls] == ["sleep", "reset_prefix_cache"]
        assert adapter.lora_int_id == 7
        assert await one.heard(0) == []


# -- adapters


async def test_vllms_list_of_adapters_is_the_offices() -> None:
    gone: list[str] = []

    async def unload(name: str) -> None:
        gone.append(name)

    class Models:
        def __init__(self) -> None:
            self.lora_requests: dict[str, Any] = {}

        async def unload_lora_adapter(self, request: Any) -> Any:
            if request.lora_name in self.lora_requests:
                del self.lora_requests[request.lora_name]
                return "Success"
            return SimpleNamespace(error="not found")

    models, adapters = Models(), Adapters(unload)
    adapters.set([Adapter(name="a", number=4, path="/a", base_model="m")])
    adapters.attach(models)
    assert models.lora_requests["a"].lora_int_id == 4
    assert of_request(models.lora_requests["a"]).base_model == "m"
    adapters.set([Adapter(name="b", number=5, path="/b")])
    assert set(models.lora_requests) == {"b"}
    await models.unload_lora_adapter(SimpleNamespace(lora_name="none"))
    assert gone == []
    await models.unload_lora_adapter(SimpleNamespace(lora_name="b"))
    assert gone == ["b"]


def test_the_command_lines_adapters_have_a_base_model_only_if_that_is_served() -> None:
    def module(base: str | None) -> Any:
        return SimpleNamespace(name="a", path="/a", base_model_name=base, is_3d_lora_weight=False)

    args: Any = SimpleNamespace(
        served_model_name=["m"], model="x", lora_modules=[module("m"), module("other")]
    )
    assert [a.base_model for a in of_command_line(args)] == ["m", None]
    args.lora_modules = None
    assert of_command_line(args) == []


# -- the office's own client


async def test_the_offices_client_hears_drains_and_passes_statistics_on(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        place = ClientPlace(
            input_address=f"ipc://{tmp_path}/i", output_address=f"ipc://{tmp_path}/o"
        )
        client = EngineClient(one.client.vllm_config, place, 2)
        passed: list[list[bytes]] = []
        client.on_statistics = passed.append
        try:
            client.expect(InstanceId("i0"), E0, 0)
            drain = encode(DrainRequested(request=RequestId(""), why="a SIGTERM"))
            frames = tokens(0, "", kv_transfer_params={IN_BAND: drain})
            client._take_in([zmq.Frame(frames)])
            asked = client.drain_requests.get_nowait()
            assert (asked.instance, asked.why) == ("i0", "a SIGTERM")
            stats = EngineCoreOutputs(
                engine_index=0, scheduler_stats=SchedulerStats(num_running_reqs=3)
            )
            client._take_in([zmq.Frame(packed(stats))])
            client._take_in([zmq.Frame(packed(EngineCoreOutputs(engine_index=9)))])
            assert client.outputs_queue.empty()
            (said,) = passed
        finally:
            client.close_sockets()
        one.client.take_in(said)
        item: Any = one.client.outputs_queue.get_nowait()
        assert item.scheduler_stats.num_running_reqs == 3


async def test_the_client_keeps_as_many_adapters_as_an_engine_does(tmp_path: Path) -> None:
    async with front(tmp_path, engines=0) as one:
        config = one.client.vllm_config
        place = ClientPlace(
            input_address=f"ipc://{tmp_path}/i", output_address=f"ipc://{tmp_path}/o"
        )
        config.lora_config = SimpleNamespace(max_cpu_loras=3)  # type: ignore[assignment]
        client = EngineClient(config, place, 2)
        try:
            for number in range(1, 6):
                adapter = as_request(Adapter(name=f"a{number}", number=number, path="/a"))
                client.shared_state.end(client.shared_state.begin("add_lora", (adapter,)), [True])
            kept = [call.args[0].lora_name for call in client.shared_state.calls()]
            assert kept == ["a3", "a4", "a5"]
        finally:
            client.close_sockets()


async def test_what_the_model_can_do_is_unknown_while_no_engine_says_so(tmp_path: Path) -> None:
    async with front(tmp_path, engines=0) as one:
        place = ClientPlace(
            input_address=f"ipc://{tmp_path}/i", output_address=f"ipc://{tmp_path}/o"
        )
        client = EngineClient(one.client.vllm_config, place, 2)
        client.loop = asyncio.get_running_loop()
        calls = Calls(client)
        try:
            assert await client.tasks_if_any() is None
            client.core_engines = [E0.to_bytes(2, "little")]
            client.shared_state.joined.add(E0)
            calls.answers = {E0: GracefulHTTPError("no answer from i0", 504)}
            assert await client.tasks_if_any() is None
            calls.answers = {E0: EngineDeadError()}
            assert await client.tasks_if_any() is None
            calls.answers, calls.says = {}, ("generate",)
            assert await client.tasks_if_any() == ("generate",)
        finally:
            client.close_sockets()


class Calls:
    """Notes the office's calls of engines, and answers or raises what is in `answers`."""

    def __init__(self, client: EngineClient) -> None:
        self.made: list[tuple[int, str, tuple[Any, ...]]] = []
        self.answers: dict[int, Exception] = {}
        self.says: Any = None
        client.call_engine = self._call  # type: ignore[method-assign]

    async def _call(self, engine: EngineIndex, method: str, *args: Any) -> Any:
        self.made.append((engine, method, args))
        if engine in self.answers:
            raise self.answers[engine]
        return self.says


async def test_engines_are_told_of_the_death_of_another_and_of_frontends(tmp_path: Path) -> None:
    async with front(tmp_path, engines=0) as one:
        place = ClientPlace(
            input_address=f"ipc://{tmp_path}/i", output_address=f"ipc://{tmp_path}/o"
        )
        client = EngineClient(one.client.vllm_config, place, 2)
        calls = Calls(client)
        try:
            for index in (E0, E1, E5):
                client.expect(InstanceId(f"i{index}"), index, index)
                client.engines.by_index[index].ready.set_result(None)
            client.engines.locate(E1, "ipc:///gone")
            assert client.lose(E1)
            assert not client.lose(E1), "it is known already"
            await asyncio.sleep(0)
            lost = (E1, "ipc:///gone", [], 0)
            assert calls.made == [(i, "llumnix_engine_lost", lost) for i in (E0, E5)]
            calls.made.clear()
            calls.answers = {E0: EngineDeadError(), E5: RuntimeError("busy")}
            await client.drop_client(3)
            assert calls.made == [(i, "llumnix_client_lost", (3,)) for i in (E0, E5)]
            assert list(client.complaints.counts) == [
                "An instance keeps requests of a lost frontend"
            ]
            ended = MigrationEnded(
                migration=MigrationId("m"), request=RequestId("r"), taken=True, why=""
            )
            frames = tokens(0, "", kv_transfer_params={IN_BAND: encode(ended)})
            client._take_in([zmq.Frame(frames)])
            assert "An engine told the office what is a frontend's" in client.complaints.counts
        finally:
            client.close_sockets()


@pytest.mark.parametrize("kind", ["TimeoutError", "LineClosedError", "LlumnixError"])
async def test_a_frontend_that_does_not_answer_the_office_is_told_as_such(kind: str) -> None:
    async def ask(question: Any, timeout_s: float | None) -> Any:
        raise AskedError(Failure(kind=kind, text="the line broke", status=None))

    control = OfficeControl(SimpleNamespace(ask=ask), SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(HTTPException, match="does not answer; try again") as told:
        await control.request("r")
    assert told.value.status_code == 503


@pytest.mark.parametrize("error", [TimeoutError(), LineClosedError("the office has ended")])
async def test_an_office_that_does_not_answer_is_told_as_such(error: Exception) -> None:
    async def ask(question: Any, timeout_s: float | None) -> Any:
        raise error

    control = OfficeControl(SimpleNamespace(ask=ask), SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(HTTPException, match="The main process does not answer; try again") as told:
        await control.instances()
    assert told.value.status_code == 503
    with pytest.raises(HTTPException, match="may add the instance all the same"):
        await control.add()


async def test_another_librarys_error_is_passed_on_as_it_is() -> None:
    async def ask(question: Any, timeout_s: float | None) -> Any:
        raise AskedError(Failure(kind="RayActorError", text="gone", status=None))

    control = OfficeControl(SimpleNamespace(ask=ask), SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(AskedError, match="gone"):
        await control.instances()
