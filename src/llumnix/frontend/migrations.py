"""Moves requests between engines, as far as the frontend has a part in it: it grants epochs,
orders the source to move a request, and passes each stream's tokens on from its owner alone.

vLLM 0.32 internals relied on here (tests/house/test_vllm_migration_contract.py fails when one
changes): an engine's outputs are sent in order, so a message that an output carries in its
`kv_transfer_params` stands in one order with that engine's tokens.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.exceptions import EngineDeadError

from llumnix.core.messages import (
    IN_BAND,
    DrainRequested,
    MigrationEnded,
    MigrationRequested,
    StageDone,
    TookOver,
)
from llumnix.core.streams.table import (
    AbortAt,
    Arbiter,
    AskFate,
    Effect,
    Moved,
    StreamLost,
    TellLost,
)
from llumnix.core.types import EngineIndex, InstanceId, MigrationId, RequestId
from llumnix.errors import (
    ConflictError,
    UnknownMigrationError,
    UnknownRequestError,
    UsageError,
)
from llumnix.frontend.engines.outputs import Complaints
from llumnix.frontend.streams import Stream, Streams
from llumnix.observe.event_log import EventLog
from llumnix.wire import decode, encode

LISTED_MAX = 1000
FATE_POLL_S = 0.02
FATE_ASKED_MAX = 3000
"""So often a destination is asked what it decided: for a minute. It waits for one pull at most,
from a source that is dead."""
CALL_TRIES_MAX = 5
CALL_PAUSE_S = 0.1
"""After the first failure of a call that must not be lost; each further pause is twice as long."""
ENGINE_DIED = "The instance that ran this request died. Please send the request again."
GAVE_UP = "llumnix failed at this request. Please send it again."


class Engines(Protocol):
    """What this needs of the fleet's client."""

    async def call_engine(self, engine_index: EngineIndex, method: str, *args: Any) -> Any:
        """Calls one engine."""
        ...

    @property
    def complaints(self) -> Complaints:
        """Where faults are counted."""
        ...

    async def abort_at(self, engine_index: EngineIndex, requests: list[str]) -> None:
        """Has one engine abort requests."""
        ...

    def place(self, engine_index: EngineIndex) -> "Place | None":
        """One engine that takes requests."""
        ...

    def leave_wanted(self, engine_index: EngineIndex, why: str) -> None:
        """One engine should be emptied and stopped."""
        ...

    def deliver(self, engine_index: EngineIndex, outputs: list[EngineCoreOutput]) -> None:
        """Passes outputs on as if the engine had just sent them."""
        ...

    def end(self, request: RequestId, why: str) -> None:
        """Ends a stream with an error, wherever its request is; `why` is what its client reads."""
        ...


