"""An exception while a request moves ends that migration at most: the engines go on, the request is
served to its end or its client is told, nothing is left behind."""

import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.core.messages import OFFICE
from llumnix.core.types import EngineIndex, MigrationId
from llumnix.engine.migration.guard import LOG_EVERY_S, TRIES_MAX, ErrorLog
from llumnix.engine.migration.peers import Peers
from llumnix.engine.migration.vllm_port import VllmPort
from support.hosted import Hosts
from support.no_model import BLOCK, add

SOURCE, DESTINATION = 0, 1
TOKENS = 60
PROMPT = list(range(20 * BLOCK))
_fresh = itertools.count(1)


@pytest.fixture
def hosts(hosts: Hosts) -> Hosts:
    """They meet each other anew in every test."""
    for engine in hosts.engines:
        engine.host.port.destination._linked.clear()
        engine.host.port.destination._linking.clear()
    return hosts


class Boom(Exception):
    """Nobody expects it."""


class Raising:
    """Raises the first `times` times that it is called, after `spared` calls."""

    def __init__(self, real: Any, times: int, spared: int = 0) -> None:
        self.real, self.left, self.spared, self.struck = real, times, spared, 0

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.spared -= 1
        if self.spared < 0 < self.left:
            self.left -= 1
            self.struck += 1
            raise Boom("no")
        return self.real(*args, **more)


def moved(hosts: Hosts) -> None:
    """A request and its neighbour; the request is moved, and both run to their ends."""
    for name in ("r", "neighbour"):
        prompt = [next(_fresh), *PROMPT]  # Not in any cache.
        add(hosts.engines[SOURCE].core, name, prompt, TOKENS)
    hosts.until(lambda: hosts.tokens.get("r", [0])[0] > 2)
    hosts.migrate("r")
    hosts.until_at_rest()


def check(hosts: Hosts, *, told: bool = False) -> None:
    assert hosts.ended["neighbour"] == "finished"
    assert hosts.tokens["neighbour"][SOURCE] == TOKENS
    (outcome,) = hosts.outcomes
    if told and hosts.ended["r"] == "error":
        return
    assert hosts.ended["r"] == "finished"
    source, destination = hosts.tokens["r"]
    assert source + destination == TOKENS, "a token is lost or repeated"
    assert bool(destination) == outcome.taken == ("r" in hosts.took_over)
    if outcome.taken:
        assert hosts.took_over["r"] == source


def test_undisturbed_it_moves(hosts: Hosts) -> None:
    moved(hosts)
    check(hosts)
    assert hosts.outcomes[0].taken


CALLS = [
    (SOURCE, name)
    for name in ("describe", "agents", "progress", "outputs", "pin", "unpin", "stop",
                 "handover_state", "release", "begin_pulls", "rpc")
] + [
    (DESTINATION, name)
    for name in ("reserve", "ready", "reach", "pull", "commit", "progress", "linked",
                 "begin_pulls", "rpc", "queue")
]  # fmt: skip


@pytest.mark.parametrize(("times", "spared"), [(1, 0), (2, 1), (2, 5)])
@pytest.mark.parametrize(("side", "name"), CALLS)
def test_whatever_call_of_the_port_fails(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, side: int, name: str, times: int, spared: int
) -> None:
    port = hosts.engines[side].host.port
    assert times < TRIES_MAX, "cleaning up is given up then"
    called = next(part for part in (port, port.destination, port.core) if hasattr(part, name))
    raising = Raising(getattr(called, name), times, spared)
    monkeypatch.setattr(called, name, raising)
    moved(hosts)
    if not raising.struck:
        assert spared or name == "rpc", f"{name} was never called: {hosts.outcomes}"
        pytest.skip("it is not called as often")
    check(hosts)


