"""The office: what several frontends have in common, in the process that has the fleet.

It tells the frontends what the fleet wants, and counts together what they hold. Its own client of
the engines has number 0 and no requests.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import zmq
import zmq.asyncio

from llumnix.core.events import DrainInstance, InstanceLost
from llumnix.core.supervision.frontends import FrontendStatus, Roster
from llumnix.core.supervision.restart import GiveUp, RestartAfter
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.errors import LlumnixError
from llumnix.frontend.controller_link import ControllerLink
from llumnix.frontend.office.asking import (
    SOON_S,
    Asking,
    LineClosedError,
    answer_to,
    why_failed,
)
from llumnix.frontend.office.engine_client import EngineClient
from llumnix.frontend.office.messages import (
    Answer,
    Ask,
    EngineDied,
    EngineSaid,
    EngineWanted,
    FleetWants,
    Hello,
    Holding,
    Message,
    Question,
    Serving,
    TurnIs,
    WhoIsAccused,
    messages,
)

logger = logging.getLogger("llumnix.office")

LOST_AGAIN_S = (0.0, 0.3, 1.7)
"""An engine is told of a lost client after these pauses: what that had sent may come later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """The answers of frontends, by client, and the ids of those that gave none."""

    answers: dict[int, Any]
    missing: list[str]


