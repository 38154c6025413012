"""The two machines, the llumlet, the table of streams and what has them outlive their engines, in a
rough world, many seeds long."""

import os
from collections import Counter
from dataclasses import replace

import pytest

from support.fake_cluster import Cluster, World

SEEDS = int(os.environ.get("LLUMNIX_TEST_SEEDS", "500"))
FIRST = int(os.environ.get("LLUMNIX_TEST_FIRST_SEED", "0"))

WORLDS = {
    "calm": World(loss=0, repeat=0, abort=0, preempt=0, failed_pull=0),
    "ordered": World(migrate=0, order=0.4),
    "lossy": World(loss=0.15, repeat=0.15),
    "crashes": World(crash=0.004),
    "short of memory": World(
        loss=0.1,
        abort=0.05,
        preempt=0.04,
        migrate=0.4,
        order=0,
        arrival=0.15,
        pull_end=0.08,
        blocks=(20,),
        turn=0.4,
        staged=0.5,
    ),
    "everything": World(
        loss=0.1, repeat=0.1, crash=0.004, abort=0.01, preempt=0.02, failed_pull=0.05
    ),
}
DEADLY = World(
    crash=0.02,
    killed=0.01,
    away_s=0.5,
    ghost=0.3,
    mute=0.3,
    unready=0.4,
    decline=0.04,
    detailed=0.4,
    abort=0.01,
    preempt=0.02,
    migrate=0.6,
    pull_end=0.1,
    turn=0.5,
    heard=0.25,
    cancelled=0.2,
    arrival=0.01,
    fault_ticks=100,
    requests=4,
)
"""Engines die all the time, wherever a message is dealt with, and everything outlives them."""
DEADLY_WORLDS = {
    "deadly": DEADLY,
    "deadly and lossy": replace(DEADLY, loss=0.1, repeat=0.1, failed_pull=0.1),
    "deadly, one engine": replace(DEADLY, engines=1, killed=0.02),
    "deadly, one at a time": replace(DEADLY, at_once=1, requests=8, decline=0.0),
    "deadly, late orders": replace(DEADLY, late=0.7),
    "deadly, two lives": replace(DEADLY, lives=2),
    "deadly, no life": replace(DEADLY, lives=0),
}

TWO_FRONTENDS = replace(DEADLY, frontends=2, frontend_crash=0.01, frontend_killed=0.005)
"""Frontends die too, wherever a message is dealt with. Engines die more seldom."""
FRONTEND_WORLDS = {
    "two frontends, none dies": replace(DEADLY, frontends=2),
    "two frontends that die": replace(
        TWO_FRONTENDS, crash=0.002, killed=0.0, decline=0.0, order=0.3, requests=8
    ),
    "two frontends that die, and lossy": replace(
        TWO_FRONTENDS, crash=0.002, killed=0.0, loss=0.1, repeat=0.1, failed_pull=0.1
    ),
    "three frontends, and engines that die": replace(TWO_FRONTENDS, frontends=3),
    "two frontends, late orders": replace(TWO_FRONTENDS, late=0.7),
    "two frontends, short of memory": replace(
        TWO_FRONTENDS, blocks=(20,), killed=0.0, crash=0.005, arrival=0.1, migrate=0.5
    ),
}


def live_through(name: str, world: World, seeds: range) -> list[Cluster]:
    lived = []
    for seed in seeds:
        cluster = Cluster(seed, world)
        try:
            cluster.run()
        except Exception as error:
            raise AssertionError(f"seed {seed} in the world {name!r}: {error}") from error
        lived.append(cluster)
    return lived


@pytest.mark.parametrize("name", WORLDS)
def test_no_seed_loses_a_token_an_owner_or_a_block(name: str) -> None:
    live_through(name, WORLDS[name], range(FIRST, FIRST + SEEDS // len(WORLDS)))


@pytest.mark.parametrize("name", DEADLY_WORLDS)
def test_every_stream_outlives_all_engines_of_a_seed(name: str) -> None:
    """None ends before its last token, but after as many engines as it has lives."""
    world = DEADLY_WORLDS[name]
    seeds = range(FIRST, FIRST + 4 * SEEDS // len(DEADLY_WORLDS))
    lived = live_through(name, world, seeds)
    ends = Counter(client.state for cluster in lived for client in cluster.clients.values())
    assert (ends["lost"] > 0) == (world.lives < 3), ends
    assert ends["finished"] > 0.5 * (ends.total() - ends["lost"])


@pytest.mark.parametrize("name", FRONTEND_WORLDS)
def test_a_frontend_that_dies_takes_its_own_streams_along_and_leaves_nothing(name: str) -> None:
    """In the middle of moves, on either side of them."""
    world = FRONTEND_WORLDS[name]
    seeds = range(FIRST, FIRST + 3 * SEEDS // len(FRONTEND_WORLDS))
    lived = live_through(name, world, seeds)
    ends = Counter(client.state for cluster in lived for client in cluster.clients.values())
    dies = world.frontend_crash > 0
    assert (ends["died with its frontend"] > 10) == dies, ends
    assert not ends["lost"]
    assert ends["finished"] > 0.3 * ends.total()


def test_frontends_die_in_the_middle_of_everything() -> None:
    struck: Counter[str] = Counter()
    taken = 0
    for cluster in live_through("two frontends", TWO_FRONTENDS, range(150)):
        struck += cluster.struck
        taken += sum(ended.taken for ended in cluster.ended)
    met = {where for where in struck if where.startswith("a frontend")}
    assert len([where for where in met if where.endswith("at the engine")]) > 10, met
    assert len([where for where in met if where.endswith("at the frontend")]) > 2, met
    assert taken > 20


def test_the_schedulers_orders_move_requests() -> None:
    ended, wanted = [], 0
    for seed in range(40):
        cluster = Cluster(seed, WORLDS["ordered"])
        cluster.run()
        ended += cluster.ended
        wanted += cluster.wanted
    assert wanted > 200
    # Many are short, and over before their turn comes.
    lived = [e for e in ended if "ended" not in e.why]
    assert len(lived) > wanted / 2
    assert len([e for e in lived if e.taken]) > len(lived) / 2, {e.why for e in lived}


def test_in_a_calm_world_most_migrations_end_well() -> None:
    ended = []
    for seed in range(40):
        cluster = Cluster(seed, WORLDS["calm"])
        cluster.run()
        ended += cluster.ended
    taken = [e for e in ended if e.taken]
    assert len(taken) > 200
    assert len(taken) > len(ended) / 2, {e.why for e in ended}
    assert any(len(e.stages) > 2 for e in taken)


def test_in_a_deadly_world_everything_happens_to_streams_that_outlive_it() -> None:
    revived: Counter[int] = Counter()
    struck: Counter[str] = Counter()
    declined = taken = 0
    for cluster in live_through("deadly", DEADLY, range(150)):
        revived.update(cluster.survival.revived.values())
        struck += cluster.struck
        declined += cluster.survival.declined["drawn"]
        taken += sum(ended.taken for ended in cluster.ended)
    assert all(revived[times] > 5 for times in (1, 2, 3, 4)), revived
    assert min(declined, taken) > 20
    assert len([where for where in struck if where.endswith("at the engine")]) > 10, struck
    assert len([where for where in struck if where.endswith("at the frontend")]) > 2, struck
