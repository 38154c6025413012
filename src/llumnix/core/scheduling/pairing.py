"""Which instance gives load to which: the periodic round of pairing.

Rules
- Sources are the instances of a freeness below one threshold, the lowest first. Destinations are
  those above another threshold, the highest first. In between an instance is left alone.
- Each source gets the first destination that is still free and that it gains from (gain.py), of the
  first `TRIES_MAX`. A destination for which it had nothing to move a moment ago is passed over.
- A blocked queue counts as virtual usage, so its instance gives requests away until the head fits.
  If the destination has room for the head, the head goes: it has no KV to copy.
- Freeness is not room: an instance with few requests may have much of the one and none of the
  other. So a head that waits for memory first looks for the most room, between the thresholds too.
- Requests that wait at or behind a head that does not fit are rescued: they go where they fit now,
  though freeness there is below the threshold of destinations, as long as it stays above that of
  sources. The head goes to the smallest room that takes it; else the smallest of the first few that
  wait goes to the largest room. Instances with a queue take none.
- A request that waits for memory, and fits nowhere else, goes into the headroom of urgent requests.
- Blocked instances even out their queues: the longest gives to the shortest, no more than makes the
  two alike.
- An instance that is being emptied gives all it has, several requests at a time, to any that has
  room.
- Balancing leaves an instance alone that takes part in `moves_max` moves, orders that are not
  reported yet included. A drain has its engine's limit.

A round begins with the view's `Standings` (load.py), which follow from loads alone. Whether an
instance answers and which moves it has is asked only of those that come first.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, takewhile

from llumnix.core.codes import MoveCode
from llumnix.core.events import MoveLimit, MoveOrder
from llumnix.core.limits import MigrationLimits
from llumnix.core.scheduling.gain import GainRule, room_in
from llumnix.core.scheduling.tuning import ORDERS_MAX, TRIES_MAX
from llumnix.core.scheduling.view import ClusterView, InstanceView
from llumnix.core.settings import MigrationSettings
from llumnix.core.types import InstanceId, OrderId

BALANCE, DRAIN, HEADROOM, QUEUE = (
    MoveCode.BALANCE,
    MoveCode.DRAIN,
    MoveCode.HEADROOM,
    MoveCode.QUEUE,
)
DRAIN_MOVES_MAX = MigrationLimits().outgoing_max
"""Moves at a time away from an instance that is being emptied: as many as its engine takes."""
RESCUES_MAX = DRAIN_MOVES_MAX
"""Moves at a time away from an instance, or to one, beyond which it has no part in a rescue."""


class Pairing:
    """Decides moves. `balance`: also between instances that go on serving."""

    def __init__(self, settings: MigrationSettings, *, balance: bool) -> None:
        self.take(settings, balance=balance)
        self._orders = 0

    def take(self, settings: MigrationSettings, *, balance: bool) -> None:
        """Decides by these from now on."""
        self._settings = settings
        self._balance = balance

    def round(self, view: ClusterView, now: float) -> list[MoveOrder]:
        """The moves that help now, recorded in the view."""
        view.standings.rank(view.thresholds, view.priorities)
        decided = list(self._drains(view, now))
        if self._balance:
            decided += self._rescues(view, now)
            decided += self._balances(view, now)
            decided += self._into_headroom(view, now)
            decided += self._queues(view, now)
        return decided

    def _drains(self, view: ClusterView, now: float) -> Iterator[MoveOrder]:
        if not view.standings.leaving:
            return
        takers = [v for v in view if v.accepting and v.answers(now)]
        takers.sort(key=lambda v: (-v.freeness, v.report.instance))
        for source in [v for v in view if not v.accepting and v.answers(now)]:
            report = source.report
            left = report.running + report.waiting - report.moving_out - len(source.orders)
            left = min(left, DRAIN_MOVES_MAX - moves_out(source))
            for destination in takers:
                if destination.report.instance in source.fruitless:
                    continue  # The next may have room for what does not fit there.
                while (
                    left > 0
                    and moves_in(destination) < DRAIN_MOVES_MAX
                    and destination.load.has_slot
                ):
                    limits = _anything(room_in(destination), len(view.priorities))
                    if not limits:
                        break
                    why = f"{report.instance} is being emptied"
                    yield self._order(view, source, destination, limits, why, DRAIN, now)
                    left -= 1
                if left <= 0:
                    break

    def _rescues(self, view: ClusterView, now: float) -> Iterator[MoveOrder]:
        """Moves requests that wait at or behind a head that does not fit to where they fit now."""
        most = self._settings.rescues
        blocked = _in_order(view, view.standings.blocked.values(), now)
        stuck = (v for v in blocked if v.load.waiting and moves_out(v) < RESCUES_MAX)
        sources = list(islice(stuck, ORDERS_MAX))
        if not sources or not most:
            return

        def may_take(known: InstanceView) -> bool:
            return known.answers(now) and not moves_out(known) and moves_in(known) < RESCUES_MAX

        rooms = _Choices(view, view.standings.rooms.values(), may_take)
        for source in sources:
            report = source.report
            left = min(most, source.load.waiting, RESCUES_MAX - moves_out(source))
            head = report.head_tokens
            for _ in range(left):
                place = _rescue_room(rooms, source, head)
                if place is None:
                    break
                room, there = rooms.ranked.pop(place)
                why = (
                    f"{source.load.waiting} wait behind a head of {report.head_tokens} tokens on "
                    f"{report.instance}, and {room} fit on {there}"
                )
                limits = _waiting(source, int(room))
                head = 0  # Only the first order is for the head.
                yield self._order(view, source, view[there], limits, why, QUEUE, now)

    def _balances(self, view: ClusterView, now: float) -> Iterator[MoveOrder]:
        below, most = view.thresholds[0], self._settings.moves_max
        low = _in_order(view, view.standings.low.values(), now)
        low = takewhile(lambda v: v.freeness < below, low)
        movable = (v for v in low if moves_out(v) < most and v.load.batch + v.load.waiting)
        sources = list(islice(movable, ORDERS_MAX))
        if not sources:
            return
        taken: set[InstanceId] = set()

        def may_take(known: InstanceView) -> bool:
            name = known.report.instance
            return name not in taken and moves_in(known) < most and known.answers(now)

        freest = _Choices(view, view.standings.free.values(), may_take)
        any_blocked = any(v.load.is_blocked for v in sources)
        roomy = view.standings.roomy.values() if any_blocked else ()
        roomiest = _Choices(view, roomy, may_take)
        rule = GainRule(
            priorities=view.priorities,
            threshold=below,
            gain_min=self._settings.gain_min,
            copy_steps=view.observed.move_steps_per_token(),
        )
        for source in sources:
            found = None
            if source.load.is_blocked:
                found = _first_gain(rule, source, roomiest, room=source.report.head_tokens)
            found = found or _first_gain(rule, source, freest)
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

    def _into_headroom(self, view: ClusterView, now: float) -> Iterator[MoveOrder]:
        """Moves requests that wait for memory, and fit nowhere else, to where only headroom is
        left."""
        most, standings = self._settings.moves_max, view.standings
        rooms = sorted(
            (room, name)
            for room, name in standings.reserved.values()
            if moves_in(v := view[name]) < most and not moves_out(v) and v.answers(now)
        )
        if not rooms:
            return
        blocked = _in_order(view, standings.blocked.values(), now)
        for_memory = (v for v in blocked if v.load.has_slot and not moves_out(v))
        sources = list(islice(for_memory, ORDERS_MAX))
        largest, elsewhere = max((v.load.head for v in sources), default=0), 0
        for known in (view[name] for name in standings.roomy):
            if elsewhere >= largest:
                return
            if known.answers(now):
                elsewhere = max(elsewhere, room_in(known))
        for source in sources:
            head = source.load.head
            if elsewhere < head and rooms and head <= rooms[-1][0]:
                if rooms[-1][1] in source.fruitless:
                    continue
                room, there = rooms.pop()
                why = (
                    f"{head} tokens wait on {source.report.instance}, and only headroom is left "
                    f"on {there}"
                )
                limits = _waiting(source, room)
                yield self._order(view, source, view[there], limits, why, HEADROOM, now)

    def _queues(self, view: ClusterView, now: float) -> Iterator[MoveOrder]:
        """Evens out queues: the instance with the longest gives away requests behind its head."""
        most, last = self._settings.moves_max, len(view.priorities) - 1
        negative = (it for it in view.standings.low.values() if it[0] < 0)
        blocked = list(_in_order(view, negative, now))
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

    def _order(
        self,
        view: ClusterView,
        source: InstanceView,
        destination: InstanceView,
        limits: tuple[MoveLimit, ...],
        why: str,
        code: MoveCode,
        now: float,
    ) -> MoveOrder:
        order = OrderId(self._orders)
        self._orders += 1
        view.ordered(order, source.report.instance, destination.report.instance, now)
        return MoveOrder(
            order=order,
            source=source.report.instance,
            source_engine=source.report.engine_index,
            destination=destination.report.instance,
            destination_engine=destination.report.engine_index,
            limits=limits,
            why=why,
            code=code,
            source_sequence=source.report.sequence,
        )


def moves_out(known: InstanceView) -> int:
    """Moves away from an instance, orders that are not reported yet included."""
    return known.report.moving_out + len(known.orders)


def moves_in(known: InstanceView) -> int:
    """Moves to an instance, likewise."""
    return known.report.moving_in + len(known.incoming)


class _Choices:
    """Destinations to choose from in one part of a round, sorted. Those that may take nothing now
    are dropped when they are met, so that a round looks at few."""

    def __init__(
        self,
        view: ClusterView,
        ranked: Iterable[tuple[float, InstanceId]],
        may_take: Callable[[InstanceView], bool],
    ) -> None:
        self.ranked = sorted(ranked)
        self._view = view
        self._may_take = may_take

    def first(self, source: InstanceView, place: int = 0) -> int | None:
        """The first place from this one on, whose instance may take something of the source's."""
        while place < len(self.ranked):
            name = self.ranked[place][1]
            if not self._may_take(self._view[name]):
                del self.ranked[place]
            elif name in source.fruitless:
                place += 1
            else:
                return place
        return None

    def last(self, source: InstanceView) -> int | None:
        """The last such place."""
        for place in reversed(range(len(self.ranked))):
            name = self.ranked[place][1]
            if not self._may_take(self._view[name]):
                del self.ranked[place]
            elif name not in source.fruitless:
                return place
        return None

    def instance(self, place: int) -> InstanceView:
        """What is at that place."""
        return self._view[self.ranked[place][1]]


