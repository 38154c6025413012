"""A simulated deployment: the production core over modelled engines."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llumnix.core.events import RequestArrived
from llumnix.core.settings import ScalingSettings, SchedulerSettings, SurvivalSettings
from llumnix.core.types import InstanceId, RequestId
from llumnix.errors import UsageError
from llumnix.sim.capacity import parse_bound, smallest_fleet
from llumnix.sim.command import _parser, simulate
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.checks import (
    BrokenPromiseError,
    check_owners,
    check_rest,
    check_view,
    come_to_rest,
)
from llumnix.sim.model.clock import DEATHS
from llumnix.sim.model.cluster import Cluster, Setup
from llumnix.sim.model.faults import FaultInjector, Faults
from llumnix.sim.model.instance import SimInstance
from llumnix.sim.model.jobs import Job
from llumnix.sim.model.profile import Profile, load_profile, profile_names, save_profile
from llumnix.sim.simulate import Spec, idle_bound, run_one, runs

SMALL = replace(load_profile("a10-llama-7b"), kv_tokens=4096, start_s=5.0)
SPEC = Spec(
    scheduler=SchedulerSettings(),
    profile=SMALL,
    engine=EngineOptions(),
    instances=4,
    start_s=None,
    trace="M-M",
    rate_per_s=7.0,
    requests=150,
    seed=0,
    cv=2.0,
    scale=0.5,
)


def policy(name: str) -> SchedulerSettings:
    return SchedulerSettings(policy=name)


def test_a_run_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first, again, other = run_one(SPEC), run_one(SPEC), run_one(replace(SPEC, seed=1))
    assert first == again
    assert first["metrics"]["ttft_s"] != other["metrics"]["ttft_s"]
    assert first["metrics"]["requests_done"] == 150


def test_it_is_the_same_on_several_processes() -> None:
    specs = [SPEC, replace(SPEC, scheduler=policy("round-robin"))]
    assert dict(runs(specs, 2)) == dict(enumerate(map(run_one, specs)))


def test_no_request_is_faster_than_alone() -> None:
    for options in (EngineOptions(), EngineOptions(chunked=False), EngineOptions(budget=64)):
        # A request in 100 s: they are alone, but for a message to the engine and one back.
        spec = replace(SPEC, engine=options, instances=1, rate_per_s=0.01, requests=8, cv=0.1)
        bound, found = idle_bound(spec), run_one(spec)["metrics"]
        busy = run_one(replace(SPEC, engine=options))["metrics"]
        for figure in ("ttft_s", "e2e_s"):
            for part in ("mean", "p99"):
                there_and_back = found[figure][part] - bound[figure][part]
                assert there_and_back == pytest.approx(2 * SMALL.hop_s)
        assert idle_bound(replace(SPEC, engine=options))["ttft_s"]["p99"] < busy["ttft_s"]["p99"]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(
    "name",
    ["llumnix", "llumnix-base", "scls", "infaas++", "cache-aware", "least-loaded", "round-robin"],
)
def test_every_policy_serves_everything_and_leaves_nothing_behind(name: str, chunked: bool) -> None:
    spec = replace(SPEC, scheduler=policy(name), engine=EngineOptions(chunked=chunked))
    spec = replace(spec, rate_per_s=14.0, requests=200)
    cluster = Cluster(spec.setup(), check=check_view)
    cluster.run(spec.jobs())
    come_to_rest(cluster)
    jobs = cluster.clients.jobs.values()
    assert [j.got for j in jobs] == [j.answer for j in jobs]
    assert bool(cluster.clients.moves) == (name in ("llumnix", "llumnix-base", "scls"))


def test_llumnix_loses_less_than_its_dispatch_alone_and_waits_no_longer() -> None:
    """Near the memory's limit, over a few seeds: sums, not each of them."""
    spec = replace(SPEC, rate_per_s=16.0, requests=500, cv=None, instances=8)
    found = {}
    for name in ("infaas++", "llumnix"):
        metrics = [
            run_one(replace(spec, scheduler=policy(name), seed=seed))["metrics"]
            for seed in range(4)
        ]
        found[name] = (
            sum(m["ttft_s"]["p99"] for m in metrics),
            sum(m["preemption_loss_s"]["mean"] for m in metrics),
        )
    (our_wait_s, our_loss_s), (wait_s, loss_s) = found["llumnix"], found["infaas++"]
    assert our_loss_s < 0.5 * loss_s, found
    assert our_wait_s < 1.05 * wait_s, found


