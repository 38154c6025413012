"""Whether there is room for an instance (cluster/supervision/capacity.py)."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.cluster.supervision import capacity
from llumnix.cluster.supervision.capacity import (
    GIB,
    check_one_more,
    check_start,
    wait_for_room,
)
from llumnix.errors import CapacityError


def on_gpus(
    monkeypatch: pytest.MonkeyPatch, free: list[int], total: list[int], each: int = 1
) -> Any:
    """A launch of instances of `each` GPUs, in a cluster of hosts with so many."""
    from ray._private import state

    def per_node(numbers: list[int]) -> Any:
        return lambda: {f"n{i}": {"GPU": float(n)} for i, n in enumerate(numbers)}

    monkeypatch.setattr(state, "available_resources_per_node", per_node(free))
    monkeypatch.setattr(state, "total_resources_per_node", per_node(total))
    return SimpleNamespace(device="GPU", devices_per_instance=each)


def on_cpus(monkeypatch: pytest.MonkeyPatch, cores: int, memory: float, kv: float | None) -> Any:
    monkeypatch.setattr(capacity, "cores_and_memory", lambda: (cores, memory))
    cache = SimpleNamespace(kv_cache_memory_bytes=kv)
    config = SimpleNamespace(cache_config=cache)
    return SimpleNamespace(device=None, devices_per_instance=1, vllm_config=config)


def test_a_start_needs_devices_that_are_free_not_only_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_start(on_gpus(monkeypatch, [2, 2], [4, 4]), 4)
    with pytest.raises(CapacityError, match=r"4 of the cluster's 8 are free; .*use --instances 4"):
        check_start(on_gpus(monkeypatch, [2, 2], [4, 4]), 5)
    with pytest.raises(CapacityError, match="there are 8: use --instances 8 or fewer"):
        check_start(on_gpus(monkeypatch, [4, 4], [4, 4]), 9)
    with pytest.raises(CapacityError, match=r"0 of the cluster's 4 are free; .*wait for them$"):
        check_start(on_gpus(monkeypatch, [0], [4]), 1)


def test_the_devices_of_an_instance_are_on_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = on_gpus(monkeypatch, [1, 1], [2, 2], each=2)
    with pytest.raises(CapacityError, match="2 of the cluster's 4 are free"):
        check_start(launch, 1)
    with pytest.raises(CapacityError, match="needs 2 GPU"):
        check_one_more(launch, there=1, waiting=0)


def test_an_instance_that_starts_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray counts the devices of one that it has placed; those that still wait are ours to count."""
    launch = on_gpus(monkeypatch, [2], [4])
    check_one_more(launch, there=2, waiting=0)
    check_one_more(launch, there=2, waiting=1)
    with pytest.raises(
        CapacityError, match=r"2 of 4 are free \(2 are wanted by instances that start\)"
    ):
        check_one_more(launch, there=2, waiting=2)


def test_cores_bound_the_instances_of_a_cpu_host(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = on_cpus(monkeypatch, cores=2, memory=64 * GIB, kv=GIB)
    check_start(launch, 8)
    with pytest.raises(CapacityError, match=r"--instances 9: there are 2 cores.*use --instances 8"):
        check_start(launch, 9)
    check_one_more(launch, there=7, waiting=0)
    with pytest.raises(CapacityError, match="DELETE one first; the most is 8"):
        check_one_more(launch, there=8, waiting=0)


def test_memory_bounds_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = on_cpus(monkeypatch, cores=64, memory=7.5 * GIB, kv=2 * GIB)
    check_start(launch, 3)
    with pytest.raises(
        CapacityError, match=r"4 instances want 8\.0 GiB for KV alone, and 7\.5 .*--instances 3, or"
    ):
        check_start(launch, 4)
    with pytest.raises(CapacityError, match="at the start: lower --kv-cache-memory-bytes"):
        check_start(on_cpus(monkeypatch, cores=64, memory=GIB, kv=2 * GIB), 1)
    check_start(on_cpus(monkeypatch, cores=64, memory=GIB, kv=None), 3)


async def test_hosts_may_join_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "ASKED_EVERY_S", 0.01)
    looks: list[int] = []

    def check() -> None:
        looks.append(1)
        if len(looks) < 3:
            raise CapacityError("there are 2: use --instances 2")

    said: list[str] = []
    await wait_for_room(check, 60.0, said.append)
    assert len(looks) == 3
    assert said == ["waiting for hosts to join Ray, at most 60 s: there are 2: use --instances 2"]
    looks.clear()
    with pytest.raises(CapacityError, match="there are 2"):
        await wait_for_room(check, 0.0, said.append)
    assert (len(looks), len(said)) == (1, 1)


async def test_a_wait_for_hosts_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "ASKED_EVERY_S", 0.01)

    def check() -> None:
        raise CapacityError("too few")

    async with asyncio.timeout(10):
        with pytest.raises(CapacityError, match="too few"):
            await wait_for_room(check, 0.1, lambda _: None)
