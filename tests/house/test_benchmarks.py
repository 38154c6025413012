"""What a comparison of systems rests on in benchmarks/: the same prompts, and what peers tell."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
pytest.importorskip("prometheus_client")

from transformers import AutoTokenizer

from common import kinds, seed_range, simulate_all
from llumnix.core.types import RequestId
from llumnix.sim.model.jobs import Job
from llumnix.sim.simulate import figures_of, spread_over
from prompt_steps import LONG, SECONDS, Task, compared, made
from prompt_steps import run as run_with_prompts
from shapes import write_shape
from short_memory import COLUMNS, figures, key, ratios, run, specs
from watch import PeerWatch
from workload import LETTERS, Answer, Arrival, encode, of_requests

PAGE = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0",model_name="m"} 4.0
vllm:num_preemptions_total{engine="1",model_name="m"} 5.0
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 30.0
"""


def prompts(seed: int, *prefixes: tuple[int, ...]) -> list[list[int]]:
    arrivals = [
        Arrival(at_s=0.0, prompt_tokens=50, output_tokens=1, prefix=p, prefix_block_tokens=16)
        for p in prefixes
    ]
    bodies = encode(arrivals, random.Random(seed), 30000)
    return [json.loads(body)["prompt"] for body in bodies]


def test_prompts_share_the_blocks_that_the_trace_says_they_do_and_no_more() -> None:
    first, second, third = prompts(0, (1, 2), (1, 3), ())
    assert {len(first), len(second), len(third)} == {50}
    assert first[:16] == second[:16]
    assert first[16:32] != second[16:32]
    assert first[32:] != second[32:]
    assert third[:16] != first[:16]


def test_all_systems_get_the_same_prompts_and_another_seed_others() -> None:
    assert prompts(0, (1, 2)) == prompts(0, (1, 2))
    assert prompts(0, (1, 2))[0][:16] != prompts(1, (1, 2))[0][:16]


def test_a_prompt_of_letters_has_a_token_for_each_in_the_tokenizer_of_the_shapes(
    tmp_path: Path,
) -> None:
    lengths = (1, 50, 3000)
    arrivals = [Arrival(at_s=0.0, prompt_tokens=n, output_tokens=1) for n in lengths]
    bodies = encode(arrivals, random.Random(0), 30000, text=True)
    texts = [json.loads(body)["prompt"] for body in bodies]
    assert set(texts[-1]) == set(LETTERS)
    tokenizer = AutoTokenizer.from_pretrained(str(write_shape("mini", tmp_path)))
    assert [len(ids) for ids in tokenizer(texts)["input_ids"]] == [len(t) for t in texts]
    assert tuple(map(len, texts)) == lengths


@pytest.mark.parametrize("earlier", [None, ["--older"]])
def test_an_earlier_state_and_a_variant_take_their_turns_beside_vllm_and_llumnix(
    earlier: list[str] | None,
) -> None:
    ours = ["--instances", "2"]
    args = SimpleNamespace(before=None, variant=None)
    plain = [("bare", ["-d"], {}), ("llumnix", ours, {})]
    assert kinds(args, ["-d"], ours, earlier) == plain
    args = SimpleNamespace(before=Path("/then"), variant="--survival off")
    *first, before, variant = kinds(args, ["-d"], ours, earlier)
    assert first == plain
    assert before[:2] == ("before", earlier or ours)
    assert before[2]["PYTHONPATH"].split(":")[0] == "/then"
    assert variant == ("variant", [*ours, "--survival", "off"], {})


async def test_a_peer_is_read_by_engine_over_all_its_servers() -> None:
    watch = PeerWatch(None, ["http://one", "http://two"], kv_tokens=1000)  # type: ignore[arg-type]

    async def page(_: str) -> str:
        return PAGE

    watch._get = page  # type: ignore[method-assign]
    seen = [(s.instance, s.used, s.total, s.running, s.waiting) for s in await watch.instances()]
    each = [("0", 500, 1000, 3, 2), ("1", 250, 1000, 1, 0)]
    assert seen == [(f"{server}-{e[0]}", *e[1:]) for server in (0, 1) for e in each]
    grown = await watch.counters()
    assert grown == {"preemptions": 18, "prefix_queries": 200, "prefix_hits": 60}


def test_variants_are_compared_by_pairs_of_trace_and_seed() -> None:
    def row(trace: str, seed: int, variant: str, value: float) -> dict[str, Any]:
        found = dict.fromkeys([name for _, name in COLUMNS], value)
        return {"trace": trace, "seed": seed, "variant": variant, "figures": found}

    rows = [row("a", 0, "base", 4.0), row("a", 0, "ours", 2.0), row("a", 1, "ours", 9.0)]
    assert ratios(rows, "ours", "base")[:2] == ["1", "0.50"]
    rows += [row("b", 0, "base", 1.0), row("b", 0, "ours", 2.0)]
    assert ratios(rows, "ours", "base")[1].startswith("1.00 (")
    assert ratios(rows, "ours", "base", "b")[:2] == ["1", "2.00"]


