"""Calls to engines, over a changing set of them: what is asked of one, of all, of any.

vLLM 0.32 internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`AsyncMPClient._call_utility_async(method, *args, engine)` calls one engine by its ZMQ identity;
`call_utility_all_async` and `call_utility_consensus_async` go by `core_engines`.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from llumnix.core.types import EngineIndex


class EngineCalls(AsyncMPClient):
    """The calling half of the fleet's client. The other half says which engines it
    `knows`, and cancels the `_calls` that wait for one that is lost."""

    _calls: dict[EngineIndex, set[asyncio.Task[Any]]]

    def knows(self, engine_index: EngineIndex) -> bool:
        """Whether the engine is there, or was started and will be."""
        raise NotImplementedError

    async def call_engine(self, engine_index: EngineIndex, method: str, *args: Any) -> Any:
        """Calls one engine; `EngineDeadError` if it is gone, or goes before it has answered."""
        identity = engine_index.to_bytes(2, "little")
        return await self._call_utility_async(method, *args, engine=identity)

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> Any:
        if not engine:
            raise EngineDeadError()
        engine_index = EngineIndex(int.from_bytes(engine, "little"))
        if not self.knows(engine_index):  # Lost since our caller listed the engines.
            raise EngineDeadError()
        call = asyncio.ensure_future(super()._call_utility_async(method, *args, engine=engine))
        calls = self._calls.setdefault(engine_index, set())
        calls.add(call)
        call.add_done_callback(calls.discard)
        try:
            return await call
        except asyncio.CancelledError:
            if not self.knows(engine_index):  # Cancelled by `lose`, not by our caller.
                raise EngineDeadError() from None
            call.cancel()
            raise

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        """Calls all engines; what they answer must agree, and that is returned."""
        return await self.call_utility_consensus_async(method, *args)

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        if not self.core_engines:
            raise EngineDeadError()
        return await super().call_utility_all_async(method, *args)

    async def get_supported_tasks_async(self) -> Any:
        return await self._call_utility_async("get_supported_tasks", engine=self.core_engine)

    async def save_sharded_state_async(
        self, path: str, pattern: str | None = None, max_size: int | None = None
    ) -> None:
        # All engines hold the same weights; two writing one folder would only get in their way.
        await self._call_utility_async(
            "save_sharded_state", path, pattern, max_size, engine=self.core_engine
        )

    async def list_loras_async(self) -> set[int]:
        return set.intersection(*map(set, await self.call_utility_all_async("list_loras")))

    async def add_lora_async(self, lora_request: LoRARequest) -> bool:
        return all(await self.call_utility_all_async("add_lora", lora_request))

    async def remove_lora_async(self, lora_id: int) -> bool:
        # An engine that never served the adapter has nothing to remove.
        return any(await self.call_utility_all_async("remove_lora", lora_id))

    async def pin_lora_async(self, lora_id: int) -> bool:
        return all(await self.call_utility_all_async("pin_lora", lora_id))

    async def collective_rpc_async(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """The answers of all workers of all engines, one after the other."""
        per_engine = await self.call_utility_all_async(
            "collective_rpc", method, timeout, args, kwargs
        )
        return [answer for answers in per_engine for answer in answers]
