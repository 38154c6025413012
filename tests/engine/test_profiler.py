"""Timing a real engine's steps, and what that relies on inside vLLM."""

import inspect
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine.core import EngineCore

from llumnix.cli import main
from llumnix.demo import DEMO_MODEL
from llumnix.engine import profiler
from llumnix.engine.profiler import DECODED, SETTLED, Sample, Step
from llumnix.errors import UsageError
from llumnix.frontend.arguments import parse
from llumnix.sim.model.profile import Profile, load_profile
from llumnix.sim.profiling import fit
from support.no_model import BLOCK, NoModel, engine_config


def test_the_engine_core_is_made_and_stepped_as_the_profiler_does() -> None:
    parameters = list(inspect.signature(EngineCore.__init__).parameters)
    assert parameters[:4] == ["self", "vllm_config", "executor_class", "log_stats"]
    assert "self.step_fn = (" in inspect.getsource(EngineCore.__init__)
    for name in ("preprocess_add_request", "add_request", "abort_requests", "shutdown"):
        assert hasattr(EngineCore, name)


TRUE = Profile(
    name="true",
    text="",
    step_s=0.006,
    request_s=0.00003,
    context_s=2e-7,
    prompt_s=0.00002,
    prompt_context_s=2e-10,
    overlap_s=0.003,
    kv_tokens=1,
    kv_token_bytes=1,
)


STEPS = (
    *((Step(decodes=b, context=b * c),) for b in (1, 8, 64) for c in (32, 1024, 8192)),
    *((Step(prompts=((n, 0),)),) for n in (16, 64, 128, 256, 512, 1024, 2048)),
    (Step(prompts=((2048, 0),)), Step(prompts=((2048, 2048),))),
)
FITTED = ("step_s", "request_s", "context_s", "prompt_s", "prompt_context_s", "overlap_s")


@pytest.mark.parametrize("least_s", [0.0, 0.016])
def test_the_fit_finds_the_costs_that_were(least_s: float) -> None:
    true = replace(TRUE, prompts_least_s=least_s)
    samples = [
        Sample(
            steps=steps,
            seconds=sum(true.step(s.decodes, s.context, s.prompts) for s in steps),
        )
        for steps in STEPS
    ]
    found, lines = fit(samples)
    for name in (*FITTED, "prompts_least_s"):
        assert found[name] == pytest.approx(getattr(true, name), rel=0.02), name
    assert max(found["error"].values()) < 0.001
    assert len(lines) == len(samples)


def test_prompts_that_all_take_the_least_time_are_refused() -> None:
    """Their measurements differ by chance only."""
    samples = [
        Sample(steps=(Step(decodes=b, context=b * 32),), seconds=0.006 + b * 3e-5)
        for b in (1, 8, 64)
    ]
    samples += [
        Sample(steps=(Step(prompts=((n, 0),)),), seconds=0.016 * (1 + off))
        for n, off in ((16, 0.01), (64, -0.01), (128, 0.01), (256, 0.0))
    ]
    with pytest.raises(UsageError, match="longer --max-model-len"):
        fit(samples)


def test_too_little_to_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="too few measurements"):
        fit([Sample(steps=(Step(decodes=1, context=32),), seconds=0.006)])


