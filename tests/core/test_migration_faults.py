"""The two machines, the llumlet and the table of streams in a rough world, many seeds long."""

import os

import pytest

from support.fake_cluster import Cluster, World

SEEDS = int(os.environ.get("LLUMNIX_SEEDS", "500"))
FIRST = int(os.environ.get("LLUMNIX_FIRST_SEED", "0"))

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


@pytest.mark.parametrize("name", WORLDS)
def test_no_seed_loses_a_token_an_owner_or_a_block(name: str) -> None:
    for seed in range(FIRST, FIRST + SEEDS // len(WORLDS)):
        try:
            Cluster(seed, WORLDS[name]).run()
        except Exception as error:
            raise AssertionError(f"seed {seed} in the world {name!r}: {error}") from error


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
