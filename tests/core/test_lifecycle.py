"""The life of an instance: every transition occurs, no other does, and each says why."""

from collections.abc import Callable

import pytest

from llumnix.core.supervision.lifecycle import (
    DRAIN_TIMEOUT_S,
    HOST_NOTICED_S,
    LIFE,
    Lifecycle,
    life_machine,
)
from llumnix.core.supervision.lifecycle import LifeAction as A
from llumnix.core.supervision.lifecycle import LifeEvent as E
from llumnix.core.supervision.lifecycle import LifeState as S
from llumnix.core.supervision.restart import CRASHES_MAX, HEALTHY_AFTER_S
from llumnix.core.types import InstanceId
from llumnix.errors import ProtocolError

NOW_S = 1000.0

# -- stories that end in a state


def starting() -> Lifecycle:
    return Lifecycle(machine=life_machine(InstanceId("i0")))


def serving() -> Lifecycle:
    life = starting()
    assert life.up(NOW_S) is A.SERVE
    return life


def restarting(deaths: int = 1) -> Lifecycle:
    life = serving()
    for _ in range(deaths):
        assert life.died("killed", NOW_S) is A.RESTART
    return life


def crashed_often() -> Lifecycle:
    """It serves, and its next early death is the last."""
    life = restarting(CRASHES_MAX - 1)
    life.up(NOW_S)
    return life


def draining() -> Lifecycle:
    life = serving()
    assert drain(life) is A.DRAIN
    return life


def stopping(again: bool = False) -> Lifecycle:
    life = serving()
    drain(life, again)
    assert life.drain_looked_at(NOW_S, busy=False, hung=False) is A.STOP
    return life


def failed() -> Lifecycle:
    life = starting()
    assert life.died("no memory", NOW_S) is A.GIVE_UP
    return life


def drain(life: Lifecycle, again: bool = False) -> A:
    return life.order_drain(
        "user", "a user's order", NOW_S, timeout_s=None, force=False, again=again
    )


def stuck(life: Lifecycle) -> A:
    return life.stuck("RuntimeError: no answer")


# -- transitions

TRANSITIONS: dict[tuple[S, E], tuple[Callable[[], Lifecycle], Callable[[Lifecycle], A]]] = {
    (S.STARTING, E.UP): (starting, lambda x: x.up(NOW_S)),
    (S.STARTING, E.DIED): (starting, lambda x: x.died("killed", NOW_S)),
    (S.STARTING, E.STUCK): (starting, stuck),
    (S.STARTING, E.DRAIN): (starting, drain),
    (S.SERVING, E.DIED): (serving, lambda x: x.died("killed", NOW_S)),
    (S.SERVING, E.DIED_TOO_OFTEN): (crashed_often, lambda x: x.died("killed", NOW_S)),
    (S.SERVING, E.STUCK): (serving, stuck),
    (S.SERVING, E.DRAIN): (serving, drain),
    (S.RESTARTING, E.UP): (restarting, lambda x: x.up(NOW_S)),
    (S.RESTARTING, E.DIED): (restarting, lambda x: x.died("killed", NOW_S)),
    (S.RESTARTING, E.DIED_TOO_OFTEN): (
        lambda: restarting(CRASHES_MAX - 1),
        lambda x: x.died("killed", NOW_S),
    ),
    (S.RESTARTING, E.STUCK): (restarting, stuck),
    (S.RESTARTING, E.DRAIN): (restarting, drain),
    (S.DRAINING, E.DRAIN): (draining, drain),
    (S.DRAINING, E.UNDRAIN): (draining, Lifecycle.undrain),
    (S.DRAINING, E.EMPTY): (draining, lambda x: x.drain_looked_at(NOW_S, busy=False, hung=False)),
    (S.DRAINING, E.STUCK): (draining, stuck),
    (S.STOPPING, E.DRAIN): (stopping, drain),
    (S.STOPPING, E.STUCK): (stopping, stuck),
    (S.STOPPING, E.STOPPED): (stopping, Lifecycle.stopped),
    (S.STOPPING, E.STOPPED_TO_START): (lambda: stopping(again=True), Lifecycle.stopped),
    (S.FAILED, E.DRAIN): (failed, drain),
    (S.FAILED, E.STUCK): (failed, stuck),
}


