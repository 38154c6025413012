"""What the fleet tells the frontends, and asks them."""

import asyncio
from typing import Protocol

from llumnix.core.events import DrainInstance
from llumnix.core.supervision.frontends import FrontendStatus
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.frontend.controller_link import ControllerLink


class Frontends(Protocol):
    """All frontends of one deployment: this very process, or several others."""

    link: ControllerLink  # the fleet's line to the controller
    drain_requests: asyncio.Queue[DrainInstance]  # of instances that were told to end

    @property
    def leaving(self) -> bool:
        """Whether a stop has begun. Requests may still be let in for a while."""
        ...

    @property
    def paused(self) -> bool:
        """Whether engines stand still on purpose."""
        ...

    # -- engines

    def expect(self, instance: InstanceId, engine_index: EngineIndex, slot: int) -> None:
        """Makes an engine known that will announce itself. It takes no requests yet."""
        ...

    def locate(self, engine_index: EngineIndex, address: str) -> None:
        """Says where the engine's llumlet listens."""
        ...

    async def ready(self, engine_index: EngineIndex) -> None:
        """Returns once the engine has announced itself."""
        ...

    async def bring_up(self, engine_index: EngineIndex) -> str | None:
        """Brings a new engine into the state of the others. Returns None, or why it could not
        be."""
        ...

    def accept(self, engine_index: EngineIndex, accepting: bool) -> None:
        """Says whether the engine gets new requests."""
        ...

    def note_silent(self, engine_index: EngineIndex, silent: bool) -> None:
        """Says whether the engine's process no longer reports: nobody waits long for it then."""
        ...

    async def lose(
        self,
        engine_index: EngineIndex,
        *,
        blamed: bool = False,
        suspects: frozenset[RequestId] | None = None,
    ) -> int:
        """Takes an engine out. Returns how many streams ended. See `FleetClient.lose`."""
        ...

    def in_flight(self, engine_index: EngineIndex) -> int:
        """How many requests the engine owns, or was asked to go on with."""
        ...

    def may_hold(self, engine_index: EngineIndex) -> bool:
        """Whether the engine, which is to get no new requests, may still own one or get one."""
        ...

    def heard_s(self, engine_index: EngineIndex) -> float | None:
        """When outputs of the engine came last, on the monotonic clock; None if that is not
        known."""
        ...

    # -- metrics

    def status(self) -> list[FrontendStatus]:
        """The processes that speak HTTP."""
        ...

    def grow_metrics(self, slots: int) -> None:
        """Makes room for the metrics of that many instances."""
        ...
