"""Which engine owns a stream: the rules of the table of streams as claims, one by one."""

import pytest

from llumnix.core.codes import AbortCode
from llumnix.core.limits import TAIL_MAX
from llumnix.core.messages import Migrate, MigrationEnded, Revive
from llumnix.core.streams.effects import AskFate, Moved, Orphaned, TellLost
from llumnix.core.streams.states import StreamState as S
from llumnix.core.streams.stream import Refusal
from llumnix.core.streams.table import (
    DESTINATION_DIED,
    SOURCE_DIED,
    SOURCE_DIED_AFTER,
    StreamTable,
)
from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId
from llumnix.errors import ProtocolError
from support.stream_table import (
    DESTINATION,
    SOURCE,
    THIRD,
    R,
    Table,
    abort,
    aborted,
    goes_to,
    lost,
    migrated,
    moving,
    orphan,
    orphaned,
    revived,
    reviving,
)

# -- from the request's arrival to its end


def test_a_stream_is_owned_once_its_engine_is_chosen() -> None:
    table = Table()
    stream = table.open(R, "info")
    assert (stream.state, stream.owner, stream.info) == (S.PLACING, None, "info")
    assert table.hear(SOURCE, 1, "too early") == ([], [])
    assert table.grant(R, DESTINATION, "there") is Refusal.NOT_RUNNING
    assert table.placed(stream, SOURCE)
    assert (stream.state, stream.owner, stream.last_owner) == (S.OWNED, SOURCE, SOURCE)


def test_a_stream_that_is_closed_while_it_is_placed_goes_to_no_engine() -> None:
    table = Table()
    stream = table.open(R, "info")
    assert table.shut() == []
    assert not table.placed(stream, SOURCE)
    again = table.open(R, "the same name")
    assert not table.placed(stream, SOURCE)
    assert table.placed(again, THIRD)
    assert [table.count(e) for e in (SOURCE, THIRD)] == [0, 1]


def test_a_request_has_one_stream_at_a_time() -> None:
    table = Table()
    table.open_on(SOURCE)
    with pytest.raises(ProtocolError, match="stream r is open already"):
        table.open(R, "again")


def test_streams_are_found_by_request_and_by_engine() -> None:
    table = Table()
    a, b, c = (
        table.open_on(engine, RequestId(name))
        for name, engine in (("a", SOURCE), ("b", DESTINATION), ("c", DESTINATION))
    )
    assert (len(table), list(table)) == (3, [a, b, c])
    assert (table.count(DESTINATION), table.on(DESTINATION)) == (2, [b, c])
    assert table.close(b.request) == (b, [DESTINATION])
    assert table.close(b.request) is None
    assert (b.owner, b.last_owner) == (None, DESTINATION)
    assert table.on(DESTINATION) == [c]
    table.close(c.request)
    assert (table.count(DESTINATION), table.on(DESTINATION)) == (0, [])
    assert (table.get(a.request), table.get(c.request)) == (a, None)
    table.check()


def test_a_stream_that_moves_is_counted_where_it_is() -> None:
    table, order = moving()
    table.take(order, 0)
    assert [table.count(e) for e in (SOURCE, DESTINATION)] == [0, 1]
    assert (table.one().owner, table.one().last_owner) == (DESTINATION, DESTINATION)


def test_a_stream_that_ends_names_both_engines_that_may_hold_it() -> None:
    table, order = moving()
    assert table.shut() == [SOURCE, DESTINATION]
    assert table.shut() is None
    assert table.end(order, taken=True) == []
    assert table.get(R) is None


def test_a_stream_that_ends_at_rest_names_its_owner() -> None:
    table, order = moving()
    table.take(order, 0)
    assert table.shut() == [DESTINATION]


def test_the_dead_hold_nothing() -> None:
    table, _ = moving()
    table.lose(SOURCE, DESTINATION)
    assert table.shut() == [DESTINATION]


# -- grant


