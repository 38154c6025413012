"""Every way in which a request is turned away before an engine has it.

A refusal has a code. Programs read it as `error.code` and in `REASON_HEADER`, which is there too
where the body is not ours. docs/answers.md lists the codes; each is a promise.
"""

import math
import time
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse

from llumnix.core.keys import KeyMeter

REASON_HEADER = "x-llumnix-reason"
SHORTLY_S = 1.0
START_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One way."""

    status: int
    kind: str  # OpenAI's word for errors of its kind
    retry_s: float | None = None  # after which it may be tried again, if that may help


BUSY, BAD, NO = "service_unavailable", "invalid_request_error", "forbidden"
LIMIT = "rate_limit_error"
REFUSALS: dict[str, Refusal] = {
    "loading": Refusal(status=503, kind=BUSY, retry_s=START_S),
    "no_frontend": Refusal(status=503, kind=BUSY, retry_s=START_S),
    "no_instance": Refusal(status=503, kind=BUSY, retry_s=SHORTLY_S),
    "stopping": Refusal(status=503, kind=BUSY, retry_s=SHORTLY_S),
    "queue_limit": Refusal(status=503, kind=BUSY, retry_s=SHORTLY_S),
    "queue_full": Refusal(status=429, kind=LIMIT, retry_s=SHORTLY_S),
    "overloaded": Refusal(status=429, kind=LIMIT, retry_s=SHORTLY_S),
    "rate_limited": Refusal(status=429, kind=LIMIT, retry_s=SHORTLY_S),
    "too_many_open": Refusal(status=429, kind=LIMIT, retry_s=SHORTLY_S),
    "invalid_api_key": Refusal(status=401, kind=NO),
    "admin_key_required": Refusal(status=403, kind=NO),
    "role_required": Refusal(status=403, kind=NO),
    "host_not_allowed": Refusal(status=403, kind=NO),
    "foreign_origin": Refusal(status=403, kind=NO),
    "too_large": Refusal(status=413, kind=BAD),
    "bad_class": Refusal(status=400, kind=BAD),
    "request_quarantined": Refusal(status=422, kind=BAD),
}
"""By code. Those that are answered while the server starts are not counted."""

RETRYABLE = frozenset({"engine_died"})
"""Errors that are no refusals, since an engine had the request, and after which it may be sent
again."""


def refused(
    code: str, message: str, *, retry_s: float | None = None, meter: KeyMeter | None = None
) -> JSONResponse:
    """The answer to a request that is turned away, in OpenAI's form. `retry_s`: when it may be
    tried again, if that is known better than in general. `meter`: of its key, if that has one."""
    answer = JSONResponse({"error": error_of(code, message)}, REFUSALS[code].status)
    mark(answer.headers, code, retry_s=retry_s)
    answer.raw_headers += limit_headers(meter)
    return answer


def error_of(code: str, message: str) -> dict[str, str | bool | None]:
    """The error of such an answer's body."""
    kind, again = REFUSALS[code].kind, retryable(code)
    return {"message": message, "type": kind, "param": None, "code": code, "retryable": again}


def retryable(code: str) -> bool:
    """Whether the same request may well succeed later."""
    refusal = REFUSALS.get(code)
    return code in RETRYABLE if refusal is None else refusal.retry_s is not None


def mark(headers: MutableHeaders, code: str, *, retry_s: float | None = None) -> None:
    """Puts the code, and when to try again, into the head of an answer. `code` may be one that is
    no refusal."""
    headers[REASON_HEADER] = code
    refusal = REFUSALS.get(code)
    if refusal is not None and refusal.retry_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_s or refusal.retry_s)))


def limit_headers(meter: KeyMeter | None, now_s: float | None = None) -> list[tuple[bytes, bytes]]:
    """What is left of a key's limits, as OpenAI has it: `x-ratelimit-limit-requests`, and so on.
    `now_s`: on the monotonic clock."""
    told, now_s = {}, time.monotonic() if now_s is None else now_s
    for each in () if meter is None else meter.standings(now_s):
        told[f"limit-{each.of}"] = str(each.limit)
        told[f"remaining-{each.of}"] = str(each.remaining)
        minutes, seconds = divmod(math.ceil(each.reset_s), 60)
        told[f"reset-{each.of}"] = f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
    return [(f"x-ratelimit-{name}".encode(), value.encode()) for name, value in told.items()]
