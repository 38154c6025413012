"""How a request that failed ends for its consumer: with what it reads, and nothing left behind."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import async_llm
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from llumnix.frontend.engines.outputs import FailedRequest
from llumnix.frontend.llm import FleetLLM, RequestLostError
from support.frontend import front, request

DIED = "The instance died."


class LLM(FleetLLM):
    """Only what ends requests."""

    def __init__(self) -> None:
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.aborted: list[str] = []
        client = SimpleNamespace(start_task=lambda work: work.close(), ensure_served=lambda: None)
        self.engine_core: Any = client
        self.log_requests = False

    def __del__(self) -> None:
        pass

    def abort(self, request_id: Any, internal: bool = False) -> Any:
        assert internal
        self.aborted.append(request_id)

        async def nothing() -> None:
            pass

        return nothing()

    def register(self, name: str, parent: Any = None, **fields: Any) -> RequestOutputCollector:
        queue = RequestOutputCollector(RequestOutputKind.DELTA, name)
        one = request(name, external_req_id=name, **fields)
        if one.sampling_params is not None:
            one.sampling_params.detokenize = False
        self.output_processor.add_request(one, None, parent, 0, queue)
        return queue


def failed(name: str, **fields: Any) -> FailedRequest:
    return FailedRequest(request=name, slot=0, why=DIED, **fields)


def test_a_request_raises_for_its_consumer_and_ends_with_an_output() -> None:
    llm = LLM()
    queue = llm.register("a")
    assert llm._fail(failed("a"))
    with pytest.raises(RequestLostError, match=DIED) as lost:
        queue.get_nowait()
    told = create_error_response(lost.value).error
    assert (told.message, told.code) == (DIED, 500)
    assert not llm._fail(failed("nobody"))


def test_the_other_sequences_of_a_request_are_aborted() -> None:
    llm = LLM()
    parent = ParentRequest(
        request("p", external_req_id="p", sampling_params=SamplingParams(n=2, max_tokens=5))
    )
    names = [parent.get_child_info(index)[0] for index in range(2)]
    for name in names:
        llm.register(name, parent)
    assert not llm._fail(failed(names[1]))
    assert llm.aborted == ["p"]


@pytest.mark.parametrize(
    "fields",
    [{"resumable": True}, {"sampling_params": None, "pooling_params": PoolingParams(task="embed")}],
    ids=["session", "pooling"],
)
def test_what_no_output_ends_is_taken_out_at_once(fields: dict[str, Any]) -> None:
    llm = LLM()
    queue = llm.register("a", **fields)
    assert not llm._fail(failed("a"))
    assert llm.output_processor.request_states == {}
    with pytest.raises(RequestLostError, match=DIED):
        queue.get_nowait()


def test_the_clients_own_mistake_is_told_as_such() -> None:
    llm = LLM()
    queue = llm.register("a")
    assert llm._fail(failed("a", status=400))
    with pytest.raises(VLLMValidationError, match=DIED) as bad:
        queue.get_nowait()
    assert create_error_response(bad.value).error.code == 400


async def test_vllms_generate_passes_the_error_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM()

    async def add(*_: Any, **__: Any) -> RequestOutputCollector:
        queue = llm.register("a")
        llm._fail(failed("a"))
        return queue

    async def check(_: Any) -> None:
        pass

    monkeypatch.setattr("vllm.v1.engine.async_llm.AsyncLLM.add_request", add)
    llm._grammars = SimpleNamespace(check=check)  # type: ignore[assignment]
    with pytest.raises(RequestLostError, match=DIED):
        async for _ in llm.generate({"type": "token"}, SamplingParams(), "a"):
            pass


async def test_a_stop_is_no_failure_of_the_output_handler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(async_llm, "logger", SimpleNamespace(exception=said.append))
    stock = async_llm.cancel_task_threadsafe

    def late(task: Any) -> None:
        time.sleep(0.2)  # The thread of the stop loses its core.
        stock(task)

    monkeypatch.setattr(async_llm, "cancel_task_threadsafe", late)
    async with front(tmp_path) as one:
        llm = LLM()
        llm.engine_core, llm.leaving, llm.tracing = one.client, True, None
        llm.log_stats, llm.logger_manager = False, None
        llm.renderer = SimpleNamespace(mm_processor_cache=None, shutdown=lambda: None)
        llm.output_handler = None
        llm._run_output_handler()
        handler = llm.output_handler
        assert handler is not None
        late_one = llm.register("a")
        await asyncio.sleep(0)
        await asyncio.to_thread(llm.shutdown)
        await asyncio.wait([handler], timeout=5)
        # What is open all the same, as where the loop was too late to end it, hears of the end.
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(late_one.get(), 5)
    assert handler.cancelled()
    assert said == []
