"""Streams of a process that cannot keep up get fewer and longer chunks, and lose no token."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.outputs import RequestOutput
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from llumnix.frontend.streams import pace
from llumnix.frontend.streams.pace import CALM_LOOKS, LATE_LOOKS, StreamPace

LATE = (0.02, 1.0)
ON_TIME = (0.0, 0.2)


class Front:
    """vLLM's output processor, its requests, and what their consumers got: token ids by output."""

    def __init__(self, interval_max: int = 8) -> None:
        self.processor = OutputProcessor(None, log_stats=False)
        self.pace = StreamPace(self.processor, interval_max)
        self.queues: dict[str, RequestOutputCollector] = {}
        self.got: dict[str, list[list[int]]] = {}

    def add(self, name: str, **fields: Any) -> None:
        kind = fields.pop("output_kind", RequestOutputKind.DELTA)
        given: dict[str, Any] = {
            "request_id": name, "external_req_id": name, "prompt_token_ids": [1], "arrival_time": 0,
            "mm_features": None, "lora_request": None, "cache_salt": None, "pooling_params": None,
            "data_parallel_rank": None, "sampling_params": SamplingParams(
                output_kind=kind, detokenize=False, stream_interval=fields.pop("interval", None)
            ),
        }  # fmt: skip
        self.queues[name] = RequestOutputCollector(kind, name)
        self.got[name] = []
        request = EngineCoreRequest(**(given | fields))
        self.processor.add_request(request, None, None, 0, self.queues[name])

    def token(self, name: str, *tokens: int, last: bool = False) -> None:
        reason = FinishReason.LENGTH if last else None
        self.processor.process_outputs([EngineCoreOutput(name, list(tokens), finish_reason=reason)])
        output = self.queues[name].get_nowait()
        if output is not None:
            assert isinstance(output, RequestOutput)
            self.got[name].append(list(output.outputs[0].token_ids))

    def look(self, late: bool, times: int = 1) -> None:
        for _ in range(times):
            self.pace.look(*(LATE if late else ON_TIME))


def test_chunks_get_longer_step_by_step_and_shorter_again() -> None:
    front = Front()
    front.add("r")
    seen = []
    for _ in range(5):
        front.look(True, LATE_LOOKS)
        seen.append(front.pace.interval)
    for _ in range(4):
        front.look(False, CALM_LOOKS)
        seen.append(front.pace.interval)
    assert seen == [2, 4, 8, 8, 8, 4, 2, 1, 1]


@pytest.mark.parametrize(
    ("late_s", "busy"), [(0.02, 0.3), (0.005, 1.0)], ids=["others use the core", "on time"]
)
def test_a_loop_that_is_late_without_being_busy_joins_nothing(late_s: float, busy: float) -> None:
    front = Front()
    front.add("r")
    for _ in range(9):
        front.pace.look(late_s, busy)
    assert front.pace.interval == 1


def test_where_no_stream_could_be_joined_nothing_is_and_nothing_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    front = Front()
    front.add("whole", output_kind=RequestOutputKind.FINAL_ONLY)
    front.look(True, 2 * LATE_LOOKS)
    assert (front.pace.interval, caplog.records) == (1, [])
    front.add("stream")
    front.look(True, LATE_LOOKS)
    assert front.pace.interval == 2
    assert [r.message for r in caplog.records] == [
        "This process is late by 20 ms: the chunks of its streams join up to 2 tokens."
    ]


def test_a_single_late_turn_joins_nothing() -> None:
    front = Front()
    front.add("r")
    for _ in range(9):
        front.look(True)
        front.look(False)
    assert front.pace.interval == 1


def test_the_most_that_may_be_joined_is_kept_to() -> None:
    front = Front(interval_max=3)
    front.add("r")
    front.look(True, 20)
    assert front.pace.interval == 2


def test_a_stream_is_joined_from_now_on_and_its_first_token_is_sent_at_once() -> None:
    front = Front()
    front.add("old")
    for token in range(3):
        front.token("old", token)
    front.look(True, 2 * LATE_LOOKS)
    front.add("new")
    front.look(True)
    for token in range(3, 9):
        front.token("old", token)
        front.token("new", token)
    front.token("old", 9, last=True)
    front.token("new", 9, last=True)
    assert front.got["old"] == [[0], [1], [2], [3, 4, 5, 6], [7, 8, 9]]
    assert front.got["new"] == [[3], [4, 5, 6, 7], [8, 9]]


