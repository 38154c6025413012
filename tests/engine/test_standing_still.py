"""An engine that stands still for a handover that is near, or does without prompts."""

import queue
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequestType

from llumnix.core.limits import MigrationLimits
from llumnix.engine.cores import FAST_SWITCH_S, ThreadSwitching
from llumnix.engine.instance import EngineInstance
from llumnix.engine.migration.host import LlumletHost
from llumnix.engine.waiting_calls import WaitingCalls

WAKEUP = (EngineCoreRequestType.WAKEUP, None)


class Host:
    """One that holds the engine until `until_s`, or until `over` has been dealt with."""

    def __init__(self) -> None:
        self.until_s = time.monotonic() + 5
        self.handled: list[Any] = []

    def hold_s(self, ends_s: float | None) -> float:
        assert ends_s is None
        return 0.0 if "over" in self.handled else max(0.0, self.until_s - time.monotonic())


def made(host: Host, **attributes: Any) -> EngineInstance:
    engine = object.__new__(EngineInstance)
    engine._host = host  # type: ignore[assignment]
    engine.input_queue = queue.Queue()
    engine.batch_queue = None
    engine.running = True  # type: ignore[attr-defined]
    engine.has_work = lambda: True  # type: ignore[method-assign]
    engine.is_running = lambda: engine.running  # type: ignore[method-assign,attr-defined]
    engine._handle_client_request = (  # type: ignore[method-assign]
        lambda kind, what: host.handled.append(what)
    )
    for name, value in attributes.items():
        setattr(engine, name, value)
    return engine


def test_it_deals_with_what_comes_and_goes_on_when_the_handover_came() -> None:
    host = Host()
    engine = made(host)
    began = time.monotonic()
    for turn, what in enumerate(("a request", "over", "after it"), 1):
        threading.Timer(0.1 * turn, engine.input_queue.put, [(None, what)]).start()
    engine._process_input_queue()
    assert host.handled[:2] == ["a request", "over"]
    assert 0.19 < time.monotonic() - began < 4


def test_it_waits_no_longer_than_it_should() -> None:
    host = Host()
    host.until_s = time.monotonic() + 0.05
    made(host)._process_input_queue()
    assert host.until_s <= time.monotonic() < host.until_s + 4


@pytest.mark.parametrize("busy", [{"running": False}, {"batch_queue": ["a step in flight"]}])
def test_it_never_waits_while_it_shuts_down_or_has_a_step_in_flight(busy: dict[str, Any]) -> None:
    host = Host()
    made(host, **busy)._process_input_queue()
    assert time.monotonic() < host.until_s - 4


def test_a_shutdown_ends_the_wait() -> None:
    host = Host()
    engine = made(host)

    def stop() -> None:
        engine.running = False  # type: ignore[attr-defined]
        engine.input_queue.put(WAKEUP)

    threading.Timer(0.05, stop).start()
    engine._process_input_queue()
    assert time.monotonic() < host.until_s - 4


def test_a_step_that_puts_prompts_off_goes_on_with_the_others(engine: Any) -> None:
    core, said = engine.core, []
    engine.add("first", list(range(3, 100)), SamplingParams(max_tokens=60, ignore_eos=True))
    while len(said) < 3:
        said += engine.step()
    engine.add("second", list(range(3, 200)), SamplingParams(max_tokens=3, ignore_eos=True))
    core._should_throttle_prefills = lambda: True
    try:
        later = [name for _ in range(5) for name, *_ in engine.step()]
    finally:
        del core._should_throttle_prefills
    assert later
    assert set(later) == {"first"}
    assert not engine.port.prompts_in_flight
    assert len(core.scheduler.waiting) == 1
    while not engine.idle():
        later += [name for name, *_ in engine.step()]
    assert "second" in later


class Busy:
    """A llumlet with a migration under way, or none, and a port."""

    busy = True

    def poll(self, now: float) -> list[Any]:
        return []

    def begin_pulls(self) -> None:
        pass


def test_threads_take_the_lock_fast_while_a_request_moves_and_shortly_after() -> None:
    """Its first token would else leave later than the last one left its source."""
    before_s, calm_s = sys.getswitchinterval(), 0.005  # Another host here may be in a hurry.
    sys.setswitchinterval(calm_s)
    host, llumlet = object.__new__(LlumletHost), Busy()
    host.llumlet = llumlet  # type: ignore[assignment]
    host.port = SimpleNamespace(destination=llumlet)  # type: ignore[assignment]
    host._here, host._switching = queue.SimpleQueue(), ThreadSwitching()
    host._orders, host._calls = queue.SimpleQueue(), WaitingCalls(llumlet)  # type: ignore[arg-type]
    host._guarded = SimpleNamespace(retry=lambda: None)  # type: ignore[assignment]
    host._config = SimpleNamespace(limits=MigrationLimits())  # type: ignore[assignment]
    host._send = list.clear  # type: ignore[assignment,method-assign]
    try:
        for busy in (True, False):
            llumlet.busy = busy
            host.poll()
            assert sys.getswitchinterval() < calm_s / 2
        time.sleep(2 * FAST_SWITCH_S)
        host.poll()
        assert sys.getswitchinterval() == calm_s
    finally:
        sys.setswitchinterval(before_s)
