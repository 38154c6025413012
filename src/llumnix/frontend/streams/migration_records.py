"""The last migrations of one frontend's streams, as users and the event log see them.

Two sides say how a migration ended. The table of streams knows how it ended for the stream, the
source knows what was moved and how long that took. A migration that succeeded is over once both
have spoken, or the source is dead. A migration that failed is over once either has spoken. If the
stream ends meanwhile, only the source will speak.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from llumnix.core.codes import AbortCode, MoveCode
from llumnix.core.messages import Migrate, MigrationEnded, StageDone, TookOver
from llumnix.core.streams.effects import GrantEnded
from llumnix.core.streams.table import SOURCE_DIED_AFTER
from llumnix.core.types import EngineIndex, InstanceId, MigrationId, RequestId
from llumnix.errors import UnknownMigrationError
from llumnix.frontend.streams.spans import RequestSpan
from llumnix.observe import metrics
from llumnix.observe.event_log import EventLog

LISTED_MAX = 1000


@dataclass(slots=True, kw_only=True, eq=False)
class Migration:
    """One migration, as its frontend knows it."""

    id: MigrationId
    request: RequestId
    request_id: str  # what its client calls the request
    source: InstanceId
    source_engine: EngineIndex
    destination: InstanceId
    began_s: float  # monotonic
    why: str  # it was ordered
    code: MoveCode  # the same, for programs
    copy: str  # one of `COPIES`
    outcome: str = "running"  # then migrated, aborted or lost
    reason: str = ""  # for that outcome; empty if it went well
    abort_code: AbortCode = AbortCode.OTHER  # the same, for programs, if it was aborted
    total_ms: float | None = None  # None while it is running
    source_tokens: int | None = None  # generated at the source; the next is the destination's
    ended: GrantEnded | None = None  # how it ended for the stream
    report: MigrationEnded | None = None  # what the source says of its end
    closed: bool = False  # whether the stream has ended
    source_lost: bool = False  # whether the source has died
    span: RequestSpan | None = None  # of its HTTP request, if that is traced
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def listed(self) -> dict[str, Any]:
        """As JSON, for users: with the code of `why`, and the seconds since it began."""
        ago_s = round(time.monotonic() - self.began_s, 3)
        return {**self.shown(), "code": self.code.value, "ago_s": ago_s}

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        stages: list[StageDone] = [] if self.report is None else self.report.stages
        return {
            "id": self.id,
            "request_id": self.request_id,
            "request": self.request,
            "outcome": self.outcome,
            "source": self.source,
            "destination": self.destination,
            "stages": [{"tokens": s.tokens, "bytes": s.bytes, "ms": s.ms} for s in stages],
            "downtime_ms": None if self.report is None else self.report.downtime_ms,
            "total_ms": self.total_ms,
            "source_tokens": self.source_tokens,
            "tokens_before": self.source_tokens,  # its old name, until the next release
            "why": self.why,
            "code": self.code,
            "reason": self.reason,
            "reason_code": self.abort_code if self.outcome == "aborted" else None,
        }


class MigrationRecords:
    """The last `LISTED_MAX` migrations, and all that are running. Others tell the records what
    happens; the records call only the event log."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._listed: dict[MigrationId, Migration] = {}
        self._open: dict[MigrationId, Migration] = {}

    # -- what a user asks for

    def recent(self) -> list[dict[str, Any]]:
        """The last migrations, the oldest first."""
        return [m.listed() for m in self._listed.values()]

    def records(self) -> list[Migration]:
        """The same, as they are kept."""
        return list(self._listed.values())

    def get(self, migration: str) -> dict[str, Any]:
        """One migration; `UnknownMigrationError` if it is not among the last."""
        if (known := self._listed.get(MigrationId(migration))) is not None:
            return known.listed()
        raise UnknownMigrationError(
            f"no migration {migration} among the last {LISTED_MAX}; GET /llumnix/v1/migrations"
        )

    # -- what happens

    def began(
        self,
        order: Migrate,
        *,
        request_id: str,
        source: InstanceId,
        source_engine: EngineIndex,
        destination: InstanceId,
        why: str,
        code: MoveCode = MoveCode.USER,
        span: RequestSpan | None = None,
    ) -> Migration:
        """The source is being ordered to move a request."""
        migration = Migration(
            id=order.migration,
            request=order.request,
            request_id=request_id,
            source=source,
            source_engine=source_engine,
            destination=destination,
            began_s=time.monotonic(),
            why=why,
            code=code,
            copy=order.copy,
            span=span,
        )
        self._listed[migration.id] = self._open[migration.id] = migration
        if len(self._listed) > LISTED_MAX:
            del self._listed[next(iter(self._listed))]
        self._show_open()
        self._log.migration(migration.shown())
        return migration

    def took_over(self, message: TookOver) -> None:
        """The destination says after how many tokens it goes on."""
        if (known := self._listed.get(message.migration)) is not None:
            known.source_tokens = message.outputs
            self._show_open()

    def grant_ended(self, ended: GrantEnded) -> None:
        """How it ended for the stream."""
        if (migration := self._open.get(ended.migration)) is not None:
            migration.ended = ended
            if ended.outcome == "migrated" and ended.why:  # The source died meanwhile.
                metrics.STREAMS_SURVIVED.labels(how="handover").inc()
            self._settle(migration)

    def source_ended(self, message: MigrationEnded) -> None:
        """How it ended for the source, and its figures."""
        if (migration := self._open.get(message.migration)) is not None:
            migration.report = message
            self._settle(migration)

    def refused(self, migration: MigrationId, why: str) -> None:
        """The source could not take the order in, so it will never say how the migration ended. As
        long as the stream is open, the table of streams says that."""
        known = self._open.get(migration)
        if known is not None and known.closed:
            self._end(known, "aborted", why)

    def source_lost(self, engine_index: EngineIndex) -> None:
        """An engine died."""
        for migration in [m for m in self._open.values() if m.source_engine == engine_index]:
            migration.source_lost = True
            self._settle(migration)

    def closed(self, request: RequestId) -> None:
        """The stream of that request has ended."""
        for migration in self._of(request):
            migration.closed = True
            self._settle(migration)

    def lost(self, request: RequestId, why: str) -> None:
        """The frontend gave the request up."""
        for migration in self._of(request):
            self._end(migration, "lost", why)

    def _of(self, request: RequestId) -> list[Migration]:
        return [m for m in self._open.values() if m.request == request]

    def _show_open(self) -> None:
        """Has the metrics show how many are open, and of how many the destination's tokens wait for
        the source's."""
        metrics.MIGRATIONS_OPEN.set(len(self._open))
        opened = self._open.values()
        held = sum(m.source_tokens is not None and m.ended is None for m in opened)
        metrics.STREAMS.labels("held").set(held)

    def _settle(self, migration: Migration) -> None:
        """Ends the migration if nothing more will be known of it."""
        ended, report = migration.ended, migration.report
        self._show_open()
        if ended is not None and ended.outcome != "migrated":
            self._end(migration, ended.outcome, ended.why, ended.code)
        elif ended is not None and report is not None:
            self._end(migration, "migrated", ended.why)
        elif ended is not None and migration.source_lost:
            self._end(migration, "migrated", ended.why or SOURCE_DIED_AFTER)
        elif ended is None and migration.closed and report is not None:
            self._end(
                migration,
                "migrated" if report.taken else "aborted",
                "" if report.taken else report.why,
                report.code,
            )
        elif ended is None and migration.closed and migration.source_lost:
            why = "the request ended, and the source died"
            self._end(migration, "aborted", why, AbortCode.ENDED)

    def _end(
        self,
        migration: Migration,
        outcome: str,
        reason: str,
        code: AbortCode = AbortCode.OTHER,
    ) -> None:
        del self._open[migration.id]
        migration.outcome, migration.reason, migration.abort_code = outcome, reason, code
        migration.total_ms = round((time.monotonic() - migration.began_s) * 1e3, 3)
        migration.done.set()
        self._show_open()
        _count(migration, migration.total_ms)
        self._log.migration(migration.shown())
        if migration.span is not None:
            migration.span.moved(migration)


def _count(migration: Migration, total_ms: float) -> None:
    """Adds a migration that has ended to the metrics."""
    copy, report = migration.copy, migration.report
    metrics.MIGRATIONS.labels(migration.code, migration.outcome).inc()
    if migration.outcome == "migrated":
        metrics.MIGRATION_S.labels(copy=copy).observe(total_ms / 1e3)
        if report is not None:
            metrics.MIGRATION_STAGES.labels(copy=copy).observe(len(report.stages))
    elif migration.outcome == "aborted":
        metrics.MIGRATION_ABORTS.labels(migration.abort_code).inc()
    if report is not None:
        metrics.MIGRATION_BYTES.labels(copy=copy).inc(sum(s.bytes for s in report.stages))
        if report.taken and report.downtime_ms is not None:
            metrics.MIGRATION_DOWNTIME_S.labels(copy=copy).observe(report.downtime_ms / 1e3)
