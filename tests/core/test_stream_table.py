"""Who owns a stream: the arbiter's rules as claims, one by one."""

import pytest

from llumnix.core.limits import TAIL_MAX
from llumnix.core.messages import Migrate, MigrationEnded, TookOver
from llumnix.core.streams.table import AbortAt, Arbiter, AskFate, Moved, StreamLost, TellLost
from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId
from llumnix.errors import ProtocolError

R = RequestId("r")
SOURCE, DESTINATION, THIRD = EngineIndex(0), EngineIndex(1), EngineIndex(2)


def moving(outputs: int = 0) -> tuple[Arbiter[str], Migrate]:
    """A stream on its way from `SOURCE` to `DESTINATION`; `outputs` tokens have arrived."""
    arbiter: Arbiter[str] = Arbiter()
    arbiter.open(R, SOURCE)
    if outputs:
        arbiter.offer(SOURCE, R, outputs, "before")
    order = arbiter.begin(R, DESTINATION, "there")
    assert order is not None
    return arbiter, order


def took(order: Migrate, outputs: int, tail: list[int] | None = None) -> TookOver:
    """The destination's word that it goes on after `outputs` tokens (by default all in `tail`)."""
    return TookOver(
        migration=order.migration,
        request=order.request,
        epoch=order.epoch,
        outputs=outputs,
        tail=list(range(outputs)) if tail is None else tail,
    )


def ended(order: Migrate, *, taken: bool) -> MigrationEnded:
    """The source's word."""
    return MigrationEnded(migration=order.migration, request=order.request, taken=taken, why="")


def goes_to(arbiter: Arbiter[str], engine: EngineIndex) -> bool:
    """Whether the engine's tokens are the stream's."""
    return arbiter.offer(engine, R, 1, "probe")[0] == ["probe"]


# -- begin


def test_an_order_carries_an_epoch_that_was_never_granted_before() -> None:
    arbiter, first = moving()
    assert first == Migrate(
        migration=MigrationId("m0"),
        request=R,
        destination=DESTINATION,
        address="there",
        epoch=Epoch(1),
        copy="staged",
    )
    arbiter.ended(ended(first, taken=False))
    second = arbiter.begin(R, THIRD, "elsewhere", "blocking")
    assert second == Migrate(
        migration=MigrationId("m1"),
        request=R,
        destination=THIRD,
        address="elsewhere",
        epoch=Epoch(2),
        copy="blocking",
    )


def test_no_order_for_a_request_that_is_on_its_way() -> None:
    arbiter, _ = moving()
    assert arbiter.begin(R, THIRD, "elsewhere") is None


def test_no_order_to_the_engine_that_has_it() -> None:
    arbiter: Arbiter[str] = Arbiter()
    arbiter.open(R, SOURCE)
    assert arbiter.begin(R, SOURCE, "here") is None


def test_no_order_for_a_stream_that_is_not_there() -> None:
    arbiter, _ = moving()
    assert arbiter.begin(RequestId("other"), DESTINATION, "there") is None
    arbiter.close(R)
    assert arbiter.begin(R, DESTINATION, "there") is None


def test_two_frontends_never_name_a_migration_alike() -> None:
    names = set()
    for name in ("m", "f1-m"):
        arbiter: Arbiter[str] = Arbiter(name)
        arbiter.open(R, SOURCE)
        order = arbiter.begin(R, DESTINATION, "there")
        assert order is not None
        names.add(order.migration)
    assert names == {"m0", "f1-m0"}


# -- whose tokens count


def test_the_owners_tokens_pass_and_are_counted() -> None:
    arbiter: Arbiter[str] = Arbiter()
    ledger = arbiter.open(R, SOURCE)
    assert arbiter.offer(SOURCE, R, 2, "two") == (["two"], [])
    assert arbiter.offer(SOURCE, R, 1, "one") == (["one"], [])
    assert (ledger.outputs, list(arbiter.on(SOURCE))) == (3, [R])


