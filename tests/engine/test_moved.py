"""What a request has been through goes with it, and it is counted once on its way."""

import time
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine import EngineCoreEventType
from vllm.v1.request import Request, RequestStatus

from llumnix.core.priorities import Priorities
from llumnix.core.reports import MoveCounts, compose_report
from llumnix.core.scheduling.load import Load, derive
from llumnix.core.settings import PrioritySettings
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.engine.readings import client_priority, has_waited, waited_s
from llumnix.engine.reporting.load_reader import LoadReader
from support.hosted import HostedEngine, Hosts
from support.no_model import BLOCK, add

SOURCE, DESTINATION = 0, 1
SLOTS = 8
HIGH, NORMAL = -100, 0
CLASSES = Priorities(PrioritySettings())


def waiting_at_the_source(hosts: Hosts) -> Request:
    source = hosts.engines[SOURCE]
    for n in range(SLOTS):
        add(source.core, f"busy-{n}", [n], 1000)
    hosts.turn()
    return add(source.core, "r", [3, 4, 5], 3)


def moved(hosts: Hosts) -> Request:
    """The request at its destination."""
    seen: list[Request] = []
    hosts.engines[DESTINATION].host.port.destination._on_commit = seen.append
    hosts.migrate("r")
    hosts.until(lambda: "r" in hosts.took_over)
    return seen[0]


@pytest.mark.parametrize(("waited", "priority"), [(0.0, NORMAL), (25.0, NORMAL), (31.0, HIGH)])
def test_it_goes_on_aging(hosts: Hosts, waited: float, priority: int) -> None:
    queue = hosts.engines[SOURCE].core.scheduler.waiting
    known = waiting_at_the_source(hosts)
    queue.remove_request(known)
    has_waited(known, waited, time.monotonic())
    queue.add_request(known)
    there = moved(hosts)
    assert (there.priority, client_priority(there)) == (priority, NORMAL)
    assert there.llumnix_waits[0] == pytest.approx(known.llumnix_waits[0], abs=1.0)


def test_one_that_runs_has_not_waited(hosts: Hosts) -> None:
    known = add(hosts.engines[SOURCE].core, "r", [3, 4, 5], 3)
    assert waited_s(known, known.llumnix_waits[0] + 7) == 7
    hosts.turn()
    assert waited_s(known, known.llumnix_waits[0] + 7) == 0


QUEUES = ("running", "waiting", "kv_holding_waiting", "deferred_waiting")


@pytest.mark.parametrize("queue", QUEUES[:3])
def test_one_that_is_handed_over_is_in_no_queue_until_it_stays_after_all(
    hosts: Hosts, queue: str
) -> None:
    """Else it would run here and there. One that came by a move waits with its KV."""
    source = hosts.engines[SOURCE]
    scheduler, port = source.core.scheduler, source.host.port.source

    def found() -> list[str]:
        return [q for q in QUEUES if any(r is known for r in getattr(scheduler, q))]

    if queue == "waiting":
        known = waiting_at_the_source(hosts)
    else:
        known = add(source.core, "r", list(range(5 * BLOCK)), 50)
        hosts.turn()
    if queue == "kv_holding_waiting":
        scheduler.running.remove(known)
        known.status = RequestStatus.PREEMPTED
        source.host.port.destination._core.queue(known)
    assert found() == [queue]
    port.stop(RequestId("r"))
    assert found() == []
    port.resume(RequestId("r"))
    assert found() == [queue]


