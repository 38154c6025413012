"""The process of one frontend of several: vLLM's application over all engines, and no fleet.

It ends when the office ends, by whichever way that goes. Signals that stop a service are blocked
in it until the office says stop: a terminal and a service manager send them to every process.
"""

import argparse
import asyncio
import contextlib
import logging
import multiprocessing
import os
import select
import signal
import socket
from dataclasses import dataclass, field
from typing import Any

import setproctitle
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.exceptions import EngineDeadError

from llumnix.config import DeploymentConfig
from llumnix.core.scheduling.presets import POLICIES, priorities_of
from llumnix.errors import LlumnixError
from llumnix.frontend.checks import check_server_args
from llumnix.frontend.client import FleetClient
from llumnix.frontend.controller_link import ControllerLink
from llumnix.frontend.engines.sockets import ClientPlace
from llumnix.frontend.http.server import serve
from llumnix.frontend.llm import Beside, FleetLLM
from llumnix.frontend.office.adapters import Adapters
from llumnix.frontend.office.link import OfficeLink
from llumnix.frontend.office.messages import (
    AdaptersAre,
    DoYouHave,
    EngineDied,
    EngineSaid,
    FleetWants,
    HowManyRun,
    KeysAre,
    Message,
    MoveYours,
    QuarantineIs,
    Question,
    Serving,
    StopAsked,
    TurnIs,
    WhoIsAccused,
    YourLook,
    YourMigrations,
    YourRequest,
    YourRequests,
)
from llumnix.frontend.office.mirror import Mirror
from llumnix.frontend.office.through_office import OfficeControl, OfficeOthers
from llumnix.frontend.own_streams import MoveAsked, OwnStreams
from llumnix.observe.console import log_to_stderr
from llumnix.observe.event_log import EventLog
from llumnix.sockets import SocketKeys

logger = logging.getLogger("llumnix.frontend")

ENGINES_WAIT_S = 3.0
ENGINES_POLL_S = 0.02
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendStart:
    """What a frontend's process is started with."""

    place: ClientPlace  # among the clients of the engines
    beside: Beside
    args: argparse.Namespace
    vllm_config: Any
    deployment: DeploymentConfig
    office: str  # ZMQ address
    controller: str  # ZMQ address
    keys: SocketKeys | None = field(repr=False)
    url: str  # where clients find the server
    socket: socket.socket  # on which the server listens
    loads: Any  # vLLM's shared array of open connections, by slot


class SharedListener:
    """The listening socket, which the office has opened and all frontends share."""

    def __init__(self, url: str, listening: socket.socket) -> None:
        self.url, self.socket = url, listening

    def stop_answering(self) -> None:
        """The office does that, where it matters."""

    def close(self) -> None:
        """Accepts no more here. Others go on."""
        self.socket.close()


def run(start: FrontendStart) -> None:
    """Runs a frontend, in a process that was forked for it, until the office says stop."""
    import uvloop

    if select.select([_office()], [], [], 0)[0]:
        return  # It ended before this process began.
    os.setsid()
    setproctitle.setproctitle(f"llumnix: frontend {start.beside.slot}")
    log_to_stderr(start.deployment.log_format, process=f"frontend f{start.beside.slot}")
    start.vllm_config.parallel_config._api_process_rank = start.beside.slot
    try:
        check_server_args(start.args)  # Imports parsers.
        uvloop.run(Frontend(start).run())
    except LlumnixError as error:
        logger.error("A frontend ends: %s", error)
        raise SystemExit(1) from error


