"""One engine, as the frontend knows it."""

import asyncio
from dataclasses import dataclass, field

from llumnix.core.types import EngineIndex, InstanceId
from llumnix.frontend.engines.clock import EngineClock


@dataclass(slots=True, kw_only=True, eq=False)
class Engine:
    """One run of one instance's engine."""

    instance: InstanceId
    engine_index: EngineIndex
    slot: int  # labels its metrics: small, and the same for all runs of an instance
    ready: asyncio.Future[None]  # done once it has announced itself
    address: str = ""  # where its llumlet listens; empty until that is known
    accepting: bool = True  # whether new requests may go there, once it is ready
    clock: EngineClock = field(default_factory=EngineClock)

    @property
    def takes_requests(self) -> bool:
        """Whether a new request may go there."""
        return self.ready.done() and self.accepting

    @property
    def identity(self) -> bytes:
        """Its ZMQ identity."""
        return self.engine_index.to_bytes(2, "little")
