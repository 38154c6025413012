"""Grammars of requests that move in are compiled beside the engine's thread."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from llumnix.core.migration.port import Refusal
from llumnix.core.types import RequestId
from llumnix.engine.migration.vllm_destination import FED_MAX
from llumnix.engine.migration.vllm_port import VllmPort
from support.no_model import engine_core

R = RequestId("r")
PATIENCE_S = 20.0


class Manager:
    """Stands in for vLLM's: its backend takes as long as the test wants."""

    def __init__(self, real: Any) -> None:
        self.executor = real.executor
        self.may_build = threading.Event()
        self.building = self.built = 0
        self.threads: set[int] = set()
        self.fed: list[int] = []
        self.error: Exception | None = None

    def grammar_init(self, request: Any) -> None:
        self.threads.add(threading.get_ident())
        if not self.built:
            self.building += 1
            assert self.may_build.wait(PATIENCE_S)
            self.built += 1
        if self.error is not None:
            raise self.error
        request.structured_output_request.grammar = SimpleNamespace()

    def accept_tokens(self, request: Any, tokens: list[int]) -> bool:
        self.fed += tokens
        return True


class Engine:
    def __init__(self, model: Path) -> None:
        core: Any = engine_core(model, blocks=100)
        self.manager = Manager(core.scheduler.structured_output_manager)
        core.scheduler.structured_output_manager = self.manager
        client: Any = SimpleNamespace(open_links=lambda *_: None, ranks=1)
        self.port = VllmPort(core, [], client, lambda *_: None)
        self.port.destination._linked.add(("there",))

    def reserve(self, outputs: list[int]) -> None:
        params = SamplingParams(
            max_tokens=5000, structured_outputs=StructuredOutputsParams(regex="a*")
        )
        body = MsgpackEncoder().encode(
            EngineCoreRequest(
                request_id=R,
                prompt_token_ids=[1, 2, 3],
                mm_features=None,
                sampling_params=params,
                pooling_params=None,
                arrival_time=1.7e9,
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )
        assert self.port.reserve(R, bytes(body[0]), outputs, 0, ["there"]) == 0

    def until_ready(self) -> bool | Refusal:
        for _ in range(1000):
            if ready := self.port.ready(R):
                return ready
            threading.Event().wait(0.005)
        raise AssertionError("it never got ready")


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    return Engine(tiny_model)


def test_the_engine_goes_on_while_a_backend_is_built_and_never_two_build_it(
    engine: Engine,
) -> None:
    manager = engine.manager
    engine.reserve([])
    assert engine.port.ready(R) is False
    request = SimpleNamespace(structured_output_request=SimpleNamespace(grammar=None))
    # As the thread that takes requests in does.
    other = threading.Thread(target=lambda: manager.grammar_init(request))
    other.start()
    assert engine.port.ready(R) is False
    manager.may_build.set()
    other.join(PATIENCE_S)
    assert engine.until_ready() is True
    assert (manager.building, manager.built) == (1, 1)
    assert threading.get_ident() not in manager.threads


def test_what_cannot_be_compiled_is_declined(engine: Engine) -> None:
    engine.manager.may_build.set()
    engine.manager.error = ValueError("no such backend")
    engine.reserve([])
    ready = engine.until_ready()
    assert isinstance(ready, Refusal)
    assert "no such backend" in ready.why


def test_a_grammar_is_fed_a_bounded_number_of_tokens_between_two_steps(engine: Engine) -> None:
    manager = engine.manager
    manager.may_build.set()
    tokens = list(range(3 * FED_MAX + 1))
    engine.reserve(tokens)
    fed = [0]
    for _ in range(1000):
        ready = engine.port.ready(R)
        if len(manager.fed) != fed[-1]:
            fed.append(len(manager.fed))
        if ready:
            break
        threading.Event().wait(0.002)
    assert fed == [0, FED_MAX, 2 * FED_MAX, 3 * FED_MAX, 3 * FED_MAX + 1]
    assert manager.fed == tokens
