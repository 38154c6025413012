"""A deployment with several frontends: this process is the office, and speaks no HTTP itself."""

import asyncio
import contextlib
import signal
from collections.abc import Callable
from typing import Any

from llumnix.cluster import signals
from llumnix.cluster.addresses import Addresses
from llumnix.cluster.fleet import Fleet
from llumnix.cluster.frontends.desk import Desk
from llumnix.cluster.frontends.office import Office
from llumnix.cluster.frontends.processes import FrontendProcesses
from llumnix.cluster.start import Start
from llumnix.engine.launch import EngineLaunch
from llumnix.errors import InstanceFailedError, LlumnixError, UsageError
from llumnix.frontend.arguments import ServeCommand
from llumnix.frontend.controller_link import ControllerLink
from llumnix.frontend.engines.sockets import ClientPlace
from llumnix.frontend.http.server import HTTP_CLOSE_TIMEOUT_S, say_stopping
from llumnix.frontend.llm import Beside
from llumnix.frontend.office.adapters import of_command_line
from llumnix.frontend.office.engine_client import EngineClient
from llumnix.frontend.office.messages import HowManyRun
from llumnix.frontend.office.process import FrontendStart
from llumnix.observe.console import say

END_TIMEOUT_S = HTTP_CLOSE_TIMEOUT_S + 5.0
"""So long a frontend may take to end after its last request."""


