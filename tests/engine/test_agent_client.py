"""Every pull is answered once, and soon: if cancelled, and if a thread could not be started."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.test_agent import Rig, kv_tensors, snapshot
from llumnix.engine.kv import agent, agent_client
from llumnix.engine.kv.agent import TransferOptions
from llumnix.engine.kv.bandwidth import RateLimiter
from llumnix.engine.kv.links import Cancel, Command, Done, Link, Pull, TransferError
from llumnix.engine.kv.transports import ReadGate

SLOW = TransferOptions(staging_bytes=1, bandwidth_bytes_per_s=1.0)
"""Not a second chunk within a test."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(folder=tmp_path)
    yield rig
    rig.close()


def test_a_cancelled_pull_ends_with_its_chunk_and_writes_no_more(rig: Rig) -> None:
    ours = kv_tensors(100)
    peer = rig.agent(kv_tensors(1))
    client = rig.client(rig.agent(ours, SLOW))
    client.pull(1, [peer], [0, 1, 2], [5, 6, 7])
    client.cancel(1)
    pulled = rig.answer()
    assert (pulled.ticket, pulled.error is None) == (1, False)
    before = snapshot(ours)
    client.pull(2, [peer], [], [])
    assert rig.answer().error is None
    assert torch.equal(snapshot(ours), before)


class StuckReader:
    """Of a peer that has stopped in the middle of an answer."""

    def __init__(self) -> None:
        self.begun, self.stopped, self.closed = (threading.Event() for _ in range(3))

    def pull(self, _source: Any, _destination: Any, throttle: Callable[[int], None]) -> int:
        throttle(1)
        self.begun.set()
        self.stopped.wait(30)
        raise TransferError("broken off")

    def ended(self) -> bool:
        return False

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize("end", ["forgotten", "closed"])
def test_a_pull_whose_peer_stands_still_is_broken_off_at_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The peer is known to be dead, or this worker ends. Else it would take the link's time-out."""
    reader, peer = StuckReader(), "unix:/of/the/peer"
    monkeypatch.setattr(agent, "open_peer", lambda *_: reader)
    client = rig.client(rig.agent(kv_tensors(100)))
    client.pull(1, [peer], [0], [5])
    assert reader.begun.wait(5)
    if end == "forgotten":
        client.forget([peer])
    else:
        rig.agents[0].close()
    assert reader.stopped.wait(2)
    assert rig.answer().error is not None
    assert reader.closed.wait(5)


