"""The controller's process: hosts the pure scheduler behind one ZMQ socket.

A successor learns all that the controller knows from the next reports, so the controller may be
started again at any time (cluster/controller_process.py). Frontends and llumlets connect to an
address that outlives it. All messages that have arrived are handled together: reports of instances
first, then urgent requests, then the others. A message that makes no sense is refused. A message
that brings a bug to light ends alone. Both are counted, and logged at most every `TOLD_EVERY_S`.
"""

import contextlib
import gc
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import zmq

from llumnix.cluster import ray_runtime
from llumnix.config import LogPlace
from llumnix.core.events import (
    Dispatch,
    Fact,
    FleetReported,
    InstanceLost,
    LoadReported,
    MoveOrder,
    NoInstance,
    PrefixesChanged,
    RequestArrived,
    SettingsChanged,
    Tick,
)
from llumnix.core.scheduling.scheduler import STORY_MAX, Scheduler, handling_key
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.errors import ProtocolError
from llumnix.observe.console import log_to_stderr
from llumnix.observe.event_log import EventLog
from llumnix.sockets import Listening, SocketKeys
from llumnix.wire import Loads, LoadsAsked, Message, Ping, Pong, decode, encode

logger = logging.getLogger("llumnix.controller")

POLL_S = 0.2
TAKEN_AT_ONCE_MAX = 1000
FAILURES_MAX = 20
TOLD_EVERY_S = 10.0
_FACTS = (RequestArrived, LoadReported, PrefixesChanged, InstanceLost, FleetReported)


class Faults:
    """Counts faults of one kind, and logs the newest at most every `TOLD_EVERY_S`."""

    def __init__(self, what: str, *, traceback: bool) -> None:
        self._what = what
        self._traceback = traceback
        self._told_s = -TOLD_EVERY_S
        self.count = 0
        self.story = ""

    def note(self, error: Exception) -> None:
        """Counts one more."""
        self.count += 1
        self.story = f"{type(error).__name__}: {error}"[:STORY_MAX]
        now = time.monotonic()
        if now - self._told_s >= TOLD_EVERY_S:
            self._told_s = now
            trace = error if self._traceback else None
            logger.error("%d %s; the last: %s", self.count, self._what, self.story, exc_info=trace)


