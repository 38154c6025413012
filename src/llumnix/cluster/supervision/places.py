"""On which host an engine without devices is made: on the one that has the fewest of ours.

Ray's own way of spreading actors counts the resources that they hold, and ours hold none there: it
would put all on one host.
"""

import asyncio
import threading
from collections import Counter
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Run(Protocol):
    """What is asked of a run (cluster/supervision/runs.py)."""

    unwanted: bool
    ended: asyncio.Future[Any] | None


class Places:
    """The hosts of all runs that live or are to live. Called on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hosts: dict[Run, str] = {}

    def take(self, run: Run) -> Any:
        """Ray's strategy that makes the run on the host with the fewest of ours. If that is lost
        meanwhile, the run fails, and its instance's next one is elsewhere. As a mere wish (`soft`)
        Ray grants it to every other actor or so."""
        alive = [str(node["NodeID"]) for node in ray.nodes() if node["Alive"]]
        with self._lock:
            self._hosts = {r: host for r, host in self._hosts.items() if not _is_over(r)}
            counts = Counter(self._hosts.values())
            host = min(alive, key=lambda host: counts[host])
            self._hosts[run] = host
        return NodeAffinitySchedulingStrategy(host, soft=False)


def _is_over(run: Run) -> bool:
    return run.unwanted or (run.ended is not None and run.ended.done())