@pytest.mark.parametrize(("state", "event"), [(s, e) for s, row in LIFE.items() for e in row])
def test_every_transition_of_the_table_occurs(state: S, event: E) -> None:
    story, then = TRANSITIONS[state, event]
    life = story()
    assert life.state is state
    before = len(life.machine.history)
    action = then(life)
    after, expected = LIFE[state][event]
    assert life.machine.history[before:] == [(event, after)]
    assert action is expected


@pytest.mark.parametrize(
    ("story", "event"),
    [
        (stopping, Lifecycle.undrain),
        (failed, lambda x: x.up(NOW_S)),
        (serving, lambda x: x.up(NOW_S)),
        (draining, Lifecycle.stopped),
    ],
)
def test_an_event_that_cannot_happen_raises_with_the_story(
    story: Callable[[], Lifecycle], event: Callable[[Lifecycle], A]
) -> None:
    with pytest.raises(
        ProtocolError, match=r"instance i0: .* cannot happen in state .*starting -\["
    ):
        event(story())


def test_a_life_that_is_over_takes_no_event() -> None:
    life = stopping()
    life.stopped()
    assert life.machine.over
    for event in E:
        with pytest.raises(ProtocolError):
            life.machine.feed(event)


# -- starts and deaths


def test_an_instance_that_never_served_is_given_up_at_its_first_death() -> None:
    life = failed()
    assert life.why == "could not be started: no memory"
    assert life.restarts == 0


def test_each_restart_says_when_the_next_run_may_start() -> None:
    life = restarting()
    assert (life.start_at_s, life.restarts, life.why) == (NOW_S, 1, "killed")
    life.died("killed again", NOW_S)
    assert (life.start_at_s, life.restarts, life.why) == (NOW_S + 1, 2, "killed again")


def test_an_instance_that_served_for_long_has_its_crashes_forgiven() -> None:
    life = crashed_often()
    assert life.died("killed", NOW_S + HEALTHY_AFTER_S) is A.RESTART
    assert life.start_at_s == NOW_S + HEALTHY_AFTER_S


def test_a_death_while_restarting_counts_as_one_after_no_service_at_all() -> None:
    life = restarting(CRASHES_MAX - 1)
    assert life.died("killed", NOW_S + 10 * HEALTHY_AFTER_S) is A.GIVE_UP
    assert life.why is not None
    assert life.why.startswith("given up: crashed 5 times")
    assert life.why.endswith("the last time: killed")


def test_the_loss_of_its_host_is_no_crash_nor_are_starts_there_until_that_is_noticed() -> None:
    life = serving()
    now_s = NOW_S
    for _ in range(3 * CRASHES_MAX):
        assert life.died("its host does not answer", now_s, host_lost=True) is A.RESTART
        assert life.start_at_s == now_s
        assert life.died("no answer", now_s + HOST_NOTICED_S) is A.RESTART
        assert life.start_at_s == now_s + HOST_NOTICED_S + 1
        now_s += HOST_NOTICED_S + 2
        life.up(now_s)
    assert life.crashes.crashes == 0
    assert life.restarts == 6 * CRASHES_MAX
    now_s += HOST_NOTICED_S
    for _ in range(CRASHES_MAX - 1):
        assert life.died("killed", now_s) is A.RESTART
        life.up(now_s)
    assert life.died("killed", now_s) is A.GIVE_UP


@pytest.mark.parametrize("story", [crashed_often, lambda: restarting(CRASHES_MAX - 1)])
def test_an_instance_that_crashes_too_often_fails(story: Callable[[], Lifecycle]) -> None:
    life = story()
    life.died("killed", NOW_S)
    assert life.state is S.FAILED
    assert not life.counts


