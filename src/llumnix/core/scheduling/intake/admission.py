"""Decides whether a new request is refused because too many wait.

Rules
- No more than a class's `queue_max` of its requests wait, over all instances.
- Once `admission.queue_max` requests of all classes wait, none is let in while the mean freeness is
  below zero. Above zero those that wait will start soon.
- A request counts as waiting if it is in an engine's queue, or on its way there and in no report
  yet, and the engine's next step cannot start it: memory is short for the first in the queue, or
  there is no slot for the request. So it does not count what a burst leaves in the queue of an idle
  engine for a moment.
- A request that was let in before, and whose engine died, is never refused.
- A refused request may be tried again when the queue is likely to be empty, at the pace at which
  requests ended in the last `PACE_S`: after `RETRY_MIN_S` to `RETRY_MAX_S`, less or more by a
  fifth, so that clients that were refused together do not come back together.
"""

from collections import deque
from zlib import crc32

from llumnix.core.events import NoInstance, RefusalCode, RequestArrived
from llumnix.core.reports import LoadReport
from llumnix.core.scheduling.presets import priorities_of
from llumnix.core.scheduling.view import ClusterView, InstanceView
from llumnix.core.settings import SchedulerSettings

PACE_S = 10
RETRY_MIN_S = 1.0
RETRY_MAX_S = 60.0
SPREAD = 0.2


class Admission:
    """Looks at every new request, if there is a limit. Each costs a look at every instance then."""

    def __init__(self, settings: SchedulerSettings, view: ClusterView) -> None:
        self._view = view
        self.take_limits(settings)
        self._ended: deque[list[int]] = deque()  # of the last seconds: which, and how many ended

    def take_limits(self, settings: SchedulerSettings) -> None:
        """These are the limits from now on."""
        self._queue_max = settings.admission.queue_max
        self._by_class = [c.queue_max for c in priorities_of(settings).classes]
        self.limits = self._queue_max is not None or any(m is not None for m in self._by_class)

    def take(self, report: LoadReport, now: float) -> None:
        """Takes in a report that the view does not have yet."""
        known = self._view.get(report.instance)
        if known is None:
            return  # It is counted without limits too, since a reload may bring some.
        before = known.report
        if before.engine_index != report.engine_index or report.finished <= before.finished:
            return
        second = int(now)
        if not self._ended or self._ended[-1][0] != second:
            self._ended.append([second, 0])
        self._ended[-1][1] += report.finished - before.finished
        self._forget(now)

    def refusal(self, fact: RequestArrived, now: float) -> NoInstance | None:
        """Why the request is refused; None if it is let in."""
        if not self.limits or fact.again:
            return None
        accepting = [v for v in self._view if v.accepting]
        if not accepting:
            return None  # That is another matter.
        rank = self._view.priorities.rank(fact.priority)
        most = self._by_class[rank]
        if most is not None:
            waiting = sum(_waiting_of(v, rank) for v in accepting)
            if waiting >= most:
                name = self._view.priorities.classes[rank].name
                why = f"{waiting} requests of class {name} wait, and its queue_max is {most}"
                return self._refused("queue_full", why, fact, waiting, now)
        if self._queue_max is not None:
            waiting = sum(map(_waiting, accepting))
            if waiting >= self._queue_max and self._no_room(accepting):
                why = f"{waiting} requests wait, and the limit is {self._queue_max} without room"
                return self._refused("overloaded", why, fact, waiting, now)
        return None

    def _no_room(self, accepting: list[InstanceView]) -> bool:
        """Whether the mean freeness is below zero."""
        return sum(map(self._spare, accepting)) < 0

    def _spare(self, view: InstanceView) -> float:
        """Tokens of memory that are left there. None are, whatever the last report shows, once more
        are on their way than it has slots for: the last of them would wait for a slot."""
        load = view.load
        spare = load.spare(self._view.priorities)
        if load.slots and load.batch > load.slots:
            return min(spare, -max(1, view.booked_tokens))
        return spare

    def _refused(
        self, code: RefusalCode, why: str, fact: RequestArrived, waiting: int, now: float
    ) -> NoInstance:
        self._forget(now)
        ended = sum(count for _, count in self._ended)
        wait_s = waiting * PACE_S / ended if ended else RETRY_MAX_S
        spread = 1 + SPREAD * (crc32(fact.request.encode()) % 2001 / 1000 - 1)
        retry_s = min(max(wait_s, RETRY_MIN_S), RETRY_MAX_S) * spread
        return NoInstance(request=fact.request, why=why, code=code, retry_s=round(retry_s, 1))

    def _forget(self, now: float) -> None:
        while self._ended and self._ended[0][0] < now - PACE_S:
            self._ended.popleft()


def _waiting(view: InstanceView) -> int:
    """How many requests wait at the instance, or will: all that are there or on their way and do
    not run, but for those that the engine's next step can start."""
    load, report = view.load, view.report
    if report.lacks(load.free):
        return load.waiting + len(view.bookings)
    return max(0, load.batch + load.waiting - load.slots) if load.slots else 0


def _waiting_of(view: InstanceView, rank: int) -> int:
    """How many of these are of that class, at most."""
    queued = view.report.classes[rank].waiting if rank < len(view.report.classes) else 0
    return min(queued + view.booked[rank], _waiting(view))
