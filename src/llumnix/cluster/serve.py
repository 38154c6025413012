"""`llumnix serve`: starts the parts in order, and stops them in the reverse order."""

import asyncio
import contextlib
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

from llumnix.cluster import ray_runtime, signals
from llumnix.cluster.addresses import Addresses
from llumnix.cluster.first_look import first_look, has_key, help_text, log_format
from llumnix.cluster.kept_logs import keep_logs
from llumnix.cluster.start import Start
from llumnix.core.scheduling.presets import POLICIES, priorities_of
from llumnix.core.supervision.frontends import clients
from llumnix.demo import cache_folder
from llumnix.engine.folders import keep_memory_swept, leave_memory, name_shared_memory, sweep
from llumnix.errors import InstanceFailedError, UsageError
from llumnix.frontend.arguments import (
    ServeCommand,
    parse,
    refuse_strangers,
    settle_variables,
)
from llumnix.observe import shared_metrics
from llumnix.observe.console import log_to_stderr, say
from llumnix.observe.event_log import EventLog
from llumnix.observe.lines import Captured
from llumnix.sockets import check_encryption


def serve(argv: list[str]) -> int:
    """Runs until it is told to stop; returns the exit status. `UsageError` on bad input."""
    if {"--help", "-h"} & set(argv):
        print(help_text(), end="")
        return 0
    start = Start()
    signals.interrupt()
    signals.ignore_at_end()
    # vLLM's many lines at the start would hide ours. A user who sets the level gets all of them.
    logs = "VLLM_LOGGING_LEVEL" in os.environ
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    settle_variables()
    captured = _log(log_format(argv))
    try:
        seen = first_look(argv)
        refuse_strangers(seen, keyed=has_key(seen), insecure=seen.insecure)
        start.listen(seen)
        # Ray reads its variables as it is imported, and vLLM imports it.
        ray_runtime.settle(local=seen.ray_address is None)
        ray_runtime.hide_arguments(argv)
        start.say("loading vLLM")
        command = parse(argv, start.say)
        start.listen(command.args)
        assert start.listener is not None
        command.args.port = start.listener.port
        start.progress.ready_min = command.deployment.ready_min
        start.take_metrics_port(command.args)
        return _with_ray(command, _open_event_log(command), start, logs)
    except KeyboardInterrupt:
        say("stopped before it served")
        return 130
    finally:
        signals.ignore()
        start.close()
        if captured is not None:
            captured.close()


def _log(form: str) -> Captured | None:
    """Has lines come out in this form. What is returned is to be closed at the end."""
    log_to_stderr(form)
    return Captured("main") if form == "json" else None


def _open_event_log(command: ServeCommand) -> EventLog:
    place = command.deployment.log_place
    try:
        return EventLog(place, who=f"frontend {os.getpid()}", must_open=True)
    except OSError as error:
        raise UsageError(
            f"--event-log {command.deployment.event_log} cannot be written ({error.strerror}); "
            "name a file that can"
        ) from error


def _with_ray(command: ServeCommand, event_log: EventLog, start: Start, logs: bool) -> int:
    joined, several = command.deployment.ray_address, command.args.api_server_count > 1
    known = clients(command.args.api_server_count)
    addresses = None
    sweep(Path(tempfile.gettempdir()))
    sweep(Path("/tmp"))
    keep_memory_swept()
    try:
        if joined:
            check_encryption()
            start.say(f"joining Ray at {joined}")
            ray_runtime.join(joined, logs=logs)
            warning = ray_runtime.warning_without_token(joined)
            if warning is not None and not command.deployment.insecure:
                start.say(warning)
            addresses = Addresses.make(ray_runtime.node_address(), known)
        else:
            start.say("starting Ray on this machine")
            addresses = Addresses.make(None, known)
            with signals.kept_from_children():
                ray_runtime.start_local(addresses.folder.path / "ray", logs=logs)
        signals.interrupt()  # Again, since Ray has installed a SIGTERM handler of its own.
        # vLLM's Unix sockets between engine and workers belong into our folder too.
        os.environ["VLLM_RPC_BASE_PATH"] = str(addresses.folder.path)
        name_shared_memory()
        import uvloop

        if several:
            # Before any metric is made, which those modules do.
            shared_metrics.share(addresses.folder.path / "metrics")
            from llumnix.cluster.several import run

            event_log.close()  # Each frontend has its own.
            return uvloop.run(run(command, addresses, start))
        return uvloop.run(_run(command, event_log, addresses, start))
    finally:
        signals.ignore()
        ray_runtime.stop()
        if addresses is not None:
            if start.crashed and not joined:
                _keep_logs(addresses.folder.path / "ray")
            addresses.remove()
        leave_memory()