def test_tokens_of_anybody_else_are_dropped() -> None:
    arbiter, _ = moving()
    ledger = arbiter.get(R)
    for engine in (DESTINATION, THIRD):  # The destination has not taken over yet.
        assert arbiter.offer(engine, R, 1, "not mine") == ([], [])
    assert ledger is not None
    assert (ledger.outputs, ledger.held) == (0, [])


def test_tokens_of_a_stream_that_is_closed_are_dropped() -> None:
    arbiter, _ = moving()
    arbiter.close(R)
    assert arbiter.offer(SOURCE, R, 1, "late") == ([], [])


def test_the_next_owners_tokens_follow_the_sources_last_in_order() -> None:
    arbiter, order = moving(outputs=1)
    assert arbiter.took_over(DESTINATION, took(order, 3)) == []
    assert arbiter.offer(DESTINATION, R, 1, "fourth") == ([], [])
    assert arbiter.offer(SOURCE, R, 1, "second") == (["second"], [])
    assert arbiter.offer(DESTINATION, R, 2, "fifth, sixth") == ([], [])
    passed, effects = arbiter.offer(SOURCE, R, 1, "third")
    assert passed == ["third"]
    assert effects == [Moved(request=R, owner=DESTINATION, held=("fourth", "fifth, sixth"))]
    ledger = arbiter.get(R)
    assert ledger is not None
    assert (ledger.owner, ledger.epoch, ledger.outputs) == (DESTINATION, order.epoch, 6)
    assert goes_to(arbiter, DESTINATION)
    assert not goes_to(arbiter, SOURCE)


def test_a_take_over_after_the_sources_last_token_moves_the_stream_at_once() -> None:
    arbiter, order = moving(outputs=3)
    assert arbiter.took_over(DESTINATION, took(order, 3)) == [Moved(request=R, owner=DESTINATION)]


def test_the_sources_own_word_does_not_move_the_stream() -> None:
    """Heard before or after the take-over: the destination's word alone counts."""
    arbiter, order = moving(outputs=3)
    assert arbiter.ended(ended(order, taken=True)) == []
    assert goes_to(arbiter, SOURCE)
    arbiter, order = moving(outputs=3)
    arbiter.took_over(DESTINATION, took(order, 3))
    assert arbiter.ended(ended(order, taken=True)) == []
    assert goes_to(arbiter, DESTINATION)


def test_a_migration_that_failed_leaves_the_stream_where_it_was() -> None:
    arbiter, order = moving(outputs=1)
    assert arbiter.ended(ended(order, taken=False)) == []
    assert goes_to(arbiter, SOURCE)
    assert arbiter.begin(R, DESTINATION, "there") is not None


def test_a_request_can_move_on_and_back() -> None:
    arbiter, order = moving()
    arbiter.took_over(DESTINATION, took(order, 0))
    back = arbiter.begin(R, SOURCE, "here")
    assert back is not None
    assert arbiter.took_over(SOURCE, took(back, 0)) == [Moved(request=R, owner=SOURCE)]
    assert back.epoch > order.epoch
    assert goes_to(arbiter, SOURCE)


def test_more_tokens_than_the_take_over_says_is_an_error_with_the_story() -> None:
    arbiter, order = moving(outputs=4)
    with pytest.raises(ProtocolError) as error:
        arbiter.took_over(DESTINATION, took(order, 3))
    assert str(error.value) == "r: engine 0 sent 4 tokens, but engine 1 goes on after 3"
    arbiter, order = moving(outputs=2)
    arbiter.took_over(DESTINATION, took(order, 3))
    with pytest.raises(ProtocolError, match="engine 0 sent 4 tokens, but engine 1 goes on after 3"):
        arbiter.offer(SOURCE, R, 2, "one too many")


# -- take-overs that do not count


def test_a_take_over_of_a_closed_stream_is_aborted() -> None:
    arbiter, order = moving()
    arbiter.close(R)
    assert arbiter.took_over(DESTINATION, took(order, 0)) == [
        AbortAt(engine=DESTINATION, request=R)
    ]


