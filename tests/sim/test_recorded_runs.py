"""Simulated runs decide today what they decided when they were recorded, decision for decision.

This guards changes that must not alter behaviour: renames, moves, a different cut of the same code.
Each run of `recorded_runs.py` has two files in `recorded/`, to be read with zcat. NAME.txt.gz has
every decision with its time, ids and limits, how every migration ended, and what became of every
request. NAME.why.txt.gz has the reasons that were given for the decisions and for the outcomes of
migrations. Times are in seconds, to the microsecond.

Names of classes and of fields are not recorded. `DECISIONS` maps them to the words of the record,
so that a rename changes the imports and that table, and no record.

    PYTHONPATH=tests .venv/bin/python -m sim.test_recorded_runs --record

writes those records anew that differ. That is right where behaviour is meant to change; the commit
then says which decisions change and why. A change of wording alone changes only NAME.why.txt.gz. A
refactoring never needs it.
"""

import gzip
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from llumnix.core.events import (
    AddInstances,
    Decision,
    Dispatch,
    DrainInstance,
    MoveLimit,
    MoveOrder,
    NoInstance,
    UndrainInstance,
)
from llumnix.core.types import InstanceId
from llumnix.sim.model.checks import check_view, come_to_rest
from llumnix.sim.model.clients import Move
from llumnix.sim.model.clock import TICKS
from llumnix.sim.model.cluster import Cluster
from llumnix.sim.model.faults import FaultInjector
from llumnix.sim.model.jobs import Job
from sim.recorded_runs import RUNS

FOLDER = Path(__file__).parent / "recorded"
CONTEXT_LINES = 3
"""Lines shown before and after the first one that differs."""

UNTIL_S = 600.0
"""More than twice the virtual time of the longest run. One that would never end fails here."""


# -- what a record says


def limits(each: Iterable[MoveLimit]) -> str:
    return " ".join(
        f"class {m.rank}: {m.tokens_min} to {m.tokens_max}, wanted {m.tokens_wanted}, "
        f"waiting {m.waiting_max};"
        for m in each
    )


DECISIONS: dict[type, tuple[str, Callable[[Any], tuple[Any, ...]]]] = {
    Dispatch: ("dispatch", lambda d: (d.request, d.instance, d.engine_index)),
    NoInstance: ("nowhere", lambda d: (d.request,)),
    MoveOrder: (
        "move",
        lambda d: (
            *(d.order, d.source, d.source_engine, d.destination, d.destination_engine),
            *(d.source_sequence, limits(d.limits)),
        ),
    ),
    AddInstances: ("add", lambda d: (d.count,)),
    DrainInstance: ("drain", lambda d: (d.instance,)),
    UndrainInstance: ("undrain", lambda d: (d.instance,)),
}
"""Each kind of decision with its word in the record and the values that are recorded."""


def decision_line(now: float, decision: Any) -> str:
    word, values = DECISIONS[type(decision)]
    return " ".join([f"{now:.6f}", word, *map(str, values(decision))])


def move_line(m: Move) -> str:
    what = "before its first token" if m.waiting else "running"
    ends = f"{m.source} to {m.destination}"
    return f"{m.ended_s:.6f} {m.outcome} {m.request} {ends} began {m.t_s:.6f} {m.tokens} {what}"


def request_line(job: Job) -> str:
    first, ended = ("-" if at is None else f"{at:.6f}" for at in (job.first_s, job.ended_s))
    return (
        f"{job.arrived_s:.6f} {job.id} first {first} ended {ended} got {job.got} of {job.answer} "
        f"preemptions {job.preemptions} moves {job.moves}"
    )


@dataclass(slots=True, kw_only=True)
class Record:
    """What one run left, a line each."""

    done: list[str]  # decisions, migrations, requests and totals
    reasons: list[str]  # of the decisions, then of the migrations


