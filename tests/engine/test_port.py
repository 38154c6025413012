"""Each answer of vLLM's port, on an engine without a model: what it says of its requests, what it
declines and with which reason, and that nothing is left of what it declined."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreEventType
from vllm.v1.request import RequestStatus

from llumnix.core.codes import AbortCode
from llumnix.core.migration.port import Phase, Refusal
from llumnix.core.types import EngineIndex, RequestId
from llumnix.engine.migration.vllm_core import HandoverState
from llumnix.engine.migration.vllm_destination import DeferredPull
from llumnix.engine.migration.worker import RunnerState
from support.hosted import Hosts
from support.no_model import BLOCK, add, made

R, PROMPT = RequestId("r"), list(range(100, 100 + 3 * BLOCK))


@pytest.fixture
def source(hosts: Hosts) -> Any:
    """The source's engine, with one request that runs and has a token."""
    engine = hosts.engines[0]
    add(engine.core, R, PROMPT, 50)
    engine.core.step_fn()
    return engine


@pytest.fixture
def body(source: Any) -> bytes:
    """Its request, as it is described to a destination."""
    described = source.host.port.describe(R)
    assert isinstance(described, bytes)
    return described


@pytest.fixture
def there(hosts: Hosts) -> Any:
    """The destination's engine."""
    return hosts.engines[1]


def reserve(there: Any, body: bytes, tokens: int = 4 * BLOCK, agents: int = 1) -> int | Refusal:
    answer: int | Refusal = there.host.port.reserve(R, body, [5], tokens, ["x"] * agents)
    return answer


def free_blocks(engine: Any) -> int:
    free: int = engine.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return free


# -- the source


def test_what_a_source_says_of_a_request_that_runs(source: Any) -> None:
    port = source.host.port
    progress = port.progress(R)
    assert (progress.phase, progress.in_flight) == (Phase.RUNNING, False)
    assert (progress.settled, progress.tokens, progress.outputs) == (
        len(PROMPT),
        len(PROMPT) + 1,
        1,
    )
    assert port.progress(RequestId("other")).phase is Phase.GONE
    (movable,) = port.movable()
    assert (movable.request, movable.tokens, movable.waiting, movable.busy) == (
        R, 4 * BLOCK, False, False
    )  # fmt: skip
    first = port.outputs(R, 0)
    assert len(first) == 1
    assert port.outputs(R, 1) == []


def test_one_that_waits_is_offered_too_and_one_in_its_prompt_is_busy(source: Any) -> None:
    core = source.core
    waiting = add(core, "waits", PROMPT, 5)
    assert [(m.request, m.waiting, m.busy) for m in source.host.port.movable()] == [
        ("waits", True, False), (R, False, False)
    ]  # fmt: skip
    core.step_fn()
    waiting.num_computed_tokens -= BLOCK  # A part of its prompt is still to be computed.
    assert [(m.request, m.busy) for m in source.host.port.movable()] == [
        (R, False), ("waits", True)
    ]  # fmt: skip


def test_a_source_that_can_move_nothing_offers_nothing(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source.host.port.core, "unsupported", "not with this engine")
    assert source.host.port.movable() == []
    described = source.host.port.describe(R)
    assert described == Refusal(why="not with this engine", code=AbortCode.IMMOVABLE)


def test_a_request_that_cannot_be_moved_is_not_described(source: Any) -> None:
    params = SamplingParams(max_tokens=5, prompt_logprobs=1)
    source.core.scheduler.requests[R].sampling_params = params
    source.core.scheduler.requests[R]._output_token_ids.clear()
    described = source.host.port.describe(R)
    assert described.code is AbortCode.IMMOVABLE
    assert "log-probabilities" in described.why


def test_a_stopped_request_keeps_its_place_until_it_is_back_or_gone(source: Any) -> None:
    port, scheduler = source.host.port, source.core.scheduler
    slots = scheduler.max_num_active_reqs
    port.stop(R)
    assert scheduler.running == []
    assert scheduler.max_num_active_reqs == slots - 1
    assert [r.request_id for r in port.source.taken_out()] == [R]
    port.resume(R)
    assert [r.request_id for r in scheduler.running] == [R]
    assert scheduler.max_num_active_reqs == slots
    assert port.source.taken_out() == []
    port.stop(R)
    port.handover_state(R, 0)
    assert scheduler.max_num_active_reqs == slots, "its last step has ended"
    port.release(R)
    assert R not in scheduler.requests
    assert scheduler.max_num_active_reqs == slots
    source.core.step_fn()


