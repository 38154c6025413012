"""Which requests may have killed their engine, one by one, and which ones are refused."""

import pytest

from llumnix.core.codes import AbortCode
from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.probation import CLEARED_AFTER, SAME_CAUSE_S, Probation, Verdict
from llumnix.core.streams.quarantine import KEPT_MAX, REFUSED_FOR_S, Quarantine, Quarantined
from llumnix.core.streams.survival import Orphan, Orphans
from llumnix.core.types import EngineIndex, InstanceId, RequestId

E0, E1, E2, E3 = map(EngineIndex, range(4))
I0, I1, I2, I3 = (InstanceId(f"i{n}") for n in range(4))
A, B, C = map(RequestId, "abc")
INNOCENT, SUSPECT, CONDEMNED = Verdict


def died(
    probation: Probation,
    engine: EngineIndex,
    *accused: RequestId,
    at: float = 0.0,
    serving: tuple[InstanceId, ...] = (I1, I2, I3),
    instance: InstanceId = I0,
    others: tuple[RequestId, ...] = (),
) -> None:
    everyone = {*accused, *others}
    probation.died(engine, instance, set(accused), everyone, serving, at)


def test_a_first_death_makes_suspects_and_a_second_one_condemns() -> None:
    one = Probation()
    died(one, E0, A, B)
    assert [one.verdict(r) for r in (A, B, C)] == [SUSPECT, SUSPECT, INNOCENT]
    one.begin(A, E1, 5)
    died(one, E1, A, C, at=1000.0)
    assert [one.verdict(r) for r in (A, B, C)] == [CONDEMNED, SUSPECT, SUSPECT]


def test_instances_that_are_back_at_the_next_death_hold_no_suspect_though_none_waited() -> None:
    one = Probation()
    died(one, E0, serving=(I1,))
    died(one, E1, serving=(), instance=I1)
    assert one.held
    died(one, E2, C, at=1000.0, serving=(I0,), instance=I1)
    assert one.may_try(E3)


def test_one_that_is_not_named_at_the_second_death_is_a_suspect_as_before() -> None:
    one = Probation()
    died(one, E0, A)
    one.begin(A, E1, 0)
    died(one, E1, C, at=1.0)
    assert one.verdict(A) is SUSPECT
    assert one.engine_of(A) is None
    one.begin(A, E2, 0)
    died(one, E2, A, at=2.0)
    assert one.verdict(A) is CONDEMNED


def test_a_second_death_that_is_nobodys_fault_changes_nothing() -> None:
    one = Probation()
    died(one, E0, A)
    one.begin(A, E1, 0)
    one.lost(E1)
    assert one.verdict(A) is SUSPECT
    assert one.may_try(E1)


def test_it_is_cleared_well_after_its_first_token_and_then_stands_as_others_do() -> None:
    one = Probation()
    died(one, E0, A)
    one.begin(A, E1, 7)
    assert not one.passed(A, 7 + CLEARED_AFTER)
    assert one.passed(A, 7 + CLEARED_AFTER + 1)
    one.drop(A)
    assert one.verdict(A) is INNOCENT
    assert not one.passed(A, 1000)
    died(one, E1, A, B, at=1 + SAME_CAUSE_S)
    assert one.verdict(A) is SUSPECT


def test_two_deaths_in_a_minute_condemn_the_one_suspect_that_they_share() -> None:
    for second, verdict in ((SAME_CAUSE_S, CONDEMNED), (SAME_CAUSE_S + 1, SUSPECT)):
        one = Probation()
        died(one, E0, A, B, at=1000.0)
        one.drop(A)  # It moved away, or was cleared.
        died(one, E1, A, C, at=1000.0 + second)
        assert [one.verdict(r) for r in (A, B, C)] == [verdict, SUSPECT, SUSPECT]


def test_two_that_they_share_are_not_condemned() -> None:
    one = Probation()
    died(one, E0, A, B)
    died(one, E1, A, B, C, at=1.0)
    assert [one.verdict(r) for r in (A, B, C)] == [SUSPECT] * 3


