"""The controller's process: hosts the pure scheduler behind one ZMQ socket.

It keeps nothing that the next reports would not tell a successor, so Ray may start it anew at any
time. Frontends and llumlets connect to an address that outlives it. Whatever has arrived is handled
at once, the news of instances before the requests, the urgent requests before the others.
"""

import gc
import logging
import os
import time

import zmq

from llumnix.core.events import (
    Dispatch,
    Fact,
    FleetReported,
    InstanceLost,
    LoadReported,
    MoveLoad,
    NoInstance,
    PrefixesChanged,
    RequestArrived,
    Tick,
)
from llumnix.core.scheduler import Scheduler, urgency
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import EngineIndex
from llumnix.errors import ProtocolError
from llumnix.observe.event_log import EventLog
from llumnix.observe.wire import Loads, LoadsAsked, Message, Ping, Pong, decode, encode

logger = logging.getLogger("llumnix.controller")

POLL_S = 0.2
TAKEN_AT_ONCE_MAX = 1000
_FACTS = (RequestArrived, LoadReported, PrefixesChanged, InstanceLost, FleetReported)


class Controller:
    """Answers frontends and listens to llumlets at the given ZMQ addresses."""

    def __init__(
        self, addresses: list[str], settings: SchedulerSettings, event_log: str | None = None
    ) -> None:
        self._addresses = addresses
        self._log = EventLog(event_log, who=f"controller {os.getpid()}")
        self._log.started(settings)
        self._scheduler = Scheduler(settings)
        self._tick_s = settings.migration.tick_s
        self._engines: dict[EngineIndex, bytes] = {}
        self._stopping = False

    def run(self) -> None:
        """Serves until `stop`. A bug ends the process, for Ray to start another that learns all
        anew: it calls this again after a death, but not after an exception."""
        try:
            self._serve()
        except Exception:
            logger.exception("The controller ends, to be started anew")
            logging.shutdown()
            os._exit(1)

    def _serve(self) -> None:
        # What was imported stays: to look through it for garbage would hold up a dispatch for long.
        gc.collect()
        gc.freeze()
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            for address in self._addresses:
                socket.bind(address)
            self._socket = socket
            next_tick_s = time.monotonic()
            while not self._stopping:
                wait_s = min(POLL_S, next_tick_s - time.monotonic())
                if socket.poll(max(0, round(wait_s * 1e3))):
                    for sender, message in self._taken():
                        self._handle(sender, message)
                if time.monotonic() >= next_tick_s:
                    next_tick_s = time.monotonic() + self._tick_s
                    self._decide(b"", Tick())

    def stop(self) -> None:
        """Ends `run` within POLL_S."""
        self._stopping = True

    def _taken(self) -> list[tuple[bytes, Message]]:
        """All that has arrived, in the order to handle it."""
        taken: list[tuple[bytes, Message]] = []
        while len(taken) < TAKEN_AT_ONCE_MAX:
            try:
                sender, *payload = self._socket.recv_multipart(zmq.NOBLOCK)
                taken.append((sender, decode(b"".join(payload))))
            except zmq.Again:
                break
            except ProtocolError as error:
                logger.error("%s", error)
        return sorted(taken, key=lambda pair: urgency(pair[1]))

    def _handle(self, sender: bytes, message: Message) -> None:
        match message:
            case LoadReported(report=report):
                self._engines[report.engine_index] = sender
                self._decide(sender, message)
            case InstanceLost(engine_index=engine_index):
                self._engines.pop(engine_index, None)
                self._decide(sender, message)
            case Ping(number=number):
                self._send(sender, Pong(number=number))
            case LoadsAsked(number=number):
                reports = [view.report for view in self._scheduler.view]
                self._send(sender, Loads(number=number, reports=reports))
            case _ if isinstance(message, _FACTS):
                self._decide(sender, message)
            case _:
                logger.error("not for the controller: %s", message)

    def _decide(self, sender: bytes, fact: Fact) -> None:
        """Handles a fact and sends each decision to who carries it out."""
        now = time.monotonic()
        decisions = self._scheduler.handle(fact, now)
        self._log.fact(fact, now)
        for decision in decisions:
            self._log.decision(decision, now)
            to: bytes | None = sender
            if isinstance(decision, MoveLoad):
                to = self._engines.get(decision.source_engine)
            elif not isinstance(decision, Dispatch | NoInstance):
                logger.info("%s", decision)
            if to is not None:
                self._send(to, decision)

    def _send(self, to: bytes, message: Message) -> None:
        self._socket.send_multipart((to, encode(message)), zmq.NOBLOCK)
