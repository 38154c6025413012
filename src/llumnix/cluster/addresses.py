"""Where our processes meet: Unix sockets in a folder of our own, and TCP only for other hosts."""

import socket
from dataclasses import dataclass

from llumnix.engine.folders import PrivateFolder
from llumnix.sockets import SocketKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """ZMQ addresses of one deployment. Llumlets and workers fill `{engine}`, `{rank}` and `{host}`
    in where they listen."""

    folder: PrivateFolder  # of the Unix sockets; removed at the end
    controller: str
    frontend_input: str
    frontend_output: str
    peers: str  # where llumlets listen
    agents: str  # where workers listen for pulls, in the form of engine/kv/agent.py
    keys: SocketKeys | None  # of all our sockets; None where only the user can open them

    @classmethod
    def make(cls, host: str | None) -> "Addresses":
        """Unix sockets if `host` is None. Else TCP ports of `host`, which is this node's address in
        a cluster that has further nodes, or may get some."""
        names = ("controller", "input", "output")
        ports = [] if host is None else _free_ports(host, len(names))
        folder = PrivateFolder.make_short()
        if host is None:
            inside = folder.path
            controller, frontend_input, frontend_output = (f"ipc://{inside}/{n}" for n in names)
            peers, agents = (
                f"ipc://{inside}/peer-{{engine}}",
                f"unix:{inside}/kv-{{engine}}-{{rank}}",
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
        self.folder.remove()


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
