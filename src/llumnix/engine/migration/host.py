"""Hosts the llumlet beside its engine: carries messages in and out, on the engine's own thread.

What comes from other threads (peers, finished pulls, the beat) goes through the engine's input
queue, so it is dealt with in order with requests and aborts, between two steps, and wakes an engine
that stands still.

vLLM 0.32 internals relied on here (tests/house/test_vllm_migration_contract.py fails when one
changes): `EngineCoreProc.input_queue`, a queue of (kind, content) pairs that the busy loop empties
into `_handle_client_request`; `output_queue`, of (client index, `EngineCoreOutputs`), sent in
order; `EngineCoreOutput.kv_transfer_params`, which may hold anything that msgpack can.
"""

import queue
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCoreProc

from llumnix.core.events import MoveLoad
from llumnix.core.limits import MigrationLimits
from llumnix.core.messages import (
    FrontendMessage,
    Handover,
    LeaveWanted,
    Migrate,
    MigrationEnded,
    Out,
    PeerMessage,
    Reserve,
    ToPeer,
)
from llumnix.core.migration.llumlet import Llumlet
from llumnix.core.migration.port import EnginePort
from llumnix.core.reports import MoveCounts
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import EngineIndex, MigrationId, OrderId, RequestId
from llumnix.engine.cores import SWITCH_INTERVAL_S
from llumnix.engine.kv.agent import TransferOptions
from llumnix.engine.kv.agent_client import AgentClient, Pulled
from llumnix.engine.migration.guard import ErrorLog, GuardedPort
from llumnix.engine.migration.peers import Peers
from llumnix.engine.migration.unsupported import ours, why_engine_cannot
from llumnix.engine.migration.vllm_source import VllmPort
from llumnix.errors import ProtocolError
from llumnix.sockets import SocketKeys
from llumnix.wire import decode, encode

