"""The books of several frontends: numbers, counts, versions, turns, restarts."""

import pytest

from llumnix.core.supervision.frontends import SPARE_CLIENTS, Held, Roster, clients
from llumnix.core.supervision.restart import CRASHES_MAX, GiveUp, RestartAfter
from llumnix.core.types import EngineIndex

E0, E1 = EngineIndex(0), EngineIndex(1)


def started(count: int = 2) -> Roster:
    """A roster whose frontends have come up."""
    roster = Roster(count)
    for slot in range(count):
        client = roster.begin(slot)
        assert client is not None
        roster.greeted(client, 100 + client)
        roster.serves(client, 0.0)
    return roster


def test_a_deployment_of_one_frontend_has_one_client_and_others_have_some_to_spare() -> None:
    assert clients(1) == 1
    assert clients(2) == 3 + SPARE_CLIENTS


def test_a_client_number_is_never_given_twice_and_never_the_offices() -> None:
    roster = Roster(2)
    given = [roster.begin(slot) for slot in (0, 1)]
    for _ in range(SPARE_CLIENTS):
        last = given[-1]
        assert last is not None
        roster.ended(last, "killed", 0.0)
        given.append(roster.begin(1))
    assert given == list(range(1, clients(2)))
    assert roster.begin(1) is None
    assert [s.state for s in roster.status()] == ["starting", "failed"]


def test_counts_are_added_up_and_go_with_the_process_that_had_them() -> None:
    roster = started()
    roster.holds(1, Held(version=3, in_flight={E0: 2}, heard_s={E0: 5.0}))
    roster.holds(2, Held(version=3, in_flight={E0: 1, E1: 4}, heard_s={E0: 7.0}))
    assert (roster.in_flight(E0), roster.in_flight(E1)) == (3, 4)
    assert (roster.heard_s(E0), roster.heard_s(E1)) == (7.0, None)
    roster.ended(2, "killed", 1.0)
    assert (roster.in_flight(E0), roster.in_flight(E1)) == (2, 0)
    # It was on its way, as its other words may be.
    roster.holds(2, Held(version=3, in_flight={E0: 1}))
    roster.greeted(2, 102)
    roster.serves(2, 2.0)
    assert roster.in_flight(E0) == 2
    assert (roster.serving, roster.greeted_clients()) == (1, [1])


def test_an_engine_is_empty_only_once_each_frontend_knows_that_it_takes_nothing() -> None:
    roster = started()
    assert roster.may_hold(E0, 4)
    roster.holds(1, Held(version=4))
    roster.holds(2, Held(version=3))
    assert roster.may_hold(E0, 4)
    roster.holds(2, Held(version=4, in_flight={E0: 1}))
    assert roster.may_hold(E0, 4)
    roster.holds(2, Held(version=4))
    assert not roster.may_hold(E0, 4)


def test_a_frontend_that_is_still_coming_or_has_gone_keeps_no_engine_from_being_empty() -> None:
    roster = started()
    roster.holds(1, Held(version=4))
    roster.ended(2, "killed", 1.0)
    assert not roster.may_hold(E0, 4)
    client = roster.begin(1)
    assert client is not None
    assert not roster.may_hold(E0, 4)
    roster.greeted(client, 7)
    assert roster.may_hold(E0, 4)


def test_one_frontend_at_a_time_has_the_turn_and_keeps_it_until_it_has_no_suspect() -> None:
    roster = started(3)
    assert roster.turn is None
    roster.holds(2, Held(version=1, suspects=True))
    assert roster.turn == 2
    roster.holds(1, Held(version=1, suspects=True))
    roster.holds(3, Held(version=1, suspects=True))
    assert roster.turn == 2
    roster.holds(2, Held(version=1))
    assert roster.turn == 1
    roster.ended(1, "killed", 1.0)
    assert roster.turn == 3
    roster.holds(3, Held(version=1))
    assert roster.turn is None


def test_a_frontend_that_crashes_at_once_is_given_up_and_the_others_go_on() -> None:
    roster = started()
    client: int | None = 2
    for crash in range(1, CRASHES_MAX + 1):
        assert client is not None
        decided = roster.ended(client, "status 1", 1.0)
        if crash < CRASHES_MAX:
            assert isinstance(decided, RestartAfter)
            client = roster.begin(1)
    assert isinstance(decided, GiveUp)
    first, second = roster.status()
    assert (first.state, first.pid, first.restarts) == ("serving", 101, 0)
    assert (second.state, second.pid, second.restarts) == ("failed", None, CRASHES_MAX - 1)
    assert second.why is not None
    assert second.why.endswith("the last time: status 1")
    assert not roster.all_failed
    assert roster.settled


@pytest.mark.parametrize("served_s", [61.0, 59.0])
def test_only_crashes_in_a_row_count(served_s: float) -> None:
    roster, client, decided = started(), 2, None
    now = 0.0
    for _ in range(CRASHES_MAX):
        roster.serves(client, now)
        now += served_s
        decided = roster.ended(client, "killed", now)
        following = roster.begin(1)
        assert following is not None
        client = following
    assert isinstance(decided, RestartAfter if served_s > 60 else GiveUp)


def test_one_that_ends_before_it_serves_has_not_served_however_long_those_before_it_did() -> None:
    roster = started()
    decided = [roster.ended(2, "killed", 1000.0)]
    for _ in range(CRASHES_MAX - 1):
        client = roster.begin(1)
        assert client is not None
        roster.greeted(client, 7)
        decided.append(roster.ended(client, "status 1", 2000.0))
    pauses = [d.delay_s for d in decided if isinstance(d, RestartAfter)]
    assert pauses == [0.0, 1.0, 2.0, 4.0]
    assert isinstance(decided[-1], GiveUp)


def test_an_end_is_known_once() -> None:
    roster = started()
    assert roster.ended(1, "killed", 1.0) is not None
    assert roster.ended(1, "killed", 1.0) is None
    assert roster.slot(1) is None
    assert roster.name(2) == "f1"
    assert roster.serving == 1
