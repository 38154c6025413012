"""The feed of the page: what happens in the deployment, as server-sent events.

One task looks five times a second, while somebody watches, and sends the same bytes to all who want
the same. It begins with the first watcher and ends with the last. A watcher who does not read fast
enough is skipped, and gets all anew when it reads again. One that has lost its connection, and says
what it knows, gets only the rest if that is kept. Nothing happens on a token's path.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from starlette.exceptions import HTTPException

from llumnix.core.types import InstanceId
from llumnix.errors import LlumnixError
from llumnix.frontend.streams.look import Cursor, Look, joined, of_instance
from llumnix.frontend.ui.picture import HISTORY_KEPT, Deployment, Message, Picture
from llumnix.observe import metrics
from llumnix.tasks import keep_running

logger = logging.getLogger("llumnix.frontend")

WATCHERS_MAX = 16
RATE_MAX = 5
LOOK_EVERY_S = 1 / RATE_MAX
QUEUED_MAX = 10
"""So many messages wait for a watcher: two seconds' worth."""
MANY, MANY_EVERY_S = 64, 1.0
"""More instances than that are a grid on the page, and are looked at once a second: a thousand
reports cost as much as all streams."""
KEPT_MAX = 50
"""So many are kept for watchers who come back: ten seconds' worth."""
_encoder = msgspec.json.Encoder()


class TooManyWatchersError(LlumnixError):
    """Nobody else can watch now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What the feed looks at."""

    look: Callable[[Cursor], Awaitable[Look]]
    deployment: Callable[[], Awaitable[Deployment]]
    stopping: Callable[[], bool] = lambda: False  # whether a stop has begun; then the feed ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a watcher wants to be told."""

    rate: int = RATE_MAX  # so many times a second at most
    instance: InstanceId | None = None  # of this one alone

    @property
    def every_s(self) -> float:
        """Between two messages, at least."""
        return LOOK_EVERY_S * RATE_MAX / self.rate


class Watcher:
    """One page that is open. `since`: the number of the last state or delta that it has."""

    def __init__(self, wish: Wish, since: int | None) -> None:
        self.wish = wish
        self.since = since
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUED_MAX)
        self._reading = True  # whether it has taken all that came before
        self.welcome: Callable[[], bool] = lambda: True  # whether it may still watch
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


class Group:
    """Those who want the same, and get the same bytes."""

    def __init__(self, wish: Wish, picture: Picture, past: Iterable[dict[str, Any]]) -> None:
        self.wish = wish
        self.watchers: set[Watcher] = set()
        self._picture = picture
        # What its picture has not taken yet. The streams of the last look are enough.
        self._missed = [Look(notes=list(past), frontends=0)]
        self._due_s = 0.0
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=KEPT_MAX)

    def take(self, look: Look, deployment: Deployment, hello: Message, began_s: float) -> None:
        """Takes a look in, and tells its watchers if it is time."""
        if began_s < self._due_s - LOOK_EVERY_S / 2:
            self._missed.append(replace(look, streams=[], frontends=0))
            return
        self._due_s = began_s + self.wish.every_s
        look, self._missed = joined([*self._missed, look]), []
        if (only := self.wish.instance) is not None:
            look = of_instance(look, only, self._picture.requests)
            deployment = deployment.of(only)
        now_s = round(time.time(), 3)
        changed = self._picture.take(look, deployment, now_s)
        payload = encoded(changed)
        self._sent.append((self._picture.seq, payload))
        for watcher in self.watchers:
            if not watcher.behind and payload:
                watcher.put(payload)
        self._tell_all(hello, now_s)

    def _tell_all(self, hello: Message, now_s: float) -> None:
        """Tells those who are behind all that there is, or what they have missed."""
        fresh = [w for w in self.watchers if w.takes_all]
        if not fresh:
            return
        whole = encoded(self._picture.whole(now_s))
        start = b""
        if any(w.new for w in fresh):
            start = encoded([hello, self._picture.history(now_s)])
        for watcher in fresh:
            payload = start + whole if watcher.new else whole
            if watcher.new and watcher.since is not None:
                missed = self._since(watcher.since)
                payload = payload if missed is None else missed
            watcher.behind = watcher.new = False
            if payload:
                watcher.put(payload)

    def _since(self, seq: int) -> bytes | None:
        """What was sent after that number; None if not all of it is kept."""
        first = self._sent[0][0]
        if not first - 1 <= seq <= self._picture.seq:
            return None
        return b"".join(payload for number, payload in self._sent if number > seq)


