"""Pairing as its rules are told: each part of a round looks at all instances. Slow, and kept to
hold `Pairing` to."""

from collections.abc import Iterable, Iterator
from itertools import islice, takewhile

from llumnix.core.codes import MoveCode
from llumnix.core.events import MoveLimit, MoveOrder
from llumnix.core.scheduling.gain import GainRule, room_in
from llumnix.core.scheduling.pairing import (
    DRAIN_MOVES_MAX,
    RESCUES_MAX,
    Pairing,
    _anything,
    _waiting,
    moves_in,
    moves_out,
)
from llumnix.core.scheduling.tuning import ORDERS_MAX, TRIES_MAX
from llumnix.core.scheduling.view import ClusterView, InstanceView
from llumnix.core.types import InstanceId

BALANCE, DRAIN, HEADROOM, QUEUE = (
    MoveCode.BALANCE,
    MoveCode.DRAIN,
    MoveCode.HEADROOM,
    MoveCode.QUEUE,
)


class PlainPairing(Pairing):
    """Decides what `Pairing` decides."""

    def round(self, view: ClusterView, now: float) -> list[MoveOrder]:
        """The moves that help now, recorded in the view."""
        for known in view:
            known.freeness = known.load.freeness(view.priorities)
        takers = [v for v in view if v.accepting and v.answers(now)]
        decided = list(self._drains(view, takers, now))
        if self._balance:
            decided += self._rescues(view, takers, now)
            decided += self._balances(view, takers, now)
            decided += self._into_headroom(view, takers, now)
            decided += self._queues(view, takers, now)
        return decided

    def _drains(
        self, view: ClusterView, takers: list[InstanceView], now: float
    ) -> Iterator[MoveOrder]:
        leaving = [v for v in view if not v.accepting and v.answers(now)]
        for source in leaving:
            report = source.report
            left = report.running + report.waiting - report.moving_out - len(source.orders)
            slots = DRAIN_MOVES_MAX - moves_out(source)
            for destination in sorted(takers, key=lambda v: (-v.freeness, v.report.instance)):
                if destination.report.instance in source.fruitless:
                    continue
                while (
                    left > 0
                    and slots > 0
                    and moves_in(destination) < DRAIN_MOVES_MAX
                    and destination.load.has_slot
                ):
                    limits = _anything(room_in(destination), len(view.priorities))
                    if not limits:
                        break
                    why = f"{report.instance} is being emptied"
                    yield self._order(view, source, destination, limits, why, DRAIN, now)
                    left, slots = left - 1, slots - 1

    def _rescues(
        self, view: ClusterView, takers: list[InstanceView], now: float
    ) -> Iterator[MoveOrder]:
        """Moves requests that wait at or behind a head that does not fit to where they fit now."""
        most, below, last = self._settings.rescues, view.thresholds[0], len(view.priorities) - 1
        blocked = [v for v in takers if v.load.waiting and v.load.is_blocked]
        sources = sorted(
            (v for v in blocked if moves_out(v) < RESCUES_MAX),
            key=lambda v: (v.freeness, v.report.instance),
        )
        if not sources or not most:
            return
        free = [v for v in takers if not v.load.waiting and v.load.has_slot and not moves_out(v)]
        rooms = sorted(  # Ids differ, so that views are never compared.
            (_room_above(v, below, v.load.spare_for(last, view.priorities)), v.report.instance, v)
            for v in free
            if moves_in(v) < RESCUES_MAX
        )
        for source in sources[:ORDERS_MAX]:
            report = source.report
            left = min(most, source.load.waiting, RESCUES_MAX - moves_out(source))
            head = report.head_tokens
            for _ in range(left):
                chosen = _rescue_room(rooms, source, head)
                if chosen is None:
                    break
                rooms.remove(chosen)
                room, there, destination = chosen
                why = (
                    f"{source.load.waiting} wait behind a head of {report.head_tokens} tokens on "
                    f"{report.instance}, and {room} fit on {there}"
                )
                limits, head = _waiting(source, room), 0  # Only the first order is for the head.
                yield self._order(view, source, destination, limits, why, QUEUE, now)

    def _balances(
        self, view: ClusterView, takers: list[InstanceView], now: float
    ) -> Iterator[MoveOrder]:
        below, above = view.thresholds
        most = self._settings.moves_max
        # Tuples sort faster than a key function; ids differ, so that views are never compared.
        low = sorted((v.freeness, v.report.instance, v) for v in takers if v.freeness < below)
        movable = (v for _, _, v in low if moves_out(v) < most and v.load.batch + v.load.waiting)
        sources = list(islice(movable, ORDERS_MAX))
        if not sources:
            return
        takers = [
            v for v in takers if not v.load.waiting and moves_in(v) < most and v.load.has_slot
        ]
        freest = sorted((-v.freeness, v.report.instance, v) for v in takers if v.freeness > above)
        roomiest: list[_Ranked] = []
        if any(v.load.is_blocked for v in sources):
            roomiest = sorted(
                (-_room_above(v, below, v.load.spare(view.priorities)), v.report.instance, v)
                for v in takers
                if v.freeness >= below
            )
        rule = GainRule(
            priorities=view.priorities,
            threshold=below,
            gain_min=self._settings.gain_min,
            copy_steps=view.observed.move_steps_per_token(),
        )
        taken: set[InstanceId] = set()
        for source in sources:
            found, head = None, source.report.head_tokens
            if source.load.is_blocked:
                with_room = takewhile(lambda it: -it[0] >= head, roomiest)  # noqa: B023
                found = self._first_gain(rule, source, with_room, taken)
            found = found or self._first_gain(rule, source, freest, taken)
            if found is not None:
                destination, limits = found
                taken.add(destination.report.instance)
                why = (
                    f"freeness {source.freeness:.0f} on {source.report.instance} is below "
                    f"{below:.0f}, {destination.freeness:.0f} on {destination.report.instance}"
                )
                if source.load.head:
                    why += f"; its queue waits for {source.load.head} tokens"
                yield self._order(view, source, destination, limits, why, BALANCE, now)

    def _first_gain(
        self,
        rule: GainRule,
        source: InstanceView,
        ranked: Iterable["_Ranked"],
        taken: set[InstanceId],
    ) -> tuple[InstanceView, tuple[MoveLimit, ...]] | None:
        """The first destination that is not taken and that the source gains from, with the limits
        of the move."""
        free = (v for _, i, v in ranked if i not in taken and i not in source.fruitless)
        for destination in islice(free, TRIES_MAX):
            if limits := rule.limits(source, destination):
                return destination, limits
        return None

    def _into_headroom(
        self, view: ClusterView, takers: list[InstanceView], now: float
    ) -> Iterator[MoveOrder]:
        """Moves requests that wait for memory, and fit nowhere else, to where only headroom is
        left."""
        most, below, kept = self._settings.moves_max, view.thresholds[0], view.priorities.headroom
        blocked = [v for v in takers if v.load.is_blocked and v.load.has_slot]
        sources = sorted(
            (v for v in blocked if not moves_out(v)), key=lambda v: (v.freeness, v.report.instance)
        )
        if not sources:
            return
        others = [v for v in takers if not v.load.waiting and v.load.has_slot]
        elsewhere = max((room_in(v) for v in others if v.freeness >= below), default=0)
        rooms = []
        for known in others:
            if known.freeness >= below or not kept(known.load.total, known.load.running):
                continue
            if moves_in(known) < most and not moves_out(known):
                # No headroom is kept from the most urgent class.
                room = _room_above(known, below, known.load.spare_for(0, view.priorities))
                rooms.append((room, known.report.instance, known))
        rooms.sort()  # Ids differ, so that views are never compared.
        for source in sources[:ORDERS_MAX]:
            head = source.load.head
            if elsewhere < head and rooms and head <= rooms[-1][0]:
                if rooms[-1][1] in source.fruitless:
                    continue
                room, there, destination = rooms.pop()
                why = (
                    f"{head} tokens wait on {source.report.instance}, and only headroom is left "
                    f"on {there}"
                )
                limits = _waiting(source, room)
                yield self._order(view, source, destination, limits, why, HEADROOM, now)

    def _queues(
        self, view: ClusterView, takers: list[InstanceView], now: float
    ) -> Iterator[MoveOrder]:
        """Evens out queues: the instance with the longest gives away requests behind its head."""
        most, last = self._settings.moves_max, len(view.priorities) - 1
        blocked = [v for v in takers if v.freeness < 0]
        sources = [v for v in blocked if v.load.waiting > 1 and moves_out(v) < most]
        if not sources:
            return
        spare = {v.report.instance: v.load.spare_for(last, view.priorities) for v in blocked}
        sources.sort(key=lambda v: (spare[v.report.instance], v.report.instance))
        destinations = sorted(
            (v for v in blocked if moves_in(v) < most and moves_out(v) == 0),
            key=lambda v: (-spare[v.report.instance], v.report.instance),
        )
        for source, destination in list(zip(sources, destinations, strict=False))[:ORDERS_MAX]:
            here, there = spare[source.report.instance], spare[destination.report.instance]
            waiting_max = int((there - here) / 2)
            if waiting_max < source.load.queued / source.load.waiting:
                continue
            if destination.report.instance in source.fruitless:
                continue
            limits = _waiting(source, waiting_max)
            why = (
                f"{source.load.waiting} wait for {source.load.queued} tokens on "
                f"{source.report.instance}, {destination.load.waiting} for "
                f"{destination.load.queued} on {destination.report.instance}"
            )
            yield self._order(view, source, destination, limits, why, QUEUE, now)


_Ranked = tuple[float, InstanceId, InstanceView]
"""What a destination is sorted by, its id, and itself; the best comes first."""


def _room_above(destination: InstanceView, below: float, spare: float) -> int:
    """The largest request, in KV tokens, that leaves the destination's freeness at the threshold or
    above. `spare`: tokens that are left there for it."""
    return min(int(spare - below * (destination.load.batch + 1)), room_in(destination))


def _rescue_room(
    rooms: list[tuple[int, InstanceId, InstanceView]], source: InstanceView, head: int
) -> tuple[int, InstanceId, InstanceView] | None:
    """The smallest room that takes the head of the source's queue; else the largest, if it takes
    the smallest request that waits. `rooms`: the smallest first; `head`: 0 if it has one."""
    free = [room for room in rooms if room[1] not in source.fruitless]
    if not free:
        return None
    fits = next((room for room in free if 0 < head <= room[0]), None)
    if fits is None and 0 < source.report.waiting_least <= free[-1][0]:
        return free[-1]
    return fits
