"""Hosts the llumlet beside its engine: carries messages in and out, on the engine's own thread.

What comes from other threads (messages of peers, finished pulls, the beat) goes through the
engine's input queue. So it is dealt with between two steps, in one order with requests and aborts,
and wakes an engine that stands still. Finished pulls are taken in first: a room that is kept for a
pull, or a source that waits for its verdict, waits for nothing else.

vLLM internals relied on here (tests/house/test_vllm_migration_contract.py fails when one
changes): `EngineCoreProc.input_queue`, a queue of (kind, content) pairs that the busy loop empties
into `_handle_client_request`; `output_queue`, of (client index, `EngineCoreOutputs`), sent in
order; `EngineCoreOutput.kv_transfer_params`, which may hold anything that msgpack can.
"""

import queue
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.request import Request

from llumnix.core.events import MoveOrder
from llumnix.core.messages import (
    IN_BAND,
    OFFICE,
    DrainRequested,
    FrontendMessage,
    Grant,
    Handover,
    Migrate,
    MigrationEnded,
    Out,
    PeerMessage,
    Reserve,
    Revive,
    ToPeer,
    not_taken,
)
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.migration.port import EnginePort
from llumnix.core.reports import MoveCounts
from llumnix.core.types import EngineIndex, MigrationId, OrderId, RequestId
from llumnix.engine.cores import ThreadSwitching
from llumnix.engine.kv.agent_client import AgentClient, Pulled
from llumnix.engine.launch import LlumletConfig
from llumnix.engine.migration.guard import ErrorLog, GuardedPort
from llumnix.engine.migration.peers import Peers
from llumnix.engine.migration.unsupported import engine_unsupported, ours
from llumnix.engine.migration.vllm_port import VllmPort
from llumnix.engine.waiting_calls import WaitingCalls
from llumnix.errors import ProtocolError
from llumnix.sockets import SocketKeys
from llumnix.wire import decode, encode

BEAT_EVERY_S = 0.05
FINAL_PULL_WAIT_S = 0.003
"""How long the engine waits on the spot for the last blocks of a request that stands still. They
are few and come in less than a millisecond; to go on without them would cost the request a step."""
STEP_LINE = Callable[[str, MigrationId, str, str, str], None]


class HostItem:
    """The kind of what the host puts into the engine's input queue."""


@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """A peer's message. The engine may be in a step when it arrives, and look at it later."""

    message: PeerMessage
    at_s: float  # when it arrived


Item = ReceivedMessage | Pulled | None


