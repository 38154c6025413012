"""What goes wrong in a simulated cluster, and what must hold all the same.

Faults are drawn with dice of their own, so a seed brings the same ones. Checks look in from
outside: `check_owners` and `check_streams` may be called at any time, `check_rest` once everything
has ended.
"""

import random
from dataclasses import dataclass

from llumnix.core.messages import PeerMessage
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.types import EngineIndex, RequestId
from llumnix.errors import LlumnixError, UsageError
from llumnix.sim.model.cluster import Cluster

CONTROLLER_BACK_S = 1.0
LATE_S = 0.2
REST_S = 300.0
CHECK_EVERY_S = 0.5


class BrokenPromiseError(LlumnixError):
    """A check found what must never be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """`instance_s`, `controller_s`, `client_s`: mean time between crashes of some instance, of the
    controller, and between clients that hang up; 0 for never. `link`: share of the messages between
    llumlets that are lost, as many that come twice, and as many that come late, out of order."""

    instance_s: float = 0.0
    controller_s: float = 0.0
    client_s: float = 0.0
    link: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Faults":
        """`instance=60,controller=120,client=5,link=0.05`, each of them optional."""
        found: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            try:
                number = float(value)
            except ValueError:
                number = -1.0
            most = 0.3 if name == "link" else float("inf")
            if name not in ("instance", "controller", "client", "link") or not 0 <= number <= most:
                raise UsageError(
                    f"--faults {part!r}: write instance=S, controller=S or client=S (mean seconds "
                    "between two) or link=SHARE (0 to 0.3)"
                )
            found[name if name == "link" else f"{name}_s"] = number
        return cls(**found)


class Trouble:
    """Brings faults to a cluster for as long as requests come, and checks it all the while."""

    def __init__(self, faults: Faults, seed: int) -> None:
        self._faults = faults
        self._dice = random.Random(f"{seed} faults")
        self._until_s = 0.0
        self.crashes = 0
        self.controller_crashes = 0
        self.hung_up = 0

    def begin(self, cluster: Cluster, until_s: float) -> None:
        """To be called before the cluster runs."""
        self._until_s = until_s
        faults = self._faults
        for mean_s, what in (
            (faults.instance_s, self._crash),
            (faults.controller_s, self._controller),
            (faults.client_s, self._client),
        ):
            if mean_s:
                self._next(cluster, mean_s, what)
        cluster.at(0.0, self._check, cluster)

    def wire(self, cluster: Cluster, to: EngineIndex, message: PeerMessage) -> None:
        """Carries a message between llumlets, or does not."""
        link = self._faults.link if cluster.now < self._until_s else 0.0
        if self._dice.random() >= link:
            late_s = self._dice.uniform(0, LATE_S) if self._dice.random() < link else 0.0
            cluster.carry(to, message, late_s)
        if self._dice.random() < link:
            cluster.carry(to, message, self._dice.uniform(0, LATE_S))

    def _next(self, cluster: Cluster, mean_s: float, what) -> None:  # type: ignore[no-untyped-def]
        when_s = cluster.now + self._dice.expovariate(1 / mean_s)
        if when_s < self._until_s:
            cluster.at(when_s, self._happens, cluster, mean_s, what)

    def _happens(self, cluster: Cluster, mean_s: float, what) -> None:  # type: ignore[no-untyped-def]
        what(cluster)
        self._next(cluster, mean_s, what)

    def _crash(self, cluster: Cluster) -> None:
        if cluster.instances:
            self.crashes += 1
            cluster.kill(cluster.instances[self._dice.choice(sorted(cluster.instances))])

    def _controller(self, cluster: Cluster) -> None:
        if cluster.scheduler is not None:
            self.controller_crashes += 1
            cluster.scheduler = None
            cluster.at(cluster.now + CONTROLLER_BACK_S, self._back, cluster)

    def _back(self, cluster: Cluster) -> None:
        cluster.scheduler = Scheduler(cluster.setup.scheduler)

    def _client(self, cluster: Cluster) -> None:
        names = sorted(stream.request for stream in cluster.frontend.streams)
        if names:
            self.hung_up += 1
            cluster.frontend.hang_up(self._dice.choice(names))

    def _check(self, cluster: Cluster) -> None:
        check_owners(cluster)
        check_streams(cluster)
        if cluster.now < self._until_s:
            cluster.at(cluster.now + CHECK_EVERY_S, self._check, cluster)


def check_view(scheduler: Scheduler, now: float) -> None:
    """What the scheduler believes agrees with itself."""
    try:
        scheduler.view.check(now)
    except AssertionError as error:
        raise BrokenPromiseError(f"the scheduler's view at {now:.3f} s: {error}") from error


def check_streams(cluster: Cluster) -> None:
    """The frontend's table of streams agrees with itself."""
    try:
        cluster.frontend.streams.check()
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
    return not cluster.starting and all(
        i.engine.idle() and not i.llumlet.busy and not i.stepping
        for i in cluster.instances.values()
    )


def check_rest(cluster: Cluster) -> None:
    """Every request has ended, with exactly its tokens unless its client hung up or its engine
    died; nothing is left anywhere."""
    check_streams(cluster)
    left = [f"{stream.request} is still open" for stream in cluster.frontend.streams]
    for job in cluster.frontend.jobs.values():
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
