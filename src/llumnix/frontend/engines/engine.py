"""One engine, as the frontend knows it."""

import asyncio
from dataclasses import dataclass, field

from llumnix.core.types import EngineIndex, InstanceId
from llumnix.frontend.engines.clock import EngineClock


@dataclass(slots=True, kw_only=True, eq=False)
class Engine:
    """One run of one instance's engine, as this frontend knows it. `slot` labels its metrics:
    small, and the same for all runs of an instance. `address`: where its llumlet listens."""

    instance: InstanceId
    engine_index: EngineIndex
    slot: int
    ready: asyncio.Future[None]
    address: str = ""
    accepting: bool = True
    clock: EngineClock = field(default_factory=EngineClock)

    @property
    def takes_requests(self) -> bool:
        """Whether a new request may go there."""
        return self.ready.done() and self.accepting

    @property
    def identity(self) -> bytes:
        """Its ZMQ identity."""
        return self.engine_index.to_bytes(2, "little")
