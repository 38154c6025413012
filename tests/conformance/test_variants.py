"""Exactness and the scenarios on engines that are set up otherwise. Each starts two of its own."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm import envs

from conformance.engines import RealKind
from conformance.scenarios import FAULTS, strike
from conformance.test_exactness import CASES, options, run, story
from conformance.test_survival import KILLS, outlived
from llumnix.core.messages import (
    Handover,
    HandoverAnnounced,
    Revive,
    Stage,
    TookOver,
    Verdict,
)
from llumnix.core.types import EngineIndex, Epoch, MigrationId
from llumnix.engine.kv.agent import TransferOptions
from support.gemma import make_tiny_gemma
from support.real_engine import RealEngine

pytestmark = [pytest.mark.live, pytest.mark.slow]

VARIANTS: dict[str, dict[str, Any]] = {
    "asynchronous scheduling": {
        "force_async": True,
        "worker_cls": "support.async_cpu_worker.AsyncCpuWorker",
    },
    "no prefix caching": {"enable_prefix_caching": False},
    "tensor parallel 2": {"tensor_parallel_size": 2},
    "priority scheduling": {"scheduling_policy": "priority"},
    "over tcp": {"transfer": TransferOptions(same_host="tcp", checksums=True)},
    "sliding windows": {"model": "gemma"},
}
TESTED = ("greedy", "seeded with every option", "json")
FAULTY = [f for f in FAULTS if f not in ("the message comes twice", "the other side is silent")]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealKind]:
    settings = dict(VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("kv")
    model = tiny_model
    if settings.pop("model", None) == "gemma":
        model = make_tiny_gemma(tmp_path_factory.mktemp("gemma") / "gemma", tiny_model)
    tests = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    if settings.get("tensor_parallel_size"):
        # vLLM wants a NUMA node for each rank unless it is told where to go.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    else:
        os.environ.pop("VLLM_CPU_OMP_THREADS_BIND", None)
    envs.disable_envs_cache()
    engines = [
        RealEngine(
            number, folder, model, **{"block_size": 32, "max_num_batched_tokens": 4096, **settings}
        )
        for number in range(2)
    ]
    kind = RealKind(engines, lambda n: list(range(n)))
    groups = engines[0].core.scheduler.kv_cache_config.kv_cache_groups
    kind.groups = len(groups)  # type: ignore[attr-defined]
    kind.name = request.param  # type: ignore[attr-defined]
    if request.param == "asynchronous scheduling":
        assert engines[0].core.batch_queue is not None
    yield kind
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("case", TESTED)
def test_hops_change_nothing(variant: RealKind, case: str) -> None:
    prompt = [(13 * i) % 400 + 60 for i in range(300)]
    expected, _ = run(variant, options(**CASES[case]), 0, prompt)
    found, moved = run(variant, options(**CASES[case]), 5, prompt)
    assert found == expected
    assert moved >= 4
    if variant.name == "sliding windows":  # type: ignore[attr-defined]
        assert variant.groups > 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", TESTED)
@pytest.mark.parametrize("unheard", [0, 2])
def test_deaths_change_nothing(variant: RealKind, case: str, unheard: int) -> None:
    prompt = [(13 * i) % 400 + 60 for i in range(300)]
    expected, _ = run(variant, options(**CASES[case]), 0, prompt)
    found = outlived(variant, options(**CASES[case]), KILLS, prompt, unheard=unheard)
    assert found == expected


@pytest.mark.parametrize("case", ["greedy", "seeded with every option"])
def test_a_request_that_is_sent_again_where_it_was_aborted_goes_on_exactly(
    variant: RealKind, case: str
) -> None:
    """A step that it is in may still be in flight."""
    prompt, params = [(13 * i) % 400 + 60 for i in range(300)], options(**CASES[case])
    expected, _ = run(variant, params, 0, prompt)
    duo = variant.duo()
    engine, llumlet = variant.engines[0], duo.llumlets[EngineIndex(0)]
    request = duo.add("sent again", prompt, params)
    # With it there are steps ahead that the other is not in.
    neighbour = duo.add("neighbour", prompt[:20], options(temperature=0, max_tokens=200))
    duo.turn_until(lambda: len(duo.got[request]) >= 9)
    told = story(duo, request)
    order = Revive(
        migration=MigrationId("again"),
        request=request,
        destination=EngineIndex(0),
        epoch=Epoch(1),
        outputs=list(duo.got[request]),
    )
    duo.streams.close(request)
    llumlet.client_gone([request])
    engine.abort(request)
    said = llumlet.revive(order, engine.again(order, prompt, params), duo.now)
    duo.extras[request] = []
    while not engine.idle() or llumlet.busy:
        told_now = engine.step()
        duo.extras[request] += [extra for name, *_, extra in told_now if name == request]
        said += llumlet.poll(duo.now)
    assert [type(out.message) for out in said] == [TookOver]
    assert told + story(duo, request) == expected
    duo.streams.close(neighbour)
    duo.check_nothing_left()


@pytest.mark.parametrize("moment", [Stage, Handover, Verdict])
@pytest.mark.parametrize("fault", FAULTY)
def test_a_migration_stands(variant: RealKind, fault: str, moment: type) -> None:
    strike(variant, fault, moment)


@pytest.mark.parametrize("moment", [HandoverAnnounced, Handover])
def test_a_full_batch_takes_back_what_was_not_taken(variant: RealKind, moment: type) -> None:
    """Eight run, four wait, and the one that was taken out comes back."""
    prompt = [(11 * i) % 400 + 60 for i in range(200)]
    params = options(temperature=0, max_tokens=40)
    expected, _ = run(variant, params, 0, prompt)
    duo = variant.duo()
    names = [duo.add(f"one of many {number}", prompt, params) for number in range(12)]
    duo.turn_until(lambda: len(duo.got[names[0]]) >= 3)

    def before(message: Any) -> None:
        announced = any(isinstance(m, HandoverAnnounced) for m in duo.delivered)
        if isinstance(message, moment) and announced:
            duo.fail_pulls = True
            duo.now += 100 if moment is HandoverAnnounced else 0

    duo.before = before
    assert duo.migrate(names[0])
    duo.turn_until(lambda: duo.ended)
    assert not duo.ended[0].taken or moment is HandoverAnnounced
    duo.finish()
    told = [[t for t in story(duo, name) if isinstance(t, tuple)] for name in names]
    assert told == [[t for t in expected if isinstance(t, tuple)]] * 12
    duo.check_nothing_left()


@pytest.mark.parametrize("copy", ["staged", "blocking"])
def test_what_a_move_left_in_the_cache_is_right(variant: RealKind, copy: str) -> None:
    """Of a staged one, which fails, the first stage is kept; shorter prompts that begin alike find
    what is there."""
    prompt = [(17 * i) % 400 + 60 for i in range(330)]
    beginnings = [prompt[:length] for length in (70, 130, 200, 290)] + [prompt]
    params = options(temperature=0, max_tokens=12)
    expected = [run(variant, params, 0, beginning)[0] for beginning in beginnings]
    duo = variant.duo()
    name = duo.add("moved", prompt, options(temperature=0, max_tokens=60))
    duo.turn_until(lambda: len(duo.got[name]) >= 3)

    def before(message: Any) -> None:
        duo.fail_pulls |= isinstance(message, Handover) and copy == "staged"

    duo.before = before
    assert duo.migrate(name, copy=copy)
    duo.turn_until(lambda: duo.ended)
    assert duo.ended[0].taken is (copy == "blocking")
    for number, beginning in enumerate(beginnings):
        other = duo.add(f"beginning {number}", beginning, params, on=1)
        duo.turn_until(lambda other=other: duo.state[other] == "finished")  # type: ignore[misc]
        assert story(duo, other) == expected[number]
    found = duo.extras[other][0].prefill_stats
    cached = found.num_cached_tokens if found else 0
    assert cached > 200 or variant.name in ("no prefix caching", "sliding windows")  # type: ignore[attr-defined]
    duo.finish()
    duo.check_nothing_left()
