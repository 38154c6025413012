"""Whether the cluster has room for an instance.

An instance that computes on GPUs needs some that are free, another needs cores and memory. All
functions ask Ray, and may have to wait for its answer."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from llumnix.cluster.ray_calls import ray_call
from llumnix.engine.launch import EngineLaunch
from llumnix.errors import CapacityError

CPU_INSTANCES_PER_CORE_MAX = 4
GIB = 2**30
ASKED_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """Devices of one kind in the cluster."""

    free: int
    total: int
    places_free: int  # instances that fit on the free ones, each on one host
    places_total: int  # instances that would fit if all were free


def devices(kind: str, each: int) -> Devices:
    """What Ray has of a kind ("GPU"), for instances of `each`."""
    from ray._private.state import available_resources_per_node, total_resources_per_node

    free = [int(node.get(kind, 0)) for node in available_resources_per_node().values()]
    total = [int(node.get(kind, 0)) for node in total_resources_per_node().values()]
    return Devices(
        free=sum(free),
        total=sum(total),
        places_free=sum(n // each for n in free),
        places_total=sum(n // each for n in total),
    )


def cores_and_memory() -> tuple[int, float]:
    """Cores of the cluster, and its bytes of memory as Ray found them free when it started."""
    import ray

    resources = ray.cluster_resources()
    return int(resources.get("CPU", 0)), float(resources.get("memory", 0))


def check_start(launch: EngineLaunch, count: int) -> None:
    """Raises `CapacityError` unless `count` instances can be started now, before any is."""
    kind, each = launch.device, launch.devices_per_instance
    if kind is None:
        _check_cpus(launch, count, f"--instances {count}", "use --instances")
        return
    there = devices(kind, each)
    if count <= there.places_free:
        return
    needs = f"--instances {count} needs {count * each} {kind}s ({each} an instance, on one host)"
    parallel = ", or lower the parallel sizes" if each > 1 else ""
    if count <= there.places_total:
        raise CapacityError(
            f"{needs}, and {there.free} of the cluster's {there.total} are free; others hold the "
            f"rest: wait for them, or use --instances {there.places_free}{parallel}"
            if there.places_free
            else f"{needs}, and {there.free} of the cluster's {there.total} are free; others hold "
            f"the rest: wait for them{parallel}"
        )
    raise CapacityError(
        f"{needs}, and there are {there.total}: use --instances {there.places_total} or fewer"
        f"{parallel}"
    )


def check_one_more(launch: EngineLaunch, *, there: int, waiting: int) -> None:
    """Raises `CapacityError` unless one more instance can be started. `there` counts the instances
    that have their devices or will get them; `waiting` counts those of them that Ray has given none
    yet."""
    kind, each = launch.device, launch.devices_per_instance
    if kind is None:
        _check_cpus(launch, there + 1, "one more instance", "DELETE one first; the most is")
        return
    found = devices(kind, each)
    if found.places_free - waiting < 1:
        wanted = f" ({waiting * each} are wanted by instances that start)" if waiting else ""
        raise CapacityError(
            f"one more instance needs {each} {kind}(s) on one host, and {found.free} of "
            f"{found.total} are free{wanted}: DELETE an instance first, or add a host to the "
            "Ray cluster"
        )


async def ask_ray(check: Callable[[], None]) -> None:
    """Makes one of these checks, beside the event loop."""
    try:
        await ray_call(check)
    except TimeoutError as error:
        raise CapacityError("Ray does not say what is free; try again shortly") from error


async def wait_for_room(
    check: Callable[[], None], wait_s: float, say: Callable[[str], None]
) -> None:
    """Makes the check again and again until it succeeds; its `CapacityError` after `wait_s`."""
    until_s, said = time.monotonic() + wait_s, False
    while True:
        try:
            return await ask_ray(check)
        except CapacityError as error:
            if time.monotonic() >= until_s:
                raise
            if not said:
                say(f"waiting for hosts to join Ray, at most {wait_s:g} s: {error}")
                said = True
        await asyncio.sleep(ASKED_EVERY_S)


def _check_cpus(launch: EngineLaunch, count: int, what: str, mend: str) -> None:
    cores, memory = cores_and_memory()
    most = max(1, cores * CPU_INSTANCES_PER_CORE_MAX)
    if count > most:
        raise CapacityError(
            f"{what}: there are {cores} cores, and {CPU_INSTANCES_PER_CORE_MAX} instances on each "
            f"are the most that is allowed: {mend} {most}"
        )
    each = launch.vllm_config.cache_config.kv_cache_memory_bytes or 0
    if memory and count * each > memory:
        fit = int(memory // each)
        raise CapacityError(
            f"{what}: {count} instances want {count * each / GIB:.1f} GiB for KV alone, and "
            f"{memory / GIB:.1f} GiB of memory were free at the start: "
            + (f"{mend} {fit}, or " if fit else "")
            + "lower --kv-cache-memory-bytes"
        )