def test_an_engine_is_timed_in_prompts_and_in_batches_that_only_decode(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without a model, whose clock shows a millisecond more at each look."""
    ours: list[Any] = []
    told: list[str] = []
    ended: list[bool] = []

    def make(config: Any, executor: Any, log_stats: bool) -> EngineCore:
        core = EngineCore(config, NoModel, log_stats)
        core.model_executor.core = core
        add = core.add_request
        monkeypatch.setattr(core, "add_request", lambda *what: (ours.append(what[0]), add(*what)))
        monkeypatch.setattr(core, "shutdown", lambda: ended.append(core.scheduler.has_requests()))
        return core

    looks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(looks) * 1e-3, monotonic=time.monotonic)
    monkeypatch.setattr(profiler, "time", clock)
    monkeypatch.setattr(profiler, "EngineCore", make)
    config = engine_config(tiny_model, blocks=20, max_num_batched_tokens=64)
    found = profiler.measure(config, "tiny", 2, told.append)
    assert (found.model, found.kv_tokens, found.block_tokens) == ("tiny", 20 * BLOCK, BLOCK)
    assert found.kv_token_bytes > 0
    assert ended == [False], "no request is left as it ends"
    prompts = [s.steps for s in found.samples if s.steps[0].prompts]
    assert prompts[:3] == [
        (Step(prompts=((16, 0),)),),
        (Step(prompts=((64, 0),)),),
        (Step(prompts=((64, 0),)), Step(prompts=((64, 64),))),
    ]
    assert len(prompts) == 4, "up to 256 of the 288 tokens that may be used"
    decodes = [s.steps[0] for s in found.samples if s.steps[0].decodes]
    assert [step.decodes for step in decodes] == [1, 2, 4, 1]
    for step, context in zip(decodes, (32, 32, 32, 256), strict=True):
        decoded = step.context / step.decodes - context
        assert SETTLED < decoded <= SETTLED + DECODED
    assert all(sample.seconds == pytest.approx(1e-3) for sample in found.samples)
    assert all(r.sampling_params.ignore_eos and not r.sampling_params.temperature for r in ours)
    assert told[0] == "prompt of 16: 1.00 ms"
    assert told[-1] == "1 decoding after 256: 1.00 ms"


def test_the_engine_is_the_one_that_serve_starts_on_a_cpu(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    served = parse(["serve", str(tiny_model)], say=lambda _: None).vllm_config
    config, model = profiler.engine_config([str(tiny_model)], "profile")
    assert model == str(tiny_model)
    assert (config.model_config.enforce_eager, config.model_config.dtype) == (
        served.model_config.enforce_eager, served.model_config.dtype
    )  # fmt: skip
    assert config.model_config.enforce_eager
    assert config.cache_config.kv_cache_memory_bytes == served.cache_config.kv_cache_memory_bytes
    chosen, _ = profiler.engine_config([str(tiny_model), "--no-enforce-eager"], "profile")
    assert not chosen.model_config.enforce_eager


def test_the_demo_model_is_timed_in_the_type_in_which_it_is_served(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "prepare_demo_model", lambda say: tiny_model)
    for words in ([], [DEMO_MODEL], ["--model", DEMO_MODEL]):
        config, model = profiler.engine_config(words, "profile")
        assert model == str(tiny_model)
        assert str(config.model_config.dtype) == "torch.float32"
    chosen, _ = profiler.engine_config(["--dtype", "bfloat16"], "profile")
    assert str(chosen.model_config.dtype) == "torch.bfloat16"


def test_a_model_may_be_named_by_its_flag(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "prepare_demo_model", lambda say: pytest.fail("the demo"))
    config, model = profiler.engine_config(["--model", str(tiny_model)], "profile")
    assert (model, config.model_config.model) == (str(tiny_model), str(tiny_model))


@pytest.mark.live
@pytest.mark.slow
def test_the_command_writes_a_profile_of_a_real_engine(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny.json"
    flags = "--dtype float32 --block-size 32 --max-model-len 1024 --max-num-batched-tokens 64"
    flags += " --max-num-seqs 8 --kv-cache-memory-bytes 33554432 --repeats 1"
    assert main(["profile", str(tiny_model), *flags.split(), "--out", str(out)]) == 0
    # More steps of prompts than a scenario has of decoding: 8 * 256 tokens, 64 a step.
    told = capsys.readouterr().err
    assert "8 decoding after 256" in told
    assert ": 0.00 ms" not in told
    made = load_profile(str(out))
    assert made.step_s > 0
    assert made.kv_tokens > 1000
    assert set(json.loads(out.read_text())["error"]) == {
        "decode_mean", "decode_max", "prefill_mean", "prefill_max",
    }  # fmt: skip
