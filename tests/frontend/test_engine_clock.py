"""Stamps of engines on hosts that were started at other times than ours."""

import time
from pathlib import Path

import pytest
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs

from llumnix.core.types import EngineIndex
from llumnix.frontend.engines.clock import ONE_CLOCK_S, WINDOW_S, EngineClock
from support.frontend import front, packed

UPTIMES_S = [-500_000.0, -0.5, 3.0, 2_000_000.0]


def said(at_s: float, *events_s: float) -> EngineCoreOutputs:
    events = [EngineCoreEvent.new_event(EngineCoreEventType.QUEUED, s) for s in events_s]
    output = EngineCoreOutput("r", [1], events=events or None)
    return EngineCoreOutputs(outputs=[output], timestamp=at_s)


@pytest.mark.parametrize("ahead_s", UPTIMES_S)
def test_stamps_are_ours_whatever_the_uptimes(ahead_s: float) -> None:
    clock = EngineClock()
    for step in range(100):
        now_s = 1000.0 + step
        outputs = said(now_s - ahead_s - 0.001, now_s - ahead_s - 0.301)
        clock.translate(outputs, now_s)
        assert outputs.timestamp == pytest.approx(now_s, abs=0.002)
        (event,) = outputs.outputs[0].events or []
        assert outputs.timestamp - event.timestamp == pytest.approx(0.3)


def test_stamps_of_this_host_stay_as_they_are() -> None:
    clock = EngineClock()
    for late_s in (0.0001, 0.9 * ONE_CLOCK_S, 30.0, 0.0):
        outputs = said(1000.0 - late_s, 990.0)
        clock.translate(outputs, 1000.0)
        assert outputs.timestamp == 1000.0 - late_s


def test_a_message_that_was_long_on_its_way_is_not_taken_for_a_change_of_clocks() -> None:
    clock, away_s = EngineClock(), 5000.0
    clock.translate(said(1000.0 - away_s), 1000.0)
    late = said(1000.5 - away_s)
    clock.translate(late, 1002.0)
    assert late.timestamp == pytest.approx(1000.5)


def test_drift_is_followed() -> None:
    clock, drift = EngineClock(), 1e-5
    for second in range(0, 100_000, 10):
        now_s = float(second)
        outputs = said(now_s * (1 - drift) - 7000.0)
        clock.translate(outputs, now_s)
        assert outputs.timestamp == pytest.approx(now_s, abs=2.5 * WINDOW_S * drift)


async def test_the_client_hands_on_stamps_of_one_clock(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        now_s = time.monotonic()
        for engine, away_s in ((0, 0.0), (1, 9000.0)):
            await one.add_request(f"r{engine}", engine)
            outputs = said(now_s - away_s)
            outputs.engine_index = EngineIndex(engine)
            outputs.outputs[0].request_id = f"r{engine}"
            one.take_in(packed(outputs))
        stamps = [one.client.outputs_queue.get_nowait().timestamp for _ in range(2)]
        assert stamps == pytest.approx([now_s] * 2, abs=0.5)
