"""Requests that wait with KV blocks in their hands: who gives them up, and when."""

from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus, StreamingUpdate

from llumnix.engine.migration.vllm_port import STUCK_STEPS, VllmPort
from support.no_model import BLOCK, add, engine_core

STEPS_MAX = 200


class Engine:
    """An engine core without a model, and our port on it."""

    def __init__(self, model: Path, blocks: int, *, ahead: bool) -> None:
        self.core: Any = engine_core(model, blocks=blocks, ahead=ahead)
        client: Any = SimpleNamespace()
        self.port = VllmPort(self.core, [], client, lambda ticket, why: None)

    def step(self) -> None:
        _, ran = self.core.step_fn()
        self.port.between_steps(ran)
        self.port.destination.begin_pulls()

    def take_out(self, *requests: Request) -> None:
        """As moves that came to nothing leave them: they wait with their KV."""
        names: list[Any] = [r.request_id for r in requests]
        for name in names:
            self.port.stop(name)
        while any(r.num_in_flight_tokens for r in requests):
            self.step()
        for name in names:
            self.port.handover_state(name, 0)
            self.port.resume(name)

    def until_all_have_ended(self) -> int:
        for n in range(STEPS_MAX):
            if not self.core.scheduler.requests:
                return n
            self.step()
        raise AssertionError(f"still there: {list(self.core.scheduler.requests)}")


@pytest.fixture(params=[False, True], ids=["one-step-at-a-time", "a-step-ahead"])
def ahead(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def two_that_lack_a_block(engine: Engine) -> list[Request]:
    """Each holds half of the memory, to the last token, and needs one block more."""
    prompts = {"a": range(9 * BLOCK - 2), "b": range(500, 500 + 9 * BLOCK - 2)}
    two = [add(engine.core, name, list(prompt), 40) for name, prompt in prompts.items()]
    while min(r.num_computed_tokens for r in two) < 9 * BLOCK:
        engine.step()
    engine.take_out(*two)
    assert engine.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 0
    return two


def test_of_two_that_hold_what_the_other_lacks_one_gives_up_and_both_end(
    tiny_model: Path, ahead: bool
) -> None:
    engine = Engine(tiny_model, 18, ahead=ahead)
    a, b = two_that_lack_a_block(engine)
    engine.until_all_have_ended()
    assert [a.num_output_tokens, b.num_output_tokens] == [40, 40]
    assert sorted([a.num_preemptions, b.num_preemptions])[0] == 0, "one was enough"


def test_whatever_comes_between_two_steps_costs_nobody_its_kv(tiny_model: Path) -> None:
    engine = Engine(tiny_model, 18, ahead=False)
    a, b = two_that_lack_a_block(engine)
    for _ in range(10 * STUCK_STEPS):
        engine.port.destination.begin_pulls()
    assert (a.num_computed_tokens, b.num_computed_tokens) == (9 * BLOCK, 9 * BLOCK)


def test_a_paused_engine_takes_nobodys_kv(tiny_model: Path, ahead: bool) -> None:
    engine = Engine(tiny_model, 18, ahead=ahead)
    a, b = two_that_lack_a_block(engine)
    engine.core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(10 * STUCK_STEPS):
        engine.step()
    assert (a.num_computed_tokens, b.num_computed_tokens) == (9 * BLOCK, 9 * BLOCK)
    engine.core.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.until_all_have_ended()


def test_one_alone_waits_for_what_a_move_holds(tiny_model: Path) -> None:
    engine = Engine(tiny_model, 18, ahead=False)
    a, b = two_that_lack_a_block(engine)
    b_name: Any = b.request_id
    engine.port.stop(b_name)  # It is handed over, and its verdict is awaited.
    for _ in range(10 * STUCK_STEPS):
        engine.step()
    assert a.num_computed_tokens == 9 * BLOCK
    engine.port.release(b_name)
    engine.until_all_have_ended()
    assert (a.num_preemptions, a.num_output_tokens) == (0, 40)


def test_a_session_that_waits_for_its_next_input_keeps_what_it_was_told(
    tiny_model: Path, ahead: bool
) -> None:
    engine = Engine(tiny_model, 40, ahead=ahead)
    told = list(range(5 * BLOCK))
    session = add(engine.core, "session", list(told), 2, resumable=True)
    session.streaming_queue = deque()
    for _ in range(5):
        engine.step()
    assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
    for _ in range(10 * STUCK_STEPS):  # Others' messages and empty steps.
        engine.step()
    engine.core.scheduler._update_request_as_session(session, following([9] * BLOCK))
    assert list(session.all_token_ids)[: len(told)] == told
    assert session.num_tokens > len(told) + BLOCK


def following(tokens: list[int]) -> StreamingUpdate:
    return StreamingUpdate(
        mm_features=None, prompt_token_ids=tokens, max_tokens=2, arrival_time=1.0,
        sampling_params=SamplingParams(max_tokens=2),
    )  # fmt: skip
