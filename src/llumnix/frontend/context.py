"""What one HTTP request knows on its way through vLLM's application.

vLLM hands neither headers nor the HTTP request down to the engine client. They travel in a context
variable, which the gate sets and the engine client reads.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from llumnix.core.types import InstanceId
from llumnix.frontend.direct import DirectOutputs, WriteBody


@dataclass(slots=True, kw_only=True)
class HttpRequest:
    """One HTTP request of a client."""

    client_id: str | None  # its X-Request-Id, if it sent one
    priority_class: str | None = None  # as its X-Llumnix-Priority names it
    service_tier: str | None = None  # OpenAI's field of the body
    key: str | None = field(default=None, repr=False)  # the API key that it came with
    gate_s: float = 0.0  # how long the gate took before vLLM had it
    instance: InstanceId | None = None  # of the first dispatch
    on_dispatch: Callable[[], None] | None = None  # called once, when the instance is known
    on_wait: Callable[[], None] | None = None  # called now and then while no engine has the request
    code: str | None = None  # of the error that it ends with, if that has one of its own
    write: WriteBody | None = None  # parts of the answer's body, past all middlewares
    outputs: list[DirectOutputs] = field(default_factory=list)  # of the requests that stream to it

    def dispatched(self, instance: InstanceId) -> None:
        """Takes in a dispatch. With `n` > 1 there are several, and only the first counts."""
        if self.instance is None:
            self.instance = instance
            if self.on_dispatch is not None:
                self.on_dispatch()

    def waits(self) -> None:
        """No engine has had the request for a while."""
        if self.on_wait is not None:
            self.on_wait()


current_http_request: ContextVar[HttpRequest | None] = ContextVar("llumnix_http", default=None)
