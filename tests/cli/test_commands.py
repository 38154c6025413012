"""The commands that list requests and moves, and that add, remove and restart instances."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from cli.test_cli import INSTANCES, Server, refusal
from llumnix.cli import main
from llumnix.commands import server_client

ROW = {
    "id": "r1", "request": "r1-0a", "instance": "i0", "class": "high", "key": "ada",
    "prompt_tokens": 80, "output_tokens": 17, "priority": -100, "age_s": 4.04,
}  # fmt: skip
MOVE = {
    "id": "m3", "request_id": "r1", "source": "i0", "destination": "i1", "outcome": "migrated",
    "stages": [{"tokens": 80}, {"tokens": 17}], "downtime_ms": 2.16, "ago_s": 7.2,
    "why": "a user's order", "reason": "",
}  # fmt: skip


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def play(server: Server, *bodies: Any) -> None:
    """Each question gets the next of these; one that is a pair has a status first."""
    left = iter(bodies)
    answer = server.handler.answer

    def next_one(handling: Any) -> None:
        body = next(left)
        server.status, server.body = body if isinstance(body, tuple) else (200, body)
        answer(handling)

    server.handler.do_GET = server.handler.do_POST = next_one


def listed(*rows: tuple[str, str, str | None], node: str = "h") -> dict[str, Any]:
    """A list of instances."""
    one = INSTANCES["instances"][0]
    return {
        "controller": "up",
        "instances": [{**one, "id": i, "state": s, "why": w, "node": node} for i, s, w in rows],
    }


def squeezed(line: str) -> str:
    return " ".join(line.split())


def query(server: Server) -> dict[str, list[str]]:
    return parse_qs(urlsplit(server.asked[-1][1]).query)


def test_requests_are_a_table_with_the_newest_first(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = {**ROW, "id": "evil\x1b[2J" + "x" * 90, "instance": None, "age_s": 1.0}
    server.body = {"requests": [ROW, newer], "total": 5, "incomplete": ["f1"]}
    flags = ["--instance", "i0", "--class", "high", "--older", "0.5", "--limit", "2"]
    assert main(["requests", *flags, "--url", server.url]) == 0
    told = capsys.readouterr()
    head, first, second, more = told.out.splitlines()
    assert head.split() == ["REQUEST", "INSTANCE", "CLASS", "KEY", "PROMPT", "OUTPUT", "AGE"]
    assert "\x1b" not in first
    assert first.split()[1:] == ["-", "high", "ada", "80", "17", "1.0", "s"]
    assert second.split() == ["r1", "i0", "high", "ada", "80", "17", "4.0", "s"]
    assert more == "3 more; --limit shows them"
    assert told.err == "f1 did not say theirs\n"
    assert query(server) == {
        "instance": ["i0"], "class": ["high"], "older_s": ["0.5"], "limit": ["2"],
    }  # fmt: skip


def test_migrations_are_a_table_with_the_newest_first(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    aborted = {**MOVE, "id": "m4", "outcome": "aborted", "downtime_ms": None, "reason": "it ended"}
    server.body = {"migrations": [MOVE, aborted], "total": 2, "incomplete": ["f1"]}
    flags = ["--since", "60", "--reason", "user", "--outcome", "migrated"]
    assert main(["migrations", *flags, "--url", server.url]) == 0
    told = capsys.readouterr()
    _, first, second = told.out.splitlines()
    assert told.err == "f1 did not say theirs\n"
    assert squeezed(first) == "m4 r1 i0 i1 aborted 97 - 7 s a user's order; it ended"
    assert squeezed(second) == "m3 r1 i0 i1 migrated 97 2.2 ms 7 s a user's order"
    assert query(server) == {
        "since_s": ["60.0"], "reason": ["user"], "outcome": ["migrated"], "limit": ["100"],
    }  # fmt: skip


@pytest.mark.parametrize("command", ["requests", "migrations"])
def test_a_list_as_json_is_the_servers_answer(
    server: Server, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    server.body = {"requests": [ROW], "migrations": [MOVE], "total": 1, "incomplete": []}
    assert main([command, "--json", "--url", server.url]) == 0
    assert json.loads(capsys.readouterr().out) == server.body


def test_add_starts_as_many_as_it_is_told_and_may_wait_until_they_serve(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": i, "state": "starting", "why": None} for i in ("i1", "i2")]
    coming = listed(("i1", "serving", None), ("i2", "starting", None))
    play(server, *rows, coming, listed(("i1", "serving", None), ("i2", "serving", None)))
    assert main(["add", "2", "--wait", "--url", server.url]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["i1 is starting", "i2 is starting"]
    assert [line.split(" after ")[0] for line in said[2:]] == ["i1 serves", "i2 serves"]
    assert [a[0] for a in server.asked] == ["POST", "POST", "GET", "GET"]


def test_an_added_instance_that_fails_is_status_1_with_the_reason(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    play(server, {"id": "i1", "state": "starting"}, listed(("i1", "failed", "no memory")))
    assert main(["add", "--wait", "--url", server.url]) == 1
    assert capsys.readouterr().out.splitlines()[1] == "i1 is failed: no memory"


@pytest.mark.parametrize("as_json", [True, False])
def test_instances_that_were_added_before_one_is_refused_are_waited_for(
    server: Server, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    no = 409, refusal("one more instance needs 1 GPU, and 0 of 4 are free")
    coming, there = (listed(("i1", state, None)) for state in ("starting", "serving"))
    play(server, {"id": "i1", "state": "starting"}, no, coming, there)
    words = ["add", "3", "--wait", *(["--json"] if as_json else []), "--url", server.url]
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.err == f"llumnix: error: {no[1]['error']['message']}\n"
    if as_json:
        assert json.loads(told.out) == {"instances": there["instances"]}
    else:
        assert told.out.startswith("i1 is starting\ni1 serves after ")
    assert [a[0] for a in server.asked] == ["POST", "POST", "GET", "GET"]


def test_add_refuses_a_number_that_is_none(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["add", "0", "--url", server.url]) == 2
    assert "1 or more" in capsys.readouterr().err
    assert server.asked == []


def test_all_instances_of_a_node_are_removed(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    both = listed(("i0", "serving", None), ("i1", "serving", None))
    orders = [{"id": i, "state": "draining", "why": None} for i in ("i0", "i1")]
    play(server, both, *orders, listed(("i1", "stopping", None)), listed())
    assert main(["remove", "--node", "h", "--force", "--url", server.url]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" after ")[0] for line in said] == [
        "i0 is empty and stopped", "i1 is empty and stopped",
    ]  # fmt: skip
    assert [a[1] for a in server.asked if a[0] == "POST"] == [
        f"/llumnix/v1/instances/{i}/drain?force=true" for i in ("i0", "i1")
    ]


def test_the_last_instance_is_refused_and_the_others_go_all_the_same(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    there = listed(("i0", "serving", None), ("i1", "serving", None))
    order = {"id": "i0", "state": "draining", "why": None}
    play(server, there, order, (409, refusal("i1 is the only instance that serves")), listed())
    assert main(["remove", "i0", "i1", "--url", server.url]) == 2
    told = capsys.readouterr()
    assert told.out.startswith("i0 is empty and stopped after ")
    assert told.err == "llumnix: error: i1 is the only instance that serves\n"


def test_each_refusal_of_several_is_said(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("i0", "i1")
    no = [(409, refusal(f"{name} is stopping already")) for name in names]
    play(server, listed(*((name, "stopping", None) for name in names)), *no)
    assert main(["drain", *names, "--url", server.url]) == 2
    said = "i0 is stopping already; i1 is stopping already"
    assert capsys.readouterr().err == f"llumnix: error: {said}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name instances, as `llumnix status` shows them, or give --node NODE"),
        (["i0", "--node", "h"], "give instances or --node, not both"),
        (["--node", "other"], "--node other: no instance runs there; nodes with one: h"),
    ],
)
def test_who_is_meant_must_be_clear(
    server: Server, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    server.body = listed(("i0", "serving", None))
    assert main(["drain", *words, "--url", server.url]) == 2
    assert capsys.readouterr().err == f"llumnix: error: {said}\n"


def test_undrain_takes_back_several(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    play(server, *({"id": i, "state": "serving"} for i in ("i0", "i1")))
    assert main(["undrain", "i0", "i1", "--url", server.url]) == 0
    assert capsys.readouterr().out == "i0 is serving\ni1 is serving\n"


def test_one_that_is_refused_keeps_none_from_serving_on(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = 404, refusal("no instance i1")
    rows = [{"id": i, "state": "serving"} for i in ("i0", "i2")]
    play(server, rows[0], gone, rows[1])
    assert main(["undrain", "i0", "i1", "i2", "--json", "--url", server.url]) == 2
    told = capsys.readouterr()
    assert json.loads(told.out) == {"instances": rows}
    assert told.err == "llumnix: error: no instance i1\n"


def again(*engines: tuple[str, str, int]) -> dict[str, Any]:
    """A list of instances with the engines they have."""
    body = listed(*((i, s, None) for i, s, _ in engines))
    for row, (_, _, index) in zip(body["instances"], engines, strict=True):
        row["engine_index"] = index
    return body


ORDER = {"id": "i0", "state": "draining", "why": None}
TWO = [again(("i0", "serving", 0), ("i1", "serving", 1))] * 2


def test_all_instances_are_restarted_one_after_the_other(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    before = again(("i0", "serving", 0), ("i1", "serving", 1))
    half = again(("i0", "serving", 2), ("i1", "serving", 1))
    play(
        server, before, before, ORDER, again(("i0", "restarting", 0), ("i1", "serving", 1)), half,
        half, {**ORDER, "id": "i1"}, again(("i0", "serving", 2), ("i1", "serving", 3)),
    )  # fmt: skip
    assert main(["restart", "--timeout", "9", "--url", server.url]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" after ")[0] for line in said] == [
        "i0 is draining", "i0 serves again", "i1 is draining", "i1 serves again",
    ]  # fmt: skip
    assert [a[1] for a in server.asked if a[0] == "POST"] == [
        f"/llumnix/v1/instances/{i}/restart?timeout_s=9.0" for i in ("i0", "i1")
    ]


def test_instances_may_be_restarted_together(server: Server) -> None:
    play(
        server, *TWO, ORDER, {**ORDER, "id": "i1"},
        again(("i0", "serving", 2), ("i1", "draining", 1)), again(("i1", "serving", 3)),
    )  # fmt: skip
    assert main(["restart", "i0", "i1", "--together", "--url", server.url]) == 0
    assert [a[0] for a in server.asked] == ["GET", "GET", "POST", "POST", "GET", "GET"]


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_one_that_is_refused_keeps_none_from_a_restart_together(
    server: Server, capsys: pytest.CaptureFixture[str], json: list[str]
) -> None:
    play(
        server, *TWO, (409, refusal("i0 is failed: DELETE it")), {**ORDER, "id": "i1"},
        again(("i0", "failed", 0), ("i1", "serving", 3)),
    )  # fmt: skip
    assert main(["restart", "i0", "i1", "--together", *json, "--url", server.url]) == 2
    told = capsys.readouterr()
    assert "llumnix: error: i0 is failed: DELETE it\n" in told.err
    if json:
        assert '"i1"' in told.out
        assert '"i0"' not in told.out
    else:
        lines = [line.split(" after ")[0] for line in told.out.splitlines()]
        assert lines == ["i1 is draining", "i1 serves again"]


def test_a_refusal_ends_a_rolling_restart(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    play(server, *TWO, (409, refusal("i0 is failed: DELETE it")))
    assert main(["restart", "i0", "i1", "--url", server.url]) == 2
    assert capsys.readouterr().err == "llumnix: error: i0 is failed: DELETE it\n"
    assert [a[0] for a in server.asked] == ["GET", "GET", "POST"]


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (again(("i0", "failed", 2)), "i0 is failed: "),
        (again(("i0", "serving", 0)), "i0 is not restarted: its restart was taken back"),
        (again(), "i0 is gone: it was ordered away"),
    ],
)
def test_the_first_that_does_not_serve_again_ends_a_rolling_restart(
    server: Server, capsys: pytest.CaptureFixture[str], then: dict[str, Any], said: str
) -> None:
    play(server, *TWO, ORDER, then)
    assert main(["restart", "i0", "i1", "--url", server.url]) == 1
    assert capsys.readouterr().out.splitlines()[1].startswith(said)


BUSY: list[Any] = [
    (0, None),
    (502, None),
    (503, refusal("nobody serves now", "service_unavailable")),
]


def serials(*rows: tuple[str, str, int], engine: int | None = None) -> dict[str, Any]:
    """A list of instances with their serial numbers."""
    body = again(*((i, s, serial if engine is None else engine) for i, s, serial in rows))
    for row, (_, _, serial) in zip(body["instances"], rows, strict=True):
        row["serial"] = serial
    return body


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "PAUSE_S", 0.0)


@pytest.mark.usefixtures("patient")
def test_a_command_that_waits_asks_a_busy_server_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = serials(("i0", "serving", 4))
    order = there["instances"][0] | {"state": "draining"}
    play(server, there, order, *BUSY, serials())
    assert main(["remove", "i0", "--url", server.url]) == 0
    assert len(server.asked) == 3 + len(BUSY)
    monkeypatch.setattr(server_client, "PATIENCE_S", 0.0)
    play(server, there, order, (0, None), (0, None))
    assert main(["remove", "i0", "--url", server.url]) == 2
    assert "no llumnix answers" in capsys.readouterr().err


def test_a_command_waits_for_no_server_before_it_has_ordered_anything(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = 0
    for command in ("drain", "restart"):
        assert main([command, "i0", "--url", server.url]) == 2
        assert "no llumnix answers" in capsys.readouterr().err
    assert len(server.asked) == 2


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("failure", BUSY)
def test_a_drain_without_an_answer_is_ordered_again_of_the_instance_that_was_meant(
    server: Server, capsys: pytest.CaptureFixture[str], failure: Any
) -> None:
    there = serials(("i0", "serving", 4))
    order = there["instances"][0] | {"state": "draining"}
    play(server, there, failure, there, order, serials())
    assert main(["drain", "i0", "--url", server.url]) == 0
    assert [a[0] for a in server.asked] == ["GET", "POST", "GET", "POST", "GET"]
    # Carried out meanwhile, and another instance has its id.
    server.asked.clear()
    other = serials(("i0", "starting", 5))
    play(server, there, failure, other, other)
    assert main(["drain", "i0", "--url", server.url]) == 0
    assert [a[0] for a in server.asked] == ["GET", "POST", "GET", "GET"]
    out = capsys.readouterr().out.splitlines()
    assert [line.split(" after ")[0] for line in out] == ["i0 is empty and stopped"] * 2


def test_an_instance_that_got_the_id_of_a_drained_one_is_another(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    there = serials(("i0", "serving", 4))
    order = there["instances"][0] | {"state": "draining"}
    play(server, there, order, serials(("i0", "serving", 5)))
    assert main(["drain", "i0", "--url", server.url]) == 0
    assert capsys.readouterr().out.startswith("i0 is empty and stopped after ")


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("failure", BUSY)
def test_a_restart_without_an_answer_is_not_ordered_twice(
    server: Server, capsys: pytest.CaptureFixture[str], failure: Any
) -> None:
    there, done = serials(("i0", "serving", 4), engine=0), serials(("i0", "serving", 4), engine=1)
    play(server, there, there, failure, done, done)
    assert main(["restart", "i0", "--url", server.url]) == 0
    assert [a[0] for a in server.asked] == ["GET", "GET", "POST", "GET", "GET"]
    order = there["instances"][0] | {"state": "draining"}
    play(server, there, there, failure, there, order, done)
    assert main(["restart", "i0", "--url", server.url]) == 0
    assert [a[0] for a in server.asked[5:]] == ["GET", "GET", "POST", "GET", "POST", "GET"]
    # Another instance with its id serves, which is not the one that was to serve again.
    play(server, there, there, order, serials(("i0", "serving", 5), engine=2))
    assert main(["restart", "i0", "--url", server.url]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "i0 is gone: it was ordered away"


def test_a_reload_tells_of_each_setting_when_it_counts(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"now": ["migration.rescues", "scaling.up_after_s"], "engines": [], "start": ["a"]}
    names: dict[str, Any] = {"added": [], "removed": [], "changed": []}
    server.body = {"keys": 0, **names, "settings": settings, "unconfirmed": []}
    assert main(["reload", "--url", server.url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "counts now: migration.rescues, scaling.up_after_s",
        "counts from the next start of the server: a",
    ]
    settings.update(now=[], engines=["queue.passers"], start=[])
    assert main(["reload", "--url", server.url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "counts for engines that start from now on (`llumnix restart`): queue.passers"
    ]
    settings.update(engines=[])
    assert main(["reload", "--url", server.url]) == 0
    assert capsys.readouterr().out == "0 keys: nothing has changed\n"


@pytest.mark.parametrize("silent", [[], ["f1"]])
def test_a_reload_that_not_all_have_confirmed_is_status_1(
    server: Server, capsys: pytest.CaptureFixture[str], silent: list[str]
) -> None:
    names: dict[str, Any] = {"added": ["ada"], "removed": [], "changed": ["bob", "ops"]}
    server.body = {"keys": 4, **names, "unconfirmed": silent}
    assert main(["reload", "--url", server.url]) == len(silent)
    said = ["4 keys: added ada; changed bob, ops"]
    if silent:
        said.append("not confirmed by f1: what stands still has them once it goes on")
    assert capsys.readouterr().out.splitlines() == said
    assert main(["reload", "--json", "--url", server.url]) == len(silent)
    assert json.loads(capsys.readouterr().out) == server.body
