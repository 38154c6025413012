"""Calls to engines, over a changing set of them: what is asked of one, of all, of any.

vLLM 0.32 internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`AsyncMPClient._call_utility_async(method, *args, engine)`, replaced here, calls one engine by its
ZMQ identity: it sends (client, call, method, arguments) and awaits the future in `utility_results`;
`call_utility_all_async` and `call_utility_consensus_async` go by `core_engines`.
"""

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.exceptions import EngineDeadError

from llumnix.core.types import EngineIndex
from llumnix.frontend.engine_outputs import EngineOutputs


class EngineCalls(EngineOutputs):
    """The calling half of the fleet's client. The other half says which engines it `knows`."""

    _calls: dict[EngineIndex, set[asyncio.Future[Any]]]

    def knows(self, engine_index: EngineIndex) -> bool:
        """Whether the engine is there, or was started and will be."""
        raise NotImplementedError

    async def call_engine(self, engine_index: EngineIndex, method: str, *args: Any) -> Any:
        """Calls one engine; `EngineDeadError` if it is gone, or goes before it has answered."""
        identity = engine_index.to_bytes(2, "little")
        return await self._call_utility_async(method, *args, engine=identity)

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> Any:
        engine_index = EngineIndex(int.from_bytes(engine, "little"))
        if not engine or not self.knows(engine_index):  # Lost since our caller listed the engines.
            raise EngineDeadError()
        call_id = uuid.uuid1().int >> 64
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.utility_results[call_id] = answer
        calls = self._calls.setdefault(engine_index, set())
        calls.add(answer)
        try:
            call = (self.client_index, call_id, method, args)
            await self._send_input(EngineCoreRequestType.UTILITY, call, engine)
            return await answer
        finally:
            self.utility_results.pop(call_id, None)
            calls.discard(answer)

    def fail_calls(self, engine_index: EngineIndex) -> None:
        """Ends the calls that wait for an engine that is lost."""
        for answer in self._calls.pop(engine_index, set()):
            if not answer.done():
                answer.set_exception(EngineDeadError())

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
