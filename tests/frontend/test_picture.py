"""What the page is told of a deployment: all of it once, then what changed."""

from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.core.priorities import Priorities
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.settings import PrioritySettings
from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.frontend.streams.look import Ended, Look, Placed, SeenStream
from llumnix.frontend.ui import picture
from llumnix.frontend.ui.picture import Deployment, Message, Picture
from llumnix.observe.notes import Notes

T = 1000.0


def status(name: str, state: str = "serving", **more: Any) -> InstanceStatus:
    given: dict[str, Any] = {
        "id": InstanceId(name), "state": state, "hung": False, "node": "host", "pid": 1,
        "engine_index": EngineIndex(int(name[1:])), "devices": [], "restarts": 0, "why": None,
    }  # fmt: skip
    return InstanceStatus(**(given | more))


def report(name: str, used: int = 0, waiting: int = 0, **more: Any) -> LoadReport:
    classes = (ClassLoad(), ClassLoad(running=2, waiting=waiting))
    return LoadReport(
        instance=InstanceId(name),
        engine_index=EngineIndex(int(name[1:])),
        sequence=1,
        kv_tokens_used=used,
        kv_tokens_total=1000,
        classes=classes,
        **more,
    )


def stream(name: str, instance: str = "i0", **more: Any) -> SeenStream:
    given: dict[str, Any] = {
        "request": RequestId(name), "client_id": f"client's {name}",
        "instance": InstanceId(instance), "orphan": False, "priority": 0, "prompt_tokens": 10,
        "output_tokens": 0, "age_s": 1.0,
    }  # fmt: skip
    return SeenStream(**(given | more))


class Watched:
    """A picture of two instances, and the looks that it takes."""

    def __init__(self) -> None:
        self.picture = Picture(Priorities(PrioritySettings()))
        self.deployment = Deployment([status("i0"), status("i1")], [report("i0"), report("i1")])
        self.t = T

    def look(self, *streams: SeenStream, every_s: float = 0.2, **more: Any) -> list[Message]:
        self.t += every_s
        told = self.picture.take(
            Look(streams=list(streams), **more), self.deployment, round(self.t, 3)
        )
        return told

    def delta(self, *streams: SeenStream, **more: Any) -> dict[str, Any]:
        """What such a look changes."""
        return next((m.data for m in self.look(*streams, **more) if m.event == "delta"), {})

    def rows(self) -> list[list[Any]]:
        (state,) = self.picture.whole(self.t)
        rows: list[list[Any]] = state.data["requests"]
        return rows


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_the_state_has_all_that_there_is(watched: Watched) -> None:
    watched.look(stream("a", prompt_tokens=7, output_tokens=3, age_s=2.5), stream("b", "i1"))
    (state,) = watched.picture.whole(watched.t)
    assert state.event == "state"
    assert state.data["requests"] == [
        [0, "i0", 1, "d", 7, 3, 2.5, "client's a", "a"],
        [1, "i1", 1, "p", 10, 0, 1.0, "client's b", "b"],
    ]
    assert state.data["instances"]["i0"] == {
        "state": "serving", "node": "host", "restarts": 0, "why": None, "kv": 0, "cap": 1000,
        "free": 500, "run": [0, 2], "wait": [0, 0],
    }  # fmt: skip
    assert state.data["controller"] == "up"


def test_the_first_look_is_told_by_the_state_alone(watched: Watched) -> None:
    assert watched.look(stream("a")) == []


def test_a_look_without_news_tells_nothing(watched: Watched) -> None:
    watched.look(stream("a"))
    assert watched.look(stream("a")) == []


def test_requests_come_move_and_go(watched: Watched) -> None:
    watched.look(stream("a", output_tokens=1))
    delta = watched.delta(stream("a", "i1", output_tokens=4), stream("b"))
    assert delta["open"] == [[1, "i0", 1, "p", 10, 0, 1.0, "client's b", "b"]]
    assert delta["moved"] == [[0, "i1", "d", 4]]
    gone = watched.delta(stream("b"), ended=[Ended(RequestId("a"), "stop", 5, None)])
    assert gone["close"] == [[0, "stop"]]
    assert [row[0] for row in watched.rows()] == [1]