def _in_order(
    view: ClusterView, ranked: Iterable[tuple[float, InstanceId]], now: float
) -> Iterator[InstanceView]:
    """Those of these instances that answer, the lowest first."""
    return (v for _, name in sorted(ranked) if (v := view[name]).answers(now))


def _rescue_room(rooms: _Choices, source: InstanceView, head: int) -> int | None:
    """The place of the smallest room that takes the head of the source's queue; else of the
    largest, if it takes the smallest request that waits. `head`: 0 if it has one."""
    if head > 0:
        smallest = rooms.first(source, bisect_left(rooms.ranked, (head,)))
        if smallest is not None:
            return smallest
    least = source.report.waiting_least
    largest = rooms.last(source) if least > 0 else None
    return largest if largest is not None and least <= rooms.ranked[largest][0] else None


def _first_gain(
    rule: GainRule, source: InstanceView, choices: _Choices, room: int | None = None
) -> tuple[InstanceView, tuple[MoveLimit, ...]] | None:
    """The first of these destinations that the source gains from, with the limits of the move.
    `room`: that it must have, if they are sorted by the negative of theirs."""
    start = 0
    for _ in range(TRIES_MAX):
        place = choices.first(source, start)
        if place is None or (room is not None and -choices.ranked[place][0] < room):
            break
        destination = choices.instance(place)
        if limits := rule.limits(source, destination):
            return destination, limits
        start = place + 1
    return None


def _waiting(source: InstanceView, tokens: int) -> tuple[MoveLimit, ...]:
    """Limits that let only waiting requests go, of up to so many tokens."""
    return tuple(
        MoveLimit(rank=r, tokens_min=0, tokens_wanted=0, tokens_max=0, waiting_max=tokens)
        for r, known in enumerate(source.report.classes)
        if known.waiting
    )


def _anything(room: int, classes: int) -> tuple[MoveLimit, ...]:
    """Limits of a drain: any request that there is memory for. Neither headroom nor the length of a
    queue may keep an instance from being emptied."""
    if room <= 0:
        return ()
    return tuple(
        MoveLimit(rank=r, tokens_min=0, tokens_wanted=0, tokens_max=room, waiting_max=room)
        for r in range(classes)
    )