def test_an_order_carries_an_epoch_that_was_never_granted_before() -> None:
    table, first = moving()
    assert first == Migrate(
        migration=MigrationId("m0"),
        request=R,
        destination=DESTINATION,
        address="there",
        epoch=Epoch(1),
        copy="staged",
    )
    assert table.of(first.migration) is table.one()
    table.end(first, taken=False)
    assert table.of(first.migration) is None
    second = table.grant(R, THIRD, "elsewhere", "blocking", wanted=True)
    assert second == Migrate(
        migration=MigrationId("m1"),
        request=R,
        destination=THIRD,
        address="elsewhere",
        epoch=Epoch(2),
        copy="blocking",
        wanted=True,
    )


def test_no_order_for_a_request_that_is_being_moved() -> None:
    table, order = moving()
    assert table.grant(R, THIRD, "elsewhere") is Refusal.MOVING
    table.lose(SOURCE, DESTINATION)  # Its destination is being asked.
    assert table.grant(R, THIRD, "elsewhere") is Refusal.MOVING
    assert table.one().grant is order


def test_no_order_to_the_engine_that_has_it_or_to_a_dead_one() -> None:
    table = Table()
    table.open_on(SOURCE)
    assert table.grant(R, SOURCE, "here") is Refusal.THERE
    table.lose(DESTINATION, SOURCE)
    assert table.grant(R, DESTINATION, "there") is Refusal.ENGINE_DEAD
    assert table.one().state is S.OWNED


def test_no_order_for_a_stream_that_no_engine_has() -> None:
    table, _ = moving()
    assert table.grant(RequestId("other"), DESTINATION, "there") is Refusal.NOT_RUNNING
    table.shut()
    assert table.grant(R, DESTINATION, "there") is Refusal.NOT_RUNNING


def test_two_frontends_never_name_a_migration_alike() -> None:
    names = set()
    for client in (0, 1):
        table: StreamTable[str, str] = StreamTable(client)
        table.placed(table.open(R, ""), SOURCE)
        order = table.grant(R, DESTINATION, "there")
        assert isinstance(order, Migrate)
        names.add(order.migration)
    assert names == {"m0", "m1-0"}


# -- whose tokens count


def test_the_owners_tokens_pass_and_are_counted() -> None:
    table = Table()
    stream = table.open_on(SOURCE)
    assert table.hear(SOURCE, 2, "two") == (["two"], [])
    assert table.hear(SOURCE, 1, "one") == (["one"], [])
    assert (stream.outputs, table.on(SOURCE)) == (3, [stream])


def test_tokens_of_any_other_engine_are_dropped() -> None:
    table, _ = moving()
    for engine in (DESTINATION, THIRD):  # The destination has not taken over yet.
        assert table.hear(engine, 1, "not mine") == ([], [])
    assert (table.one().outputs, table.one().held) == (0, [])


def test_while_tokens_are_awaited_those_of_a_third_engine_are_dropped() -> None:
    table, order = moving(outputs=1)
    table.take(order, 2)
    assert table.hear(THIRD, 1, "not mine") == ([], [])
    assert (table.one().outputs, table.one().held) == (1, [])


def test_tokens_of_a_stream_that_is_closed_are_dropped() -> None:
    table, _ = moving()
    table.shut()
    assert table.hear(SOURCE, 1, "late") == ([], [])


def test_the_next_owners_tokens_follow_the_sources_last_in_order() -> None:
    table, order = moving(outputs=1)
    assert table.take(order, 3) == []
    assert table.hear(DESTINATION, 1, "fourth") == ([], [])
    assert table.hear(SOURCE, 1, "second") == (["second"], [])
    assert table.hear(DESTINATION, 2, "fifth, sixth") == ([], [])
    passed, effects = table.hear(SOURCE, 1, "third")
    assert passed == ["third"]
    held = ("fourth", "fifth, sixth")
    assert effects == [Moved(request=R, owner=DESTINATION, held=held), migrated(order)]
    stream = table.one()
    assert (stream.owner, stream.epoch, stream.outputs) == (DESTINATION, order.epoch, 6)
    assert goes_to(table, DESTINATION)
    assert not goes_to(table, SOURCE)


def test_a_take_over_after_the_sources_last_token_moves_the_stream_at_once() -> None:
    table, order = moving(outputs=3)
    assert table.take(order, 3) == [Moved(request=R, owner=DESTINATION), migrated(order)]