class Deployment:
    """All parts of one, for as long as it runs."""

    def __init__(
        self,
        command: ServeCommand,
        launch: EngineLaunch,
        addresses: Addresses,
        start: Start,
        undo: contextlib.ExitStack,
    ) -> None:
        """`undo` gets what closes the parts."""
        self._command, self._addresses, self._start = command, addresses, start
        deployment, count = command.deployment, command.args.api_server_count
        self._count = count
        client = EngineClient(
            command.vllm_config, self._place(0), deployment.slots, keys=addresses.keys
        )
        undo.callback(client.close_sockets)
        client.listen()
        link = ControllerLink(addresses.controller, addresses.keys)
        link.start()
        undo.callback(link.close)
        self.office = Office(client, link, addresses.office, count, deployment.slots)
        self.office.start()
        undo.callback(self.office.close)
        self.fleet = Fleet(self.office, launch, addresses, deployment)
        self.reloading = command.reloading(self.fleet.take_settings)
        self.desk = Desk(self.office, self.fleet, self.reloading)
        self.processes = FrontendProcesses(self.office, count, self._frontend)
        self._changed = asyncio.Event()
        self.office.on_serving = self._serving
        self.stop_asked = asyncio.Event()
        self.hurried = asyncio.Event()  # set by a second signal

    def _place(self, client: int) -> ClientPlace:
        addresses = self._addresses
        return ClientPlace(
            input_address=addresses.inputs[client],
            output_address=addresses.outputs[client],
            listeners=addresses.listeners_of(client),
            index=client,
            count=self._count,
        )

    def _frontend(self, slot: int, client: int) -> FrontendStart:
        args, listener = self._command.args, self._start.listener
        assert listener is not None
        limited = getattr(args, "max_num_queued_reqs", None) is not None
        return FrontendStart(
            place=self._place(client),
            beside=Beside(
                count=self._count,
                slot=slot,
                admission=self.processes.admission if limited else None,
            ),
            args=args,
            vllm_config=self._command.vllm_config,
            deployment=self._command.deployment,
            office=self._addresses.office,
            controller=self._addresses.controller,
            keys=self._addresses.keys,
            url=listener.url,
            socket=listener.socket,
            loads=self.processes.loads,
        )

    def _serving(self) -> None:
        """One more frontend answers requests."""
        self._changed.set()

    # -- its life

    async def run(self) -> None:
        """Starts everything, and returns once it is to stop."""
        deployment, start = self._command.deployment, self._start
        self.processes.start()
        await self.fleet.check_capacity(deployment.instances, deployment.ray_wait, start.say)
        self.fleet.start_controller()
        await self.fleet.start(deployment.instances, start.say)
        try:
            await self.desk.load_all(of_command_line(self._command.args))
        except Exception as error:
            raise UsageError(f"--lora-modules: {error}") from error
        start.say(f"starting {self._count} frontends")
        self.office.open()
        loop = asyncio.get_running_loop()
        signals.pass_hangup_on(loop, self.desk.reload if self.reloading else None)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop_asked.set)
        await self._until_over(self._answer_at_the_port())

    async def _until_over(self, work: Any) -> None:
        """Does this until a stop is asked for, or nobody serves any more."""
        answering = asyncio.create_task(work)
        ends = [
            asyncio.create_task(event.wait())
            for event in (self.stop_asked, self.fleet.all_failed, self.processes.all_failed)
        ]
        try:
            done, _ = await asyncio.wait([answering, *ends], return_when=asyncio.FIRST_COMPLETED)
            if answering in done:
                answering.result()
        finally:
            for task in (answering, *ends):
                task.cancel()

    async def _answer_at_the_port(self) -> None:
        """Answers there while no frontend does."""
        listener, roster = self._start.listener, self.office.roster
        served = announced = False
        assert listener is not None
        while True:
            if roster.serving:
                served = True
                await asyncio.to_thread(listener.stop_answering)
            elif served:
                if announced:
                    self._start.progress.phase = "no frontend serves at the moment"
                    self._start.progress.code = "no_frontend"
                listener.answer()
            if roster.serving and roster.settled and not announced:
                # An instance may have died since all served; then another is asked a little later.
                tasks = await self.office.engine_client.tasks_if_any()
                if tasks is not None:
                    announced, how = True, f" with {roster.serving} frontends"
                    self._start.announce(self._command.args, tasks, how)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._changed.wait()
            self._changed.clear()

    async def stop(self) -> None:
        """Lets the open requests end. A second signal stops at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._second)
        self.office.leaving = True
        timeout_s = self._command.vllm_config.shutdown_timeout
        lame_duck_s = self._command.deployment.lame_duck
        gathered = await self.office.ask_all(HowManyRun())
        say_stopping(sum(gathered.answers.values()), timeout_s, lame_duck_s)
        await self._be_lame_duck(lame_duck_s)
        await self.processes.stop(timeout_s + END_TIMEOUT_S)

    async def _be_lame_duck(self, lame_duck_s: float) -> None:
        """Waits while requests are still let in, but not if none could be served, and no longer
        than until a second signal."""
        ends = [self.hurried, self.fleet.all_failed, self.processes.all_failed]
        waiting = [asyncio.create_task(event.wait()) for event in ends]
        await asyncio.wait(waiting, timeout=lame_duck_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()

    def _second(self) -> None:
        say("stopping at once")
        self.hurried.set()
        self.processes.hurry(END_TIMEOUT_S)

    async def close(self) -> None:
        """Ends all of it."""
        self.processes.close()
        await self.fleet.close()


LOOK_EVERY_S = 0.1


async def run(command: ServeCommand, addresses: Addresses, start: Start) -> int:
    """Runs it until it is told to stop. `UsageError` if it cannot start, or ends by itself."""
    launch = EngineLaunch.of(
        command.vllm_config,
        addresses.inputs,
        addresses.outputs,
        log_stats=not command.args.disable_log_stats,
    )
    with contextlib.ExitStack() as undo:
        it = Deployment(command, launch, addresses, start, undo)
        fleet = it.fleet
        start.progress.instances = fleet.status
        start.serve_metrics(fleet.exposition.text, fleet.seen)
        try:
            await it.run()
            if it.stop_asked.is_set() or fleet.all_failed.is_set():
                await it.stop()
        except InstanceFailedError as error:
            start.crashed = True
            raise UsageError(str(error)) from error
        finally:
            start.note_losses(fleet.status())
            # From here on no signal interrupts: half a clean-up would leave processes and files.
            signals.ignore(asyncio.get_running_loop())
            await it.close()
    _raise_if_all_failed("instance", fleet.all_failed, lambda: fleet.status())
    _raise_if_all_failed(
        "frontend", it.processes.all_failed, lambda: list(it.office.roster.status())
    )
    say("stopped")
    return 0


def _raise_if_all_failed(what: str, failed: asyncio.Event, status: Callable[[], Any]) -> None:
    if failed.is_set():
        kind = UsageError if what == "instance" else LlumnixError
        raise kind(f"every {what} failed: " + "; ".join(s.why or "" for s in status()))
