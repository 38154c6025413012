"""The requests of one frontend, and the engine that each runs on."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llumnix.core.types import EngineIndex, InstanceId, RequestId


@dataclass(slots=True, kw_only=True)
class Stream:
    """One sequence on its way to a client. Token counts in tokens, `started_s` monotonic. `ledger`:
    of core/streams/table.py; `instance` and `engine_index` follow its owner.

    `grammar`: an engine that cannot begin it has found a bad grammar. `logprobs`: its client wants
    log-probabilities. `pooling`: it asks for an embedding or a score.
    `session`: more input may follow under the same request, which then must reach the same engine;
    `between_inputs`: it waits for that."""

    request: RequestId
    client_id: str
    instance: InstanceId
    engine_index: EngineIndex
    prompt_tokens: int
    priority: int
    started_s: float
    ledger: Any
    pooling: bool = False
    grammar: bool = False
    logprobs: bool = False
    session: bool = False
    between_inputs: bool = False

    @property
    def output_tokens(self) -> int:
        """Tokens that have arrived here."""
        return int(self.ledger.outputs)

    def shown(self, finish_reason: str) -> dict[str, Any]:
        """What the event log keeps of it. `finish_reason`: vLLM's word for how it ended."""
        return {
            "request": self.request,
            "client_id": self.client_id,
            "instance": self.instance,
            "started": self.started_s,
            "priority": self.priority,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "finish_reason": finish_reason,
        }


class Streams:
    """The open streams, by request and counted by engine."""

    def __init__(self) -> None:
        self._by_request: dict[RequestId, Stream] = {}
        self._by_engine: dict[EngineIndex, dict[RequestId, Stream]] = {}
        self.instances: dict[EngineIndex, InstanceId] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._by_request.values()))

    def get(self, request: str) -> Stream | None:
        """The open stream of that request."""
        return self._by_request.get(RequestId(request))

    def open(self, stream: Stream) -> None:
        """Takes in a stream."""
        self._by_request[stream.request] = stream
        self._by_engine.setdefault(stream.engine_index, {})[stream.request] = stream

    def move(self, request: str, engine_index: EngineIndex) -> None:
        """The request runs on another engine now."""
        stream = self._by_request[RequestId(request)]
        self._leave(stream)
        stream.engine_index = engine_index
        stream.instance = self.instances[engine_index]
        self._by_engine.setdefault(engine_index, {})[stream.request] = stream

    def close(self, request: str) -> Stream | None:
        """Forgets the request's stream and returns it, if it was open."""
        stream = self._by_request.pop(RequestId(request), None)
        if stream is not None:
            self._leave(stream)
        return stream

    def _leave(self, stream: Stream) -> None:
        mine = self._by_engine[stream.engine_index]
        del mine[stream.request]
        if not mine:
            del self._by_engine[stream.engine_index]

    def owner(self, request: str) -> EngineIndex:
        """The engine of an open stream."""
        return self._by_request[RequestId(request)].engine_index

    def on(self, engine_index: EngineIndex) -> list[Stream]:
        """The open streams of one engine."""
        return list(self._by_engine.get(engine_index, {}).values())

    def count(self, engine_index: EngineIndex) -> int:
        """How many streams are open on one engine."""
        return len(self._by_engine.get(engine_index, ()))

    def age_s(self, stream: Stream) -> float:
        """Seconds since the stream was opened."""
        return time.monotonic() - stream.started_s