def test_a_take_over_under_a_stale_epoch_is_aborted() -> None:
    arbiter, order = moving()
    arbiter.ended(ended(order, taken=False))
    assert arbiter.took_over(DESTINATION, took(order, 0)) == [
        AbortAt(engine=DESTINATION, request=R)
    ]
    arbiter.begin(R, THIRD, "elsewhere")
    assert arbiter.took_over(DESTINATION, took(order, 0)) == [
        AbortAt(engine=DESTINATION, request=R)
    ]
    assert goes_to(arbiter, SOURCE)


# -- the destination dies


def test_a_destination_that_died_before_it_took_over_loses_its_grant_to_the_source() -> None:
    arbiter, order = moving(outputs=1)
    assert arbiter.engine_lost(DESTINATION, [SOURCE, THIRD]) == [
        TellLost(engine=SOURCE, lost=DESTINATION, granted=(order.migration,)),
        TellLost(engine=THIRD, lost=DESTINATION, granted=()),
    ]
    ledger = arbiter.get(R)
    assert ledger is not None
    assert ledger.grant is None
    assert (ledger.owner, ledger.epoch) == (SOURCE, order.epoch + 1)
    assert goes_to(arbiter, SOURCE)


def test_a_grant_that_was_revoked_stays_revoked() -> None:
    arbiter, order = moving(outputs=1)
    arbiter.engine_lost(DESTINATION, [SOURCE])
    assert arbiter.took_over(DESTINATION, took(order, 1)) == [
        AbortAt(engine=DESTINATION, request=R)
    ]
    assert arbiter.ended(ended(order, taken=False)) == []
    again = arbiter.begin(R, THIRD, "elsewhere")
    assert again is not None
    assert again.epoch > order.epoch + 1
    assert goes_to(arbiter, SOURCE)


def test_a_destination_that_died_after_it_took_over_takes_the_stream_with_it() -> None:
    arbiter, order = moving(outputs=1)
    arbiter.took_over(DESTINATION, took(order, 2))  # The source's last token is still out.
    assert arbiter.engine_lost(DESTINATION, [SOURCE]) == [
        TellLost(engine=SOURCE, lost=DESTINATION, granted=()),
        StreamLost(request=R),
    ]


def test_a_take_over_that_died_unheard_ends_the_stream_once_the_source_says_so() -> None:
    """The destination took over, told the source and died; its word to the frontend was lost."""
    arbiter, order = moving(outputs=1)
    assert StreamLost(request=R) not in arbiter.engine_lost(DESTINATION, [SOURCE])
    assert arbiter.ended(ended(order, taken=True)) == [StreamLost(request=R)]
    assert arbiter.ended(ended(order, taken=True)) == []


def test_a_take_over_that_died_unheard_ends_the_stream_when_the_source_had_said_so() -> None:
    arbiter, order = moving(outputs=1)
    assert arbiter.ended(ended(order, taken=True)) == []
    assert arbiter.engine_lost(DESTINATION, [SOURCE]) == [
        TellLost(engine=SOURCE, lost=DESTINATION, granted=()),
        StreamLost(request=R),
    ]


def test_a_revoked_grant_is_of_no_account_after_the_streams_end() -> None:
    arbiter, order = moving()
    arbiter.engine_lost(DESTINATION, [SOURCE])
    arbiter.close(R)
    assert arbiter.ended(ended(order, taken=True)) == []


# -- the source dies


def test_a_stream_that_was_not_moving_dies_with_its_engine() -> None:
    arbiter: Arbiter[str] = Arbiter()
    arbiter.open(R, SOURCE)
    assert arbiter.engine_lost(SOURCE, [THIRD]) == [
        TellLost(engine=THIRD, lost=SOURCE, granted=()),
        StreamLost(request=R),
    ]


def test_a_source_that_died_unanswered_leaves_the_destination_to_be_asked() -> None:
    arbiter, order = moving(outputs=1)
    assert arbiter.engine_lost(SOURCE, [DESTINATION]) == [
        TellLost(engine=DESTINATION, lost=SOURCE, granted=()),
        AskFate(engine=DESTINATION, migration=order.migration),
    ]


