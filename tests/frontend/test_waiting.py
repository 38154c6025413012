"""Clients are shown that a stream lives while it waits for its first token."""

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.frontend.context import HttpRequest
from llumnix.frontend.streams import waiting
from llumnix.frontend.streams.waiting import show_waiting, to_show


def stream(http: HttpRequest | None, *, started_s: float = 100.0, outputs: int = 0) -> Any:
    return SimpleNamespace(outputs=outputs, info=SimpleNamespace(http=http, started_s=started_s))


def shown(streams: list[Any], *looks_s: float) -> list[float]:
    """The looks at which something is shown, one time for each."""
    pairs = itertools.pairwise(looks_s)
    return [now for before, now in pairs for _ in to_show(streams, before, now)]


def test_a_stream_without_a_token_is_shown_every_quarter_of_a_minute() -> None:
    one = stream(HttpRequest(client_id="a"))
    looks = [float(s) for s in range(98, 150, 5)]
    assert shown([one], *looks) == [118.0, 133.0, 148.0]
    # A look that comes late shows it once.
    assert shown([one], 101.0, 170.0, 172.0) == [170.0]


def test_one_that_has_tokens_or_no_client_is_not() -> None:
    there = [stream(HttpRequest(client_id="a"), outputs=1), stream(None)]
    assert shown(there, 101.0, 200.0) == []


def test_a_client_is_shown_once_however_many_sequences_it_asked_for() -> None:
    """Equal requests of two clients are two."""
    one, other = HttpRequest(client_id="a"), HttpRequest(client_id="a")
    assert shown([stream(one), stream(one), stream(other)], 101.0, 116.0) == [116.0] * 2


async def test_what_opens_meanwhile_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(waiting, "SHOW_EVERY_S", 0.05)
    streams: list[Any] = []
    calls: list[str] = []
    showing = asyncio.create_task(show_waiting(streams))
    await asyncio.sleep(0.03)
    http = HttpRequest(client_id="a", on_wait=lambda: calls.append("waits"))
    streams.append(stream(http, started_s=asyncio.get_running_loop().time()))
    for _ in range(200):
        await asyncio.sleep(0.01)
        if len(calls) > 1:
            break
    showing.cancel()
    assert len(calls) > 1