def test_a_request_that_waits_is_stopped_and_goes_back_into_the_queue(source: Any) -> None:
    port, scheduler = source.host.port, source.core.scheduler
    add(source.core, "waits", PROMPT, 5)
    port.stop(RequestId("waits"))
    assert not len(scheduler.waiting)
    assert port.source.taken_out() == [], "it has no KV"
    port.resume(RequestId("waits"))
    port.resume(RequestId("waits"))
    assert [r.request_id for r in scheduler.waiting] == ["waits"]


def test_what_is_pinned_is_freed_together_and_only_then(source: Any) -> None:
    port, before = source.host.port, free_blocks(source)
    ids = port.pin(R, BLOCK, 3 * BLOCK)
    assert [len(group) for group in ids] == [2]
    pinned = port.source._pins[R]
    assert [b.block_id for b in pinned[1:]] == ids[0]
    assert len(pinned) == 3, "the blocks before them too"
    source.core.abort_requests([R])
    source.core.step_fn()
    assert free_blocks(source) == before, "it has gone, and its blocks stay"
    port.unpin(R)
    assert free_blocks(source) == before + 3
    port.unpin(R)
    assert free_blocks(source) == before + 3


# -- the destination


@pytest.mark.parametrize(
    ("happens", "code", "why"),
    [
        (lambda there, mp: mp.setattr(there.host.port.core, "unsupported", "not here"),
         AbortCode.IMMOVABLE, "not here"),
        (lambda there, mp: add(there.core, R, PROMPT, 5), AbortCode.BUSY, "since its last visit"),
        (lambda there, mp: mp.setattr(there.core.scheduler, "max_num_active_reqs", 0),
         AbortCode.NO_ROOM, "runs 0 requests already"),
    ],
    ids=["it takes none", "it is there", "no slot is free"],
)  # fmt: skip
def test_a_request_that_cannot_come_is_declined_with_its_reason(
    there: Any,
    body: bytes,
    monkeypatch: pytest.MonkeyPatch,
    happens: Callable[[Any, pytest.MonkeyPatch], Any],
    code: AbortCode,
    why: str,
) -> None:
    happens(there, monkeypatch)
    before = free_blocks(there)
    declined = reserve(there, body)
    assert isinstance(declined, Refusal)
    assert declined.code is code
    assert why in declined.why
    assert not there.host.port.destination.holds()
    assert free_blocks(there) == before


@pytest.mark.usefixtures("neighbour")
def test_what_the_queue_keeps_free_for_its_head_declines_no_move(there: Any, body: bytes) -> None:
    there.core.scheduler.kv_cache_manager.watermark_blocks = 10**6
    assert reserve(there, body) == 0
    assert there.host.port.reach(R, 4 * BLOCK + 1, [6]) is None
    there.host.port.drop(R)


@pytest.mark.parametrize("mine", [1, 2])
def test_an_adapter_comes_only_where_it_can_run(
    there: Any, source: Any, monkeypatch: pytest.MonkeyPatch, mine: int
) -> None:
    def adapter(number: int) -> LoRARequest:
        return LoRARequest(lora_name=f"l{number}", lora_int_id=number, lora_path="/nowhere")

    source.core.scheduler.requests[R].lora_request = adapter(mine)
    body = source.host.port.describe(R)
    add(there.core, "other", [7] * len(PROMPT), 50)
    there.core.step_fn()
    there.core.scheduler.requests["other"].lora_request = adapter(1)
    monkeypatch.setattr(there.core.scheduler, "lora_config", SimpleNamespace(max_loras=1))
    answer = reserve(there, body)
    if mine == 1:
        assert answer == 0
        there.host.port.drop(R)
    else:
        assert isinstance(answer, Refusal)
        assert (answer.code, "--max-loras" in answer.why) == (AbortCode.BUSY, True)
    there.core.scheduler.requests["other"].lora_request = None
    source.core.scheduler.requests[R].lora_request = None


