"""What an instance reports of itself: raw facts, derived from nowhere else.

Rule: a report holds what its engine counted, in tokens and requests. Whatever is derived from it
is derived in the scheduler's process, in one place.
"""

from dataclasses import dataclass

from llumnix.core.types import EngineIndex, InstanceId, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One instance's load at one moment.

    `sequence` grows by one a report within one run of the engine (`engine_index`).
    `kv_tokens_used` and `kv_tokens_total` are whole blocks' worth of tokens; blocks that only the
    prefix cache holds count as free. `admitted` are the requests that reached the engine since
    the report before: they are in `running` or `waiting` now, or already finished.
    `accepting` is false while the instance takes no new requests.
    """

    instance: InstanceId
    engine_index: EngineIndex
    sequence: int
    kv_tokens_used: int
    kv_tokens_total: int
    running: int
    waiting: int
    admitted: tuple[RequestId, ...] = ()
    accepting: bool = True
