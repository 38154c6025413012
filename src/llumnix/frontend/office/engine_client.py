"""The office's own client of the engines, number 0. It has no streams: it makes the calls that
change what all engines share, and hears what engines say of themselves.

vLLM internals relied on here (tests/house/test_vllm_frontends_contract.py fails when one changes):
statistics of a step without outputs go to client 0.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.exceptions import EngineDeadError

from llumnix.core.messages import IN_BAND, DrainRequested
from llumnix.core.types import EngineIndex
from llumnix.frontend.engines.calls import SHORT_TIMEOUT_S, EngineCalls
from llumnix.frontend.engines.outputs import FailedRequest
from llumnix.wire import decode


class EngineClient(EngineCalls):
    """Calls engines, and listens to them. `on_statistics` gets an engine's message as it came."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.on_statistics: Callable[[list[bytes]], None] = lambda frames: None

    def lose(self, engine_index: EngineIndex) -> bool:
        """Takes an engine out, and calls to it fail. Returns whether it was there."""
        if self.take_out(engine_index) is None:
            return False
        # Each frontend tells of its own moves; of one whose frontend has died too, nobody else.
        for engine in self.engines.up():
            self._begin(self.tell_lost(engine.engine_index, engine_index, []))
        return True

    async def tasks_if_any(self) -> Sequence[str] | None:
        """What the model can do; None while no engine says so."""
        try:
            tasks: Sequence[str] = await self.get_supported_tasks_async()
        except (EngineDeadError, GracefulHTTPError):
            return None
        return tasks

    def _begin(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drop_client(self, client: int) -> None:
        """Has all engines drop the requests of a client that is gone, and what still comes of
        it."""
        engines = [engine.engine_index for engine in self.engines.up()]
        await asyncio.gather(*(self._drop_at(engine, client) for engine in engines))

    async def _drop_at(self, engine_index: EngineIndex, client: int) -> None:
        try:
            async with asyncio.timeout(SHORT_TIMEOUT_S):
                await self.call_engine(engine_index, "llumnix_client_lost", client)
        except EngineDeadError:
            return  # With all that it had.
        except Exception as error:  # noqa: BLE001 - vLLM raises a bare Exception
            what = f"{self.engines.name(engine_index)}: {error!r}"
            self.complaints.note("An instance keeps requests of a lost frontend", what)

    def receive(self, outputs: EngineCoreOutputs) -> None:
        index = EngineIndex(outputs.engine_index)
        if index in self.engines:
            for output in outputs.outputs:
                params = output.kv_transfer_params
                if params is not None and IN_BAND in params:
                    self._heard(index, params[IN_BAND])
            if outputs.scheduler_stats is not None:
                statistics = EngineCoreOutputs(
                    engine_index=index,
                    scheduler_stats=outputs.scheduler_stats,
                    timestamp=outputs.timestamp,
                )
                self.on_statistics([bytes(frame) for frame in self.encoder.encode(statistics)])
        # Nobody reads the queue that vLLM's client would put it into.
        outputs.outputs, outputs.scheduler_stats = [], None

    def _heard(self, engine_index: EngineIndex, payload: bytes) -> None:
        message = decode(payload)
        if not isinstance(message, DrainRequested):
            self.complaints.note("An engine told the office what is a frontend's", message)
            return
        self.drain_requested(engine_index, message.why)

    def fail(self, failed: FailedRequest) -> EngineCoreOutputs:
        raise NotImplementedError
