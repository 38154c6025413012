"""A request that is sent again to an engine that has just been told to abort it."""

import queue
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.request import Request

from llumnix.core.messages import REVIVE, Revive
from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId
from llumnix.engine.instance import EngineInstance
from llumnix.engine.migration.vllm_core import VllmCore, take_order
from llumnix.engine.migration.vllm_destination import VllmDestination
from llumnix.wire import encode

R = RequestId("r")


class Recorder:
    """Whatever is called on it is noted."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls.append((name, *args))


def order() -> Revive:
    return Revive(
        migration=MigrationId("m1"),
        request=R,
        destination=EngineIndex(1),
        epoch=Epoch(2),
        outputs=[5, 6],
    )


def sent_again() -> Request:
    params = SamplingParams(max_tokens=9, extra_args={REVIVE: encode(order())})
    return Request(R, [1, 2, 3], params, None)


def test_the_abort_before_it_does_not_count_for_it() -> None:
    """vLLM puts aborts into a second queue too, which a step empties after requests have come."""
    engine, host = object.__new__(EngineInstance), Recorder()
    host.llumlet = SimpleNamespace(has_lost=lambda client: False)
    engine._host, engine._reader = host, Recorder()  # type: ignore[assignment]
    engine._reporter = Recorder()  # type: ignore[assignment]
    engine.scheduler = Recorder()  # type: ignore[assignment]
    engine.aborts_queue = queue.Queue()
    for names in ([R], ["other", R], "another"):
        engine.aborts_queue.put_nowait(names)  # type: ignore[arg-type]
    engine._handle_client_request(EngineCoreRequestType.ABORT, [R])
    engine.add_request(sent_again())
    engine._process_aborts_queue()
    names = [call[0] for call in host.calls]
    assert names == ["client_gone", "revive", "client_gone"]
    assert host.calls[1][1] == order()
    assert host.calls[2][1] == ["other", "another"]


def test_it_is_not_ready_before_the_steps_that_it_was_in_have_landed() -> None:
    """A step in flight names requests, and would give this one the old one's token."""
    step, later = (object(), object(), object()), (object(), object(), object())
    core = object.__new__(VllmCore)
    core.engine = SimpleNamespace(batch_queue=deque([step]))  # type: ignore[assignment]
    core.scheduler = SimpleNamespace(requests={}, finished_req_ids=set())
    arrivals = object.__new__(VllmDestination)
    arrivals._core, arrivals._scheduler, arrivals._arriving = core, core.scheduler, {}
    assert arrivals.admit(R, sent_again(), [5, 6]) is None
    assert arrivals.ready(R) is False
    core.engine.batch_queue.appendleft(later)
    assert arrivals.ready(R) is False
    core.engine.batch_queue.pop()
    assert arrivals.ready(R) is True


@pytest.mark.parametrize("body", ["text", 7, [1, 2], {}, b"", b"odd"])
def test_what_a_client_writes_under_its_key_is_no_order(body: Any) -> None:
    """`vllm_xargs` of HTTP requests get there."""
    request = Request(R, [1], SamplingParams(max_tokens=9, extra_args={REVIVE: body, "k": 1}), None)
    assert take_order(request) is None
    assert request.sampling_params is not None
    assert request.sampling_params.extra_args == {"k": 1}


def test_an_order_that_cannot_be_read_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    request = Request(R, [1], SamplingParams(max_tokens=9, extra_args={REVIVE: b"odd"}), None)
    assert take_order(request) is None
    (told,) = caplog.messages
    assert told.startswith(f"Request {R}: its order to go on here: not a message of ours")


def test_the_order_is_taken_out_of_the_request() -> None:
    request = sent_again()
    assert take_order(request) == order()
    assert take_order(request) is None
