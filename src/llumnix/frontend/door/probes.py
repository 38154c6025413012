"""What orchestrators ask: whether the process lives, and whether it is to get requests.

`/live` answers 200 for as long as the process does. A process of which nothing can become ends by
itself, so no probe needs to have it killed. `/ready` answers 200 while enough instances serve.
Both want no key, and have the form of their answers from the first second of a start on.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import parse_qs

from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.supervision.readiness import FleetSeen, Reason, not_ready, serving
from llumnix.frontend.door.refusals import REASON_HEADER

LIVE_PATH = "/live"
READY_PATH = "/ready"
PROBE_PATHS = (LIVE_PATH, READY_PATH)
METHODS = ("GET", "HEAD")
ANSWER_S = 2.0
"""So long the process that has the fleet is waited for. Kubernetes waits a second unless told
otherwise; then its probe has failed just as well."""
RETRY_AFTER_S = 1
MIN_MAX = 1_000_000


class Probes:
    """The application behind the paths of probes, while the server serves. `ready_min`: how many
    instances must serve unless the probe says how many."""

    def __init__(self, fleet: Callable[[], Awaitable[FleetSeen]], ready_min: int) -> None:
        self._fleet = fleet
        self._ready_min = ready_min

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._answer(scope)
        await answer(scope, receive, send)

    async def _answer(self, scope: Scope) -> JSONResponse:
        if scope["method"] not in METHODS:
            return wrong_method()
        if get_route_path(scope) == LIVE_PATH:
            return live()
        least = least_asked(scope, self._ready_min)
        if least is None:
            return bad_min()
        try:
            async with asyncio.timeout(ANSWER_S):
                fleet = await self._fleet()
        except (TimeoutError, HTTPException):
            return ready((), least, "no_answer", phase="serving")
        phase = "stopping" if fleet.stopping else "serving"
        return ready(fleet.instances, least, not_ready(fleet, least), phase=phase)


def live() -> JSONResponse:
    """The process lives."""
    return JSONResponse({"live": True})


def ready(
    instances: Sequence[InstanceStatus],
    least: int,
    reason: Reason | None,
    *,
    phase: str,
    **more: Any,
) -> JSONResponse:
    """Whether the deployment is ready, and why it is not. `phase`: loading, serving or stopping;
    `more`: what else there is to say."""
    body = {
        "ready": reason is None,
        "phase": phase,
        "reason": reason,
        "serving": serving(instances),
        "min": least,
        **more,
        "instances": rows(instances),
    }
    if reason is None:
        return JSONResponse(body)
    headers = {"retry-after": str(RETRY_AFTER_S), REASON_HEADER: reason}
    return JSONResponse(body, 503, headers)


def rows(instances: Sequence[InstanceStatus]) -> list[dict[str, Any]]:
    """How far each instance is, as JSON."""
    return [
        {"id": each.id, "state": each.state, "step": each.step, "for_s": each.for_s}
        for each in instances
    ]


def least_asked(scope: Scope, default: int) -> int | None:
    """How many instances the probe wants to serve: its `min`. None if that is no such number."""
    given = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True).get("min")
    if given is None:
        return default
    last = given[-1]
    least = int(last) if last.isascii() and last.isdigit() and len(last) < 8 else 0
    return least if 1 <= least <= MIN_MAX else None


def bad_min() -> JSONResponse:
    """The probe asks for a number of instances that is none."""
    return _error("min: must be a whole number of instances, 1 or more", 400)


def wrong_method() -> JSONResponse:
    """Probes are read."""
    answer = _error("A probe is read: use GET.", 405)
    answer.headers["allow"] = ", ".join(METHODS)
    return answer


def _error(message: str, status: int) -> JSONResponse:
    kind = "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status)