def test_the_sources_own_word_does_not_move_the_stream() -> None:
    """Heard before or after the take-over: the destination's word alone counts."""
    table, order = moving(outputs=3)
    assert table.end(order, taken=True) == []
    assert goes_to(table, SOURCE)
    table, order = moving(outputs=3)
    table.take(order, 3)
    assert table.end(order, taken=True) == []
    assert goes_to(table, DESTINATION)


def test_a_migration_that_failed_leaves_the_stream_where_it_was() -> None:
    table, order = moving(outputs=1)
    assert table.end(order, taken=False, why="no room") == [aborted(order, "no room")]
    assert goes_to(table, SOURCE)
    assert table.order().epoch > order.epoch


def test_an_order_that_the_source_could_not_take_in_leaves_the_stream_where_it_was() -> None:
    table, order = moving(outputs=1)
    assert table.refuse(order, "odd") == [aborted(order, "odd")]
    assert table.refuse(order, "odd") == []
    assert table.one().state is S.OWNED
    assert goes_to(table, SOURCE)


@pytest.mark.parametrize("heard", ["let go", "took over", "source lost", "closed"])
def test_a_refusal_counts_only_if_nothing_else_was_heard_of_the_migration(heard: str) -> None:
    table, order = moving(outputs=1)
    match heard:
        case "let go":
            table.end(order, taken=True)
        case "took over":
            table.take(order, 2)
        case "source lost":
            table.lose(SOURCE, DESTINATION)
        case "closed":
            table.shut()
    before = table.get(R) and table.one().state
    assert table.refuse(order, "odd") == []
    assert (table.get(R) and table.one().state) == before
    table.check()


def test_a_refused_order_whose_destination_died_is_over_too() -> None:
    table, order = moving(outputs=1)
    table.lose(DESTINATION, SOURCE)
    assert table.refuse(order, "odd") == [aborted(order, "odd")]
    assert table.one().revoked == set()
    table.check()


def test_a_request_can_move_on_and_back() -> None:
    table, order = moving()
    table.take(order, 0)
    back = table.order(SOURCE, "here")
    assert table.take(back, 0) == [Moved(request=R, owner=SOURCE), migrated(back)]
    assert back.epoch > order.epoch
    assert goes_to(table, SOURCE)


def test_more_tokens_than_the_take_over_says_is_an_error_with_the_story() -> None:
    table, order = moving(outputs=4)
    with pytest.raises(ProtocolError) as error:
        table.take(order, 3)
    assert str(error.value) == "r: engine 0 sent 4 tokens, but engine 1 goes on after 3"
    table.check()
    table, order = moving(outputs=2)
    table.take(order, 3)
    with pytest.raises(ProtocolError, match="engine 0 sent 4 tokens, but engine 1 goes on after 3"):
        table.hear(SOURCE, 2, "one too many")
    table.check()


# -- take-overs that do not count


def test_a_take_over_of_a_closed_stream_is_aborted() -> None:
    table, order = moving()
    table.shut()
    assert table.take(order, 0) == abort(DESTINATION)


def test_a_take_over_under_a_stale_epoch_is_aborted() -> None:
    table, order = moving()
    table.end(order, taken=False)
    assert table.take(order, 0) == abort(DESTINATION)
    table.order(THIRD, "elsewhere")
    assert table.take(order, 0) == abort(DESTINATION)
    assert goes_to(table, SOURCE)


# -- the destination dies


def test_a_destination_that_died_before_it_took_over_loses_its_grant_to_the_source() -> None:
    table, order = moving(outputs=1)
    assert table.lose(DESTINATION, SOURCE, THIRD) == [
        TellLost(engine=SOURCE, lost=DESTINATION, granted=(order.migration,)),
        TellLost(engine=THIRD, lost=DESTINATION, granted=()),
    ]
    stream = table.one()
    assert (stream.grant, stream.revoked) == (None, {order.migration})
    assert (stream.owner, stream.epoch) == (SOURCE, order.epoch + 1)
    assert goes_to(table, SOURCE)


def test_a_grant_that_was_revoked_stays_revoked() -> None:
    table, order = moving(outputs=1)
    table.lose(DESTINATION, SOURCE)
    assert table.take(order, 1) == abort(DESTINATION)
    assert table.of(order.migration) is table.one()
    assert table.end(order, taken=False, why="gone") == [aborted(order, "gone")]
    assert table.of(order.migration) is None
    assert table.order(THIRD, "elsewhere").epoch > order.epoch + 1
    assert goes_to(table, SOURCE)


