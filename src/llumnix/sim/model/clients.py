"""The frontend and its clients in virtual time: it places requests, follows their streams, grants
migrations their epochs. The production table of streams says which engine owns each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llumnix.core.events import Dispatch, RequestArrived
from llumnix.core.messages import Migrate, MigrationEnded, MigrationRequested, TookOver
from llumnix.core.streams.effects import Abort, AskFate, Effect, Moved, Orphaned, TellLost
from llumnix.core.streams.stream import Refusal
from llumnix.core.streams.table import StreamTable
from llumnix.core.types import EngineIndex, InstanceId, MigrationId, RequestId
from llumnix.sim.model.batching import Job

if TYPE_CHECKING:
    from llumnix.sim.model.cluster import Cluster, Instance

RETRY_S = 0.05
"""How soon a request that no instance takes is placed again."""

Token = tuple[RequestId, bool]
"""One more token of a request, and whether it is the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One migration that ended. `outcome`: `migrated` or `aborted`."""

    t_s: float
    ended_s: float
    request: RequestId
    source: InstanceId
    destination: InstanceId
    tokens: int
    waiting: bool
    outcome: str
    why: str


class Frontend:
    """All clients' one frontend."""

    def __init__(self, cluster: "Cluster") -> None:
        self.streams: StreamTable[Job, Token] = StreamTable()
        self.jobs: dict[RequestId, Job] = {}
        self.moves: list[Move] = []
        self.ended = 0
        self._cluster = cluster
        self._began: dict[MigrationId, Move] = {}
        self._arrivals: Iterable[Job] = iter(())
        self._more = False

    @property
    def over(self) -> bool:
        """Whether every request has come and ended."""
        return not self._more and self.ended == len(self.jobs)

    # -- requests

    def serve(self, jobs: Iterable[Job]) -> None:
        """These requests will come, given in order of arrival."""
        self._arrivals, self._more = iter(jobs), True
        self._next_arrival()

    def _next_arrival(self) -> None:
        job = next(iter(self._arrivals), None)
        if job is None:
            self._more = False
        else:
            self._cluster.at(job.arrived_s, self._arrive, job)

    def _arrive(self, job: Job) -> None:
        self.jobs[job.id] = job
        self._place(job)
        self._next_arrival()

    def _place(self, job: Job) -> None:
        cluster = self._cluster
        index = self._ask(job) if cluster.scheduler is not None else self._by_itself()
        if index is None:
            cluster.at(cluster.now + RETRY_S, self._place, job)
            return
        self.streams.placed(self.streams.open(job.id, job), index)
        cluster.tell_engine(index, self._add, job)

    def _ask(self, job: Job) -> EngineIndex | None:
        fact = RequestArrived(
            request=job.id, prompt_tokens=job.prompt, priority=job.priority, prefix=job.prefix
        )
        (decision,) = self._cluster.decide(fact)
        return decision.engine_index if isinstance(decision, Dispatch) else None

    def _by_itself(self) -> EngineIndex | None:
        """Without a controller it places by itself: fewest of its own first."""
        serving = self._cluster.serving()
        return min(serving, key=lambda i: (self.streams.count(i), i), default=None)

    def _add(self, index: EngineIndex, job: Job) -> None:
        if self.streams.get(job.id) is not None:
            self._cluster.admit(index, job)

    def hang_up(self, request: RequestId) -> None:
        """The client goes away."""
        self._close(request, "hung up")

    def _close(self, request: RequestId, error: str, done_at: EngineIndex | None = None) -> None:
        """The stream is over. `done_at` has said its last token, and keeps nothing of it."""
        closed = self.streams.close(request)
        if closed is None:
            return
        stream, holders = closed
        self.ended += 1
        stream.info.error = error
        for engine in holders:
            if engine != done_at:
                self._cluster.tell_engine(engine, self._cluster.abort, request)

    # -- what engines say

    def hear(self, index: EngineIndex, said: list[Token]) -> None:
        """Tokens of one step, one for each of these requests."""
        due: list[Token] = []
        for token in said:
            effects = self.streams.receive(index, token[0], 1, token, due)
            if due:
                self._client_gets(due.pop(), index)
            if effects:
                self._perform(effects)

    def _client_gets(self, token: Token, index: EngineIndex | None) -> None:
        request, over = token
        stream = self.streams.get(request)
        assert stream is not None, f"{request} got a token after its end"
        job = stream.info
        job.got += 1
        if job.first_s is None:
            job.first_s = self._cluster.now
        if over:
            job.ended_s = self._cluster.now
            self._close(request, "", done_at=index)

    # -- migrations

    def hear_llumlet(self, index: EngineIndex, message: Any) -> None:
        """What an engine's llumlet says."""
        if isinstance(message, TookOver):
            self._perform(self.streams.took_over(index, message))
        elif isinstance(message, MigrationRequested):
            self._wanted(index, message)
        elif isinstance(message, MigrationEnded):
            self._perform(self.streams.ended(message))
            self._note(message)

    def has_business_with(self, instance: "Instance") -> bool:
        """Whether streams are there, or moves from there whose end it has not heard of."""
        moves = any(m.source == instance.id for m in self._began.values())
        return moves or self.streams.count(instance.index) > 0

    def engine_lost(self, instance: "Instance", others: list[EngineIndex]) -> None:
        """An instance's engine is gone."""
        self._began = {m: move for m, move in self._began.items() if move.source != instance.id}
        self._perform(self.streams.engine_lost(instance.index, others))

    def _wanted(self, index: EngineIndex, message: MigrationRequested) -> None:
        stream = self.streams.get(message.request)
        names = [self._cluster.name_of(i) for i in (index, message.destination)]
        if stream is None or None in names or stream.owner != index:
            return
        order = self.streams.grant(
            message.request, message.destination, f"engine {message.destination}", wanted=True
        )
        if not isinstance(order, Refusal):
            self._began[order.migration] = Move(
                t_s=self._cluster.now,
                ended_s=self._cluster.now,
                request=message.request,
                source=InstanceId(str(names[0])),
                destination=InstanceId(str(names[1])),
                tokens=stream.info.prompt + stream.info.got,
                waiting=stream.info.first_s is None,
                outcome="under way",
                why=message.why,
            )
            self._cluster.tell_engine(index, self._migrate, order)

    def _migrate(self, index: EngineIndex, order: Migrate) -> None:
        self._cluster.llumlet(index, lambda llumlet, now: llumlet.migrate(order, now))

    def _note(self, message: MigrationEnded) -> None:
        began = self._began.pop(message.migration, None)
        if began is None:
            return
        self.moves.append(
            Move(
                t_s=began.t_s,
                ended_s=self._cluster.now,
                request=began.request,
                source=began.source,
                destination=began.destination,
                tokens=began.tokens,
                waiting=began.waiting,
                outcome="migrated" if message.taken else "aborted",
                why=began.why if message.taken else message.why,
            )
        )
        self.jobs[message.request].moves += message.taken

    def _perform(self, effects: Sequence[Effect]) -> None:
        cluster = self._cluster
        for effect in effects:
            match effect:
                case Abort(engine=engine, request=request):
                    cluster.tell_engine(engine, cluster.abort, request)
                case TellLost(engine=engine, lost=lost, granted=granted):
                    cluster.tell_engine(engine, self._tell_lost, lost, set(granted))
                case AskFate(engine=engine, migration=migration):
                    cluster.tell_engine(engine, cluster.fate, migration, self._hear_fate)
                case Orphaned(request=request):
                    self._close(request, "its engine died")
                case Moved():
                    self._moved(effect)

    def _moved(self, moved: Moved) -> None:
        for _ in moved.missing:
            self._client_gets((moved.request, False), None)
        held: Any = moved.held
        for token in held:
            self._client_gets(token, moved.owner)

    def _tell_lost(self, index: EngineIndex, lost: EngineIndex, granted: set[MigrationId]) -> None:
        self._cluster.llumlet(index, lambda it, now: it.engine_lost(lost, granted, now))

    def _hear_fate(self, migration: MigrationId, fate: str) -> None:
        self._perform(self.streams.fate(migration, fate))