def test_a_pull_that_a_request_stands_still_for_does_not_wait_behind_a_stage(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the peer's link is busy there is a second one, under the same limit of bandwidth."""
    stage, opened, limiters = StuckReader(), list[str](), set[RateLimiter]()
    open_peer = agent.open_peer

    def opens(peer: str, *more: Any) -> Any:
        opened.append(peer)
        return stage if len(opened) == 1 else open_peer(peer, *more)

    monkeypatch.setattr(agent, "open_peer", opens)
    monkeypatch.setattr(RateLimiter, "take", lambda limiter, *_: limiters.add(limiter))
    theirs, ours = kv_tensors(1), kv_tensors(100)
    peer = rig.agent(theirs)
    client = rig.client(rig.agent(ours))
    client.pull(1, [peer], [0], [5])
    assert stage.begun.wait(5)
    client.pull(2, [peer], [1], [6])  # Another stage.
    for ticket in (3, 4):
        client.pull(ticket, [peer], [ticket], [ticket + 5], final=True)
        pulled = rig.answer()
        assert (pulled.ticket, pulled.error) == (ticket, None)
        assert torch.equal(snapshot(ours)[ticket + 5], snapshot(theirs)[ticket])
    assert len(opened) == 2
    assert len(limiters) == 1
    client.forget([peer])
    assert {rig.answer().ticket for _ in range(2)} == {1, 2}
    client.pull(5, [peer], [1], [6], final=True)
    assert rig.answer().error is None
    assert len(opened) == 3, "one of the two was not forgotten"


def test_no_second_link_is_opened_while_the_first_is_idle(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, open_peer = list[str](), agent.open_peer

    def opens(peer: str, *more: Any) -> Any:
        opened.append(peer)
        return open_peer(peer, *more)

    monkeypatch.setattr(agent, "open_peer", opens)
    peer = rig.agent(kv_tensors(1))
    client = rig.client(rig.agent(kv_tensors(100)))
    client.open_links(-1, [peer])
    assert rig.answer().error is None
    for ticket in range(20):
        client.pull(ticket, [peer], [0], [5], final=bool(ticket % 2))
        assert rig.answer().error is None
    assert opened == [peer]


def test_a_second_link_ends_with_the_agent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = [StuckReader(), StuckReader()]
    left = iter(readers)
    monkeypatch.setattr(agent, "open_peer", lambda *_: next(left))
    client = rig.client(rig.agent(kv_tensors(100)))
    for ticket, reader in enumerate(readers):
        client.pull(ticket, ["unix:/of/the/peer"], [0], [5], final=bool(ticket))
        assert reader.begun.wait(5)
    client.cancel(1)
    rig.agents[0].close()
    assert {rig.answer().ticket for _ in range(2)} == {0, 1}
    assert all(reader.closed.wait(5) for reader in readers)


def test_a_cancelled_pull_does_not_wait_for_those_before_it(rig: Rig) -> None:
    peer = rig.agent(kv_tensors(1))
    client = rig.client(rig.agent(kv_tensors(100), SLOW))
    client.pull(1, [peer], [0, 1, 2], [5, 6, 7])
    client.pull(2, [peer], [3], [8])
    client.cancel(2)
    pulled = rig.answer()
    assert pulled.ticket == 2
    assert "cancelled before its turn" in str(pulled.error)
    client.cancel(1)
    assert rig.answer().ticket == 1


def test_cancelling_what_has_ended_or_is_anothers_changes_nothing(rig: Rig) -> None:
    peer, ours = rig.agent(kv_tensors(1)), rig.agent(kv_tensors(100))
    client, other = rig.client(ours), rig.client(ours)
    client.pull(1, [peer], [0], [5])
    assert rig.answer().error is None
    client.cancel(1)
    other.cancel(2)
    client.pull(2, [peer], [0], [5])
    assert rig.answer().error is None
    assert rig.pulled.empty()


class NoThread:
    """Threads of this name cannot be started, the first so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, times: int = 1) -> None:
        self.name, self.left = name, times
        self.start = threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", lambda thread: self(thread))

    def __call__(self, thread: threading.Thread) -> None:
        if thread.name.startswith(self.name) and self.left:
            self.left -= 1
            raise RuntimeError("can't start new thread")
        self.start(thread)


@pytest.mark.parametrize("name", ["llumnix-kv-pull", "llumnix-kv-hear"])
def test_a_thread_that_could_not_be_started_fails_one_pull(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    peer = rig.agent(kv_tensors(1))
    client = rig.client(rig.agent(kv_tensors(100)))
    NoThread(monkeypatch, name)
    client.pull(1, [peer], [1], [2])
    assert "can't start new thread" in str(rig.answer().error)
    client.pull(2, [peer], [1], [2])
    assert rig.answer().error is None


def test_an_agent_that_cannot_serve_a_connection_serves_the_next(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, ours = rig.agent(kv_tensors(1)), rig.agent(kv_tensors(100))
    client = rig.client(ours)
    client.pull(0, [peer], [], [])
    NoThread(monkeypatch, "llumnix-kv-serve")
    rig.answer()
    client.forget([peer])
    errors = []
    for ticket in range(1, 4):
        client.pull(ticket, [peer], [1], [2])
        errors.append(rig.answer().error)
    assert errors[-1] is None


def test_an_error_that_nobody_foresaw_leaves_no_pull_unanswered(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # It is told, loudly.
    client = rig.client(rig.agent(kv_tensors(100)))
    send = agent_client.AgentConnection._send

    def raising(line: agent_client.AgentConnection, order: Pull) -> None:
        if order.ticket == 1:
            raise KeyError("nobody")
        send(line, order)

    monkeypatch.setattr(agent_client.AgentConnection, "_send", raising)
    for ticket in (1, 2, 3):
        client.pull(ticket, ["unix:/nowhere"], [1], [2])
        assert "nobody" in str(rig.answer().error)


def test_a_pull_that_is_sent_as_its_link_dies_is_answered(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens on that link any more, who would answer for it."""
    connect = agent_client.AgentConnection._connect

    def dies(line: Any) -> Any:
        link = connect(line)
        link.stop()
        line._listener.join()
        return link

    monkeypatch.setattr(agent_client.AgentConnection, "_connect", dies)
    client = rig.client(rig.agent(kv_tensors(100)))
    client.pull(1, [rig.agent(kv_tensors(1))], [0], [5])
    pulled = rig.answer()
    assert pulled.ticket == 1
    assert "the agent closed the link" in str(pulled.error)


@pytest.mark.parametrize("lost", [Command, Pull, Cancel, Done])
def test_a_pull_is_answered_whatever_message_about_it_cannot_be_sent(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, lost: type
) -> None:
    """A part of it may be out. So the link is given up, and the next pull has a new one."""
    peer = rig.agent(kv_tensors(1))
    client = rig.client(rig.agent(kv_tensors(100), SLOW))
    send, left = Link.send, [lost]

    def sends(link: Link, message: Any) -> None:
        if type(message) in left:
            left.clear()
            raise TimeoutError("the other end does not read")
        send(link, message)

    monkeypatch.setattr(Link, "send", sends)
    blocks = [0, 1, 2] if lost is Cancel else [0]  # SLOW lets one pass.
    client.pull(1, [peer], blocks, blocks)
    if lost is Cancel:
        client.cancel(1)
    pulled = rig.answer()
    assert (pulled.ticket, pulled.error is None) == (1, False)
    assert not left
    client.pull(2, [peer], [], [])
    assert rig.answer().error is None
    client.open_links(3, [peer])
    assert rig.answer().error is None


def test_a_client_that_is_closed_leaves_no_thread_though_its_agent_goes_on(rig: Rig) -> None:
    before = set(threading.enumerate())  # Other tests' clients may have theirs.
    peer, ours = rig.agent(kv_tensors(1)), rig.agent(kv_tensors(100))
    client = rig.client(ours)
    client.open_links(1, [peer])
    assert rig.answer().error is None
    client.close()
    clients = ("llumnix-kv-tell", "llumnix-kv-hear")
    left = {t.name for t in set(threading.enumerate()) - before}
    assert [name for name in left if name.startswith(clients)] == []


def test_a_ticket_is_free_again_once_its_end_was_told_and_is_told_no_more(rig: Rig) -> None:
    peer = rig.agent(kv_tensors(1))
    client = rig.client(rig.agent(kv_tensors(100)))
    for _ in range(2):
        client.pull(1, [peer], [0], [5])
        assert rig.answer().error is None
    client.close()
    assert rig.pulled.empty()


def test_a_pull_whose_agent_does_not_answer_is_told_once_as_the_client_is_closed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_client, "CLOSE_TIMEOUT_S", 0.0)
    called, go_on = threading.Event(), threading.Event()

    def connects(*_: Any) -> Any:
        called.set()
        go_on.wait(10)
        raise ConnectionRefusedError

    monkeypatch.setattr(agent_client, "connect", connects)
    client = rig.client("unix:/nobody")
    client.pull(1, ["unix:/peer"], [0], [5])
    assert called.wait(10)
    client.close()
    told = rig.pulled.get_nowait()
    assert (told.ticket, told.error) == (1, "the client was closed")
    go_on.set()
    client._agents[0]._teller.join(10)
    assert rig.pulled.empty()


def test_no_peer_reads_memory_that_is_held_and_holding_waits_for_those_who_read() -> None:
    gate, reading, go_on = ReadGate(), threading.Event(), threading.Event()

    def read() -> None:
        with gate.passed():
            reading.set()
            go_on.wait(10)

    reader = threading.Thread(target=read)
    reader.start()
    assert reading.wait(10)
    holder = threading.Thread(target=lambda: gate.hold(held=True), daemon=True)
    holder.start()
    while gate._held is False:
        pass
    with pytest.raises(TransferError), gate.passed():
        pass
    assert holder.is_alive()
    go_on.set()
    holder.join(10)
    reader.join(10)
    assert not holder.is_alive()
    gate.hold(held=False)
    with gate.passed():
        pass


def test_a_peer_whose_memory_is_held_refuses_and_serves_later(rig: Rig) -> None:
    peer = rig.agent(kv_tensors(1))
    client = rig.client(rig.agent(kv_tensors(100)))
    rig.agents[0].hold(held=True)
    client.pull(1, [peer], [1], [2])
    assert "not there just now" in str(rig.answer().error)
    rig.agents[0].hold(held=False)
    client.pull(2, [peer], [1], [2])
    assert rig.answer().error is None
