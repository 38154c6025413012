"""The controller's process: hosts the pure scheduler behind one ZMQ socket.

It keeps nothing that the next reports would not tell a successor, so Ray may start it anew at any
time. Frontends and llumlets connect to an address that outlives it.
"""

import logging
import os
import time

import zmq

from llumnix.core.events import Decision, Fact, InstanceLost, LoadReported, RequestArrived
from llumnix.core.policies.dispatch import DISPATCH_POLICIES
from llumnix.core.scheduler import Scheduler
from llumnix.errors import ProtocolError
from llumnix.observe.event_log import EventLog
from llumnix.observe.wire import Loads, LoadsAsked, Message, Ping, Pong, decode, encode

logger = logging.getLogger("llumnix.controller")

POLL_MS = 200


class Controller:
    """Answers frontends and listens to llumlets at the given ZMQ addresses."""

    def __init__(self, addresses: list[str], policy: str, event_log: str | None = None) -> None:
        self._addresses = addresses
        self._log = EventLog(event_log, who=f"controller {os.getpid()}")
        self._log.started(policy)
        self._scheduler = Scheduler(DISPATCH_POLICIES[policy]())
        self._stopping = False

    def run(self) -> None:
        """Serves until `stop`."""
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            for address in self._addresses:
                socket.bind(address)
            while not self._stopping:
                if not socket.poll(POLL_MS):
                    continue
                sender, *payload = socket.recv_multipart()
                try:
                    replies = self._handle(decode(b"".join(payload)))
                except ProtocolError as error:
                    logger.error("%s", error)
                    continue
                for reply in replies:
                    socket.send_multipart((sender, encode(reply)), zmq.NOBLOCK)

    def stop(self) -> None:
        """Ends `run` within POLL_MS."""
        self._stopping = True

    def _decide(self, fact: Fact) -> list[Decision]:
        now = time.monotonic()
        decisions = self._scheduler.handle(fact, now)
        self._log.fact(fact, now)
        for decision in decisions:
            self._log.decision(decision, now)
        return decisions

    def _handle(self, message: Message) -> list[Message]:
        match message:
            case RequestArrived() | LoadReported() | InstanceLost():
                return list(self._decide(message))
            case Ping(number=number):
                return [Pong(number=number)]
            case LoadsAsked(number=number):
                reports = [view.report for view in self._scheduler.view]
                return [Loads(number=number, reports=reports)]
            case _:
                raise ProtocolError(f"not for the controller: {message}")
