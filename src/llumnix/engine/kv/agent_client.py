"""The engine's side of KV transfer: orders to its workers' agents, and one answer for each pull."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from llumnix.engine.kv.links import (
    LINK_ERRORS,
    WIRE_VERSION,
    Cancel,
    Command,
    Done,
    Forget,
    Link,
    Pull,
    connect,
)
from llumnix.errors import ProtocolError

CLOSE_TIMEOUT_S = 2.0

_dones = msgspec.msgpack.Decoder(Done)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """How a pull ended, over all ranks."""

    ticket: int
    bytes: int  # of the ranks that did not fail
    seconds: float  # of the slowest rank, from the pull's turn to its end
    error: str | None  # None: all blocks are there


@dataclass(slots=True, kw_only=True)
class _Joining:
    """A pull, as far as its ranks have answered."""

    ranks: set[int]
    bytes: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)


class AgentClient:
    """Lives in the engine's process: tells the engine's own workers' agents what to pull.

    `agents[r]` is the address of tensor-parallel rank r's agent. The agents may start later, or
    anew: a link that broke is made again with the next pull.
    """

    def __init__(
        self, *, agents: list[str], key: bytes, on_pulled: Callable[[Pulled], None]
    ) -> None:
        """`on_pulled` is called on the thread that learns of an end, which can be that of the
        caller. It must neither block nor raise."""
        self._on_pulled = on_pulled
        # Guards the two below.
        self._lock = threading.Lock()
        self._joining: dict[int, _Joining] = {}
        self._closed = False
        self._agents = [
            AgentConnection(rank=rank, agent=agent, key=key, on_done=self._done)
            for rank, agent in enumerate(agents)
        ]

    @property
    def ranks(self) -> int:
        """How many agents there are, and so how many a peer must have."""
        return len(self._agents)

    def start(self) -> None:
        """Begins to take orders."""
        for agent in self._agents:
            agent.start()

    def pull(
        self,
        ticket: int,
        peers: list[str],
        source: list[int],
        destination: list[int],
        *,
        final: bool = False,
    ) -> None:
        """Rank r pulls the blocks `source` of `peers[r]` into its own blocks `destination`. A
        `final` pull, for which a request stands still, does not wait behind those that are not.

        Returns at once. `on_pulled` is called exactly once for each ticket. ValueError if the
        lists do not match or the ticket is in use; RuntimeError after `close`.
        """
        if len(source) != len(destination):
            raise ValueError(f"{len(source)} blocks into {len(destination)}")
        if source:
            self._order(ticket, peers, source, destination, final=final)
        elif self._closed:
            raise RuntimeError("the client is closed")
        else:
            self._on_pulled(Pulled(ticket=ticket, bytes=0, seconds=0.0, error=None))

    def open_links(self, ticket: int, peers: list[str]) -> None:
        """Opens the connections that pulls from these peers will use. That takes long the first
        time, 0.1 s where GPU memory is mapped. Its end is reported like that of a pull."""
        self._order(ticket, peers, [], [])

    def _order(
        self,
        ticket: int,
        peers: list[str],
        source: list[int],
        destination: list[int],
        *,
        final: bool = False,
    ) -> None:
        if len(peers) != len(self._agents):
            raise ValueError(f"{len(peers)} peers for {len(self._agents)} ranks")
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            if ticket in self._joining:
                raise ValueError(f"a pull with ticket {ticket} runs already")
            self._joining[ticket] = _Joining(ranks=set(range(len(peers))))
        for agent, peer in zip(self._agents, peers, strict=True):
            agent.tell(
                Pull(ticket=ticket, peer=peer, source=source, destination=destination, final=final)
            )

    def cancel(self, ticket: int) -> None:
        """Ends a pull soon: at once if it waits, at its next chunk if it runs. It is reported like
        any other, nearly always as failed."""
        for agent in self._agents:
            agent.tell(Cancel(ticket=ticket))

    def forget(self, peers: list[str]) -> None:
        """Drops what the agents hold of peers that are gone. Pulls from them fail."""
        for agent in self._agents:
            agent.tell(Forget(peers=peers))

    def close(self) -> None:
        """Ends all threads. A pull that runs is reported as failed. Not to be called from
        `on_pulled`."""
        with self._lock:
            self._closed = True
        end_s = time.monotonic() + CLOSE_TIMEOUT_S
        for agent in self._agents:
            agent.stop()
        for agent in self._agents:
            agent.join(end_s)
        with self._lock:
            left = list(self._joining)
            self._joining.clear()
        for ticket in left:
            # A thread of ours still waits for a connection that is not answered.
            self._on_pulled(
                Pulled(ticket=ticket, bytes=0, seconds=0.0, error="the client was closed")
            )

    def _done(self, rank: int, done: Done) -> None:
        """One rank's answer. Any thread."""
        with self._lock:
            joining = self._joining.get(done.ticket)
            if joining is None or rank not in joining.ranks:
                return
            joining.ranks.discard(rank)
            joining.bytes += done.bytes
            joining.seconds = max(joining.seconds, done.seconds)
            if done.error is not None:
                joining.errors.append(f"rank {rank}: {done.error}")
            if joining.ranks:
                return
            del self._joining[done.ticket]
        self._on_pulled(
            Pulled(
                ticket=done.ticket,
                bytes=joining.bytes,
                seconds=joining.seconds,
                error="; ".join(joining.errors) or None,
            )
        )


