"""What one HTTP request knows on its way through vLLM's application.

vLLM hands neither headers nor the HTTP request down to the engine client. They travel in a context
variable, which the gate sets and the engine client reads.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GenerationError, GracefulHTTPError

from llumnix.core.keys import KeyMeter
from llumnix.core.types import InstanceId
from llumnix.frontend.direct import DirectOutputs, WriteBody
from llumnix.frontend.door.refusals import REFUSALS
from llumnix.observe import metrics


@dataclass(slots=True, kw_only=True)
class HttpRequest:
    """One HTTP request of a client."""

    client_id: str | None  # its X-Request-Id, if it sent one
    priority_class: str | None = None  # as its X-Llumnix-Priority names it
    service_tier: str | None = None  # OpenAI's field of the body
    key: str | None = field(default=None, repr=False)  # the API key that it came with
    key_name: str | None = None  # its name, if it is one of the file of --keys
    cap: str | None = None  # the most urgent class that this key gets
    meter: KeyMeter | None = None  # counts what its key uses, if that has limits
    spend: Callable[[int, int], None] | None = None  # is told each sequence's tokens at its end
    span: Any = None  # streams/spans.py's, if it is traced
    gate_s: float = 0.0  # how long the gate took before vLLM had it
    instance: InstanceId | None = None  # of the first dispatch
    on_dispatch: Callable[[], None] | None = None  # called once, when the instance is known
    on_wait: Callable[[], None] | None = None  # called now and then while no engine has the request
    code: str | None = None  # of the error that it ends with, if that has one of its own
    retry_s: float | None = None  # when it may be tried again, if that is known
    write: WriteBody | None = None  # parts of the answer's body, past all middlewares
    outputs: list[DirectOutputs] = field(default_factory=list)  # of the requests that stream to it
    parts: int = 1
    """It is open for its key while one of these goes on: its answer, and each of its streams. The
    stream of a background response outlives the answer, or begins after it."""

    def refused(self, code: str, *, retry_s: float | None = None) -> None:
        """It is turned away, for the reason that this code of door/refusals.py gives."""
        self.code, self.retry_s = code, retry_s
        count_refusal(code)

    def part_begins(self) -> None:
        """One of its streams begins."""
        self.parts += 1
        if self.parts == 1 and self.meter is not None:
            self.meter.begun()

    def part_ends(self) -> None:
        """Its answer is sent, or one of its streams has ended."""
        self.parts -= 1
        if self.parts == 0 and self.meter is not None:
            self.meter.ended()

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


def count_refusal(code: str) -> None:
    """A request was turned away."""
    metrics.GATE_REFUSALS.labels(code=code).inc()


class RefusedError(GenerationError, GracefulHTTPError):
    """A new request is turned away. Who catches it tells the request's `HttpRequest`.

    vLLM ends a stream with the message of a `GenerationError`, and logs no traceback."""

    def __init__(self, code: str, why: str, *, retry_s: float | None = None) -> None:
        Exception.__init__(self, why)
        self.message, self.code, self.retry_s = why, code, retry_s
        self.http_status = self.status_code = HTTPStatus(REFUSALS[code].status)

    def note(self, http: HttpRequest | None) -> None:
        """Has the answer to this HTTP request say so."""
        if http is not None:
            http.refused(self.code, retry_s=self.retry_s)


current_http_request: ContextVar[HttpRequest | None] = ContextVar("llumnix_http", default=None)
