"""Calls to all engines: bounded in time, the same on all, and made up for by engines that come
later. On fake engines, in virtual time."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from llumnix.core.types import EngineIndex, InstanceId
from llumnix.frontend.engines.calls import LONG_TIMEOUT_S, SHORT_TIMEOUT_S, EngineCalls
from llumnix.frontend.engines.directory import EngineDirectory
from llumnix.frontend.engines.state import CALLS_MAX, EngineState
from support.virtual_time import run

E0, E1, E2 = EngineIndex(0), EngineIndex(1), EngineIndex(2)
HANGS = object()


class Calls(EngineCalls):
    """`answers`: of an engine to a method; an exception is raised, HANGS never answers, a future is
    waited for."""

    def __init__(self, *engines: EngineIndex) -> None:
        self.core_engines = [e.to_bytes(2, "little") for e in engines]
        self.loop = asyncio.get_running_loop()
        self.engines = EngineDirectory()
        for engine in engines:
            self.engines.expect(InstanceId(f"i{engine}"), engine, engine)
        self.shared_state = EngineState()
        self.shared_state.joined = set(engines)
        self.made: list[tuple[EngineIndex, str, tuple[Any, ...]]] = []
        self.answers: dict[tuple[EngineIndex, str], Any] = {}

    async def call_engine(self, engine_index: EngineIndex, method: str, *args: Any) -> Any:
        self.made.append((engine_index, method, args))
        answer = self.answers.get((engine_index, method), True)
        if answer is HANGS:
            await asyncio.get_running_loop().create_future()
        if isinstance(answer, asyncio.Future):
            answer = await answer
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def of(self, engine_index: EngineIndex) -> list[str]:
        return [method for engine, method, _ in self.made if engine == engine_index]


def adapter(number: int) -> LoRARequest:
    return LoRARequest(lora_name=f"a{number}", lora_int_id=number, lora_path=f"/adapters/{number}")


async def failing(call: Any) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the tests look at it
        await call
    return caught.value


# -- engines that do not answer


def test_an_engine_that_hangs_is_named_and_what_the_others_did_stands() -> None:
    async def main() -> None:
        calls = Calls(E0, E1, E2)
        calls.answers[E1, "reset_prefix_cache"] = HANGS
        began_s = calls.loop.time()
        error = await failing(calls.reset_prefix_cache_async())
        assert calls.loop.time() - began_s <= SHORT_TIMEOUT_S + 1
        assert isinstance(error, GracefulHTTPError)
        assert error.http_status == 504
        assert "reset_prefix_cache: no answer from i1 " in str(error)
        assert "done on i0, i2." in str(error)

    run(main())


@pytest.mark.parametrize(("silent", "limit_s"), [(False, LONG_TIMEOUT_S), (True, SHORT_TIMEOUT_S)])
def test_a_long_call_waits_long_but_not_for_an_engine_that_is_silent(
    silent: bool, limit_s: float
) -> None:
    async def main() -> None:
        calls = Calls(E0, E1)
        calls.answers[E1, "sleep"] = HANGS
        calls.shared_state.silent = {E1} if silent else set()
        error = await failing(calls.sleep_async(1))
        assert isinstance(error, GracefulHTTPError)
        assert limit_s <= calls.loop.time() <= limit_s + 1

    run(main())


def test_a_call_with_a_timeout_of_its_own_is_bounded_by_that() -> None:
    async def main() -> None:
        calls = Calls(E0)
        calls.answers[E0, "collective_rpc"] = HANGS
        await failing(calls.collective_rpc_async("update_weights", timeout=20.0))
        assert calls.loop.time() == SHORT_TIMEOUT_S + 20

    run(main())


def test_what_any_engine_can_answer_is_asked_of_one_that_is_not_silent() -> None:
    async def main() -> None:
        calls = Calls(E0, E1)
        calls.answers[E0, "get_supported_tasks"] = HANGS
        error = await failing(calls.get_supported_tasks_async())
        assert "no answer from i0" in str(error)
        calls.shared_state.silent = {E0}
        calls.answers[E1, "get_supported_tasks"] = ("generate",)
        assert await calls.get_supported_tasks_async() == ("generate",)
        await calls.save_sharded_state_async("/tmp/there")
        assert calls.of(E1) == ["get_supported_tasks", "save_sharded_state"]
        with pytest.raises(EngineDeadError):
            await Calls().get_supported_tasks_async()

    run(main())


def test_if_the_one_engine_that_is_asked_dies_meanwhile_another_is_asked() -> None:
    async def main() -> None:
        calls = Calls(E0, E1)
        calls.answers[E0, "get_supported_tasks"] = EngineDeadError()
        calls.answers[E1, "get_supported_tasks"] = ("generate",)
        assert await calls.get_supported_tasks_async() == ("generate",)
        calls.answers[E1, "get_supported_tasks"] = EngineDeadError()
        assert isinstance(await failing(calls.get_supported_tasks_async()), EngineDeadError)

    run(main())


def test_an_engine_that_dies_meanwhile_is_left_out_unless_all_do() -> None:
    async def main() -> None:
        calls = Calls(E0, E1)
        calls.answers[E1, "is_sleeping"] = EngineDeadError()
        assert await calls.is_sleeping_async() is True
        calls.answers[E0, "is_sleeping"] = EngineDeadError()
        assert isinstance(await failing(calls.is_sleeping_async()), EngineDeadError)

    run(main())


def test_engines_that_differ_are_named_with_what_they_say() -> None:
    async def main() -> None:
        calls = Calls(E0, E1)
        calls.answers[E0, "get_weight_version"] = "v2"
        calls.answers[E1, "get_weight_version"] = "default"
        error = await failing(calls.get_weight_version_async())
        assert "get_weight_version (i0: v2, i1: default)" in str(error)

    run(main())


# -- engines that come later


def test_a_new_engine_is_brought_into_the_state_of_the_others_before_it_joins() -> None:
    async def main() -> None:
        calls = Calls(E0)
        await calls.pause_scheduler_async(mode="keep", clear_cache=False)
        await calls.add_lora_async(adapter(7))
        assert calls.shared_state.paused
        calls.core_engines.append(E1.to_bytes(2, "little"))
        assert await calls.is_scheduler_paused_async() is True
        assert calls.of(E1) == []  # It would say otherwise yet.
        assert await calls.bring_up(E1) is None
        assert [(m, a) for e, m, a in calls.made if e == E1] == [
            ("add_lora", (adapter(7),)),
            ("pause_scheduler", ("keep", False)),
        ]
        await calls.resume_scheduler_async()
        assert calls.of(E1)[-1] == "resume_scheduler"
        assert not calls.shared_state.paused

    run(main())


def test_what_changes_while_an_engine_is_brought_up_reaches_it_too() -> None:
    async def main() -> None:
        calls = Calls(E0)
        await calls.pause_scheduler_async(mode="keep")
        calls.core_engines.append(E1.to_bytes(2, "little"))
        call_engine = calls.call_engine

        async def meanwhile(engine_index: EngineIndex, method: str, *args: Any) -> Any:
            answer = await call_engine(engine_index, method, *args)
            if engine_index == E1 and method == "pause_scheduler":
                await calls.sleep_async(1)
            return answer

        calls.call_engine = meanwhile  # type: ignore[method-assign]
        assert await calls.bring_up(E1) is None
        assert calls.of(E1)[-2:] == ["pause_scheduler", "sleep"]

    run(main())


UNDONE = {
    "pause_scheduler": ("resume_scheduler", ("keep", True), ()),
    "sleep": ("wake_up", (1, "abort"), (None,)),
}
"""What undoes a call that has engines stand still, and the arguments of both."""


@pytest.mark.parametrize("halt", UNDONE)
def test_what_is_undone_while_an_engine_is_brought_up_is_undone_there_too(halt: str) -> None:
    """Else it joins, and the requests that it gets stand still for ever."""

    async def main() -> None:
        undo, how, back = UNDONE[halt]
        calls = Calls(E0)
        await calls.add_lora_async(adapter(1))
        await calls.call_utility_async(halt, *how)
        calls.core_engines.append(E1.to_bytes(2, "little"))
        calls.answers[E1, halt] = calls.loop.create_future()
        coming = asyncio.create_task(calls.bring_up(E1))
        await asyncio.sleep(1)
        await calls.call_utility_async(undo, *back)
        calls.answers[E1, halt].set_result(True)
        assert await coming is None
        assert calls.of(E1) == ["add_lora", halt, undo], "and no adapter is loaded twice"

    run(main())


@pytest.mark.parametrize("halt", UNDONE)
def test_an_engine_that_joins_while_the_others_are_being_halted_is_halted_too(halt: str) -> None:
    async def main() -> None:
        calls = Calls(E0)
        calls.answers[E0, halt] = calls.loop.create_future()
        halting = asyncio.create_task(calls.call_utility_async(halt, *UNDONE[halt][1]))
        await asyncio.sleep(1)  # It has requests, which may end first.
        calls.core_engines.append(E1.to_bytes(2, "little"))
        assert await calls.bring_up(E1) is None
        calls.answers[E0, halt].set_result(True)
        await halting
        assert calls.of(E1) == [halt]

    run(main())


@pytest.mark.parametrize("halt", UNDONE)
def test_an_engine_that_joins_while_the_others_go_on_again_goes_on_too(halt: str) -> None:
    async def main() -> None:
        undo, how, back = UNDONE[halt]
        calls = Calls(E0)
        await calls.call_utility_async(halt, *how)
        calls.answers[E0, undo] = calls.loop.create_future()
        waking = asyncio.create_task(calls.call_utility_async(undo, *back))
        await asyncio.sleep(1)
        calls.core_engines.append(E1.to_bytes(2, "little"))
        assert await calls.bring_up(E1) is None
        calls.answers[E0, undo].set_result(True)
        await waking
        assert calls.of(E1) == [halt, undo]
        assert not calls.shared_state.paused

    run(main())


def test_a_pause_that_was_cut_short_is_over_though_its_answer_comes_last() -> None:
    """An engine whose pause waits for its requests answers once it is idle, also if it was told to
    go on long before."""

    async def main() -> None:
        calls = Calls(E0)
        calls.answers[E0, "pause_scheduler"] = calls.loop.create_future()
        pausing = asyncio.create_task(calls.pause_scheduler_async(mode="wait"))
        await asyncio.sleep(1)
        await calls.resume_scheduler_async()
        calls.answers[E0, "pause_scheduler"].set_result(None)
        await pausing
        assert not calls.shared_state.paused
        calls.core_engines.append(E1.to_bytes(2, "little"))
        assert await calls.bring_up(E1) is None
        assert calls.of(E1) == []

    run(main())


@pytest.mark.parametrize("answer", [EngineDeadError(), Exception("boom"), HANGS])
def test_an_engine_that_cannot_be_brought_up_does_not_join(answer: Any) -> None:
    async def main() -> None:
        calls = Calls(E0)
        await calls.sleep_async(1)
        calls.answers[E1, "sleep"] = answer
        why = await calls.bring_up(E1)
        assert why is not None
        assert "into the state of the others" in why
        assert calls.shared_state.joined == {E0}

    run(main())


@pytest.mark.parametrize("fails", [False, True])
def test_an_engine_that_joins_while_the_others_load_an_adapter_loads_it_too(fails: bool) -> None:
    """And it is taken back there too if one of the others cannot."""

    async def main() -> None:
        calls = Calls(E0)
        calls.answers[E0, "add_lora"] = calls.loop.create_future()
        loading = asyncio.create_task(calls.add_lora_async(adapter(1)))
        await asyncio.sleep(1)
        calls.core_engines.append(E1.to_bytes(2, "little"))
        assert await calls.bring_up(E1) is None
        calls.answers[E0, "add_lora"].set_result(Exception("out of memory") if fails else True)
        await asyncio.wait([loading])
        assert (loading.exception() is not None) == fails
        assert calls.of(E1) == ["add_lora", "remove_lora"][: 1 + fails]
        assert len(calls.shared_state.calls()) == 1 - fails

    run(main())


@pytest.mark.parametrize("answer", [Exception("boom"), EngineDeadError(), HANGS])
def test_a_pause_that_no_engine_made_does_not_hold(answer: Any) -> None:
    async def main() -> None:
        calls = Calls(E0)
        calls.answers[E0, "pause_scheduler"] = answer
        await failing(calls.pause_scheduler_async(mode="keep"))
        assert calls.shared_state.calls() == []

    run(main())


@pytest.mark.parametrize("halt", UNDONE)
@pytest.mark.parametrize("answer", [Exception("boom"), EngineDeadError()])
def test_a_halt_that_only_an_engine_made_that_came_meanwhile_holds(halt: str, answer: Any) -> None:
    """Else that engine serves, and its requests stand still: nobody tells it to go on."""

    async def main() -> None:
        undo, how, back = UNDONE[halt]
        calls = Calls(E0)
        calls.answers[E0, halt] = calls.loop.create_future()
        halting = asyncio.create_task(calls.call_utility_async(halt, *how))
        await asyncio.sleep(1)
        calls.core_engines.append(E1.to_bytes(2, "little"))
        assert await calls.bring_up(E1) is None
        calls.answers[E0, halt].set_result(answer)
        assert await failing(halting) is answer or isinstance(answer, EngineDeadError)
        assert calls.of(E1) == [halt]
        assert calls.shared_state.paused
        await calls.call_utility_async(undo, *back)
        assert not calls.shared_state.paused

    run(main())


@pytest.mark.parametrize("dies", [False, True])
def test_a_halt_does_not_hold_if_the_engine_that_came_goes_on_or_dies(dies: bool) -> None:
    async def main() -> None:
        calls = Calls(E0)
        calls.answers[E0, "sleep"] = calls.loop.create_future()
        halting = asyncio.create_task(calls.sleep_async(1))
        await asyncio.sleep(1)
        calls.core_engines.append(E1.to_bytes(2, "little"))
        assert await calls.bring_up(E1) is None
        if dies:
            calls.shared_state.forget(E1)
        else:
            await calls.wake_up_async()
        calls.answers[E0, "sleep"].set_result(Exception("boom"))
        await failing(halting)
        assert calls.shared_state.calls() == []

    run(main())


def test_engines_go_on_though_only_one_that_came_meanwhile_was_told() -> None:
    async def main() -> None:
        calls = Calls(E0)
        await calls.pause_scheduler_async(mode="keep")
        calls.answers[E0, "resume_scheduler"] = calls.loop.create_future()
        resuming = asyncio.create_task(calls.resume_scheduler_async())
        await asyncio.sleep(1)
        calls.core_engines.append(E1.to_bytes(2, "little"))
        assert await calls.bring_up(E1) is None
        calls.answers[E0, "resume_scheduler"].set_result(EngineDeadError())
        await failing(resuming)
        assert calls.of(E1) == ["pause_scheduler", "resume_scheduler"]
        assert calls.shared_state.calls() == []

    run(main())


def test_an_engine_that_comes_does_not_give_up_its_weights() -> None:
    """What others load anew before it joins, it would never load: it would answer nonsense."""

    async def main() -> None:
        calls = Calls(E0)
        await calls.sleep_async(2)
        assert await calls.bring_up(E1) is None
        assert [args[0] for _, _, args in calls.made] == [2, 1]

    run(main())


def test_a_pause_that_is_given_up_does_not_hold() -> None:
    async def main() -> None:
        calls = Calls(E0)
        calls.answers[E0, "pause_scheduler"] = HANGS
        pausing = asyncio.create_task(calls.pause_scheduler_async(mode="keep"))
        await asyncio.sleep(1)
        assert not calls.shared_state.paused, "engines that still step may hang"
        pausing.cancel()
        await asyncio.wait([pausing])
        assert calls.shared_state.calls() == []

    run(main())


def test_an_adapter_that_a_new_engine_cannot_load_does_not_keep_it_out() -> None:
    async def main() -> None:
        calls = Calls(E0)
        await calls.add_lora_async(adapter(1))
        calls.answers[E1, "add_lora"] = Exception("no such folder")
        assert await calls.bring_up(E1) is None

    run(main())


# -- what becomes of their answers


def test_answers_of_all_engines_become_one() -> None:
    """An adapter is there if all have it, gone if any had it, and pinned if all have pinned it."""

    async def main() -> None:
        calls = Calls(E0, E1)

        def say(method: str, one: Any, other: Any) -> None:
            calls.answers |= {(E0, method): one, (E1, method): other}

        say("list_loras", {1, 2}, [2, 3])
        assert await calls.list_loras_async() == {2}
        for one, other in ((True, True), (True, False), (False, False)):
            say("remove_lora", one, other)
            say("pin_lora", one, other)
            assert await calls.remove_lora_async(1) == (one or other)
            assert await calls.pin_lora_async(1) == (one and other)
        say("collective_rpc", [1, 2], [3])
        assert await calls.collective_rpc_async("m", 2.0, (7,), {"k": 8}) == [1, 2, 3]
        assert calls.made[-1] == (E1, "collective_rpc", ("m", 2.0, (7,), {"k": 8}))
        calls.made.clear()
        await calls.save_sharded_state_async("/f", "p", 5)
        assert [(m, a) for _, m, a in calls.made] == [("save_sharded_state", ("/f", "p", 5))]

    run(main())


# -- adapters


@pytest.mark.parametrize("answer", [Exception("out of memory"), HANGS])
def test_an_adapter_that_one_engine_cannot_load_is_taken_back_on_the_others(answer: Any) -> None:
    async def main() -> None:
        calls = Calls(E0, E1, E2)
        calls.answers[E1, "add_lora"] = answer
        await failing(calls.add_lora_async(adapter(1)))
        removed = {e for e, m, a in calls.made if (m, a) == ("remove_lora", (1,))}
        assert removed == {E0, E2}
        assert calls.shared_state.calls() == []

    run(main())


def test_an_adapter_that_was_there_before_stays_where_it_is() -> None:
    async def main() -> None:
        calls = Calls(E0, E1)
        await calls.add_lora_async(adapter(1))
        calls.answers[E1, "add_lora"] = Exception("out of memory")
        await failing(calls.add_lora_async(adapter(1)))
        assert "remove_lora" not in calls.of(E0)

    run(main())


# -- the state that is kept


def after(*calls: tuple[str, tuple[Any, ...], Any]) -> list[str]:
    state = EngineState()
    for method, args, answer in calls:
        state.end(state.begin(method, args), [answer])
    return [call.method for call in state.calls()]


PAUSE, RESUME = ("pause_scheduler", ("keep", True), None), ("resume_scheduler", (), None)
USERS = ("pause_generation", ("abort", True), None)  # since vLLM 0.33
SLEEP, WAKE = ("sleep", (1, "abort"), None), ("wake_up", (None,), True)
PARTLY = ("wake_up", (["weights"],), False)


def test_only_what_still_holds_is_kept() -> None:
    assert after(PAUSE) == ["pause_scheduler"]
    assert after(PAUSE, PAUSE) == ["pause_scheduler"]
    assert after(PAUSE, RESUME) == []
    assert after(USERS, USERS) == ["pause_generation"]
    assert after(USERS, PAUSE) == ["pause_generation", "pause_scheduler"]
    assert after(USERS, PAUSE, RESUME) == []
    assert after(RESUME) == []
    assert after(SLEEP, PARTLY) == ["sleep", "wake_up"]
    assert after(SLEEP, PARTLY, PARTLY) == ["sleep", "wake_up"]
    assert after(SLEEP, PARTLY, WAKE) == []
    assert after(PAUSE, SLEEP, WAKE) == []  # Waking resumes the scheduler.
    assert after(WAKE) == []
    assert after(("reset_prefix_cache", (False, False), True)) == []


def test_calls_that_overlap_hold_in_the_order_in_which_they_began() -> None:
    state = EngineState()
    first, resume = state.begin(*PAUSE[:2]), state.begin(*RESUME[:2])
    second = state.begin(*USERS[:2])
    for call in (resume, second, first):
        state.end(call, [None])
    assert [call.method for call in state.calls()] == ["pause_generation"]


def test_engines_that_were_told_to_wake_before_they_slept_are_asleep() -> None:
    """A sleep waits for requests that run, and waking an engine that is awake changes nothing."""
    state = EngineState()
    sleep = state.begin(*SLEEP[:2])
    state.end(state.begin(*WAKE[:2]), [True])
    assert not state.paused
    state.end(sleep, [None])
    assert [call.method for call in state.calls()] == ["sleep"]


def test_what_goes_on_after_a_sleep_that_failed_does_not_stand_still() -> None:
    """Else no instance that hangs would be found any more."""
    state = EngineState()
    sleep = state.begin(*SLEEP[:2])
    state.end(state.begin(*RESUME[:2]), [None])
    assert not state.paused, "they do not sleep yet"
    state.end(sleep, None)
    assert state.calls() == []
    assert not state.paused


def test_adapters_are_kept_until_they_are_removed() -> None:
    load, pin = ("add_lora", (adapter(1),), True), ("pin_lora", (1,), True)
    assert after(load, pin, PAUSE) == ["add_lora", "pin_lora", "pause_scheduler"]
    assert after(load, pin, ("remove_lora", (1,), True)) == []


def test_no_more_adapters_are_kept_than_an_engine_keeps() -> None:
    """Else a server that has loaded hundreds loads all of them into each instance that comes."""
    state = EngineState(adapters_max=2)
    for number in (1, 2):
        state.end(state.begin("add_lora", (adapter(number),)), [True])
    state.end(state.begin("pin_lora", (1,)), [True])
    for number in (2, 3, 4):
        state.end(state.begin("add_lora", (adapter(number),)), [True])
    assert [call.args[0] for call in state.calls()] == [adapter(1), adapter(4), 1]


def test_an_adapter_that_was_loaded_anew_is_the_last_to_be_dropped() -> None:
    state = EngineState(adapters_max=2)
    for number in (1, 2, 1, 3):
        state.end(state.begin("add_lora", (adapter(number),)), [True])
    assert [call.args[0] for call in state.calls()] == [adapter(1), adapter(3)]


async def test_an_adapter_that_is_unloaded_is_not_loaded_by_engines_that_come() -> None:
    class Models:
        def __init__(self) -> None:
            self.lora_requests = {"a1": adapter(1)}

        async def unload_lora_adapter(self, request: Any) -> Any:
            gone = self.lora_requests.pop(request.lora_name, None)
            return SimpleNamespace(error="not found") if gone is None else "Success"

    state, models = EngineState(), Models()
    state.follow(None)
    state.follow(models)
    for number in (1, 2):
        state.end(state.begin("add_lora", (adapter(number),)), [True])
    await models.unload_lora_adapter(SimpleNamespace(lora_name="a2"))
    assert len(state.calls()) == 2
    assert await models.unload_lora_adapter(SimpleNamespace(lora_name="a1")) == "Success"
    assert [call.args[0] for call in state.calls()] == [adapter(2)]


async def test_an_adapter_that_is_unloaded_as_soon_as_it_is_loaded_is_forgotten_too() -> None:
    class Models:
        def __init__(self) -> None:
            self.lora_requests: dict[str, Any] = {}
            self.lock = asyncio.Lock()  # vLLM has one for each name

        async def unload_lora_adapter(self, request: Any) -> Any:
            async with self.lock:
                del self.lora_requests[request.lora_name]
                return "Success"

    state, models = EngineState(), Models()
    state.follow(models)
    async with models.lock:
        load = state.begin("add_lora", (adapter(1),))
        unloading = asyncio.create_task(models.unload_lora_adapter(SimpleNamespace(lora_name="a1")))
        await asyncio.sleep(0)
        state.end(load, [True])
        models.lora_requests["a1"] = adapter(1)
    await unloading
    assert state.calls() == []


def test_the_record_is_bounded() -> None:
    partly = [("wake_up", ([f"tag {n}"],), False) for n in range(1000)]
    kept = after(SLEEP, *partly)
    assert len(kept) == CALLS_MAX
    assert kept[0] == "sleep"