class Frontend:
    """This process."""

    def __init__(self, start: FrontendStart) -> None:
        self._start = start
        self._stopping = self._serving = False
        self._opened = asyncio.Event()  # set once requests are to be let in

    async def run(self) -> None:
        """Serves until it is told to stop."""
        start, loop = self._start, asyncio.get_running_loop()
        loop.add_reader(_office(), _office_ended)
        event_log = EventLog(start.deployment.log_place, who=f"frontend {os.getpid()}")
        self._client = _client(start, event_log)
        self._llm = _llm(start, self._client)
        self._mirror = Mirror(self._llm)
        self._streams = OwnStreams(self._client)
        self._link = OfficeLink(start.office, start.place.index, self._mirror.held)
        others = OfficeOthers(self._link)
        self._adapters = Adapters(others.unload_adapter)
        self._client.others = others
        self._client.take_turn(False)
        self._link.start(self._take, self._answer)
        try:
            await self._opened.wait()
            await self._until_engines()
            if not self._stopping:
                await self._serve()
        finally:
            self._llm.shutdown()
            self._client.close()
            self._link.close()
            event_log.close()

    async def _until_engines(self) -> None:
        """Returns once an engine can be asked, and all of them, if they come soon. They look seldom
        for a client that has not been there."""
        loop, joined = asyncio.get_running_loop(), self._client.shared_state.joined
        began_s = loop.time()
        while not self._stopping:
            up = {e.engine_index for e in self._client.engines.up()} & joined
            if up and (up == joined or loop.time() - began_s > ENGINES_WAIT_S):
                # vLLM's application asks for this first, and ends without an answer. An engine that
                # is in a long step or call gives none for so long.
                with contextlib.suppress(EngineDeadError, GracefulHTTPError):
                    await self._llm.get_supported_tasks()
                    return
            await asyncio.sleep(ENGINES_POLL_S)

    async def _serve(self) -> None:
        start = self._start
        # The office has loaded the adapters of the command line, and tells which there are.
        args = argparse.Namespace(**{**vars(start.args), "lora_modules": None})
        await serve(
            self._llm,
            OfficeControl(self._link, self._streams),
            SharedListener(start.url, start.socket),
            args,
            self._announce,
            on_state=lambda state: self._adapters.attach(state.openai_serving_models),
            peer_loads=(start.loads, start.beside.slot),
        )

    async def _announce(self) -> None:
        self._serving = True
        if self._stopping:
            _signal_self()
        else:
            self._link.send(Serving())

    # -- what the office says

    async def _take(self, message: Message) -> None:
        match message:
            case FleetWants():
                await self._mirror.apply(message)
                self._link.say_now()
                if message.open:
                    self._opened.set()
            case TurnIs(mine=mine):
                self._client.take_turn(mine)
            case EngineSaid(frames=frames):
                self._client.take_in(frames)
            case StopAsked():
                self._stop()

    def _stop(self) -> None:
        if self._stopping:
            self._llm.stop_now()
            return
        self._stopping = True
        self._opened.set()
        if self._serving:
            _signal_self()

    async def _answer(self, question: Question) -> Any:
        client = self._client
        match question:
            case EngineDied():
                return await self._mirror.died(question)
            case WhoIsAccused(engine_index=engine, among=among):
                suspects = None if among is None else frozenset(among)
                return sorted(client.accused(engine, suspects))
            case QuarantineIs(quarantined=quarantined):
                client.quarantine.release(None)
                for one in quarantined:
                    client.quarantine.add(one)
            case KeysAre(keys=keys):
                self._start.args.access.ring.replace(keys)
            case AdaptersAre(adapters=adapters):
                self._adapters.set(adapters)
            case YourRequests():
                return self._streams.rows()
            case YourLook(since=since):
                return self._streams.look(since)
            case YourRequest(name=name):
                return self._streams.row(name)
            case DoYouHave(name=name):
                return self._streams.named(name)
            case MoveYours(request_id=request_id, destination=destination, copy=copy):
                order = MoveAsked(request_id=request_id, destination=destination, copy=copy)
                return await self._streams.move(order)
            case YourMigrations(name=name):
                return self._streams.migrations(name)
            case HowManyRun():
                return self._llm.running()
        return None


def _client(start: FrontendStart, event_log: EventLog) -> FleetClient:
    deployment, args = start.deployment, start.args
    client = FleetClient(
        start.vllm_config,
        start.place,
        ControllerLink(start.controller, start.keys, f"f{start.beside.slot}"),
        deployment.slots,
        event_log,
        priorities_of(deployment.scheduler, keyed=args.access.keyed),
        hash_prefixes=POLICIES[deployment.scheduler.policy].looks_at_caches,
        policy=deployment.scheduler.policy,
        keys=start.keys,
        survival=deployment.scheduler.survival,
    )
    client.start()
    return client


def _llm(start: FrontendStart, client: FleetClient) -> FleetLLM:
    args = start.args
    return FleetLLM(
        start.vllm_config,
        client,
        log_stats=not args.disable_log_stats,
        log_requests=args.enable_log_requests,
        aggregate_engine_logging=args.aggregate_engine_logging,
        on_stopping=lambda llm: None,  # The office says that, for all.
        beside=start.beside,
    )


def _office() -> int:
    """What can be read once the office has ended."""
    office = multiprocessing.parent_process()
    assert office is not None
    return int(office.sentinel)


def _office_ended() -> None:
    # At once: engines and controller are the office's, and end with it.
    os._exit(1)


def _signal_self() -> None:
    """Has vLLM's server stop as on a first SIGTERM."""
    while signal.sigtimedwait(STOP_SIGNALS, 0) is not None:
        continue  # One that came to all processes is no second one.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    os.kill(os.getpid(), signal.SIGTERM)