def test_a_destination_that_died_after_it_took_over_takes_the_stream_with_it() -> None:
    table, order = moving(outputs=1)
    table.take(order, 2)  # The source's last token is still out.
    assert table.lose(DESTINATION, SOURCE) == [
        TellLost(engine=SOURCE, lost=DESTINATION, granted=()),
        *abort(SOURCE),
        lost(order),
        orphaned(),
    ]


def test_a_take_over_that_died_unheard_ends_the_stream_once_the_source_says_so() -> None:
    """The destination took over, told the source and died; its word to the frontend was lost."""
    table, order = moving(outputs=1)
    assert orphaned() not in table.lose(DESTINATION, SOURCE)
    assert table.end(order, taken=True) == [*abort(SOURCE), lost(order), orphaned()]
    assert table.end(order, taken=True) == []


def test_a_take_over_that_died_unheard_ends_the_stream_when_the_source_had_said_so() -> None:
    table, order = moving(outputs=1)
    assert table.end(order, taken=True) == []
    assert table.lose(DESTINATION, SOURCE) == [
        TellLost(engine=SOURCE, lost=DESTINATION, granted=()),
        *abort(SOURCE),
        lost(order),
        orphaned(),
    ]


def test_a_take_over_that_died_unheard_ends_the_stream_also_while_it_is_granted_anew() -> None:
    """The source says so only after the frontend has ordered the next move."""
    table, first = moving(outputs=1)
    table.lose(DESTINATION, SOURCE, THIRD)
    second = table.order(THIRD, "elsewhere")
    assert table.end(first, taken=True) == [
        *abort(SOURCE, THIRD),
        lost(first),
        lost(second),
        orphaned(warm=THIRD),
    ]
    assert table.end(second, taken=False) == []
    assert table.take(second, 1) == []  # It had to abort it already.


def test_a_source_that_has_moved_a_request_had_kept_it_when_the_destination_before_died() -> None:
    """Its word of the first migration is still on its way, or died with it."""
    table, first = moving(outputs=1)
    table.lose(DESTINATION, SOURCE, THIRD)
    second = table.order(THIRD, "elsewhere")
    assert table.take(second, 1) == [
        Moved(request=R, owner=THIRD),
        aborted(first, DESTINATION_DIED),
        migrated(second),
    ]
    assert table.end(first, taken=False) == []
    assert goes_to(table, THIRD)


def test_a_revoked_grant_is_of_no_account_after_the_streams_end() -> None:
    table, order = moving()
    table.lose(DESTINATION, SOURCE)
    table.shut()
    assert table.end(order, taken=True) == []


# -- the source dies


def test_a_stream_that_was_not_moving_dies_with_its_engine() -> None:
    table = Table()
    stream = table.open_on(SOURCE)
    assert table.lose(SOURCE, THIRD) == [
        TellLost(engine=THIRD, lost=SOURCE, granted=()),
        orphaned(),
    ]
    assert (stream.owner, stream.last_owner, table.count(SOURCE)) == (None, SOURCE, 0)
    assert table.hear(SOURCE, 1, "from the grave") == ([], [])
    assert table.shut() == []


def test_streams_of_other_engines_hear_nothing_of_a_death() -> None:
    table = Table()
    table.open_on(SOURCE)
    assert table.lose(THIRD, SOURCE) == [TellLost(engine=SOURCE, lost=THIRD, granted=())]
    assert goes_to(table, SOURCE)


def test_a_source_that_died_unanswered_leaves_the_destination_to_be_asked() -> None:
    for said in (False, True):  # By the source, that it let the request go.
        table, order = moving(outputs=1)
        if said:
            table.end(order, taken=True)
        assert table.lose(SOURCE, DESTINATION) == [
            TellLost(engine=DESTINATION, lost=SOURCE, granted=()),
            AskFate(engine=DESTINATION, migration=order.migration),
        ]
        assert table.end(order, taken=False) == []  # What the dead say does not count.


