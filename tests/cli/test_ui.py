"""`llumnix ui LOG`: the feed of the past, and what it says of a file that is no log."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

from llumnix.cli import main
from llumnix.commands import page
from llumnix.frontend.ui.past import Past, PastStream, Place

BEGAN, ENDS = 1000.0, 1060.0


def past() -> Past:
    """A minute: one request, which moves after thirty seconds."""
    one = Past()
    one.begin_s, one.end_s = BEGAN, ENDS
    move = {
        "id": "m0", "request": "a", "request_id": "mine", "outcome": "migrated", "source": "i0",
        "destination": "i1", "stages": [], "downtime_ms": 2.0, "why": "freer", "reason": "",
    }  # fmt: skip
    stream: Any = PastStream(
        request="a", client_id="mine", priority=0, prompt=10, begun_s=BEGAN, out=60, end_s=ENDS + 1,
        places=[Place(BEGAN, "i0"), Place(BEGAN + 30, "i1")], why="i0: the freest", moves=[move],
        first_token_s=0.5, lives=1,
    )  # fmt: skip
    one.streams, one.by_name = [stream], {"a": stream}
    ups = [{"t": BEGAN, "kind": "up", "target": name, "why": ""} for name in ("i0", "i1")]
    moved = {"t": BEGAN + 30, "kind": "move", "target": "a", "why": "freer", "move": move}
    one.notes = [*ups, moved]
    one.changes = [(note["t"], note) for note in ups]
    return one


def events(payload: bytes) -> dict[str, Any]:
    blocks = [block.split("\n") for block in payload.decode().split("\n\n")[:-1]]
    return {name[7:]: json.loads(data[6:]) for name, data in blocks}


async def test_the_feed_begins_with_the_moment_that_is_asked_for() -> None:
    feed = page.play(past(), "events.jsonl", BEGAN + 45, 0)
    first = events(await anext(feed))
    assert list(first) == ["hello", "history", "state"]
    assert first["hello"]["log"] == {"begin": BEGAN, "end": ENDS, "at": BEGAN + 45, "speed": 0}
    assert first["hello"]["model"] == "events.jsonl"
    assert [row[1] for row in first["state"]["requests"]] == ["i1"]
    assert [e.get("to") for e in first["history"]["events"]] == [None, None, "i1"]
    assert first["state"]["rates"]["tok_s"] == 1
    with pytest.raises(TimeoutError):  # It stands still, and does not end.
        await asyncio.wait_for(anext(feed), 0.5)


async def test_it_goes_on_so_many_times_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "STEP_S", 0.02)
    feed = page.play(past(), "x", BEGAN + 25, 100)
    state = events(await anext(feed))["state"]
    assert [row[1] for row in state["requests"]] == ["i0"]
    t, moved = state["t"], None
    async with asyncio.timeout(5):
        while t < ENDS:
            told = events(await anext(feed))
            t = max(t, *(data["t"] for data in told.values()))
            moved = moved or told.get("move")
    assert moved is not None
    assert (moved["from"], moved["to"], t) == ("i0", "i1", ENDS)


async def test_it_serves_the_page_and_a_requests_life_and_no_other_host() -> None:
    transport = httpx.ASGITransport(app=page.application(past(), "x"))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:80") as http:
        assert (await http.get("/llumnix/ui")).status_code == 200
        assert (await http.get("/llumnix/ui/past.js")).status_code == 200
        life = (await http.get("/llumnix/v1/requests/a")).json()
        assert {n: life[n] for n in ("why", "first_token_s", "lives_used")} == {
            "why": "i0: the freest", "first_token_s": 0.5, "lives_used": 1
        }  # fmt: skip
        assert [m["id"] for m in life["migrations"]] == ["m0"]
        missing = await http.get("/llumnix/v1/requests/b")
        assert (missing.status_code, missing.json()["error"]["message"]) == (
            404, "the event log has no request b"
        )  # fmt: skip
        assert (await http.get("/llumnix/v1/events?speed=1000")).status_code == 422
        other = await http.get("/llumnix/ui", headers={"host": "evil.example"})
        assert other.status_code == 400


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hello\n", "is no event log"),
        ('{"at":1,"time":1,"who":"x","kind":"log","version":1}\n', "of version 1"),
        ('{"at":1,"time":1,"who":"x","kind":"log","version":2}\n', "neither instances nor"),
        (
            '{"at":1,"time":1,"who":"x","kind":"log","version":2}\n'
            '{"at":1,"time":1,"who":"x","kind":"migration"}\n',
            "has a line that cannot be shown (KeyError: 'body')",
        ),
    ],
)
def test_what_is_no_log_is_refused_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (tmp_path / "log").write_text(text)
    assert main(["ui", str(tmp_path / "log")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import socket

    monkeypatch.setattr(page, "read", lambda log: past())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["ui", str(tmp_path), "--port", str(port)]) == 2
    assert f"port {port} cannot be used" in capsys.readouterr().err
