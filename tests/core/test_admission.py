"""When a request is turned away because too many wait, and when it may come again."""

import pytest

from llumnix.core.events import Dispatch, LoadReported, NoInstance, RequestArrived
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.settings import (
    HIGH,
    NORMAL,
    AdmissionSettings,
    PriorityClass,
    PrioritySettings,
    SchedulerSettings,
)
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.errors import UsageError

TOTAL = 1000
SLOTS = 4
CAPPED = PriorityClass(name="normal", priority=0, queue_max=3)


class World:
    """A scheduler over instances that a test says things of. All requests are normal ones unless it
    says otherwise."""

    def __init__(
        self, *, queue_max: int | None = None, classes: tuple[PriorityClass, ...] = (HIGH, NORMAL)
    ) -> None:
        self.scheduler = Scheduler(
            SchedulerSettings(
                admission=AdmissionSettings(queue_max=queue_max),
                priorities=PrioritySettings(classes=classes),
            )
        )
        self.now = 100.0
        self._sequence = 0
        self._asked = 0

    def report(
        self,
        number: int = 0,
        *,
        running: int = 0,
        waiting: int = 0,
        urgent: int = 0,
        used: int = 0,
        finished: int = 0,
        engine: int | None = None,
        accepting: bool = True,
    ) -> None:
        self._sequence += 1
        needs = 100 * waiting
        one = LoadReport(
            instance=InstanceId(f"i{number}"),
            engine_index=EngineIndex(number if engine is None else engine),
            sequence=self._sequence,
            kv_tokens_used=used,
            kv_tokens_total=TOTAL,
            slots=SLOTS,
            classes=(
                ClassLoad(waiting=urgent),
                ClassLoad(running=running, waiting=waiting, waiting_tokens=needs),
            ),
            head_tokens=100 if waiting or urgent else 0,
            finished=finished,
            accepting=accepting,
        )
        self.scheduler.handle(LoadReported(report=one), self.now)

    def ask(self, *, priority: int = 0, again: bool = False) -> Dispatch | NoInstance:
        self._asked += 1
        name = RequestId(f"r{self._asked}")
        fact = RequestArrived(request=name, prompt_tokens=10, priority=priority, again=again)
        (decision,) = self.scheduler.handle(fact, self.now)
        assert isinstance(decision, Dispatch | NoInstance)
        return decision

    def code(self, **how: int | bool) -> str | None:
        decision = self.ask(**how)  # type: ignore[arg-type]
        return decision.code if isinstance(decision, NoInstance) else None

    def full(self, *, waiting: int, **more: int) -> None:
        """An instance without a slot and with a queue."""
        self.report(running=SLOTS, used=TOTAL, waiting=waiting, **more)


def test_without_a_limit_all_may_wait() -> None:
    w = World()
    w.full(waiting=10_000)
    assert w.code() is None


def test_once_so_many_wait_and_no_room_is_near_it_is_turned_away() -> None:
    w = World(queue_max=5)
    w.full(waiting=4)
    assert w.code() is None  # And waits there, though no report names it yet.
    decision = w.ask()
    assert isinstance(decision, NoInstance)
    assert decision.code == "overloaded"
    assert "5 requests wait" in decision.why
    w.full(waiting=2)  # The one on its way still counts until it is named.
    assert [w.code(), w.code(), w.code()] == [None, None, "overloaded"]


def test_while_room_is_left_a_queue_keeps_nobody_out() -> None:
    """Those that wait will start in a moment."""
    w = World(queue_max=5)
    w.full(waiting=9)
    w.report(1)
    assert w.code() is None
    w.report(1, running=SLOTS, used=TOTAL)
    assert w.code() == "overloaded"


def test_those_on_their_way_wait_only_where_no_slot_is_free_for_them() -> None:
    w = World(classes=(HIGH, CAPPED))
    w.report()
    found = [w.code() for _ in range(SLOTS + 5)]
    assert found == [None] * (SLOTS + 3) + ["queue_full"] * 2


def test_a_burst_at_an_idle_instance_finds_its_slots() -> None:
    """A report may show the first of it in the queue, before the step that starts it."""
    w = World(queue_max=2, classes=(HIGH, CAPPED))
    w.report(waiting=1)
    assert [w.code() for _ in range(SLOTS)] == [None] * SLOTS


def test_a_burst_that_no_report_shows_yet_finds_no_more_than_the_limit() -> None:
    w = World(queue_max=2)
    w.report()
    burst = [w.code() for _ in range(SLOTS + 5)]
    assert burst == [None] * (SLOTS + 2) + ["overloaded"] * 3
    w.report(1)  # Another instance, with room: so many run there, and one waits.
    burst = [w.code() for _ in range(SLOTS + 5)]
    assert burst == [None] * (SLOTS + 1) + ["overloaded"] * 4


def test_a_class_has_a_limit_of_its_own_over_all_instances() -> None:
    w = World(classes=(HIGH, CAPPED))
    w.full(waiting=2, urgent=50)
    w.report(1, running=SLOTS, used=TOTAL, waiting=0)
    assert w.code() is None
    decision = w.ask()
    assert isinstance(decision, NoInstance)
    assert (decision.code, "class normal" in decision.why) == ("queue_full", True)
    assert w.code(priority=-100) is None
    w.report(1, running=SLOTS, used=TOTAL, waiting=9, accepting=False)  # It is being emptied.
    w.full(waiting=0)
    assert w.code() is None


def test_one_that_was_let_in_before_is_never_turned_away() -> None:
    w = World(queue_max=1, classes=(HIGH, CAPPED))
    w.full(waiting=50)
    assert w.code() == "queue_full"
    assert w.code(again=True) is None


def test_where_no_instance_is_known_that_is_the_reason() -> None:
    w = World(queue_max=1, classes=(HIGH, CAPPED))
    assert w.code() == "no_instance"
    w.full(waiting=50, engine=0)
    assert w.code() == "queue_full"


def retry_s(w: World) -> float:
    decision = w.ask()
    assert isinstance(decision, NoInstance)
    assert decision.retry_s is not None
    return decision.retry_s


def test_it_may_come_again_when_the_queue_is_likely_to_be_worked_off() -> None:
    w = World(queue_max=5)
    w.full(waiting=40)
    w.now += 5
    w.full(waiting=40, finished=20)
    w.now += 4
    w.full(waiting=40, finished=20)  # 20 ended in the last ten seconds, so 40 take 20 s.
    waits = [retry_s(w) for _ in range(200)]
    assert 16 <= min(waits) < 17.5
    assert 22.5 < max(waits) <= 24
    assert len(set(waits)) > 20  # They do not come back together.
    w.now += 20
    assert 48 <= retry_s(w) <= 72  # None ended for long.
    w.full(waiting=40, finished=20_000)
    assert 0.8 <= retry_s(w) <= 1.2
    # What a new run has ended says nothing of the last seconds.
    w.now += 20
    w.full(waiting=40, finished=30_000, engine=9)
    assert retry_s(w) >= 48


def test_a_limit_of_none_is_refused() -> None:
    with pytest.raises(UsageError, match=r"admission\.queue_max: 0"):
        AdmissionSettings(queue_max=0)
    with pytest.raises(UsageError, match="priority class a: queue_max: 0"):
        PriorityClass(name="a", priority=0, queue_max=0)
