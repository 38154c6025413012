"""The only frontend, as the fleet sees it: every call reaches the real client."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.cluster.frontends.own import OwnFrontend
from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.probation import Verdict
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from support.frontend import front

E0, E1, E2 = EngineIndex(0), EngineIndex(1), EngineIndex(2)


async def test_what_the_fleet_says_of_engines_is_so_for_the_client(tmp_path: Path) -> None:
    async with front(tmp_path) as one:
        llm: Any = SimpleNamespace(engine_core=one.client, leaving=True)
        it = OwnFrontend(llm)
        engines, state = one.client.engines, one.client.shared_state
        assert it.link is one.client.link
        assert it.drain_requests is one.client.drain_requests
        assert it.leaving
        it.expect(InstanceId("i2"), E2, 2)
        it.locate(E2, "ipc:///peer")
        await it.ready(E1)
        assert (engines.name(E2), engines.address(E2)) == ("i2", "ipc:///peer")
        for said in (False, True):
            it.accept(E1, said)
            assert engines.by_index[E1].accepting == said
        it.note_silent(E1, True)
        assert state.silent == {E1}
        assert not it.paused
        state.end(state.begin("pause_scheduler", ("keep",)), [None])
        assert it.paused
        (row,) = it.status()
        assert (row.id, row.state, row.pid, row.restarts) == ("f0", "serving", os.getpid(), 0)


async def test_what_the_client_knows_of_engines_is_what_the_fleet_hears(tmp_path: Path) -> None:
    async with front(tmp_path, survival=SurvivalSettings()) as one:
        llm: Any = SimpleNamespace(engine_core=one.client, leaving=False)
        it = OwnFrontend(llm)
        for name in ("a", "b"):
            await one.add_request(name, 1)
        assert (it.in_flight(E0), it.in_flight(E1)) == (0, 2)
        assert (it.may_hold(E0), it.may_hold(E1)) == (False, True)
        assert it.heard_s(E1) == one.client.engines.heard_s(E1) is not None
        assert it.heard_s(E2) is None
        assert await it.lose(E1, blamed=True, suspects=frozenset([RequestId("a")])) == 0
        verdict = one.client.orphans.probation.verdict
        assert verdict(RequestId("a")) is not Verdict.INNOCENT
        assert verdict(RequestId("b")) is Verdict.INNOCENT
        assert E1 not in one.client.engines
