"""Gives an error its own code on its way to a client, where vLLM's has the status.

vLLM internals relied on here (tests/house/test_vllm_survival_contract.py fails when one
changes): an error's body is JSON whose `error` has a `code`; in a stream it is an event that begins
as `ERROR_ITEM` does, in a message of its own.
"""

from http import HTTPStatus
from typing import Any

import msgspec
from starlette.datastructures import MutableHeaders
from starlette.types import Message

from llumnix.frontend.door.refusals import mark, retryable
from llumnix.frontend.engines.outputs import QUARANTINED_CODE
from llumnix.frontend.http.stream_ends import ERROR_ITEM

_EVENT = ERROR_ITEM.encode()
_DATA = b"data: "


def with_code(body: bytes, code: str) -> bytes:
    """A part of a stream, with this code in it if it is an error."""
    if not body.startswith(_EVENT):
        return body
    item, end, more = body.removeprefix(_DATA).partition(b"\n\n")
    changed = _coded(item, code)
    return body if changed is None else _DATA + changed + end + more


def whole_answer(
    head: Message, body: bytes, code: str, *, retry_s: float | None = None
) -> tuple[Message, Message] | None:
    """Head and body of an answer that is nothing but an error; None if it is something else. An
    error that begins a stream becomes such an answer, as the stream's head has not been sent.
    `retry_s`: when the request may be tried again, if that is known."""
    status, in_stream = head["status"], body.startswith(_EVENT)
    if in_stream:
        body = body.removeprefix(_DATA).partition(b"\n\n")[0]
        status = _status(body) or status
    changed = _coded(body, code)
    if changed is None or status < HTTPStatus.BAD_REQUEST:
        return None
    head = {**head, "status": status, "headers": list(head.get("headers", ()))}
    headers = MutableHeaders(scope=head)
    headers["content-type"] = "application/json"
    headers["content-length"] = str(len(changed))
    mark(headers, code, retry_s=retry_s)
    if code == QUARANTINED_CODE:
        headers["x-should-retry"] = "false"  # OpenAI's clients go by it.
    return head, {"type": "http.response.body", "body": changed}


def _status(body: bytes) -> int | None:
    answer = _error_in(body)
    status = answer["error"].get("code") if answer is not None else None
    return status if isinstance(status, int) and 400 <= status < 600 else None


def _coded(body: bytes, code: str) -> bytes | None:
    answer = _error_in(body)
    if answer is None:
        return None
    answer["error"]["code"] = code
    answer["error"]["retryable"] = retryable(code)
    return msgspec.json.encode(answer)


def _error_in(body: bytes) -> dict[str, Any] | None:
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError):
        return None
    found = isinstance(answer, dict) and isinstance(answer.get("error"), dict)
    return answer if found else None