@pytest.mark.parametrize("fate", ["declined", "undecided"])
def test_declined_then_means_that_the_stream_is_lost_and_so_does_no_answer(fate: str) -> None:
    table, order = moving(outputs=1)
    table.lose(SOURCE, DESTINATION)
    # By its own word it has nothing. If it says nothing, nobody knows.
    assert table.tell(order, fate) == [
        *(abort(DESTINATION) if fate == "undecided" else []),
        lost(order, SOURCE_DIED),
        orphaned(SOURCE_DIED, warm=DESTINATION),
    ]


def test_taken_then_moves_the_stream_with_what_the_source_did_not_send() -> None:
    table, order = moving(outputs=2)
    table.lose(SOURCE, DESTINATION)
    assert table.take(order, 5, [13, 14, 15]) == [
        Moved(request=R, owner=DESTINATION, missing=(13, 14, 15)),
        migrated(order, SOURCE_DIED),
    ]
    assert table.tell(order, "taken") == []
    stream = table.one()
    assert (stream.owner, stream.outputs, stream.state) == (DESTINATION, 5, S.OWNED)
    assert goes_to(table, DESTINATION)


def test_only_what_is_missing_is_taken_from_the_tail() -> None:
    for outputs, missing in ((4, (15,)), (5, ())):
        table, order = moving(outputs=outputs)
        table.lose(SOURCE, DESTINATION)
        assert table.take(order, 5, [13, 14, 15])[0] == Moved(
            request=R, owner=DESTINATION, missing=missing
        )


def test_a_source_that_died_after_the_take_over_moves_the_stream_with_all_that_was_held() -> None:
    table, order = moving(outputs=2)
    table.take(order, 4, [11, 12, 13, 14])
    table.hear(DESTINATION, 1, "fifth")
    assert table.lose(SOURCE, DESTINATION) == [
        TellLost(engine=DESTINATION, lost=SOURCE, granted=()),
        Moved(request=R, owner=DESTINATION, missing=(13, 14), held=("fifth",)),
        migrated(order, SOURCE_DIED_AFTER),
    ]
    assert table.one().outputs == 5


def test_a_tail_that_is_too_short_loses_the_stream() -> None:
    tail = list(range(TAIL_MAX))
    table, order = moving(outputs=1)
    table.lose(SOURCE, DESTINATION)
    assert table.take(order, TAIL_MAX + 2, tail) == [
        *abort(DESTINATION),
        lost(order, SOURCE_DIED),
        orphaned(SOURCE_DIED, warm=DESTINATION),
    ]
    table, order = moving(outputs=1)
    table.take(order, TAIL_MAX + 2, tail)
    assert table.lose(SOURCE, DESTINATION)[1:] == [
        *abort(DESTINATION),
        lost(order, SOURCE_DIED_AFTER),
        orphaned(SOURCE_DIED_AFTER, warm=DESTINATION),
    ]


def test_a_source_that_said_too_much_before_it_died_loses_the_stream() -> None:
    table, order = moving(outputs=4)
    table.lose(SOURCE, DESTINATION)
    assert table.take(order, 3) == [
        *abort(DESTINATION),
        lost(order, SOURCE_DIED),
        orphaned(SOURCE_DIED, warm=DESTINATION),
    ]


def test_with_both_engines_dead_the_stream_is_lost() -> None:
    table, order = moving(outputs=1)
    table.lose(SOURCE, DESTINATION)
    assert table.lose(DESTINATION) == [lost(order), orphaned()]
    table.shut()
    assert table.tell(order, "declined") == []


def test_an_answer_that_was_not_asked_for_changes_nothing() -> None:
    table, order = moving(outputs=1)
    assert table.tell(order, "declined") == []  # The source lives.
    table.lose(SOURCE, DESTINATION)
    assert table.tell(order, "taken") == []  # Its `TookOver` says all.
    assert table.one().state is S.ASKING
    table, order = moving(outputs=1)
    assert table.fate(MigrationId("m99"), "declined") == ()
    assert goes_to(table, SOURCE)


# -- another engine goes on with an orphan


