"""Static batches in virtual time."""

import json
from dataclasses import replace
from typing import Any

import pytest

from llumnix.core.slices.published import STATIC
from llumnix.core.types import RequestId
from llumnix.errors import UsageError
from llumnix.sim.command import simulate
from llumnix.sim.model.jobs import Job
from llumnix.sim.static_batches import StaticModel, Work
from sim import one_engine

PROFILE = replace(one_engine.PROFILE, request_s=0.0, context_s=0.0, kv_tokens=10_000)


def job(name: str, answer: int, prompt: int = 100, arrived_s: float = 0.0) -> Job:
    return Job(id=RequestId(name), arrived_s=arrived_s, prompt=prompt, answer=answer)


def test_a_batch_lasts_as_long_as_its_longest_answer_and_all_come_at_its_end() -> None:
    model = StaticModel("sls", PROFILE, 10_000, 1)
    # The first is alone when it comes; the two others are a batch of 300 steps.
    jobs = [job("a", 1), job("b", 300), job("c", 30)]
    model.run(jobs)
    alone_s = 0.01 + 100 * 0.0001 + 0.01
    both_s = 0.01 + 200 * 0.0001 + 300 * 0.01
    assert jobs[0].ended_s == pytest.approx(alone_s)
    assert jobs[1].ended_s == jobs[2].ended_s == pytest.approx(alone_s + both_s)
    assert (model.slots, model.wasted) == (601, 270)


def test_with_slices_a_short_answer_waits_for_no_long_one() -> None:
    model = StaticModel("scls-so", PROFILE, 10_000, 1)
    jobs = [job("a", 1), job("b", 300), job("c", 30)]
    model.run(jobs)
    assert jobs[2].ended_s is not None
    assert jobs[1].ended_s is not None
    assert jobs[2].ended_s < jobs[1].ended_s
    # What comes back is computed again: 228 and 356 tokens.
    redone_s = (0.01 + 228 * 0.0001 + 128 * 0.01) + (0.01 + 356 * 0.0001 + 44 * 0.01)
    assert jobs[1].ended_s - jobs[2].ended_s == pytest.approx(redone_s)


@pytest.mark.parametrize("policy", STATIC)
def test_every_policy_serves_everything_within_memory(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StaticModel(policy, PROFILE, 3000, 3)
    seconds = model._seconds

    def checked(batch: list[Work], steps: int) -> float:
        longest = max(work.tokens for work in batch)
        assert len(batch) == 1 or len(batch) * (longest + steps) <= 0.9 * 3000
        return seconds(batch, steps)

    monkeypatch.setattr(model, "_seconds", checked)
    jobs = [
        job(f"r{n}", 1 + 37 * n % 400, prompt=1 + 53 * n % 500, arrived_s=n / 10)
        for n in range(200)
    ]
    model.run(jobs)
    assert all(j.ended_s is not None and j.got == j.answer for j in jobs)
    assert all(i.load_s == pytest.approx(0, abs=1e-6) and not i.queue for i in model.instances)


def test_the_command_runs_them_beside_llumnix_but_without_faults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--trace", "S-S", "--rate", "8", "--requests", "60", "--instances", "2"]
    assert simulate(["--policy", "scls-paper,llumnix", "--json", "--processes", "1", *words]) == 0
    rows: list[Any] = json.loads(capsys.readouterr().out)["runs"]
    assert [r["policy"] for r in rows] == ["scls-paper", "llumnix"]
    assert [r["metrics"]["requests_done"] for r in rows] == [60, 60]
    assert simulate(["--policy", "sls", "--processes", "1", *words]) == 0
    assert "sls" in capsys.readouterr().out
    with pytest.raises(UsageError, match="sls are simulated without any"):
        simulate(["--policy", "sls", "--faults", "instance=9", *words])
