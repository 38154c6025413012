"""The event log, and what replays it."""

import contextlib
import json
import multiprocessing
import os
import random
import threading
import time
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from llumnix.config import LogPlace
from llumnix.core.events import (
    AddInstances,
    Dispatch,
    DrainInstance,
    Fact,
    FleetReported,
    InstanceLost,
    LoadReported,
    NoInstance,
    PrefixesChanged,
    RequestArrived,
    SettingsChanged,
    Tick,
)
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.scheduling.presets import POLICIES
from llumnix.core.scheduling.scheduler import Scheduler
from llumnix.core.settings import ScalingSettings, SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, MigrationId, RequestId
from llumnix.errors import UsageError
from llumnix.observe import log_files
from llumnix.observe.event_log import EventLog
from llumnix.observe.log_files import FILES_MAX, LOG_VERSION
from llumnix.observe.replay import DIFFERENCES_MAX, Replayed, replay
from support.fake_cluster import Cluster, World
from support.logged import Logged

WRITERS, LINES_EACH = 3, 300


def report(
    number: int, sequence: int, running: int = 0, admitted: tuple[RequestId, ...] = ()
) -> LoadReported:
    return LoadReported(
        report=LoadReport(
            instance=InstanceId(f"i{number}"),
            engine_index=EngineIndex(number),
            sequence=sequence,
            kv_tokens_used=running * 16,
            kv_tokens_total=1000,
            classes=(ClassLoad(), ClassLoad(running=running)),
            admitted=admitted,
        )
    )


def arrived(number: int) -> RequestArrived:
    return RequestArrived(request=RequestId(f"r{number}"), prompt_tokens=number)


FACTS: list[Fact] = [
    arrived(0),  # Nobody is there yet.
    report(0, 1),
    report(1, 1, running=2),
    *(arrived(n) for n in range(1, 7)),
    report(0, 2, running=1, admitted=(RequestId("r1"),)),
    arrived(7),
    InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(0)),
    report(0, 3),  # A dead one has no voice.
    arrived(8),
    report(1, 2, running=3, admitted=(RequestId("r4"), RequestId("r8"))),
]
ARRIVALS, WRITTEN = 9, len(FACTS) - 1


def record(path: Path, policy: str, who: str = "controller 1") -> None:
    """Does as cluster/controller.py does, at times that replay must take from the log."""
    logged = Logged(path, SchedulerSettings(policy=policy), who)
    for number, fact in enumerate(FACTS):
        # Bookings lapse and reports grow stale on the way.
        logged.tell(fact, 5000.0 + number * 0.75)
    logged.log.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, changed: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in changed))


def number_of(found: list[dict[str, Any]], **wanted: Any) -> int:
    """The first line that has these values, counted from 0."""
    return next(n for n, line in enumerate(found) if wanted.items() <= line.items())