def test_an_orphan_is_granted_to_an_engine_with_the_tokens_that_its_client_has() -> None:
    table = Table()
    table.open_on(SOURCE)
    table.receive(SOURCE, R, [7, 8], "two", [])
    table.receive(SOURCE, R, [9], "one", [])
    table.lose(SOURCE)
    order = table.ask()
    assert order == Revive(
        migration=MigrationId("m0"), request=R, destination=THIRD, epoch=Epoch(1), outputs=[7, 8, 9]
    )
    assert table.of(order.migration) is table.one()
    assert table.take(order, 3, []) == [revived(THIRD)]
    stream = table.one()
    assert (stream.owner, stream.last_owner, stream.epoch) == (THIRD, THIRD, order.epoch)
    assert (stream.grant, table.of(order.migration), table.on(THIRD)) == (None, None, [stream])
    assert goes_to(table, THIRD)
    assert order.outputs == [7, 8, 9]  # What comes later is not in the order.


def test_before_the_asked_engine_says_that_it_goes_on_nobody_speaks() -> None:
    table, _ = reviving()
    for engine in (SOURCE, DESTINATION, THIRD):
        assert table.hear(engine, 1, "too early") == ([], [])
    stream = table.one()
    assert (stream.outputs, stream.owner, stream.last_owner) == (1, None, SOURCE)
    assert [table.count(e) for e in (SOURCE, THIRD)] == [0, 0]


def test_only_an_orphan_is_revived() -> None:
    table = Table()
    assert table.revive(R, THIRD) is Refusal.NO_ORPHAN
    stream = table.open(R, "info")
    assert table.revive(R, THIRD) is Refusal.NO_ORPHAN
    table.placed(stream, SOURCE)
    assert table.revive(R, THIRD) is Refusal.NO_ORPHAN
    table.lose(SOURCE)
    order = table.ask()
    assert table.revive(R, DESTINATION) is Refusal.NO_ORPHAN
    table.take(order, 0)
    assert table.revive(R, DESTINATION) is Refusal.NO_ORPHAN
    table.lose(THIRD)
    table.shut()
    assert table.revive(R, DESTINATION) is Refusal.NO_ORPHAN


@pytest.mark.parametrize("story", ["granted", "asking", "holding"])
def test_a_stream_that_is_moving_is_not_revived(story: str) -> None:
    table, order = moving(outputs=1)
    if story == "asking":
        table.lose(SOURCE, DESTINATION)
    if story == "holding":
        table.take(order, 3)
    assert table.revive(R, THIRD) is Refusal.NO_ORPHAN
    assert table.one().grant is order


def test_an_orphan_is_not_granted_to_a_dead_engine() -> None:
    table = orphan()
    table.lose(THIRD)
    for engine in (SOURCE, THIRD):
        assert table.revive(R, engine) is Refusal.ENGINE_DEAD
    assert (table.one().state, table.one().last_epoch) == (S.ORPHAN, Epoch(0))


def test_no_order_to_move_a_stream_that_no_engine_runs() -> None:
    table = orphan()
    assert table.grant(R, DESTINATION, "there") is Refusal.NOT_RUNNING
    table.ask()
    assert table.grant(R, DESTINATION, "there") is Refusal.NOT_RUNNING
    assert table.one().state is S.REVIVING


def test_an_engine_that_takes_none_just_now_is_told_from_one_that_declines() -> None:
    table, order = reviving()
    ended = MigrationEnded(
        migration=order.migration, request=R, taken=False, why="it sleeps", code=AbortCode.BUSY
    )
    assert table.ended(ended) == [Orphaned(request=R, why="it sleeps", declined=AbortCode.BUSY)]


@pytest.mark.parametrize("how", ["declined", "refused"])
def test_an_engine_that_does_not_go_on_leaves_an_orphan_for_the_next(how: str) -> None:
    table, order = reviving()
    say = table.refuse if how == "refused" else lambda o, why: table.end(o, taken=False, why=why)
    # By its own word it has nothing. If it could not be asked, nobody knows.
    aborts = abort(THIRD) if how == "refused" else []
    assert say(order, "still here") == [*aborts, orphaned("still here", declined=AbortCode.OTHER)]
    assert (table.one().state, table.of(order.migration)) == (S.ORPHAN, None)
    assert say(order, "still here") == []
    again = table.ask(DESTINATION)
    assert again.epoch > order.epoch
    assert again.migration != order.migration
    # Whatever the first one says now is too late.
    assert say(order, "still here") == []
    assert table.take(order, 1) == []
    assert table.hear(THIRD, 1, "not mine") == ([], [])
    assert table.one().grant is again
    assert table.one().lives_used == 0  # No engine died under it but its first.
    assert table.take(again, 1) == [revived(DESTINATION)]


