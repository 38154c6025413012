"""The whole policy in the simulator, on small instances: what must hold whatever arrives."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.core.settings import MigrationSettings, PrioritySettings, SchedulerSettings
from llumnix.core.types import InstanceId, RequestId
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.checks import check_owners, check_view, come_to_rest
from llumnix.sim.model.clock import DEATHS, TICKS
from llumnix.sim.model.cluster import Cluster, Setup
from llumnix.sim.model.jobs import Job
from llumnix.sim.model.profile import Profile

SMALL = Profile(
    name="small",
    text="Of no device: steps of some 25 ms, and memory for a dozen requests.",
    step_s=0.02,
    request_s=0.0004,
    context_s=2e-6,
    prompt_s=2e-4,
    kv_tokens=2048,
    kv_token_bytes=100_000,
    start_s=5.0,
)


def lengths(dice: random.Random) -> tuple[int, int]:
    """Skewed, as real ones are; none needs more than half an instance."""
    return min(700, int(dice.paretovariate(1.1) * 30)), min(300, int(dice.expovariate(1 / 60)) + 1)


def poisson(
    rate: float, count: int, seed: int, high: float = 0.0, cv: float = 1.0, begin_s: float = 0.0
) -> list[Job]:
    """`count` requests at `rate` a second with Gamma gaps of that `cv`; a share `high` is
    urgent."""
    dice = random.Random(seed)
    now, jobs = begin_s, []
    for n in range(count):
        now += dice.gammavariate(1 / cv**2, cv**2 / rate)
        prompt, answer = lengths(dice)
        urgent = dice.random() < high
        jobs.append(job(f"{'u' if urgent else 'r'}{n}", now, prompt, answer, urgent=urgent))
    return jobs


def job(name: str, at_s: float, prompt: int, answer: int, *, urgent: bool = False) -> Job:
    return Job(
        id=RequestId(name),
        arrived_s=at_s,
        prompt=prompt,
        answer=answer,
        priority=-100 if urgent else 0,
        high=urgent,
    )


def cluster(instances: int, policy: str = "llumnix", **more: float) -> Cluster:
    priorities = PrioritySettings(aging_s=more.pop("aging_s", 30.0))
    scheduler = SchedulerSettings(
        policy=policy, priorities=priorities, migration=MigrationSettings(**more)
    )
    setup = Setup(
        scheduler=scheduler, profile=SMALL, instances=instances, engine=EngineOptions(slots=64)
    )
    return Cluster(setup)


def checked(c: Cluster) -> Cluster:
    """Looks at the scheduler's view after every fact, and at owners and memory now and then."""
    c._check = check_view

    def look() -> None:
        check_owners(c)
        if not c.clients.over():
            c.clock.at(c.now + 0.5, TICKS, look)

    c.clock.at(0.0, TICKS, look)
    return c


seeds = st.integers(0, 10_000)


@settings(max_examples=15)
@given(seed=seeds, instances=st.integers(2, 5), rate=st.floats(1, 5), high=st.floats(0, 0.3))
def test_every_request_ends_with_all_its_tokens_and_leaves_nothing_behind(
    seed: int, instances: int, rate: float, high: float
) -> None:
    c = checked(cluster(instances))
    c.run(poisson(rate * instances, 80, seed, high, cv=2.0))
    come_to_rest(c)
    jobs = c.clients.jobs.values()
    assert [j.got for j in jobs] == [j.answer for j in jobs]


@settings(max_examples=15)
@given(seed=seeds, share=st.floats(0, 1), policy=st.sampled_from(["llumnix", "round-robin"]))
def test_a_drain_always_ends_and_loses_nothing(seed: int, share: float, policy: str) -> None:
    c = checked(cluster(3, policy))
    jobs = poisson(6, 80, seed)
    c.clock.at(share * jobs[-1].arrived_s, TICKS, c.drain, InstanceId("i1"))
    c.run(jobs)
    c.go_on(c.now + 10, lambda: InstanceId("i1") not in c.instances)
    assert InstanceId("i1") not in c.instances
    come_to_rest(c)
    assert [j.got for j in jobs] == [j.answer for j in jobs]


