"""Documents are scored where their query was embedded."""

import asyncio

from vllm.pooling_params import LateInteractionParams, PoolingParams

from llumnix.core.types import EngineIndex, InstanceId
from llumnix.frontend.engines.engine import Engine
from llumnix.frontend.engines.late_queries import QUERIES_MAX, LateQueries


def about(query: str, mode: str = "score_doc") -> PoolingParams:
    late = LateInteractionParams(mode=mode, query_key=query)
    return PoolingParams(task="token_embed", late_interaction_params=late)


def engine(index: int) -> Engine:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    ready.set_result(None)
    return Engine(
        instance=InstanceId(f"i{index}"), engine_index=EngineIndex(index), slot=index, ready=ready
    )


async def test_engines_that_come_go_or_drain_do_not_part_a_query_from_its_documents() -> None:
    queries = LateQueries()
    engines = {e.engine_index: e for e in (engine(0), engine(1))}
    names = [f"query {n}" for n in range(50)]
    held = {name: queries.engine(about(name, "cache_query"), engines) for name in names}
    assert {e.slot for e in held.values() if e} == {0, 1}
    engines[EngineIndex(2)] = engine(2)
    engines[EngineIndex(0)].accepting = False
    assert {name: queries.engine(about(name), engines) for name in names} == held
    del engines[EngineIndex(1)]
    for name in names:
        after = queries.engine(about(name), engines)
        assert after is not None
        assert after.slot == (0 if held[name].slot == 0 else 2)  # type: ignore[union-attr]


async def test_other_requests_may_go_anywhere() -> None:
    queries = LateQueries()
    engines = {EngineIndex(0): engine(0)}
    assert queries.engine(None, engines) is None
    assert queries.engine(PoolingParams(task="embed"), engines) is None
    assert queries.engine(about("x"), {}) is None


async def test_no_more_than_so_many_queries_are_remembered_and_these_are_the_last() -> None:
    queries = LateQueries()
    engines = {EngineIndex(0): engine(0)}
    for number in range(QUERIES_MAX + 10):
        queries.engine(about(f"{number}"), engines)
    assert len(queries._engines) == QUERIES_MAX
    engines[EngineIndex(1)] = engine(1)
    last = [queries.engine(about(f"{QUERIES_MAX + n}"), engines) for n in range(10)]
    assert {each.slot for each in last if each} == {0}