def test_an_engine_that_dies_before_it_goes_on_leaves_an_orphan_for_the_next() -> None:
    table, order = reviving()
    assert table.lose(THIRD, DESTINATION) == [
        TellLost(engine=DESTINATION, lost=THIRD, granted=()),
        orphaned(),
    ]
    assert table.take(order, 1) == []
    assert table.one().lives_used == 1
    assert table.ask(DESTINATION).epoch > order.epoch


def test_a_death_of_another_engine_changes_nothing_for_a_stream_without_one() -> None:
    table = orphan()
    assert table.lose(DESTINATION) == []
    order = table.ask()
    assert table.lose(EngineIndex(7)) == []
    assert table.one().grant is order


def test_a_stream_is_revived_as_often_as_its_engines_die() -> None:
    table, engines = orphan(), [EngineIndex(n) for n in range(3, 8)]
    for count, engine in enumerate(engines, 1):
        order = table.ask(engine)
        assert len(order.outputs) == count
        assert table.take(order, count) == [revived(engine)]
        assert goes_to(table, engine)
        assert table.one().lives_used == count
        assert table.lose(engine) == [orphaned()]
    assert table.one().epoch < table.ask().epoch == len(engines) + 1


def test_a_client_that_hangs_up_on_an_orphan_leaves_nothing_to_abort() -> None:
    assert orphan().shut() == []


def test_a_client_that_hangs_up_during_a_revival_has_it_aborted_there() -> None:
    table, order = reviving()
    assert table.shut() == [THIRD]
    assert table.of(order.migration) is None
    assert table.take(order, 1) == abort(THIRD)
    assert table.end(order, taken=False) == []


def test_the_old_engine_cannot_speak_into_a_revived_stream() -> None:
    """It was taken for dead, and is not; a move was under way."""
    table, old = moving(outputs=1)
    table.lose(SOURCE, DESTINATION)
    table.lose(DESTINATION)
    new = table.ask()
    for _ in range(2):
        for engine in (SOURCE, DESTINATION):
            assert table.hear(engine, 1, "from the grave") == ([], [])
        assert table.end(old, taken=True) == []
        assert table.end(old, taken=False) == []
        assert table.refuse(old, "odd") == []
        assert table.tell(old, "declined") == []
        assert table.take(old, 1) == []
        if table.one().state is S.REVIVING:
            table.take(new, 1)
    assert goes_to(table, THIRD)
    assert (table.one().outputs, table.one().owner) == (2, THIRD)


def test_an_engine_that_goes_on_after_other_tokens_is_an_error() -> None:
    for outputs in (1, 3):
        table, order = reviving(outputs=2)
        with pytest.raises(ProtocolError) as error:
            table.take(order, outputs)
        assert str(error.value) == f"r was revived after {outputs} tokens; its client has 2"
        table.check()


def test_a_revived_stream_moves_like_any_other() -> None:
    table, order = reviving()
    table.take(order, 1)
    move = table.order(DESTINATION)
    assert move.epoch > order.epoch
    assert table.take(move, 2, [0, 1]) == []
    assert table.lose(THIRD, DESTINATION)[1:] == [
        Moved(request=R, owner=DESTINATION, missing=(1,)),
        migrated(move, SOURCE_DIED_AFTER),
    ]
    assert table.one().tokens == [0, 1]


def test_what_a_move_brought_is_what_a_revival_goes_on_after() -> None:
    """Tokens out of the take-over's tail, and those that were held."""
    table, order = moving(outputs=1)
    table.take(order, 3, [0, 11, 12])
    table.receive(DESTINATION, R, [13, 14], "held", [])
    table.lose(SOURCE, DESTINATION)
    table.lose(DESTINATION)
    assert table.ask().outputs == [0, 11, 12, 13, 14]