@cache
def run(name: str) -> Record:
    """Simulates it as `llumnix simulate` does, and keeps every decision."""
    case, decisions, reasons = RUNS[name], [], []

    def record(now: float, what: Any) -> None:
        if isinstance(what, Decision):
            decisions.append(decision_line(now, what))
            reasons.append(f"{now:.6f} {what.why}")

    jobs, faults = case.jobs(), case.spec.faults
    injector = None if faults is None else FaultInjector(faults, case.spec.seed)
    cluster = Cluster(
        case.spec.setup(),
        record=record,
        wire=None if injector is None else injector.wire,
        check=check_view,
    )
    if injector is not None:
        injector.begin(cluster, jobs[-1].arrived_s)
    for when_s, instance in case.drains:
        cluster.clock.at(when_s, TICKS, cluster.drain, InstanceId(instance))
    cluster.run(jobs, UNTIL_S)
    come_to_rest(cluster)
    moves = cluster.clients.moves
    totals = [
        f"{cluster.now:.6f} at rest",
        f"{cluster.instance_s:.6f} seconds of instances",
        f"{cluster.preemptions} preemptions",
    ]
    if injector is not None:
        totals += [
            f"{injector.crashes} instances crashed",
            f"{injector.controller_crashes} controllers crashed",
            f"{injector.hung_up} clients hung up",
        ]
    parts = {
        "decisions": decisions,
        "migrations": list(map(move_line, moves)),
        "requests": list(map(request_line, jobs)),
        "totals": totals,
    }
    return Record(
        done=[line for part, lines in parts.items() for line in (f"# {part}", *lines)],
        reasons=[
            "# decisions",
            *reasons,
            "# migrations",
            *(f"{m.ended_s:.6f} {m.request} {m.why}" for m in moves),
        ],
    )


# -- files and comparison


def paths(name: str) -> tuple[Path, Path]:
    return FOLDER / f"{name}.txt.gz", FOLDER / f"{name}.why.txt.gz"


@cache
def recorded(name: str) -> Record:
    done, reasons = (gzip.decompress(p.read_bytes()).decode().splitlines() for p in paths(name))
    return Record(done=done, reasons=reasons)


def first_difference(name: str, was: list[str], now: list[str]) -> str | None:
    """The first line that differs, with its number in its part and the lines around it."""
    pairs = enumerate(zip_longest(was, now))
    at = next((number for number, (a, b) in pairs if a != b), None)
    if at is None:
        return None
    # Both have the same lines before it, so the last heading is the same too.
    heading = max((n for n in range(at) if was[n].startswith("# ")), default=-1)
    part = was[heading][2:] if heading >= 0 else "what is first"
    first = max(0, at - CONTEXT_LINES)

    def lines(of: list[str]) -> Iterator[str]:
        for number in range(first, at + CONTEXT_LINES + 1):
            mark = ">" if number == at else " "
            yield f"  {mark} {of[number] if number < len(of) else '(the end)'}"

    return "\n".join(
        [
            f"run {name}: its {part} differ, first at number {at - heading - 1} from 0 on",
            "recorded (each line begins with its time in s):",
            *lines(was),
            "present:",
            *lines(now),
        ]
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_run_decides_what_it_decided_when_it_was_recorded(name: str) -> None:
    if found := first_difference(name, recorded(name).done, run(name).done):
        pytest.fail(found, pytrace=False)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_reasons_that_were_recorded(name: str) -> None:
    """A new wording is not a change of behaviour. Record it; no NAME.txt.gz may change."""
    if recorded(name).done != run(name).done:
        pytest.skip("its decisions differ, so its reasons do too")
    if found := first_difference(name, recorded(name).reasons, run(name).reasons):
        pytest.fail(found, pytrace=False)


def test_the_records_have_every_kind_of_decision_and_outcome() -> None:
    words = {line.split()[1] for name in RUNS for line in recorded(name).done}
    assert {word for word, _ in DECISIONS.values()} | {"migrated", "aborted"} <= words


def test_the_first_difference_is_shown_with_three_lines_around_it() -> None:
    was = ["# decisions", *(f"{n}.0 dispatch r{n} i0 0" for n in range(9))]
    now = [*was[:6], "5.0 dispatch r5 i1 1", *was[7:]]
    found = first_difference("some", was, now)
    assert found is not None
    lines = [line.strip() for line in found.splitlines()]
    assert lines[0] == "run some: its decisions differ, first at number 5 from 0 on"
    assert lines[2:9] == [*was[3:6], f"> {was[6]}", *was[7:10]]
    assert lines[10:] == [*was[3:6], f"> {now[6]}", *was[7:10]]
    assert "> (the end)" in str(first_difference("some", was, was[:-1]))
    assert first_difference("some", was, list(was)) is None


def record_all() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in RUNS:
        new = run(name)
        for path, lines in zip(paths(name), (new.done, new.reasons), strict=True):
            data = "".join(f"{line}\n" for line in lines).encode()
            if not path.exists() or gzip.decompress(path.read_bytes()) != data:
                path.write_bytes(gzip.compress(data, mtime=0))
                print(f"{path.relative_to(FOLDER.parent)} is written")
    kept = {path for name in RUNS for path in paths(name)}
    for path in FOLDER.iterdir():
        if path not in kept:
            path.unlink()
            print(f"{path.relative_to(FOLDER.parent)} is deleted: no such run")


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit("usage: PYTHONPATH=tests python -m sim.test_recorded_runs --record")
    record_all()
