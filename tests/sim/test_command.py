"""What `llumnix simulate` refuses, and what it finds."""

import json
from pathlib import Path
from typing import Any

import pytest

from llumnix.core.events import AddInstances, Dispatch, MoveOrder
from llumnix.core.settings import AdmissionSettings, SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.errors import UsageError
from llumnix.sim.command import simulate
from llumnix.sim.model.batching import EngineOptions
from llumnix.sim.model.checks import check_view, come_to_rest
from llumnix.sim.model.cluster import Cluster
from llumnix.sim.model.faults import FaultInjector, Faults
from llumnix.sim.model.profile import load_profile
from llumnix.sim.simulate import DECISIONS_MAX, DISPATCHES_MAX, DecisionRecorder, Spec


def trace(path: Path, rows: int, answer: int = 20) -> str:
    """A file of requests that come every 0.3 s, each of its own length."""
    lines = "".join(f"{0.3 * n:.1f},{50 + n},{answer}\n" for n in range(rows))
    path.write_text("arrival_s,input_tokens,output_tokens\n" + lines)
    return str(path)


def said_by(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """The JSON of a run on this process."""
    assert simulate([*args, "--json", "--processes", "1"]) == 0
    return json.loads(capsys.readouterr().out)


def test_seeds_that_would_be_one_run_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trace(tmp_path / "t.csv", 40)
    few = ["--trace", path, "--seeds", "3"]
    for more in ([], ["--requests", "40"], ["--rate", "2"], ["--sweep", "rate=1:3:1"]):
        with pytest.raises(UsageError, match=r"seeds 0 and 1 are the same run.*40 of the 40 req"):
            simulate([*few, *more])
    with pytest.raises(UsageError, match="are the same run"):
        simulate([*few, "--requests", "39"])  # Two places for three seeds.
    for drawn in (["--cv", "1"], ["--high-share", "0.5"], ["--requests", "10"]):
        runs = said_by(capsys, *few, *drawn)["runs"]
        assert len({json.dumps(run["metrics"]) for run in runs}) == 3
    # Faults are drawn, too, and a single seed is compared with nothing.
    assert len(said_by(capsys, *few, "--faults", "client=3")["runs"]) == 3
    assert len(said_by(capsys, "--trace", path)["runs"]) == 1


def test_rows_at_random_are_another_run_for_each_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("input_tokens,output_tokens\n" + "".join(f"{50 + n},9\n" for n in range(40)))
    found = said_by(capsys, "--trace", str(path), "--rate", "3", "--seeds", "3")["runs"]
    assert len({json.dumps(run["metrics"]) for run in found}) == 3


def test_clients_that_hang_up_do_not_keep_a_bound_from_holding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llumnix.sim.command.INSTANCES_MAX", 2)
    args = ["--requests", "60", "--rate", "2", "--faults", "client=5"]
    (row,) = said_by(capsys, *args, "--capacity-for", "ttft_p99<2s")["capacity"]
    (run,) = row["runs"]
    metrics = run["metrics"]
    assert metrics["faults"]["clients_hung_up"] > 0
    assert metrics["requests_failed"] == 0
    assert metrics["requests_done"] + metrics["faults"]["clients_hung_up"] == 60
    assert row["instances"] == run["instances"]


def test_a_bound_on_what_no_request_has_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llumnix.sim.command.INSTANCES_MAX", 2)
    path = trace(tmp_path / "t.csv", 5, answer=1)
    says = "does not hold with 2 .*: tpot_s p99 is not measured, and 0 of 5 requests failed"
    with pytest.raises(UsageError, match=says):
        simulate(["--trace", path, "--capacity-for", "tpot_p99<80ms"])
    monkeypatch.setattr("llumnix.sim.capacity.run_one", failing)
    with pytest.raises(UsageError, match=r"ttft_s p99 is 0\.5, and 3 of 5 requests failed"):
        simulate(["--trace", path, "--capacity-for", "ttft_p99<2s"])


def failing(_: object) -> dict[str, Any]:
    """A run that is fast, and in which requests fail."""
    return {"metrics": {"ttft_s": {"p99": 0.5}, "requests_failed": 3}}


def test_a_report_of_a_search_for_instances_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(UsageError, match="--report: --capacity-for makes no page"):
        simulate(["--rate", "2", "--capacity-for", "ttft_p99<2s", "--report", str(page)])
    assert not page.exists()


def test_a_request_for_which_too_many_wait_is_refused_and_counts_as_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knobs = tmp_path / "knobs.yaml"
    knobs.write_text("admission: {queue_max: 2}\n")
    args = ["--requests", "150", "--rate", "8", "--instances", "1"]
    (full,) = said_by(capsys, *args)["runs"]
    (found,) = said_by(capsys, *args, "--scheduler-config", str(knobs))["runs"]
    metrics = found["metrics"]
    assert metrics["requests_failed"] > 10
    assert metrics["requests_done"] + metrics["requests_failed"] == 150
    assert metrics["ttft_s"]["mean"] < full["metrics"]["ttft_s"]["mean"]
    assert full["metrics"]["requests_failed"] == 0


def test_a_request_that_was_let_in_is_never_refused_where_it_goes_on() -> None:
    admission = AdmissionSettings(queue_max=1)
    spec = Spec(
        scheduler=SchedulerSettings(admission=admission),
        profile=load_profile("a10-llama-7b"),
        engine=EngineOptions(kv_tokens=2048),
        instances=3,
        start_s=2.0,
        trace="M-M",
        rate_per_s=12.0,
        requests=150,
        seed=0,
        faults=Faults(instance_s=3),
    )
    assert spec.faults is not None
    injector, jobs = FaultInjector(spec.faults, spec.seed), spec.jobs()
    cluster = Cluster(spec.setup(), wire=injector.wire, check=check_view)
    injector.begin(cluster, jobs[-1].arrived_s)
    cluster.run(jobs)
    come_to_rest(cluster)
    refused = [job for job in jobs if "the limit is 1" in job.error]
    assert len(refused) > 20
    assert {job.got for job in refused} == {0}
    assert sum(job.revivals for job in jobs) > 20


def test_a_report_has_the_last_moves_and_all_changes_and_the_first_dispatches() -> None:
    recorder, names = DecisionRecorder(), (InstanceId("i0"), InstanceId("i1"))
    engines = (EngineIndex(0), EngineIndex(1))
    for n in range(2 * DECISIONS_MAX):
        move = MoveOrder(
            order=n,
            source=names[0],
            source_engine=engines[0],
            destination=names[1],
            destination_engine=engines[1],
            limits=(),
            why="w",
            source_sequence=n,
        )
        request = RequestId(f"r{n}")
        placed = Dispatch(request=request, instance=names[0], engine_index=engines[0], why="w")
        for decision in (
            move,
            placed,
            *([AddInstances(count=1, total=9, why="w")] * (n % 900 == 1)),
        ):
            recorder.record(float(n), decision)
    rows = recorder.rows
    times = {kind: [r["t_s"] for r in rows if r["kind"] == kind] for kind in ("move", "add")}
    assert times == {"move": list(range(DECISIONS_MAX, 2 * DECISIONS_MAX)), "add": [1, 901, 1801]}
    assert [r["t_s"] for r in rows if r["kind"] == "dispatch"] == list(range(DISPATCHES_MAX))
    assert [r["t_s"] for r in rows] == sorted(r["t_s"] for r in rows)