def test_a_take_over_that_died_unheard_is_computed_again_elsewhere() -> None:
    """The source still lives, and may be the one that goes on."""
    table, order = moving(outputs=1)
    table.lose(DESTINATION, SOURCE)
    assert table.end(order, taken=True) == [*abort(SOURCE), lost(order), orphaned()]
    again = table.ask(SOURCE)
    assert again.outputs == [0]
    assert table.take(again, 1) == [revived(SOURCE)]
    assert goes_to(table, SOURCE)


SOURCE_2 = EngineIndex(3)


def late() -> tuple[Table, Migrate]:
    """The destination did not say in time what it had decided, and was told to abort the request.
    Its take-over is still on its way."""
    table, order = moving(outputs=1)
    table.lose(SOURCE, DESTINATION)
    assert table.tell(order, "undecided")[:1] == abort(DESTINATION)
    return table, order


def test_a_late_take_over_does_not_end_the_revival_at_the_same_engine() -> None:
    """An abort now would be the revived one's."""
    table, order = late()
    again = table.ask(DESTINATION)
    assert table.take(order, 1) == []
    assert table.hear(DESTINATION, 1, "of the first") == ([], [])
    assert table.take(again, 1) == [revived(DESTINATION)]
    assert goes_to(table, DESTINATION)


def test_a_request_is_not_moved_to_an_engine_that_may_have_to_abort_it_still() -> None:
    """Its peers' messages come another way than the abort, and may come before it."""
    table, order = late()
    table.take(table.ask(THIRD), 1)
    assert table.grant(R, DESTINATION, "there") is Refusal.LEAVING
    move = table.order(SOURCE_2)
    table.take(move, 1)
    assert table.grant(R, DESTINATION, "there") is Refusal.LEAVING
    assert table.take(order, 1) == []


def test_an_engine_that_goes_on_with_it_has_aborted_what_it_had_before() -> None:
    """Both come the same way."""
    table, _ = late()
    table.take(table.ask(DESTINATION), 1)
    table.take(table.order(THIRD), 1)
    back = table.order(DESTINATION)
    assert table.take(back, 1) == [Moved(request=R, owner=DESTINATION), migrated(back)]
    assert goes_to(table, DESTINATION)


def test_a_request_may_be_moved_to_an_engine_that_declined_it_before() -> None:
    table, order = moving(outputs=1)
    table.lose(SOURCE, DESTINATION)
    table.tell(order, "declined")
    table.take(table.ask(THIRD), 1)
    assert table.order(DESTINATION).epoch > order.epoch


# -- streams whose client gets more than tokens


def detailed(outputs: int) -> tuple[Table, Migrate]:
    """Such a stream, on its way from `SOURCE` to `DESTINATION`."""
    table = Table()
    table.placed(table.open(R, "info", detailed=True), SOURCE)
    table.hear(SOURCE, outputs, "before")
    return table, table.order()


def test_a_take_over_whose_tail_would_come_without_the_rest_leaves_an_orphan() -> None:
    table, order = detailed(outputs=1)
    table.lose(SOURCE, DESTINATION)
    assert table.take(order, 2, [0, 11]) == [
        *abort(DESTINATION),
        lost(order, SOURCE_DIED),
        orphaned(SOURCE_DIED, warm=DESTINATION),
    ]
    table, order = detailed(outputs=1)
    table.take(order, 2, [0, 11])
    table.hear(DESTINATION, 1, "third")
    assert table.lose(SOURCE, DESTINATION)[1:] == [
        *abort(DESTINATION),
        lost(order, SOURCE_DIED_AFTER),
        orphaned(SOURCE_DIED_AFTER, warm=DESTINATION),
    ]
    assert (table.one().state, table.one().tokens) == (S.ORPHAN, [0])
    assert table.ask(DESTINATION).outputs == [0]


def test_a_take_over_that_nothing_is_missing_of_goes_on_with_the_rest() -> None:
    table, order = detailed(outputs=2)
    table.lose(SOURCE, DESTINATION)
    assert table.take(order, 2) == [
        Moved(request=R, owner=DESTINATION),
        migrated(order, SOURCE_DIED),
    ]
    table, order = detailed(outputs=1)
    table.take(order, 2)
    assert table.hear(SOURCE, 1, "second")[0] == ["second"]
    assert table.lose(SOURCE, DESTINATION)[1:] == []
    assert goes_to(table, DESTINATION)