def test_an_instance_that_is_up_again_has_no_complaint() -> None:
    life = restarting()
    life.up(NOW_S)
    assert life.why is None


def test_work_that_raises_time_after_time_gives_the_instance_up_and_says_why() -> None:
    life = restarting()
    assert stuck(life) is A.GIVE_UP
    assert life.why == "given up: RuntimeError: no answer"
    assert stuck(life) is A.NOTHING  # It is given up once.


# -- drains


def test_a_drain_goes_on_while_the_instance_is_busy_and_ends_at_its_deadline() -> None:
    life = draining()
    last_s = NOW_S + DRAIN_TIMEOUT_S
    assert life.drain_looked_at(last_s - 1, busy=True, hung=False) is A.NOTHING
    assert life.state is S.DRAINING
    assert life.drain_looked_at(last_s, busy=True, hung=False) is A.STOP


def test_a_drain_that_only_the_scheduler_wanted_is_taken_back_at_its_deadline() -> None:
    life = serving()
    life.order_drain("scheduler", "idle", NOW_S, timeout_s=5, force=False)
    assert life.drain_looked_at(NOW_S + 5, busy=True, hung=False) is A.SERVE_ON
    assert (life.state, life.drain, life.why) == (S.SERVING, None, None)


def test_a_hung_instance_that_the_scheduler_drains_is_cut_off_at_the_deadline() -> None:
    life = serving()
    life.order_drain("scheduler", "idle", NOW_S, timeout_s=5, force=False)
    assert life.drain_looked_at(NOW_S + 5, busy=True, hung=True) is A.STOP


def test_a_drain_during_which_the_instance_must_serve_is_taken_back_at_its_deadline() -> None:
    life = draining()
    assert life.drain is not None
    life.drain.held = True
    assert life.drain_looked_at(NOW_S + DRAIN_TIMEOUT_S, busy=True, hung=True) is A.SERVE_ON


def test_a_second_order_changes_the_timeout_and_the_users_reason_replaces_the_schedulers() -> None:
    life = serving()
    life.order_drain("scheduler", "idle", NOW_S, timeout_s=None, force=False)
    assert life.why == "draining: idle"
    life.order_drain("user", "a user's order", NOW_S + 1, timeout_s=2, force=False)
    assert life.drain is not None
    assert (life.drain.by, life.drain.deadline_s) == ("user", NOW_S + 3)
    life.order_drain("scheduler", "idle", NOW_S + 2, timeout_s=None, force=False)
    assert (life.drain.by, life.drain.deadline_s) == ("user", NOW_S + 3)
    assert life.why == "draining: a user's order"


def test_a_restart_that_is_ordered_to_be_a_removal_ends_in_one_until_it_is_stopped() -> None:
    for story in (draining, stopping):
        life = story()
        assert life.drain is not None
        life.drain.again = True
        drain(life)
        assert not life.renewed


def test_a_drain_of_the_schedulers_keeps_a_restart_a_restart() -> None:
    life = stopping(again=True)
    life.order_drain("scheduler", "idle", NOW_S, timeout_s=None, force=False)
    assert life.renewed


def test_after_a_users_restart_crashes_are_counted_anew() -> None:
    life = crashed_often()
    drain(life, again=True)
    life.drain_looked_at(NOW_S, busy=False, hung=False)
    assert life.stopped() is A.RENEW
    assert (life.why, life.drain, life.start_at_s, life.coming) == (None, None, 0.0, True)
    assert life.up(NOW_S) is A.SERVE
    assert life.died("killed", NOW_S) is A.RESTART


def test_force_moves_the_deadline_to_now() -> None:
    life = draining()
    life.order_drain("user", "at once", NOW_S + 1, timeout_s=60, force=True)
    assert life.drain_looked_at(NOW_S + 1, busy=True, hung=False) is A.STOP