def test_a_request_that_asked_for_longer_chunks_has_them_before_and_after() -> None:
    front = Front()
    front.add("r", interval=3)
    state = front.processor.request_states["r"]
    seen = []
    for late, times in ((False, 1), (True, LATE_LOOKS), (True, LATE_LOOKS), (False, CALM_LOOKS)):
        front.look(late, times)
        seen.append(state.stream_interval)
    front.look(False, 3 * CALM_LOOKS)
    assert [*seen, state.stream_interval] == [3, 3, 4, 3, 3]


@pytest.mark.parametrize("seed", range(50))
def test_no_token_is_lost_or_sent_twice_whenever_chunks_change(seed: int) -> None:
    dice = random.Random(seed)
    front = Front()
    sent = dict.fromkeys("abc", 0)
    for name in sent:
        front.add(name)
    while min(sent.values()) < 200:
        name = dice.choice("abc")
        count = dice.choice([1, 1, 1, 2])  # With speculative decoding a step brings several.
        front.token(name, *range(sent[name], sent[name] + count))
        sent[name] += count
        if dice.random() < 0.2:
            front.look(dice.random() < 0.6, dice.choice([1, LATE_LOOKS, CALM_LOOKS]))
    for name, count in sent.items():
        front.token(name, count, last=True)
        got = front.got[name]
        assert [token for chunk in got for token in chunk] == list(range(count + 1))
        assert len(got[0]) <= 2
        assert max(map(len, got)) > 2
    assert not front.processor.request_states


def test_a_stream_that_has_its_own_chunks_again_keeps_them_while_another_still_waits() -> None:
    front = Front()
    for name in ("first", "second"):
        front.add(name)
        front.token(name, 0)
    front.look(True, LATE_LOOKS)
    front.token("second", 1)  # It waits for one more.
    front.look(False, CALM_LOOKS)
    for token in range(1, 4):
        front.token("first", token)
        front.look(False)
    assert front.got["first"] == [[0], [1], [2], [3]]
    front.token("second", 2)
    assert front.got["second"] == [[0], [1, 2]]


def test_after_a_late_time_a_stream_has_a_chunk_a_token_again() -> None:
    front = Front()
    front.add("r")
    front.token("r", 0)
    front.look(True, 9)
    for token in range(1, 6):
        front.token("r", token)
    front.look(False, 9 * CALM_LOOKS)
    for token in range(6, 12):
        front.token("r", token)
        front.look(False)
    assert front.got["r"][-3:] == [[9], [10], [11]]
    assert not front.pace._own


def test_what_cannot_be_joined_is_left_alone() -> None:
    front = Front()
    front.add("whole", output_kind=RequestOutputKind.FINAL_ONLY)
    front.add("session", resumable=True)
    front.add("pooled", sampling_params=None, pooling_params=PoolingParams())
    front.look(True, 9)
    states = front.processor.request_states
    assert {name: s.stream_interval for name, s in states.items()} == dict.fromkeys(states, 1)


async def test_the_loop_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock and a processor time that a test sets."""
    turns = iter([(0.05, 0.001), (0.08, 0.078), (0.06, 0.03)])
    now = {"wall": 0.0, "cpu": 0.0}

    async def sleep(seconds: float) -> None:
        assert seconds == pace.LOOK_EVERY_S
        wall, cpu = next(turns)
        now["wall"] += wall
        now["cpu"] += cpu

    loop = SimpleNamespace(time=lambda: now["wall"])
    monkeypatch.setattr(pace.asyncio, "sleep", sleep)
    monkeypatch.setattr(pace.asyncio, "get_running_loop", lambda: loop)
    monkeypatch.setattr(pace.time, "thread_time", lambda: now["cpu"])
    seen: list[tuple[float, float]] = []
    front = Front()
    monkeypatch.setattr(front.pace, "look", lambda *what: seen.append(what))
    with pytest.raises(RuntimeError, match="StopIteration"):
        await front.pace.run()
    assert [(round(late, 3), round(busy, 3)) for late, busy in seen] == [
        (0.0, 0.02), (0.03, 0.975), (0.01, 0.5),
    ]  # fmt: skip
