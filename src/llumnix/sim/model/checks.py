"""What must hold in a simulated cluster, whatever goes wrong. Checks look in from outside: all may
be called at any time, but for `check_rest`, which is for the time when everything has ended."""

from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.types import EngineIndex, RequestId
from llumnix.errors import LlumnixError
from llumnix.sim.model.cluster import Cluster

REST_S = 300.0
"""How long migrations that outlive their requests may take to end."""


class BrokenPromiseError(LlumnixError):
    """A check found what must never be."""


def check_view(scheduler: Scheduler, now: float) -> None:
    """What the scheduler believes agrees with itself."""
    try:
        scheduler.view.check(now)
    except AssertionError as error:
        raise BrokenPromiseError(f"the scheduler's view at {now:.3f} s: {error}") from error


def check_streams(cluster: Cluster) -> None:
    """The frontend's table of streams agrees with itself."""
    try:
        cluster.clients.streams.check()
    except AssertionError as error:
        raise BrokenPromiseError(f"the streams at {cluster.now:.3f} s: {error}") from error


def check_owners(cluster: Cluster) -> None:
    """No request runs on two engines, and no engine has more KV than it has."""
    seen: dict[RequestId, EngineIndex] = {}
    for index, instance in cluster.by_engine.items():
        engine = instance.engine
        for name, seq in engine.requests.items():
            if seq.stopped:
                continue
            if name in seen:
                raise BrokenPromiseError(f"{name} runs on engines {seen[name]} and {index}")
            seen[name] = index
        held = sum(s.blocks for s in (*engine.requests.values(), *engine.arriving.values()))
        used = engine.memory.total - engine.memory.free
        if engine.memory.free < 0 or (not engine.memory.shares and held > used):
            raise BrokenPromiseError(f"engine {index} counts {used} blocks in use, holds {held}")


def come_to_rest(cluster: Cluster) -> None:
    """Lets migrations that outlive their requests end, then looks whether anything is left over."""
    until_s = cluster.now + REST_S
    cluster.go_on(until_s, lambda: _at_rest(cluster))
    check_rest(cluster)


def _at_rest(cluster: Cluster) -> bool:
    return not cluster.starting and all(i.empty for i in cluster.instances.values())


def check_rest(cluster: Cluster) -> None:
    """Every request has ended, with exactly its tokens unless its client hung up or its engine
    died; nothing is left anywhere."""
    check_streams(cluster)
    left = [f"{stream.request} is still open" for stream in cluster.clients.streams]
    for job in cluster.clients.jobs.values():
        if job.ended_s is None and not job.error:
            left.append(f"{job.id} was forgotten")
        if job.ended_s is not None and job.got != job.answer:
            left.append(f"{job.id} got {job.got} of {job.answer} tokens")
    for instance in cluster.instances.values():
        engine = instance.engine
        leaked = engine.memory.total - engine.memory.free
        if leaked or not engine.idle() or instance.llumlet.busy:
            left.append(f"{instance.id} still has {list(engine.requests)}, {leaked} blocks")
    if left:
        raise BrokenPromiseError("; ".join(left[:10]))
