"""KV blocks from worker to worker: the agent in each worker process.

The destination drives. An engine's `AgentClient` tells the agents of its own workers, one for each
tensor-parallel rank, which blocks to pull from which peers. Each agent pulls on threads of its own,
beside the model's. The source's engine takes no part; its workers' agents only answer.

A pull that has ended, well or not, writes no more: its destination blocks are the caller's again.
The caller makes sure that no step in flight writes to the source's blocks or touches the
destination's. What is written before a pull fails is unspecified.
"""

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import torch

from llumnix.engine.kv.agent_client import AgentClient, Pulled
from llumnix.engine.kv.bandwidth import RateLimiter
from llumnix.engine.kv.blocks import lay_out
from llumnix.engine.kv.links import (
    LINK_ERRORS,
    WIRE_VERSION,
    Cancel,
    Command,
    Done,
    Forget,
    Hello,
    Link,
    Pull,
    TransferError,
    listen,
    unlisten,
)
from llumnix.engine.kv.readers import PeerReader, open_peer
from llumnix.engine.kv.transports import ReadGate, TransferOptions, serve_peer
from llumnix.errors import ProtocolError

__all__ = ["AgentClient", "Pulled", "TransferOptions", "WorkerAgent"]

CLOSE_TIMEOUT_S = 2.0
LINKS_MAX = 256
"""Connections that an agent serves at a time. One more is closed at once."""
PULLS_QUEUED_MAX = 1024
"""Pulls that wait for one peer. One more fails."""
ACCEPT_PAUSE_S = 0.1
"""Wait after a failure to accept, for one because the process has too many open files."""

_log = logging.getLogger(__name__)
_first = msgspec.msgpack.Decoder(Hello | Command)
_orders = msgspec.msgpack.Decoder(Pull | Cancel | Forget)