def rough(seed: int) -> Spec:
    """A run with all faults. `come_to_rest` and the checks on the way raise if anything is lost."""
    faults = Faults(instance_s=10, controller_s=15, client_s=2, link=0.08)
    engine = EngineOptions(chunked=seed % 2 == 0, prefix_caching=seed % 3 != 0)
    return replace(SPEC, seed=seed, faults=faults, engine=engine, high_share=0.1)


def surviving(spec: Spec, **survival: Any) -> Spec:
    """The run with other knobs of survival."""
    settings = replace(spec.scheduler, survival=SurvivalSettings(**survival))
    return replace(spec, scheduler=settings)


@pytest.mark.parametrize("lives", [0, 3])
@pytest.mark.parametrize("seed", range(12))
def test_each_request_that_is_lost_was_on_an_engine_that_crashed_or_on_its_way_there(
    seed: int, lives: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = surviving(rough(seed), lives=lives)
    assert spec.faults is not None
    injector, jobs = FaultInjector(spec.faults, seed), spec.jobs()
    cluster = Cluster(spec.setup(), wire=injector.wire, check=check_view)
    exposed: set[RequestId] = set()  # that a crash may cost
    kill = cluster.kill

    def kill_noted(instance: SimInstance) -> None:
        for stream in cluster.clients.streams:
            there = stream.grant is not None and stream.grant.destination == instance.index
            if there or stream.owner == instance.index:
                exposed.add(stream.request)
        kill(instance)

    monkeypatch.setattr(cluster, "kill", kill_noted)
    injector.begin(cluster, jobs[-1].arrived_s)
    cluster.run(jobs)
    come_to_rest(cluster)
    assert {j.error for j in jobs} <= {"", "hung up", "its engine died"}
    lost = {j.id for j in jobs if j.error == "its engine died"}
    assert lost <= exposed
    assert lives or not any(j.revivals for j in jobs)
    if lives and injector.crashes:
        assert len(lost) < len(exposed) / 4
    assert sum(j.error == "hung up" for j in jobs) == injector.hung_up > 0


def crashing(lives: int = 1000, **changes: Any) -> Spec:
    """A run in which an instance crashes every other second, and nothing else goes wrong."""
    spec = replace(SPEC, faults=Faults(instance_s=2), requests=300)
    return surviving(replace(spec, **changes), lives=lives)


@pytest.mark.parametrize("name", ["llumnix", "cache-aware", "round-robin"])
def test_every_stream_outlives_its_instances(name: str) -> None:
    spec = crashing()
    found = run_one(replace(spec, scheduler=replace(spec.scheduler, policy=name)))["metrics"]
    assert found["requests_failed"] == 0
    survival = found["survival"]
    assert survival["revivals"] > survival["streams_revived"] > 40
    assert survival["streams_ended"] == 0
    assert 0 < survival["pause_s"]["p50"] < survival["pause_s"]["max"]
    assert survival["streams_slowed"] > 20
    assert survival["slowed_s"]["mean"] > 0.001


def test_without_survival_they_end_with_their_instance() -> None:
    found = run_one(crashing(lives=0))["metrics"]
    survival = found["survival"]
    assert found["requests_failed"] == survival["streams_ended"] > 50
    assert (survival["revivals"], survival["streams_slowed"]) == (0, 0)
    few = run_one(crashing(lives=1))["metrics"]
    assert 0 < few["survival"]["streams_ended"] < survival["streams_ended"]


def test_while_no_instance_serves_a_stream_waits_for_one() -> None:
    spec = surviving(replace(SPEC, instances=1), wait_s=SMALL.start_s + 1)
    for wait_s, ends in ((SMALL.start_s + 1, False), (SMALL.start_s - 1, True)):
        asked: list[int] = []

        def note(now: float, what: Any, asked: list[int] = asked) -> None:
            if isinstance(what, RequestArrived):
                asked.append(what.prompt_tokens)

        cluster = Cluster(surviving(spec, wait_s=wait_s).setup(), record=note)
        job = Job(id=RequestId("r"), arrived_s=0.0, prompt=100, answer=50)
        cluster.clock.at(1.0, DEATHS, lambda c=cluster: c.kill(c.instances[InstanceId("i0")]))
        cluster.run([job])
        come_to_rest(cluster)
        assert (job.error == "its engine died") is ends
        if not ends:
            assert (job.got, job.revivals) == (50, 1)
            assert asked[0] == 100
            assert 110 < asked[-1] < 150  # And the tokens that it had.
            (pause_s,) = cluster.clients.pauses_s
            assert SMALL.start_s < pause_s < SMALL.start_s + 0.2


def test_an_instance_takes_up_a_few_at_a_time_and_its_own_wait_for_them() -> None:
    pauses_s, slowed_s = [], []
    for at_once in (1, 100):
        spec = surviving(replace(SPEC, instances=2), at_once=at_once)
        cluster = Cluster(spec.setup())
        jobs = [Job(id=RequestId(f"r{n}"), arrived_s=0.0, prompt=150, answer=80) for n in range(16)]
        cluster.clock.at(1.5, DEATHS, lambda c=cluster: c.kill(c.instances[InstanceId("i1")]))
        cluster.run(jobs)
        come_to_rest(cluster)
        assert [j.got for j in jobs] == [80] * 16
        pauses_s.append(cluster.clients.pauses_s)
        slowed_s.append(max(j.slowed_s for j in jobs))
    assert len(pauses_s[0]) == len(pauses_s[1]) > 5
    # One after the other: the first sooner, the last later.
    assert min(pauses_s[0]) < min(pauses_s[1])
    assert max(pauses_s[0]) > max(pauses_s[1])
    assert min(slowed_s) > 0


def test_a_revival_is_shown_beneath_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--rate", "10", "--requests", "150", "--faults", "instance=4", "--processes", "1"]
    assert simulate([*args]) == 0
    said = capsys.readouterr().out
    assert "streams went on at another instance" in said
    assert "others lost" in said
    assert simulate([*args, "--survival", "off"]) == 0
    said = capsys.readouterr().out
    assert "llumnix at 10/s: " in said
    assert "streams ended with their instance" in said
    assert "went on" not in said
    assert simulate(args[:4]) == 0
    assert "instance:" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_seeds_of_faults_lose_nothing_either() -> None:
    seen = {"instances_crashed": 0, "controllers_crashed": 0, "clients_hung_up": 0}
    moved = revived = 0
    for seed in range(1000):
        metrics = run_one(rough(seed))["metrics"]
        moved += metrics["migrations"]
        revived += metrics["survival"]["revivals"]
        for name, count in metrics["faults"].items():
            seen[name] += count
    assert all(count > 1000 for count in seen.values()), seen
    assert min(moved, revived) > 1000


def test_the_checks_see_a_request_on_two_engines_and_one_that_was_forgotten() -> None:
    cluster = Cluster(replace(SPEC, instances=2).setup())
    job = Job(id=RequestId("r"), arrived_s=0.0, prompt=10, answer=5)
    cluster.clients.jobs[job.id] = job
    for instance in cluster.instances.values():
        instance.engine.add(job, 0.0)
    with pytest.raises(BrokenPromiseError, match="runs on engines 0 and 1"):
        check_owners(cluster)
    with pytest.raises(BrokenPromiseError, match=r"r was forgotten.*i0 still has"):
        check_rest(cluster)


def test_the_load_decides_the_number_of_instances() -> None:
    scaling = ScalingSettings(instances_min=1, instances_max=6, down_after_s=5.0, cooldown_s=2.0)
    spec = replace(
        SPEC,
        scheduler=SchedulerSettings(scaling=scaling),
        instances=1,
        requests=500,
        rate_per_s=8.0,
    )
    cluster = Cluster(spec.setup())
    jobs = spec.jobs()
    lull_s = jobs[-1].arrived_s + 120
    late = [replace_time(job, lull_s + job.arrived_s, f"late {job.id}") for job in jobs[:20]]
    cluster.run([*jobs, *late])
    come_to_rest(cluster)
    assert all(j.got == j.answer for j in cluster.clients.jobs.values())
    started = cluster._names
    assert started > 2
    assert len(cluster.instances) < started  # Some were emptied and stopped.
    assert 1 < cluster.instance_s / cluster.now < 6


def replace_time(job: Job, arrived_s: float, name: str) -> Job:
    return Job(id=RequestId(name), arrived_s=arrived_s, prompt=job.prompt, answer=job.answer)


def test_cache_aware_dispatch_finds_prefixes() -> None:
    """Ten conversations, each with a long prefix: caches save computing."""
    found = {}
    for name in ("cache-aware", "round-robin"):
        setup = Setup(scheduler=policy(name), profile=SMALL, instances=3)
        cluster = Cluster(setup)
        jobs = [
            Job(
                id=RequestId(f"r{n}"),
                arrived_s=n * 0.5,
                prompt=700,
                answer=8,
                prefix=tuple(range(100 * (n % 10), 100 * (n % 10) + 10)),
                prefix_blocks=4,
            )
            for n in range(120)
        ]
        cluster.run(jobs)
        come_to_rest(cluster)
        found[name] = sum(j.first_s - j.arrived_s for j in jobs if j.first_s is not None)
    assert found["cache-aware"] < 0.8 * found["round-robin"], found


def test_the_fewest_instances_for_a_bound() -> None:
    spec = replace(SPEC, requests=120, cv=None)
    count, run = smallest_fleet(spec, "ttft_p99<1.5s", 64)
    assert run["metrics"]["ttft_s"]["p99"] < 1.5
    assert count > 1
    fewer = run_one(replace(spec, instances=count - 1))
    assert fewer["metrics"]["ttft_s"]["p99"] >= 1.5
    with pytest.raises(UsageError, match="does not hold with 4 instances"):
        smallest_fleet(spec, "ttft_p99<1ms", 4)


@pytest.mark.parametrize("text", ["ttft_p99", "ttft_p98<2s", "p99<2", "ttft_p99<fast", "ttft<1s"])
def test_a_bound_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write a bound like ttft_p99<2s"):
        parse_bound(text)


def test_bounds() -> None:
    assert parse_bound("tpot_mean < 80ms") == (("tpot_s", "mean"), 0.08)
    assert parse_bound("e2e_p50<3") == (("e2e_s", "p50"), 3.0)


def test_profiles_are_read_and_written(tmp_path: Path) -> None:
    for name in profile_names():
        known = load_profile(name)
        assert known.name == name
        assert len(known.text) > 40
        save_profile(known, tmp_path / "p.json")
        assert load_profile(str(tmp_path / "p.json")) == known


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is no JSON"),
        ("[]", "wants context_s"),
        (json.dumps({"step_s": 1}), "wants context_s"),
        (json.dumps({"step_ms": 1}), "does not know step_ms"),
    ],
)
def test_a_bad_profile_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=why):
        load_profile(str(path))
    with pytest.raises(UsageError, match="no profile 'nothing'"):
        load_profile("nothing")