@dataclass(slots=True, kw_only=True, eq=False)
class _Line:
    """To one frontend's process."""

    identity: bytes  # of its socket
    asking: Asking
    heard_s: float  # when it said something last
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Office:
    """`Frontends` (seam.py) of several processes."""

    def __init__(
        self, client: EngineClient, link: ControllerLink, address: str, count: int, slots: int
    ) -> None:
        """`address` is the ZMQ address for frontends; `slots`: how many instances have metrics."""
        self.link = link
        self.drain_requests: asyncio.Queue[DrainInstance] = client.drain_requests
        self.engine_client = client
        self.roster = Roster(count)
        self.leaving = False  # whether a stop has begun
        self.stopping = False  # whether frontends let no more requests in
        self.on_question: Callable[[int, Question], Coroutine[Any, Any, Any]] = _nobody
        self.on_message: Callable[[Message], None] = lambda message: None
        self.on_greeted: Callable[[int], None] = lambda client: None
        self.on_serving: Callable[[], None] = lambda: None
        self._address = address
        self._slots = slots
        self._open = False
        self._version = 0
        self._closed: dict[EngineIndex, int] = {}  # the version since which each takes nothing
        self._lines: dict[int, _Line] = {}
        self._turn: int | None = None  # whose it is, as the frontends know it
        self._telling: asyncio.Handle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begins to listen; call it with the event loop running."""
        self._loop = asyncio.get_running_loop()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(self._address)
        self.engine_client.on_statistics = self._pass_statistics_on
        self.begin(self._listen())

    def close(self) -> None:
        """Stops listening."""
        for task in self._tasks:
            task.cancel()
        self._socket.close()

    def open(self) -> None:
        """From now on frontends let requests in."""
        self._open = True
        self._changed()

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Does this beside."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- `Frontends`

    @property
    def paused(self) -> bool:
        """See `Frontends`, as for all below."""
        return self.engine_client.shared_state.paused

    def expect(self, instance: InstanceId, engine_index: EngineIndex, slot: int) -> None:
        self.engine_client.expect(instance, engine_index, slot)
        self._changed()

    def locate(self, engine_index: EngineIndex, address: str) -> None:
        self.engine_client.engines.locate(engine_index, address)
        self._changed()

    async def ready(self, engine_index: EngineIndex) -> None:
        await self.engine_client.engines.ready(engine_index)

    async def bring_up(self, engine_index: EngineIndex) -> str | None:
        why = await self.engine_client.bring_up(engine_index)
        self._changed()
        return why

    def accept(self, engine_index: EngineIndex, accepting: bool) -> None:
        self.engine_client.engines.accept(engine_index, accepting)
        self._changed()
        if accepting:
            self._closed.pop(engine_index, None)
        else:
            self._closed.setdefault(engine_index, self._version)

    def note_silent(self, engine_index: EngineIndex, silent: bool) -> None:
        state = self.engine_client.shared_state
        if (engine_index in state.silent) != silent:
            state.note_silent(engine_index, silent)
            self._changed()

    async def lose(
        self,
        engine_index: EngineIndex,
        *,
        blamed: bool = False,
        suspects: frozenset[RequestId] | None = None,
    ) -> int:
        engine = self.engine_client.engines.get(engine_index)
        if engine is None:
            return 0
        accused = await self._accused(engine_index, suspects) if blamed else None
        if not self.engine_client.lose(engine_index):
            return 0  # It was told meanwhile.
        self._closed.pop(engine_index, None)
        self.link.tell(InstanceLost(instance=engine.instance, engine_index=engine_index))
        # Before the frontends are told what the fleet wants now, where the engine is missing.
        death = EngineDied(engine_index=engine_index, blamed=blamed, suspects=accused)
        waiting = self._put_all(death)
        self._changed()
        gathered = await self._gather(waiting, SOON_S)
        return sum(gathered.answers.values())

    async def _accused(
        self, engine_index: EngineIndex, suspects: frozenset[RequestId] | None
    ) -> list[RequestId]:
        """The requests of all frontends that may have killed the engine."""
        among = None if suspects is None else sorted(suspects)
        gathered = await self.ask_all(WhoIsAccused(engine_index=engine_index, among=among))
        return [request for mine in gathered.answers.values() for request in mine]

    def in_flight(self, engine_index: EngineIndex) -> int:
        return self.roster.in_flight(engine_index)

    def may_hold(self, engine_index: EngineIndex) -> bool:
        return self.roster.may_hold(engine_index, self._closed.get(engine_index, self._version))

    def heard_s(self, engine_index: EngineIndex) -> float | None:
        times = (
            self.roster.heard_s(engine_index),
            self.engine_client.engines.heard_s(engine_index),
        )
        return max((t for t in times if t is not None), default=None)

    def status(self) -> list[FrontendStatus]:
        return list(self.roster.status())

    def grow_metrics(self, slots: int) -> None:
        if slots > self._slots:
            self._slots = slots
            self._changed()

    # -- to the frontends

    def _changed(self) -> None:
        """What the fleet wants has changed. Told once in a turn of the event loop."""
        self._version += 1
        if self._telling is None:
            self._telling = self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        self._telling = None
        wants = self._wants()
        for client in self._lines:
            self.send(client, wants)

    def _wants(self) -> FleetWants:
        state = self.engine_client.shared_state
        engines = [
            EngineWanted(
                engine_index=e.engine_index,
                instance=e.instance,
                slot=e.slot,
                address=e.address,
                accepting=e.accepting,
                joined=e.engine_index in state.joined,
                silent=e.engine_index in state.silent,
            )
            for e in self.engine_client.engines.by_index.values()
        ]
        return FleetWants(
            version=self._version, engines=engines, slots=self._slots, open=self._open
        )

    def send(self, client: int, message: Message) -> None:
        """Sends a frontend a message, if it is there. Nothing is waited for: it reads, or it is
        ended."""
        if (line := self._lines.get(client)) is not None:
            self._socket.send_multipart([line.identity, messages.encode(message)])

    def send_all(self, message: Message) -> None:
        """Sends all frontends a message."""
        for client in self._lines:
            self.send(client, message)

    async def ask(self, client: int, question: Question, timeout_s: float | None = SOON_S) -> Any:
        """What one frontend answers."""
        line = self._lines.get(client)
        if line is None:
            raise LlumnixError(f"the frontend that has it has just ended (client {client})")
        return await line.asking.ask(question, timeout_s)

    async def ask_all(self, question: Question, timeout_s: float = SOON_S) -> Gathered:
        """What all frontends answer within so long. The question is sent at once."""
        return await self._gather(self._put_all(question), timeout_s)

    def _put_all(self, question: Question) -> dict[int, asyncio.Future[Any]]:
        return {client: line.asking.put(question) for client, line in self._lines.items()}

    async def _gather(self, waiting: dict[int, asyncio.Future[Any]], timeout_s: float) -> Gathered:
        names = {client: self.roster.name(client) for client in waiting}
        if waiting:
            await asyncio.wait(waiting.values(), timeout=timeout_s)
        answers, missing = {}, []
        for client, answer in waiting.items():
            done = answer.done() and not answer.cancelled()
            error = answer.exception() if done else None
            if done and error is None:
                answers[client] = answer.result()
                continue
            answer.cancel()
            missing.append(names[client])
            if error is not None and not isinstance(error, LineClosedError):
                why = f"{names[client]}: {why_failed(error)}"
                self.engine_client.complaints.note("A frontend failed on a question", why)
        return Gathered(answers=answers, missing=missing)

    def _pass_statistics_on(self, frames: list[bytes]) -> None:
        """To any of them: metrics are those of all."""
        client = max(self._lines, key=lambda c: self._lines[c].heard_s, default=None)
        if client is not None:
            self.send(client, EngineSaid(frames=frames))

    def _pass_turn_on(self) -> None:
        turn = self.roster.turn
        if turn == self._turn:
            return
        if self._turn is not None:
            self.send(self._turn, TurnIs(mine=False))
        self._turn = turn
        if turn is not None:
            self.send(turn, TurnIs(mine=True))

    # -- from the frontends

    async def _listen(self) -> None:
        while True:
            identity, payload = await self._socket.recv_multipart()
            try:
                self._take(identity, messages.decode(payload))
            except Exception:
                logger.exception("A frontend's message could not be handled")

    def _take(self, identity: bytes, message: Message) -> None:
        if isinstance(message, Hello):
            self._greet(identity, message)
            return
        client = next((c for c, line in self._lines.items() if line.identity == identity), None)
        if client is None:
            return  # Its process has ended.
        line = self._lines[client]
        line.heard_s = self._loop.time()
        match message:
            case Answer():
                line.asking.answered(message)
            case Ask():
                self._answer(client, line, message)
            case Holding(held=held):
                self.roster.holds(client, held)
                self._pass_turn_on()
            case Serving():
                self.roster.serves(client, self._loop.time())
                self.on_serving()
            case _:
                self.on_message(message)

    def _greet(self, identity: bytes, hello: Hello) -> None:
        client = hello.client
        if self.roster.slot(client) is None:
            return  # Its process has ended.
        asking = Asking(lambda message: self.send(client, message))
        self._lines[client] = _Line(identity=identity, asking=asking, heard_s=self._loop.time())
        self.roster.greeted(client, hello.pid)
        self.on_greeted(client)
        self.send(client, self._wants())

    def _answer(self, client: int, line: _Line, ask: Ask) -> None:
        async def work() -> None:
            answer = await answer_to(ask, lambda question: self.on_question(client, question))
            self.send(client, answer)

        task = asyncio.create_task(work())
        line.tasks.add(task)
        task.add_done_callback(line.tasks.discard)

    def now_s(self) -> float:
        """The monotonic clock, in seconds."""
        return time.monotonic()

    def said_s(self, client: int) -> float | None:
        """When a frontend said something last, by the event loop's clock; None if it never did."""
        line = self._lines.get(client)
        return None if line is None else line.heard_s

    # -- their ends

    def ended(self, client: int, why: str) -> RestartAfter | GiveUp | None:
        """A frontend's process has ended. Its requests are dropped at the engines. Returns what is
        to follow."""
        line = self._lines.pop(client, None)
        if line is not None:
            line.asking.close(why)
        decided = self.roster.ended(client, why, self._loop.time())
        self._pass_turn_on()
        if not self.stopping:
            self.begin(self._drop_requests_of(client))
        return decided

    async def _drop_requests_of(self, client: int) -> None:
        for pause_s in LOST_AGAIN_S:
            await asyncio.sleep(pause_s)
            await self.engine_client.drop_client(client)


async def _nobody(client: int, question: Question) -> Any:
    raise LlumnixError("nobody answers questions here")
