"""An engine and a controller in one, without a model: they cost a front end what real ones do.

Every step gives each running request one token. Steps come at a fixed pace, so that what a token
costs the front end does not depend on how fast it takes them. When each token was sent is kept."""

import asyncio
import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreReadyResponse,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from llumnix.core.events import Dispatch, RequestArrived
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.wire import Ping, Pong, decode, encode

INSTANCE = InstanceId("i0")
ENGINE = EngineIndex(0)
FIRST_WORD = 300
"""Tokens from here on decode to a word of their own, `w<number>` (benchmarks/shapes.py)."""


def addresses(folder: Path) -> dict[str, str]:
    """Where front end, engine and controller meet."""
    return {name: f"ipc://{folder}/{name}" for name in ("input", "output", "controller")}


@dataclasses.dataclass(slots=True)
class Running:
    """A request that gets its tokens."""

    name: str  # vLLM's id
    prompt_tokens: int
    tokens: int  # to generate
    seen: "Seen"


@dataclasses.dataclass(slots=True)
class Seen:
    """When things happened to a client's request, `time.perf_counter()`."""

    arrived_s: float = 0.0  # at the engine
    sent_s: list[float] = dataclasses.field(default_factory=list)  # each token


class StubEngine:
    """`seen` has each request of a client by the number in its X-Request-Id, `r<number>`."""

    def __init__(self, folder: Path, step_s: float) -> None:
        self.step_s = step_s
        self.seen: dict[int, Seen] = {}
        self._running: dict[str, Running] = {}
        self._loop = asyncio.get_running_loop()
        self._encoder = MsgpackEncoder()
        self._requests = MsgpackDecoder(EngineCoreRequest)
        self._calls = MsgpackDecoder()
        self._context = zmq.Context()
        where = addresses(folder)
        self._input = self._context.socket(zmq.DEALER)
        self._input.setsockopt(zmq.IDENTITY, ENGINE.to_bytes(2, "little"))
        self._output = self._context.socket(zmq.PUSH)
        self._input.connect(where["input"])
        self._output.connect(where["output"])
        self._controller = self._context.socket(zmq.ROUTER)
        self._controller.bind(where["controller"])
        self._input.send(_ready())
        for socket, take in ((self._input, self._take), (self._controller, self._decide)):
            self._loop.add_reader(socket.get(zmq.FD), self._take_in, socket, take)
        self._next_s = self._loop.time() + step_s
        self._timer = self._loop.call_at(self._next_s, self._step)

    def close(self) -> None:
        """Ends it."""
        self._timer.cancel()
        for socket in (self._input, self._controller):
            self._loop.remove_reader(socket.get(zmq.FD))
        self._context.destroy(0)

    def _take_in(self, socket: Any, take: Any) -> None:
        while socket.get(zmq.EVENTS) & zmq.POLLIN:
            take(socket.recv_multipart(zmq.NOBLOCK))

    def _decide(self, frames: list[bytes]) -> None:
        match decode(frames[1]):
            case RequestArrived(request=request):
                to = Dispatch(request=request, instance=INSTANCE, engine_index=ENGINE, why="")
                self._controller.send_multipart([frames[0], encode(to)])
                self._take_in(self._controller, self._decide)
            case Ping(number=number):
                self._controller.send_multipart([frames[0], encode(Pong(number=number))])

    def _take(self, frames: list[bytes]) -> None:
        kind, payload = frames[0], frames[1:]
        if kind == EngineCoreRequestType.ADD.value:
            self._add(self._requests.decode(payload))
        elif kind == EngineCoreRequestType.ABORT.value:
            for name in self._calls.decode(payload):
                self._running.pop(name, None)
        elif kind == EngineCoreRequestType.UTILITY.value:
            _, call, method, _ = self._calls.decode(payload)
            answer = ("generate",) if method == "get_supported_tasks" else None
            done = UtilityOutput(call, result=UtilityResult(answer))
            self._send(EngineCoreOutputs(engine_index=ENGINE, utility_output=done))

    def _add(self, request: EngineCoreRequest) -> None:
        number = int(re.findall(r"r(\d+)", request.external_req_id or "")[-1])
        seen = self.seen.setdefault(number, Seen())
        seen.arrived_s = time.perf_counter()
        assert request.sampling_params is not None
        self._running[request.request_id] = Running(
            request.request_id,
            len(request.prompt_token_ids or ()),
            request.sampling_params.max_tokens or 1,
            seen,
        )

    def _step(self) -> None:
        self._next_s = max(self._next_s + self.step_s, self._loop.time())
        self._timer = self._loop.call_at(self._next_s, self._step)
        # A descriptor signals each change once, and a send may have consumed the signal.
        self._take_in(self._input, self._take)
        self._take_in(self._controller, self._decide)
        if not self._running:
            return
        now_s = time.perf_counter()
        outputs = [self._token(r, now_s) for r in list(self._running.values())]
        stats = SchedulerStats(num_running_reqs=len(outputs))
        self._send(EngineCoreOutputs(engine_index=ENGINE, outputs=outputs, scheduler_stats=stats))

    def _token(self, request: Running, now_s: float) -> EngineCoreOutput:
        sent = request.seen.sent_s
        output = EngineCoreOutput(request.name, [FIRST_WORD + len(sent)])
        if not sent:
            output.prefill_stats = PrefillStats(
                num_prompt_tokens=request.prompt_tokens, num_computed_tokens=request.prompt_tokens
            )
            kinds = (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)
            output.events = [EngineCoreEvent.new_event(kind) for kind in kinds]
        sent.append(now_s)
        if len(sent) == request.tokens:
            output.finish_reason = FinishReason.LENGTH
            del self._running[request.name]
        return output

    def _send(self, outputs: EngineCoreOutputs) -> None:
        self._output.send_multipart(self._encoder.encode(outputs))


def _ready() -> bytes:
    """What an engine announces itself with."""
    fields = dict.fromkeys((f.name for f in dataclasses.fields(EngineCoreReadyResponse)), None)
    fields |= {
        "max_model_len": 2048, "num_gpu_blocks": 4096, "block_size": 16, "dtype": "float32",
        "vllm_version": "", "world_size": 1, "data_parallel_size": 1, "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "data_parallel_rank": 0,
        "max_num_seqs": 256, "max_num_batched_tokens": 2048, "instance_id": "", "max_loras": 0,
        "supports_lora": False, "enable_sleep_mode": False, "supports_draft_weight_updates": False,
    }  # fmt: skip
    return msgspec.msgpack.encode(fields)
