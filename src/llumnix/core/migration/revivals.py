"""Requests whose engine died, and that this engine was asked to go on with.

Rules
- A request comes whole, as its client sent it, with the tokens that its client has. No KV comes
  with it: the engine computes that again, as after a preemption.
- It only waits, so it is not refused for want of memory or of a place in the batch.
- It is queued once everything but its KV is here, such as its grammar. The frontend is told before
  the request's first token. One that cannot be queued is declined, and this engine keeps nothing of
  it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llumnix.core.codes import AbortCode
from llumnix.core.messages import Out, Revive, ToFrontend, TookOver, not_taken
from llumnix.core.migration.port import EnginePort, Refusal
from llumnix.core.types import RequestId

READY_TIMEOUT_S = 60.0
"""How long a request may take to get ready. The first grammar of an engine takes longest."""


@dataclass(slots=True, kw_only=True)
class Revival:
    """A request that is to go on here, and is not ready yet."""

    order: Revive
    until_s: float  # then it is declined


class Revivals:
    """The revivals at one engine."""

    def __init__(self, port: EnginePort, out: list[Out]) -> None:
        self._port = port
        self._out = out
        self._open: dict[RequestId, Revival] = {}
        self._at: Revive | None = None  # the one that is being dealt with
        self.closed: str | None = None  # why none may begin

    def __len__(self) -> int:
        return len(self._open)

    def deadlines(self) -> list[float]:
        """When `poll` has to look at each."""
        return [revival.until_s for revival in self._open.values()]

    def begin(self, order: Revive, request: object, now: float) -> None:
        """Takes a request in. `request`: what the port made of the message that brought it."""
        self._at = order
        if self.closed is not None:
            self._decline(order, f"the engine takes none: {self.closed}", AbortCode.BUSY)
            return
        refusal = self._port.admit(order.request, request, order.outputs)
        if refusal is not None:
            self._decline(order, refusal.why)
            return
        revival = Revival(order=order, until_s=now + READY_TIMEOUT_S)
        self._open[order.request] = revival
        self._advance(revival, now)

    def poll(self, now: float) -> None:
        """Queues each revival that is ready, and declines each that is late."""
        for revival in list(self._open.values()):
            self._at = revival.order
            self._advance(revival, now)

    def client_gone(self, gone: Callable[[Revive], bool]) -> None:
        """The frontend aborted the requests of these orders here and waits for no answer, or it
        died."""
        for revival in [r for r in self._open.values() if gone(r.order)]:
            self._drop(revival)

    def cancel_all(self, why: str) -> None:
        """Declines all that are not queued."""
        for revival in list(self._open.values()):
            self._drop(revival)
            self._decline(revival.order, f"the engine takes none: {why}", AbortCode.BUSY)

    def settled(self) -> None:
        """What was being dealt with is done, without an exception."""
        self._at = None

    def failed(self, why: str) -> None:
        """An exception came out of what was being dealt with. Ends that revival, if any."""
        order, self._at = self._at, None
        if order is None:
            return
        if (revival := self._open.get(order.request)) is not None:
            self._drop(revival)
        self._decline(order, f"an error at the engine that was to go on with it: {why}")

    def _advance(self, revival: Revival, now: float) -> None:
        order = revival.order
        ready = self._port.ready(order.request)
        if not ready and now < revival.until_s:
            return
        if not ready:
            ready = Refusal(why=f"it was not ready within {READY_TIMEOUT_S:.0f} s")
        if not isinstance(ready, Refusal):
            refusal = self._port.commit(order.request, 0, b"")
            if refusal is None:
                self._queued(order)
                return
            ready = refusal
        self._drop(revival)
        self._decline(order, ready.why)

    def _queued(self, order: Revive) -> None:
        del self._open[order.request]
        took = TookOver(
            migration=order.migration,
            request=order.request,
            epoch=order.epoch,
            outputs=len(order.outputs),
            tail=[],
        )
        self._out.append(ToFrontend(client=order.client, message=took))

    def _drop(self, revival: Revival) -> None:
        del self._open[revival.order.request]
        self._port.drop(revival.order.request)

    def _decline(self, order: Revive, why: str, code: AbortCode = AbortCode.OTHER) -> None:
        self._out.append(not_taken(order, why, code))
