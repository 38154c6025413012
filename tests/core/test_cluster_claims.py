"""The whole policy on a toy cluster in virtual time: what must hold whatever arrives."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.core.settings import MigrationSettings, PrioritySettings, SchedulerSettings
from support.toy_cluster import Job, ToyCluster, poisson

TOTAL = 2048


def lengths(dice) -> tuple[int, int]:
    """Skewed, as real ones are; none needs more than half an instance."""
    return min(700, int(dice.paretovariate(1.1) * 30)), min(300, int(dice.expovariate(1 / 60)) + 1)


def cluster(instances: int, policy: str = "llumnix", **more: float) -> ToyCluster:
    priorities = PrioritySettings(aging_s=more.pop("aging_s", 30.0))
    return ToyCluster(
        SchedulerSettings(
            policy=policy, priorities=priorities, migration=MigrationSettings(**more)
        ),
        instances,
        TOTAL,
        slots=64,
    )


seeds = st.integers(0, 10_000)


@settings(max_examples=25)
@given(seed=seeds, instances=st.integers(2, 6), rate=st.floats(1, 5), high=st.floats(0, 0.3))
def test_every_request_ends_and_is_never_moved_twice_at_once(
    seed: int, instances: int, rate: float, high: float
) -> None:
    """ToyCluster asserts that the request that it is told to move is not on its way already."""
    c = cluster(instances)
    c.submit(poisson(rate * instances, 150, lengths, seed, high, cv=2.0))
    c.run(until_s=300)
    assert [j.id for j in c.jobs if j.ended_s is None] == []


@settings(max_examples=25)
@given(seed=seeds, at_s=st.floats(0, 20), policy=st.sampled_from(["llumnix", "round-robin"]))
def test_a_drain_always_ends_and_loses_nothing(seed: int, at_s: float, policy: str) -> None:
    c = cluster(3, policy)
    c.submit(poisson(6, 120, lengths, seed))
    c.drain(1, at_s)
    c.run(until_s=3000)
    assert all(j.ended_s is not None for j in c.jobs)
    assert not c.engines[1].running
    assert not c.engines[1].queue


def test_a_drain_with_room_elsewhere_takes_a_moment() -> None:
    c = cluster(3)
    jobs = [Job(id=f"r{n}", arrived_s=0.0, prompt=100, answer=600) for n in range(9)]  # type: ignore[arg-type]
    c.submit(jobs)
    c.drain(0, 2.0)
    c.run(until_s=3.0)
    assert len([j for j in jobs if j.where == 0]) == 0
    assert len([j for j in jobs if j.moves]) == 3


@settings(max_examples=4)
@given(seed=seeds)
def test_nobody_starves_behind_urgent_requests(seed: int) -> None:
    """Urgent requests alone fill both instances for as long as they come; a normal one still starts
    within its ageing time and what it takes to make room."""
    c = cluster(2, aging_s=5.0)
    urgent = poisson(14, 350, lengths, seed, high=1.0)
    normal = [Job(id=f"n{n}", arrived_s=5.0 + n / 2, prompt=200, answer=20) for n in range(10)]  # type: ignore[arg-type]
    c.submit([*urgent, *normal])
    c.run(until_s=3000)
    waited = [j.first_s - j.arrived_s for j in normal if j.first_s is not None]
    assert len(waited) == len(normal)
    assert max(waited) < 5.0 + 15.0
    last_urgent_s = max(j.arrived_s for j in urgent)
    assert last_urgent_s > 20


def test_no_request_bounces() -> None:
    c = cluster(4)
    c.submit(poisson(18, 400, lengths, seed=3, cv=2.0))
    c.run(until_s=3000)
    assert sum(j.moves for j in c.jobs) > 10
    assert max(j.moves for j in c.jobs) <= 8


def test_it_is_better_than_its_dispatch_alone() -> None:
    """Same arrivals, near the limit of the memory: fewer preemptions, less waiting."""
    found = {}
    for balance in (False, True):
        first_s: list[float] = []
        lost_s = fragmented = 0.0
        for seed in range(6):
            c = cluster(8, balance=balance)
            c.submit(poisson(40, 400, lengths, seed))
            c.run(until_s=3000)
            first_s += [j.first_s - j.arrived_s for j in c.jobs if j.first_s is not None]
            lost_s += sum(j.lost_s for j in c.jobs)
            fragmented += sum(c.fragmented)
        first_s.sort()
        found[balance] = (sum(first_s), first_s[int(len(first_s) * 0.99)], lost_s, fragmented)
    assert all(ours < theirs for ours, theirs in zip(found[True], found[False], strict=True)), found


def test_urgent_requests_are_served_faster_and_the_others_lose_little() -> None:
    ended: dict[str, dict[bool, list[float]]] = {}
    for policy in ("infaas++", "llumnix"):
        ended[policy] = {True: [], False: []}
        for seed in range(4):
            c = cluster(8, policy)
            c.submit(poisson(14, 500, lengths, seed, high=0.1, cv=4.0))
            c.run(until_s=3000)
            for job in c.jobs:
                assert job.ended_s is not None
                ended[policy][job.priority < 0].append(job.ended_s - job.arrived_s)
    mean = {p: {h: sum(v) / len(v) for h, v in by.items()} for p, by in ended.items()}
    assert mean["llumnix"][True] < 0.95 * mean["infaas++"][True], mean
    assert mean["llumnix"][False] < 1.1 * mean["infaas++"][False], mean


def test_a_crash_in_the_middle_of_moves_leaves_the_rest_in_order() -> None:
    for seed in range(20):
        c = cluster(4)
        c.submit(poisson(14, 200, lengths, seed))
        c.kill(seed % 4, 3.0 + seed / 7)
        c.run(until_s=3000)
        assert all(j.ended_s is not None for j in c.jobs if j.where != seed % 4)