def test_declined_then_means_that_the_stream_is_lost() -> None:
    arbiter, order = moving(outputs=1)
    arbiter.engine_lost(SOURCE, [DESTINATION])
    assert arbiter.fate(order.migration, "declined") == [StreamLost(request=R)]


def test_taken_then_moves_the_stream_with_what_the_source_did_not_send() -> None:
    arbiter, order = moving(outputs=2)
    arbiter.engine_lost(SOURCE, [DESTINATION])
    assert arbiter.took_over(DESTINATION, took(order, 5, [13, 14, 15])) == [
        Moved(request=R, owner=DESTINATION, missing=(13, 14, 15))
    ]
    assert arbiter.fate(order.migration, "taken") == []
    ledger = arbiter.get(R)
    assert ledger is not None
    assert (ledger.owner, ledger.outputs, ledger.source_dead) == (DESTINATION, 5, False)
    assert goes_to(arbiter, DESTINATION)


def test_only_what_is_missing_is_taken_from_the_tail() -> None:
    arbiter, order = moving(outputs=4)
    arbiter.engine_lost(SOURCE, [DESTINATION])
    assert arbiter.took_over(DESTINATION, took(order, 5, [13, 14, 15])) == [
        Moved(request=R, owner=DESTINATION, missing=(15,))
    ]
    arbiter, order = moving(outputs=5)
    arbiter.engine_lost(SOURCE, [DESTINATION])
    assert arbiter.took_over(DESTINATION, took(order, 5, [13, 14, 15])) == [
        Moved(request=R, owner=DESTINATION)
    ]


def test_a_source_that_died_after_the_take_over_moves_the_stream_with_all_that_was_held() -> None:
    arbiter, order = moving(outputs=2)
    arbiter.took_over(DESTINATION, took(order, 4, [11, 12, 13, 14]))
    arbiter.offer(DESTINATION, R, 1, "fifth")
    assert arbiter.engine_lost(SOURCE, [DESTINATION]) == [
        TellLost(engine=DESTINATION, lost=SOURCE, granted=()),
        Moved(request=R, owner=DESTINATION, missing=(13, 14), held=("fifth",)),
    ]
    ledger = arbiter.get(R)
    assert ledger is not None
    assert ledger.outputs == 5


def test_a_tail_that_is_too_short_loses_the_stream() -> None:
    arbiter, order = moving(outputs=1)
    arbiter.engine_lost(SOURCE, [DESTINATION])
    tail = list(range(TAIL_MAX))
    assert arbiter.took_over(DESTINATION, took(order, TAIL_MAX + 2, tail)) == [
        AbortAt(engine=DESTINATION, request=R),
        StreamLost(request=R),
    ]


def test_with_both_engines_dead_the_stream_is_lost() -> None:
    arbiter, order = moving(outputs=1)
    arbiter.engine_lost(SOURCE, [DESTINATION])
    assert arbiter.engine_lost(DESTINATION, []) == [StreamLost(request=R)]
    arbiter.close(R)
    assert arbiter.fate(order.migration, "declined") == []


def test_an_answer_that_nobody_waits_for_changes_nothing() -> None:
    arbiter, order = moving(outputs=1)
    assert arbiter.fate(order.migration, "declined") == []  # The source lives.
    assert arbiter.fate(MigrationId("m99"), "declined") == []
    assert goes_to(arbiter, SOURCE)


# -- close


def test_a_stream_that_ends_names_both_who_may_hold_it() -> None:
    arbiter, order = moving()
    assert arbiter.close(R) == [SOURCE, DESTINATION]
    assert arbiter.close(R) == []
    assert arbiter.ended(ended(order, taken=True)) == []
    assert arbiter.get(R) is None


def test_a_stream_that_ends_at_rest_names_its_owner() -> None:
    arbiter, order = moving()
    arbiter.took_over(DESTINATION, took(order, 0))
    assert arbiter.close(R) == [DESTINATION]


def test_the_dead_hold_nothing() -> None:
    arbiter, _ = moving()
    arbiter.engine_lost(SOURCE, [DESTINATION])
    assert arbiter.close(R) == [DESTINATION]