class LlumletHost:
    """The host of one engine's llumlet."""

    def __init__(
        self,
        engine: EngineCoreProc,
        index: EngineIndex,
        config: LlumletConfig,
        host: str,
        on_step: STEP_LINE,
        keys: SocketKeys | None = None,
        on_commit: Callable[[Request], None] = lambda request: None,
    ) -> None:
        """`host`: this host's address in the cluster. `on_commit` is given a request that has moved
        in, before it is queued."""
        self._engine = engine
        self._index = index
        self._config = config
        self._on_step = on_step
        self._on_commit = on_commit
        self._polled_s = 0.0
        self._switching = ThreadSwitching()
        self._agents_of: dict[EngineIndex, list[str]] = {}
        self._waiting_here = False
        self._here: queue.SimpleQueue[Pulled] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[MoveOrder] = queue.SimpleQueue()
        self._agents: list[str] = []
        self._host = f"[{host}]" if ":" in host else host  # IPv6.
        peers = config.peers.format(engine=index, host=self._host)
        self._peers = Peers(peers, self._received, self._beat, keys)
        self._errors = ErrorLog()

    def start(self) -> None:
        """Opens the workers' agents and the sockets to the peers. Before the busy loop runs."""
        self._peers.bind()
        config = self._engine.vllm_config
        if current_platform.is_cpu() and ours(config):
            self._engine.model_executor.collective_rpc("llumnix_keep_generators")
        agents: list[str] = []
        if engine_unsupported(config, self._engine.scheduler) is None:
            listen = self._config.agents.format(engine=self._index, host=self._host, rank="{rank}")
            agents = self._engine.model_executor.collective_rpc(
                "llumnix_open", args=(listen, self._config.key, self._config.transfer)
            )
            self._agents = agents
            # A worker in this very process has changed it.
            sys.setswitchinterval(self._switching.default_s)
        self._client = AgentClient(agents=agents, key=self._config.key, on_pulled=self._pulled)
        self._client.start()
        self.port = VllmPort(self._engine, agents, self._client, self._pull_failed, self._on_commit)
        self._guarded = GuardedPort(
            cast("EnginePort", self.port), self._errors, self._pull_failed, self._lost
        )
        self.llumlet = Llumlet(
            self._index,
            self._peers.address,
            cast("EnginePort", self._guarded),
            self._config.limits,
            self._on_step,
            priorities=self._config.priorities,
            min_stay=self._config.min_stay,
        )
        self._calls = WaitingCalls(self.llumlet)
        self._peers.start()

    def close(self) -> None:
        """Closes what `start` opened."""
        self._client.close()
        self._peers.close()

    @property
    def address(self) -> str:
        """Where other llumlets send to this one."""
        return self._peers.address

    # -- on the engine's thread

    def handle(self, item: Item) -> None:
        """Deals with what came through the input queue."""
        if isinstance(item, ReceivedMessage) and isinstance(item.message, Handover):
            self._attempt("handover", partial(self._take_handover, item))
        else:
            self._attempt("message", partial(self._take, item))
        self.poll()

    def _attempt(self, what: str, call: Callable[[], None]) -> bool:
        """Makes the call. An exception ends the migration that it came from, at most; then it
        returns False."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - else it ends the engine with all its streams
            self._end_migration(what, error)
            return False
        return True

    def _attempt_pulled(self, pulled: Pulled) -> None:
        """Takes in the end of a pull. It comes only once, and the pull's room is kept until
        then."""
        take = partial(self._take, pulled)
        if not self._attempt("pull", take):
            self._attempt("pull", take)

    def _end_migration(self, what: str, error: Exception) -> list[Out]:
        why, now = self._errors.note(what, error), time.monotonic()
        out: list[Out] = self._errors.keep("end", lambda: self.llumlet.failed(why, now), [])
        self._send(out)
        return out

    def _each(self, what: str, call: Callable[[], list[Out]]) -> None:
        """Makes a call that looks at all migrations, and again for each of them that fails in
        it."""
        limits = self._config.limits
        for _ in range(limits.outgoing_max + limits.incoming_max + 1):
            if self._attempt(what, lambda: self._send(call())):
                break

    def _take(self, item: Item) -> None:
        self._send(self._take_in(item))

    def _take_in(self, item: Item) -> list[Out]:
        now = time.monotonic()
        if isinstance(item, Pulled):
            if item.ticket >= 0:
                return self.llumlet.pulled(item.ticket, item.error, item.bytes, item.seconds, now)
            self.port.destination.linked(item.ticket, item.error)
            return []
        if item is None:
            return []
        message = item.message
        if isinstance(message, Reserve):
            self._agents_of[message.source] = message.agents
        return self.llumlet.receive(message, now, item.at_s)

    def _take_handover(self, handover: ReceivedMessage) -> None:
        """Takes in a handover, and gives its pull a moment to end."""
        before = self.port.destination.last_ticket
        self._waiting_here = True
        try:
            self._take(handover)
            self._wait_for_final_pull(before)
        finally:
            self._waiting_here = False

    def _wait_for_final_pull(self, before: int) -> None:
        deadline_s = time.monotonic() + FINAL_PULL_WAIT_S
        wanted = self.port.destination.last_ticket
        while wanted != before and not self.port.destination.pulls_wait:
            try:
                pulled = self._here.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                break
            self._attempt_pulled(pulled)
            if pulled.ticket == wanted:
                break

    def poll(self, orders: Sequence[MoveOrder] = ()) -> None:
        """Between any two steps, and after each message. `orders`: the scheduler's, just come."""
        now = self._polled_s = time.monotonic()
        self._guarded.retry()
        while not self._here.empty():
            self._attempt_pulled(self._here.get())
        self._attempt("pull", self.port.destination.begin_pulls)
        self._take_orders(orders)
        if moving := self.llumlet.busy:
            self._each("turn", lambda: self.llumlet.poll(now))
        if self._calls:
            self._calls.make(now)
        self._switching.look(now, moving=moving)

    def _take_orders(self, orders: Sequence[MoveOrder]) -> None:
        came = []
        while not self._orders.empty():
            came.append(self._orders.get())
        came += orders
        if came:
            take = partial(self.llumlet.orders, came, self._polled_s)
            self._attempt("order", lambda: self._send(take()))

    def hold_s(self, ends_s: float | None) -> float:
        """How long the engine should begin no step, since a handover is near; 0 if it may begin
        one. `ends_s`: when the step in flight will have ended, if there is one."""
        if not self.llumlet.busy:
            return 0.0
        now = time.monotonic()
        free_s = now if ends_s is None else max(now, ends_s)
        return self._errors.keep("timing", lambda: self.llumlet.hold_s(free_s, now), 0.0)

    def defer_prefills(self) -> bool:
        """Whether the engine's next step should compute no prompts."""
        now = time.monotonic()
        return self._errors.keep(
            "timing", lambda: self.llumlet.defer_prefills(now), otherwise=False
        )

    def moving(self) -> tuple[MoveCounts, tuple[OrderId, ...]]:
        """What the next load report says of moves, and the orders it answers."""
        now = time.monotonic()
        moving = self._errors.keep("report", lambda: self.llumlet.moving(now), MoveCounts())
        return moving, self.llumlet.answered()

    def after_moves(self, why: str, call: Callable[[], Any], *, leaving: bool) -> Any:
        """Cancels all moves to here, and if `leaving` those from here, and makes the call once the
        last pull has ended and the last verdict has come: now, or later, which a future stands for.
        Requests are declined until `welcome`."""
        now = time.monotonic()
        self._each("cancellation", lambda: self.llumlet.cancel_all(why, now, leaving=leaving))
        return self._calls.wait(call, now, leaving=leaving)

    def after_calls(self, call: Callable[[], Any]) -> Any:
        """Makes a call once those that wait for moves have been made; see `after_moves`."""
        return self._calls.follow(call)

    def welcome(self) -> None:
        """Requests may come again, unless another call waits for them to have ended."""
        if not self._calls:
            self.llumlet.welcome()

    def hold_memory(self, *, held: bool) -> None:
        """Keeps peers from reading KV blocks here, or lets them read again."""
        if self._agents:
            self._engine.model_executor.collective_rpc("llumnix_hold", args=(held,))

    def leave(self, why: str) -> None:
        """Asks the office to have this engine emptied and stopped."""
        self._tell_frontend(OFFICE, DrainRequested(request=RequestId(""), why=why))

    def migrate(self, order: bytes) -> None:
        """A frontend's order (`Migrate`)."""
        message = decode(order)
        if not isinstance(message, Migrate):
            raise ProtocolError(f"not an order to migrate: {message}")
        self._begin(message, lambda: self.llumlet.migrate(message, time.monotonic()))

    def revive(self, order: Revive, request: Request) -> None:
        """A request comes whose engine died. `order` is the frontend's."""
        self._begin(order, lambda: self.llumlet.revive(order, request, time.monotonic()))

    def _begin(self, order: Grant, call: Callable[[], list[Out]]) -> None:
        """Makes a call that begins what the frontend ordered. Whatever comes of it, the frontend is
        told."""
        try:
            out = call()
        except Exception as error:  # noqa: BLE001 - the frontend is told, whatever it is
            out = self._end_migration("start", error)
            if not any(isinstance(o.message, MigrationEnded) for o in out):
                why = f"an error at the engine that got the order: {type(error).__name__}: {error}"
                self._send([not_taken(order, why)])
            return
        self._send(out)

    def engine_lost(self, engine: int, address: str, granted: list[str], client: int) -> None:
        """The frontend with that index says that another engine died."""
        lost, names, now = EngineIndex(engine), {MigrationId(m) for m in granted}, time.monotonic()
        self._each("peer's death", lambda: self.llumlet.engine_lost(lost, names, now, client))
        self._peers.disconnect(address)
        if (agents := self._agents_of.pop(lost, None)) is not None:
            self.port.destination.forget(agents)

    def client_lost(self, client: int) -> None:
        """A frontend died. Its requests come here no more, and it is told nothing."""
        self._each("frontend's death", lambda: self.llumlet.client_lost(client))

    def client_gone(self, requests: list[str]) -> None:
        """A frontend aborts these requests."""
        if self.llumlet.busy:
            self._each("client's end", lambda: self.llumlet.client_gone(requests))

    def _send(self, out: list[Out]) -> None:
        for item in out:
            if isinstance(item, ToPeer):
                # If that fails, it is as if the message was lost on its way.
                send = partial(self._peers.send, item.address, item.message)
                self._errors.keep("message", send, None)
            else:
                self._tell_frontend(item.client, item.message)

    def _tell_frontend(self, client: int, message: FrontendMessage) -> None:
        # In band, so that it stays in order with the tokens of the same engine.
        output = EngineCoreOutput(
            message.request, [], kv_transfer_params={IN_BAND: encode(message)}
        )
        self._put_out(client, output)

    def _lost(self, request: RequestId, client: int) -> None:
        """A request of this engine cannot go on. Tells its client."""
        self._put_out(client, EngineCoreOutput(request, [], finish_reason=FinishReason.ERROR))

    def _put_out(self, client: int, output: EngineCoreOutput) -> None:
        self._engine.output_queue.put_nowait((client, EngineCoreOutputs(outputs=[output])))

    # -- on other threads

    def order(self, order: MoveOrder) -> None:
        """The scheduler wants load moved away: an order that came while the engine stood still, or
        during a long step."""
        self._orders.put(order)
        self._enqueue(None)

    def _received(self, message: PeerMessage) -> None:
        self._enqueue(ReceivedMessage(message, time.monotonic()))

    def _enqueue(self, item: Item) -> None:
        self._engine.input_queue.put_nowait((HostItem, item))  # type: ignore[arg-type]

    def _pulled(self, pulled: Pulled) -> None:
        # In this order, since the engine looks into the queue once more after it stops waiting.
        self._here.put(pulled)
        if not self._waiting_here:
            self._enqueue(None)

    def _pull_failed(self, ticket: int, why: str) -> None:
        self._pulled(Pulled(ticket=ticket, bytes=0, seconds=0.0, error=why))

    def _beat(self) -> None:
        if self.llumlet.busy and time.monotonic() - self._polled_s > BEAT_EVERY_S:
            self._enqueue(None)
