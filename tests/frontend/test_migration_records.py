"""What users and the event log see of migrations."""

from collections.abc import Callable
from typing import Any

import pytest

from llumnix.core.messages import Migrate, MigrationEnded, StageDone, TookOver
from llumnix.core.streams.effects import GrantEnded, Outcome
from llumnix.core.types import EngineIndex, Epoch, InstanceId, MigrationId, RequestId
from llumnix.errors import UnknownMigrationError
from llumnix.frontend.streams.migration_records import LISTED_MAX, Migration, MigrationRecords

SOURCE, DESTINATION = EngineIndex(0), EngineIndex(1)
M0, R = MigrationId("m0"), RequestId("r")
STAGES = [StageDone(tokens=8, bytes=400, ms=1.5)]


class Log:
    """An event log that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def migration(self, line: dict[str, Any]) -> None:
        self.lines.append(line)


class World:
    """The records, with one migration under way."""

    def __init__(self) -> None:
        self.log = Log()
        log: Any = self.log
        self.records = MigrationRecords(log)
        self.migration = self.begin(M0)

    def begin(self, migration: MigrationId, request: RequestId = R) -> Migration:
        order = Migrate(
            migration=migration, request=request, destination=DESTINATION, address="",
            epoch=Epoch(1),
        )  # fmt: skip
        return self.records.began(
            order,
            request_id="the client's",
            source=InstanceId("i0"),
            source_engine=SOURCE,
            destination=InstanceId("i1"),
            why="balance",
        )

    def grant_ended(self, outcome: Outcome, why: str = "") -> None:
        self.records.grant_ended(GrantEnded(migration=M0, outcome=outcome, why=why))

    def source_ended(self, *, taken: bool, why: str = "") -> None:
        self.records.source_ended(
            MigrationEnded(
                migration=M0, request=R, taken=taken, why=why, stages=STAGES, downtime_ms=2.5
            )
        )

    @property
    def outcome(self) -> tuple[str, str]:
        """And the reason. What is over is told of, once."""
        over = self.migration.outcome != "running"
        assert self.migration.done.is_set() == over
        assert (self.migration.total_ms is not None) == over
        assert [line["outcome"] for line in self.log.lines] == [
            "running", *[self.migration.outcome] * over,
        ]  # fmt: skip
        return self.migration.outcome, self.migration.reason


RUNNING = ("running", "")
MOVED = lambda w: w.grant_ended("migrated")  # noqa: E731
TAKEN = lambda w: w.source_ended(taken=True)  # noqa: E731
KEPT = lambda w: w.source_ended(taken=False, why="no room")  # noqa: E731
CLOSED = lambda w: w.records.closed(R)  # noqa: E731
SOURCE_LOST = lambda w: w.records.source_lost(SOURCE)  # noqa: E731

STORIES: dict[str, tuple[list[Callable[[World], None]], tuple[str, str]]] = {
    "both say that it went well": ([MOVED, TAKEN], ("migrated", "")),
    "and the source does first": ([TAKEN, MOVED], ("migrated", "")),
    "it went well, and the source died before it said so": (
        [MOVED, SOURCE_LOST], ("migrated", "the source died after the handover"),
    ),
    "the source died, and then it went well": (
        [SOURCE_LOST, lambda w: w.grant_ended("migrated", "the source died during the migration")],
        ("migrated", "the source died during the migration"),
    ),
    "its stream ended, and the source had moved it": ([CLOSED, TAKEN], ("migrated", "")),
    "the source had let go, and its stream ended": ([TAKEN, CLOSED], ("migrated", "")),
    "its stream ended, and the source had kept it": ([CLOSED, KEPT], ("aborted", "no room")),
    "its stream ended, and the source died": (
        [CLOSED, SOURCE_LOST], ("aborted", "the request ended, and the source died"),
    ),
    "its stream went on at the destination, and ended there": (
        [MOVED, CLOSED, TAKEN], ("migrated", ""),
    ),
    "its stream ended at the destination, and the source died": (
        [MOVED, CLOSED, SOURCE_LOST], ("migrated", "the source died after the handover"),
    ),
    "the source could not take the order in, and its stream had ended": (
        [CLOSED, lambda w: w.records.refused(M0, "odd")], ("aborted", "odd"),
    ),
    "a stream that is lost ends it at once": (
        [lambda w: w.grant_ended("lost", "died")], ("lost", "died"),
    ),
    "one that was aborted is over at once": (
        [lambda w: w.grant_ended("aborted", "no room")], ("aborted", "no room"),
    ),
    "a request that is given up ends it": (
        [lambda w: w.records.lost(R, "odd")], ("lost", "odd"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
def test_it_is_over_with_the_last_word_that_is_to_come(story: str) -> None:
    events, outcome = STORIES[story]
    world = World()
    for event in events:
        assert world.outcome == RUNNING
        event(world)
    assert world.outcome == outcome
    for event in (MOVED, TAKEN, KEPT, CLOSED, SOURCE_LOST):  # Nothing changes it any more.
        event(world)
    world.records.lost(R, "late")
    world.records.refused(M0, "late")
    assert world.outcome == outcome


@pytest.mark.parametrize("event", [
    lambda w: w.records.refused(M0, "the table of streams knows better"),
    lambda w: w.records.closed(RequestId("another")),
    lambda w: w.records.lost(RequestId("another"), "odd"),
    lambda w: w.records.source_lost(DESTINATION),
    lambda w: w.records.grant_ended(GrantEnded(migration=MigrationId("m9"), outcome="lost")),
    TAKEN, MOVED, SOURCE_LOST, CLOSED,
])  # fmt: skip
def test_one_word_alone_ends_nothing_that_goes_on(event: Callable[[World], None]) -> None:
    world = World()
    event(world)
    assert world.outcome == RUNNING


def test_a_user_sees_the_figures() -> None:
    world = World()
    tail = TookOver(migration=M0, request=R, epoch=Epoch(1), outputs=97, tail=[])
    world.records.took_over(tail)
    MOVED(world)
    TAKEN(world)
    found = world.records.get("m0")
    assert found.pop("total_ms") >= 0
    assert 0 <= found.pop("ago_s") < 60
    assert found == {
        "id": "m0", "request_id": "the client's", "request": "r", "outcome": "migrated",
        "source": "i0", "destination": "i1", "stages": [{"tokens": 8, "bytes": 400, "ms": 1.5}],
        "downtime_ms": 2.5, "source_tokens": 97, "tokens_before": 97, "why": "balance",
        "code": "user", "reason": "", "reason_code": None,
    }  # fmt: skip


def test_the_last_thousand_are_listed_and_all_that_run_are_known() -> None:
    world = World()
    for number in range(1, LISTED_MAX + 1):
        world.begin(MigrationId(f"m{number}"), RequestId(f"r{number}"))
    assert [m["id"] for m in world.records.recent()] == [f"m{n}" for n in range(1, LISTED_MAX + 1)]
    with pytest.raises(UnknownMigrationError, match="no migration m0 among the last 1000"):
        world.records.get("m0")
    world.grant_ended("lost", "died")
    assert world.migration.done.is_set()
