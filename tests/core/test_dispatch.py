"""Where requests go: the scheduler's rules as claims."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.core.codes import DispatchCode
from llumnix.core.events import Dispatch, InstanceLost, LoadReported, NoInstance, RequestArrived
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.presets import POLICIES
from llumnix.core.scheduling.scheduler import Scheduler, handling_key
from llumnix.core.scheduling.tuning import (
    BOOKING_LIFETIME_S,
    PREFILL_QUANTUM_TOKENS,
    STALE_AFTER_S,
)
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, RequestId

TOTAL = 10_000


def scheduler(policy: str = "llumnix") -> Scheduler:
    return Scheduler(SchedulerSettings(policy=policy))


every_policy = pytest.mark.parametrize("policy", POLICIES)


def report(
    instance: str = "i0",
    engine: int = 0,
    sequence: int = 1,
    used: int = 0,
    running: int = 0,
    waiting: int = 0,
    admitted: tuple[str, ...] = (),
    accepting: bool = True,
    prefill: int = 0,
    waiting_tokens: int = 0,
    urgent: int = 0,
) -> LoadReported:
    return LoadReported(
        report=LoadReport(
            instance=InstanceId(instance),
            engine_index=EngineIndex(engine),
            sequence=sequence,
            kv_tokens_used=used,
            kv_tokens_total=TOTAL,
            prefill_tokens=prefill,
            classes=(
                ClassLoad(running=urgent),
                ClassLoad(
                    running=running,
                    waiting=waiting,
                    waiting_tokens=waiting_tokens,
                    waiting_prefill=waiting_tokens,
                ),
            ),
            admitted=tuple(RequestId(r) for r in admitted),
            accepting=accepting,
        )
    )


def place(s: Scheduler, request: str, now: float = 0.0, tokens: int = 10) -> str:
    """Where the request goes; "" if nowhere."""
    (decision,) = s.handle(RequestArrived(request=RequestId(request), prompt_tokens=tokens), now)
    assert decision.why
    return decision.instance if isinstance(decision, Dispatch) else ""


@every_policy
def test_without_a_known_instance_the_answer_is_no_instance(policy: str) -> None:
    arrived = RequestArrived(request=RequestId("r"), prompt_tokens=1)
    (decision,) = scheduler(policy).handle(arrived, 0.0)
    assert decision == NoInstance(
        request=RequestId("r"), why="no instance that takes requests is known"
    )


WHY = {
    "llumnix": "soonest: after 0 tokens, 3301 tokens a request",
    "llumnix-base": "soonest: after 0 tokens, 3301 tokens a request",
    "cache-aware": "soonest: after 0 tokens, 3301 tokens a request",
    "infaas++": "freest: 3301 tokens a request",
    "least-loaded": "least-loaded: 3 requests, 96 KV tokens",
    "round-robin": "round-robin: its turn",
    "scls": "soonest: after 0 tokens, 3301 tokens a request",
}


TURN = ("round_robin", "turn")


@every_policy
def test_the_decision_names_the_run_and_the_reason(policy: str) -> None:
    s = scheduler(policy)
    s.handle(report("i0", engine=4, running=3, used=96), 0.0)
    (decision,) = s.handle(RequestArrived(request=RequestId("r"), prompt_tokens=1), 0.0)
    assert decision == Dispatch(
        request=RequestId("r"),
        instance=InstanceId("i0"),
        engine_index=EngineIndex(4),
        why=WHY[policy],
        code=DispatchCode(WHY[policy].partition(":")[0].replace("-", "_").replace(*TURN)),
    )


def test_round_robin_takes_turns_whatever_the_load() -> None:
    s = scheduler("round-robin")
    s.handle(report("i0", running=50), 0.0)
    s.handle(report("i1", engine=1), 0.0)
    s.handle(report("i2", engine=2), 0.0)
    assert [place(s, f"r{n}") for n in range(5)] == ["i0", "i1", "i2", "i0", "i1"]


def test_round_robin_goes_on_when_the_next_one_is_gone() -> None:
    s = scheduler("round-robin")
    for n in range(3):
        s.handle(report(f"i{n}", engine=n), 0.0)
    assert place(s, "a") == "i0"
    s.handle(InstanceLost(instance=InstanceId("i1"), engine_index=EngineIndex(1)), 0.0)
    assert [place(s, r) for r in "bc"] == ["i2", "i0"]


def test_least_loaded_counts_running_and_waiting_then_tokens() -> None:
    s = scheduler("least-loaded")
    s.handle(report("i0", running=2, waiting=0, used=10), 0.0)
    s.handle(report("i1", engine=1, running=0, waiting=2, used=5), 0.0)
    s.handle(report("i2", engine=2, running=1, waiting=2, used=0), 0.0)
    assert place(s, "r") == "i1"


def test_llumnix_goes_where_the_fewest_prompts_are_before_it_not_where_most_memory_is() -> None:
    s = scheduler("llumnix")
    s.handle(report("i0", running=1, used=10, prefill=2 * PREFILL_QUANTUM_TOKENS), 0.0)
    s.handle(report("i1", engine=1, running=9, used=3000), 0.0)
    s.handle(report("i2", engine=2, waiting=1, waiting_tokens=PREFILL_QUANTUM_TOKENS), 0.0)
    assert [place(s, r, tokens=1 + PREFILL_QUANTUM_TOKENS) for r in "abc"] == ["i1", "i2", "i1"]


def test_a_few_tokens_before_it_are_no_reason_to_go_where_less_memory_is() -> None:
    s = scheduler("llumnix")
    s.handle(report("i0", running=1, used=10, prefill=PREFILL_QUANTUM_TOKENS - 1), 0.0)
    s.handle(report("i1", engine=1, running=9, used=3000), 0.0)
    assert place(s, "r") == "i0"


def test_waiting_requests_that_are_less_urgent_are_not_computed_before_it() -> None:
    s = scheduler("llumnix")
    s.handle(
        report("i0", running=1, used=10, waiting=1, waiting_tokens=PREFILL_QUANTUM_TOKENS), 0.0
    )
    s.handle(report("i1", engine=1, running=9, used=3000), 0.0)
    urgent = RequestArrived(request=RequestId("u"), prompt_tokens=10, priority=-100)
    (decision,) = s.handle(urgent, 0.0)
    assert isinstance(decision, Dispatch)
    assert (decision.instance, place(s, "r")) == ("i0", "i1")


def test_llumnix_goes_where_there_is_room_whatever_is_before_it() -> None:
    """An instance that gives requests away for want of memory takes none, though one would fit."""
    s = scheduler("llumnix")
    s.handle(report("i0", running=1, used=100, prefill=2 * PREFILL_QUANTUM_TOKENS), 0.0)
    s.handle(report("i1", engine=1, running=9, used=TOTAL - 200), 0.0)
    assert place(s, "r") == "i0"


def test_a_request_keeps_away_from_the_headroom_of_urgent_ones_while_there_is_room() -> None:
    s = scheduler("llumnix")
    s.handle(report("i0", urgent=1, used=2000), 0.0)
    s.handle(report("i1", engine=1, running=9, used=3000), 0.0)
    assert place(s, "r") == "i1"


def test_a_request_goes_into_the_headroom_of_urgent_ones_rather_than_wait() -> None:
    s = scheduler("llumnix")
    s.handle(report("i0", urgent=1, used=2000), 0.0)
    s.handle(report("i1", engine=1, running=9, used=TOTAL - 200), 0.0)
    assert place(s, "r") == "i0"


def test_a_request_does_not_queue_behind_urgent_ones_that_use_their_headroom() -> None:
    s = scheduler("llumnix")
    s.handle(report("i0", urgent=1, used=TOTAL - 10), 0.0)
    s.handle(report("i1", engine=1, running=9, used=TOTAL - 200), 0.0)
    assert place(s, "r") == "i1"


def test_llumnix_takes_the_freest_where_no_prompt_is_before_it() -> None:
    s = scheduler("llumnix")
    s.handle(report("i0", running=9, used=500), 0.0)
    s.handle(report("i1", engine=1, running=2, used=500), 0.0)
    assert place(s, "r") == "i1"


def test_infaas_goes_to_the_freest_whatever_prompts_are_before_it() -> None:
    s = scheduler("infaas++")
    s.handle(report("i0", running=1, used=10, prefill=2 * PREFILL_QUANTUM_TOKENS), 0.0)
    s.handle(report("i1", engine=1, running=9, used=3000), 0.0)
    assert place(s, "r") == "i0"


@every_policy
def test_a_burst_spreads_before_any_report_covers_it(policy: str) -> None:
    s = scheduler(policy)
    for n in range(4):
        s.handle(report(f"i{n}", engine=n), 0.0)
    placed = [place(s, f"r{n}", tokens=PREFILL_QUANTUM_TOKENS // 10) for n in range(40)]
    assert {i: placed.count(i) for i in placed} == {"i0": 10, "i1": 10, "i2": 10, "i3": 10}


def test_a_booking_ends_when_a_report_names_the_request() -> None:
    s = scheduler()
    s.handle(report("i0"), 0.0)
    place(s, "r")
    assert s.view[InstanceId("i0")].requests == 1
    s.handle(report("i0", sequence=2, running=1, admitted=("r",)), 0.1)
    assert s.view[InstanceId("i0")].requests == 1
    s.handle(report("i0", sequence=3), 0.2)
    assert s.view[InstanceId("i0")].requests == 0


def test_a_booking_that_no_report_covers_lapses() -> None:
    s = scheduler()
    s.handle(report("i0"), 0.0)
    place(s, "hung-up")
    s.handle(report("i0", sequence=2), BOOKING_LIFETIME_S - 0.1)
    assert s.view[InstanceId("i0")].requests == 1
    s.handle(report("i0", sequence=3), BOOKING_LIFETIME_S)
    assert s.view[InstanceId("i0")].requests == 0


def test_an_overtaken_report_changes_nothing() -> None:
    s = scheduler()
    s.handle(report("i0", sequence=5, running=5), 0.0)
    s.handle(report("i0", sequence=4, running=9), 0.0)
    assert s.view[InstanceId("i0")].report.running == 5


def test_a_dead_run_has_no_voice_and_its_successor_has() -> None:
    s = scheduler()
    s.handle(report("i0", engine=3), 0.0)
    s.handle(InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(3)), 0.0)
    s.handle(report("i0", engine=3, sequence=9), 0.0)
    assert InstanceId("i0") not in s.view
    s.handle(report("i0", engine=7), 0.0)
    assert place(s, "r") == "i0"


def test_news_of_an_old_death_does_not_touch_the_successor() -> None:
    s = scheduler()
    s.handle(report("i0", engine=7), 0.0)
    s.handle(InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(3)), 0.0)
    assert place(s, "r") == "i0"


def test_a_new_run_starts_without_the_old_ones_bookings() -> None:
    s = scheduler()
    s.handle(report("i0", engine=1), 0.0)
    place(s, "r")
    s.handle(report("i0", engine=2), 0.0)
    assert s.view[InstanceId("i0")].requests == 0


@every_policy
def test_an_instance_that_does_not_accept_gets_no_request(policy: str) -> None:
    s = scheduler(policy)
    s.handle(report("i0", accepting=False), 0.0)
    s.handle(report("i1", engine=1, running=99), 0.0)
    assert place(s, "r") == "i1"
    s.handle(report("i1", engine=1, sequence=2, accepting=False), 0.0)
    assert place(s, "s") == ""


@every_policy
def test_silent_instances_get_requests_only_if_all_are_silent(policy: str) -> None:
    s = scheduler(policy)
    s.handle(report("i0"), 0.0)
    s.handle(report("i1", engine=1, running=9), STALE_AFTER_S + 1)
    assert place(s, "r", now=STALE_AFTER_S + 1) == "i1"
    assert place(s, "s", now=99.0) == "i0"


@given(loads=st.lists(st.integers(0, 30), min_size=1, max_size=8), arrivals=st.integers(1, 60))
def test_least_loaded_never_leaves_a_gap_that_it_could_have_filled(
    loads: list[int], arrivals: int
) -> None:
    """An instance that got a request ends with at most one more than any other."""
    s = scheduler("least-loaded")
    for n, running in enumerate(loads):
        s.handle(report(f"i{n}", engine=n, running=running), 0.0)
    placed = [place(s, f"r{n}") for n in range(arrivals)]
    totals = {f"i{n}": running + placed.count(f"i{n}") for n, running in enumerate(loads)}
    assert all(totals[i] <= min(totals.values()) + 1 for i in set(placed))
    assert sum(totals.values()) == sum(loads) + arrivals


@given(
    facts=st.lists(
        st.one_of(
            st.builds(
                report,
                instance=st.sampled_from(["i0", "i1"]),
                engine=st.integers(0, 3),
                sequence=st.integers(1, 5),
                accepting=st.booleans(),
            ),
            st.builds(
                lambda i, e: InstanceLost(instance=InstanceId(i), engine_index=EngineIndex(e)),
                st.sampled_from(["i0", "i1"]),
                st.integers(0, 3),
            ),
            st.builds(
                lambda r: RequestArrived(request=RequestId(r), prompt_tokens=1),
                st.text("ab", min_size=1, max_size=4),
            ),
        ),
        max_size=40,
    )
)
def test_no_request_goes_to_a_run_that_was_lost(facts: list) -> None:
    for policy in POLICIES:
        never_to_the_lost(scheduler(policy), facts)


def never_to_the_lost(s: Scheduler, facts: list) -> None:
    lost = set()
    for fact in facts:
        for decision in s.handle(fact, 0.0):
            if isinstance(decision, Dispatch):
                assert (decision.instance, decision.engine_index) not in lost
        if isinstance(fact, InstanceLost):
            lost.add((fact.instance, fact.engine_index))


@given(st.lists(st.sampled_from("abcd"), max_size=30), st.sampled_from(sorted(POLICIES)))
def test_the_same_facts_give_the_same_decisions(names: list[str], policy: str) -> None:
    def run() -> list:
        s = scheduler(policy)
        s.handle(report("i0"), 0.0)
        s.handle(report("i1", engine=1), 0.0)
        return [place(s, f"{n}{k}") for k, n in enumerate(names)]

    assert run() == run()


# -- what came in at the same time


def test_news_of_instances_is_handled_before_the_requests_that_came_with_it() -> None:
    """A request is not sent to an instance that is known to be gone, nor past one that is new."""
    lost = InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(0))
    arrived = RequestArrived(request=RequestId("r"), prompt_tokens=1)
    s = scheduler()
    s.handle(report("i0"), 0.0)
    decided = []
    for fact in sorted([arrived, lost, report("i1", engine=1)], key=handling_key):
        decided += s.handle(fact, 0.0)
    (decision,) = decided
    assert isinstance(decision, Dispatch)
    assert decision.instance == "i1"


def test_of_requests_that_came_together_the_more_urgent_is_placed_first() -> None:
    """And of a class the first that came."""
    came = [
        RequestArrived(request=RequestId(name), prompt_tokens=1, priority=priority)
        for name, priority in (("a", 0), ("b", -100), ("c", 0), ("d", -7), ("e", -100))
    ]
    assert [fact.request for fact in sorted(came, key=handling_key)] == ["b", "e", "d", "a", "c"]


def test_the_urgent_one_gets_the_best_place_though_it_came_last() -> None:
    s = scheduler()
    s.handle(report("i0", running=1, used=100), 0.0)
    s.handle(report("i1", engine=1, running=20, used=5000), 0.0)
    came = [
        RequestArrived(
            request=RequestId(name), prompt_tokens=3 * PREFILL_QUANTUM_TOKENS, priority=priority
        )
        for name, priority in (("normal", 0), ("urgent", -100))
    ]
    placed = {}
    for fact in sorted(came, key=handling_key):
        (decision,) = s.handle(fact, 0.0)
        placed[fact.request] = decision.instance
    assert placed == {"urgent": "i0", "normal": "i1"}
