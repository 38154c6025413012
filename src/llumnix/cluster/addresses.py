"""Where our processes meet: Unix sockets in a folder of our own, and TCP only for other hosts."""

import socket
from dataclasses import dataclass, field

from llumnix.engine.folders import PrivateFolder
from llumnix.sockets import SocketKeys

Listeners = tuple[socket.socket, socket.socket]


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """ZMQ addresses of one deployment. Llumlets and workers fill `{engine}`, `{rank}` and `{host}`
    in where they listen."""

    folder: PrivateFolder  # of the Unix sockets; removed at the end
    controller: str
    inputs: tuple[str, ...]  # of the clients of the engines, by their numbers
    outputs: tuple[str, ...]
    office: str  # where the office listens for frontends, which are always on its host
    peers: str  # where llumlets listen
    agents: str  # where workers listen for pulls, in the form of engine/kv/agent.py
    keys: SocketKeys | None  # of all our sockets; None where only the user can open them
    listeners: tuple[Listeners, ...] = field(default=(), repr=False)
    """Bound to `inputs` and `outputs` on TCP, so that nobody else gets the ports of clients that
    are started later. They do not listen yet: engines are refused, and try again."""

    @classmethod
    def make(cls, host: str | None, clients: int = 1) -> "Addresses":
        """Unix sockets if `host` is None. Else TCP ports of `host`, which is this node's address in
        a cluster that has further nodes, or may get some. `clients`: how many the engines are to
        know."""
        pairs = range(0 if host is None else clients)
        listeners = tuple((_bound(host), _bound(host)) for _ in pairs)
        folder = PrivateFolder.make_short()
        inside = folder.path
        if host is None:
            controller = f"ipc://{inside}/controller"
            inputs = tuple(f"ipc://{inside}/input-{n}" for n in range(clients))
            outputs = tuple(f"ipc://{inside}/output-{n}" for n in range(clients))
            peers, agents = (
                f"ipc://{inside}/peer-{{engine}}",
                f"unix:{inside}/kv-{{engine}}-{{rank}}",
            )
        else:
            at = f"[{host}]" if ":" in host else host  # IPv6.
            with _bound(host) as one:
                controller = f"tcp://{at}:{_port(one)}"
            inputs = tuple(f"tcp://{at}:{_port(one)}" for one, _ in listeners)
            outputs = tuple(f"tcp://{at}:{_port(other)}" for _, other in listeners)
            peers, agents = "tcp://{host}:0", "tcp:{host}:0"
        return cls(
            folder=folder,
            controller=controller,
            inputs=inputs,
            outputs=outputs,
            office=f"ipc://{inside}/office",
            peers=peers,
            agents=agents,
            keys=None if host is None else SocketKeys.make(),
            listeners=listeners,
        )

    def listeners_of(self, client: int) -> Listeners | None:
        """The sockets that are bound to this client's addresses, on TCP."""
        return self.listeners[client] if self.listeners else None

    def remove(self) -> None:
        """Removes the folder and what is in it."""
        for pair in self.listeners:
            for one in pair:
                one.close()
        self.folder.remove()


def _bound(host: str | None) -> socket.socket:
    """A socket that is bound to a free port."""
    one = socket.socket(socket.AF_INET6 if ":" in (host or "") else socket.AF_INET)
    try:
        one.bind((host, 0))
    except BaseException:
        one.close()
        raise
    return one


def _port(one: socket.socket) -> int:
    return int(one.getsockname()[1])
