"""Where our processes meet: Unix sockets in a folder of our own, and TCP only for other hosts."""

import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llumnix.observe.sockets import SocketKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """ZMQ addresses of one deployment. `folder` is readable by its owner only and goes with us.
    `peers` and `agents` are where llumlets and workers listen, with `{engine}`, `{rank}` and
    `{host}` for each to fill in; `agents` is in the form of engine/transfer.py. `keys`: what our
    processes know each other by, None where only the user can open the sockets."""

    folder: Path
    controller: str
    frontend_input: str
    frontend_output: str
    peers: str
    agents: str
    keys: SocketKeys | None

    @classmethod
    def make(cls, host: str | None) -> "Addresses":
        """On this machine alone (`host` None), or on TCP ports of `host`, this node's address in a
        cluster that has, or may get, further nodes."""
        names = ("controller", "input", "output")
        ports = [] if host is None else _free_ports(host, len(names))
        # For its owner only: mkdtemp's doing. Short, for a Unix socket's path may have 107
        # characters at most and Ray adds 60.
        folder = Path(tempfile.mkdtemp(prefix="llumnix-"))
        if host is None:
            controller, frontend_input, frontend_output = (f"ipc://{folder}/{n}" for n in names)
            peers, agents = (
                f"ipc://{folder}/peer-{{engine}}",
                f"unix:{folder}/kv-{{engine}}-{{rank}}",
            )
        else:
            at = f"[{host}]" if ":" in host else host  # IPv6.
            controller, frontend_input, frontend_output = (f"tcp://{at}:{p}" for p in ports)
            peers, agents = "tcp://{host}:0", "tcp:{host}:0"
        return cls(
            folder=folder,
            controller=controller,
            frontend_input=frontend_input,
            frontend_output=frontend_output,
            peers=peers,
            agents=agents,
            keys=None if host is None else SocketKeys.make(),
        )

    def remove(self) -> None:
        """Removes the folder and what is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(host: str, count: int) -> list[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sockets = [socket.socket(family) for _ in range(count)]
    try:
        for s in sockets:
            s.bind((host, 0))
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()
