"""What the frontend counts of deaths, revivals, quarantine and moves."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
from vllm.exceptions import GracefulHTTPError

from llumnix.core.codes import AbortCode
from llumnix.core.events import Dispatch, RequestArrived
from llumnix.core.messages import MigrationEnded
from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.effects import GrantEnded
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.frontend import client
from llumnix.frontend.context import HttpRequest, current_http_request
from support.counted import counted
from support.frontend import OFF, front, request, tokens

from .test_migration_records import KEPT, M0, MOVED, TAKEN, R, World
from .test_quarantine import died_twice, with_requests
from .test_reviving import order_in, sent_to, took

I0 = EngineIndex(0)
ON = SurvivalSettings()


def placed(reason: str) -> float:
    labels = {"policy": "", "reason": reason}
    return REGISTRY.get_sample_value("llumnix_dispatches_total", labels) or 0.0


async def test_each_stream_that_outlives_its_engine_is_counted_with_its_gap(tmp_path: Path) -> None:
    async with front(tmp_path, survival=ON) as one:
        with counted() as found:
            await one.add_request("with tokens", 0)
            await one.add_request("without", 0)
            one.take_in(tokens(0, "with tokens", 5))
            one.link.where = 1
            before = placed("revived")
            await one.client.lose(I0)
            again = [order_in(a) for a in await sent_to(one, 1)]
            assert len(again) == 2
            for order in again:
                one.take_in(took(1, order))
                one.take_in(tokens(1, order.request, 8))
            one.take_in(tokens(1, "without", 9))
            assert placed("revived") - before == 2
        assert found == {
            "streams_survived_total revived": 1,
            "streams_survived_total resent": 1,
            "stream_gap_seconds_count revived": 1,
            "stream_gap_seconds_count resent": 1,
        }


async def test_streams_that_wait_for_an_engine_are_shown_until_none_does(tmp_path: Path) -> None:
    async with front(tmp_path, engines=1, survival=ON) as one:
        await one.add_request("a", 0)
        with counted() as found:
            await one.client.lose(I0)
            await asyncio.sleep(0.05)
        assert found == {"streams orphaned": 1}
        with counted() as found:
            await one.client.abort_requests_async(["a"])
            await asyncio.sleep(0.05)
        assert found == {"streams orphaned": -1}


async def test_a_stream_that_ends_with_its_engine_is_lost(tmp_path: Path) -> None:
    async with front(tmp_path, survival=OFF) as one:
        await one.add_request("a", 0)
        with counted() as found:
            await one.client.lose(I0)
        assert found == {"streams_ended_total lost": 1}


async def test_quarantine_and_its_refusals_are_counted(tmp_path: Path) -> None:
    async with front(tmp_path, engines=3, survival=ON) as one:
        await with_requests(one, "poison")
        with counted() as found:
            await died_twice(one, "poison")
            for name in ("again", "and again"):
                with pytest.raises(GracefulHTTPError):
                    await one.add_request(name, 2, prompt_token_ids=[0, 5, 6])
        assert found == {
            "streams_survived_total revived": 1,
            "stream_gap_seconds_count revived": 1,
            "streams_ended_total quarantined": 1,
            "requests_quarantined_total": 1,
            "quarantine_refusals_total": 2,
        }


def test_a_move_that_succeeds_is_counted_with_its_figures() -> None:
    world = World()
    with counted() as found:
        MOVED(world)
        assert found == {}
        TAKEN(world)
    assert found == {
        "migrations_total user migrated": 1,
        "migration_seconds_count staged": 1,
        "migration_stages_count staged": 1,
        "migration_downtime_seconds_count staged": 1,
        "migration_bytes_total staged": 400,
    }


def test_a_move_whose_source_measured_no_downtime_is_counted_without_one() -> None:
    world = World()
    with counted() as found:
        MOVED(world)
        world.records.source_ended(MigrationEnded(migration=M0, request=R, taken=True, why=""))
    assert found == {
        "migrations_total user migrated": 1,
        "migration_seconds_count staged": 1,
        "migration_stages_count staged": 1,
    }


def test_a_move_that_fails_is_counted_with_its_bytes() -> None:
    world = World()
    with counted() as found:
        KEPT(world)
        ended = GrantEnded(
            migration=M0, outcome="aborted", why="no room", code=AbortCode.NO_ROOM
        )  # fmt: skip
        world.records.grant_ended(ended)
    assert found == {
        "migrations_total user aborted": 1,
        "migration_aborts_total no_room": 1,
        "migration_bytes_total staged": 400,
    }


def test_a_stream_whose_source_dies_in_its_handover_has_survived() -> None:
    world = World()
    with counted() as found:
        world.grant_ended("migrated", "the source died after the handover")
        world.records.source_lost(I0)
    assert found == {
        "streams_survived_total handover": 1,
        "migrations_total user migrated": 1,
        "migration_seconds_count staged": 1,
    }


async def test_nothing_is_counted_for_a_token(tmp_path: Path) -> None:
    async with front(tmp_path, survival=ON) as one:
        await one.add_request("a", 0)
        with counted(each_request=True) as found:
            for token in range(100):
                one.take_in(tokens(0, "a", token))
        assert {name for name in found if not name.startswith("loop_lag")} == set()


async def test_what_a_request_adds(tmp_path: Path) -> None:
    async with front(tmp_path, survival=ON) as one:
        with counted(each_request=True) as found:
            await one.add_request("a", 0)
            await one.client.abort_requests_async(["a"])
        parts = ("gate", "hash", "dispatch", "send", "total")
        left_over = ("loop_lag", "streams open")  # by time, and by other tests' streams
        assert {n: v for n, v in found.items() if not n.startswith(left_over)} == {
            "dispatches_total  soonest": 1,
            "dispatch_seconds_count controller": 1,
            "streams_ended_total abort": 1,
            **{f"routing_seconds_count {part}": 1 for part in parts},
        }


async def test_without_a_controller_a_dispatch_is_a_bypass_and_without_an_engine_none(
    tmp_path: Path,
) -> None:
    async with front(tmp_path, engines=1, survival=ON) as one:
        one.link.where = 7
        with counted(each_request=True) as found:
            await one.client.add_request_async(request("a"))
            one.client.engines.accept(I0, False)
            with pytest.raises(GracefulHTTPError):
                await one.client.add_request_async(request("b"))
        assert found["dispatches_total  bypass"] == 1
        assert found["dispatch_seconds_count self"] == 1
        assert found["dispatches_total  none"] == 1


async def test_vllms_route_shows_them() -> None:
    app = FastAPI()
    attach_router(app)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        said = (await client.get("/metrics")).text
    assert '\nllumnix_streams_survived_total{how="revived"} ' in said
    assert '\nllumnix_migration_downtime_seconds_bucket{copy="staged",le="0.004"} ' in said


def seconds(metric: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"llumnix_{metric}_seconds_sum", labels) or 0.0


async def test_where_the_time_before_an_engine_has_a_request_goes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate of 0.25 s, a prompt that takes 0.5 s to name, a controller that takes 1 s, and 2 s to
    send."""
    now = [100.0]
    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=lambda: now[0]))
    parts = ("gate", "hash", "dispatch", "send", "total")

    def all_parts() -> list[float]:
        routing = [seconds("routing", part=part) for part in parts]
        return [*routing, seconds("dispatch", via="controller"), seconds("dispatch", via="self")]

    async with front(tmp_path) as one:

        def name_blocks(request: object) -> tuple[int, ...]:
            now[0] += 0.5
            return ()

        async def place(fact: RequestArrived) -> Dispatch:
            now[0] += 1.0
            return Dispatch(
                request=fact.request, instance=InstanceId("i0"), engine_index=I0, why=""
            )

        async def send(*_: object) -> None:
            now[0] += 2.0

        monkeypatch.setattr(client, "prompt_blocks", name_blocks)
        monkeypatch.setattr(one.link, "place", place)
        monkeypatch.setattr(one.client, "send_to", send)
        http = HttpRequest(client_id=None)
        http.gate_s = 0.25
        for instance_is_there, dispatch in ((True, [1.0, 0.0]), (False, [0.0, 1.0])):
            one.client.engines.accept(I0, instance_is_there)
            before = all_parts()
            token = current_http_request.set(http)
            await one.client.add_request_async(request(f"there {instance_is_there}"))
            current_http_request.reset(token)
            spent = [after - b for after, b in zip(all_parts(), before, strict=True)]
            assert spent == pytest.approx([0.25, 0.5, 1.0, 2.0, 3.75, *dispatch])


async def test_lines_that_the_event_log_lost_are_counted_once(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        log = SimpleNamespace(dropped=3)
        one.client._log = log  # type: ignore[assignment]
        with counted() as found:
            one.client._look_at_log()
            one.client._look_at_log()
        assert found == {"event_log_dropped_total frontend": 3}
        log.dropped = 5
        with counted() as found:
            one.client._look_at_log()
        assert found == {"event_log_dropped_total frontend": 2}
