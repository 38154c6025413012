"""Systems that serve one model on several instances behind one URL, with the same flags of vLLM's.

- a policy of llumnix: `llumnix serve --policy POLICY`
- one of `VARIANTS`: llumnix's own policy with a few flags, to see what they are worth
- `vllm-dp`: `vllm serve --data-parallel-size N`, which balances by requests running and waiting;
  N processes speak HTTP, as is its default
- `vllm-router`: vLLM's cache-aware router from PyPI (benchmarks/router.py), with its defaults,
  before N `vllm serve`
- `smg`: SMG's gateway (`pip install --no-deps smg==1.13.0`), cache-aware, with its defaults, before
  N `vllm serve`. It takes no token ids, so its prompts have to be text
"""

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path

from common import ROOT, VLLMS_QUEUE, Served, free_port, serve

PEERS = ("vllm-dp", "vllm-router", "smg")
ROUTERS: dict[str, list[str]] = {
    "vllm-router": [
        str(ROOT / "benchmarks/router.py"),
        *("--policy", "cache_aware", "--worker-startup-check-interval", "1"),
    ],
    "smg": ["-m", "smg", "launch", "--policy", "cache_aware"],
}
"""How Python runs them, each before N `vllm serve`."""
OWN_QUEUE = [
    "--scheduler-config",
    json.dumps({"queue": asdict(VLLMS_QUEUE), "migration": {"rescues": 0}}),
]
VARIANTS: dict[str, list[str]] = {
    "llumnix-own-queue": OWN_QUEUE,
    "watermark-0.02": [*OWN_QUEUE, "--watermark", "0.02"],
    "watermark-0.05": [*OWN_QUEUE, "--watermark", "0.05"],
    "watermark-0.1": [*OWN_QUEUE, "--watermark", "0.1"],
    "llumnix-uni": ["--distributed-executor-backend", "uni"],
}
"""What is told `llumnix serve`. `llumnix-own-queue`: vLLM's queue alone decides who starts; a
watermark is the share of KV memory that it keeps free when it starts one. `llumnix-uni`: the model
runs in the engine's process."""
NAME = "m"
"""Of the model, in requests."""


class System:
    """One of them. `front`: where requests go; `scraped`: whose /metrics count, together."""

    def __init__(self, name: str, model: str, flags: list[str], instances: int, logs: Path) -> None:
        self.name = name
        self._logs = logs
        self.router: Served | None = None
        if name in ROUTERS:
            self.servers = [
                self._serve("bare", model, flags, f"-{i}", {"CUDA_VISIBLE_DEVICES": str(i)})
                for i in range(instances)
            ]
        elif name == "vllm-dp":
            more = ["--data-parallel-size", str(instances)]
            self.servers = [self._serve("bare", model, flags + more)]
        else:
            more = ["--instances", str(instances)]
            more += VARIANTS.get(name, ["--policy", name])
            self.servers = [self._serve("llumnix", model, flags + more)]

    def _serve(
        self, kind: str, model: str, flags: list[str], number: str = "",
        env: dict[str, str] | None = None,
    ) -> Served:  # fmt: skip
        return serve(kind, model, NAME, flags, self._logs / f"{self.name}{number}.log", env)

    @property
    def front(self) -> Served:
        return self.router or self.servers[0]

    @property
    def scraped(self) -> list[str]:
        return [s.url for s in self.servers]

    async def wait_until_up(self) -> None:
        """Of the servers, and then of a router: it is content with one of its servers."""
        await asyncio.gather(*(s.wait_until_up() for s in self.servers))
        if run := ROUTERS.get(self.name):
            port = free_port()
            command = [sys.executable, *run, "--host", "127.0.0.1", "--port", str(port)]
            command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
            command += ["--worker-urls", *self.scraped]
            self.router = Served(self.name, command, port, self._logs / f"{self.name}-front.log")
            await self.router.wait_until_up()

    def logs(self) -> str:
        """The ends of all that its servers said."""
        return "\n".join(f"{s.log.name}:\n{s.log.read_text()[-3000:]}" for s in self.all_servers())

    def all_servers(self) -> list[Served]:
        """The router first."""
        return [*filter(None, [self.router]), *self.servers]


def stop_all(systems: list[System]) -> None:
    """Asks all of them first, so that none is left if this process is stopped while it waits."""
    servers = [server for system in systems for server in system.all_servers()]
    for server in servers:
        server.ask_to_stop()
    for server in servers:
        server.stop()
