"""The engines that a frontend knows."""

import asyncio

import pytest

from llumnix.core.types import EngineIndex, InstanceId
from llumnix.frontend.engines.directory import (
    LOST_REMEMBERED_MAX,
    EngineDirectory,
    EngineTarget,
)

E0, E1, E2 = EngineIndex(0), EngineIndex(1), EngineIndex(2)


def directory(*engines: EngineIndex, ready: bool = True) -> EngineDirectory:
    """Engine n is of instance `in`, in the slot 10 - n."""
    found = EngineDirectory()
    for engine in engines:
        found.expect(InstanceId(f"i{engine}"), engine, 10 - engine)
        if ready:
            announce(found, engine)
    return found


def announce(found: EngineDirectory, engine: EngineIndex) -> None:
    known = found.get(engine)
    assert known is not None
    known.ready.set_result(None)


async def test_an_engine_takes_requests_once_it_is_ready_and_while_it_accepts() -> None:
    found = directory(E0, ready=False)
    assert (E0 in found, found.up(), found.takers(), found.serving) == (True, [], [], False)
    waiting = asyncio.ensure_future(found.ready(E0))
    await asyncio.sleep(0)
    assert not waiting.done()
    announce(found, E0)
    await asyncio.wait_for(waiting, 1)
    assert [e.engine_index for e in found.takers()] == [E0]
    assert found.serving
    found.accept(E0, accepting=False)
    assert ([e.engine_index for e in found.up()], found.takers(), found.serving) == (
        [E0], [], False,
    )  # fmt: skip
    assert found.target(E0) is None


async def test_who_gives_up_waiting_for_an_engine_leaves_the_others_waiting() -> None:
    found = directory(E0, ready=False)
    tired, patient = (asyncio.ensure_future(found.ready(E0)) for _ in range(2))
    await asyncio.sleep(0)
    tired.cancel()
    announce(found, E0)
    await asyncio.wait_for(patient, 1)
    with pytest.raises(asyncio.CancelledError):
        await tired


async def test_targets_are_in_order_of_their_slots_and_say_where_llumlets_listen() -> None:
    found = directory(E0, E1)
    found.locate(E1, "there")
    assert found.targets() == [
        EngineTarget(instance=InstanceId("i1"), engine_index=E1, address="there"),
        EngineTarget(instance=InstanceId("i0"), engine_index=E0, address=""),
    ]
    assert found.target(E1) == found.targets()[0]
    assert found.target(E2) is None


async def test_each_turn_begins_with_the_next_engine() -> None:
    found = directory(E0, E1, E2)
    turns = [[e.engine_index for e in found.in_turn()] for _ in range(3)]
    assert sorted(turns) == [[E0, E2, E1], [E1, E0, E2], [E2, E1, E0]]
    assert directory(E0, ready=False).in_turn() == []


async def test_of_a_lost_engine_its_name_is_known_and_nothing_goes_there() -> None:
    found = directory(E0, E1)
    found.locate(E0, "there")
    lost = found.lose(E0)
    assert lost is not None
    assert lost.instance == "i0"
    assert found.lose(E0) is None
    assert E0 not in found
    assert (found.get(E0), list(found.by_index)) == (None, [E1])
    assert (found.name(E0), found.slot(E0), found.address(E0)) == ("i0", 10, "there")
    found.locate(E0, "elsewhere")
    found.accept(E0, accepting=True)
    assert [t.engine_index for t in found.targets()] == [E1]


async def test_of_an_engine_that_was_never_known_there_is_a_name_all_the_same() -> None:
    found = directory()
    assert (found.name(E2), found.slot(E2), found.address(E2)) == ("engine 2", 0, "")
    assert (found.get(None), found.slot(None)) == (None, 0)


async def test_no_more_than_so_many_lost_engines_are_remembered() -> None:
    found = directory(*map(EngineIndex, range(LOST_REMEMBERED_MAX + 1)))
    for engine in range(LOST_REMEMBERED_MAX + 1):
        found.lose(EngineIndex(engine))
    assert found.name(E0) == "engine 0"
    assert found.name(E1) == "i1"
