"""Which requests a pair of instances gains from moving, by class and size.

One running request of t tokens moves from a source to a destination. Freeness is in decode steps,
and so are all costs.

    S   spare tokens of the source without the request's headroom, its t tokens still in use
    D   spare tokens of the destination with the request's headroom, its t tokens not there yet
    b   the source's batch without the request, 1 at least
    c   the destination's batch with the request
    k   decode steps that it takes to copy one token

Afterwards the two have the freeness

    F_s = (S + t) / b        F_d = (D - t) / c

and the copy has taken k t steps. The lower freeness must rise to `least`, so that no move raises
the highest load: the source's of now, `gain_min`, and `STOP_STEPS`, in which no engine computes the
request. So `tokens_min` is the smallest t with

    F_s >= least + k t   <=>   t >= (least b - S) / (1 - k b)

If k b >= 1 there is none: the batch loses more to the copy than it gains. `tokens_max` is the
largest t that fits into the destination's free memory, with

    F_d >= floor + k t   <=>   t <= (D - floor c) / (1 + k c)
    F_d >= F_s           <=>   t <= (D / c - S / b) / (1 / c + 1 / b)

`floor` is the largest of `least`, the threshold of sources, and 0: below that threshold the
destination would give requests away itself, and below 0 it would preempt. Without the second
condition the two could change places, and the next round would move the request back.

`tokens_wanted` is the smallest t that ends the source's trouble. If a request waits at the head of
its queue, that is S + t >= what must stay free beside the head, so that it can start; else
F_s >= threshold, which is t >= threshold b - S.

A shortage is not divided by the batch (load.py): where `least` is 0 or below, F_s = S + t, and
`tokens_min` is (least - S) / (1 - k).

A waiting request has no KV to copy. It must only fit: `waiting_max` is the largest t with
F_d >= floor, which is t <= D - floor c.
"""

from dataclasses import dataclass

from llumnix.core.events import MoveLimit
from llumnix.core.priorities import Priorities
from llumnix.core.reports import ClassLoad
from llumnix.core.scheduling.load import ratio
from llumnix.core.scheduling.tuning import STOP_STEPS
from llumnix.core.scheduling.view import InstanceView


@dataclass(frozen=True, slots=True, kw_only=True)
class GainRule:
    """The rule of one round of pairing."""

    priorities: Priorities
    threshold: float  # freeness below which an instance is a source
    gain_min: float  # decode steps by which the lower freeness must rise
    copy_steps: float  # decode steps that it takes to copy one token

    def limits(self, source: InstanceView, destination: InstanceView) -> tuple[MoveLimit, ...]:
        """The requests that the pair gains from moving, for each class that has any."""
        return tuple(
            limit
            for rank, requests in enumerate(source.report.classes)
            if (requests.running or requests.waiting)
            and (limit := self._limit(source, destination, rank, requests)) is not None
        )

    def _limit(
        self, source: InstanceView, destination: InstanceView, rank: int, requests: ClassLoad
    ) -> MoveLimit | None:
        copy_steps, priorities = self.copy_steps, self.priorities
        least = source.freeness + self.gain_min + STOP_STEPS
        floor = max(least, self.threshold, 0.0)
        room = room_in(destination)
        spare_d = destination.load.spare_after(rank, 1, priorities)
        batch_d = destination.load.batch + 1
        waiting_max = tokens_min = tokens_max = wanted = 0
        if requests.waiting:
            waiting_max = max(0, min(room, int(spare_d - floor * batch_d)))
        if requests.running:
            load = source.load
            spare_s, batch_s = load.spare_after(rank, -1, priorities), max(1, load.batch - 1)
            relief = smallest_relief(spare_s, batch_s, load.total, least, copy_steps)
            above_floor = (spare_d - floor * batch_d) / (1 + copy_steps * batch_d)
            even = (ratio(spare_d, batch_d) - spare_s / batch_s) / (1 / batch_d + 1 / batch_s)
            tokens_min = max(1, relief)
            tokens_max = max(0, min(room, int(min(above_floor, even))))
            relieved = load.keep if load.head else self.threshold * batch_s
            wanted = max(0, int(relieved - spare_s))
        if (not requests.running or tokens_max < tokens_min) and not waiting_max:
            return None
        return MoveLimit(
            rank=rank,
            tokens_min=tokens_min,
            tokens_wanted=wanted,
            tokens_max=tokens_max,
            waiting_max=waiting_max,
        )


def room_in(destination: InstanceView) -> int:
    """The largest request, in KV tokens, that fits there now, with the blocks that a migration has
    in reserve."""
    return destination.load.room(destination.report.block_tokens)


def smallest_relief(spare: float, batch: int, total: int, least: float, copy_steps: float) -> int:
    """The tokens of the smallest request whose leaving lifts the source's freeness to `least`, and
    by `copy_steps` more for each token; more than `total` if there is none. `spare`,
    `batch`: S and b."""
    if least <= 0:
        return int((least - spare) / max(1e-9, 1 - copy_steps)) + 1 if spare < least else 0
    short, rise = least * batch - spare, 1 - copy_steps * batch
    if short <= 0:
        return 0
    return int(short / rise) + 1 if rise > 0 else total + 1