def test_runs_on_several_processes_have_the_figures_of_runs_on_one() -> None:
    short = [replace(s, requests=60, trace="M-M") for s in specs("real", Path(), 0)[:2]]
    tasks = [(replace(s, seed=n), "llumnix") for n, s in enumerate(short)]

    def placed_rows(processes: int) -> list[dict[str, Any]]:
        return [row for _, row in sorted(spread_over(run, tasks, processes))]

    rows = placed_rows(1)
    assert [(r["trace"], r["seed"], r["variant"]) for r in rows] == [key(t) for t in tasks]
    assert placed_rows(2) == rows
    assert rows[0]["figures"] != rows[1]["figures"]


def test_seeds_are_the_first_ones_or_from_one_to_before_another() -> None:
    assert list(seed_range("3")) == [0, 1, 2]
    assert list(seed_range("20:22")) == [20, 21]


def test_w1_is_the_mean_of_the_worst_hundredth() -> None:
    jobs = [
        Job(id=RequestId(f"r{n}"), arrived_s=0.0, prompt=1, answer=2, first_s=n, ended_s=n + 1.0)
        for n in range(200)
    ]
    jobs[0].lost_s = 20.0
    cluster: Any = SimpleNamespace(preemptions=3, clients=SimpleNamespace(moves=[]))
    found = figures(jobs, cluster)
    assert (found["worst1"], found["longest"], found["loss"]) == (198.5, 199.0, 0.1)
    assert found["wait"] == found["ttft"] + 0.1


def test_real_engines_have_the_figures_of_simulated_ones() -> None:
    answers = [Answer(ttft_s=n, e2e_s=n + 1.0, tokens=2, error="") for n in range(200)]
    given_up = [Answer(ttft_s=1000.0), Answer()]
    found = of_requests([*answers, *given_up], [0.5] * 202)
    assert (found["ttft_s"]["worst1"], found["ttft_s"]["max"]) == (198.5, 199.0)
    jobs = [
        Job(id=RequestId(f"r{n}"), arrived_s=0.0, prompt=1, answer=2, first_s=n, ended_s=n + 1.0)
        for n in range(200)
    ]
    simulated = figures_of(jobs)
    assert found.keys() == simulated.keys()
    assert found["ttft_s"] == simulated["ttft_s"]
    assert (found["requests_done"], found["requests_failed"]) == (200, 2)


def prompt_task(load: str, **changes: Any) -> Task:
    return replace(
        Task(load=load, profile="h200-llama-8b", instances=2, seed=0, variant="8192"), **changes
    )


def test_long_prompts_and_chats_come_together_or_one_after_the_other() -> None:
    def told(task: Task) -> list[tuple[float, int, int]]:
        return [(job.arrived_s, job.prompt, job.answer) for job in made(task)]

    mixed, turning = made(prompt_task("mixed")), made(prompt_task("turning"))
    half_s = SECONDS[2] / 2
    for jobs in (mixed, turning):
        assert [j.arrived_s for j in jobs] == sorted(j.arrived_s for j in jobs)
        assert jobs[-1].arrived_s < SECONDS[2]
    assert {j.prompt == LONG for j in mixed if j.arrived_s < half_s} == {True, False}
    assert {j.prompt == LONG for j in turning if j.arrived_s < half_s} == {True}
    assert {j.prompt == LONG for j in turning if j.arrived_s >= half_s} == {False}
    assert told(prompt_task("mixed", variant="bound")) == told(prompt_task("mixed"))
    assert told(prompt_task("mixed", seed=1)) != told(prompt_task("mixed"))


def test_smaller_steps_keep_those_that_decode_waiting_for_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SECONDS, 2, 8.0)
    rows = [run_with_prompts(prompt_task("mixed", variant=v)) for v in ("8192", "1024", "bound")]
    usual, small, bound = (row["figures"] for row in rows)
    assert usual["chats_tpot99"] > small["chats_tpot99"] > 1.5 * bound["chats_tpot99"]
    assert usual["long_ttft99"] > 10 * bound["long_ttft99"]
    assert not any(row["figures"]["failed"] for row in rows)
    cells = compared(rows).split("\n")[2].split(" | ")
    assert cells[:3] == ["| mixed", "1024", "1"]
    assert cells[3] == f"{small['tpot'] / usual['tpot']:.2f}"


def test_a_simulated_run_that_stands_in_the_file_is_not_made_again(tmp_path: Path) -> None:
    made_now: list[str] = []

    def run(name: str, seed: int) -> dict[str, Any]:
        made_now.append(name)
        return {"name": name, "seed": seed, "figures": {"ttft": float(len(made_now))}}

    def rows(*names: str) -> list[dict[str, Any]]:
        made_now.clear()
        calls = {(name, 7): (name, 7) for name in names}
        return simulate_all(run, calls, lambda r: (r["name"], r["seed"]), 1, tmp_path / "runs")

    first = rows("a", "b")
    assert made_now == ["a", "b"]
    again = rows("c", "b", "a")
    assert made_now == ["c"]
    assert again[:0:-1] == first, "in the order of the calls"
    assert len((tmp_path / "runs").read_text().splitlines()) == 3
