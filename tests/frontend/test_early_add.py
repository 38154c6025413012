"""Requests that are added ahead of their consumer."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from llumnix.frontend.early_add import OutputStream, PendingAdd


class Engine:
    """Adds after a turn, generates three outputs, and notes what was aborted. Whoever is in
    `refused` is not added."""

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.added: list[str] = []
        self.aborted: list[str] = []
        self.may = asyncio.Event()
        self.may.set()

    async def add(self, request: str) -> Any:
        await self.may.wait()
        if request in self.refused:
            raise ValueError(f"{request} is too long")
        self.added.append(request)
        return SimpleNamespace(request_id=request)

    async def abort(self, request: str, *, internal: bool) -> None:
        assert internal
        self.aborted.append(request)

    async def outputs(self, pending: PendingAdd) -> AsyncGenerator[int, None]:
        queue = await pending.outcome()
        try:
            for number in range(3):
                await asyncio.sleep(0)
                yield number
        except (asyncio.CancelledError, GeneratorExit):
            await self.abort(queue.request_id, internal=True)
            raise

    def generate(self, request: str) -> OutputStream[int]:
        pending = PendingAdd(self.add(request), self.abort)
        return OutputStream(self.outputs(pending), pending)


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_it_is_added_before_anybody_asks() -> None:
    engine = Engine()
    outputs = engine.generate("a")
    await turns()
    assert engine.added == ["a"]
    assert [number async for number in outputs] == [0, 1, 2]
    one = engine.generate("b")
    assert [await anext(one, None) for _ in range(4)] == [0, 1, 2, None]
    del one, outputs
    gc.collect()
    await turns()
    assert engine.aborted == []


@pytest.mark.parametrize("there", [False, True], ids=["while it is added", "once it is there"])
@pytest.mark.parametrize("close", [True, False], ids=["closed", "forgotten"])
async def test_who_is_never_asked_for_is_dropped(there: bool, close: bool) -> None:
    engine = Engine()
    if not there:
        engine.may.clear()
    outputs: OutputStream[int] | None = engine.generate("a")
    await turns()
    assert outputs is not None
    if close:
        await outputs.aclose()
    outputs = None
    gc.collect()
    await turns()
    engine.may.set()
    await turns()
    assert engine.aborted == engine.added == (["a"] if there else [])


async def test_who_stops_midway_is_seen_to_by_the_generator() -> None:
    engine = Engine()
    outputs = engine.generate("a")
    assert await anext(outputs) == 0
    await outputs.aclose()
    await turns()
    assert engine.aborted == ["a"]


async def test_what_is_wrong_is_told_to_who_asks(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine("a", "b")
    outputs = engine.generate("a")
    await turns()
    with pytest.raises(ValueError, match="too long"):
        await anext(outputs)
    # And to nobody, if nobody asks.
    unasked: OutputStream[int] | None = engine.generate("b")
    await turns()
    assert unasked is not None
    unasked = None
    gc.collect()
    await turns()
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_a_consumer_that_is_cancelled_cancels_what_adds() -> None:
    engine = Engine()
    engine.may.clear()
    outputs = engine.generate("a")
    task = asyncio.ensure_future(anext(outputs))
    await turns()
    task.cancel()
    await turns()
    engine.may.set()
    await turns()
    assert task.cancelled()
    assert engine.added == []


@pytest.mark.parametrize("turn", range(4))
async def test_a_cancel_in_any_turn_leaves_nothing_running(turn: int) -> None:
    """In one of them it is added already, and its consumer not awake yet."""
    engine = Engine()
    engine.may.clear()

    async def consume() -> None:
        async for _ in engine.generate("a"):
            await asyncio.Event().wait()

    task = asyncio.ensure_future(consume())
    await turns()
    engine.may.set()
    await turns(turn)
    task.cancel()
    await asyncio.wait([task])
    del task
    await turns()
    assert engine.aborted == engine.added == (["a"] if turn else [])


async def test_one_that_is_refused_keeps_nobody_else_running() -> None:
    """Whoever iterates over several, one after the other, forgets those after it."""
    engine = Engine("a")

    async def consume() -> None:
        several = [engine.generate("a"), engine.generate("b")]
        for outputs in several:
            async for _ in outputs:
                pass

    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            await consume()
        await turns()
        assert engine.aborted == engine.added == ["b"]
    finally:
        gc.enable()
