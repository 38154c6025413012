"""The port of --metrics-port."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

import httpx
import pytest

from llumnix.core.supervision.readiness import FleetSeen
from llumnix.errors import UsageError
from llumnix.frontend.door.probes import Probes
from llumnix.frontend.http.access import Access, digests
from llumnix.frontend.http.metrics_port import MetricsPort

ELSEWHERE = "0.0.0.0"
KEY = {"Authorization": "Bearer secret"}


def access(*keys: str) -> Access:
    return Access(
        client_digests=digests(keys),
        admin_digests=(),
        clients_administer=False,
        hosts=frozenset(),
        origins=(),
    )


@contextlib.asynccontextmanager
async def serving(host: str, *keys: str, public: bool = False) -> AsyncIterator[httpx.AsyncClient]:
    async def text() -> bytes:
        return b"up 1\n"

    async def seen() -> FleetSeen:
        return FleetSeen(instances=[], stopping=False)

    port = MetricsPort(host, 0, access(*keys), public=public)
    before = signal.getsignal(signal.SIGTERM)
    port.serve(text, Probes(seen, 1))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port.port}") as http:
        yield http
        assert signal.getsignal(signal.SIGTERM) is before
    assert port._task is not None
    port._task.cancel()
    await asyncio.wait({port._task})
    port.close()


async def test_it_has_metrics_and_probes_and_nothing_else() -> None:
    async with serving("127.0.0.1", "secret") as http:
        answer = await http.get("/metrics")
        assert (answer.status_code, answer.text) == (200, "up 1\n")
        assert (await http.get("/live")).status_code == 200
        assert (await http.get("/ready")).status_code == 503
        assert (await http.post("/metrics")).status_code == 405
        for path in ("/v1/models", "/llumnix/v1/instances", "/"):
            assert (await http.get(path)).status_code == 404


async def test_beyond_loopback_metrics_want_a_key_and_probes_none() -> None:
    async with serving(ELSEWHERE, "secret") as http:
        answer = await http.get("/metrics")
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert (await http.get("/metrics", headers={"x-api-key": "wrong"})).status_code == 401
        assert (await http.get("/metrics", headers=KEY)).status_code == 200
        assert (await http.get("/live")).status_code == 200
    async with serving(ELSEWHERE, "secret", public=True) as http:
        assert (await http.get("/metrics", headers={"Host": "any.example"})).status_code == 200


async def test_a_name_of_somebody_elses_does_not_lead_here() -> None:
    async with serving("127.0.0.1") as http:
        answer = await http.get("/metrics", headers={"Host": "evil.example"})
        assert answer.status_code == 403


@pytest.mark.parametrize("idle_s", ["0", "120"])
async def test_a_connection_may_be_idle_as_long_as_at_the_models_port(
    idle_s: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", idle_s)
    async with serving("127.0.0.1") as http:
        reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
        writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        closed = True
        try:
            await asyncio.wait_for(reader.read(), 0.5)  # to its end
        except TimeoutError:
            closed = False
        writer.close()
    assert closed == (idle_s == "0")


def test_what_cannot_be_served_is_refused_at_once_whether_or_not_the_other_answers_yet() -> None:
    with pytest.raises(UsageError, match="--metrics-open"):
        MetricsPort(ELSEWHERE, 0, access(), public=False)
    taken = MetricsPort("127.0.0.1", 0, access(), public=False)
    with pytest.raises(UsageError, match=rf"127.0.0.1:{taken.port} .*another --metrics-port"):
        MetricsPort("127.0.0.1", taken.port, access(), public=False)
    taken.close()
