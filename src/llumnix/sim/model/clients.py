"""The clients of a simulated deployment and their one frontend: requests, the tokens that they got,
the migrations that ended, and the requests whose engine died.

It calls nobody. It is told what happens, keeps the production table of streams
(core/streams/table.py) and the production order of revivals (core/streams/survival.py), and answers
with what engines are to be told. The cluster carries that out (sim/model/cluster.py).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llumnix.core.messages import (
    FrontendMessage,
    Grant,
    MigrationEnded,
    MigrationRequested,
    Revive,
    TookOver,
)
from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.effects import Abort, AskFate, Effect, Moved, Orphaned, TellLost
from llumnix.core.streams.stream import Refusal
from llumnix.core.streams.survival import Orphan, Orphans
from llumnix.core.streams.table import StreamTable
from llumnix.core.types import EngineIndex, InstanceId, MigrationId, RequestId
from llumnix.sim.model.jobs import Job, Token


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """Have the engine move a request away, or go on with one whose engine died."""

    engine: EngineIndex
    order: Grant


ToEngine = Abort | TellLost | AskFate | Begin
NOTHING: list[ToEngine] = []
ENGINE_DIED = "its engine died"
HUNG_UP = "hung up"
ONE_TOKEN = (0,)
"""Tokens are counted, and what they say is not modelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One migration that ended."""

    t_s: float  # when its epoch was granted
    ended_s: float
    request: RequestId
    source: InstanceId
    destination: InstanceId
    tokens: int  # of the request when it began
    waiting: bool  # whether the request had no token yet
    outcome: str  # `migrated` or `aborted`
    why: str


class Clients:
    """All clients and their frontend. `engines` are the instances whose engines it knows."""

    def __init__(self, survival: SurvivalSettings) -> None:
        self.streams: StreamTable[Job, Token] = StreamTable()
        self.orphans = Orphans(survival)
        self.pauses_s: list[float] = []  # from an engine's death to the next token, of each revival
        self.engines: dict[EngineIndex, InstanceId] = {}
        self.jobs: dict[RequestId, Job] = {}
        self.moves: list[Move] = []
        self._closed = 0
        self._under_way: dict[MigrationId, Move] = {}
        self._arrivals: Iterator[Job] = iter(())
        self._more = False

    def over(self) -> bool:
        """Whether every request has come and ended."""
        return not self._more and self._closed == len(self.jobs)

    # -- requests

    def expect(self, jobs: Iterable[Job]) -> None:
        """These requests will come, given in order of arrival."""
        self._arrivals, self._more = iter(jobs), True

    def next_arrival(self) -> Job | None:
        """The request that comes next; None after the last."""
        job = next(self._arrivals, None)
        self._more = job is not None
        return job

    def arrive(self, job: Job) -> None:
        """A client sends its request, which is now to be placed."""
        self.jobs[job.id] = job

    def placed(self, job: Job, engine: EngineIndex) -> None:
        """An engine was found for a request."""
        self.streams.placed(self.streams.open(job.id, job), engine)

    def refuse(self, job: Job, why: str) -> None:
        """Too many wait, and the client does not try again."""
        self._closed += 1
        job.error = why

    def fewest_streams(self, engines: Iterable[EngineIndex]) -> EngineIndex | None:
        """Where a frontend without a controller places a request."""
        return min(engines, key=lambda i: (self.streams.count(i), i), default=None)

    def hang_up(self, request: RequestId) -> list[ToEngine]:
        """The client goes away."""
        return self._close(request, HUNG_UP)

    def _close(
        self, request: RequestId, error: str, done_at: EngineIndex | None = None
    ) -> list[ToEngine]:
        """The stream is over. `done_at` generated the last token, and keeps nothing of it."""
        closed = self.streams.close(request)
        if closed is None:
            return NOTHING
        stream, holders = closed
        self.orphans.ended(request)
        self._closed += 1
        stream.info.error = error
        return [Abort(engine=e, request=request) for e in holders if e != done_at]

    # -- what engines say

    def receive(self, engine: EngineIndex, tokens: list[Token], now: float) -> list[ToEngine]:
        """The tokens of one step, one for each of these requests."""
        answers: list[ToEngine] = []
        due: list[Token] = []
        receive = self.streams.receive
        for token in tokens:
            effects = receive(engine, token[0], ONE_TOKEN, token, due)
            if due:
                aborts = self._client_gets(due.pop(), engine, now)
                if aborts:
                    answers += aborts
            if effects:
                answers += self._settle(effects, now)
        return answers

    def receive_llumlet(
        self, engine: EngineIndex, message: FrontendMessage, now: float
    ) -> list[ToEngine]:
        """What the llumlet of that engine says."""
        match message:
            case TookOver():
                return self._settle(self.streams.took_over(engine, message), now)
            case MigrationRequested():
                return self._grant(engine, message, now)
            case MigrationEnded():
                answers = self._settle(self.streams.ended(message), now)
                self._record(message, now)
                return answers
        return NOTHING

    def receive_fate(self, migration: MigrationId, fate: str, now: float) -> list[ToEngine]:
        """What a destination had decided when the source died."""
        return self._settle(self.streams.fate(migration, fate), now)

    def engine_lost(self, engine: EngineIndex, now: float) -> list[ToEngine]:
        """An engine is gone."""
        source = self.engines.pop(engine)
        moves = self._under_way.items()
        self._under_way = {m: move for m, move in moves if move.source != source}
        return self._settle(self.streams.engine_lost(engine, list(self.engines)), now)

    def needs(self, engine: EngineIndex) -> bool:
        """Whether streams are there, or moves from there of whose end it has not heard."""
        name = self.engines[engine]
        return self.streams.count(engine) > 0 or any(
            move.source == name for move in self._under_way.values()
        )

    def _client_gets(self, token: Token, engine: EngineIndex | None, now: float) -> list[ToEngine]:
        request, last = token
        job = self.jobs[request]
        closed = job.ended_s is not None or job.error
        assert not closed, f"{request} got a token after its end"
        job.got += 1
        if self.orphans.taken_up:
            self._goes_on(job, now)
        if job.first_s is None:
            job.first_s = now
        if not last:
            return NOTHING
        job.ended_s = now
        return self._close(request, "", done_at=engine)

    # -- migrations

    def _grant(
        self, engine: EngineIndex, message: MigrationRequested, now: float
    ) -> list[ToEngine]:
        stream = self.streams.get(message.request)
        source = self.engines.get(engine)
        destination = self.engines.get(message.destination)
        if stream is None or source is None or destination is None or stream.owner != engine:
            return NOTHING
        grant = self.streams.grant(
            message.request, message.destination, f"engine {message.destination}", wanted=True
        )
        if isinstance(grant, Refusal):
            return NOTHING
        self._under_way[grant.migration] = Move(
            t_s=now,
            ended_s=now,
            request=message.request,
            source=source,
            destination=destination,
            tokens=stream.info.prompt + stream.info.got,
            waiting=stream.info.first_s is None,
            outcome="under way",
            why=message.why,
        )
        return [Begin(engine=engine, order=grant)]

    def _record(self, message: MigrationEnded, now: float) -> None:
        move = self._under_way.pop(message.migration, None)
        if move is None:
            return
        if message.taken:
            move = replace(move, ended_s=now, outcome="migrated")
        else:
            move = replace(move, ended_s=now, outcome="aborted", why=message.why)
        self.moves.append(move)
        self.jobs[message.request].moves += message.taken

    def _settle(self, effects: Sequence[Effect], now: float) -> list[ToEngine]:
        """What follows at the clients happens here. Returns what follows at engines."""
        answers: list[ToEngine] = []
        for effect in effects:
            match effect:
                case Abort() | TellLost() | AskFate():
                    answers.append(effect)
                case Orphaned():
                    answers += self._orphaned(effect, now)
                case Moved():
                    answers += self._moved(effect, now)
        return answers

    def _moved(self, moved: Moved, now: float) -> list[ToEngine]:
        answers: list[ToEngine] = []
        self._goes_on(self.jobs[moved.request], now)
        for _ in moved.missing:
            answers += self._client_gets((moved.request, False), None, now)
        held: Any = moved.held  # The table passes on what it was given: tokens.
        for token in held:
            answers += self._client_gets(token, moved.owner, now)
        return answers

    # -- requests whose engine died

    def _orphaned(self, orphaned: Orphaned, now: float) -> list[ToEngine]:
        stream = self.streams.get(orphaned.request)
        assert stream is not None
        if stream.lives_used >= self.orphans.settings.lives:
            return self._close(orphaned.request, ENGINE_DIED)
        job = stream.info
        orphan = Orphan(
            request=job.id,
            priority=job.priority,
            tokens=job.prompt + job.got,
            arrived_s=job.arrived_s,
            since_s=now,
            why=orphaned.why,
            warm=orphaned.warm,
        )
        why = self.orphans.add(orphan, declined=orphaned.declined, now=now)
        return NOTHING if why is None else self._close(job.id, ENGINE_DIED)

    def revive(
        self,
        serving: Collection[EngineIndex],
        choose: Callable[[Job], EngineIndex | None],
        now: float,
    ) -> list[ToEngine]:
        """Has other engines go on with as many as may now. `choose` is the scheduler's word."""
        answers: list[ToEngine] = []
        orphans = self.orphans
        for request in orphans.late(now):
            answers += self._close(request, ENGINE_DIED)
        while (orphan := orphans.next(serving, now)) is not None:
            engine = orphan.warm
            if engine not in serving or not orphans.may_take(engine, orphan):
                engine = choose(self.jobs[orphan.request])
            if engine not in serving or not orphans.may_take(engine, orphan):
                engine = orphans.fewest(serving, orphan)
            if engine is None:
                break
            order = self.streams.revive(orphan.request, engine)
            assert isinstance(order, Revive), f"{orphan.request}: {order}"
            orphans.begin(orphan.request, engine, len(order.outputs))
            answers.append(Begin(engine=engine, order=order))
        return answers

    def _goes_on(self, job: Job, now: float) -> None:
        """A token is here, or it has moved. If it was being taken up, that is over."""
        if self.orphans.engine_of(job.id) is not None:
            orphan = self.orphans.drop(job.id)
            assert orphan is not None
            job.revivals += 1
            self.pauses_s.append(now - orphan.since_s)
