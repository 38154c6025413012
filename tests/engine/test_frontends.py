"""What an engine's host says of a request goes to the frontend that has it."""

from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.core.messages import (
    IN_BAND,
    OFFICE,
    DrainRequested,
    Migrate,
    MigrationEnded,
    TookOver,
)
from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId
from llumnix.wire import decode, encode
from support.hosted import Hosts
from support.no_model import BLOCK, add

PROMPT = list(range(20 * BLOCK))
CLIENT = 3


def order(hosts: Hosts, request: str) -> bytes:
    return encode(
        Migrate(
            migration=MigrationId(f"m{CLIENT}-{request}"),
            request=RequestId(request),
            destination=EngineIndex(1),
            address=hosts.engines[1].host.address,
            epoch=Epoch(1),
            client=CLIENT,
        )
    )


def listen(hosts: Hosts) -> list[tuple[int, Any]]:
    """What clients are told from now on, but for tokens: the index, and the message."""
    said: list[tuple[int, Any]] = []
    for engine in hosts.engines:
        put = engine.core.output_queue.put_nowait

        def noted(item: Any, put: Any = put) -> None:
            client, outputs = item
            for output in outputs.outputs:
                params = output.kv_transfer_params
                said.append((client, decode(params[IN_BAND]) if params else output))
            put(item)

        engine.core.output_queue.put_nowait = noted
    return said


@pytest.fixture
def said(hosts: Hosts) -> Any:
    yield listen(hosts)
    for engine in hosts.engines:
        del engine.core.output_queue.put_nowait


def test_a_move_is_told_to_the_frontend_of_its_request(
    hosts: Hosts, said: list[tuple[int, Any]]
) -> None:
    add(hosts.engines[0].core, "r", PROMPT, 60, client_index=CLIENT)
    hosts.until(lambda: hosts.tokens.get("r", [0])[0] > 2)
    hosts.engines[0].host.migrate(order(hosts, "r"))
    hosts.until(lambda: hosts.outcomes)
    there = hosts.engines[1].core.scheduler.requests["r"]
    assert there.client_index == CLIENT, "its tokens go there too"
    assert {type(m): c for c, m in said} == {TookOver: CLIENT, MigrationEnded: CLIENT}
    hosts.until_at_rest()


def test_an_order_that_fails_is_answered_to_the_frontend_that_gave_it(
    hosts: Hosts, said: list[tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(hosts.engines[0].host.llumlet, "migrate", fail)
    hosts.engines[0].host.migrate(order(hosts, "r"))
    assert [(c, type(m), m.taken) for c, m in said] == [(CLIENT, MigrationEnded, False)]


def test_a_request_that_cannot_be_put_back_ends_at_its_own_frontend(
    hosts: Hosts, said: list[tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = hosts.engines[0].host
    add(hosts.engines[0].core, "r", PROMPT, 60, client_index=CLIENT)
    hosts.until(lambda: hosts.tokens.get("r", [0])[0] > 2)

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(host.port, "resume", fail)
    host.port.stop("r")
    host._guarded.resume("r")
    assert [(c, m.request_id) for c, m in said] == [(CLIENT, "r")]
    hosts.until_at_rest()


def test_the_office_is_asked_for_a_drain(hosts: Hosts, said: list[tuple[int, Any]]) -> None:
    hosts.engines[0].host.leave("its process got a SIGTERM")
    assert [(c, type(m)) for c, m in said] == [(OFFICE, DrainRequested)]
