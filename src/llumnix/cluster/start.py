"""How far the start of a deployment is, and what is said once it serves."""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.supervision.readiness import FleetSeen
from llumnix.frontend.door.listener import ListenAddress, Listener, StartProgress
from llumnix.frontend.door.probes import Probes
from llumnix.frontend.http.metrics_port import MetricsPort
from llumnix.observe.console import say
from llumnix.observe.service_manager import keep_alive, notify


class Start:
    """How far the start is, for the user at the terminal, clients at the port and systemd."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.progress = StartProgress(began_s=self.began_s)
        self.listener: Listener | None = None
        self.metrics: MetricsPort | None = None
        self.crashed = False  # whether an instance was lost; then the logs are kept

    def say(self, text: str) -> None:
        """Says what the start does now."""
        say(text)
        notify(f"STATUS={text}")
        self.progress.phase = text

    def listen(self, args: argparse.Namespace) -> None:
        """Listens where the arguments say, if it does not do so yet."""
        address = ListenAddress.of(args)
        if self.listener is not None and self.listener.address == address:
            return
        self.close()
        listener = Listener(address, self.progress)
        listener.open()
        self.listener = listener

    def take_metrics_port(self, args: argparse.Namespace) -> None:
        """Takes the port of --metrics-port, if it is asked for."""
        if args.metrics_port is not None:
            self.metrics = MetricsPort(
                args.metrics_host, args.metrics_port, args.access, public=args.metrics_open
            )
            say(f"metrics are at http://{args.metrics_host}:{self.metrics.port}/metrics")

    def serve_metrics(
        self, text: Callable[[], Awaitable[bytes]], seen: Callable[[], FleetSeen]
    ) -> None:
        """Answers there from now on: the metrics, and what follows of the fleet for probes."""

        async def look() -> FleetSeen:
            return seen()

        if self.metrics is not None:
            self.metrics.serve(text, Probes(look, self.progress.ready_min))

    def note_losses(self, instances: Iterable[InstanceStatus]) -> None:
        """Has the logs kept if any of the instances was lost, even if it came back."""
        self.crashed |= any(one.restarts or one.state == "failed" for one in instances)

    def close(self) -> None:
        """Stops listening."""
        if self.metrics is not None:
            self.metrics.close()
            self.metrics = None
        if self.listener is not None:
            self.listener.close()
            self.listener = None

    def announce(self, args: argparse.Namespace, tasks: Sequence[str], how: str = "") -> None:
        """Says where it serves, and a line to try. `tasks`: what vLLM can do with the model; `how`:
        more about the server. On the event loop, which the service manager watches from now on."""
        assert self.listener is not None
        url = self.listener.url
        model = (args.served_model_name or [args.model])[0]
        took_s = time.monotonic() - self.began_s
        say(f"serving {model} at {url}{how} after {took_s:.0f} s; try", event="ready", url=url)
        say(curl_line(args, url, model, generates="generate" in tasks), prefix="  ")
        notify("READY=1", f"STATUS=serving {model} at {url}{how}")
        keep_alive(asyncio.get_running_loop())


def curl_line(args: argparse.Namespace, url: str, model: str, *, generates: bool) -> str:
    """A command that asks the server something. It has the key's variable, never the key."""
    keyed = args.access.keyed
    key = ' -H "Authorization: Bearer ${VLLM_API_KEY:-$KEY}"' if keyed else ""
    base = url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")
    curl = f"curl --unix-socket {args.uds} http://localhost" if args.uds else f"curl {base}"
    if not generates:
        return f"{curl}/v1/models{key}"
    return (
        f"{curl}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{model}", "max_tokens": 64, "temperature": 0, '
        '"messages": [{"role": "user", "content": "What is the capital of France?"}]}\''
    )