@dataclass(slots=True, kw_only=True)
class Migration:
    """One, as a user gets to see it. `outcome`: running, migrated, aborted or lost.
    `tokens_before`: generated at the source; the next is the destination's. `why`: it was
    ordered."""

    id: MigrationId
    request: RequestId
    request_id: str
    source: InstanceId
    source_engine: EngineIndex
    destination: InstanceId
    began_s: float
    why: str
    outcome: str = "running"
    reason: str = ""
    stages: list[StageDone] = field(default_factory=list)
    downtime_ms: float | None = None
    total_ms: float | None = None
    tokens_before: int | None = None
    released: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "id": self.id,
            "request_id": self.request_id,
            "request": self.request,
            "outcome": self.outcome,
            "source": self.source,
            "destination": self.destination,
            "stages": [{"tokens": s.tokens, "bytes": s.bytes, "ms": s.ms} for s in self.stages],
            "downtime_ms": self.downtime_ms,
            "total_ms": self.total_ms,
            "tokens_before": self.tokens_before,
            "why": self.why,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An engine that a request can be on. `address`: where its llumlet listens."""

    instance: InstanceId
    engine_index: EngineIndex
    address: str


class Migrations:
    """All migrations of one frontend's streams, and with them who owns each."""

    def __init__(self, streams: Streams, engines: Engines, log: EventLog) -> None:
        self._log = log
        self._streams = streams
        self._engines = engines
        self._arbiter: Arbiter[EngineCoreOutput] = Arbiter()
        self._listed: dict[MigrationId, Migration] = {}
        self._open: dict[MigrationId, Migration] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what a user asks for

    def recent(self) -> list[dict[str, Any]]:
        """The last of them, the oldest first."""
        return [m.shown() for m in self._listed.values()]

    def get(self, migration: str) -> dict[str, Any]:
        """One of them; `UnknownMigrationError`."""
        if (known := self._listed.get(MigrationId(migration))) is not None:
            return known.shown()
        raise UnknownMigrationError(
            f"no migration {migration} among the last {LISTED_MAX}; GET /llumnix/v1/migrations"
        )

    def find(self, request: str) -> Stream:
        """The open stream that a user means by an id (as `GET /llumnix/v1/requests` shows it)."""
        exact = self._streams.get(request)
        found = [exact] if exact else [s for s in self._streams if s.client_id == request]
        if not found:
            raise UnknownRequestError(
                f"no request {request} is running or waiting; GET /llumnix/v1/requests lists them"
            )
        if len(found) > 1:
            names = ", ".join(s.request for s in found)
            raise ConflictError(
                f"{len(found)} sequences have the id {request}: name one of {names}"
            )
        return found[0]

    async def migrate(
        self,
        stream: Stream,
        place: Place,
        copy: str = "staged",
        wanted: MigrationRequested | None = None,
    ) -> Migration:
        """Moves a stream's request there; returns when that has ended, one way or another.
        `copy`: one of core/messages.py's `COPIES`. `wanted`: by its source; None: by a user."""
        if stream.engine_index == place.engine_index:
            raise ConflictError(f"request {stream.client_id} is on {place.instance} already")
        order = self._arbiter.begin(
            stream.request, place.engine_index, place.address, copy, wanted=wanted is not None
        )
        if order is None:
            raise ConflictError(f"request {stream.client_id} is being moved already")
        migration = Migration(
            id=order.migration,
            request=stream.request,
            request_id=stream.client_id,
            source=stream.instance,
            source_engine=stream.engine_index,
            destination=place.instance,
            began_s=time.monotonic(),
            why="a user's order" if wanted is None else wanted.why,
        )
        self._listed[migration.id] = migration
        if len(self._listed) > LISTED_MAX:
            del self._listed[next(iter(self._listed))]
        self._open[migration.id] = migration
        self._log.migration(migration.shown())
        try:
            await self._engines.call_engine(stream.engine_index, "llumnix_migrate", encode(order))
        except EngineDeadError:
            pass  # `engine_lost` says what became of it.
        except Exception as error:  # noqa: BLE001 - vLLM raises a bare Exception for a failed call
            self._arbiter.ended(
                MigrationEnded(
                    migration=order.migration, request=stream.request, taken=False, why=""
                )
            )
            self._end(migration, "aborted", f"the source refused the order: {error}")
        await migration.done.wait()
        return migration

    # -- streams

    def open(self, request: RequestId, engine_index: EngineIndex) -> Any:
        """A new stream's ledger."""
        return self._arbiter.open(request, engine_index)

    def close(self, request: RequestId) -> list[EngineIndex]:
        """A stream ended. Returns the engines that may still hold the request."""
        self._settle(request)
        return self._arbiter.close(request)

    def hear(
        self, engine_index: EngineIndex, outputs: list[EngineCoreOutput]
    ) -> list[EngineCoreOutput]:
        """What an engine said: returns what is due to the clients now."""
        due: list[EngineCoreOutput] = []
        for output in outputs:
            try:
                params = output.kv_transfer_params
                if params is not None and IN_BAND in params:
                    self._hear_llumlet(engine_index, params[IN_BAND], due)
                    continue
                stream = self._streams.get(output.request_id)
                if stream is None:
                    continue
                ledger = stream.ledger
                tokens = len(output.new_token_ids)
                if ledger.owner == engine_index and ledger.takeover is None:
                    ledger.outputs += tokens
                    due.append(output)
                else:
                    now, effects = self._arbiter.offer(engine_index, stream.request, tokens, output)
                    due += now
                    self._perform(effects, due)
            except Exception as error:  # noqa: BLE001 - what one says must not end the others
                self.give_up(RequestId(output.request_id), error)
        return due

    def give_up(self, request: RequestId, error: Exception) -> None:
        """A message about this request, or what follows from it, could not be dealt with."""
        complain = self._engines.complaints.note
        complain("Gave a request up", f"{request}: {error!r}", error)
        try:
            self._end_all_of(request, "lost", f"the frontend failed: {error!r}")
            self._engines.end(request, GAVE_UP)
        except Exception as worse:  # noqa: BLE001 - what else the message says must be dealt with
            complain("Could not give a request up", f"{request}: {worse!r}", worse)

    def engine_lost(
        self, engine_index: EngineIndex, others: list[EngineIndex], address: str
    ) -> int:
        """An engine died. Returns how many streams ended with it."""
        effects = self._arbiter.engine_lost(engine_index, others)
        due: list[EngineCoreOutput] = []
        lost = [e for e in effects if isinstance(e, StreamLost)]
        self._perform(effects, due, address)
        for output in due:
            if (stream := self._streams.get(output.request_id)) is not None:
                self._engines.deliver(stream.engine_index, [output])
        for migration in [m for m in self._open.values() if m.source_engine == engine_index]:
            stream = self._streams.get(migration.request)
            if stream is None:
                self._end(migration, "aborted", "the request ended, and the source died")
            elif stream.engine_index != engine_index:
                self._end(migration, "migrated", "the source died after the handover")
        return len(lost)

    def _hear_llumlet(
        self, engine_index: EngineIndex, payload: bytes, due: list[EngineCoreOutput]
    ) -> None:
        message = decode(payload)
        if isinstance(message, TookOver):
            if (known := self._listed.get(message.migration)) is not None:
                known.tokens_before = message.outputs
            self._perform(self._arbiter.took_over(engine_index, message), due)
        elif isinstance(message, MigrationRequested):
            self._wanted(engine_index, message)
        elif isinstance(message, DrainRequested):
            self._engines.leave_wanted(engine_index, message.why)
        elif isinstance(message, MigrationEnded):
            self._perform(self._arbiter.ended(message), due)
            migration = self._open.get(message.migration)
            if migration is not None:
                migration.stages = message.stages
                migration.downtime_ms = message.downtime_ms
                migration.released = message.taken
                stream = self._streams.get(message.request)
                if not message.taken:
                    self._end(migration, "aborted", message.why)
                elif stream is None or stream.engine_index != migration.source_engine:
                    self._end(migration, "migrated", "")

    def _wanted(self, engine_index: EngineIndex, message: MigrationRequested) -> None:
        """A source chose a request to give away: orders it, if it is still there to be moved. If
        not, the source's wish lapses."""
        stream = self._streams.get(message.request)
        place = self._engines.place(message.destination)
        if stream is None or place is None or stream.engine_index != engine_index:
            return
        if stream.ledger.grant is None:
            self.later(self.migrate(stream, place, wanted=message))

    def _end(self, migration: Migration, outcome: str, reason: str) -> None:
        if self._open.pop(migration.id, None) is not None:
            migration.outcome, migration.reason = outcome, reason
            migration.total_ms = round((time.monotonic() - migration.began_s) * 1e3, 3)
            migration.done.set()
            self._log.migration(migration.shown())

    def _perform(
        self, effects: list[Effect], due: list[EngineCoreOutput], lost_address: str = ""
    ) -> None:
        for effect in effects:
            try:
                self._perform_one(effect, due, lost_address)
            except Exception as error:  # noqa: BLE001 - the effects on other requests must follow
                self.give_up(RequestId(getattr(effect, "request", "")), error)

    def _perform_one(self, effect: Effect, due: list[EngineCoreOutput], lost_address: str) -> None:
        match effect:
            case AbortAt(engine=engine, request=request):
                self.later(self._engines.abort_at(engine, [request]))
            case TellLost(engine=engine, lost=lost, granted=granted):
                self.later(self._tell_lost(engine, lost, lost_address, list(granted)))
            case AskFate(engine=engine, migration=migration):
                self.later(self._ask_fate(engine, migration))
            case StreamLost(request=request):
                self._lose(request)
            case Moved():
                self._move(effect, due)

    def _lose(self, request: RequestId) -> None:
        self._end_all_of(request, "lost", "the engine that ran it died")
        self._engines.end(request, ENGINE_DIED)

    def _move(self, moved: Moved, due: list[EngineCoreOutput]) -> None:
        self._streams.move(moved.request, moved.owner)
        self._settle(moved.request)
        stream = self._streams.get(moved.request)
        if moved.missing and stream is not None and stream.logprobs:
            # The tokens are known, their log-probabilities died with the source.
            self._lose(moved.request)
            return
        if moved.missing:
            due.append(EngineCoreOutput(moved.request, list(moved.missing)))
        due += moved.held  # type: ignore[arg-type]

    def _settle(self, request: RequestId) -> None:
        """The stream moved or ended: a migration whose source has let go is over."""
        for migration in [m for m in self._open.values() if m.request == request]:
            if migration.released:
                self._end(migration, "migrated", "")

    def _end_all_of(self, request: RequestId, outcome: str, reason: str) -> None:
        for migration in [m for m in self._open.values() if m.request == request]:
            self._end(migration, outcome, reason)

    # -- what takes a while

    def later(self, work: Any) -> None:
        """Does this beside everything else."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        # A wish that came too late, or an engine that is gone, is no fault.
        if error is not None and not isinstance(error, UsageError | EngineDeadError):
            self._engines.complaints.note("What was begun beside failed", repr(error), error)

    async def _tell_lost(
        self, engine: EngineIndex, lost: EngineIndex, address: str, granted: list[MigrationId]
    ) -> None:
        for attempt in range(CALL_TRIES_MAX):
            try:
                await self._engines.call_engine(
                    engine, "llumnix_engine_lost", lost, address, granted
                )
            except EngineDeadError:
                return  # It died too, and that is told on its own.
            except Exception as error:  # noqa: BLE001 - vLLM raises a bare Exception
                self._engines.complaints.note("An engine was not told of a death", repr(error))
                await asyncio.sleep(CALL_PAUSE_S * 2**attempt)
            else:
                return
        # It would hold these for ever, since it waits for what the dead one decided.
        for migration in granted:
            if (known := self._listed.get(migration)) is not None:
                self._lose(known.request)

    async def _ask_fate(self, engine: EngineIndex, migration: MigrationId) -> None:
        """Asks until there is an answer: the source died, so the destination's word is all. Without
        one the request is given up."""
        fate, failures, asked = "undecided", 0, 0
        while fate == "undecided" and failures < CALL_TRIES_MAX and asked < FATE_ASKED_MAX:
            asked += 1
            try:
                fate = await self._engines.call_engine(engine, "llumnix_fate", migration)
            except EngineDeadError:
                return  # The arbiter hears of that by itself.
            except Exception as error:  # noqa: BLE001 - vLLM raises a bare Exception
                self._engines.complaints.note("An engine did not say a fate", repr(error))
                await asyncio.sleep(CALL_PAUSE_S * 2**failures)
                failures += 1
            if fate == "undecided":
                await asyncio.sleep(FATE_POLL_S)
        known = self._open.get(migration)
        if known is not None:
            outcome = "migrated" if fate == "taken" else "lost"
            self._end(known, outcome, "the source died during the migration")
        self._perform(self._arbiter.fate(migration, fate), [])
