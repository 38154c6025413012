"""Nobody is preempted for an urgent request that something else keeps from starting."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest
from vllm.v1.request import RequestStatus

from llumnix.core.priorities import Priorities
from llumnix.core.settings import PrioritySettings
from llumnix.engine.queueing import Queueing
from llumnix.engine.urgent import UrgentAdmission
from support.no_model import BLOCK, add, engine_core

HIGH, NORMAL = -100, 0
SLOTS = 8


class Line:
    """An engine core without a model, with our preemption before each of its steps."""

    def __init__(self, model: Path, *, ahead: bool = False) -> None:
        self.core: Any = engine_core(model, blocks=100, ahead=ahead)
        self.scheduler = self.core.scheduler
        priorities = Priorities(PrioritySettings())
        Queueing(self.scheduler, priorities)
        self.urgent = UrgentAdmission(self.scheduler, priorities)

    def add(self, name: str, priority: int, tokens: int = 30, **more: Any) -> Any:
        return add(self.core, name, list(range(BLOCK)), tokens, priority=priority, **more)

    def fill(self, **more: Any) -> None:
        for n in range(SLOTS):
            self.add(f"normal-{n}", NORMAL, **more)
        self.step()

    def step(self) -> int:
        preempted = self.urgent.make_room()
        self.core.step_fn()
        return preempted

    def runs(self, name: str) -> bool:
        return any(r.request_id == name for r in self.scheduler.running)


@pytest.fixture(params=[False, True], ids=["one-step-at-a-time", "a-step-ahead"])
def line(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[Line]:
    one = Line(tiny_model, ahead=request.param)
    yield one
    one.core.abort_requests(list(one.scheduler.requests))
    one.core.shutdown()


def adapter(number: int) -> LoRARequest:
    return LoRARequest(lora_name=f"a{number}", lora_int_id=number, lora_path="nowhere")


def test_nobody_is_preempted_for_one_whose_adapter_has_no_place(line: Line) -> None:
    line.scheduler.lora_config = SimpleNamespace(max_loras=1)
    line.fill(lora_request=adapter(1))
    line.add("urgent", HIGH, lora_request=adapter(2))
    assert sum(line.step() for _ in range(10)) == 0
    line.add("like them", HIGH - 1, lora_request=adapter(1))
    line.step()
    assert line.runs("like them")


def test_a_session_that_waits_for_its_client_keeps_nobody_from_starting(line: Line) -> None:
    session = line.add("session", NORMAL, tokens=2, resumable=True)
    while not line.scheduler.num_waiting_for_streaming_input:
        line.step()
    assert session in line.scheduler.kv_holding_waiting
    for n in range(SLOTS - 1):
        line.add(f"normal-{n}", NORMAL)
    line.step()
    line.add("urgent", HIGH)
    line.step()
    assert line.runs("urgent")


def test_one_that_waits_for_its_grammar_does_not_stand_in_the_way(line: Line) -> None:
    line.fill()
    blocked = line.add("blocked", HIGH - 2)
    blocked.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    blocked.structured_output_request = SimpleNamespace(grammar=None)
    line.add("urgent", HIGH)
    assert line.step() == 1
    assert line.runs("urgent")
    assert not line.runs("blocked")
    blocked.structured_output_request = None


def test_nobody_is_preempted_for_one_whose_last_tokens_are_not_home(line: Line) -> None:
    line.fill()
    urgent = line.add("urgent", HIGH)
    urgent.num_stale_output_tokens = 1
    assert line.urgent.make_room() == 0
    urgent.num_stale_output_tokens = 0
    assert line.step() == 1
    assert line.runs("urgent")
