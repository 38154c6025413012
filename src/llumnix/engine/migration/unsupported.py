"""What cannot be moved, and why. It is asked before a migration begins, so that the request stays.

vLLM internals relied on here (tests/house/test_vllm_migration_contract.py fails when one
changes): the names of fields of the configuration, the scheduler and `Request`.
"""

from typing import Any

from vllm.v1.request import Request

WORKER_EXTENSION = "llumnix.engine.migration.worker.LlumnixWorker"


def ours(config: Any) -> bool:
    """Whether an engine's workers carry our extension, and not one of the user's."""
    return bool(config.parallel_config.worker_extension_cls == WORKER_EXTENSION)


def engine_unsupported(config: Any, scheduler: Any) -> str | None:
    """Why no request of such an engine can be moved, or None."""
    parallel, model = config.parallel_config, config.model_config
    reasons = (
        (
            not ours(config),
            "a --worker-extension-cls of your own, for llumnix needs that place",
        ),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism",
        ),
        (config.speculative_config is not None, "speculative decoding"),
        (scheduler.connector is not None, "a KV connector"),
        (scheduler.ec_connector is not None, "an encoder-cache connector"),
        (scheduler.aux_output_connector is not None, "auxiliary outputs"),
        (scheduler.has_mamba_layers, "Mamba layers, whose state is not kept in blocks of tokens"),
        (scheduler.needs_kv_cache_zeroing, "a KV cache of mixed precision"),
        (scheduler.prefix_replay_tokens > 0, "replayed sliding windows"),
        (scheduler.is_encoder_decoder, "an encoder-decoder model"),
        (model.runner_type != "generate", "a pooling model"),
        (model.uses_mrope, "M-RoPE, whose positions only a new request gets"),
        (model.is_diffusion, "a diffusion model"),
    )
    for applies, what in reasons:
        if applies:
            return f"requests are not moved with {what}"
    return None


def request_unsupported(request: Request) -> str | None:
    """Why this request cannot be moved, or None."""
    params = request.sampling_params
    if request.pooling_params is not None or params is None:
        return "it asks for an embedding or a score"
    if request.mm_features:
        return "it has multimodal inputs"
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        return "its prompt is embeddings"
    if request.resumable:
        return "it is a session of streamed inputs"
    if request.kv_transfer_params or request.ec_transfer_params:
        return "it carries parameters of a KV transfer"
    wanted = params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
    if wanted and not request.num_output_tokens:
        return "its prompt's log-probabilities are being collected; try again after its first token"
    return None