@pytest.mark.parametrize("name", ["step_s", "prompts_in_flight"])
def test_whatever_property_of_the_port_fails(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    raising = Raising(getattr(VllmPort, name).fget, 2)
    monkeypatch.setattr(VllmPort, name, property(lambda self: raising(self)))
    moved(hosts)
    assert raising.struck, hosts.outcomes
    check(hosts)


@pytest.mark.parametrize("name", ["resume", "drop"])
@pytest.mark.parametrize("refused_by", ["commit", "reach"])
def test_what_follows_a_refusal_may_fail_too(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, name: str, refused_by: str
) -> None:
    side = SOURCE if name == "resume" else DESTINATION
    port, far = hosts.engines[side].host.port, hosts.engines[DESTINATION].host.port
    raising = Raising(getattr(port, name), 1)
    monkeypatch.setattr(port, name, raising)
    monkeypatch.setattr(far, refused_by, Raising(getattr(far, refused_by), 1))
    moved(hosts)
    if name == "resume" and refused_by == "reach":
        pytest.skip("it was not stopped yet")
    assert raising.struck, hosts.outcomes
    check(hosts, told=name == "resume")
    assert hosts.ended["r"] == ("error" if name == "resume" else "finished")


@pytest.mark.parametrize("spared", range(4))
@pytest.mark.parametrize("side", [SOURCE, DESTINATION])
def test_whatever_message_cannot_be_sent(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, side: int, spared: int
) -> None:
    peers = hosts.engines[side].host._peers
    raising = Raising(peers.send, 1, spared)
    monkeypatch.setattr(peers, "send", raising)
    moved(hosts)
    if raising.struck:
        assert len(hosts.outcomes) == 1
    check(hosts)


@pytest.mark.parametrize(
    "call", ["receive", "poll", "pulled", "defer_prefills", "hold_s", "moving"]
)
@pytest.mark.parametrize("side", [SOURCE, DESTINATION])
def test_whatever_turn_of_the_llumlet_fails(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, side: int, call: str
) -> None:
    llumlet = hosts.engines[side].host.llumlet
    raising = Raising(getattr(llumlet, call), 1 if call == "pulled" else 2)
    monkeypatch.setattr(llumlet, call, raising)
    moved(hosts)
    assert raising.struck or call == "pulled"
    check(hosts)


def test_an_order_without_an_address_is_declined_and_opens_nothing(hosts: Hosts) -> None:
    source = hosts.engines[SOURCE]
    add(source.core, "r", PROMPT, TOKENS)
    hosts.until(lambda: hosts.tokens.get("r", [0])[0] > 2)
    address, source_peers = hosts.engines[DESTINATION].host._peers.address, source.host._peers
    hosts.engines[DESTINATION].host._peers.address = ""
    hosts.migrate("r")
    hosts.engines[DESTINATION].host._peers.address = address
    assert not source.host.llumlet.busy
    assert "" not in source_peers._outgoing
    hosts.until_at_rest()
    (outcome,) = hosts.outcomes
    assert (outcome.taken, outcome.why) == (False, "its destination is still starting")
    assert hosts.tokens["r"] == [TOKENS, 0]


def test_the_death_of_a_peer_reaches_every_migration_though_one_of_them_fails(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hosts.engines[SOURCE]
    for name in "ab":
        add(source.core, name, [ord(name)] * BLOCK, TOKENS)
    hosts.until(lambda: set(hosts.tokens) == {"a", "b"})
    for name in "ab":
        hosts.migrate(name)
    outgoing = source.host.llumlet._outgoing
    monkeypatch.setattr(outgoing, "_walk", Raising(outgoing._walk, 1))
    source.host.engine_lost(EngineIndex(1), "ipc:///nowhere", [], OFFICE)
    assert not source.host.llumlet.busy
    monkeypatch.undo()
    hosts.until_at_rest()
    assert hosts.tokens == {"a": [TOKENS, 0], "b": [TOKENS, 0]}


def test_the_line_to_a_peer_that_died_is_closed(hosts: Hosts) -> None:
    moved(hosts)
    source, address = hosts.engines[SOURCE].host, hosts.engines[DESTINATION].host.address
    line = source._peers._outgoing[address]
    source.engine_lost(EngineIndex(DESTINATION), address, [], OFFICE)
    assert line.closed
    assert address not in source._peers._outgoing


def test_more_peers_than_zmq_has_sockets_by_itself(tmp_path: Path) -> None:
    from llumnix.core.messages import CancelMigration

    peers = Peers(f"ipc://{tmp_path}/peer", lambda m: None, lambda: None)
    peers.bind()
    try:
        for n in range(1100):
            peers.send(f"inproc://{n}", CancelMigration(migration=MigrationId("m"), why=""))
        assert len(peers._outgoing) == 1100
    finally:
        peers.start()
        peers.close()


@pytest.mark.parametrize("address", ["", "nonsense", "ipc://" + "x" * 300])
def test_what_is_said_to_no_address_is_lost(tmp_path: Path, address: str) -> None:
    from llumnix.core.messages import CancelMigration

    peers = Peers(f"ipc://{tmp_path}/peer", lambda m: None, lambda: None)
    peers.bind()
    peers.send(address, CancelMigration(migration=MigrationId("m"), why=""))
    assert not peers._outgoing
    peers.start()
    peers.close()


def test_the_same_exception_is_logged_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = ErrorLog(lambda: now[0])
    for _ in range(1000):
        assert log.note("pull", Boom("no")) == "Boom: no"
    now[0] += LOG_EVERY_S
    log.note("pull", Boom("no"))
    first, second = [r.getMessage() for r in caplog.records if r.name == "llumnix.engine"]
    assert "999 times before" in second
    assert "times" not in first
