"""Which requests can go on at another engine once theirs has died, and how they are sent again.

A request is sent again as its client sent it, with the tokens that the client has. So each feature
whose state follows from the two goes on as if nothing had happened. The others are here.

vLLM internals relied on here
(tests/house/test_vllm_survival_contract.py fails when one changes):
- `EngineCoreRequest` is a msgspec structure; `copy.copy` of it, and of its parameters, is shallow.
- An engine keeps the grown prompt of a `resumable` request to itself.
- Routed experts, sampling masks and what an auxiliary connector brings come with a request's last
  output, for all of its tokens.
- `prompt_logprobs` come with a request's first token. A preempted request of runner V1 would send
  them again.
- A `late_interaction_params` query's embedding stays in the memory of its engine.
- `extra_args["kv_transfer_params"]` may tell an engine to fetch KV that another one keeps for it.
- `MultiModalCache.get_item_size` tells the bytes of an image's or a sound's tensors.
- Runner V1 (`use_v2_model_runner` is False) is told of a resumed request by the worker extension.
"""

import copy
from typing import Any

from vllm.config import VllmConfig
from vllm.multimodal.cache.base import MultiModalCache
from vllm.v1.engine import EngineCoreRequest

from llumnix.core.messages import REVIVE, Revive
from llumnix.wire import encode


def why_never(request: EngineCoreRequest, config: VllmConfig) -> str | None:
    """Why the request cannot outlive its engine, whenever that dies; None if it can."""
    if request.resumable:
        return "it is a session, whose inputs the engine kept"
    pooling = request.pooling_params
    if pooling is not None and pooling.late_interaction_params is not None:
        return "it is scored against an embedding that died with the engine"
    if config.aux_output_config.enabled or config.model_config.return_sampling_mask:
        return "the engine kept what comes with its last token"
    return None


def why_not_now(request: EngineCoreRequest, config: VllmConfig, outputs: int) -> str | None:
    """Why a request with so many tokens cannot go on at another engine; None if it can. Without a
    token any can."""
    if not outputs or config.use_v2_model_runner:
        return None
    if config.parallel_config.worker_extension_cls:
        return "with a --worker-extension-cls of your own only requests without tokens go on"
    if request.mm_features:
        return "it has multimodal inputs and tokens, which model runner V1 cannot resume"
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "its prompt is embeddings, which model runner V1 cannot resume"
    return None


def kept_bytes(request: EngineCoreRequest) -> int:
    """About how many bytes keeping the request holds in memory beside its tokens."""
    size = 0 if request.prompt_embeds is None else request.prompt_embeds.nbytes
    features = (f.data for f in request.mm_features or () if f.data is not None)
    return size + sum(MultiModalCache.get_item_size(data) for data in features)


def again(request: EngineCoreRequest, order: Revive) -> EngineCoreRequest:
    """The request as it is sent to the engine that `order` grants it to."""
    sent = copy.copy(request)
    if sent.pooling_params is not None:
        sent.pooling_params = copy.copy(sent.pooling_params)
        sent.pooling_params.extra_kwargs = _with(sent.pooling_params.extra_kwargs, order)
        return sent
    params = sent.sampling_params = copy.copy(sent.sampling_params)
    assert params is not None
    more = _with(params.extra_args, order)
    more.pop("kv_transfer_params", None)  # What was kept for it elsewhere has been fetched.
    params.extra_args = more
    if order.outputs:
        params.prompt_logprobs = params.prompt_logprob_token_ids = None  # The client has them.
    return sent


def _with(more: dict[str, Any] | None, order: Revive) -> dict[str, Any]:
    return {**(more or {}), REVIVE: encode(order)}