def test_what_a_step_costs() -> None:
    profile = Profile(
        name="p",
        text="",
        step_s=0.02,
        request_s=0.001,
        context_s=1e-6,
        prompt_s=0.0002,
        prompt_context_s=1e-7,
        overlap_s=0.01,
        kv_tokens=1,
        kv_token_bytes=1,
    )
    assert profile.decode(10, 5000) == pytest.approx(0.02 + 0.01 + 0.005)
    assert profile.prefill(20) == pytest.approx(0.02)  # Hidden behind the step.
    assert profile.prefill(1000) == pytest.approx(0.02 + 0.2 + 0.05 - 0.01)
    assert profile.prefill(1000, 2000) == pytest.approx(0.02 + 0.2 + 0.25 - 0.01)
    slow_host = replace(profile, prompts_least_s=0.04)
    assert slow_host.prefill(20) == 0.04
    assert slow_host.decode(10, 5000) == profile.decode(10, 5000)
    assert slow_host.prefill(1000) == profile.prefill(1000)


def test_an_option_by_its_old_name_works_and_says_the_new_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = _parser().parse_args(["--high", "0.2", "--start-s", "3"])
    assert old == _parser().parse_args(["--high-share", "0.2", "--startup-s", "3"])
    said = capsys.readouterr().err
    assert "--high is now --high-share" in said
    assert "--start-s is now --startup-s" in said
    assert _parser().parse_args([]).high_share == 0.0
