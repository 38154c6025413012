"""systemd is told what sd_notify(3) says, and a service manager that is not there costs nothing."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llumnix.observe.service_manager import keep_alive, notify


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """Its socket, of either kind."""
    where = str(tmp_path / "notify")
    if request.param == "abstract":
        where = f"@llumnix-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(where.replace("@", "\0"))
        listening.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", where)
        yield listening


def waiting(manager: socket.socket) -> list[bytes]:
    """The messages that have come."""
    manager.setblocking(False)
    heard = []
    with contextlib.suppress(BlockingIOError):
        while True:
            heard.append(manager.recv(4096))
    return heard


def test_one_message_is_one_datagram_with_a_line_for_each_state(manager: socket.socket) -> None:
    notify("READY=1", "STATUS=serving 模型")
    assert manager.recv(4096).decode() == "READY=1\nSTATUS=serving 模型"


def test_without_a_manager_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify("READY=1")


async def test_a_loop_that_has_its_turns_says_so_twice_in_the_watchdogs_time(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    keep_alive(asyncio.get_running_loop())
    await asyncio.sleep(0.55)
    heard = waiting(manager)
    assert set(heard) == {b"WATCHDOG=1"}
    assert 3 <= len(heard) <= 6
    time.sleep(0.3)  # A loop without turns says nothing.
    assert waiting(manager) == []


async def test_without_a_watchdog_the_loop_has_nothing_to_do(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    keep_alive(asyncio.get_running_loop())
    await asyncio.sleep(0.05)
    assert waiting(manager) == []