def test_while_most_instances_are_down_no_suspect_is_tried_until_one_is_back() -> None:
    one = Probation()
    died(one, E0, A, instance=I0, serving=(I1, I2))
    assert one.may_try(E1)
    died(one, E1, B, instance=I1, serving=(I2,))
    assert not one.may_try(E2)
    one.serve([I2])
    assert not one.may_try(E2)
    one.serve([I2, I1])
    assert one.may_try(E2)


def test_half_of_them_is_not_most() -> None:
    one = Probation()
    died(one, E0, A, instance=I0, serving=(I1,))
    assert one.may_try(E1)
    died(one, E2, B, instance=I0, serving=(I1,))
    assert one.may_try(E1), "it is one instance, dead twice"


def test_one_that_died_and_serves_again_is_not_down_at_the_next_death() -> None:
    one = Probation()
    died(one, E0, A, instance=I0, serving=(I1,))
    died(one, E1, B, instance=I1, serving=(I0,))
    assert one.may_try(E2)


def orphan(
    request: RequestId, *, arrived_s: float, since_s: float = 0.0, tokens: int = 1
) -> Orphan:
    return Orphan(
        request=request, priority=0, tokens=tokens, arrived_s=arrived_s, since_s=since_s, why="x"
    )


def waiting(*suspects: RequestId, wait_s: float = 60.0) -> Orphans:
    """Three orphans, C the first to come and the longest, then B."""
    orphans = Orphans(SurvivalSettings(at_once=2, wait_s=wait_s))
    died(orphans.probation, E0, *suspects)
    for number, request in enumerate((A, B, C)):
        one = orphan(request, arrived_s=-number, tokens=number)
        assert orphans.add(one, declined=None, now=0.0) is None
    return orphans


def taken(orphans: Orphans, *engines: EngineIndex) -> list[tuple[RequestId, EngineIndex]]:
    """All that begin now, and where."""
    found = []
    while (one := orphans.next(engines, 0.0)) is not None:
        engine = orphans.fewest(engines, one)
        assert engine is not None
        assert orphans.may_take(engine, one)
        orphans.begin(one.request, engine, 0)
        found.append((one.request, engine))
    return found


def test_the_innocent_go_at_once_and_suspects_one_by_one_in_the_order_in_which_they_came() -> None:
    orphans = waiting(A, B, C)
    assert taken(orphans, E1) == [(C, E1)]
    assert orphans.drop(C) is not None  # Its first token is here.
    assert taken(orphans, E1) == []
    orphans.probation.drop(C)
    assert taken(orphans, E1) == [(B, E1)]
    assert taken(waiting(B, C), E1) == [(A, E1), (C, E1)]


def test_each_engine_tries_one() -> None:
    assert taken(waiting(A, B, C), E1, E2) == [(C, E1), (B, E2)]


def test_one_that_is_declined_frees_its_engine_for_the_next() -> None:
    orphans = waiting(A, B, C)
    assert taken(orphans, E1) == [(C, E1)]
    assert orphans.add(orphan(C, arrived_s=-2), declined=AbortCode.OTHER, now=0.0) is None
    assert taken(orphans, E1) == [(B, E1)]


def test_the_end_of_a_stream_frees_its_engine_too() -> None:
    orphans = waiting(A, B, C)
    assert taken(orphans, E1) == [(C, E1)]
    assert orphans.watched
    orphans.ended(C)
    assert not orphans.watched
    assert taken(orphans, E1) == [(B, E1)]


def test_suspects_behind_others_do_not_count_their_wait() -> None:
    orphans = waiting(A, B, C)
    assert taken(orphans, E1) == [(C, E1)]
    assert orphans.late(100.0) == []
    orphans.probation.drop(C)
    assert orphans.late(150.0) == []
    assert orphans.late(161.0) == [A, B]


def test_the_innocent_count_theirs_all_the_same() -> None:
    orphans = waiting(B, C)
    orphans.probation.begin(C, E1, 0)
    assert orphans.late(61.0) == [A]


