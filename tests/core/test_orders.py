"""The scheduler's orders as the source's llumlet carries them out: fresh ones, of requests that are
still as they were chosen, and not again at once what has failed."""

from itertools import pairwise

import pytest

from llumnix.core.events import MoveLimit, MoveOrder
from llumnix.core.messages import (
    Handover,
    Migrate,
    MigrationEnded,
    MigrationRequested,
    Out,
    Reserve,
    ToFrontend,
    ToPeer,
    Verdict,
)
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.migration.orders import PENDING_MOVE_LIFETIME_S
from llumnix.core.migration.port import Refusal
from llumnix.core.migration.setbacks import (
    DESTINATION_PAUSE_MAX_S,
    DESTINATION_PAUSE_S,
    REQUEST_PAUSE_S,
    Setbacks,
)
from llumnix.core.types import EngineIndex, Epoch, InstanceId, MigrationId, OrderId, RequestId
from support.fake_engine import FakeEngine

HERE, THERE, ELSEWHERE = EngineIndex(0), EngineIndex(1), EngineIndex(2)
MIN_STAY = 4.0


class Source:
    """An engine with running requests of some lengths, its llumlet, and what that wants."""

    def __init__(self, *prompts: int, blocks: int = 2000) -> None:
        self.engine = FakeEngine(HERE, blocks=blocks, block_tokens=16, chunk=10**6, batch=64)
        for number, length in enumerate(prompts):
            self.engine.add(RequestId(f"r{number}"), list(range(length)), 10**6)
        self.engine.step()
        self.llumlet = Llumlet(HERE, "here", self.engine, min_stay=MIN_STAY)
        self.orders = 0
        self.epoch = 0
        self.now = 0.0
        self.ended: list[MigrationEnded] = []

    def order(self, sequence: int, *, most: int = 10**6, to: EngineIndex = THERE) -> MoveOrder:
        limit = MoveLimit(rank=1, tokens_min=0, tokens_wanted=0, tokens_max=most, waiting_max=0)
        self.orders += 1
        return MoveOrder(
            order=OrderId(self.orders),
            source=InstanceId("i0"),
            source_engine=HERE,
            destination=InstanceId(f"i{to}"),
            destination_engine=to,
            limits=(limit,),
            why="drawn",
            source_sequence=sequence,
        )

    def take(self, *orders: MoveOrder) -> list[RequestId]:
        return self.wanted(self.llumlet.orders(orders, self.now))

    def wanted(self, out: list[Out]) -> list[RequestId]:
        messages = [o.message for o in out if isinstance(o, ToFrontend)]
        self.ended += [m for m in messages if isinstance(m, MigrationEnded)]
        return [m.request for m in messages if isinstance(m, MigrationRequested)]

    def migrate(self, request: str, *, to: EngineIndex = THERE, wanted: bool = True) -> list[Out]:
        self.epoch += 1
        order = Migrate(
            migration=MigrationId(f"m{self.epoch}"),
            request=RequestId(request),
            destination=to,
            address="there",
            epoch=Epoch(self.epoch),
            wanted=wanted,
        )
        out = self.llumlet.migrate(order, self.now)
        self.wanted(out)
        return out

    def decline(self) -> None:
        """The last migration's destination has no room."""
        verdict = Verdict(migration=MigrationId(f"m{self.epoch}"), taken=False, why="no room")
        self.wanted(self.llumlet.receive(verdict, self.now))

    def fail(self, sequence: int, *, to: EngineIndex = THERE) -> RequestId | None:
        """One order and what follows, up to its failure; the request that was chosen."""
        chosen = self.take(self.order(sequence, to=to))
        self.llumlet.reported(sequence)
        if not chosen:
            return None
        self.migrate(chosen[0], to=to)
        self.decline()
        return chosen[0]


# -- which orders


def test_orders_that_came_during_a_long_step_move_one_request() -> None:
    source = Source(*range(100, 110))
    orders = [source.order(sequence) for sequence in (5, 25, 45, 65)]
    assert len(source.take(*orders)) == 1
    assert set(source.llumlet.answered()) == {o.order for o in orders}