def test_one_that_stays_after_it_was_handed_over_is_taken_up_anew_by_the_workers(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have forgotten it meanwhile, and fail on one that is resumed without its tokens."""
    source = hosts.engines[SOURCE]
    known, port = add(source.core, "r", list(range(5 * BLOCK)), 50), source.host.port.source
    while known.num_output_tokens < 3:
        hosts.turn()
    batches, launch = [], source.core.model_executor.execute_model

    def noted(batch: Any, *args: Any, **more: Any) -> Any:
        batches.append(batch)
        return launch(batch, *args, **more)

    monkeypatch.setattr(source.core.model_executor, "execute_model", noted)
    port.stop(RequestId("r"))
    port.handover_state(RequestId("r"), 0)
    port.resume(RequestId("r"))
    tokens = list(known.all_token_ids)
    hosts.turn()
    assert batches[0].preempted_req_ids == {"r"}
    cached = batches[0].scheduled_cached_reqs
    assert (cached.resumed_req_ids, cached.all_token_ids) == ({"r"}, {"r": tokens})
    assert batches[0].num_scheduled_tokens == {"r": 1}


def test_one_that_is_handed_over_in_the_middle_of_its_prompt_reserves_no_more_blocks(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else others would wait for memory that nobody is going to take."""
    source = hosts.engines[SOURCE]
    scheduler = source.core.scheduler
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", 64)
    add(source.core, "r", list(range(2000, 2000 + 60 * BLOCK)), 10)
    hosts.turn()
    assert scheduler._inflight_prefill_reserved_blocks() > 0
    source.host.port.source.stop(RequestId("r"))
    assert scheduler._inflight_prefill_reserved_blocks() == 0
    source.host.port.source.resume(RequestId("r"))


def test_one_that_was_promoted_stays_so_while_it_runs(hosts: Hosts) -> None:
    known = add(hosts.engines[SOURCE].core, "r", list(range(5 * BLOCK)), 50)
    hosts.turn()
    known.llumnix_priority, known.priority = NORMAL, HIGH
    there = moved(hosts)
    assert (there.priority, client_priority(there)) == (HIGH, NORMAL)


def test_what_its_client_was_not_told_yet_is_told_by_the_clock_of_its_new_engine(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = waiting_at_the_source(hosts)
    known.record_event(EngineCoreEventType.QUEUED)
    known.record_event(EngineCoreEventType.QUEUED, known.events[0].timestamp - 100)
    told: list[Any] = []
    real = Request.take_events

    def take(self: Request) -> Any:
        events = real(self)
        if self.request_id == "r":
            told.extend(events or ())
        return events

    monkeypatch.setattr(Request, "take_events", take)
    before = [e.timestamp for e in known.events]
    moved(hosts)
    hosts.until(lambda: "r" in hosts.ended)
    assert [e.timestamp for e in told] == pytest.approx(before, abs=1.0)
    assert [e.type for e in told] == [EngineCoreEventType.QUEUED] * 2


class Counting:
    """What the controller takes an engine's load to be."""

    def __init__(self, engine: HostedEngine) -> None:
        self.engine = engine
        taken_out = engine.host.port.source.taken_out
        self.reader = LoadReader(engine.core.scheduler, SLOTS, CLASSES, taken_out=taken_out)

    def load(self) -> Load:
        numbers = self.reader.read()
        moving: MoveCounts = self.engine.host.moving()[0]
        report = compose_report(
            numbers, moving, instance=InstanceId("i0"), engine_index=EngineIndex(0), sequence=1
        )
        return derive(report, (), 0)


def no_verdict(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handover is made, and what becomes of it stays unknown."""
    monkeypatch.setattr(hosts.engines[DESTINATION].host._peers, "send", lambda *_: None)


def test_a_running_request_that_is_handed_over_is_taken_off_once(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hosts.engines[SOURCE]
    count = Counting(source)
    for name in ("r", "a", "b"):
        add(source.core, name, [ord(name)] * BLOCK, 1000)
    hosts.turn()
    before = count.load()
    assert (before.batch, before.waiting) == (3, 0)
    hosts.migrate("r")
    hosts.until(lambda: source.host.llumlet.busy and _reserved(source))
    no_verdict(hosts, monkeypatch)
    hosts.until(lambda: "r" in source.host.port.source._stopped)
    during = count.load()
    assert (during.batch, during.waiting, during.queued) == (2, 0, 0)
    monkeypatch.undo()
    hosts.until(lambda: hosts.outcomes)
    after = count.load()
    assert (after.batch, hosts.outcomes[0].taken) == (2, True)
    assert during.used == pytest.approx(after.used, abs=3 * BLOCK)


def _reserved(engine: HostedEngine) -> bool:
    (going,) = engine.host.llumlet._outgoing._open.values()
    return going.machine.state.value != "reserving"


def test_a_request_that_waits_has_no_memory_to_give_and_is_not_in_the_batch(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hosts.engines[SOURCE]
    waiting_at_the_source(hosts)
    count = Counting(source)
    before = count.load()
    assert (before.batch, before.waiting) == (SLOTS, 1)
    hosts.migrate("r")
    during = count.load()
    assert (during.batch, during.waiting, during.used) == (SLOTS, 0, before.used)
    hosts.until(lambda: hosts.outcomes)
    assert count.load().batch == SLOTS


def test_one_in_the_middle_of_its_prompt_frees_no_more_than_it_holds(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hosts.engines[SOURCE]
    monkeypatch.setattr(source.core.scheduler, "max_num_scheduled_tokens", 64)
    add(source.core, "r", list(range(900, 900 + 60 * BLOCK)), 10)
    hosts.turn()
    hosts.migrate("r")
    moving = source.host.moving()[0]
    assert (moving.out, moving.out_waiting, moving.out_tokens) == (1, 0, 64)
    hosts.until(lambda: hosts.outcomes)
