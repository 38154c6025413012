"""Keeps one controller running: a Ray actor that is started again when it ends or hangs.

Ray's own restart does not serve: it comes at once, however often the actor dies, it is not logged,
and Ray does not notice a process that hangs. `keep_running` makes the pauses and logs.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray

from llumnix.cluster.ray_calls import off_loop, ray_call
from llumnix.errors import LlumnixError
from llumnix.frontend.controller_link import ControllerLink
from llumnix.tasks import keep_running
from llumnix.wire import Pong

logger = logging.getLogger("llumnix.controller")

PING_EVERY_S = 1.0
UNANSWERED_MAX = 10
"""So many pings in a row without an answer, each after `PING_EVERY_S`, and the controller hangs."""
FIRST_ANSWER_S = 60.0
"""How long a new process may take until its first answer."""
STOP_TIMEOUT_S = 1.0
TOLD_EVERY_S = 10.0


class ControllerEndedError(LlumnixError):
    """The controller has ended or hangs, though nobody asked it to stop."""


class ControllerProcess:
    """The controller of one deployment, over all its processes. `create` starts an actor with the
    methods of `Controller`; `kill` ends one at once."""

    def __init__(
        self,
        create: Callable[[], Any],
        link: ControllerLink,
        kill: Callable[[Any], None] = ray.kill,
    ) -> None:
        self._create = create
        self._link = link
        self._kill = kill
        self._task: asyncio.Task[None] | None = None
        self._told: tuple[int, float] = (0, -TOLD_EVERY_S)
        self.starts = 0  # processes so far

    def start(self) -> None:
        """Starts it, and keeps it running until `close`."""
        keeping = keep_running("The controller", self._keep_one, logger)
        self._task = asyncio.create_task(keeping, name="llumnix-controller")

    async def close(self) -> None:
        """Stops it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _keep_one(self) -> None:
        actor = await off_loop(self._create)
        self.starts += 1
        ended = asyncio.wrap_future(actor.run.remote().future())
        pid = asyncio.wrap_future(actor.pid.remote().future())
        for future in (ended, pid):  # Else asyncio would warn when nobody awaits one that fails.
            future.add_done_callback(lambda it: it.cancelled() or it.exception())
        hangs = False
        try:
            await self._watch(ended)
        except _HangsError:
            hangs = True
            raise
        finally:
            await self._end(actor, ended, pid, hangs)

    async def _watch(self, ended: asyncio.Future[None]) -> None:
        """Watches the controller; never returns, and raises once it has ended or hangs."""
        loop = asyncio.get_running_loop()
        began_s, answered, unanswered = loop.time(), False, 0
        while True:
            pong, _ = await asyncio.gather(
                self._link.ping(PING_EVERY_S), asyncio.wait({ended}, timeout=PING_EVERY_S)
            )
            if ended.done():
                try:
                    ended.result()
                except ray.exceptions.RayActorError as error:
                    raise ControllerEndedError("its process has died") from error
                raise ControllerEndedError("it has ended though nobody stopped it")
            if pong is not None:
                answered, unanswered = True, 0
                self._tell(pong, loop.time())
            elif answered:
                unanswered += 1
            if unanswered >= UNANSWERED_MAX:
                raise _HangsError(f"it has not answered {unanswered} times in a row")
            if not answered and loop.time() - began_s > FIRST_ANSWER_S:
                raise _HangsError(f"it was not there after {FIRST_ANSWER_S:.0f} s")

    async def _end(
        self, actor: Any, ended: asyncio.Future[None], pid: asyncio.Future[int], hangs: bool
    ) -> None:
        """Ends the process. Ray's kill is a message to it, which a process that hangs may not
        read."""
        if not ended.done() and not hangs:
            actor.stop.remote()
            await asyncio.wait({ended}, timeout=STOP_TIMEOUT_S)
        if not ended.done() and pid.done() and not pid.cancelled() and pid.exception() is None:
            with suppress(ProcessLookupError):
                os.kill(pid.result(), signal.SIGKILL)
        await ray_call(self._kill, actor)

    def _tell(self, pong: Pong, now: float) -> None:
        """Logs here how many messages the controller could not handle, since nobody may read the
        controller's own log."""
        failed, told_s = self._told
        if pong.failed == failed or now - told_s < TOLD_EVERY_S:
            return
        self._told = pong.failed, now
        if pong.failed:  # Else it is another process, and has none.
            logger.error(
                "The controller could not handle %d messages so far, which is a bug; the last: %s",
                pong.failed,
                pong.story,
            )


class _HangsError(ControllerEndedError):
    pass