@pytest.mark.parametrize("state", ["runs", "waits with its memory", "is on its way"])
def test_a_request_takes_a_slot_whatever_it_does_there(
    there: Any, body: bytes, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    scheduler, port, another = there.core.scheduler, there.host.port, RequestId("another")
    if state == "is on its way":
        assert reserve(there, body) == 0
    else:
        other = add(there.core, "other", [7] * len(PROMPT), 50)
        there.core.step_fn()
    if state == "waits with its memory":
        scheduler.running.remove(other)
        other.status = RequestStatus.PREEMPTED
        scheduler.kv_holding_waiting.add_request(other)
    monkeypatch.setattr(scheduler, "max_num_active_reqs", 1)
    assert port.reserve(another, body, [5], 4 * BLOCK, ["x"]) == Refusal(
        why="the destination runs 1 requests already (--max-num-seqs)", code=AbortCode.NO_ROOM
    )
    monkeypatch.setattr(scheduler, "max_num_active_reqs", 2)
    if state != "is on its way":
        assert reserve(there, body) == 0
    port.drop(R)


@pytest.fixture
def neighbour(there: Any) -> None:
    """A request that runs at the destination. Alone in an engine any request fits."""
    add(there.core, "neighbour", [7] * len(PROMPT), 50)
    there.core.step_fn()


@pytest.mark.usefixtures("neighbour")
def test_what_does_not_fit_is_declined_with_how_much_there_is(there: Any, body: bytes) -> None:
    free = free_blocks(there) * BLOCK
    assert reserve(there, body, tokens=free + 1) == Refusal(
        why=f"no room: {free + 1} tokens are needed there, {free} are free", code=AbortCode.NO_ROOM
    )
    assert reserve(there, body, agents=2) == Refusal(
        why="2 workers have its KV, and 1 would take it: all instances need the same "
        "--tensor-parallel-size",
        code=AbortCode.IMMOVABLE,
    )
    unread = reserve(there, b"junk")
    assert isinstance(unread, Refusal)
    assert unread.code is AbortCode.STATE
    assert not there.host.port.destination.holds()
    assert free_blocks(there) * BLOCK == free


@pytest.mark.usefixtures("neighbour")
def test_a_reservation_is_given_back_whole(there: Any, body: bytes) -> None:
    port, before = there.host.port, free_blocks(there)
    assert reserve(there, body) == 0
    assert free_blocks(there) == before - 4
    assert [r.request_id for r in port.destination.arriving()] == [R]
    assert list(port.destination.arriving()[0].output_token_ids) == [5]
    grown = port.reach(R, 6 * BLOCK, [6, 7])
    assert grown is None
    assert free_blocks(there) == before - 6
    assert list(port.destination.arriving()[0].output_token_ids) == [5, 6, 7]
    too_much = port.reach(R, (before + 1) * BLOCK, [])
    assert too_much.code is AbortCode.NO_ROOM
    port.drop(R)
    assert free_blocks(there) == before
    assert not port.destination.holds()


def test_a_state_that_cannot_be_read_is_declined(there: Any, body: bytes) -> None:
    reserve(there, body)
    declined = there.host.port.commit(R, 3 * BLOCK, b"junk")
    assert declined.code is AbortCode.STATE
    assert there.core.scheduler.requests == {}
    there.host.port.drop(R)


def test_what_moved_in_has_all_that_its_source_had(there: Any, body: bytes) -> None:
    reserve(there, body)
    there.host.port.reach(R, 4 * BLOCK, [])
    state = HandoverState(
        cached=BLOCK,
        preemptions=3,
        generator=b"",
        waited_s=7.0,
        priority=-4,
        events=[(int(EngineCoreEventType.QUEUED), 2.0)],
    )
    assert there.host.port.commit(R, 3 * BLOCK, msgspec.msgpack.encode(state)) is None
    new = there.core.scheduler.requests[R]
    assert (new.num_computed_tokens, new.num_preemptions, new.priority) == (3 * BLOCK, 3, -4)
    assert new.status is RequestStatus.PREEMPTED
    assert [e.type for e in new.events] == [EngineCoreEventType.QUEUED]
    assert new.prefill_stats.num_cached_tokens == BLOCK
    assert list(there.core.scheduler.kv_holding_waiting) == [new]
    assert not there.host.port.destination.holds()


@pytest.mark.parametrize("why", ["no such adapter here", None])
def test_what_a_worker_cannot_take_is_declined_and_its_workers_are_told_to_forget_it(
    there: Any, body: bytes, monkeypatch: pytest.MonkeyPatch, why: str | None
) -> None:
    """Others may have taken it by then."""
    port, asked = there.host.port, list[Any]()
    monkeypatch.setattr(port.core, "runner_v1", True)
    monkeypatch.setattr(port.core, "rpc", lambda *what: asked.append(what) or [None, why])
    reserve(there, body)
    state = HandoverState(cached=None, preemptions=0, generator=b"state")
    answer = port.commit(R, 3 * BLOCK, msgspec.msgpack.encode(state))
    ((method, packed, _, _),) = asked
    told = msgspec.msgpack.decode(packed, type=RunnerState)
    assert method == "llumnix_install"
    assert (told.request, told.prompt, told.outputs, told.computed) == (R, PROMPT, [5], 3 * BLOCK)
    assert (told.generator, told.draws, len(told.blocks[0])) == (b"state", 0, 4)
    if why is None:
        assert answer is None
        return
    assert (answer.code, answer.why) == (
        AbortCode.STATE, f"its state cannot be installed there: {why}"
    )  # fmt: skip
    assert there.core.scheduler.finished_req_ids == {R}
    assert there.core.scheduler.requests == {}
    port.drop(R)


def test_what_the_client_was_told_already_is_not_told_again(there: Any, body: bytes) -> None:
    reserve(there, body)
    state = HandoverState(cached=None, preemptions=0, generator=b"")
    assert there.host.port.commit(R, 3 * BLOCK, msgspec.msgpack.encode(state)) is None
    assert there.core.scheduler.requests[R].prefill_stats is None


def test_without_kv_it_gives_its_blocks_back_and_waits_like_any_other(
    there: Any, body: bytes
) -> None:
    before = free_blocks(there)
    reserve(there, body)
    state = HandoverState(cached=0, preemptions=0, generator=b"")
    assert there.host.port.commit(R, 0, msgspec.msgpack.encode(state)) is None
    assert free_blocks(there) == before
    assert [r.request_id for r in there.core.scheduler.waiting] == [R]


def test_a_pull_that_has_not_begun_is_cancelled_here(
    there: Any, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination, failed, cancelled = there.host.port.destination, list[Any](), list[int]()
    monkeypatch.setattr(destination, "_pull_failed", lambda *what: failed.append(what))
    monkeypatch.setattr(destination._client, "cancel", cancelled.append)
    destination._deferred.append(DeferredPull(steps=["a step"], ticket=7, begin=lambda: None))
    destination.cancel(8)
    assert (cancelled, failed) == ([8], [])
    destination.cancel(7)
    assert (cancelled, failed) == ([8], [(7, "it was cancelled before it began")])
    assert not destination.pulls_wait


def test_a_pull_that_cannot_begin_has_failed(there: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    destination, failed = there.host.port.destination, list[Any]()

    def broken() -> None:
        raise OSError("no socket")

    monkeypatch.setattr(destination, "_pull_failed", lambda *what: failed.append(what))
    destination._deferred.append(DeferredPull(steps=[], ticket=7, begin=broken))
    destination.begin_pulls()
    assert failed == [(7, "OSError: no socket")]
    assert not destination.pulls_wait


def test_it_is_ready_once_its_sources_workers_can_be_read(there: Any, body: bytes) -> None:
    port = there.host.port
    port.destination._linked.clear()
    reserve(there, body)
    assert port.ready(R) is False
    (ticket,) = port.destination._linking
    port.destination.linked(ticket, "nobody listens")
    port.destination.linked(ticket, None)  # It came twice.
    declined = port.ready(R)
    assert (declined.code, declined.why) == (
        AbortCode.STATE, "its blocks cannot be read: nobody listens"
    )  # fmt: skip
    port.drop(R)
    reserve(there, body)  # It is tried anew.
    (ticket,) = port.destination._linking
    port.destination.linked(ticket, None)
    assert port.ready(R) is True
    there.core.scheduler.finished_req_ids.add(R)
    assert port.ready(R) is False, "the workers have still to hear that it left"
    there.core.scheduler.finished_req_ids.clear()
    port.destination.forget(["x"])
    assert port.ready(R) is False
    port.drop(R)


# -- without a source: one of a dead engine


@pytest.mark.parametrize("outputs", [[], [5, 6]])
def test_one_that_is_sent_again_comes_as_if_it_had_been_preempted(
    there: Any, outputs: list[int]
) -> None:
    port, scheduler = there.host.port, there.core.scheduler
    assert port.admit(R, made(there.core, R, PROMPT, 9), outputs) is None
    again = port.admit(R, made(there.core, R, PROMPT, 9), outputs)
    assert again.code is AbortCode.BUSY
    assert port.ready(R) is True
    assert port.commit(R, 0, b"") is None
    new = scheduler.requests[R]
    assert list(new.output_token_ids) == outputs
    assert new.num_preemptions == bool(outputs)
    assert (new.prefill_stats is None) == bool(outputs)
    assert new.events == [], "the engine keeps no statistics"
    assert new.status is (RequestStatus.PREEMPTED if outputs else RequestStatus.WAITING)
    assert port.admit(R, made(there.core, R, PROMPT, 9), outputs).code is AbortCode.BUSY


@pytest.mark.parametrize("final", [False, True])
def test_a_pull_names_only_blocks_that_both_have(
    there: Any, body: bytes, monkeypatch: pytest.MonkeyPatch, final: bool
) -> None:
    destination, asked = there.host.port.destination, list[Any]()
    reserve(there, body)
    monkeypatch.setattr(destination._client, "pull", lambda *what, **how: asked.append((what, how)))
    ours, _ = there.host.port.core.blocks(R, 0, 3 * BLOCK)
    destination.pull(R, 3, EngineIndex(0), ["x"], 0, 3 * BLOCK, [[11, -1, 13]], final)
    assert asked == [((3, ["x"], [11, 13], [ours[0][0], ours[0][2]]), {"final": final})]
    assert destination.last_ticket == 3
    there.host.port.drop(R)
