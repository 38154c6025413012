"""The routes under /llumnix that start, drain and list instances."""

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from llumnix.core.priorities import Priorities
from llumnix.core.reports import ClassLoad, LoadReport
from llumnix.core.settings import PrioritySettings
from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.supervision.readiness import FleetSeen
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.errors import CapacityError, LastInstanceError, UsageError
from llumnix.frontend.http.control import OwnControl, Rows
from llumnix.frontend.http.routes import DRAIN_TIMEOUT_MAX_S, STATUS, control_app
from llumnix.observe.notes import Notes
from support.frontend import front


class Control:
    """A fleet of one that notes what it is asked; `error` is raised instead."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.notes = Notes()
        self.exposition = SimpleNamespace(text=self._text)
        self.row = InstanceStatus(
            id=InstanceId("i0"),
            state="hung",
            hung=True,
            engine_index=EngineIndex(3),
            node="host",
            pid=1,
            devices=["cpu:0"],
            restarts=0,
            why="hung: no step for 4 s, and it has requests",
        )

    def _note(self, *asked: Any) -> InstanceStatus:
        self.asked.append(asked)
        if self.error is not None:
            raise self.error
        return self.row

    async def _text(self) -> bytes:
        return b"metrics"

    def status(self) -> list[InstanceStatus]:
        return [self.row]

    def seen(self) -> FleetSeen:
        return FleetSeen(instances=[self.row], stopping=False)

    async def add(self) -> InstanceStatus:
        return self._note("add")

    async def drain(self, instance: InstanceId, why: str, **how: Any) -> InstanceStatus:
        return self._note("drain", instance, how)

    async def undrain(self, instance: InstanceId) -> InstanceStatus:
        return self._note("undrain", instance)


@pytest.fixture
def control() -> Control:
    return Control()


@pytest.fixture
def reports() -> list[LoadReport] | None:
    """The last of each instance; None while the controller is away."""
    return []


@pytest.fixture
async def http(
    control: Control, reports: list[LoadReport] | None
) -> AsyncIterator[httpx.AsyncClient]:
    async def loads() -> list[LoadReport] | None:
        return reports

    client: Any = SimpleNamespace(
        link=SimpleNamespace(loads=loads),
        in_flight=lambda _: 2,
        priorities=Priorities(PrioritySettings()),
    )
    transport = httpx.ASGITransport(control_app(client, OwnControl(client, control)))
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
        yield http


DRAIN = ("POST", "/llumnix/v1/instances/i0/drain")
DELETE = ("DELETE", "/llumnix/v1/instances/i0")


@pytest.mark.parametrize(("method", "path"), [DRAIN, DELETE])
@pytest.mark.parametrize(
    ("query", "how"),
    [
        ("", {"timeout_s": None, "force": False, "again": False}),
        ("?timeout_s=2.5", {"timeout_s": 2.5, "force": False, "again": False}),
        ("?force=true&timeout_s=0", {"timeout_s": 0.0, "force": True, "again": False}),
    ],
)
async def test_a_drain_may_say_how_long_it_takes_at_most(
    http: httpx.AsyncClient,
    control: Control,
    method: str,
    path: str,
    query: str,
    how: dict[str, Any],
) -> None:
    answer = await http.request(method, path + query)
    assert answer.status_code == 202
    assert control.asked == [("drain", "i0", how)]


async def test_a_restart_is_a_drain_after_which_it_is_started_again(
    http: httpx.AsyncClient, control: Control
) -> None:
    answer = await http.post("/llumnix/v1/instances/i0/restart?timeout_s=2&force=true")
    assert answer.status_code == 202
    assert control.asked == [("drain", "i0", {"timeout_s": 2.0, "force": True, "again": True})]


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "soon", str(DRAIN_TIMEOUT_MAX_S + 1)])
async def test_a_timeout_that_is_none_is_refused_by_name(
    http: httpx.AsyncClient, control: Control, value: str
) -> None:
    answer = await http.request(*DRAIN, params={"timeout_s": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("timeout_s: ")
    assert control.asked == []


@pytest.mark.parametrize("error", [CapacityError("no room"), LastInstanceError("the only one")])
async def test_what_cannot_be_done_now_is_a_conflict(
    http: httpx.AsyncClient, control: Control, error: Exception
) -> None:
    control.error = error
    for method, path in (DRAIN, DELETE, ("POST", "/llumnix/v1/instances")):
        answer = await http.request(method, path)
        assert answer.status_code == 409
        assert answer.json()["error"]["message"] == str(error)


async def test_a_hung_instance_is_listed_as_hung(http: httpx.AsyncClient) -> None:
    (row,) = (await http.get("/llumnix/v1/instances")).json()["instances"]
    assert (row["state"], row["hung"], row["in_flight"]) == ("hung", True, 2)
    assert row["why"] == "hung: no step for 4 s, and it has requests"


@pytest.mark.parametrize(("accepting", "freeness"), [(True, 125.0), (False, None)])
async def test_an_instances_load_is_that_of_its_last_report(
    http: httpx.AsyncClient, reports: list[LoadReport], accepting: bool, freeness: float | None
) -> None:
    of_another_run, mine = (
        LoadReport(
            instance=InstanceId("i0"),
            engine_index=EngineIndex(run),
            sequence=1,
            kv_tokens_used=used,
            kv_tokens_total=1000,
            classes=(ClassLoad(), ClassLoad(running=6)),
            accepting=accepting,
            steps=1,
        )
        for run, used in ((2, 900), (3, 250))
    )
    reports += [of_another_run, mine]
    (row,) = (await http.get("/llumnix/v1/instances")).json()["instances"]
    assert (row["kv_tokens_used"], row["freeness"]) == (250, freeness)


class Listing(OwnControl):
    """A control with made-up requests and moves."""

    async def requests(self) -> Rows:
        rows = [
            {
                "id": f"r{n}",
                "instance": f"i{n % 2}",
                "class": c,
                "key": "ada" if n == 3 else None,
                "age_s": float(n),
            }
            for n, c in enumerate(["high", "normal", "high", "normal"])
        ]
        return Rows(rows=rows, incomplete=["f1"])

    async def migrations(self) -> Rows:
        rows = [
            {"id": f"m{n}", "ago_s": 10.0 - n, "code": c, "outcome": o}
            for n, (c, o) in enumerate([
                ("user", "migrated"), ("drain", "aborted"), ("drain", "migrated"),
            ])
        ]  # fmt: skip
        return Rows(rows=rows, incomplete=["f1"])


@pytest.mark.parametrize(
    ("query", "found", "total"),
    [
        ("requests", "r3 r2 r1 r0", 4),
        ("requests?limit=2", "r1 r0", 4),
        ("requests?instance=i1", "r3 r1", 2),
        ("requests?class=high", "r2 r0", 2),
        ("requests?key=ada", "r3", 1),
        ("requests?older_s=2", "r3 r2", 2),
        ("migrations", "m0 m1 m2", 3),
        ("migrations?limit=1", "m2", 3),
        ("migrations?since_s=9", "m1 m2", 2),
        ("migrations?reason=drain", "m1 m2", 2),
        ("migrations?outcome=migrated", "m0 m2", 2),
    ],
)
async def test_a_list_has_what_was_asked_for_the_oldest_first(
    control: Control, query: str, found: str, total: int
) -> None:
    client: Any = SimpleNamespace(client_index=0, streams=[], notes=None)
    transport = httpx.ASGITransport(control_app(client, Listing(client, control)))
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
        body = (await http.get("/llumnix/v1/" + query)).json()
        assert [row["id"] for row in body[query.partition("?")[0]]] == found.split()
        assert (body["total"], body["incomplete"]) == (total, ["f1"])
        assert (await http.get("/llumnix/v1/requests?limit=0")).status_code == 400
        for odd in ("outcome=odd", "reason=odd"):
            assert (await http.get(f"/llumnix/v1/migrations?{odd}")).status_code == 400


async def test_the_settings_are_shown(control: Control) -> None:
    client: Any = SimpleNamespace(client_index=0, streams=[], notes=None)
    rows = [{"name": "port", "value": 81, "source": "f.yaml"}]
    app = control_app(client, OwnControl(client, control), settings=rows)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
        assert (await http.get("/llumnix/v1/config")).json() == {"settings": rows}


@pytest.mark.parametrize("error", sorted(STATUS, key=lambda kind: kind.__name__))
async def test_an_error_that_a_user_can_mend_has_a_status_of_its_own(
    http: httpx.AsyncClient, control: Control, error: type[Exception]
) -> None:
    control.error = error("so it is")
    answer = await http.post("/llumnix/v1/instances/i0/undrain")
    assert answer.status_code == (404 if error.__name__.startswith("Unknown") else 409)
    control.error = UsageError("odd")
    assert (await http.post("/llumnix/v1/instances")).status_code == 400


async def test_an_instance_is_added_and_may_serve_on(
    http: httpx.AsyncClient, control: Control
) -> None:
    added = await http.post("/llumnix/v1/instances")
    again = await http.post("/llumnix/v1/instances/i0/undrain")
    assert (added.status_code, again.status_code) == (202, 200)
    assert added.json()["id"] == again.json()["id"] == "i0"
    assert control.asked == [("add",), ("undrain", "i0")]


@pytest.mark.parametrize("reports", [None])
async def test_while_the_controller_is_away_instances_are_listed_without_load(
    http: httpx.AsyncClient, control: Control
) -> None:
    body = (await http.get("/llumnix/v1/instances")).json()
    assert body["controller"] == "away"
    assert [(r["id"], r["in_flight"], r["freeness"]) for r in body["instances"]] == [
        ("i0", 2, None)
    ]
    (frontend,) = body["frontends"]
    assert (frontend["id"], frontend["state"], frontend["pid"]) == ("f0", "serving", os.getpid())
    control.row = replace(control.row, engine_index=None)  # It has no engine at the moment.
    (row,) = (await http.get("/llumnix/v1/instances")).json()["instances"]
    assert (row["in_flight"], row["freeness"]) == (None, None)


async def test_of_a_deployment_with_one_frontend_its_own_requests_are_listed(
    tmp_path: Path, control: Control
) -> None:
    async with front(tmp_path) as one:
        control.notes.note(kind="up", target="i0", why="")
        ours = OwnControl(one.client, control)
        await one.add_request("r", 1)
        transport = httpx.ASGITransport(control_app(one.client, ours))
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
            body = (await http.get("/llumnix/v1/requests")).json()
            assert [row["request"] for row in body["requests"]] == ["r"]
            assert (body["total"], body["incomplete"]) == (1, [])
            assert (await http.get("/llumnix/v1/requests/r")).json()["instance"] == "i1"
            for path in ("requests/other", "migrations/other"):
                assert (await http.get(f"/llumnix/v1/{path}")).status_code == 404
            order = {"request_id": "other"}
            assert (await http.post("/llumnix/v1/migrations", json=order)).status_code == 404
            assert (await http.get("/llumnix/v1/migrations")).json() == {
                "migrations": [], "total": 0, "incomplete": [],
            }  # fmt: skip
            assert (await http.get("/llumnix/v1/quarantine")).json() == {"quarantine": []}
        look = await ours.look({})
        assert [s.request for s in look.streams] == ["r"]
        assert [n["kind"] for n in look.notes] == ["up"]
        assert await ours.fleet() == control.seen()
        assert await ours.metrics() == b"metrics"
