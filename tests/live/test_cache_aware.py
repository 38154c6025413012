"""Requests go where the beginning of their prompt is kept."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import Server, eventually

from .conftest import FLAGS

pytestmark = [pytest.mark.live, pytest.mark.slow]
CATS = "The cat sat on the mat and looked at the moon. " * 14  # One token a character.
DOGS = "A dog ran over the hill and barked at the wind. " * 14
TOLD_WITHIN_S = 0.5
"""The blocks are told with the step that made them, which the answer may outrun by a little."""
SNAPSHOT_EVERY_S = 60.0
"""engine/reporting/prefix_reader.py's."""


@pytest.fixture(scope="module")
def aware(tiny_model: Path, logs: Path) -> Iterator[Server]:
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *FLAGS, log=logs / "cache-aware.log",
    )  # fmt: skip
    yield server.wait_until_serving()
    assert server.stop() == 0


def where(server: Server, prompt: str, **more: object) -> str:
    return server.complete(prompt, max_tokens=2, **more).headers["x-llumnix-instance"]


def test_a_prefix_goes_where_it_went_first_and_another_one_elsewhere(aware: Server) -> None:
    home = where(aware, CATS + "Who is it?")
    time.sleep(TOLD_WITHIN_S)
    assert [where(aware, f"{CATS}{n} is the question") for n in range(6)] == [home] * 6
    other = where(aware, DOGS)
    assert other != home
    time.sleep(TOLD_WITHIN_S)
    mixed = [where(aware, prefix + f" {n}") for n in range(3) for prefix in (CATS, DOGS)]
    assert mixed == [home, other] * 3


def test_a_salt_makes_it_another_prefix(aware: Server) -> None:
    home = where(aware, CATS, cache_salt="mine")
    time.sleep(TOLD_WITHIN_S)
    assert [where(aware, f"{CATS} {n}", cache_salt="mine") for n in range(4)] == [home] * 4


def test_a_new_controller_learns_what_idle_instances_keep(aware: Server) -> None:
    home = where(aware, CATS + "x")
    (pid,) = aware.controllers()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: "The controller does not answer" in _poke(aware), 60)
    eventually(lambda: "The controller is back" in _poke(aware), 60)
    time.sleep(SNAPSHOT_EVERY_S + 1)  # Nobody asks for anything.
    assert [where(aware, f"{CATS}{n}") for n in range(4)] == [home] * 4


def _poke(server: Server) -> str:
    where(server, "hello")
    return server.log