class WorkerAgent:
    """Lives in a worker process: serves this worker's KV blocks to peers, and pulls theirs."""

    def __init__(
        self,
        *,
        tensors: list[torch.Tensor],
        blocks: int,
        listen: str,
        key: bytes,
        options: TransferOptions,
    ) -> None:
        """`tensors`: the KV cache, see `lay_out`; rows of each: a multiple of `blocks`.

        `listen`: "unix:/path" in a folder that exists, or "tcp:HOST:0". `key`: a secret that all
        agents and clients share. UsageError if the tensors do not hold `blocks` blocks.
        """
        self._layout = lay_out(tensors, blocks)
        self._listen = listen
        self._key = key
        self._options = options
        self._limiter = RateLimiter(options.bandwidth_bytes_per_s)
        self._gate = ReadGate()
        self._listener: socket.socket | None = None
        self._closing = threading.Event()
        # Guards the three below.
        self._lock = threading.Lock()
        self._links: set[Link] = set()
        # By the peer, and whether it is the second one for that peer.
        self._pullers: dict[tuple[str, bool], PeerPuller] = {}
        self._threads: set[threading.Thread] = set()

    def start(self) -> str:
        """Listens. Returns the address as others must use it. OSError or UsageError if not."""
        self._listener, address = listen(self._listen)
        with self._lock:
            self._run("accept", self._accept, self._listener)
        return address

    def hold(self, *, held: bool) -> None:
        """Keeps peers from reading KV blocks here, once the reads under way have ended, or lets
        them read again. Peers that map GPU memory are not kept out: memory that may go away cannot
        be mapped."""
        self._gate.hold(held=held)

    def close(self) -> None:
        """Ends serving and pulling; pulls that run fail."""
        if self._listener is None or self._closing.is_set():
            return
        self._closing.set()
        # Closing a socket does not wake the thread that accepts on it; this does.
        self._listener.shutdown(socket.SHUT_RDWR)
        unlisten(self._listen)
        with self._lock:
            threads = list(self._threads)
            for link in self._links:
                link.stop()
            for puller in self._pullers.values():
                puller.forget()
            self._pullers.clear()
        end_s = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        self._listener.close()

    def _run(self, name: str, target: Callable[..., None], *args: object) -> None:
        """Starts a thread that `close` will wait for; RuntimeError if the system has none left.
        Under the lock."""

        def run() -> None:
            try:
                target(*args)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name=f"llumnix-kv-{name}", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            self._threads.discard(thread)
            raise

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if not self._closing.wait(ACCEPT_PAUSE_S):
                    _log.warning("KV transfer: cannot accept a connection: %s", error)
                continue
            if (why := self._take_link(Link(sock))) and not self._closing.wait(ACCEPT_PAUSE_S):
                _log.warning("KV transfer: a connection is not served: %s", why)

    def _take_link(self, link: Link) -> str | None:
        """Begins to serve a connection, or closes it and says why."""
        with self._lock:
            if len(self._links) >= LINKS_MAX:
                why = f"{LINKS_MAX} are served already"
            elif self._closing.is_set():
                why = "this agent is being closed"
            else:
                try:
                    self._run("serve", self._serve, link)
                except RuntimeError as error:
                    why = str(error)
                else:
                    self._links.add(link)
                    return None
            link.close()
            return why

    def _serve(self, link: Link) -> None:
        """One connection, from its challenge to its end."""
        try:
            link.authenticate(self._key, connecting=False)
            hello = link.receive(_first)
            if isinstance(hello, Hello):
                serve_peer(link, hello, self._layout, self._options, self._gate)
            elif hello.version == WIRE_VERSION:
                self._obey(link)
            else:
                raise ProtocolError(f"a client of wire version {hello.version}")
        except EOFError:
            pass  # The usual end.
        except (*LINK_ERRORS, RuntimeError) as error:
            # RuntimeError is what CUDA raises; the peer sees the link end.
            if not self._closing.is_set():
                _log.warning("KV transfer: a connection failed: %r", error)
        finally:
            with self._lock:
                self._links.discard(link)
            link.close()

    def _obey(self, link: Link) -> None:
        """Carries out a client's orders."""
        while True:
            link.wait()
            order = link.receive(_orders)
            if isinstance(order, Pull):
                self._enqueue(_Job(order=order, link=link))
            elif isinstance(order, Cancel):
                with self._lock:
                    pullers = list(self._pullers.values())
                for puller in pullers:
                    if (job := puller.cancel(link, order.ticket)) is not None:
                        job.report(0, 0.0, f"{puller.peer}: cancelled before its turn")
            else:
                self._forget(order.peers)

    def _forget(self, peers: list[str]) -> None:
        with self._lock:
            for key in [(peer, second) for peer in peers for second in (False, True)]:
                if (puller := self._pullers.pop(key, None)) is not None:
                    puller.forget()

    def _enqueue(self, job: "_Job") -> None:
        peer = job.order.peer
        with self._lock:
            if self._closing.is_set():
                return
            try:
                refused = None
                if not self._puller_of(job.order).offer(job):
                    refused = f"{PULLS_QUEUED_MAX} pulls wait for {peer} already"
            except RuntimeError as error:
                refused = f"{peer}: {error}"
        if refused is not None:
            job.report(0, 0.0, refused)

    def _puller_of(self, order: Pull) -> "PeerPuller":
        """The peer's puller. If it is busy, a final pull has a second one, which is made for the
        first of them. Under the lock. RuntimeError if there is no thread for a new one."""
        peer = order.peer
        first = self._pullers.get((peer, False))
        key = peer, order.final and first is not None and first.busy
        if (puller := self._pullers.get(key)) is None:
            puller = PeerPuller(
                peer, lambda: open_peer(peer, self._key, self._layout, self._options)
            )
            self._run("pull", self._pull_from, key, puller)
            self._pullers[key] = puller
        return puller

    def _pull_from(self, key: tuple[str, bool], puller: "PeerPuller") -> None:
        try:
            puller.run(self._limiter)
        finally:
            # Even if the thread dies of an unforeseen error, so that the next pull starts anew.
            with self._lock:
                if self._pullers.get(key) is puller:
                    del self._pullers[key]
            puller.drain()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A pull."""

    order: Pull
    link: Link  # of the client that wants to hear its end
    unwanted: threading.Event = field(default_factory=threading.Event)  # ends it at its next chunk

    def report(self, size: int, seconds: float, error: str | None) -> None:
        """Tells the client how it ended. A client that is gone needs no answer."""
        done = Done(ticket=self.order.ticket, bytes=size, seconds=seconds, error=error)
        try:
            self.link.send(done)
        except OSError:
            # Part of the message may have been sent, so the link is of no more use.
            self.link.stop()


class PeerPuller:
    """Pulls from one peer, one pull after the other. It outlives restarts of the peer."""

    def __init__(self, peer: str, connect: Callable[[], PeerReader]) -> None:
        self.peer = peer
        self._connect = connect
        self._forgotten = threading.Event()
        self._reader: PeerReader | None = None
        # Guards the two below, and says that one of them or `_forgotten` has changed.
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._current: _Job | None = None

    @property
    def busy(self) -> bool:
        """Whether a pull runs or waits."""
        with self._changed:
            return self._current is not None or bool(self._jobs)

    def offer(self, job: _Job) -> bool:
        """Queues the pull unless too many wait already."""
        with self._changed:
            if len(self._jobs) >= PULLS_QUEUED_MAX:
                return False
            self._jobs.append(job)
            self._changed.notify()
            return True

    def cancel(self, link: Link, ticket: int) -> _Job | None:
        """Ends a pull of this client at its next chunk. One that only waits is returned instead."""
        with self._changed:
            for job in self._jobs:
                if job.link is link and job.order.ticket == ticket:
                    self._jobs.remove(job)
                    return job
            current = self._current
            if current is not None and current.link is link and current.order.ticket == ticket:
                current.unwanted.set()
            return None

    def forget(self) -> None:
        """Fails the pull that runs and those that wait, and ends `run`. The last call to this
        object."""
        with self._changed:
            self._forgotten.set()
            if self._current is not None:
                self._current.unwanted.set()
            self._changed.notify()
        if (reader := self._reader) is not None:
            reader.stop()

    def run(self, limiter: RateLimiter) -> None:
        """Pulls until forgotten."""
        try:
            while (job := self._next()) is not None:
                self._one(job, limiter)
        finally:
            self._drop()

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._forgotten.is_set())
            if self._forgotten.is_set():
                return None
            self._current = self._jobs.popleft()
            return self._current

    def drain(self) -> None:
        """Fails the pulls that still wait, after `run`."""
        with self._changed:
            waiting = list(self._jobs)
            self._jobs.clear()
        for job in waiting:
            job.report(0, 0.0, f"{self.peer}: pulling from it broke off")

    def _one(self, job: _Job, limiter: RateLimiter) -> None:
        started_s = time.monotonic()
        moved = 0
        error: str | None = "an error that nobody foresaw; the worker's log has it"
        try:
            moved = self._pull(job, limiter)
            error = None
        except (*LINK_ERRORS, IndexError, RuntimeError) as failure:
            # RuntimeError is what CUDA raises.
            error = f"{type(failure).__name__}: {failure}"
            self._drop()
        finally:
            with self._changed:
                self._current = None
            told = None if error is None else f"{self.peer}: {error}"
            job.report(moved, time.monotonic() - started_s, told)

    def _pull(self, job: _Job, limiter: RateLimiter) -> int:
        def throttle(size: int) -> None:
            limiter.take(size, job.unwanted)
            self._check_wanted(job)

        self._check_wanted(job)
        if self._reader is not None and self._reader.ended():
            # The peer was restarted, or its link broke while idle.
            self._drop()
        if self._reader is None:
            self._reader = self._connect()
        if not job.order.source:
            return 0  # Only the connection was wanted.
        return self._reader.pull(job.order.source, job.order.destination, throttle)

    def _check_wanted(self, job: _Job) -> None:
        if self._forgotten.is_set():
            raise TransferError("forgotten before its pull ended")
        if job.link.stopped or job.unwanted.is_set():
            raise TransferError("nobody waits for this pull any more")

    def _drop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
