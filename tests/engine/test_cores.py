"""How instances share a CPU host's cores."""

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.device_communicators import shm_broadcast

from llumnix.engine import cores
from llumnix.engine.cores import NAP_S, share_of_cores
from llumnix.engine.migration.worker import LlumnixWorker


@pytest.mark.parametrize(
    ("cores", "slot", "slots", "ranks", "share"),
    [
        ([0, 1, 2, 3], 0, 1, 1, None),  # alone: vLLM's own choice
        ([0, 1], 0, 2, 1, "0"),
        ([0, 1], 1, 2, 1, "1"),
        (list(range(8)), 1, 2, 1, "4,5,6,7"),
        (list(range(8)), 1, 2, 2, "4,5|6,7"),
        ([0, 1], 2, 3, 1, "0"),  # more instances than cores: in turn
        ([4, 9], 1, 2, 1, "9"),  # a host where not all cores are ours
        ([0, 1], 0, 1, 2, "0|1"),  # tensor parallel on a small host
        ([0], 0, 1, 2, "0|0"),
    ],
)
def test_share(cores: list[int], slot: int, slots: int, ranks: int, share: str | None) -> None:
    assert share_of_cores(cores, slot, slots, ranks) == share


def test_no_core_is_shared_while_there_are_enough() -> None:
    shares = [share_of_cores(list(range(16)), slot, 4, 2) for slot in range(4)]
    used = [c for s in shares for part in str(s).split("|") for c in part.split(",")]
    assert sorted(map(int, used)) == list(range(16))


@pytest.mark.parametrize("who", ["engine", "worker"])
def test_on_a_cpu_host_an_engine_and_its_workers_sleep_while_one_waits_for_the_other(
    monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """Cores on which they poll are lost to the frontends."""
    monkeypatch.setattr(shm_broadcast, "sched_yield", shm_broadcast.sched_yield)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    if who == "engine":
        cores.take_devices(0, 2, 1)
    else:
        _open_worker(monkeypatch)
    waiting = shm_broadcast.SpinCondition.__new__(shm_broadcast.SpinCondition)
    waiting.is_reader, waiting.busy_loop_s, waiting.last_read = True, 60.0, time.monotonic()
    slept_s: list[float] = []
    monkeypatch.setattr(time, "sleep", slept_s.append)
    waiting.wait()
    assert slept_s == [NAP_S]


def test_elsewhere_vllm_waits_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import platforms

    before = shm_broadcast.sched_yield
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    cores.nap_while_waiting()
    assert shm_broadcast.sched_yield is before


def _open_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker does first, up to its agent."""
    from llumnix.engine.migration import worker

    def enough(model_runner: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(worker, "take_packed", enough)
    monkeypatch.setattr(sys, "setswitchinterval", lambda interval: None)
    one: Any = LlumnixWorker()
    one.model_runner = None
    with pytest.raises(InterruptedError):
        one.llumnix_open("", b"", None)
