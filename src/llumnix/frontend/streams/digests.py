"""By what a request is known that is sent again: a digest of what an engine computes from.

How its answer is delivered, its priority and its id are not in it.

vLLM internals relied on here (tests/house/test_vllm_survival_contract.py fails when one
changes):
- `EngineCoreRequest`, `SamplingParams`, `PoolingParams` and `LoRARequest` are msgspec structures.
  Fields that begin with "_" follow from others.
- `mm_features[i].identifier` tells the contents of an image or a sound.
"""

import hashlib
from typing import Any

import msgspec
import torch
from vllm.v1.engine import EngineCoreRequest

_DELIVERY = {"output_kind", "stream_interval", "skip_clone", "flat_logprobs"}


def digest_of(request: EngineCoreRequest) -> str:
    """The same for every request of the same contents, in hex digits."""
    lora, embeds = request.lora_request, request.prompt_embeds
    parts = (
        request.prompt_token_ids,
        None if embeds is None else embeds.contiguous().view(torch.uint8).numpy().tobytes(),
        [feature.identifier for feature in request.mm_features or ()],
        _chosen(request.sampling_params),
        _chosen(request.pooling_params),
        None if lora is None else (lora.lora_name, lora.lora_path),
    )
    body = msgspec.msgpack.encode(parts, enc_hook=repr, order="deterministic")
    return hashlib.sha256(body).hexdigest()


def _chosen(params: Any) -> dict[str, Any] | None:
    """What a client has chosen."""
    if params is None:
        return None
    fields = msgspec.structs.asdict(params)
    return {n: v for n, v in fields.items() if n not in _DELIVERY and not n.startswith("_")}