class AgentConnection:
    """The connection to one agent: a thread that sends orders, and one that listens while there is
    a link."""

    def __init__(
        self, *, rank: int, agent: str, key: bytes, on_done: Callable[[int, Done], None]
    ) -> None:
        self._rank = rank
        self._agent = agent
        self._key = key
        self._on_done = on_done
        self._orders: queue.SimpleQueue[Pull | Cancel | Forget | None] = queue.SimpleQueue()
        # Guards the five below.
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._listener: threading.Thread | None = None
        self._running: set[int] = set()
        self._stopped = False
        self._broken = ""
        """Why the sending thread has ended for good."""
        self._teller = threading.Thread(
            target=self._tell, name=f"llumnix-kv-tell-{rank}", daemon=True
        )

    def start(self) -> None:
        """Begins to send orders."""
        self._teller.start()

    def tell(self, order: Pull | Cancel | Forget) -> None:
        """Passes an order on. Returns at once."""
        with self._lock:
            if not self._broken:
                self._orders.put(order)
                return
        if isinstance(order, Pull):
            self._fail(order.ticket, self._broken)

    def stop(self) -> None:
        """Fails the pulls that run and wait, and ends both threads."""
        with self._lock:
            self._stopped = True
            if self._link is not None:
                self._link.stop()
        self._orders.put(None)

    def join(self, end_s: float) -> None:
        """Waits for the threads until `end_s` on the monotonic clock."""
        self._teller.join(max(0.0, end_s - time.monotonic()))
        if (listener := self._listener) is not None:
            listener.join(max(0.0, end_s - time.monotonic()))

    def _tell(self) -> None:
        order: Pull | Cancel | Forget | None = None
        try:
            while (order := self._orders.get()) is not None:
                try:
                    self._send(order)
                except (*LINK_ERRORS, RuntimeError) as error:
                    # RuntimeError: a thread could not be started.
                    self._fail_order(order, f"{type(error).__name__}: {error}")
        except Exception as error:
            self._break(order, f"{type(error).__name__}: {error}")
            raise

    def _break(self, order: Pull | Cancel | Forget | None, why: str) -> None:
        """An unforeseen error ends the sending thread. Pulls are answered all the same."""
        with self._lock:
            self._broken = why
        while True:
            self._fail_order(order, why)
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return

    def _fail_order(self, order: Pull | Cancel | Forget | None, why: str) -> None:
        if isinstance(order, Pull):
            self._fail(order.ticket, why)

    def _send(self, order: Pull | Cancel | Forget) -> None:
        with self._lock:
            link = self._link
        if link is None:
            if isinstance(order, Cancel):
                return  # The pull has failed with its link.
            link = self._connect()
        with self._lock:
            # Checked and noted under one lock. From here on the listener answers for the ticket.
            if self._link is not link:
                raise EOFError("the agent closed the link")
            if isinstance(order, Pull):
                self._running.add(order.ticket)
        try:
            link.send(order)
        except OSError:
            # The listener wakes, and fails all pulls of this link.
            link.stop()

    def _connect(self) -> Link:
        if self._stopped:
            raise EOFError("the client was closed")
        link = connect(self._agent, self._key)
        try:
            link.send(Command(version=WIRE_VERSION))
        except OSError:
            link.close()
            raise
        with self._lock:
            if self._stopped:
                link.close()
                raise EOFError("the client was closed")
            listener = threading.Thread(
                target=self._listen, args=(link,), name=f"llumnix-kv-hear-{self._rank}", daemon=True
            )
            try:
                listener.start()
            except RuntimeError:
                link.close()
                raise
            self._link, self._listener = link, listener
        return link

    def _listen(self, link: Link) -> None:
        why = "the agent's link broke"
        try:
            while True:
                link.wait()
                done = link.receive(_dones)
                with self._lock:
                    if done.ticket not in self._running:
                        raise ProtocolError(f"an answer to ticket {done.ticket}, which is not out")
                    self._running.discard(done.ticket)
                self._on_done(self._rank, done)
        except LINK_ERRORS as error:
            why = f"{why}: {type(error).__name__}: {error}"
        finally:
            with self._lock:
                self._link = None
                lost = list(self._running)
                self._running.clear()
            link.close()
            for ticket in lost:
                self._fail(ticket, why)

    def _fail(self, ticket: int, why: str) -> None:
        self._on_done(
            self._rank, Done(ticket=ticket, bytes=0, seconds=0.0, error=f"{self._agent}: {why}")
        )