def _keep_logs(ray_folder: Path) -> None:
    try:
        say(f"an instance was lost; what it logged is in {keep_logs(ray_folder, cache_folder())}")
    except (OSError, UsageError) as error:
        say(f"an instance was lost; its log could not be kept: {error}")


async def _run(
    command: ServeCommand, event_log: EventLog, addresses: Addresses, start: Start
) -> int:
    from llumnix.cluster.fleet import Fleet
    from llumnix.cluster.frontends.own import OwnFrontend
    from llumnix.engine.launch import EngineLaunch
    from llumnix.frontend.http.control import OwnControl
    from llumnix.frontend.http.server import serve as serve_http

    args, deployment = command.args, command.deployment
    launch = EngineLaunch.of(
        command.vllm_config,
        addresses.inputs,
        addresses.outputs,
        log_stats=not args.disable_log_stats,
    )
    with contextlib.ExitStack() as undo:
        undo.callback(event_log.close)
        llm = _client(command, event_log, addresses, undo)
        fleet = Fleet(OwnFrontend(llm), launch, addresses, deployment)
        start.progress.instances = fleet.status
        start.serve_metrics(fleet.exposition.text, fleet.seen)
        failed = None
        try:
            await fleet.check_capacity(deployment.instances, deployment.ray_wait, start.say)
            fleet.start_controller()
            await fleet.start(deployment.instances, start.say)
            failed = asyncio.create_task(_stop_when_all_failed(fleet))
            assert start.listener is not None
            reloading = command.reloading(fleet.take_settings)
            control = OwnControl(llm.engine_core, fleet, reloading)
            loop = asyncio.get_running_loop()
            signals.pass_hangup_on(loop, control.reload if reloading else None)

            async def announce() -> None:
                start.announce(args, await llm.get_supported_tasks())

            follow = llm.engine_core.shared_state.follow
            await serve_http(
                llm,
                control,
                start.listener,
                args,
                announce,
                on_state=lambda state: follow(state.openai_serving_models),
            )
        except InstanceFailedError as error:
            start.crashed = True
            raise UsageError(str(error)) from error
        finally:
            start.note_losses(fleet.status())
            # From here on no signal interrupts: half a clean-up would leave processes and files.
            signals.ignore(asyncio.get_running_loop())
            if failed is not None:
                failed.cancel()
            await fleet.close()
    if fleet.all_failed.is_set():
        raise UsageError("every instance failed: " + "; ".join(s.why or "" for s in fleet.status()))
    say("stopped")
    return 0


def _client(
    command: ServeCommand, event_log: EventLog, addresses: Addresses, undo: contextlib.ExitStack
) -> Any:
    """vLLM's engine client over all instances, started. `undo` gets what closes its parts."""
    from llumnix.frontend.client import FleetClient
    from llumnix.frontend.controller_link import ControllerLink
    from llumnix.frontend.engines.sockets import ClientPlace
    from llumnix.frontend.http.server import stop_begins
    from llumnix.frontend.llm import FleetLLM

    args, deployment = command.args, command.deployment
    client = FleetClient(
        command.vllm_config,
        ClientPlace(
            input_address=addresses.inputs[0],
            output_address=addresses.outputs[0],
            listeners=addresses.listeners_of(0),
        ),
        ControllerLink(addresses.controller, addresses.keys, "f0"),
        deployment.slots,
        event_log,
        priorities_of(deployment.scheduler, keyed=args.access.keyed),
        hash_prefixes=POLICIES[deployment.scheduler.policy].looks_at_caches,
        policy=deployment.scheduler.policy,
        keys=addresses.keys,
        survival=deployment.scheduler.survival,
    )
    undo.callback(client.close)
    client.start()
    llm = FleetLLM(
        command.vllm_config,
        client,
        log_stats=not args.disable_log_stats,
        log_requests=args.enable_log_requests,
        aggregate_engine_logging=args.aggregate_engine_logging,
        on_stopping=stop_begins,
        lame_duck_s=deployment.lame_duck,
    )
    undo.callback(llm.shutdown)
    return llm


async def _stop_when_all_failed(fleet: Any) -> None:
    await fleet.all_failed.wait()
    os.kill(os.getpid(), signal.SIGTERM)
