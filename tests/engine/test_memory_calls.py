"""Pausing, sleeping and resetting caches while requests move: never a failure, and no pull touches
memory that may be gone."""

from concurrent.futures import Future
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request

from llumnix.core.messages import REVIVE, Handover, Stage
from llumnix.engine.kv.agent_client import Pulled
from llumnix.engine.memory_calls import MemoryCalls
from llumnix.engine.migration.vllm_core import is_sent_again
from support.hosted import Hosts
from support.no_model import BLOCK, add

SOURCE, DESTINATION = 0, 1
PROMPT = list(range(20 * BLOCK))


@pytest.fixture(scope="module")
def shared_hosts(shared_hosts: Hosts) -> Hosts:
    """With the calls that touch memory."""
    for engine in shared_hosts.engines:
        engine.core.__class__ = type("Core", (MemoryCalls, type(engine.core)), {})
        engine.core._host = engine.host
    return shared_hosts


class Held:
    """Pulls at the destination: they end when the test says so, or when they are cancelled."""

    def __init__(self, hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = hosts.engines[DESTINATION].host
        self.open: list[int] = []
        self.cancelled: list[int] = []
        monkeypatch.setattr(
            self.host._client, "pull", lambda ticket, *_, **__: self.open.append(ticket)
        )
        monkeypatch.setattr(self.host._client, "cancel", self.cancelled.append)

    def end(self, error: str | None = "cancelled") -> None:
        self.host._pulled(Pulled(ticket=self.open.pop(0), bytes=0, seconds=0.0, error=error))


def start(hosts: Hosts, name: str = "r") -> None:
    add(hosts.engines[SOURCE].core, name, PROMPT, 40)
    hosts.until(lambda: hosts.tokens.get(name, [0])[0] > 2)
    hosts.migrate(name)


@pytest.fixture
def held(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> Held:
    """A move is under way, whose pull has begun."""
    made = Held(hosts, monkeypatch)
    start(hosts)
    hosts.until(lambda: made.open)
    return made


def answered(hosts: Hosts, answer: Any) -> Any:
    if not isinstance(answer, Future):
        return answer
    hosts.until(answer.done)
    return answer.result()


def test_caches_are_reset_once_a_pull_that_was_under_way_has_ended(
    hosts: Hosts, held: Held
) -> None:
    answer = hosts.engines[DESTINATION].core.reset_prefix_cache()
    assert isinstance(answer, Future)
    hosts.turn()
    assert not answer.done()  # It is still being written to.
    assert held.cancelled == held.open
    held.end()
    assert answered(hosts, answer) is True
    hosts.until(lambda: hosts.outcomes)
    assert "its caches are being reset" in hosts.outcomes[0].why
    hosts.until(lambda: hosts.ended.get("r"))
    assert hosts.tokens["r"] == [40, 0]


def test_a_reset_that_is_over_lets_nothing_come_while_a_pause_waits(
    hosts: Hosts, held: Held
) -> None:
    core = hosts.engines[DESTINATION].core
    reset, pause = core.reset_prefix_cache(), core.pause_scheduler("keep")
    held.end()
    assert answered(hosts, reset) is True
    answered(hosts, pause)
    hosts.until(lambda: hosts.outcomes)
    assert hosts.engines[DESTINATION].host.llumlet._incoming.closed == "it is paused"
    core.resume_scheduler()
    assert hosts.engines[DESTINATION].host.llumlet._incoming.closed is None
    hosts.until(lambda: hosts.ended.get("r"))


def test_a_reset_behind_a_pause_that_waited_lets_nothing_come(hosts: Hosts, held: Held) -> None:
    core = hosts.engines[DESTINATION].core
    answers = [core.pause_scheduler("keep"), core.reset_prefix_cache()]
    held.end()
    assert [answered(hosts, answer) for answer in answers] == [None, True]
    assert core.scheduler.pause_state != PauseState.UNPAUSED
    assert hosts.engines[DESTINATION].host.llumlet._incoming.closed is not None
    core.resume_scheduler()
    assert hosts.engines[DESTINATION].host.llumlet._incoming.closed is None
    hosts.until(lambda: hosts.ended.get("r"))


def test_who_resumes_last_is_right_though_the_pause_still_waits(hosts: Hosts, held: Held) -> None:
    core = hosts.engines[DESTINATION].core
    answers = [core.pause_scheduler("keep"), core.resume_scheduler()]
    assert not any(answer.done() for answer in answers)
    held.end()
    assert [answered(hosts, answer) for answer in answers] == [None, None]
    assert core.scheduler.pause_state == PauseState.UNPAUSED
    assert hosts.engines[DESTINATION].host.llumlet._incoming.closed is None
    hosts.until(lambda: hosts.ended.get("r"))


@pytest.mark.parametrize("side", [SOURCE, DESTINATION])
@pytest.mark.parametrize("moment", [Stage, Handover])
def test_a_pause_in_the_middle_of_a_move_never_fails(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, side: int, moment: type
) -> None:
    seen: list[Any] = []
    peers = hosts.engines[SOURCE].host._peers
    say = peers.send
    monkeypatch.setattr(peers, "send", lambda to, m: (seen.append(type(m)), say(to, m)))
    start(hosts)
    hosts.until(lambda: moment in seen)
    core = hosts.engines[side].core
    assert answered(hosts, core.pause_scheduler("abort")) is None  # Raises if a block is in use.
    pool = core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    core.resume_scheduler()


def test_a_paused_engine_takes_no_request_and_one_that_goes_on_does(hosts: Hosts) -> None:
    core = hosts.engines[DESTINATION].core
    answered(hosts, core.pause_scheduler("keep"))
    start(hosts, "a")
    hosts.until(lambda: hosts.outcomes)
    assert hosts.outcomes[0].why == "the destination takes none: it is paused"
    core.resume_scheduler()
    start(hosts, "b")
    hosts.until(lambda: len(hosts.outcomes) == 2)
    assert hosts.outcomes[1].taken


def test_a_request_that_waits_with_the_blocks_it_came_with_gives_them_up(hosts: Hosts) -> None:
    """A handover came between the pause and the reset."""
    start(hosts)
    destination = hosts.engines[DESTINATION]
    hosts.until(lambda: destination.core.scheduler.kv_holding_waiting or hosts.took_over)
    core = destination.core
    answered(hosts, core.pause_scheduler("keep", clear_cache=False))
    assert answered(hosts, core.reset_prefix_cache(reset_running_requests=True)) is True
    core.resume_scheduler()
    hosts.until(lambda: hosts.ended.get("r"))
    assert sum(hosts.tokens["r"]) == 40


@pytest.mark.parametrize("side", [SOURCE, DESTINATION])
def test_memory_goes_only_when_no_pull_can_touch_it(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    core, host = hosts.engines[side].core, hosts.engines[side].host
    executor = core.model_executor
    gate = executor.agent._gate
    slept: list[tuple[bool, bool]] = []
    monkeypatch.setattr(
        executor, "sleep", lambda level: slept.append((host.llumlet.busy, gate._held))
    )
    start(hosts)
    hosts.until(lambda: hosts.engines[DESTINATION].host.llumlet.busy)
    answered(hosts, core.sleep(1, "abort"))
    assert slept == [(False, True)]
    assert core.wake_up() is True
    assert not gate._held


def test_peers_read_again_only_once_all_memory_is_back(hosts: Hosts) -> None:
    core = hosts.engines[SOURCE].core
    gate = core.model_executor.agent._gate
    answered(hosts, core.sleep(0, "keep"))  # It only pauses.
    assert not gate._held
    answered(hosts, core.sleep(1, "keep"))
    for tag, back in (("weights", False), ("kv_cache", True)):
        assert gate._held
        assert core.wake_up([tag]) is back
    assert not gate._held
    answered(hosts, core.pause_scheduler("keep"))
    core.release_kv_cache_memory()
    assert gate._held
    assert core.wake_up(["kv_cache"]) is True
    assert not gate._held


@pytest.mark.parametrize("later", [False, True])
def test_peers_read_on_where_a_sleep_or_a_release_fails(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    core = hosts.engines[SOURCE].core
    gate = core.model_executor.agent._gate
    with pytest.raises(RuntimeError, match="pause"):
        core.release_kv_cache_memory()
    assert not gate._held

    def fails(level: int) -> None:
        assert gate._held
        raise MemoryError("no pinned memory")

    monkeypatch.setattr(core.model_executor, "sleep", fails)
    pause: Future[None] = Future()
    if later:  # vLLM waits for requests to end.
        monkeypatch.setattr(core, "pause_scheduler", lambda **_: pause)
        answer = core.sleep(1, "wait")
        assert gate._held
        pause.set_result(None)
        assert isinstance(answer.exception(), MemoryError)
    else:
        with pytest.raises(MemoryError):
            core.sleep(1, "keep")
        core.resume_scheduler()
    assert not gate._held


@pytest.mark.parametrize("again", [False, True])
def test_an_engine_that_refuses_new_requests_takes_one_that_is_sent_again(again: bool) -> None:
    """As after a user's pause since vLLM 0.33."""

    class Vllm:
        def _reject_add_while_paused(self, request: Any) -> bool:
            return True

    class Core(MemoryCalls, Vllm):
        pass

    order = {REVIVE: b"an order"} if again else None
    request = Request("r", [1], SamplingParams(extra_args=order), None)
    assert Core()._reject_add_while_paused(request) is not again
    assert is_sent_again(request) is again


def test_a_call_that_waited_too_long_is_made_all_the_same(
    hosts: Hosts, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llumnix.engine.waiting_calls.MOVES_END_MAX_S", 0.05)
    answer = hosts.engines[DESTINATION].core.reset_prefix_cache()
    assert answered(hosts, answer) is False  # vLLM's own answer: a block is in use.
    held.end()
    hosts.until(lambda: hosts.ended.get("r"))
