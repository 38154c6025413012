"""The one frontend of a deployment that has it in the fleet's own process."""

import asyncio
import os

from llumnix.core.events import DrainInstance
from llumnix.core.supervision.frontends import FrontendStatus
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.frontend.controller_link import ControllerLink
from llumnix.frontend.llm import FleetLLM


class OwnFrontend:
    """`Frontends` (seam.py) of this very process. Every call goes straight to the client."""

    def __init__(self, llm: FleetLLM) -> None:
        self._llm = llm
        self._client = llm.engine_core
        self.link: ControllerLink = self._client.link
        self.drain_requests: asyncio.Queue[DrainInstance] = self._client.drain_requests

    @property
    def leaving(self) -> bool:
        """See `Frontends`, as for all below."""
        return self._llm.leaving

    @property
    def paused(self) -> bool:
        return self._client.shared_state.paused

    def expect(self, instance: InstanceId, engine_index: EngineIndex, slot: int) -> None:
        self._client.expect(instance, engine_index, slot)

    def locate(self, engine_index: EngineIndex, address: str) -> None:
        self._client.engines.locate(engine_index, address)

    async def ready(self, engine_index: EngineIndex) -> None:
        await self._client.engines.ready(engine_index)

    async def bring_up(self, engine_index: EngineIndex) -> str | None:
        return await self._client.bring_up(engine_index)

    def accept(self, engine_index: EngineIndex, accepting: bool) -> None:
        self._client.engines.accept(engine_index, accepting)

    def note_silent(self, engine_index: EngineIndex, silent: bool) -> None:
        self._client.shared_state.note_silent(engine_index, silent)

    async def lose(
        self,
        engine_index: EngineIndex,
        *,
        blamed: bool = False,
        suspects: frozenset[RequestId] | None = None,
    ) -> int:
        return await self._client.lose(engine_index, blamed=blamed, suspects=suspects)

    def in_flight(self, engine_index: EngineIndex) -> int:
        return self._client.in_flight(engine_index)

    def may_hold(self, engine_index: EngineIndex) -> bool:
        return self._client.in_flight(engine_index) > 0

    def heard_s(self, engine_index: EngineIndex) -> float | None:
        return self._client.engines.heard_s(engine_index)

    def status(self) -> list[FrontendStatus]:
        return [FrontendStatus(id="f0", state="serving", pid=os.getpid(), restarts=0, why=None)]

    def grow_metrics(self, slots: int) -> None:
        self._llm.grow_metrics(slots)
