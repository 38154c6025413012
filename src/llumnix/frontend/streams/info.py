"""What the frontend knows of a stream besides its owner."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from llumnix.core.streams.stream import Stream
from llumnix.core.streams.table import StreamTable
from llumnix.core.types import InstanceId
from llumnix.errors import ConflictError, UnknownRequestError
from llumnix.frontend.context import HttpRequest


@dataclass(slots=True, kw_only=True, eq=False)
class StreamInfo:
    """One sequence on its way to a client."""

    client_id: str  # its X-Request-Id if it sent one, else the id in vLLM's answer
    prompt_tokens: int
    priority: int
    started_s: float  # when the request came, monotonic
    why_placed: str = ""  # where it was sent first
    pooling: bool = False  # it asks for an embedding or a score
    grammar: bool = False  # whether its grammar is to blame if an engine cannot begin it
    sent: EngineCoreRequest | None = None  # kept, for an engine that goes on with it
    why_not_kept: str = ""  # why it is not
    http: HttpRequest | None = None  # that it came with
    kept_bytes: int = 0  # beside its tokens
    session: bool = False  # more input may follow, and must reach the same engine
    between_inputs: bool = False  # it is a session that waits for its next input

    @property
    def age_s(self) -> float:
        """Seconds since the request came."""
        return time.monotonic() - self.started_s


FleetStream = Stream[StreamInfo, EngineCoreOutput]
FleetStreams = StreamTable[StreamInfo, EngineCoreOutput]


def shown(
    stream: FleetStream, instance: InstanceId, finish_reason: str, first_token_s: float | None
) -> dict[str, Any]:
    """What the event log keeps of a stream. `instance` is that of its last owner, `finish_reason`
    is vLLM's word for its end, `first_token_s` how long it waited for its first token."""
    info = stream.info
    return {
        "request": stream.request,
        "client_id": info.client_id,
        "instance": instance,
        "started": info.started_s,
        "priority": info.priority,
        "prompt_tokens": info.prompt_tokens,
        "output_tokens": stream.outputs,
        "finish_reason": finish_reason,
        "first_token_s": None if first_token_s is None else round(first_token_s, 4),
    }


def find(streams: Iterable[FleetStream], request: str) -> FleetStream:
    """The stream that a user means by an id, as `GET /llumnix/v1/requests` shows it."""
    owned = [s for s in streams if s.owner is not None]
    exact = [s for s in owned if s.request == request]
    found = exact or [s for s in owned if s.info.client_id == request]
    if not found:
        raise UnknownRequestError(
            f"no request {request} is running or waiting; GET /llumnix/v1/requests lists them"
        )
    if len(found) > 1:
        names = ", ".join(s.request for s in found)
        raise ConflictError(f"{len(found)} sequences have the id {request}: name one of {names}")
    return found[0]