def quarantined(digest: str, since_s: float = 0.0) -> Quarantined:
    return Quarantined(
        digest=digest, request=A, client_id="a", prompt_tokens=3, output_tokens=0, since_s=since_s
    )


def test_a_digest_is_refused_for_ten_minutes_or_until_it_is_released() -> None:
    quarantine = Quarantine()
    for number in range(3):
        quarantine.add(quarantined(f"{number}" * 64, since_s=1000 + number))
    over_s = 1000 + REFUSED_FOR_S
    assert quarantine.find("0" * 64, over_s - 1) is not None
    assert quarantine.find("0" * 64, over_s) is None
    assert [q.id for q in quarantine.all(over_s)] == ["1" * 16, "2" * 16]
    quarantine.note_refused("1" * 16)
    quarantine.note_refused("none")
    assert [q.refused for q in quarantine.all(over_s)] == [1, 0]
    assert quarantine.release("0" * 16) == 0
    assert quarantine.release("1" * 16) == 1
    assert quarantine.find("1" * 64, over_s) is None
    assert quarantine.has_length(3)
    assert not quarantine.has_length(4)
    assert quarantine.release(None) == 1
    assert not quarantine.has_length(3)
    quarantine.add(quarantined("9" * 64))
    assert quarantine.all(over_s) == []


def test_no_more_are_kept_than_there_is_room_for() -> None:
    quarantine = Quarantine()
    for number in range(KEPT_MAX + 5):
        quarantine.add(quarantined(f"{number:064}"))
    assert len(quarantine.all(0.0)) == KEPT_MAX
    assert quarantine.find(f"{4:064}", 0.0) is None
    assert quarantine.find(f"{5:064}", 0.0) is not None


def test_one_that_comes_again_is_refused_for_longer() -> None:
    quarantine = Quarantine()
    quarantine.add(quarantined("0" * 64))
    quarantine.add(quarantined("1" * 64, since_s=1))
    quarantine.add(quarantined("0" * 64, since_s=2))
    assert [q.digest[0] for q in quarantine.all(REFUSED_FOR_S + 1.5)] == ["0"]


@pytest.mark.parametrize("lives", [1, 3])
def test_an_empty_probation_stands_in_nobodys_way(lives: int) -> None:
    orphans = Orphans(SurvivalSettings(lives=lives))
    assert not orphans.watched
    assert orphans.add(orphan(A, arrived_s=0.0), declined=None, now=0.0) is None
    assert taken(orphans, E1) == [(A, E1)]
    assert orphans.watched


def test_two_deaths_with_two_in_common_condemn_none_though_each_frontend_has_one_of_them() -> None:
    one = Probation()
    died(one, E0, A, others=(B,))
    died(one, E1, A, others=(B,), instance=I1)
    assert one.verdict(A) is SUSPECT


def test_one_in_common_is_condemned_by_the_frontend_that_has_it_alone() -> None:
    one, other = Probation(), Probation()
    for probation, mine, others in ((one, (A,), (B,)), (other, (B,), (A,))):
        died(probation, E0, *mine, others=others)
    died(one, E1, A, others=(C,), instance=I1)
    died(other, E1, others=(A, C), instance=I1)
    assert one.verdict(A) is CONDEMNED
    assert other.verdict(A) is INNOCENT
    assert other.verdict(B) is SUSPECT


def test_a_frontend_without_the_turn_tries_no_suspect_and_its_wait_does_not_count() -> None:
    orphans = Orphans(SurvivalSettings(wait_s=10.0))
    died(orphans.probation, E0, A)
    orphans.probation.turn = False
    assert orphans.add(orphan(A, arrived_s=0.0), declined=None, now=0.0) is None
    assert orphans.add(orphan(B, arrived_s=0.0), declined=None, now=0.0) is None
    assert taken(orphans, E1) == [(B, E1)]
    for second in range(30):
        assert orphans.late(float(second)) == []
    orphans.probation.turn = True
    assert orphans.late(35.0) == []
    orphans.ended(B)
    assert taken(orphans, E1) == [(A, E1)]
    orphans.ended(A)
    assert not orphans.probation.any