def test_a_drain_with_room_elsewhere_takes_a_moment() -> None:
    c = cluster(3)
    jobs = [job(f"r{n}", 0.0, 100, 600) for n in range(9)]
    c.clock.at(2.0, TICKS, c.drain, InstanceId("i0"))
    c.run(jobs, until_s=3.0)
    assert InstanceId("i0") not in c.instances
    assert len([j for j in jobs if j.moves]) == 3
    assert not any(j.ended_s for j in jobs)
    assert sum(len(i.engine.requests) for i in c.instances.values()) == 9


@settings(max_examples=4)
@given(seed=seeds)
def test_nobody_starves_behind_urgent_requests(seed: int) -> None:
    """Urgent requests alone fill both instances for as long as they come; a normal one still starts
    within its ageing time and what it takes to make room."""
    c = cluster(2, aging_s=5.0)
    urgent = poisson(14, 350, seed, high=1.0)
    normal = [job(f"n{n}", 5.0 + n / 2, 200, 20) for n in range(10)]
    c.run(sorted([*urgent, *normal], key=lambda j: j.arrived_s))
    waited = [j.first_s - j.arrived_s for j in normal if j.first_s is not None]
    assert len(waited) == len(normal)
    assert max(waited) < 5.0 + 15.0
    assert max(j.arrived_s for j in urgent) > 20


def test_no_request_bounces() -> None:
    c = cluster(4)
    jobs = poisson(24, 300, seed=1, cv=2.0)
    c.run(jobs)
    assert sum(j.moves for j in jobs) > 30
    assert max(j.moves for j in jobs) <= 4


def test_it_is_better_than_its_dispatch_alone() -> None:
    """Same arrivals, near the limit of the memory: less waiting of the worst before their first
    token, and of all in all. Preemptions are few without moves too, since batches have room to
    grow, and the mean first token comes as soon, since short prompts go first."""
    found = {}
    for balance in (False, True):
        first_s: list[float] = []
        lost_s = 0.0
        for seed in range(4):
            jobs = poisson(56, 300, seed)
            cluster(8, balance=balance).run(jobs)
            first_s += [j.first_s - j.arrived_s for j in jobs if j.first_s is not None]
            lost_s += sum(j.lost_s for j in jobs)
        first_s.sort()
        found[balance] = (first_s[int(len(first_s) * 0.99)], sum(first_s) + lost_s)
    assert all(ours < theirs for ours, theirs in zip(found[True], found[False], strict=True)), found


def test_urgent_requests_are_served_faster_and_the_others_lose_little() -> None:
    ended: dict[str, dict[bool, list[float]]] = {}
    for policy in ("infaas++", "llumnix"):
        ended[policy] = {True: [], False: []}
        for seed in range(3):
            jobs = poisson(14, 300, seed, high=0.1, cv=4.0)
            cluster(8, policy).run(jobs)
            for one in jobs:
                assert one.ended_s is not None
                ended[policy][one.high].append(one.ended_s - one.arrived_s)
    mean = {p: {h: sum(v) / len(v) for h, v in by.items()} for p, by in ended.items()}
    assert mean["llumnix"][True] < 0.95 * mean["infaas++"][True], mean
    assert mean["llumnix"][False] < 1.1 * mean["infaas++"][False], mean


def test_a_crash_in_the_middle_of_moves_leaves_the_rest_in_order() -> None:
    moved = 0
    for seed in range(8):
        c = checked(cluster(4))
        jobs = poisson(20, 120, seed)
        c.clock.at(
            2.0 + seed / 7,
            DEATHS,
            lambda c=c, seed=seed: c.kill(c.instances[InstanceId(f"i{seed % 4}")]),
        )
        c.run(jobs)
        come_to_rest(c)
        moved += sum(j.moves for j in jobs)
        lost = [j for j in jobs if j.error]
        assert all(j.got == j.answer for j in jobs if not j.error)
        assert len(lost) < len(jobs) / 2, "only what was on the one that died"
    assert moved
