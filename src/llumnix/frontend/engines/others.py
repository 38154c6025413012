"""What a frontend that is not alone asks of the others, through the office."""

from typing import Any, Protocol

from vllm.lora.request import LoRARequest

from llumnix.core.streams.quarantine import Quarantined
from llumnix.core.types import EngineIndex


class Others(Protocol):
    """The other frontends of the deployment."""

    async def call_all(self, method: str, args: tuple[Any, ...]) -> dict[EngineIndex, Any]:
        """Makes a call to all engines that changes what they share, one such call after the
        other."""
        ...

    async def load_adapter(self, request: LoRARequest) -> None:
        """Loads an adapter on all engines, and makes it known to all frontends. Gives it its
        number."""
        ...

    async def condemned(self, one: Quarantined) -> None:
        """Has all frontends refuse requests like this one. Returns once they do."""
        ...

    def refused(self, name: str) -> None:
        """A request like this quarantined one was refused."""
        ...