class Feed:
    """All watchers of one process. `picture` makes a fresh picture, `hello` is what each watcher is
    told first."""

    def __init__(self, source: Source, picture: Callable[[], Picture], hello: Message) -> None:
        self._source = source
        self._new_picture = picture
        self._hello = hello
        self._groups: dict[Wish, Group] = {}
        self._past: deque[dict[str, Any]] = deque(maxlen=HISTORY_KEPT)
        self._last: tuple[float, Deployment | None] = 0.0, None  # when it was looked at
        self._task: asyncio.Task[None] | None = None

    @property
    def watched(self) -> int:
        """How many watch."""
        return sum(len(group.watchers) for group in self._groups.values())

    async def instances(self) -> list[InstanceId]:
        """Those that can be watched."""
        return [status.id for status in (await self._source.deployment()).statuses]

    def join(self, wish: Wish = Wish(), since: int | None = None) -> Watcher:
        """One more watches. `TooManyWatchersError`"""
        if self.watched >= WATCHERS_MAX:
            raise TooManyWatchersError(
                f"{WATCHERS_MAX} pages watch already; close one and try again"
            )
        watcher = Watcher(wish, since)
        group = self._groups.get(wish)
        if group is None:
            group = self._groups[wish] = Group(wish, self._new_picture(), self._past)
        group.watchers.add(watcher)
        metrics.UI_WATCHERS.set(self.watched)
        if self._task is None or self._task.done():
            work = keep_running("The page's feed", self._run, logger)
            self._task = asyncio.create_task(work, name="llumnix-feed")
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """It does not watch any more."""
        group = self._groups.get(watcher.wish)
        if group is not None:
            group.watchers.discard(watcher)
            if not group.watchers:
                del self._groups[watcher.wish]
        metrics.UI_WATCHERS.set(self.watched)
        if not self._groups and self._task is not None:
            self._task.cancel()
            self._task = None

    def turn_out(self) -> None:
        """Ends the feed of those who may not watch any more."""
        for group in self._groups.values():
            for watcher in group.watchers:
                if not watcher.welcome():
                    watcher.put(None)

    async def _deployment(self, now_s: float) -> Deployment:
        """The instances as they are, or as they were a moment ago if they are many."""
        last_s, last = self._last
        if last is None or len(last.statuses) <= MANY or now_s >= last_s + MANY_EVERY_S:
            last = await self._source.deployment()
            self._last = now_s, last
        return last

    async def _run(self) -> None:
        self._last = 0.0, None
        cursor = dict[str, int]()
        self._past.clear()
        for wish, before in self._groups.items():
            group = self._groups[wish] = Group(wish, self._new_picture(), ())
            group.watchers = before.watchers
            for watcher in group.watchers:  # They know nothing of this picture.
                watcher.behind = True
        while self._groups:
            began_s = time.monotonic()
            if self._source.stopping():
                for group in self._groups.values():
                    for watcher in group.watchers:
                        watcher.put(None)
                return
            try:
                look, deployment = await asyncio.gather(
                    self._source.look(cursor), self._deployment(began_s)
                )
            except HTTPException as error:  # Another process is late.
                logger.debug("the page's feed leaves out a look: %s", error.detail)
            else:
                # A process that did not answer this time goes on where it was.
                cursor |= look.cursor
                for group in self._groups.values():
                    group.take(look, deployment, self._hello, began_s)
                self._past.extend(look.notes)
            # All that want little are looked for as seldom as the quickest of them wants.
            every_s = min((wish.every_s for wish in self._groups), default=LOOK_EVERY_S)
            await asyncio.sleep(max(0.0, began_s + every_s - time.monotonic()))


def encoded(messages: Iterable[Message]) -> bytes:
    """As server-sent events. JSON has no line break of its own."""
    parts = (
        b"event: %b\ndata: %b\n\n" % (event.encode(), _encoder.encode(data))
        for event, data in messages
    )
    return b"".join(parts)
