"""A request that another engine sent is data: what is none is refused, and nothing is run."""

import os
import pickle
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm")

import cloudpickle
import torch
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import (
    CUSTOM_TYPE_CLOUDPICKLE,
    CUSTOM_TYPE_PICKLE,
    MsgpackEncoder,
)

from llumnix.core.migration.port import Refusal
from llumnix.core.types import RequestId
from llumnix.engine.kv.agent_client import AgentClient
from llumnix.engine.migration.request_decoder import RequestDecoder
from llumnix.engine.migration.vllm_destination import VllmDestination
from llumnix.errors import ProtocolError

ran: list[str] = []


class RunsWhenUnpickled:
    def __reduce__(self) -> Any:
        return note, ("ran",)


def note(what: str) -> None:
    """What a pickle can name."""
    ran.append(what)


def made(**fields: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="r1", prompt_token_ids=[1, 2, 3], mm_features=None, pooling_params=None,
        sampling_params=SamplingParams(max_tokens=5), arrival_time=1.0, lora_request=None,
        cache_salt=None, data_parallel_rank=None, **fields,
    )  # fmt: skip


def body(request: EngineCoreRequest) -> bytes:
    (part,) = MsgpackEncoder(size_threshold=2**40).encode(request)
    return bytes(part)


def test_a_request_comes_through_as_it_was() -> None:
    back = RequestDecoder().read(body(made(prompt_embeds=torch.arange(6.0).reshape(2, 3))))
    assert back.prompt_token_ids == [1, 2, 3]
    assert back.sampling_params is not None
    assert back.sampling_params.max_tokens == 5
    assert torch.equal(back.prompt_embeds, torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("code", [CUSTOM_TYPE_PICKLE, CUSTOM_TYPE_CLOUDPICKLE, 99])
def test_nothing_is_unpickled_even_where_vllm_may(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    dumps = pickle.dumps if code == CUSTOM_TYPE_PICKLE else cloudpickle.dumps
    pickle.loads(dumps(RunsWhenUnpickled()))  # noqa: S301
    assert ran == ["ran"], "the set-up"
    ran.clear()
    evil = msgspec.msgpack.Ext(code, dumps(RunsWhenUnpickled()))
    good = msgspec.msgpack.decode(body(made()))
    for place in range(len(good)):
        packed = msgspec.msgpack.encode([*good[:place], evil, *good[place + 1 :]])
        with pytest.raises(ProtocolError):
            RequestDecoder().read(packed)
    with pytest.raises(ProtocolError):
        RequestDecoder().read(msgspec.msgpack.encode(evil))
    assert ran == []


def test_what_is_no_request_is_refused() -> None:
    good = msgspec.msgpack.decode(body(made(prompt_embeds=torch.zeros(2, 3))))
    odd = [None, -1, 1.5, "x", b"x", [], {}, [None], ["float99", [2], b"1"], ["float32", [7], b"1"]]
    read = 0
    for place in range(len(good)):
        for value in odd:
            packed = msgspec.msgpack.encode([*good[:place], value, *good[place + 1 :]])
            try:
                RequestDecoder().read(packed)
            except ProtocolError:
                read += 1
    for packed in (b"", b"\xc1", b"\x93", os.urandom(50)):
        with pytest.raises(ProtocolError):
            RequestDecoder().read(packed)
    assert read > 100


@pytest.mark.parametrize("agents", [[], ["tcp:192.0.2.9:1"] * 2])
def test_a_source_with_another_number_of_workers_is_refused(agents: list[str]) -> None:
    arrivals = object.__new__(VllmDestination)
    arrivals._core = SimpleNamespace(unsupported=None)  # type: ignore[assignment]
    arrivals._arriving = {}
    arrivals._client = AgentClient(agents=["unix:/one"], key=b"", on_pulled=lambda pulled: None)
    scheduler = SimpleNamespace(running=[], kv_holding_waiting=[], requests={})
    arrivals._scheduler = SimpleNamespace(**vars(scheduler), max_num_active_reqs=8)
    answer = arrivals.reserve(RequestId("r1"), body(made()), [], 16, agents)
    assert isinstance(answer, Refusal)
    assert f"{len(agents)} workers" in answer.why
