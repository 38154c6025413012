"""Classes of requests: which are served first, and which have memory kept free for them.

A request carries one number, vLLM's priority (lower is served earlier). Its class follows from that
number, so that nothing else has to travel: the first class, most urgent first, whose number is not
below it. The last class takes the rest.
"""

from bisect import bisect_left
from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

from llumnix.core.settings import PrioritySettings, key_digest
from llumnix.errors import UsageError

_TIERS = {"priority": 0, "flex": -1}
"""OpenAI's service tiers that ask for more or less than usual, and the place of the class that
they ask for: the most or the least urgent."""
NUMBER_MAX = 2**31 - 1
"""The least urgent number; higher ones count as this."""
AGING_LOOK_EVERY_S = 0.5
"""An engine looks so often at its queue for requests that have waited for `aging_s`."""
STARTED_S = 1e11
"""The arrival of a request that was preempted is put back by this: to before the epoch, so that it
goes before all that arrived since, and can be told from them."""


class QueueKey(NamedTuple):
    """Where a request stands in its engine's queue: the lowest is served first. Of those that run
    the highest is preempted first."""

    priority: int
    arrived_s: float


class Priorities:
    """The classes of one deployment, most urgent first. A class is named by its place, `rank`.
    `ignore_priorities`: all requests are treated alike, whatever they ask for. `keyed`: the server
    has API keys, so a class that is more urgent than usual is for those that it was granted to."""

    def __init__(
        self, settings: PrioritySettings, *, ignore_priorities: bool = False, keyed: bool = False
    ) -> None:
        self._ignore_priorities = ignore_priorities
        self.classes = tuple(sorted(settings.classes, key=lambda c: c.priority))
        self._numbers = [c.priority for c in self.classes]
        self._with_headroom = [(r, c.headroom) for r, c in enumerate(self.classes) if c.headroom]
        self._need = settings.headroom_need
        # An instance keeps no larger share of its memory free, whatever runs there.
        self._headroom_set = self.headroom_max = sum(h for _, h in self._with_headroom)
        self.aging_s = settings.aging_s
        self.preempt = settings.preempt and not ignore_priorities
        numbers = {c.name: c.priority for c in self.classes}
        self._caps = {key: numbers[name] for key, name in settings.key_caps.items()}
        self._default_cap = 0 if keyed else self._numbers[0]
        if settings.default_cap is not None:
            self._default_cap = numbers[settings.default_cap]

    def __len__(self) -> int:
        return len(self.classes)

    def rank(self, priority: int) -> int:
        """The class of a request with that number."""
        return bisect_left(self._numbers, priority, hi=len(self._numbers) - 1)

    def rank_named(self, name: str) -> int:
        """The class of that name; `UsageError` if there is none."""
        for rank, known in enumerate(self.classes):
            if known.name == name:
                return rank
        names = ", ".join(c.name for c in self.classes)
        raise UsageError(f"no priority class {name!r}; there are: {names}")

    def resolve(
        self,
        number: int,
        name: str | None = None,
        tier: str | None = None,
        key: str | None = None,
        granted: str | None = None,
    ) -> int:
        """The number that a request runs under: no more urgent than its cap, nor than the most
        urgent class. `number`: vLLM's own field, which wins unless it is 0. `name`: of a class.
        `tier`: OpenAI's `service_tier`. `key`: the API key, which may have a cap of its own.
        `granted`: the class that is this key's cap by the file of --keys."""
        if self._ignore_priorities:
            return 0
        if number == 0 and name is not None:
            number = self.classes[self.rank_named(name)].priority
        elif number == 0 and tier in _TIERS:
            # "flex" asks for less than the usual class only where there is such a class.
            number = self.classes[_TIERS[tier]].priority
            if tier == "flex":
                number = max(0, number)
        cap = self._default_cap
        if key is not None and self._caps:
            cap = self._caps.get(key_digest(key), cap)
        if granted is not None:
            cap = self.classes[self.rank_named(granted)].priority
        return min(max(number, cap, self._numbers[0]), NUMBER_MAX)

    def aged(self, priority: int, waited_s: float) -> int:
        """The number that a request is queued under once it has waited for that long."""
        return min(priority, self._numbers[0]) if waited_s >= self.aging_s else priority

    def queue_key(
        self, priority: int, arrived_s: float, *, waited_s: float, preempted: bool
    ) -> QueueKey:
        """The key of a request that has waited for `waited_s`. One that was preempted goes before
        all of its class that have not started, since its client is in the middle of a stream.
        `arrived_s`: when it came, or what an earlier key made of that."""
        if preempted and arrived_s > -STARTED_S / 2:
            arrived_s -= STARTED_S
        return QueueKey(self.aged(priority, waited_s), arrived_s)

    def needed(self, used: float) -> "Priorities":
        """The same classes, with the headroom to keep while instances use that share of their KV
        memory on the mean. Headroom lets urgent requests decode among fewer neighbours. But what
        one instance keeps free fills the others, so it may use `headroom_need` times the mean in
        any case."""
        if self._need is None:
            return self
        found = copy(self)
        found.headroom_max = min(self._headroom_set, max(0.0, 1 - self._need * used))
        return found

    def headroom(self, total: int, running: Sequence[int], above: int | None = None) -> float:
        """Tokens to keep free on an instance of `total` KV tokens that runs that many requests of
        each class. `above`: only for classes that are more urgent than this rank."""
        share = 0.0
        for rank, headroom in self._with_headroom:
            if (above is None or rank < above) and rank < len(running) and running[rank]:
                share += headroom
        if not share:
            return 0.0
        return total * min(share, self.headroom_max)
