"""Grammars are checked beside the event loop."""

import asyncio
import copy
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import StructuredOutputsConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from llumnix.frontend.grammars import THREADS_MAX, GrammarChecks

MODEL: Any = SimpleNamespace(is_diffusion=False)


def checks() -> GrammarChecks:
    return GrammarChecks(MODEL, StructuredOutputsConfig(backend="xgrammar"), object())


def choosing(*choice: str) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(choice=list(choice)))


async def test_the_loop_goes_on_while_a_grammar_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may, where = threading.Event(), []

    def slow(self: SamplingParams, *_: Any) -> None:
        where.append(threading.current_thread().name)
        assert may.wait(30)

    monkeypatch.setattr(SamplingParams, "_validate_structured_outputs", slow)
    check = asyncio.ensure_future(checks().check(choosing("a")))
    for _ in range(100):
        await asyncio.sleep(0)  # With the check on the loop this would never be reached.
    assert not check.done()
    may.set()
    await check
    assert where[0].startswith("llumnix-grammar")


async def test_a_grammar_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    params = choosing("a", "b")
    await checks().check(params)
    checked = copy.deepcopy(params)
    assert params.structured_outputs is not None
    assert params.structured_outputs._backend == "xgrammar"
    assert params.structured_outputs.grammar is not None  # What vLLM made of the choice.
    monkeypatch.setattr(
        "vllm.v1.structured_output.backend_xgrammar.validate_xgrammar_grammar", None
    )
    params._validate_structured_outputs(MODEL, StructuredOutputsConfig(), object())
    assert checked.structured_outputs == params.structured_outputs


async def test_a_bad_grammar_is_refused_as_by_vllm() -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(grammar="root ::= ("))
    with pytest.raises(VLLMValidationError, match="Invalid grammar"):
        await checks().check(params)


async def test_a_request_without_a_grammar_needs_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llumnix.frontend.grammars.threading.Thread", None)
    await checks().check(SamplingParams())
    await checks().check(object())


async def test_checks_are_bounded_and_hold_no_stop_whoever_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may, running = threading.Event(), []

    def slow(self: SamplingParams, *_: Any) -> None:
        running.append(threading.current_thread())
        assert may.wait(30)

    monkeypatch.setattr(SamplingParams, "_validate_structured_outputs", slow)
    one = checks()
    asked = [asyncio.ensure_future(one.check(choosing("a"))) for _ in range(3 * THREADS_MAX)]
    await asyncio.sleep(0.05)
    for check in asked[:THREADS_MAX]:
        check.cancel()  # Their checks go on, and count.
    await asyncio.sleep(0.05)
    assert len(running) == THREADS_MAX
    assert all(thread.daemon for thread in running)
    may.set()
    await asyncio.gather(*asked, return_exceptions=True)
    assert len(running) == 3 * THREADS_MAX
