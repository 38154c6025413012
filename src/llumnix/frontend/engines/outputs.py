"""Takes in what engines send, message by message, so that a fault costs one message.

Bytes that the decoder does not understand, answers that nobody waits for and exceptions of our own
are counted and logged, and the next message is taken in. vLLM's own task ends with the first of
these, and the server with it.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- `AsyncMPClient._ensure_output_queue_task()` starts the one task that reads
  `resources.output_socket`, and `resources` cancels it as `output_queue_task` when it closes.
  `get_output_async()` is what `AsyncLLM` reads; an exception from it fails every request.
- A message is `EngineCoreOutputs` in msgpack: with outputs or statistics, or with a
  `utility_output`, whose `result.result` or `failure_message` answers one call.
- An engine with fault tolerance reports its status as an answer to the call `FT_STATUS_CALL_ID`.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import zmq
from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
from vllm.v1.engine.core_client import FT_STATUS_CALL_ID, AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

logger = logging.getLogger("llumnix.frontend")

COMPLAIN_EVERY_S = 10.0
DIED_CODE = "engine_died"
QUARANTINED_CODE = "request_quarantined"
"""Codes by which a client's program knows an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRequest:
    """A request that ends with an error. It stands in one queue with the outputs, so that those
    before it come first."""

    request: str
    slot: int  # of the instance that ran it
    why: str  # what its client reads
    status: int = HTTPStatus.INTERNAL_SERVER_ERROR  # what its client gets
    code: str | None = None  # for its client's program; None: the status


class Complaints:
    """Counts faults by kind. Logs the first of a kind, then at most one each `COMPLAIN_EVERY_S`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.counts: dict[str, int] = {}
        self._logged_s: dict[str, float] = {}

    def note(self, kind: str, what: object, error: BaseException | None = None) -> None:
        """Counts one more fault. `kind` is one of a few words; `error` is logged with its
        traceback."""
        count = self.counts[kind] = self.counts.get(kind, 0) + 1
        now_s = self._clock()
        if now_s - self._logged_s.get(kind, -COMPLAIN_EVERY_S) >= COMPLAIN_EVERY_S:
            self._logged_s[kind] = now_s
            logger.error("%s (%d so far): %s", kind, count, what, exc_info=error)


class EngineOutputs(AsyncMPClient):
    """The part of the fleet's client that takes messages in. Its subclass says what to do with
    outputs (`receive`) and how a request that failed ends (`fail`)."""

    complaints: Complaints

    def receive(self, outputs: EngineCoreOutputs) -> None:
        """Takes in what an engine says of requests and of itself."""
        raise NotImplementedError

    def fail(self, failed: FailedRequest) -> EngineCoreOutputs:
        """Tells the request's consumer; returns the output that ends it."""
        raise NotImplementedError

    def _ensure_output_queue_task(self) -> None:
        if self.resources.output_queue_task is None:
            self.resources.output_queue_task = asyncio.create_task(
                self._listen(), name="llumnix-engine-outputs"
            )

    async def _listen(self) -> None:
        socket: Any = self.resources.output_socket
        try:
            while True:
                self._take_in(await socket.recv_multipart(copy=False))
        except asyncio.CancelledError:
            self.outputs_queue.put_nowait(EngineDeadError())
        except zmq.ZMQError as error:  # The socket itself failed, so nothing more will come.
            self.outputs_queue.put_nowait(error)

    def take_in(self, frames: list[bytes]) -> None:
        """Takes in a message of an engine's that came another way."""
        self._take_in([zmq.Frame(frame) for frame in frames])

    def _take_in(self, frames: list[Any]) -> None:
        try:
            outputs = self.decoder.decode(frames)
        except Exception as error:  # noqa: BLE001 - foreign bytes may raise anything in a decoder
            said = bytes(frames[0].buffer[:80]) if frames else b""
            self.complaints.note("Dropped what is no engine's message", f"{said!r} ({error})")
            return
        try:
            if outputs.utility_output:
                self._take_answer(outputs.engine_index, outputs.utility_output)
                return
            self.receive(outputs)
            if outputs.outputs or outputs.scheduler_stats:
                self.outputs_queue.put_nowait(outputs)
        except Exception as error:  # noqa: BLE001 - a fault of one message must not stop the next
            self.complaints.note("Dropped an engine's message", repr(error), error)

    def _take_answer(self, engine_index: int, answer: UtilityOutput) -> None:
        if answer.call_id == FT_STATUS_CALL_ID:
            if answer.result is not None:
                self._engine_status[engine_index] = answer.result.result
            return
        waiting = self.utility_results.get(answer.call_id)
        if waiting is None or waiting.done():
            return  # The caller has given up, or nobody called.
        if answer.failure_message is None and answer.result is not None:
            waiting.set_result(answer.result.result)
        else:
            waiting.set_exception(Exception(answer.failure_message or "the answer is empty"))

    async def get_output_async(self) -> EngineCoreOutputs:
        self._ensure_output_queue_task()
        while True:
            item: Any = await self.outputs_queue.get()
            if isinstance(item, FailedRequest):
                try:
                    return self.fail(item)
                except Exception as error:  # noqa: BLE001 - the others' outputs must follow
                    self.complaints.note("A consumer was not told of a failure", item, error)
            elif isinstance(item, Exception):
                raise self._format_exception(item) from None
            else:
                return item  # type: ignore[no-any-return]