def test_the_newest_of_them_is_carried_out() -> None:
    source = Source(100, 110)
    old, new = source.order(5, to=ELSEWHERE), source.order(65)
    out = source.llumlet.orders([old, new], 0.0)
    assert [o.message.destination for o in out if isinstance(o, ToFrontend)] == [THERE]  # type: ignore[union-attr]


def test_an_order_from_before_the_last_one_was_told_is_answered_and_dropped() -> None:
    source = Source(*range(100, 110))
    assert source.take(source.order(5))
    assert not source.take(source.order(6))  # Nothing was reported since.
    source.llumlet.reported(9)
    assert not source.take(source.order(8))
    assert len(source.llumlet.answered()) == 3
    assert source.take(source.order(9))


def test_orders_for_which_there_is_nothing_to_move_are_counted() -> None:
    source = Source(100, 110)
    assert source.llumlet.moving(0.0).void_orders == 0
    assert not source.take(source.order(5, most=50), source.order(5, most=60))
    assert source.llumlet.moving(0.0).void_orders == 2
    assert source.fail(6)
    assert source.llumlet.moving(0.0).void_orders == 2, "declined is not void"
    assert not source.fail(7), "a destination that has just declined is not asked"
    assert source.llumlet.moving(0.0).void_orders == 3


def test_orders_of_one_round_are_all_carried_out() -> None:
    source = Source(*range(100, 110))
    assert len(source.take(source.order(5), source.order(5))) == 2
    source.llumlet.reported(7)
    assert len(source.take(source.order(5))) == 1  # It only came later.


# -- is it still as it was chosen?


def test_one_that_has_grown_beyond_the_limit_since_it_was_chosen_stays() -> None:
    source = Source(48)
    assert source.take(source.order(1, most=64)) == ["r0"]
    for _ in range(20):
        source.engine.step()
    source.migrate("r0")
    assert [e.why for e in source.ended] == ["it has grown to 69 tokens by now"]


def test_one_that_was_preempted_since_it_was_chosen_stays() -> None:
    source = Source(48)
    assert source.take(source.order(1)) == ["r0"]
    source.engine.preempt_somebody()
    source.migrate("r0")
    assert [e.why for e in source.ended] == ["it is waiting by now"]


@pytest.mark.parametrize("to", [THERE, ELSEWHERE])
def test_a_users_order_is_not_held_to_the_limits_of_the_schedulers(to: EngineIndex) -> None:
    source = Source(48)
    assert source.take(source.order(1, most=64)) == ["r0"]
    for _ in range(20):
        source.engine.step()
    out = source.migrate("r0", to=to, wanted=False)
    assert not source.ended
    assert any(isinstance(o, ToPeer) and isinstance(o.message, Reserve) for o in out)


def test_one_that_no_grant_comes_for_is_on_its_way_out_for_a_moment_only() -> None:
    """Its frontend may be gone. Reports would take from the load what stays."""
    source = Source(48)
    assert source.take(source.order(1)) == ["r0"]
    on_its_way = source.llumlet.moving(PENDING_MOVE_LIFETIME_S - 0.01)
    assert (on_its_way.out, on_its_way.out_tokens) == (1, 64)
    stays = source.llumlet.moving(PENDING_MOVE_LIFETIME_S)
    assert (stays.out, stays.out_tokens) == (0, 0)
    source.llumlet.reported(2)
    assert source.take(source.order(2)) == ["r0"]


