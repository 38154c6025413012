"""Shows clients that a stream lives while it waits for its first token, in a queue or for a long
prompt. Proxies cut off a connection on which nothing comes, many after a minute.

Orphans are shown by the piece that looks after them (core/streams/survival.py).
"""

import asyncio
import time
from collections.abc import Iterable, Iterator

from llumnix.frontend.context import HttpRequest
from llumnix.frontend.streams.info import FleetStream

SHOW_EVERY_S = 15.0
LOOK_EVERY_S = 5.0


def to_show(streams: Iterable[FleetStream], before_s: float, now_s: float) -> Iterator[HttpRequest]:
    """The HTTP requests of which a stream without a token has completed a further `SHOW_EVERY_S`
    between two looks. Each once, though it may have several streams."""
    shown: set[int] = set()
    for stream in streams:
        info = stream.info
        if stream.outputs or info.http is None or id(info.http) in shown:
            continue
        age_s, before = now_s - info.started_s, max(0.0, before_s - info.started_s)
        if age_s // SHOW_EVERY_S > before // SHOW_EVERY_S:
            shown.add(id(info.http))
            yield info.http


async def show_waiting(streams: Iterable[FleetStream]) -> None:
    """Looks until it is cancelled."""
    before_s = time.monotonic()
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        now_s = time.monotonic()
        for http in list(to_show(streams, before_s, now_s)):
            http.waits()
        before_s = now_s