# -- the scheduler's decisions


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_scheduler_decided_it_decides_again(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "log"
    record(path, policy)
    assert replay(path) == Replayed(facts=WRITTEN, decisions=ARRIVALS)
    names = [line["name"] for line in lines(path) if line["kind"] == "decision"]
    assert set(names) == {Dispatch.__name__, NoInstance.__name__}


def test_each_line_tells_who_and_when(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record(path, "least-loaded")
    found = lines(path)
    assert {line["who"] for line in found} == {"controller 1"}
    assert [line["at"] for line in found if line["kind"] == "fact"][:2] == [5000.0, 5000.75]
    assert all(line["time"] > 1e9 for line in found)
    assert oct(path.stat().st_mode & 0o777) == "0o600"


def test_a_scheduler_that_starts_again_knows_nothing(tmp_path: Path) -> None:
    """As when Ray restarts the controller, or a second deployment appends to the same file."""
    path = tmp_path / "log"
    record(path, "least-loaded")
    record(path, "round-robin")
    record(path, "round-robin", who="controller 2")
    assert replay(path) == Replayed(facts=3 * WRITTEN, decisions=3 * ARRIVALS)


def test_schedulers_that_write_in_turns_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record(path, "least-loaded", who="a")
    ours = lines(path)
    mixed = [line for one in ours for line in (one, {**one, "who": "b"})]
    write(path, mixed)
    assert replay(path) == Replayed(facts=2 * WRITTEN, decisions=2 * ARRIVALS)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_altered_decision_is_found_at_its_line(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "log"
    record(path, policy)
    found = lines(path)
    at = number_of(found, kind="decision", name="Dispatch")
    was = found[at]["body"]["instance"]
    found[at]["body"]["instance"] = "i9"
    write(path, found)
    (difference,) = replay(path).differences
    assert difference.startswith(f"line {at + 1}: was Dispatch(")
    assert "instance='i9'" in difference
    assert f"instance='{was}'" in difference.split(", is Dispatch(")[1]


def test_a_dropped_decision_is_found_at_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record(path, "least-loaded")
    found = lines(path)
    at = number_of(found, kind="decision", name="NoInstance")
    del found[at]
    write(path, found)
    result = replay(path)
    (difference,) = result.differences
    assert difference.startswith(f"line {at + 1}: before this line: was nothing, is NoInstance(")
    assert result.decisions == ARRIVALS - 1


def test_a_decision_that_nothing_called_for_is_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record(path, "least-loaded")
    found = lines(path)
    at = number_of(found, kind="decision")
    found.insert(at + 1, found[at])
    write(path, found)
    (difference,) = replay(path).differences
    assert difference.startswith(f"line {at + 2}: was NoInstance(")
    assert difference.endswith(", is None")


def test_another_policy_is_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record(path, "least-loaded")
    found = lines(path)
    found[number_of(found, kind="started")]["settings"]["policy"] = "round-robin"
    write(path, found)
    assert len(replay(path).differences) == ARRIVALS - 1  # That nobody is there is the same.


def test_only_the_first_differences_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(4):
        record(path, "least-loaded")
    path.write_text(path.read_text().replace('"policy":"least-loaded"', '"policy":"round-robin"'))
    assert len(replay(path).differences) == DIFFERENCES_MAX


# -- the steps of migrations


def record_steps(path: Path, seed: int) -> None:
    log = EventLog(LogPlace(path=str(path)), who="engines")
    world = World(loss=0.1, repeat=0.1, crash=0.004, abort=0.01, preempt=0.02, failed_pull=0.05)
    Cluster(seed, world, on_step=log.step).run()
    log.close()


def test_the_steps_of_rough_worlds_come_out_the_same(tmp_path: Path) -> None:
    for seed in range(5):
        path = tmp_path / f"log-{seed}"
        record_steps(path, seed)
        found = lines(path)[1:]
        assert {(line["kind"], line["role"]) for line in found} == {
            ("step", "source"),
            ("step", "destination"),
        }
        assert replay(path) == Replayed(steps=len(found))


def test_a_changed_step_is_found_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record_steps(path, 2)
    found = lines(path)
    at = number_of(found, role="source", state="stopping")
    found[at]["state"] = "copying"
    write(path, found)
    assert replay(path).differences == [
        f"line {at + 1}: was ('copying', 'take it out of the batch'), "
        "is ('stopping', 'take it out of the batch')"
    ]


def test_a_dropped_step_is_found_with_the_story(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = EventLog(LogPlace(path=str(path)), who="engine 0")
    for event, state, action in [
        ("reserved", "between stages", "see what is left"),
        ("steps landed", "deciding", "send the rest, ask for the verdict"),
    ]:
        log.step("source", MigrationId("m0"), event, state, action)
    log.close()
    assert replay(path).differences == [
        "line 3: migration m0 (source): 'steps landed' cannot happen in state 'between stages' "
        "(story: reserving -[reserved]-> between stages)"
    ]


# -- the file


def append_much(path: str, who: str, together: Barrier) -> None:
    """One writer, in a process of its own."""
    log = EventLog(LogPlace(path=path), who=who)
    together.wait(60)
    for number in range(LINES_EACH):
        requests = tuple(RequestId(f"{who}-{number}-{n}") for n in range(number % 40))
        log.fact(report(0, number, admitted=requests), float(number))
    log.close()


def test_lines_of_several_processes_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "log"
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(WRITERS)
    names = [f"writer {n}" for n in range(WRITERS)]
    writers = [
        spawn.Process(target=append_much, args=(str(path), name, together)) for name in names
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [w.exitcode for w in writers] == [0] * WRITERS
    found = lines(path)
    assert [n for n, line in enumerate(found) if line["kind"] == "log"] == [0]
    assert len(found) == 1 + WRITERS * LINES_EACH
    for name in names:
        mine = [line["body"]["report"] for line in found[1:] if line["who"] == name]
        assert [r["sequence"] for r in mine] == list(range(LINES_EACH))
        assert all(len(r["admitted"]) == r["sequence"] % 40 for r in mine)
    assert replay(path) == Replayed(skipped=WRITERS * LINES_EACH)


def test_a_file_that_cannot_be_opened_keeps_nobody_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log_files, "RETRY_S", 0.05)
    folder = tmp_path / "away"
    log = EventLog(LogPlace(path=str(folder / "log")), who="engine 0")
    log.migration({"id": "m0"})
    while not log.dropped:
        time.sleep(0.01)
    folder.mkdir()
    log.migration({"id": "m1"})
    log.close()
    found = lines(folder / "log")
    assert [line["kind"] for line in found] == ["log", "dropped", "migration"]
    assert found[1]["lines"] == 1
    assert [r.getMessage() for r in caplog.records] == [
        "The event log stands still (engine 0): No such file or directory",
        "The event log goes on (engine 0): 1 lines lack",
    ]


def test_a_log_that_never_opens_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "RETRY_S", 0.05)
    log = EventLog(LogPlace(path=str(tmp_path / "away" / "log")), who="engine 0")
    log.migration({"id": "m0"})
    log.close()
    with pytest.raises(FileNotFoundError):  # As a user's own word at the start of `serve`.
        EventLog(LogPlace(path=str(tmp_path / "away" / "log")), who="frontend", must_open=True)


def test_a_writer_without_a_path_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = EventLog(None, who="nobody")
    log.started(SchedulerSettings())
    log.fact(FACTS[1], 0.0)
    log.decision(NoInstance(request=RequestId("r"), why="none"), 0.0)
    log.step("source", MigrationId("m0"), "reserved", "between stages", "see what is left")
    log.migration({"id": "m0"})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_closed_writer_writes_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = EventLog(LogPlace(path=str(path)), who="somebody")
    log.migration({"id": "m0"})
    log.close()
    log.migration({"id": "m1"})
    log.close()
    assert [line["body"] for line in lines(path)[1:]] == [{"id": "m0"}]
    assert replay(path) == Replayed()


@pytest.mark.parametrize(
    "bad",
    [
        "hello",
        "",
        "[]",
        "7",
        "{}",
        '{"who": "c", "kind": "started", "settings": {"policy": "by hand"}}',
        '{"who": "c", "kind": "step", "role": "bystander", "migration": "m0"}',
    ],
)
def test_a_line_of_something_else_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "log"
    record(path, "least-loaded")
    count = len(lines(path))
    with path.open("a") as file:
        file.write(bad + "\n")
    with pytest.raises(UsageError) as error:
        replay(path)
    assert str(error.value).startswith(f"{path}, line {count + 1}: not a line of an event log (")
    assert str(error.value).endswith("give a file that `llumnix serve --event-log` wrote")


def test_a_fact_of_another_shape_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record(path, "least-loaded")
    found = lines(path)
    found[2]["body"] = {"request": 5}
    write(path, found)
    with pytest.raises(UsageError, match="line 3: not a line of an event log"):
        replay(path)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match=r"cannot be read \("):
            replay(path)


# -- its version


def test_a_log_of_an_older_llumnix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record(path, "least-loaded")
    write(path, lines(path)[1:])
    with pytest.raises(UsageError) as error:
        replay(path)
    assert str(error.value) == (
        f"{path} is an event log of version 1, and this llumnix reads version {LOG_VERSION}; "
        "read it with the llumnix that wrote it"
    )


def test_a_log_of_a_newer_llumnix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record(path, "least-loaded")
    found = lines(path)
    found[0]["version"] = LOG_VERSION + 1
    write(path, found)
    with pytest.raises(UsageError, match=f"of version {LOG_VERSION + 1}, and"):
        replay(path)


def test_an_older_log_is_put_aside_and_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record(path, "least-loaded")
    write(path, older := lines(path)[1:])
    record(path, "least-loaded")
    assert lines(tmp_path / "log.1") == older
    assert replay(path) == Replayed(facts=WRITTEN, decisions=ARRIVALS)


def test_a_file_that_is_no_log_is_never_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("notes of somebody\n")
    record(path, "least-loaded")
    assert [p.name for p in tmp_path.iterdir()] == ["log"]
    assert path.read_text().startswith("notes of somebody\n")


# -- what is left out


def record_quiet(path: Path, seed: int) -> int:
    """A scheduler that mostly hears what it knows; how many facts it was told."""
    dice, logged = random.Random(seed), Logged(path)
    sequence, running, now, told = [0, 0, 0], [0, 0, 0], 100.0, 0
    for n in range(3000):
        now += dice.choice((0.01, 0.05, 0.1))
        engine = dice.randrange(3)
        fact: Fact = Tick()
        if dice.random() < 0.01:
            fact = arrived(n)
        elif dice.random() < 0.05:
            serving = tuple(InstanceId(f"i{i}") for i in range(3))
            fact = FleetReported(starting=0, serving=serving, draining=())
        elif dice.random() < 0.7:
            if engine == 2 and 120 < now < 130:
                continue  # It is silent for a while.
            sequence[engine] += 1
            if dice.random() < 0.02:
                running[engine] = dice.randrange(5)
            fact = report(engine, sequence[engine], running[engine])
            if running[engine] and engine == 1:
                stalled = replace(fact.report, stalled_s=dice.random())
                fact = LoadReported(report=stalled)
        logged.tell(fact, now)
        told += 1
    logged.log.close()
    return told


@pytest.mark.parametrize("seed", range(5))
def test_what_is_not_news_is_left_out_and_a_replay_decides_the_same(
    tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "log"
    told = record_quiet(path, seed)
    found = lines(path)
    replayed = replay(path)
    assert replayed.differences == []
    assert replayed.decisions > 10
    assert len(found) < told / 3


def test_scaling_that_is_switched_on_meanwhile_is_replayed(tmp_path: Path) -> None:
    """What the fleet says counts from then on, though it was left out before."""
    path, before = tmp_path / "log", SchedulerSettings()
    logged = Logged(path, before)
    bounds = ScalingSettings(instances_max=3, freeness_low=1e6, freeness_high=2e6, up_after_s=5)
    on = replace(before, scaling=bounds)
    fleet = FleetReported(starting=0, serving=(InstanceId("i0"),), draining=())
    added = 0
    for n in range(4000):
        facts: list[Fact] = [report(0, n, running=10), fleet]
        if n == 2000:
            facts.insert(0, SettingsChanged(settings=on))
        for fact in facts:
            added += sum(isinstance(d, AddInstances) for d in logged.tell(fact, n * 0.1))
    logged.log.close()
    assert added > 0
    replayed = replay(path)
    assert (replayed.differences, replayed.decisions) == ([], added)


@pytest.mark.parametrize("scales", [False, True])
def test_an_idle_deployment_writes_next_to_nothing(tmp_path: Path, scales: bool) -> None:
    path = tmp_path / "log"
    settings = SchedulerSettings()
    if scales:
        settings = replace(settings, scaling=ScalingSettings(instances_min=2, instances_max=3))
    logged = Logged(path, settings)
    serving = tuple(InstanceId(f"i{n}") for n in range(2))
    for n in range(6000):  # Ten minutes of two instances.
        at = n * 0.1
        for engine in range(2):
            logged.tell(report(engine, n), at)
        logged.tell(Tick(), at)
        if n % 5 == 0:
            logged.tell(FleetReported(starting=0, serving=serving, draining=()), at)
    logged.log.close()
    found = lines(path)
    assert len(found) == 2 + 2 + 1
    assert sum(map(len, path.read_bytes().splitlines())) < 30e6 / 86400 * 600


def scaled(path: Path, seed: int) -> int:
    """A scheduler that scales a fleet, which does as it says; how many decisions it took."""
    dice = random.Random(seed)
    scaling = replace(
        SchedulerSettings().scaling,
        instances_min=1,
        instances_max=3,
        freeness_low=20.0,
        freeness_high=60.0,
        down_after_s=15.0,
        cooldown_s=15.0,
    )
    settings = replace(SchedulerSettings(), scaling=scaling)
    logged = Logged(path, settings)
    tell = logged.tell
    serving, starting, running, taken = [0], 0, 10, 0

    for n in range(6000):
        at = 100.0 + n * 0.1
        if dice.random() < 0.003:
            running = dice.choice((4, 40))
        if dice.random() < 0.003:
            tell(arrived(n), at)  # Never reported: the booking lapses.
        for engine in serving:
            tell(report(engine, n, running=running), at)
        tell(Tick(), at)
        if n % 5:
            continue
        if starting and dice.random() < 0.1:
            serving, starting = [*serving, max(serving) + 1], 0
        names = tuple(InstanceId(f"i{i}") for i in serving)
        for decision in tell(FleetReported(starting=starting, serving=names, draining=()), at):
            taken += 1
            if isinstance(decision, DrainInstance):
                serving = [i for i in serving if f"i{i}" != decision.instance]
            else:
                starting = 1
    logged.log.close()
    return taken


def test_scaling_comes_out_the_same_though_repeated_reports_of_the_fleet_are_left_out(
    tmp_path: Path,
) -> None:
    taken = fleets = 0
    for seed in range(4):
        path = tmp_path / f"log {seed}"
        taken += scaled(path, seed)
        assert replay(path).differences == []
        fleets += sum(line.get("name") == "FleetReported" for line in lines(path))
    assert taken > 10
    assert fleets < 4 * 1200 * 2 / 3


def test_a_prefix_cache_that_is_told_anew_costs_a_short_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logged = Logged(path)
    names = [InstanceId(f"i{n}") for n in range(2)]
    told = [
        PrefixesChanged(
            instance=name, engine_index=EngineIndex(n), stored=tuple(range(5000)), cleared=True
        )
        for n, name in enumerate(names)
    ]
    more = PrefixesChanged(instance=names[0], engine_index=EngineIndex(0), stored=(9000,))
    facts: list[Fact] = [report(0, 1), report(1, 1), *told, *told, told[0], more, told[0]]
    prompt = RequestArrived(request=RequestId("r"), prompt_tokens=9999, prefix=tuple(range(100)))
    # Which of two that keep it has stored it last decides.
    for number, fact in enumerate([*facts, prompt, told[1], prompt, told[0], prompt]):
        logged.tell(fact, number * 0.001)
    logged.log.close()
    found = lines(path)
    assert [line["kind"] for line in found].count("kept") == 3 + 2
    assert sum(line.get("name") == "PrefixesChanged" for line in found) == 2 + 1 + 1
    result = replay(path)
    assert (result.decisions, result.differences) == (3, [])


def test_an_engine_that_was_idle_for_long_is_not_replayed_as_one_that_stood_still(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    logged = Logged(path)
    facts = [(report(0, n), n * 0.1) for n in range(600)]
    facts += [(report(1, 1), 59.95), (report(0, 600, running=1), 60.0)]
    facts += [(arrived(n), 60.0 + n * 0.001) for n in range(20)]
    for fact, at in facts:
        logged.tell(fact, at)
    logged.log.close()
    assert replay(path).differences == []
    assert len(lines(path)) < 50


def test_what_was_left_out_before_a_bug_is_written_before_it(tmp_path: Path) -> None:
    """Else the line would seem to come right after the last news."""
    path = tmp_path / "log"
    logged = Logged(path)
    for number in (1, 2, 3):
        logged.tell(report(0, number), number * 0.1)
    logged.log.failed(report(0, 4), 0.4, "KeyError: 'i0'")
    logged.log.close()
    assert [line["kind"] for line in lines(path)][-3:] == ["fact", "again", "failed"]


# -- a disk that is slow or full


def test_what_a_slow_disk_has_no_room_for_is_counted_and_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "QUEUED_MAX", 100)
    real, goes_on, stuck = os.write, threading.Event(), threading.Event()

    def slow(file: int, data: bytes) -> int:
        stuck.set()
        assert goes_on.wait(60)
        return real(file, data)

    path = tmp_path / "log"
    log = EventLog(LogPlace(path=str(path)), who="engine 0")
    monkeypatch.setattr(log_files.os, "write", slow)
    log.migration({"id": "first"})
    assert stuck.wait(60)
    for n in range(500):
        log.migration({"id": n})
    goes_on.set()
    assert log.dropped == 400
    log.close()
    found = lines(path)
    assert [line["lines"] for line in found if line["kind"] == "dropped"] == [400]
    assert len(found) == 1 + 1 + 1 + 100
    assert replay(path).dropped == 400


class Disk:
    """That of the log. While it is full, it takes ten bytes of each line; `tried` counts these."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, full: bool) -> None:
        self.full, self.tried = full, threading.Semaphore(0)
        self._write = os.write
        monkeypatch.setattr(log_files, "RETRY_S", 0.01)
        monkeypatch.setattr(log_files.os, "write", self.write)

    def write(self, file: int, data: bytes) -> int:
        if not self.full:
            return self._write(file, data)
        self.tried.release()
        return self._write(file, data[:10])


def test_a_full_disk_ends_the_log_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, full=False)
    path = tmp_path / "log"
    log = EventLog(LogPlace(path=str(path)), who="engine 0")
    log.step("source", MigrationId("m0"), "reserved", "between stages", "see what is left")
    while path.read_bytes().count(b"\n") < 2:
        pass
    disk.full = True
    log.step(
        "source",
        MigrationId("m0"),
        "nearly done",
        "between stages",
        "say when the handover will be",
    )
    assert disk.tried.acquire(timeout=60)
    disk.full = False
    log.step("source", MigrationId("m0"), "last", "stopping", "take it out of the batch")
    log.step("source", MigrationId("m1"), "reserved", "between stages", "see what is left")
    log.close()
    replayed = replay(path)
    assert (replayed.differences, replayed.dropped, replayed.steps) == ([], 1, 2)


def test_a_disk_that_is_full_from_the_start_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when an instance is started again meanwhile."""
    disk = Disk(monkeypatch, full=True)
    path = tmp_path / "log"
    log = EventLog(LogPlace(path=str(path)), who="engine 0")
    log.migration({"id": 0})
    for _ in range(2):
        assert disk.tried.acquire(timeout=60)
    disk.full = False
    log.migration({"id": 1})
    log.close()
    assert [line["kind"] for line in lines(path)] == ["log", "dropped", "migration"]
    assert [r.getMessage() for r in caplog.records] == [
        "The event log stands still (engine 0): No space left on device",
        "The event log goes on (engine 0): 1 lines lack",
    ]


# -- several files


def record_long(path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    """So much that a log of small files begins a new one again and again. The writer is to look at
    their size as often as it can."""
    monkeypatch.setattr(log_files, "LOOK_EVERY_S", 0.0)
    log = EventLog(LogPlace(path=str(path), file_max_bytes=10_000), who="controller 1")
    settings, at = SchedulerSettings(), 100.0
    scheduler = Scheduler(settings)
    log.started(settings)
    for n in range(rounds):
        for fact in (report(0, n, running=n % 7), report(1, n, running=n % 5), arrived(n)):
            at += 0.05
            decisions = scheduler.handle(fact, at)
            log.fact(fact, at)
            for decision in decisions:
                log.decision(decision, at)
    log.close()


def test_a_log_of_several_files_is_replayed_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    record_long(path, monkeypatch, 18)
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names[0] == "log"
    assert 2 < len(names) <= FILES_MAX
    assert replay(path) == Replayed(facts=54, decisions=18)
    # A difference is named with its file.
    older = tmp_path / "log.1"
    found = lines(older)
    at = number_of(found, kind="decision")
    found[at]["body"]["instance"] = "i9"
    write(older, found)
    assert replay(path).differences[0].startswith(f"log.1, line {at + 1}: was Dispatch(")


def test_of_a_long_log_the_last_files_are_kept_and_what_they_lack_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    record_long(path, monkeypatch, 300)
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == ["log", *(f"log.{n}" for n in range(1, FILES_MAX))]
    assert all((tmp_path / name).stat().st_size < 11_000 for name in names)
    result = replay(path)
    assert (result.facts, result.decisions, result.differences) == (0, 0, [])
    assert result.skipped == sum(
        line["kind"] == "fact" for name in names for line in lines(tmp_path / name)
    )


def test_moves_that_began_before_the_first_file_that_is_left_are_not_compared(
    tmp_path: Path,
) -> None:
    whole = tmp_path / "whole"
    record_steps(whole, 2)
    found, path = lines(whole), tmp_path / "log"
    assert found[0]["goes_on"] is False
    # The second step of a move is the first that is left.
    role = {"kind": "step", "role": "source"}
    begun = number_of(found, **role)
    cut = begun + 1 + number_of(found[begun + 1 :], **role, migration=found[begun]["migration"])
    later = [{**found[0], "goes_on": True}, *found[cut:]]
    write(path, later)
    result = replay(path)
    assert result.differences == []
    assert 0 < result.steps < len(later) - 1
    write(path, [found[0], *found[cut:]])
    assert replay(path).differences != [], "as they are if nothing is missing"


def test_all_lines_of_all_files_are_read_in_order_but_for_torn_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    record_long(path, monkeypatch, 18)
    expected = [line for file in log_files.files_of(path) for line in lines(file)]
    with path.open("a") as file:
        file.write('{"at": 5, "wh\n')
    assert list(log_files.lines_of(path)) == expected
    assert [line["kind"] for line in expected].count("started") == 1
    for bad, why in ((tmp_path, "is no event log"), (tmp_path / "no", "cannot be read")):
        with pytest.raises(UsageError, match=why):
            list(log_files.lines_of(bad))
    write(path, [{**expected[0], "version": 1}])
    with pytest.raises(UsageError, match="version 1, and this llumnix reads"):
        list(log_files.lines_of(path))
    path.write_text("notes\n")
    with pytest.raises(UsageError, match="is no event log"):
        list(log_files.lines_of(path))


def test_files_that_do_not_follow_one_another_are_not_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    record_long(path, monkeypatch, 300)
    (tmp_path / "log.2").unlink()
    assert log_files.files_of(path) == [tmp_path / "log.1", path]
    # One of another version is another log.
    write(tmp_path / "log.1", [{**line, "version": 1} for line in lines(tmp_path / "log.1")])
    assert log_files.files_of(path) == [path]


def test_a_writer_without_news_keeps_no_removed_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open file takes its room on the disk, whether or not it has a name."""
    monkeypatch.setattr(log_files, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(log_files, "IDLE_S", 0.01)
    path = tmp_path / "log"
    place = LogPlace(path=str(path), file_max_bytes=10_000)
    idle, busy = EventLog(place, who="engine 0"), EventLog(place, who="controller 1")
    idle.migration({"id": "first"})
    until = time.monotonic() + 60
    while not any(line["who"] == "engine 0" for line in lines(path)):
        assert time.monotonic() < until
    for n in range(1000):
        busy.migration({"id": n})
    busy.close()
    while open_files(path):
        assert time.monotonic() < until, open_files(path)
    idle.migration({"id": "last"})
    idle.close()
    assert lines(path)[0]["version"] == LOG_VERSION
    assert lines(path)[-1]["body"] == {"id": "last"}


def open_files(path: Path) -> set[str]:
    """Those of a log that this process has open."""
    found = set()
    for file in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/self/fd/{file}"))
    return {name for name in found if name.startswith(str(path))}


def test_a_file_that_is_full_is_begun_anew_and_the_one_before_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "LOOK_EVERY_S", 0.0)
    path = tmp_path / "log"
    place = LogPlace(path=str(path), file_max_bytes=10_000)
    logs = [EventLog(place, who=f"engine {n}") for n in range(2)]
    for n in range(1000):
        for log in logs:
            log.migration({"id": n})
    for log in logs:
        log.close()
    kept = [f"log.{n}" for n in reversed(range(1, FILES_MAX))] + ["log"]
    assert sorted(kept) == sorted(f.name for f in tmp_path.iterdir())
    assert all((tmp_path / name).stat().st_size < 11_000 for name in kept)
    for name in kept:
        assert lines(tmp_path / name)[0]["version"] == LOG_VERSION
    found = [line for name in kept for line in lines(tmp_path / name)]
    last = []
    for log in range(2):
        numbers = [
            line["body"]["id"]
            for line in found
            if line["who"] == f"engine {log}" and line["kind"] != "log"
        ]
        if numbers:
            last.append(numbers[-1])
            assert numbers == list(range(numbers[0], numbers[-1] + 1)), "no hole"
    assert 999 in last