def test_a_number_is_never_used_twice(watched: Watched) -> None:
    watched.look(stream("a"))
    watched.look()
    watched.look(stream("a"))
    assert [row[0] for row in watched.rows()] == [1]


def test_tokens_are_told_once_a_second(watched: Watched) -> None:
    watched.look(stream("a", output_tokens=1))
    told = [watched.delta(stream("a", output_tokens=2 + n)).get("out") for n in range(11)]
    assert [out for out in told if out] == [[[0, 6]], [[0, 11]]]


def test_of_the_requests_without_a_token_the_youngest_wait(watched: Watched) -> None:
    watched.deployment = Deployment([status("i0")], [report("i0", waiting=1)])
    watched.look(stream("old", age_s=9), stream("young", age_s=1), stream("running", age_s=0.5,
        output_tokens=1), stream("elsewhere", "i1", age_s=0.1))  # fmt: skip
    phases = {row[8]: row[3] for row in watched.rows()}
    assert phases == {"old": "p", "young": "w", "running": "d", "elsewhere": "p"}


def test_a_request_whose_instance_died_is_an_orphan_until_another_has_it(watched: Watched) -> None:
    watched.look(stream("a", output_tokens=2))
    assert watched.delta(stream("a", output_tokens=2, orphan=True))["moved"] == [[0, "i0", "o", 2]]
    assert watched.delta(stream("a", "i1", output_tokens=2))["moved"] == [[0, "i1", "d", 2]]


def test_only_what_changed_of_an_instance_is_told(watched: Watched) -> None:
    watched.look()
    watched.deployment = Deployment(
        [status("i0", "draining", why="draining: x"), status("i2")],
        [report("i0", used=5, accepting=False), report("i2")],
    )
    changed = watched.delta()["instances"]
    assert changed["i0"] == {"state": "draining", "why": "draining: x", "kv": 5, "free": None}
    assert changed["i1"] is None
    assert changed["i2"]["state"] == "serving"


def test_what_a_run_reported_that_is_over_is_not_the_next_runs(watched: Watched) -> None:
    watched.look()
    row = status("i0", engine_index=EngineIndex(7))
    watched.deployment = Deployment([row, status("i1")], [report("i0", used=5), report("i1")])
    assert watched.delta()["instances"]["i0"]["cap"] == 0


def test_without_the_controller_loads_stay_and_it_is_told(watched: Watched) -> None:
    watched.look()
    watched.deployment = Deployment(watched.deployment.statuses, None)
    (told,) = watched.look()
    assert (told.event, told.data["kind"], told.data["target"]) == (
        "decision", "bypass", "controller"
    )  # fmt: skip
    (state,) = watched.picture.whole(watched.t)
    assert state.data["controller"] == "bypassed"
    assert state.data["instances"]["i0"]["cap"] == 1000
    watched.deployment = Deployment(watched.deployment.statuses, [report("i0"), report("i1")])
    assert [m.data["kind"] for m in watched.look()] == ["back"]


def test_once_a_second_it_is_told_how_requests_are_placed_and_by_how_many_frontends(
    watched: Watched,
) -> None:
    watched.look()
    told = [watched.delta(every_s=0.2, frontends=3) for _ in range(11)]
    told = [delta for delta in told if delta]
    assert len(told) == 2, "in 2.2 s"
    assert [(d["controller"], d["frontends"]) for d in told] == [("up", 3)] * 2
    watched.deployment = Deployment(watched.deployment.statuses, None)
    told = [watched.delta(every_s=0.2) for _ in range(6)]
    assert ("bypassed", 1) in [(d["controller"], d["frontends"]) for d in told if "rates" in d]
    (state,) = watched.picture.whole(watched.t)
    assert state.data["frontends"] == 1


