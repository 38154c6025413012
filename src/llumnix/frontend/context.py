"""What one HTTP request knows on its way through vLLM's application.

vLLM hands neither headers nor the HTTP request down to the engine client, so they travel in a
context variable: the gate sets it, the engine client reads it.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from llumnix.core.types import InstanceId


@dataclass(slots=True, kw_only=True)
class HttpRequest:
    """`client_id`: the client's X-Request-Id, if it sent one. `priority_class`, `service_tier`,
    `key`: what it said of its urgency, and the API key it came with. `instance`: of the first
    dispatch; `on_dispatch` is called once, when that is known."""

    client_id: str | None
    priority_class: str | None = None
    service_tier: str | None = None
    key: str | None = field(default=None, repr=False)
    instance: InstanceId | None = None
    on_dispatch: Callable[[], None] | None = None

    def dispatched(self, instance: InstanceId) -> None:
        """Notes a dispatch of this request; only the first counts (`n` > 1 makes several)."""
        if self.instance is None:
            self.instance = instance
            if self.on_dispatch is not None:
                self.on_dispatch()


current_http_request: ContextVar[HttpRequest | None] = ContextVar("llumnix_http", default=None)