def test_one_that_came_stays_for_as_long_as_its_move_has_to_pay() -> None:
    source = Source()
    reserve = Reserve(
        migration=MigrationId("m"),
        request=RequestId("r"),
        source=THERE,
        address="there",
        epoch=Epoch(1),
        body=repr(([1] * 32, 10**6)).encode(),
        outputs=[],
        tokens=0,
        agents=[],
    )
    source.llumlet.receive(reserve, 0.0)
    handover = Handover(
        migration=MigrationId("m"),
        request=RequestId("r"),
        source=THERE,
        address="there",
        start=0,
        end=0,
        blocks=[[]],
        first_output=0,
        outputs=[],
        state=b"",
    )
    source.llumlet.receive(handover, 2.0)  # The move took two seconds, so it stays for eight.
    source.engine.step()
    source.now = 2.0 + 4 * 2.0 - 0.1
    assert not source.take(source.order(1))
    source.now += 0.2
    assert source.take(source.order(1)) == ["r"]


# -- what has failed


def test_a_request_that_was_declined_makes_way_for_the_others() -> None:
    source = Source(100, 116, 132)
    first = source.fail(1)
    source.now += DESTINATION_PAUSE_S
    second = source.fail(2)
    assert first is not None
    assert second is not None
    assert first != second


def test_it_is_tried_again_after_growing_pauses() -> None:
    source = Source(100)
    tried = []
    for tick in range(1, 1200):
        source.now = tick * 0.05
        if source.fail(tick):
            tried.append(source.now)
    gaps = [b - a for a, b in pairwise(tried)]
    assert [round(gap / REQUEST_PAUSE_S) for gap in gaps] == [1, 2, 4, 8]


def test_it_may_go_to_another_destination_meanwhile() -> None:
    source = Source(100)
    assert source.fail(1)
    assert source.fail(2) is None
    assert source.fail(3, to=ELSEWHERE)


def test_a_destination_that_declines_all_is_not_asked_by_each_in_turn() -> None:
    source = Source(*range(100, 164))
    tried = 0
    for tick in range(1, 200):  # Ten seconds.
        source.now = tick * 0.05
        tried += source.fail(tick) is not None
    assert tried < 10


def test_a_destination_that_was_full_for_long_is_asked_again_soon() -> None:
    source = Source(*range(100, 164))
    tried = []
    for tick in range(1, 2400):  # Two minutes.
        source.now = tick * 0.05
        if source.fail(tick):
            tried.append(source.now)
    assert max(b - a for a, b in pairwise(tried)) < DESTINATION_PAUSE_MAX_S + 0.1


def test_a_silent_destination_is_a_failure_too() -> None:
    source = Source(100)
    assert source.take(source.order(1))
    source.llumlet.reported(1)
    source.migrate("r0")
    source.now += 6
    source.wanted(source.llumlet.poll(source.now))
    assert "silent" in source.ended[0].why
    assert not source.take(source.order(2))


def test_what_can_never_be_moved_is_not_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(100)
    refusal = Refusal(why="it carries tensors", for_ever=True)
    monkeypatch.setattr(source.engine, "describe", lambda request: refusal)
    assert source.take(source.order(1)) == ["r0"]
    source.llumlet.reported(1)
    source.migrate("r0")
    assert [e.why for e in source.ended] == ["it carries tensors"]
    source.now += 10**6
    assert not source.take(source.order(2))


def test_one_that_ended_or_was_preempted_meanwhile_has_not_failed_to_move() -> None:
    source = Source(100)
    assert source.take(source.order(1))
    source.llumlet.reported(1)
    source.migrate("r0")
    source.engine.preempt_somebody()
    source.wanted(source.llumlet.poll(source.now))
    source.engine.step()
    assert source.take(source.order(2)) == ["r0"]


def test_a_move_that_goes_well_ends_the_pause_of_its_destination(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llumnix.core.migration.setbacks.SETBACKS_MAX", 2)
    setbacks = Setbacks()
    setbacks.declined(RequestId("a"), THERE, 0.0)
    assert setbacks.pauses(None, THERE, 0.1)
    setbacks.moved(RequestId("b"), THERE)
    assert not setbacks.pauses(None, THERE, 0.1)
    assert setbacks.pauses(RequestId("a"), THERE, 0.1)
    setbacks.declined(RequestId("b"), THERE, 0.1)
    assert not setbacks.pauses(RequestId("a"), THERE, 0.2)  # Forgotten: the table is bounded.
