"""A deployment as its event log tells of it: what a look would have shown at any moment."""

from pathlib import Path
from typing import Any

import pytest

from llumnix.config import LogPlace
from llumnix.core.events import Dispatch, FleetReported, InstanceLost, LoadReported, RequestArrived
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.errors import UsageError
from llumnix.frontend.ui import past
from llumnix.frontend.ui.past import Moment, Past, Reader
from llumnix.observe.event_log import EventLog
from llumnix.observe.log_files import lines_of

T = 1_800_000_000.0


class Log:
    """A log in the making, with a clock of its own."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.time", lambda: T + self.now)
        self.path = path
        self.log = EventLog(LogPlace(path=str(path), file_max_bytes=10**9), who="all")
        self.log.started(SchedulerSettings())

    def fact(self, fact: Any) -> None:
        self.log.fact(fact, self.now)

    def place(self, name: str, instance: str, prompt: int = 100, priority: int = 0) -> None:
        arrived = RequestArrived(request=RequestId(name), prompt_tokens=prompt, priority=priority)
        self.fact(arrived)
        run = EngineIndex(int(instance[1:]))
        why, where = "the freest", InstanceId(instance)
        dispatch = Dispatch(request=RequestId(name), instance=where, engine_index=run, why=why)
        self.log.decision(dispatch, self.now)

    def move(self, name: str, source: str, to: str, outcome: str = "migrated") -> None:
        body = {
            "id": "m0", "request": name, "request_id": f"client's {name}", "outcome": outcome,
            "source": source, "destination": to, "stages": [], "downtime_ms": 2.0, "why": "freer",
            "reason": "",
        }  # fmt: skip
        self.log.migration(body)

    def end(self, name: str, instance: str, began: float, out: int, **more: Any) -> None:
        body = {
            "request": name, "client_id": f"client's {name}", "instance": instance,
            "started": self.monotonic() - (self.now - began), "priority": 0, "prompt_tokens": 100,
            "output_tokens": out, "finish_reason": "stop", **more,
        }  # fmt: skip
        self.log.request(body)

    def monotonic(self) -> float:
        return self.now

    def note(self, kind: str, target: str, why: str = "") -> None:
        self.log.instance({"t": T + self.now, "kind": kind, "target": target, "why": why})

    def report(self, instance: str, used: int, run: int | None = None) -> None:
        index = EngineIndex(int(instance[1:]) if run is None else run)
        report = LoadReport(
            instance=InstanceId(instance), engine_index=index, sequence=1, kv_tokens_used=used,
            kv_tokens_total=1000, classes=(ClassLoad(), ClassLoad()),
        )  # fmt: skip
        self.fact(LoadReported(report=report))

    def fleet(self, serving: str, draining: str = "", starting: int = 0) -> None:
        names = [tuple(InstanceId(n) for n in text.split()) for text in (serving, draining)]
        self.fact(FleetReported(starting=starting, serving=names[0], draining=names[1]))

    def read(self) -> Past:
        self.log.close()
        return Reader().read(lines_of(self.path))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    one = Log(tmp_path / "log", monkeypatch)
    monkeypatch.setattr("time.monotonic", one.monotonic)
    return one


def seen(moment: Moment, at: float) -> dict[str, tuple[str, bool, int]]:
    look, _ = moment.at(T + at)
    return {s.request: (s.instance, s.orphan, s.output_tokens) for s in look.streams}


def states(moment: Moment, at: float) -> dict[str, str]:
    _, deployment = moment.at(T + at)
    return {s.id: s.state for s in deployment.statuses}


def test_a_request_stands_where_it_was_placed_and_its_tokens_come_evenly(log: Log) -> None:
    log.place("a", "i1", prompt=40, priority=-100)
    log.now = 11.0
    log.end("a", "i1", 0.0, 101, first_token_s=1.0, prompt_tokens=40, priority=-100)
    moment = Moment(log.read())
    assert seen(moment, 0.5) == {"a": ("i1", False, 0)}
    look, _ = moment.at(T + 6.0)
    (one,) = look.streams
    assert (one.client_id, one.priority, one.prompt_tokens, one.age_s) == (
        "client's a",
        -100,
        40,
        6,
    )
    assert one.output_tokens == 51
    look, _ = moment.at(T + 12.0)
    assert look.streams == []
    assert [tuple(e) for e in look.ended] == [("a", "stop", 101, 1.0)]


def test_a_move_is_a_note_and_another_place(log: Log) -> None:
    log.place("a", "i0")
    log.now = 1.0
    log.move("a", "i0", "i1", "running")
    log.now = 2.0
    log.move("a", "i0", "i1")
    log.now = 3.0
    log.move("a", "i1", "i2", "aborted")
    log.now = 4.0
    log.end("a", "i1", 0.0, 10)
    whole = log.read()
    moment = Moment(whole)
    assert [seen(moment, at)["a"][0] for at in (0.5, 1.5, 2.5, 3.5)] == ["i0", "i0", "i1", "i1"]
    look, _ = Moment(whole).at(T + 2.5)
    assert [(n["kind"], n["move"]["outcome"]) for n in look.notes] == [
        ("move", "running"), ("move", "migrated")
    ]  # fmt: skip
    assert [m["outcome"] for m in whole.by_name["a"].moves] == ["migrated", "aborted"]


def test_a_death_leaves_orphans_until_another_instance_has_them(log: Log) -> None:
    log.place("a", "i0")
    log.place("b", "i1")
    log.now = 2.0
    log.fact(InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(0)))
    log.now = 3.0
    log.place("a", "i1")  # It is placed anew.
    log.log.revival({"request": "a", "instance": "i1", "why": "died", "lives_used": 1})
    log.now = 4.0
    for name in ("a", "b"):
        log.end(name, "i1", 0.0, 10)
    moment = Moment(log.read())
    assert {n: s[:2] for n, s in seen(moment, 1.0).items()} == {
        "a": ("i0", False), "b": ("i1", False)
    }  # fmt: skip
    assert {n: s[:2] for n, s in seen(moment, 2.5).items()} == {
        "a": ("i0", True), "b": ("i1", False)
    }  # fmt: skip
    assert {n: s[:2] for n, s in seen(moment, 3.5).items()} == {
        "a": ("i1", False), "b": ("i1", False)
    }  # fmt: skip


def test_of_a_request_without_an_end_the_pace_is_that_of_the_others(log: Log) -> None:
    log.place("a", "i0")
    log.place("b", "i0")
    log.now = 10.0
    log.end("a", "i0", 0.0, 50)
    log.now = 20.0
    log.note("up", "i0")
    moment = Moment(log.read())
    assert seen(moment, 15.0) == {"b": ("i0", False, 76)}


def test_a_request_that_nobody_placed_is_shown_from_its_end(log: Log) -> None:
    """The log began later, or the controller was away."""
    log.now = 10.0
    log.end("a", "i3", 4.0, 5)
    moment = Moment(log.read())
    assert seen(moment, 3.0) == {}
    assert seen(moment, 5.0)["a"][:2] == ("i3", False)


def test_instances_have_the_states_that_their_notes_say(log: Log) -> None:
    kinds = ("add", "up", "drain", "undrain", "death", "up", "renew", "give_up", "removed")
    for kind in kinds:
        log.now += 1
        log.note(kind, "i0", f"why {kind}")
    whole = log.read()
    moment = Moment(whole)
    assert [states(moment, at + 1.5).get("i0") for at in range(len(kinds))] == [
        "starting", "serving", "draining", "serving", "restarting", "serving", "restarting",
        "failed", None,
    ]  # fmt: skip
    look, deployment = Moment(whole).at(T + 5.5)
    assert [n["kind"] for n in look.notes] == list(kinds[:5])
    assert (deployment.statuses[0].restarts, deployment.statuses[0].why) == (1, "why death")


def test_without_notes_the_fleets_reports_say_the_states(log: Log) -> None:
    log.fleet("i0 i1", "i2")
    log.now = 1.0
    log.fleet("i0", "", starting=1)
    moment = Moment(log.read())
    assert states(moment, 0.5) == {"i0": "serving", "i1": "serving", "i2": "draining"}
    assert states(moment, 1.5) == {"i0": "serving", "i1": "restarting", "i2": "restarting"}


def test_the_last_report_of_a_burst_counts_and_a_dead_engines_does_not(log: Log) -> None:
    log.note("up", "i0")
    for used in range(100, 200):
        log.now += 0.01
        log.report("i0", used)
    log.now = 9.0
    log.note("death", "i0")
    whole = log.read()
    moment = Moment(whole)
    _, deployment = moment.at(T + 2.0)
    assert deployment.reports is not None
    assert [r.kv_tokens_used for r in deployment.reports] == [199]
    assert deployment.statuses[0].engine_index == 0
    assert sum(isinstance(c, LoadReport) for _, c in whole.changes) <= 2 / past.REPORTS_EVERY_S
    _, deployment = moment.at(T + 9.5)
    assert deployment.reports == []


@pytest.mark.parametrize(("last_note", "who"), [("up", "all"), ("death", "another")])
def test_nothing_of_a_run_that_was_killed_is_in_the_next(
    log: Log, last_note: str, who: str
) -> None:
    """Its requests have no end in the log, and its instances no last note. The next fleet may have
    the same process id."""
    log.note("up", "i0")
    for name in ("done", "open"):
        log.place(name, "i0")
    log.report("i0", 500)
    log.note(last_note, "i1")
    log.now = 5.0
    log.end("done", "i0", began=0.0, out=50)
    log.now = 6.0
    log.fact(RequestArrived(request=RequestId("late"), prompt_tokens=1))
    log.log.close()
    log.now = 3600.0
    log.log = EventLog(LogPlace(path=str(log.path), file_max_bytes=10**9), who=who)
    log.log.started(SchedulerSettings())
    log.now += 1
    log.report("i1", 7, run=0)
    log.now += 1
    log.note("up", "i1")
    log.place("new", "i1")
    log.now += 1
    log.end("new", "i1", began=3602.0, out=50)
    log.now += 1
    log.note("drain", "i1")
    log.note("undrain", "i1")
    log.place("open too", "i1")
    moment = Moment(log.read())
    assert set(seen(moment, 5.5)) == {"open"}
    assert states(moment, 5.6)["i0"] == "serving"
    assert (seen(moment, 6.1), states(moment, 6.1)) == ({}, {})
    assert (seen(moment, 3600.5), states(moment, 3600.5)) == ({}, {})
    assert states(moment, 3601.5) == {"i1": "starting"}
    _, deployment = moment.at(T + 3602.1)
    assert [(s.id, s.state) for s in deployment.statuses] == [("i1", "serving")]
    assert [(r.instance, r.kv_tokens_used) for r in deployment.reports or ()] == [("i1", 7)]
    assert set(seen(moment, 3602.5)) == {"new"}
    assert set(seen(moment, 3604.5)) == {"open too"}
    assert states(moment, 3604.5) == {"i1": "serving"}


def test_a_controller_that_starts_again_ends_no_request(log: Log) -> None:
    log.note("up", "i0")
    log.place("a", "i0")
    log.now = 5.0
    log.log.started(SchedulerSettings())
    for kind in ("death", "up", "drain", "undrain", "drain", "renew", "up"):
        log.now += 1
        log.note(kind, "i0")
    moment = Moment(log.read())
    assert set(seen(moment, 20.0)) == {"a"}


def test_a_log_that_tells_nothing_is_said_to(log: Log) -> None:
    with pytest.raises(UsageError, match="neither instances nor requests"):
        log.read()
