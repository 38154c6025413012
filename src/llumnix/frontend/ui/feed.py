"""The feed of the page: what happens in the deployment, as server-sent events.

One task looks five times a second, while somebody watches, and sends the same bytes to all. It
begins with the first watcher and ends with the last. A watcher who does not read fast enough is
skipped, and gets all anew when it reads again. Nothing happens on a token's path.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec
from starlette.exceptions import HTTPException

from llumnix.errors import LlumnixError
from llumnix.frontend.streams.look import Cursor, Look
from llumnix.frontend.ui.picture import Deployment, Message, Picture
from llumnix.observe import metrics
from llumnix.tasks import keep_running

logger = logging.getLogger("llumnix.frontend")

WATCHERS_MAX = 16
LOOK_EVERY_S = 0.2
QUEUED_MAX = 10
"""So many messages wait for a watcher: two seconds' worth."""
_encoder = msgspec.json.Encoder()


class TooManyWatchersError(LlumnixError):
    """Nobody else can watch now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What the feed looks at."""

    look: Callable[[Cursor], Awaitable[Look]]
    deployment: Callable[[], Awaitable[Deployment]]
    stopping: Callable[[], bool] = lambda: False  # whether a stop has begun; then the feed ends


class Watcher:
    """One page that is open."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUED_MAX)
        self._reading = True  # whether it has taken all that came before
        self.behind = True  # whether it has to be told all
        self.new = True  # whether it knows nothing of the past

    @property
    def takes_all(self) -> bool:
        """Whether it is behind, and reads."""
        return self.behind and self._reading and self._queue.empty()

    def put(self, payload: bytes | None) -> None:
        """Has it sent; None: the feed ends. A watcher whose queue is full falls behind."""
        if payload is not None and not self._queue.full():
            self._queue.put_nowait(payload)
            return
        while not self._queue.empty():
            self._queue.get_nowait()
        self.behind = True
        if payload is None:
            self._queue.put_nowait(None)

    async def stream(self) -> AsyncIterator[bytes]:
        """What is sent, until the feed ends."""
        while True:
            self._reading = True
            payload = await self._queue.get()
            self._reading = False
            if payload is None:
                return
            yield payload


class Feed:
    """All watchers of one process. `picture` makes a fresh picture, `hello` is what each watcher is
    told first."""

    def __init__(self, source: Source, picture: Callable[[], Picture], hello: Message) -> None:
        self._source = source
        self._new_picture = picture
        self._hello = hello
        self._watchers: set[Watcher] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def watched(self) -> int:
        """How many watch."""
        return len(self._watchers)

    def join(self) -> Watcher:
        """One more watches. `TooManyWatchersError`"""
        if len(self._watchers) >= WATCHERS_MAX:
            raise TooManyWatchersError(
                f"{WATCHERS_MAX} pages watch already; close one and try again"
            )
        watcher = Watcher()
        self._watchers.add(watcher)
        metrics.UI_WATCHERS.set(len(self._watchers))
        if self._task is None or self._task.done():
            work = keep_running("The page's feed", self._run, logger)
            self._task = asyncio.create_task(work, name="llumnix-feed")
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """It does not watch any more."""
        self._watchers.discard(watcher)
        metrics.UI_WATCHERS.set(len(self._watchers))
        if not self._watchers and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        picture, cursor = self._new_picture(), dict[str, int]()
        for watcher in self._watchers:  # They know nothing of this picture.
            watcher.behind = True
        while self._watchers:
            began_s = time.monotonic()
            if self._source.stopping():
                for watcher in self._watchers:
                    watcher.put(None)
                return
            try:
                look, deployment = await asyncio.gather(
                    self._source.look(cursor), self._source.deployment()
                )
            except HTTPException as error:  # Another process is late.
                logger.debug("the page's feed leaves out a look: %s", error.detail)
            else:
                # A process that did not answer this time goes on where it was.
                cursor |= look.cursor
                now_s = round(time.time(), 3)
                self._send(picture, picture.take(look, deployment, now_s), now_s)
            await asyncio.sleep(max(0.0, began_s + LOOK_EVERY_S - time.monotonic()))

    def _send(self, picture: Picture, changed: Sequence[Message], now_s: float) -> None:
        known = [w for w in self._watchers if not w.behind]
        fresh = [w for w in self._watchers if w.takes_all]
        if changed and known:
            payload = encoded(changed)
            for watcher in known:
                watcher.put(payload)
        if not fresh:
            return
        whole = encoded(picture.whole(now_s))
        start = encoded([self._hello, picture.history(now_s)]) if any(w.new for w in fresh) else b""
        for watcher in fresh:
            watcher.put(start + whole if watcher.new else whole)
            watcher.behind = watcher.new = False


def encoded(messages: Iterable[Message]) -> bytes:
    """As server-sent events. JSON has no line break of its own."""
    parts = (
        b"event: %b\ndata: %b\n\n" % (event.encode(), _encoder.encode(data))
        for event, data in messages
    )
    return b"".join(parts)
