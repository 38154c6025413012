"""`llumnix serve`: puts the parts together, and takes them apart in the same order backwards."""

import argparse
import asyncio
import logging
import os
import signal
import time
from typing import Any

from llumnix.cluster import ray_runtime
from llumnix.cluster.addresses import Addresses
from llumnix.core.policies.presets import POLICIES
from llumnix.core.scheduler import priorities_of
from llumnix.errors import InstanceFailedError, UsageError
from llumnix.frontend.arguments import ServeCommand, parse, settle_variables
from llumnix.observe.event_log import EventLog
from llumnix.observe.sockets import check_encryption

# Ray must know before it is imported whether it will be started here, and vLLM imports it.
_first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_first_look.add_argument("--ray-address", "--ray_address")


def say(text: str) -> None:
    """One line to the user."""
    print(f"llumnix: {text}", flush=True)


def serve(argv: list[str]) -> int:
    """Runs until it is told to stop; returns the exit status. `UsageError` on bad input."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    log_to_stderr()
    # vLLM's start-up chatter would hide our own lines; whoever sets the level gets all of it.
    logs = "VLLM_LOGGING_LEVEL" in os.environ
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    settle_variables()
    joining, _ = _first_look.parse_known_args(argv)
    ray_runtime.settle(local=joining.ray_address is None)
    ray_runtime.hide_arguments(argv)
    say("loading vLLM")
    command = parse(argv, say)
    if command.deployment.ray_address != joining.ray_address:
        raise UsageError("ray-address: give it on the command line, not in the --config file")
    from llumnix.frontend.server import bind

    listen_address, sock = bind(command.args)
    try:
        return _with_ray(command, listen_address, sock, began, logs)
    finally:
        sock.close()
        if command.args.uds and os.path.exists(command.args.uds):
            os.unlink(command.args.uds)


def log_to_stderr() -> None:
    """Our own lines, whatever the libraries do to the root logger."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("llumnix: %(message)s"))
    ours = logging.getLogger("llumnix")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _with_ray(
    command: ServeCommand, listen_address: str, sock: Any, began: float, logs: bool
) -> int:
    joined = command.deployment.ray_address
    addresses = None
    try:
        if joined:
            check_encryption()
            say(f"joining Ray at {joined}")
            try:
                ray_runtime.join(joined, logs=logs)
            except ConnectionError as error:
                raise UsageError(
                    f"cannot reach Ray at {joined} ({error}): start it with `ray start --head`, or "
                    "leave --ray-address out to have Ray started here"
                ) from error
            addresses = Addresses.make(ray_runtime.node_address())
        else:
            say("starting Ray on this machine")
            addresses = Addresses.make(None)
            ray_runtime.start_local(addresses.folder / "ray", logs=logs)
        # vLLM's own Unix sockets (engine to worker) belong into our folder too.
        os.environ["VLLM_RPC_BASE_PATH"] = str(addresses.folder)
        import uvloop

        return uvloop.run(_run(command, addresses, listen_address, sock, began))
    except KeyboardInterrupt:
        say("stopped before it served")
        return 130
    finally:
        ray_runtime.stop()
        if addresses is not None:
            addresses.remove()


async def _run(
    command: ServeCommand, addresses: Addresses, listen_address: str, sock: Any, began: float
) -> int:
    from llumnix.cluster.fleet import Fleet
    from llumnix.engine.launch import EngineLaunch
    from llumnix.frontend.client import FleetClient
    from llumnix.frontend.controller_link import ControllerLink
    from llumnix.frontend.llm import FleetLLM
    from llumnix.frontend.server import serve as serve_http

    args, deployment = command.args, command.deployment
    launch = EngineLaunch.of(
        command.vllm_config,
        addresses.frontend_input,
        addresses.frontend_output,
        log_stats=not args.disable_log_stats,
    )
    client = FleetClient(
        command.vllm_config,
        {
            "input_address": addresses.frontend_input,
            "output_address": addresses.frontend_output,
        },
        ControllerLink(addresses.controller, addresses.keys),
        deployment.slots,
        EventLog(deployment.event_log, who=f"frontend {os.getpid()}"),
        priorities_of(deployment.scheduler, keyed=bool(args.access.client_digests)),
        hash_prefixes=POLICIES[deployment.scheduler.policy].looks_at_caches,
        keys=addresses.keys,
    )
    client.start()
    llm = FleetLLM(
        command.vllm_config,
        client,
        log_stats=not args.disable_log_stats,
        log_requests=args.enable_log_requests,
        aggregate_engine_logging=args.aggregate_engine_logging,
    )
    fleet = Fleet(llm, launch, addresses, deployment)
    failed = None
    try:
        fleet.check_capacity(deployment.instances)
        fleet.start_controller()
        await fleet.start(deployment.instances, say)
        ready = asyncio.create_task(_announce(llm, listen_address, args, began))
        failed = asyncio.create_task(_stop_when_all_failed(fleet))
        await serve_http(llm, fleet, listen_address, sock, args)
        ready.cancel()
    except InstanceFailedError as error:
        raise UsageError(str(error)) from error
    finally:
        if failed is not None:
            failed.cancel()
        await fleet.close()
        llm.shutdown()
        client.close()
    if fleet.all_failed.is_set():
        raise UsageError("every instance failed: " + "; ".join(s.why or "" for s in fleet.status()))
    say("stopped")
    return 0


async def _stop_when_all_failed(fleet: Any) -> None:
    await fleet.all_failed.wait()
    os.kill(os.getpid(), signal.SIGTERM)


async def _announce(llm: Any, listen_address: str, args: Any, began: float) -> None:
    """Says where it serves once a request would be answered."""
    base = "http://localhost" if args.uds else listen_address.replace("0.0.0.0", "127.0.0.1")
    while True:
        try:
            _, writer = await (
                asyncio.open_unix_connection(args.uds)
                if args.uds
                else asyncio.open_connection(args.host, args.port)
            )
            writer.close()
            break
        except OSError:
            await asyncio.sleep(0.05)
    model = (args.served_model_name or [args.model])[0]
    key = " -H 'Authorization: Bearer '$KEY" if args.access.client_digests else ""
    curl = f"curl --unix-socket {args.uds} http://localhost" if args.uds else f"curl {base}"
    say(f"serving {model} at {listen_address} after {time.monotonic() - began:.0f} s; try")
    if "generate" in await llm.get_supported_tasks():
        what = (
            f"/v1/chat/completions{key} -H 'Content-Type: application/json' "
            f'-d \'{{"model": "{model}", "max_tokens": 64, "temperature": 0, '
            '"messages": [{"role": "user", "content": "What is the capital of France?"}]}\''
        )
    else:
        what = f"/v1/models{key}"
    print(f"  {curl}{what}", flush=True)
