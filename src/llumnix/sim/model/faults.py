"""What goes wrong in a simulated cluster. Faults are drawn with dice of their own, so that a seed
brings the same ones whatever else changes."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from llumnix.core.messages import PeerMessage
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.types import EngineIndex
from llumnix.errors import UsageError
from llumnix.sim.model.checks import check_owners, check_streams
from llumnix.sim.model.clock import DEATHS, TICKS
from llumnix.sim.model.cluster import Cluster

CONTROLLER_BACK_S = 1.0
LATE_S = 0.2
CHECK_EVERY_S = 0.5

Fault = Callable[[Cluster], None]


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


class FaultInjector:
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
        cluster.clock.at(0.0, TICKS, self._check, cluster)

    def wire(self, cluster: Cluster, to: EngineIndex, message: PeerMessage) -> None:
        """Carries a message between llumlets, or does not."""
        link = self._faults.link if cluster.now < self._until_s else 0.0
        if self._dice.random() >= link:
            late_s = self._dice.uniform(0, LATE_S) if self._dice.random() < link else 0.0
            cluster.carry(to, message, late_s)
        if self._dice.random() < link:
            cluster.carry(to, message, self._dice.uniform(0, LATE_S))

    def _next(self, cluster: Cluster, mean_s: float, what: Fault) -> None:
        when_s = cluster.now + self._dice.expovariate(1 / mean_s)
        if when_s < self._until_s:
            cluster.clock.at(when_s, DEATHS, self._happens, cluster, mean_s, what)

    def _happens(self, cluster: Cluster, mean_s: float, what: Fault) -> None:
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
            cluster.clock.at(cluster.now + CONTROLLER_BACK_S, DEATHS, self._back, cluster)

    def _back(self, cluster: Cluster) -> None:
        cluster.scheduler = Scheduler(cluster.setup.scheduler)

    def _client(self, cluster: Cluster) -> None:
        names = sorted(stream.request for stream in cluster.clients.streams)
        if names:
            self.hung_up += 1
            cluster.hang_up(self._dice.choice(names))

    def _check(self, cluster: Cluster) -> None:
        check_owners(cluster)
        check_streams(cluster)
        if cluster.now < self._until_s:
            cluster.clock.at(cluster.now + CHECK_EVERY_S, TICKS, self._check, cluster)
