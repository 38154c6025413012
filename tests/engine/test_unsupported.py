"""What is never moved, since its state would not come along: one reason at a time."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams

from llumnix.engine.migration.unsupported import (
    WORKER_EXTENSION,
    engine_unsupported,
    request_unsupported,
)


def engine() -> tuple[SimpleNamespace, SimpleNamespace]:
    """The configuration and the scheduler of one whose requests are moved."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            worker_extension_cls=WORKER_EXTENSION,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        model_config=SimpleNamespace(runner_type="generate", uses_mrope=False, is_diffusion=False),
        speculative_config=None,
    )
    scheduler = SimpleNamespace(
        connector=None,
        ec_connector=None,
        aux_output_connector=None,
        has_mamba_layers=False,
        needs_kv_cache_zeroing=False,
        prefix_replay_tokens=0,
        is_encoder_decoder=False,
    )
    return config, scheduler


@pytest.mark.parametrize(
    ("where", "what", "why"),
    [
        ("parallel", {"worker_extension_cls": "a.B"}, "--worker-extension-cls of your own"),
        ("parallel", {"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ("parallel", {"decode_context_parallel_size": 2}, "context parallelism"),
        ("parallel", {"prefill_context_parallel_size": 2}, "context parallelism"),
        ("config", {"speculative_config": object()}, "speculative decoding"),
        ("scheduler", {"connector": object()}, "a KV connector"),
        ("scheduler", {"ec_connector": object()}, "an encoder-cache connector"),
        ("scheduler", {"aux_output_connector": object()}, "auxiliary outputs"),
        ("scheduler", {"has_mamba_layers": True}, "Mamba layers"),
        ("scheduler", {"needs_kv_cache_zeroing": True}, "a KV cache of mixed precision"),
        ("scheduler", {"prefix_replay_tokens": 1}, "replayed sliding windows"),
        ("scheduler", {"is_encoder_decoder": True}, "an encoder-decoder model"),
        ("model", {"runner_type": "pooling"}, "a pooling model"),
        ("model", {"uses_mrope": True}, "M-RoPE"),
        ("model", {"is_diffusion": True}, "a diffusion model"),
    ],
)
def test_an_engine_that_keeps_more_than_blocks_of_kv_gives_and_takes_no_request(
    where: str, what: dict[str, Any], why: str
) -> None:
    config, scheduler = engine()
    assert engine_unsupported(config, scheduler) is None
    parts = {
        "config": config,
        "scheduler": scheduler,
        "parallel": config.parallel_config,
        "model": config.model_config,
    }
    vars(parts[where]).update(what)
    said = engine_unsupported(config, scheduler)
    assert said is not None
    assert f"not moved with {why}" in said or f"not moved with a {why}" in said


def request(**fields: Any) -> Any:
    plain = {
        "sampling_params": SamplingParams(),
        "pooling_params": None,
        "mm_features": [],
        "prompt_embeds": None,
        "prompt_token_ids": [1],
        "resumable": False,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "num_output_tokens": 0,
    }
    return SimpleNamespace(**(plain | fields))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"pooling_params": PoolingParams(task="embed")}, "an embedding or a score"),
        ({"sampling_params": None}, "an embedding or a score"),
        ({"mm_features": ["an image"]}, "multimodal inputs"),
        ({"prompt_embeds": object()}, "its prompt is embeddings"),
        ({"prompt_token_ids": None}, "its prompt is embeddings"),
        ({"resumable": True}, "a session of streamed inputs"),
        ({"kv_transfer_params": {"a": 1}}, "parameters of a KV transfer"),
        ({"ec_transfer_params": {"a": 1}}, "parameters of a KV transfer"),
        ({"sampling_params": SamplingParams(prompt_logprobs=1)}, "after its first token"),
    ],
)
def test_a_request_that_is_more_than_tokens_stays(fields: dict[str, Any], why: str) -> None:
    assert request_unsupported(request()) is None
    said = request_unsupported(request(**fields))
    assert said is not None
    assert why in said


def test_log_probabilities_of_a_prompt_keep_a_request_until_its_first_token() -> None:
    params = SamplingParams(prompt_logprobs=1)
    assert request_unsupported(request(sampling_params=params, num_output_tokens=1)) is None
