"""A frontend's client with fakes all around it: no engine, no controller."""

import asyncio
import dataclasses
import time
import typing
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import zmq
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreReadyResponse,
    EngineCoreRequest,
)
from vllm.v1.serial_utils import MsgpackEncoder

from llumnix.core.events import Dispatch, RequestArrived
from llumnix.core.priorities import Priorities
from llumnix.core.settings import PrioritySettings, SurvivalSettings
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.frontend.client import FleetClient
from llumnix.frontend.engines.sockets import ClientPlace
from llumnix.observe.event_log import EventLog

OFF = SurvivalSettings(lives=0)


class Link:
    """A controller that sends each request where `where` says, and notes what it is told."""

    def __init__(self) -> None:
        self.where = 0
        self.why = ""
        self.asked: list[RequestArrived] = []
        self.told: list[Any] = []

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def tell(self, fact: Any) -> None:
        self.told.append(fact)

    async def place(self, request: RequestArrived) -> Dispatch:
        self.asked.append(request)
        where = self.where
        return Dispatch(
            request=request.request,
            instance=InstanceId(f"i{where}"),
            engine_index=EngineIndex(where),
            why=self.why,
        )


def ready_payload(**fields: Any) -> bytes:
    """What an engine announces itself with."""
    values = {int: 16, str: "x", bool: False}
    hints = typing.get_type_hints(EngineCoreReadyResponse)
    filled = {
        f.name: values.get(hints[f.name])
        for f in dataclasses.fields(EngineCoreReadyResponse)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    return msgspec.msgpack.encode(filled | fields)


def request(name: str, **fields: Any) -> EngineCoreRequest:
    given: dict[str, Any] = {
        "request_id": name,
        "prompt_token_ids": [1, 2, 3],
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=50),
        "pooling_params": None,
        "arrival_time": time.time(),
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**(given | fields))


def packed(outputs: EngineCoreOutputs) -> bytes:
    """A message of an engine in one frame."""
    return b"".join(bytes(part) for part in MsgpackEncoder().encode(outputs))


def tokens(engine: int, name: str, *ids: int, **fields: Any) -> bytes:
    """An engine's message: new tokens of one request."""
    output = EngineCoreOutput(name, list(ids), **fields)
    return packed(EngineCoreOutputs(engine_index=engine, outputs=[output]))


class Front:
    """A client, its fakes, and what happened at its edges."""

    def __init__(self, folder: Path, survival: SurvivalSettings) -> None:
        cache = SimpleNamespace(
            enable_prefix_caching=True, num_gpu_blocks=None, effective_attention_block_size=None,
            block_size=16, mamba_block_size=None, kv_cache_size_tokens=None,
            kv_cache_max_concurrency=None,
        )  # fmt: skip
        config: Any = SimpleNamespace(
            cache_config=cache,
            lora_config=None,
            model_config=SimpleNamespace(max_model_len=100, return_sampling_mask=False),
            aux_output_config=SimpleNamespace(enabled=False),
            parallel_config=SimpleNamespace(worker_extension_cls=""),
            use_v2_model_runner=False,
            kv_transfer_config=None,
            ec_transfer_config=None,
        )
        self.addresses = {
            "input_address": f"ipc://{folder}/in",
            "output_address": f"ipc://{folder}/out",
        }
        self.link = Link()
        link: Any = self.link
        log, priorities = EventLog(None, who="x"), Priorities(PrioritySettings())
        self.client = FleetClient(
            config,
            ClientPlace(**self.addresses),
            link,
            3,
            log,
            priorities,
            hash_prefixes=True,
            survival=survival,
        )
        self.context = zmq.Context()
        self.engines: dict[int, zmq.Socket[bytes]] = {}

    def connect(self, kind: int, address: str, identity: int | None = None) -> "zmq.Socket[bytes]":
        socket = self.context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        if identity is not None:
            socket.setsockopt(zmq.IDENTITY, identity.to_bytes(2, "little"))
        socket.connect(self.addresses[address])
        return socket

    async def add_engine(self, index: int) -> None:
        """Engine `index` of instance `i<index>` announces itself."""
        self.client.engines.expect(InstanceId(f"i{index}"), EngineIndex(index), index)
        self.engines[index] = self.connect(zmq.DEALER, "input_address", index)
        self.engines[index].send(ready_payload())
        await asyncio.wait_for(self.client.engines.ready(EngineIndex(index)), 5)

    async def add_request(self, name: str, engine: int, **fields: Any) -> None:
        self.link.where = engine
        await self.client.add_request_async(request(name, **fields))

    def take_in(self, *frames: bytes) -> None:
        """A message arrives from some engine, or from anybody."""
        self.client._take_in([zmq.Frame(frame) for frame in frames])

    def due(self) -> dict[str, list[Any]]:
        """What AsyncLLM gets by request, since the last look: token ids, and `error` or how it
        ended."""
        seen: dict[str, list[Any]] = {}
        while not self.client.outputs_queue.empty():
            item: Any = self.client.outputs_queue.get_nowait()
            assert not isinstance(item, Exception), item
            if not isinstance(item, EngineCoreOutputs):
                seen.setdefault(item.request, []).append("error")
                continue
            for output in item.outputs:
                heard = seen.setdefault(output.request_id, [])
                heard += output.new_token_ids
                if output.finish_reason is not None:
                    heard.append(str(output.finish_reason))
        return seen

    async def heard(self, engine: int) -> list[list[bytes]]:
        """What has been sent to an engine."""
        found: list[list[bytes]] = []
        for _ in range(20):
            await asyncio.sleep(0)
        while self.engines[engine].poll(50):
            found.append(self.engines[engine].recv_multipart())
        return found


@asynccontextmanager
async def front(
    folder: Path, engines: int = 2, survival: SurvivalSettings = OFF
) -> AsyncIterator[Front]:
    """A client over so many engines. By default a request ends with its engine."""
    one = Front(folder, survival)
    one.client.start()
    try:
        for index in range(engines):
            await one.add_engine(index)
        yield one
    finally:
        one.client.close()
        one.context.destroy(linger=0)
