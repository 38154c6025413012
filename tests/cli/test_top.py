"""`llumnix top` over the real feed of a made-up deployment."""

import json
import re
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from llumnix.cli import main
from llumnix.commands.top import Board
from support.fake_deployment import FakeDeployment, Served, application, served


@pytest.fixture
def world() -> FakeDeployment:
    world = FakeDeployment(instances=2)
    world.add_request("i0", "mine", prompt=7_999, out=1)
    world.add_request("i1", waits=True)
    return world


@pytest.fixture
def site(world: FakeDeployment) -> Iterator[Served]:
    with served(application(world)) as site:
        yield site


def drawn(board: Board) -> str:
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(board.drawn())
    return console.export_text()


def test_once_shows_instances_and_what_happened(
    world: FakeDeployment, site: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    world.notes.note("death", "i1", "its process was killed")
    assert main(["top", "--once", "--url", site.url]) == 0
    shown = capsys.readouterr().out
    assert "Qwen3-8B · llumnix" in shown
    assert "2 requests, 1 waiting" in shown
    assert re.search(r"i0 +serving +█+░+ +50%", shown)
    assert re.search(r"\d\d:\d\d:\d\d +i1: death +its process was killed", shown)


def test_as_json_each_event_is_a_line(site: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--json", "--url", site.url]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["hello", "history", "state"]


def test_without_a_server_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--url", "http://127.0.0.1:9"]) == 2
    assert "no llumnix answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_a_server_without_the_feed_is_named(
    capsys: pytest.CaptureFixture[str], site: Served
) -> None:
    assert main(["top", "--once", "--url", site.url + "/llumnix/ui"]) == 2
    assert capsys.readouterr().err.startswith("llumnix: error: ")


STATE = {
    "seq": 1, "t": 1.0, "controller": "up", "rates": {}, "requests": [
        [0, "i0", 1, "d", 5, 5, 1.0, "a", "a"]
    ],
    "instances": {"i0": {"state": "serving", "kv": 1, "cap": 10, "free": 4, "run": [1], "wait": [0],
                         "why": None}},
}  # fmt: skip


def test_it_follows_what_changes() -> None:
    board = Board()
    board.take("state", STATE)
    board.take("delta", {
        "instances": {"i0": {"state": "draining"}, "i1": {**STATE["instances"]["i0"], "kv": 9}},
        "open": [[1, "i0", 1, "w", 5, 0, 0.1, "b", "b"]], "controller": "bypassed",
        "rates": {"req_s": 2.5, "tok_s": 99, "ttft_ms": [40.2, 90.0]},
    })  # fmt: skip
    text = drawn(board)
    assert re.search(r"i0 +draining", text)
    assert re.search(r"i1 +serving .* 90%", text)
    assert "2 requests, 1 waiting" in text
    assert "2.5 requests/s   99 tokens/s   first token 40 / 90 ms (P50 / P99)" in text
    assert "controller bypassed" in text
    board.take("delta", {"instances": {"i0": None}, "close": [[0, "stop"], [1, "abort"]]})
    assert "i0" not in drawn(board)
    assert "0 requests" in drawn(board)


def test_ids_do_not_steer_the_terminal() -> None:
    board = Board()
    board.take("state", STATE)
    move = {
        "t": 1.0, "phase": "ended", "request": "\x1b[2J[red]x", "from": "i0", "to": "i1",
        "outcome": "migrated", "downtime_ms": 2.25, "why": "", "reason": "",
    }  # fmt: skip
    board.take("move", move)
    text = drawn(board)
    assert "�[2J[red]x: i0 → i1, paused 2.2 ms" in text