class Controller:
    """Answers frontends and listens to llumlets at the given ZMQ addresses."""

    def __init__(
        self,
        addresses: list[str],
        settings: SchedulerSettings,
        event_log: LogPlace | None = None,
        keys: SocketKeys | None = None,
        log_format: str | None = None,
        log: tuple[str, str] | None = None,
    ) -> None:
        """`log_format`: how lines of the log look, in a process that has no other log. `log`: where
        they are kept, a folder and a name."""
        no_log = None if log is None else ray_runtime.keep_log(*log)
        if log_format is not None:
            log_to_stderr(log_format, process="controller")
        if no_log is not None:
            logger.warning("The controller keeps no log: %s", no_log)
        self._addresses = addresses
        self._keys = keys
        self._log = EventLog(event_log, who=f"controller {os.getpid()}")
        self._log.started(settings)
        self._scheduler = Scheduler(settings)
        self._tick_s = settings.migration.interval_s
        self._next_tick_s = time.monotonic()
        self._engines: dict[EngineIndex, bytes] = {}
        self._refused = Faults("messages that make no sense were refused", traceback=False)
        self._failed = Faults("messages could not be handled, which is a bug", traceback=True)
        self._forgotten: dict[InstanceId, Faults] = {}
        self._in_a_row: dict[str, int] = {}
        self._busy_s = 0.0
        self._facts: Counter[str] = Counter()
        self._stopping = False

    def run(self) -> None:
        """Serves until `stop`, or until a bug ends it and a successor takes its place."""
        # Imported modules stay. To search them for garbage would delay a dispatch for long.
        gc.collect()
        gc.freeze()
        with (
            contextlib.closing(self._log),
            zmq.Context() as context,
            contextlib.closing(Listening(context, self._keys)) as listening,
            context.socket(zmq.ROUTER) as socket,
        ):
            socket.setsockopt(zmq.LINGER, 0)
            for address in self._addresses:
                listening.bind(socket, address)
            self._socket = socket
            while not self._stopping:
                wait_s = min(POLL_S, self._next_tick_s - time.monotonic())
                if socket.poll(max(0, round(wait_s * 1e3))):
                    for sender, message in self._taken():
                        self._guarded(message, partial(self._handle, sender, message))
                if time.monotonic() >= self._next_tick_s:
                    self._next_tick_s = time.monotonic() + self._tick_s
                    self._guarded(Tick(), partial(self._decide, b"", Tick()))

    def pid(self) -> int:
        """The id of this process."""
        return os.getpid()

    def stop(self) -> None:
        """Ends `run` within POLL_S."""
        self._stopping = True

    def _taken(self) -> list[tuple[bytes, Message]]:
        """The messages that have arrived, in the order in which to handle them."""
        taken: list[tuple[bytes, Message]] = []
        for _ in range(TAKEN_AT_ONCE_MAX):
            try:
                sender, *payload = self._socket.recv_multipart(zmq.NOBLOCK)
                taken.append((sender, decode(b"".join(payload))))
            except zmq.Again:
                break
            except ProtocolError as error:
                self._refused.note(error)
        return sorted(taken, key=lambda pair: handling_key(pair[1]))

    def _guarded(self, what: Message | Tick, work: Callable[[], None]) -> None:
        """Does what one message asks for. An exception ends that message alone, and is counted.
        `FAILURES_MAX` exceptions in a row over one kind of message end the process, because its
        state may be broken."""
        kind = type(what).__name__
        try:
            work()
            self._in_a_row[kind] = 0
        except ProtocolError as error:
            self._refused.note(error)
        except Exception as error:
            self._in_a_row[kind] = self._in_a_row.get(kind, 0) + 1
            if self._in_a_row[kind] >= FAILURES_MAX:
                raise
            self._failed.note(error)
            if isinstance(what, LoadReported):
                self._forget(what.report.instance, error)

    def _forget(self, instance: InstanceId, error: Exception) -> None:
        """Drops what is known of an instance, since its report may be half taken in."""
        self._scheduler.view.forget(instance)
        what = (
            f"reports of instance {instance} could not be handled, so it is unknown until its next"
        )
        self._forgotten.setdefault(instance, Faults(what, traceback=False)).note(error)

    def _handle(self, sender: bytes, message: Message) -> None:
        match message:
            case LoadReported(report=report):
                self._decide(sender, message)
                known = self._scheduler.view.get(report.instance)
                if known is not None and known.report.engine_index == report.engine_index:
                    self._engines[report.engine_index] = sender
            case InstanceLost(engine_index=engine_index):
                self._decide(sender, message)
                self._engines.pop(engine_index, None)
            case RequestArrived(request=request):
                try:
                    self._decide(sender, message)
                except Exception:
                    # The frontend need not wait for a time-out: it places the request itself.
                    why = "the controller failed on it"
                    self._send(sender, NoInstance(request=request, why=why))
                    raise
            case Ping(number=number):
                pong = Pong(
                    number=number,
                    refused=self._refused.count,
                    failed=self._failed.count,
                    story=self._failed.story,
                )
                self._send(sender, pong)
            case LoadsAsked(number=number):
                reports = [view.report for view in self._scheduler.view]
                loads = Loads(
                    number=number,
                    reports=reports,
                    busy_s=self._busy_s,
                    facts=dict(self._facts),
                    log_dropped=self._log.dropped,
                )
                self._send(sender, loads)
            case SettingsChanged(settings=settings):
                if settings != self._scheduler.settings:  # The fleet says it again and again.
                    self._decide(sender, message)
                    self._tick_s = settings.migration.interval_s
                    soon_s = time.monotonic() + self._tick_s
                    self._next_tick_s = min(self._next_tick_s, soon_s)
            case _ if isinstance(message, _FACTS):
                self._decide(sender, message)
            case _:
                raise ProtocolError(f"not for the controller: {str(message)[:STORY_MAX]}")

    def _decide(self, sender: bytes, fact: Fact) -> None:
        """Handles a fact, and sends each decision to the process that carries it out."""
        now = time.monotonic()
        self._facts[type(fact).__name__] += 1
        try:
            decisions = self._scheduler.handle(fact, now)
        except ProtocolError:
            raise
        except Exception as error:
            self._log.failed(fact, now, f"{type(error).__name__}: {error}"[:STORY_MAX])
            raise
        self._busy_s += time.monotonic() - now
        self._log.fact(fact, now, answered=bool(decisions), heard=self._scheduler.heard)
        for decision in decisions:
            self._log.decision(decision, now)
            to: bytes | None = sender
            if isinstance(decision, MoveOrder):
                to = self._engines.get(decision.source_engine)
            elif not isinstance(decision, Dispatch | NoInstance):
                logger.info("%s", decision)
            if to is not None:
                self._send(to, decision)

    def _send(self, to: bytes, message: Message) -> None:
        self._socket.send_multipart((to, encode(message)), zmq.NOBLOCK)
