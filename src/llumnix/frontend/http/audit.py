"""Tells in the log who changed what: a line for each call that takes an administrator and is no
mere look."""

import logging

from starlette.types import Message, Scope, Send

from llumnix.frontend.http.access import READS, Caller, needs_admin
from llumnix.observe.lines import about

logger = logging.getLogger("llumnix.frontend")


def audited(scope: Scope, path: str, caller: Caller, send: Send) -> Send:
    """`send`, which also tells of this request once its answer begins, if it is such a call. A key
    is told by its name, if it has one, and never shown."""
    method = scope.get("method", "")
    if not method or method in READS or not needs_admin(method, path):
        return send
    who = caller.named.name if caller.named is not None else None
    by = f"key {who}" if who else ("a key" if caller.proved else "a client without a key")

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            status = message["status"]
            extra = about("admin_call", method=method, path=path, key=who, status=status)
            logger.info("%s %s by %s: %d", method, path, by, status, extra=extra)
        await send(message)

    return told
