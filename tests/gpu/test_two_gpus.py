"""On two GPUs of one host, bf16: moved requests are exact, both caches the same by block; requests
whose engine dies are exact too. One GPU will do: both engines share it then.

Run it once for each runner, since vLLM reads the variable once:

    VLLM_BATCH_INVARIANT=1 VLLM_USE_V2_MODEL_RUNNER=1 python -m pytest tests/gpu
    VLLM_BATCH_INVARIANT=1 VLLM_USE_V2_MODEL_RUNNER=0 python -m pytest tests/gpu

LLUMNIX_TEST_SYNC=1 turns asynchronous scheduling off.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")
from vllm import SamplingParams

from conformance.engines import RealKind
from conformance.test_exactness import run
from conformance.test_survival import outlived
from support.duo import Duo
from support.real_engine import RealEngine

HOPS = 4
PROMPT = [(13 * i) % 400 + 60 for i in range(700)]
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.8, "seed": 1234},
    "seeded with penalties": {
        "temperature": 0.9,
        "seed": 5,
        "top_p": 0.9,
        "top_k": 200,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
        "min_tokens": 60,
        "logprobs": 3,
    },
}


def make_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealKind]:
    model = make_model(tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("kv")
    engines = []
    for number in range(2):
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
        engines.append(
            RealEngine(
                number,
                folder,
                model,
                dtype="bfloat16",
                skip_tokenizer_init=True,
                distributed_executor_backend="mp",
                enable_prefix_caching=False,
                kv_cache_memory_bytes=2**30,
                max_model_len=8192,
                async_scheduling=not os.environ.get("LLUMNIX_TEST_SYNC"),
            )
        )
    config = engines[0].config
    print("runner V2:", config.use_v2_model_runner, end=", ")
    print("async:", config.scheduler_config.async_scheduling)
    yield RealKind(engines, lambda n: list(range(n)))
    for engine in engines:
        engine.close()


def params(**more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 300, "ignore_eos": True, "detokenize": False, **more})


def compared(kind: RealKind, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on every commit compares the two caches; returns the blocks compared, by commit."""
    counts: list[int] = []
    for engine, other in (kind.engines, kind.engines[::-1]):
        commit = engine.port.commit

        def checked(
            request: Any, computed: int, state: bytes, engine=engine, other=other, commit=commit
        ) -> Any:
            result = commit(request, computed, state)
            mine = engine.port.core.blocks(request, 0, computed)[0]
            theirs = other.port.core.blocks(request, 0, computed)[0]
            for ours, source in zip(mine, theirs, strict=True):
                assert engine.bytes_of(ours) == other.bytes_of(source), "a block differs"
                counts.append(len(ours))
            return result

        monkeypatch.setattr(engine.port, "commit", checked)
    return counts


class Comparing(RealKind):
    """A kind whose duos compare the caches at every commit."""

    def __init__(self, kind: RealKind, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(kind.engines, kind.prompts)
        self.monkeypatch, self.counts = monkeypatch, []

    def duo(self) -> Duo:
        duo = super().duo()
        self.counts = compared(self, self.monkeypatch)
        return duo


@pytest.mark.parametrize("case", CASES)
def test_hops_change_nothing(pair: RealKind, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = run(pair, params(**CASES[case]), 0, PROMPT)
    again, _ = run(pair, params(**CASES[case]), 0, PROMPT)
    assert again == expected, "two undisturbed runs differ"
    kind = Comparing(pair, monkeypatch)
    found, moved = run(kind, params(**CASES[case]), HOPS, PROMPT)
    assert moved == HOPS
    assert found == expected
    assert len(kind.counts) == HOPS
    assert min(kind.counts) > 40


@pytest.mark.parametrize("case", CASES)
def test_four_deaths_change_nothing(pair: RealKind, case: str) -> None:
    """Its tokens are computed again all at once, not one by one as before."""
    expected, _ = run(pair, params(**CASES[case]), 0, PROMPT)
    assert outlived(pair, params(**CASES[case]), prompt=PROMPT) == expected


def test_a_move_that_copies_nothing_would_be_noticed(
    pair: RealKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run(pair, params(temperature=0), 0, PROMPT)
    for engine in pair.engines:
        pull = engine.client.pull
        monkeypatch.setattr(
            engine.client, "pull", lambda t, p, s, d, pull=pull, **how: pull(t, p, [], [])
        )
    found, moved = run(pair, params(temperature=0), 1, PROMPT)
    assert moved == 1
    assert found != expected