IN_BAND = "llumnix"
"""Key under which an output carries a message of ours in its `kv_transfer_params`."""
BEAT_EVERY_S = 0.05
REST_WAIT_S = 0.003
"""How long the engine waits on the spot for the last blocks of a request that stands still: they
are few and come in less than a millisecond, and going on without them would cost it a step."""
HURRY_S = 0.1
"""So long after a migration threads still take the interpreter's lock fast: the first token of what
came should not leave later than the last one left its source."""
CALL_OFF_MAX_S = 30.0
"""So long a call that must find no block in use waits for the ends of moves that were called off;
then it is made, and fails if vLLM has it fail."""
STEP_LINE = Callable[[str, MigrationId, str, str, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSeat:
    """Where a llumlet and its workers listen: `peers` a ZMQ address, `agents` in the form of
    engine/kv/agent.py, both with `{engine}` and `{host}` to be filled in here, the latter with
    `{rank}` too. `key` opens the workers to each other. `settings`: the scheduler's."""

    peers: str
    agents: str
    key: bytes = field(repr=False)
    limits: MigrationLimits
    settings: SchedulerSettings
    transfer: TransferOptions


class FromOutside:
    """Kind of what we put into the engine's input queue."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a peer said, and when that arrived: the engine may be in a step, and look later."""

    message: PeerMessage
    at_s: float


Item = Heard | Pulled | None


@dataclass(frozen=True, slots=True)
class _AfterMoves:
    """A call that waits until nothing moves, but not beyond `until_s`, and its answer."""

    call: Callable[[], Any]
    leaving: bool
    until_s: float
    answer: "Future[Any]" = field(default_factory=Future)

    def make(self) -> None:
        """Makes it. What it returns may be a future of vLLM's itself."""
        try:
            result = self.call()
        except Exception as error:  # noqa: BLE001 - it is for whoever asked
            self.answer.set_exception(error)
            return
        if not isinstance(result, Future):
            self.answer.set_result(result)
        elif not result.done():
            result.add_done_callback(self._pass_on)
        else:
            self._pass_on(result)

    def _pass_on(self, result: "Future[Any]") -> None:
        if (error := result.exception()) is not None:
            self.answer.set_exception(error)
        else:
            self.answer.set_result(result.result())


class LlumletHost:
    """One engine's."""

    def __init__(
        self,
        engine: EngineCoreProc,
        index: EngineIndex,
        seat: HostSeat,
        host: str,
        on_step: STEP_LINE,
        keys: SocketKeys | None = None,
    ) -> None:
        """`host`: this host's address in the cluster."""
        self._engine = engine
        self._index = index
        self._seat = seat
        self._on_step = on_step
        self._polled_s = 0.0
        self._calm_s = sys.getswitchinterval()
        self._hurry_until_s = 0.0
        self._hurried = False
        self._agents_of: dict[EngineIndex, list[str]] = {}
        self._waiting_here = False
        self._here: queue.SimpleQueue[Pulled] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[MoveLoad] = queue.SimpleQueue()
        self._agents: list[str] = []
        self._after: list[_AfterMoves] = []
        self._host = f"[{host}]" if ":" in host else host  # IPv6.
        peers = seat.peers.format(engine=index, host=self._host)
        self._peers = Peers(peers, self._heard, self._beat, keys)
        self._errors = ErrorLog()

    def start(self) -> None:
        """Opens the workers and the line to the peers. Before the busy loop runs."""
        self._peers.bind()
        config = self._engine.vllm_config
        if current_platform.is_cpu() and ours(config):
            self._engine.model_executor.collective_rpc("llumnix_keep_generators")
        agents: list[str] = []
        if why_engine_cannot(config, self._engine.scheduler) is None:
            listen = self._seat.agents.format(engine=self._index, host=self._host, rank="{rank}")
            agents = self._engine.model_executor.collective_rpc(
                "llumnix_open", args=(listen, self._seat.key, self._seat.transfer)
            )
            self._agents = agents
            # A worker in this very process has set it.
            sys.setswitchinterval(self._calm_s)
        self._client = AgentClient(agents=agents, key=self._seat.key, on_pulled=self._pulled)
        self._client.start()
        self.port = VllmPort(self._engine, agents, self._client, self._pull_failed)
        self._guarded = GuardedPort(
            cast("EnginePort", self.port), self._errors, self._pull_failed, self._lost
        )
        self.llumlet = Llumlet(
            self._index,
            self._peers.address,
            cast("EnginePort", self._guarded),
            self._seat.limits,
            self._on_step,
            self._seat.settings,
        )
        self._peers.start()

    def close(self) -> None:
        """Ends all of it."""
        self._client.close()
        self._peers.close()

    @property
    def address(self) -> str:
        """Where other llumlets send to this one."""
        return self._peers.address

    # -- on the engine's thread

    def handle(self, item: Item) -> None:
        """What came through the input queue."""
        if isinstance(item, Heard) and isinstance(item.message, Handover):
            self._attempt("handover", partial(self._take_rest, item))
        else:
            self._attempt("message", partial(self._take, item))
        self.poll()

    def _attempt(self, what: str, call: Callable[[], None]) -> bool:
        """Whether it went well; an exception ends the migration that it came from, at most."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - else it ends the engine with all its streams
            self._end_migration(what, error)
            return False
        return True

    def _attempt_pulled(self, pulled: Pulled) -> None:
        """Takes in the end of a pull, which comes once: its room is kept until then."""
        take = partial(self._take, pulled)
        if not self._attempt("pull", take):
            self._attempt("pull", take)

    def _end_migration(self, what: str, error: Exception) -> list[Out]:
        why, now = self._errors.note(what, error), time.monotonic()
        out: list[Out] = self._errors.keep("end", lambda: self.llumlet.failed(why, now), [])
        self._send(out)
        return out

    def _each(self, what: str, call: Callable[[], list[Out]]) -> None:
        """Makes a call that looks at all migrations: again, if one of them failed in it."""
        limits = self._seat.limits
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
            self.port.met(item.ticket, item.error)
            return []
        if item is None:
            return []
        message = item.message
        if isinstance(message, Reserve):
            self._agents_of[message.source] = message.agents
        return self.llumlet.receive(message, now, item.at_s)

    def _take_rest(self, handover: Heard) -> None:
        """Takes a handover in, and gives its pull a moment to end."""
        before = self.port.last_ticket
        self._waiting_here = True
        try:
            self._take(handover)
            self._wait_for_rest(before)
        finally:
            self._waiting_here = False

    def _wait_for_rest(self, before: int) -> None:
        deadline_s = time.monotonic() + REST_WAIT_S
        wanted = self.port.last_ticket
        while wanted != before and not self.port.pulls_wait:
            try:
                pulled = self._here.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                break
            self._attempt_pulled(pulled)
            if pulled.ticket == wanted:
                break

    def poll(self) -> None:
        """Between any two steps."""
        self._polled_s = time.monotonic()
        self._guarded.retry()
        while not self._here.empty():
            self._attempt_pulled(self._here.get())
        self._attempt("pull", self.port.begin_pulls)
        if not self._orders.empty():
            self._attempt("order", self._take_orders)
        busy = self.llumlet.busy
        if busy:
            self._each("turn", lambda: self.llumlet.poll(self._polled_s))
            self._hurry_until_s = self._polled_s + HURRY_S
        if self._after:
            self._make_calls()
        hurry = self._polled_s < self._hurry_until_s
        if hurry is not self._hurried:
            self._hurried = hurry
            sys.setswitchinterval(SWITCH_INTERVAL_S if hurry else self._calm_s)

    def _take_orders(self) -> None:
        orders = []
        while not self._orders.empty():
            orders.append(self._orders.get())
        self._send(self.llumlet.orders(orders, self._polled_s))

    def hold_s(self, ends_s: float | None) -> float:
        """How long the engine should begin no step, for a handover is near; 0: not at all.
        `ends_s`: when the step in flight will have ended, if there is one."""
        if not self.llumlet.busy:
            return 0.0
        now = time.monotonic()
        free_s = now if ends_s is None else max(now, ends_s)
        return self._errors.keep("timing", lambda: self.llumlet.hold_s(free_s, now), 0.0)

    def quiet(self) -> bool:
        """Whether the engine's next step should compute no prompts."""
        now = time.monotonic()
        return self._errors.keep("timing", lambda: self.llumlet.quiet(now), otherwise=False)

    def moving(self) -> tuple[MoveCounts, tuple[OrderId, ...]]:
        """What the next load report says of moves, and the orders it answers."""
        now = time.monotonic()
        moving = self._errors.keep("report", lambda: self.llumlet.moving(now), MoveCounts())
        return moving, self.llumlet.answered()

    def after_moves(self, why: str, call: Callable[[], Any], *, leaving: bool) -> Any:
        """Calls off all requests on their way here, and if `leaving` those on their way from here,
        and makes the call once the last pull has ended and the last verdict has come: now, or
        later, which a future stands for. Requests are declined until `welcome`."""
        now = time.monotonic()
        self._each("call-off", lambda: self.llumlet.call_off(why, now, leaving=leaving))
        after = _AfterMoves(call, leaving, now + CALL_OFF_MAX_S)
        self._after.append(after)
        self._make_calls()
        return after.answer.result() if after.answer.done() else after.answer

    def after_calls(self, call: Callable[[], Any]) -> Any:
        """Makes a call once those that wait for moves have been made; see `after_moves`."""
        if not self._after:
            return call()
        after = _AfterMoves(call, leaving=False, until_s=0.0)
        self._after.append(after)
        return after.answer

    def welcome(self) -> None:
        """Requests may come again, unless another call waits for them to have ended."""
        if not self._after:
            self.llumlet.welcome()

    def hold_memory(self, *, held: bool) -> None:
        """Keeps peers from reading KV blocks here, or lets them again."""
        if self._agents:
            self._engine.model_executor.collective_rpc("llumnix_hold", args=(held,))

    def _make_calls(self) -> None:
        now = time.monotonic()
        while self._after:
            after = self._after[0]
            if now < after.until_s and not self.llumlet.still(leaving=after.leaving):
                break  # The others came later.
            del self._after[0]
            if not any(a.leaving for a in self._after):
                self.llumlet.may_leave()
            after.make()

    def leave(self, why: str) -> None:
        """Asks the frontend to have this engine emptied and stopped."""
        self._tell_frontend(LeaveWanted(request=RequestId(""), why=why))

    def migrate(self, order: bytes) -> None:
        """A frontend's order (`Migrate`)."""
        message = decode(order)
        if not isinstance(message, Migrate):
            raise ProtocolError(f"not an order to migrate: {message}")
        try:
            out = self.llumlet.migrate(message, time.monotonic())
        except Exception as error:  # noqa: BLE001 - the frontend is told, whatever it is
            out = self._end_migration("start", error)
            if not any(isinstance(o.message, MigrationEnded) for o in out):
                why = f"an error at its source: {type(error).__name__}: {error}"
                self._tell_frontend(
                    MigrationEnded(
                        migration=message.migration, request=message.request, taken=False, why=why
                    )
                )
            return
        self._send(out)

    def engine_lost(self, engine: int, address: str, granted: list[str]) -> None:
        """A frontend says that another engine died."""
        names = {MigrationId(m) for m in granted}
        self._each(
            "peer's death",
            lambda: self.llumlet.engine_lost(EngineIndex(engine), names, time.monotonic()),
        )
        self._peers.forget(address)
        if (agents := self._agents_of.pop(EngineIndex(engine), None)) is not None:
            self.port.forget(agents)

    def client_gone(self, requests: list[str]) -> None:
        """A frontend aborts these requests."""
        if self.llumlet.busy:
            self._each("client's end", lambda: self.llumlet.client_gone(requests))

    def _send(self, out: list[Out]) -> None:
        for item in out:
            if isinstance(item, ToPeer):
                # As if it was lost on its way, if that fails.
                say = partial(self._peers.say, item.address, item.message)
                self._errors.keep("message", say, None)
            else:
                self._tell_frontend(item.message)

    def _tell_frontend(self, message: FrontendMessage) -> None:
        # In band, so that it stands in one order with the tokens of the same engine.
        output = EngineCoreOutput(
            message.request, [], kv_transfer_params={IN_BAND: encode(message)}
        )
        self._engine.output_queue.put_nowait((0, EngineCoreOutputs(outputs=[output])))

    def _lost(self, request: RequestId) -> None:
        """A request of this engine cannot go on: its client is told."""
        output = EngineCoreOutput(request, [], finish_reason=FinishReason.ERROR)
        self._engine.output_queue.put_nowait((0, EngineCoreOutputs(outputs=[output])))

    # -- on other threads

    def order(self, order: MoveLoad) -> None:
        """The scheduler wants load moved away."""
        # Not through the input queue: of those that come during one step only the newest count.
        self._orders.put(order)
        self._from_outside(None)

    def _heard(self, message: PeerMessage) -> None:
        self._from_outside(Heard(message, time.monotonic()))

    def _from_outside(self, item: Item) -> None:
        self._engine.input_queue.put_nowait((FromOutside, item))  # type: ignore[arg-type]

    def _pulled(self, pulled: Pulled) -> None:
        # In this order: who stops waiting looks once more after that.
        self._here.put(pulled)
        if not self._waiting_here:
            self._from_outside(None)

    def _pull_failed(self, ticket: int, why: str) -> None:
        self._pulled(Pulled(ticket=ticket, bytes=0, seconds=0.0, error=why))

    def _beat(self) -> None:
        if self.llumlet.busy and time.monotonic() - self._polled_s > BEAT_EVERY_S:
            self._from_outside(None)