def move(outcome: str, request: str = "a", downtime_ms: float | None = None) -> dict[str, Any]:
    notes = Notes()
    stages = [] if outcome == "running" else [{"tokens": 9, "bytes": 90, "ms": 1}] * 2
    shown = {
        "id": "m0", "request": request, "request_id": "r", "outcome": outcome, "source": "i0",
        "destination": "i1", "stages": stages, "downtime_ms": downtime_ms, "reason": "",
        "why": "i1 is freer",
    }  # fmt: skip
    notes.note("move", request, "i1 is freer", move=shown)
    (one,) = notes.since(0)
    return one


def test_a_move_has_its_reason_and_its_true_downtime(watched: Watched) -> None:
    watched.look(stream("a"))
    begun, ended = watched.look(stream("a"), notes=[move("running"), move("migrated", "a", 2.5)])
    assert (begun.event, begun.data["phase"], begun.data["k"]) == ("move", "begun", 0)
    assert ended.data["phase"] == "ended"
    shown = {n: ended.data[n] for n in ("from", "to", "outcome", "tokens", "bytes", "why")}
    assert shown == {
        "from": "i0", "to": "i1", "outcome": "migrated", "tokens": 18, "bytes": 180,
        "why": "i1 is freer",
    }  # fmt: skip
    assert ended.data["downtime_ms"] == 2.5


def test_a_move_of_a_request_that_has_just_ended_names_it(watched: Watched) -> None:
    watched.look(stream("a"))
    told = watched.look(
        notes=[move("aborted")], ended=[Ended(RequestId("a"), "abort", 0, None)]
    )  # fmt: skip
    assert [m.data["k"] for m in told if m.event == "move"] == [0]


def test_what_happened_before_the_page_was_opened_is_history(watched: Watched) -> None:
    assert watched.look(notes=[move("running"), move("migrated")]) == []
    (event,) = watched.picture.history(move("migrated")["t"]).data["events"]
    assert (event["event"], event["phase"]) == ("move", "ended")
    assert watched.picture.history(1e12).data["events"] == []


def test_of_many_dispatches_five_are_told_and_the_rest_counted(watched: Watched) -> None:
    watched.look()
    placed = [Placed(RequestId(f"r{n}"), InstanceId("i1"), f"why {n}") for n in range(8)]
    told = watched.look(*(stream(p.request, "i1") for p in placed), placed=placed)
    dispatches = [m.data for m in told if m.event == "decision"]
    assert [d.get("why") for d in dispatches] == [f"why {n}" for n in range(5)] + [None]
    assert dispatches[-1]["count"] == 3


def test_rates_count_requests_that_came_and_went_between_two_looks(watched: Watched) -> None:
    ended = [Ended(RequestId(f"r{n}"), "stop", 30, 0.05 * (n + 1)) for n in range(4)]
    watched.look(stream("a", output_tokens=100))
    rates = watched.delta(stream("a", output_tokens=180), ended=ended, every_s=2.0)["rates"]
    assert rates == {"req_s": 2.0, "tok_s": 100, "ttft_ms": [150.0, 200.0]}


def test_beyond_a_number_of_requests_the_rest_is_counted(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "ROWS_MAX", 2)
    streams = [stream(f"r{n}", "i1", prompt_tokens=5, output_tokens=n) for n in range(4)]
    watched.look(*streams)
    (state,) = watched.picture.whole(watched.t)
    assert len(state.data["requests"]) == 2
    assert state.data["more"] == {"i1": [2, 15]}
    assert watched.delta(*streams[1:])["close"] == [[0, ""]]
    delta = watched.delta(*streams[1:])
    assert [row[8] for row in delta["open"]] == ["r2"]
    assert delta["more"] == {"i1": [1, 8]}
