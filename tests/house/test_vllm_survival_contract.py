"""What survival relies on inside vLLM: a test that fails names what changed, and who relies on
it."""

import copy
import dataclasses
import json
from http import HTTPStatus
from pathlib import Path

import msgspec
import pytest

vllm = pytest.importorskip("vllm")

import torch  # noqa: E402
from vllm.config import AuxOutputConfig, ModelConfig, VllmConfig  # noqa: E402
from vllm.entrypoints.serve.exception_handling.error_response import (  # noqa: E402
    create_error_response,
)
from vllm.exceptions import GracefulHTTPError  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.multimodal.cache.base import MultiModalCache  # noqa: E402
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.pooling_params import PoolingParams  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.v1.engine import EngineCoreRequest  # noqa: E402
from vllm.v1.request import Request  # noqa: E402
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler  # noqa: E402
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder  # noqa: E402

from llumnix.core.messages import REVIVE, Revive  # noqa: E402
from llumnix.core.types import EngineIndex, Epoch, MigrationId, RequestId  # noqa: E402
from llumnix.engine.migration.vllm_core import take_order  # noqa: E402
from llumnix.frontend.http.error_codes import with_code  # noqa: E402
from llumnix.frontend.streams.revivable import again  # noqa: E402

ROOT = Path(vllm.__file__).parent
ORDER = Revive(
    migration=MigrationId("m1"),
    request=RequestId("r"),
    destination=EngineIndex(1),
    epoch=Epoch(2),
    outputs=[5, 6],
)


def source(path: str) -> str:
    return (ROOT / path).read_text()


def request(**fields: object) -> EngineCoreRequest:
    given: dict[str, object] = {
        "request_id": "r", "prompt_token_ids": [1, 2], "mm_features": None,
        "sampling_params": None, "pooling_params": None, "arrival_time": 0.0,
        "lora_request": None, "cache_salt": None, "data_parallel_rank": None,
    }  # fmt: skip
    return EngineCoreRequest(**(given | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sampling", "pooling"])
def test_a_request_carries_our_order_through_vllms_sockets(kind: str) -> None:
    """frontend/streams/revivable.py, engine/migration/vllm_core.py."""
    params = {
        "sampling": {"sampling_params": SamplingParams(extra_args={"mine": 1})},
        "pooling": {"pooling_params": PoolingParams(task="embed", extra_kwargs={"mine": 1})},
    }[kind]
    encoded = MsgpackEncoder().encode(again(request(**params), ORDER))
    decoded = MsgpackDecoder(EngineCoreRequest).decode(encoded)
    made = Request.from_engine_core_request(decoded, None)
    assert take_order(made) == ORDER
    more = (
        made.sampling_params.extra_args
        if made.sampling_params is not None
        else made.pooling_params and made.pooling_params.extra_kwargs
    )
    assert more == {"mine": 1}


@pytest.mark.parametrize("forged", ["text", 7, [1], None, b"odd", b""])
def test_what_a_client_puts_in_the_orders_place_is_dropped(forged: object) -> None:
    made = Request.from_engine_core_request(
        request(sampling_params=SamplingParams(extra_args={REVIVE: forged})), None
    )
    assert take_order(made) is None
    assert made.sampling_params is not None
    assert made.sampling_params.extra_args == {}


def test_copies_of_requests_and_parameters_are_shallow() -> None:
    """frontend/streams/revivable.py: what is kept must not change."""
    params = SamplingParams(extra_args={"a": 1})
    kept = request(sampling_params=params)
    other = copy.copy(kept)
    assert other.prompt_token_ids is kept.prompt_token_ids
    other.sampling_params = copy.copy(params)
    other.sampling_params.extra_args = None
    assert kept.sampling_params is params
    assert params.extra_args == {"a": 1}


def test_a_seeded_generator_draws_once_a_token_whatever_top_k_and_top_p_are() -> None:
    """engine/migration/worker.py: a generator whose state is lost draws as often again."""
    current_platform.import_kernels()
    sampler, logits = TopKTopPSampler(), torch.zeros(1, 64)
    states = []
    for k, p in ((None, None), (torch.tensor([5]), None), (None, torch.tensor([0.9]))):
        generator = torch.Generator().manual_seed(3)
        before = generator.get_state()
        for _ in range(4):
            sampler(logits.clone(), {0: generator}, k, p)
        states.append(generator.get_state())
        assert not torch.equal(states[-1], before)
    assert all(torch.equal(state, states[0]) for state in states)
    assert "self.topk_topp_sampler = TopKTopPSampler(" in source("v1/sample/sampler.py")
    assert "self.sampler = Sampler(" in source("v1/worker/gpu_model_runner.py")
    assert "self.vocab_size = vocab_size" in source("v1/worker/gpu_input_batch.py")


def test_what_an_engine_keeps_until_the_last_token_is_named_by_the_configuration() -> None:
    """frontend/streams/revivable.py."""
    assert "aux_output_config" in {f.name for f in dataclasses.fields(VllmConfig)}
    assert AuxOutputConfig(enable_return_routed_experts=True).enabled
    assert "return_sampling_mask" in {f.name for f in dataclasses.fields(ModelConfig)}
    assert isinstance(VllmConfig.use_v2_model_runner, property)


def test_the_size_of_an_image_is_that_of_its_tensors() -> None:
    """frontend/streams/revivable.py."""
    assert MultiModalCache.get_item_size(MultiModalKwargsItem.dummy(1000)) == 1000


def test_parameters_of_a_kv_transfer_are_where_we_drop_them() -> None:
    """frontend/streams/revivable.py."""
    params = SamplingParams(extra_args={"kv_transfer_params": {"do_remote_prefill": True}})
    sent = Request.from_engine_core_request(request(sampling_params=params), None)
    assert sent.kv_transfer_params == {"do_remote_prefill": True}
    sent_again = again(request(sampling_params=params), ORDER)
    once_more = Request.from_engine_core_request(sent_again, None)
    assert once_more.kv_transfer_params is None


def test_a_request_is_read_field_by_field_for_its_digest() -> None:
    """frontend/streams/digests.py."""
    for structure in (EngineCoreRequest, SamplingParams, PoolingParams, LoRARequest):
        assert issubclass(structure, msgspec.Struct)
    assert {"output_kind", "stream_interval", "skip_clone", "flat_logprobs"} <= set(
        SamplingParams.__struct_fields__
    )
    assert "output_kind" in PoolingParams.__struct_fields__
    assert "identifier" in {f.name for f in dataclasses.fields(MultiModalFeatureSpec)}


def test_an_error_is_json_with_a_code_also_in_a_stream() -> None:
    """frontend/http/error_codes.py writes its own code there."""
    error = create_error_response(GracefulHTTPError("no", HTTPStatus.UNPROCESSABLE_ENTITY))
    assert error.model_dump()["error"]["code"] == 422
    event = f"data: {json.dumps(error.model_dump())}\n\n".encode()
    assert b'"code":"x"' in with_code(event, "x")
    for path in ("chat_completion", "completion"):
        text = source(f"entrypoints/openai/{path}/serving.py")
        assert 'yield f"data: {data}\\n\\n"' in text
        assert "self.create_streaming_error_response(e)" in text
